"""Every error a user can cause, on one page. A message says where, what was found, what was expected, what to do."""

from __future__ import annotations


class QncdError(Exception):
    """A user's mistake or a missing thing: one line on standard error, exit code 1, no traceback."""


class UsageError(QncdError):
    """Arguments that contradict each other or name nothing: exit code 2."""


class LabelError(QncdError):
    """A class that the network does not have, or its null class where a picture's is wanted."""


class PromptError(QncdError):
    """Prompts that cannot be read, or are given to a network that takes none."""


class CheckpointError(QncdError):
    """A checkpoint or its config cannot be read, or is not what it claims to be."""


class CalibrationError(QncdError):
    """Calibration or fitting data are missing, empty, not finite, or do not fit the network."""


class PlanError(QncdError):
    """A quantization plan that cannot be made or does not fit the graph."""


class ExportError(QncdError):
    """A network cannot be traced, or an exported graph breaks one of the rules in export/verify.py."""


class BundleError(QncdError):
    """A bundle is missing, incomplete, changed on disk, or of an unknown schema."""


class ScheduleError(QncdError):
    """A sampling schedule that cannot be made, or a correction table fitted for another one."""


class EngineError(QncdError):
    """An engine refuses its inputs or fails while running."""


class Diverged(EngineError):
    """Sampling ended in latents or pictures that are not finite."""


class BackendMissing(EngineError):
    """The library or device that a backend needs is not on this machine."""


class BuildFailed(EngineError):
    """The backend could not turn the graph into an engine."""


class GateFailed(QncdError):
    """A --require-* gate was not met: exit code 3."""


def install_line(extra: str) -> str:
    """How to get an optional part, for a message: the package is on no index, so from the checkout."""
    return f'pip install ".[{extra}]" in the checkout'


def first_line(error: BaseException) -> str:
    """The first line of a library's message that says something, without its full stop, for a message of ours."""
    lines = (line.strip() for line in str(error).splitlines())
    said = (line for line in lines if line and not line.startswith("Exception from "))  # OpenVINO: where, not what
    return next(said, type(error).__name__).rstrip(". ")
