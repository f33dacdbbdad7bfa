"""What pictures are asked to be: of which classes or prompts, how large; what a bundle cannot do is refused."""

from __future__ import annotations

from collections.abc import Sequence

from qncd_deploy.bundle import ConditionFacts, ModelFacts
from qncd_deploy.errors import LabelError, UsageError


def parse_labels(text: str, condition: ConditionFacts | None) -> tuple[int, ...]:
    """What --class-label says: K, K,K,... or "all", as labels to take turns.

    Raises: UsageError for anything else, LabelError for a class that the network does not have and for its null class.
    """
    if condition is None:
        raise UsageError(f"--class-label {text}: the network has no classes. Leave it out.")
    if condition.kind == "text":
        raise UsageError(f"--class-label {text}: the network draws prompts, not classes. Leave it out.")
    if text.strip() == "all":
        return condition.valid
    try:
        labels = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--class-label {text}: expected a class number, several with commas, or all.") from None
    check_labels(labels, condition)
    return labels


def check_prompts(
    condition: ConditionFacts | None,
    guidance_scale: float,
    *,
    prompts: Sequence[str] | None = None,
    negative_prompt: str | None = None,
) -> None:
    """Raises UsageError for prompts, in whatever form, that would have no effect: the network takes none, there are
    none, or the negative one is not led away from.
    """
    given = "--negative-prompt" if prompts is None else "--prompt"
    if condition is None or condition.kind != "text":
        instead = "takes no prompts. Leave it out" if condition is None else "has classes. Use --class-label"
        raise UsageError(f"{given}: the network {instead}.")
    if prompts is not None and not prompts:
        raise UsageError(f"{given}: no prompts, expected one or more.")
    if negative_prompt is not None and guidance_scale == 1:
        raise UsageError(
            "--negative-prompt: without guidance it has no effect. Give a --guidance-scale, or leave it out."
        )


def check_labels(labels: Sequence[int], condition: ConditionFacts) -> None:
    """Raises LabelError, with the valid range, for a class that the network does not have and for its null class."""
    for label in labels:
        if label == condition.null_class:
            raise LabelError(f"class {label} is the null class of guidance, not a picture's. {_range(condition)}")
        if label not in condition.valid:
            raise LabelError(f"class {label}: the network does not have it. {_range(condition)}")


def _range(condition: ConditionFacts) -> str:
    last = condition.classes - 1
    if condition.null_class is None:
        return f"Use 0 to {last}."
    if condition.null_class == last:
        return f"Use 0 to {last - 1}."
    return f"Use 0 to {last} without {condition.null_class}."


def check_size(facts: ModelFacts, *, height: int | None = None, width: int | None = None) -> None:
    """Raises UsageError for a size of pictures that is not the one that the bundle was made for, in pixels."""
    if facts.picture_shape is None:
        return
    _, own_height, own_width = facts.picture_shape
    for flag, asked, own in (("--height", height, own_height), ("--width", width, own_width)):
        if asked not in (None, own):
            raise UsageError(
                f"{flag} {asked}: the bundle draws {own_height} x {own_width} pixels (height x width) and no other "
                f"size. Run `qncd export` again with {flag} {asked}."
            )
