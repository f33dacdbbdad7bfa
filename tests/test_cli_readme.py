"""What README and the page of models say can be typed: their commands parse, the options they name are options."""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from pathlib import Path

import click
import pytest
from cli_helpers import qncd

from qncd_deploy.cli import qncd as group

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
if not README.exists():
    pytest.skip("there is no README", allow_module_level=True)
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in (README, ROOT / "docs/models.md"))
OTHERS_OPTIONS = {"--no-index", "--find-links", "--extra-index-url", "--index-url"}
"""Long options in README that belong to other programs."""


def shell_lines() -> list[str]:
    """Lines of README's code blocks, continued lines joined, prompts and comments taken off."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console|text)?\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    blocks += ["\n".join(re.findall(r"^    (?:\$ )?(.*)$", TEXT, re.MULTILINE))]
    return [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands() -> list[tuple[str, ...]]:
    """Every call of `qncd` or `qncd-export` in them and in README's running text, as words."""
    found = []
    for line in [*shell_lines(), *re.findall(r"`(qncd[^`\n]*)`", TEXT)]:
        for part in re.split(r"&&|\|\||[;|]", line):
            words = re.sub(r"(^|\s)#.*", "", part).split(maxsplit=1)
            if words and Path(words[0]).name in ("qncd", "qncd-export"):
                found.append((Path(words[0]).name, *shlex.split(" ".join(words[1:]))))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_readme_parses(words: tuple[str, ...]) -> None:
    name, *args = words if words[0] == "qncd" else ("qncd", "export", *words[1:])
    if not args[1:]:  # the name alone, or --version
        assert not args or args[0].startswith("-") or args[0] in group.commands
        return
    if "--help" in args:
        return
    command = group.commands[args[0]]
    command.make_context(f"{name} {args[0]}", args[1:])


def test_readme_shows_commands() -> None:
    assert commands()


def test_every_option_in_readme_exists() -> None:
    context = click.Context(group)
    parameters = [p for c in (group, *group.commands.values()) for p in c.get_params(context)]
    known = {option for p in parameters for option in (*p.opts, *p.secondary_opts)}
    own = "\n".join(line for line in TEXT.splitlines() if not re.search(r"\b(pip|pytest|git|docker|apt) ", line))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", own))
    assert named - OTHERS_OPTIONS <= known


@pytest.mark.parametrize("name", sorted(group.commands))
def test_help_names_every_option_and_its_meaning(name: str) -> None:
    done = qncd(name, "--help")
    assert done.code == 0 and done.err == ""
    for parameter in group.commands[name].params:
        for option in (*parameter.opts, *parameter.secondary_opts) if isinstance(parameter, click.Option) else ():
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", done.out), option
        assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


def test_version() -> None:
    try:
        installed = metadata.version("qncd-deploy")
    except metadata.PackageNotFoundError:
        pytest.skip("the package runs from its source folder and is not installed")
    done = qncd("--version")
    assert done.code == 0 and done.out == f"qncd, version {installed}\n"


def test_a_bare_call_names_the_commands() -> None:
    bare = qncd()
    assert bare.code in (0, 2) and all(name in bare.out + bare.err for name in group.commands)
    assert qncd("no-such-command").code == 2
