"""The command line: a thin shell over the library. Each command parses, makes one library call, says what came of it.

Exit codes: 0 done; 1 the user's mistake or a missing thing, one line on standard error; 2 wrong usage; 3 a gate
(--require-*) not met; 130 Ctrl-C. Results go to standard output, messages and progress to standard error.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import click

from qncd_deploy.cli import bench, build, export, look, sample
from qncd_deploy.cli import eval as evaluation
from qncd_deploy.errors import GateFailed, QncdError, UsageError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


@click.group(context_settings=CONTEXT, no_args_is_help=True)
@click.version_option(package_name="qncd-deploy", prog_name="qncd")
def qncd() -> None:
    """Diffusion checkpoints to quantized, corrected, deployable engines."""


for _command in (
    export.export_command,
    build.build_command,
    sample.fit_command,
    sample.sample_command,
    evaluation.eval_command,
    bench.bench_command,
    look.inspect_command,
    look.verify_command,
    look.doctor_command,
):
    qncd.add_command(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `qncd`."""
    sys.exit(run(qncd, args, "qncd"))


def export_main(args: Sequence[str] | None = None) -> None:
    """Entry point of `qncd-export`, which is `qncd export`."""
    sys.exit(run(export.export_command, args, "qncd-export", context_settings=CONTEXT))


def run(command: click.Command, args: Sequence[str] | None, name: str, **extra: object) -> int:
    """Run a command and return its exit code; only a bug of ours leaves with a traceback."""
    # read at torch's first tensor: large ones in huge pages (a softmax of 270 MB: three times as fast)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for library in ("torch", "onnxscript", "onnx_ir", "diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    logging.getLogger("qncd_deploy").setLevel(logging.INFO)
    if extra:
        command.context_settings = {**command.context_settings, **CONTEXT}
    words = sys.argv[1:] if args is None else list(args)
    try:
        command.main(args=words, prog_name=name, standalone_mode=False, obj=(name, *words))  # see typed_command
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except UsageError as error:
        return _say(error, 2)
    except GateFailed as error:
        return _say(error, 3)
    except QncdError as error:
        return _say(error, 1)
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted; nothing half-written is left, and a new run goes on from what was recorded", 130)
    except BrokenPipeError:  # `qncd inspect ... | head`
        sys.stderr.close()
        return 0
    return 0


def _say(message: object, code: int) -> int:
    click.echo(f"qncd: {message}", err=True)
    return code
