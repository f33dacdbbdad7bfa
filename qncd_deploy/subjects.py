"""What pictures are asked to be: of which classes or prompts, how large; what a bundle cannot do is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qncd_deploy.bundle import ConditionFacts, ModelFacts, TextFacts
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


def at_size(facts: ModelFacts, *, height: int | None = None, width: int | None = None) -> ModelFacts:
    """The facts for pictures of another size, in pixels; None is the network's own.

    Raises: UsageError for a size that the network does not draw.
    """
    own = facts.picture_shape
    usual = (None, None) if own is None else own[1:]
    asked = zip(("--height", "--width"), (height, width), usual, strict=True)
    changed = [(flag, side) for flag, side, mine in asked if side not in (None, mine)]
    if not changed:
        return facts
    flag, side = changed[0]
    if own is None:
        raise UsageError(f"{flag} {side}: the network draws latents, which have no size in pixels. Leave it out.")
    if facts.size_multiple is None:
        raise UsageError(
            f"{flag} {side}: the bundle draws {own[1]} x {own[2]} pixels (height x width) and no other size. Leave it "
            f"out, or run `qncd export` with {flag} {side}, if the network is one for that size."
        )
    check_sides(own, facts.size_multiple, height=height, width=width)
    shape, latents = resized(own, facts.latent_shape, height=height, width=width)
    return replace(
        facts,
        latent_shape=latents,
        image_shape=None if facts.image_shape is None else shape,
        text=None if facts.text is None else told_size(facts.text, shape),
    )


Shape = tuple[int, int, int]


def resized(
    image_shape: Sequence[int], latent_shape: Sequence[int], *, height: int | None, width: int | None
) -> tuple[Shape, Shape]:
    """(C, H, W) of a picture and of its latents with other sides, in pixels; None is as it is."""
    channels, own_height, own_width = image_shape
    factor, shape = own_height // latent_shape[1], (channels, height or own_height, width or own_width)
    return shape, (latent_shape[0], shape[1] // factor, shape[2] // factor)


def told_size(text: TextFacts, image_shape: Sequence[int]) -> TextFacts:
    """The same text with what a network that is told a picture's size is told of this one."""
    return text if text.time_ids is None else replace(text, time_ids=size_ids(image_shape))


def latent_multiple(facts: ModelFacts) -> int | None:
    """What the sides of latents are multiples of; None for a network that takes one size only."""
    if facts.size_multiple is None or facts.picture_shape is None:
        return None
    return facts.size_multiple * facts.latent_shape[1] // facts.picture_shape[1]


def takes_latents(facts: ModelFacts, shape: Sequence[int]) -> bool:
    """Whether a network takes latents of this shape, (C, H, W)."""
    step, (channels, *sides) = latent_multiple(facts), shape
    if step is None:
        return tuple(shape) == tuple(facts.latent_shape)
    return channels == facts.latent_shape[0] and all(side % step == 0 for side in sides)


def check_sides(own: Sequence[int], multiple: int, *, height: int | None = None, width: int | None = None) -> None:
    """Raises UsageError for sides of a picture that a network would have to pad. own: (C, H, W) of its own pictures."""
    for flag, side, usual in (("--height", height, own[1]), ("--width", width, own[2])):
        if side is not None and (side < 1 or side % multiple):
            raise UsageError(
                f"{flag} {side}: expected a multiple of {multiple}, which the network halves down to whole numbers "
                f"({usual} is its own)."
            )


def size_ids(image_shape: Sequence[int]) -> tuple[int, ...]:
    """What SDXL is told of a picture (C, H, W): it was that large, is not cropped, and shall be that large."""
    _, height, width = image_shape
    return (height, width, 0, 0, height, width)
