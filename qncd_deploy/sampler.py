"""An open network with a schedule and a correction: pictures by index, batch by batch, through the host loop.

Latents, noise, update and corrections live where the network computes, on a GPU for TensorRT: noise is drawn on the
host and brought there, a batch's result is brought back, and nothing waits in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from qncd_deploy.bundle import ConditionFacts, ModelFacts
from qncd_deploy.correct.fitting import State
from qncd_deploy.correct.record import CorrectionTable, StepFix, fixed_steps
from qncd_deploy.correct.rules import check
from qncd_deploy.engines.base import BaseEngine, Kernel
from qncd_deploy.engines.decoder import decode
from qncd_deploy.engines.eps_model import EngineModel, group_rows, input_roles, input_shapes, row_sizes
from qncd_deploy.errors import Diverged, UsageError
from qncd_deploy.pictures import Pictures, to_uint8
from qncd_deploy.sample import PictureNoise, denoise, guided, labels_for
from qncd_deploy.schedule import Schedule
from qncd_deploy.specs import Array, Arrays, Conditions, EpsModel, HostArrays
from qncd_deploy.steps import Memory, SamplerConfig, Step, initial_scale
from qncd_deploy.subjects import check_labels, check_prompts

if TYPE_CHECKING:
    from typing import Self

_LATENT_NUMBERS = 1 << 16  # of one default batch: 16 latents of 4x32x32, 5 pictures of 3x64x64
_LARGEST_DEFAULT_BATCH = 16


@dataclass(frozen=True, eq=False)
class Text:
    """What the labels of a text network stand for. prompts: by label;  encode: others, and a negative one as the last
    row, to what the network is told of them, as Network.embedding.
    """

    prompts: tuple[str, ...]
    encode: Callable[[Sequence[str], str | None], Mapping[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Network:
    """The open engines of one bundle and what the loop must know of them.

    place: the bundle, for messages;  source: hash of the graph and its weights;  decoder: None if the latents are the
    pictures;  embedding: what the network is told of every class, (classes, ...) by graph input; None without classes;
    text: of a network whose classes are prompts;  slices: pictures are decoded one at a time.
    """

    place: Path
    source: str
    facts: ModelFacts
    schedule: Schedule
    unet: BaseEngine
    decoder: BaseEngine | None
    embedding: Mapping[str, np.ndarray] | None
    text: Text | None = None
    slices: bool = False


class Sampler:
    """Draws pictures; a context manager that closes its engines.

    Pictures go by index: noise and label of picture i depend on (seed, i) alone, whatever else is sampled with it.
    table: the correction in use (method "off" for none), whose key says how this samples;  steps: one row per network
    call;  batch_size: pictures at a time.
    """

    def __init__(
        self,
        network: Network,
        *,
        config: SamplerConfig,
        guidance_scale: float,
        table: CorrectionTable,
        batch_size: int | None = None,
        resources: ExitStack | None = None,
    ) -> None:
        self.network = network
        self.config = config
        self.guidance_scale = guidance_scale
        self.table = table
        self.steps: tuple[Step, ...] = fixed_steps(network.schedule, config, table.fixes)
        check(table.fixes, self.steps)
        self.initial_scale = initial_scale(network.schedule, config)
        self.batch_size = batch_size or default_batch(network.facts.latent_shape)
        self._arrays = network.unet.arrays
        self._fixes = None if table.method == "off" else tuple(brought(fix, self._arrays) for fix in table.fixes)
        self._resources = resources or ExitStack()

    def prompted(self, prompts: Sequence[str] | None = None, negative_prompt: str | None = None) -> Sampler:
        """This sampler, whose engines it uses, for other prompts: they are encoded once, here.

        prompts: None for the bundle's own;  negative_prompt: what guidance leads away from, None
        for what the network was made to be led away from, "" or zeros (see TextFacts).
        Raises: UsageError as check_prompts does; EngineError or BundleError if they cannot be encoded.
        """
        network = self.network
        check_prompts(network.facts.condition, self.guidance_scale, prompts=prompts, negative_prompt=negative_prompt)
        assert network.text is not None, "a text network comes with a way to encode"
        drawn = network.text.prompts if prompts is None else tuple(prompts)
        told = network.text.encode(drawn, negative_prompt)
        condition = ConditionFacts("text", classes=len(drawn) + 1, null_class=len(drawn))
        return self.using(
            replace(
                network,
                facts=replace(network.facts, condition=condition),
                embedding=told,
                text=replace(network.text, prompts=drawn),
            )
        )

    def using(self, network: Network | None = None, *, table: CorrectionTable | None = None) -> Sampler:
        """A sampler for another form of the network or with another table, which leaves the engines to this one."""
        return Sampler(
            network or self.network,
            config=self.config,
            guidance_scale=self.guidance_scale,
            table=table or self.table,
            batch_size=self.batch_size,
        )

    def sample(
        self,
        pictures: int | Sequence[int],
        *,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        on_state: Callable[[State], None] | None = None,
    ) -> Pictures:
        """Pictures 0 .. n-1, or those with the indices given.

        labels: picture i gets labels[i mod len(labels)]; None for i mod classes, the null class not counted.
        prompts, negative_prompt: of a text network, see `prompted`, which encodes them once for several calls.
        batch_size: pictures at a time, None for the sampler's own or all of them if they are fewer.
        on_state: called after every network call of every batch; see `trajectory` for what it may do with a state.
        """
        told = self if prompts is None and negative_prompt is None else self.prompted(prompts, negative_prompt)
        batches = told.batches(pictures, labels=labels, seed=seed, batch_size=batch_size, on_state=on_state)
        return Pictures.join(list(batches))

    def batches(
        self,
        pictures: int | Sequence[int],
        *,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        on_state: Callable[[State], None] | None = None,
    ) -> Iterator[Pictures]:
        """As sample, but each batch as soon as it is done.

        Raises: UsageError for no pictures, LabelError for a wrong label, Diverged for a batch that is not finite.
        """
        indices = list(range(pictures)) if isinstance(pictures, int) else list(pictures)
        if not indices or min(indices) < 0:
            raise UsageError(f"{pictures} pictures: expected 1 or more, with indices from 0.")
        self.labels(indices, labels)
        size = batch_size or min(self.batch_size, len(indices))
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            latents = None
            for state in self.trajectory(batch, labels=labels, seed=seed, batch_size=size):
                latents = state.x
                if on_state is not None:
                    on_state(state)
            assert latents is not None
            found = self._finite(self._arrays.get(latents), "latents")
            told, text = self.labels(batch, labels), self.network.text
            yield Pictures(
                indices=np.array(batch, dtype=np.int64),
                labels=told,
                latents=found,
                images=self._images(latents, batch_size=size),
                prompts=None if text is None else np.array([text.prompts[k] for k in told]),
            )

    def trajectory(
        self,
        indices: Sequence[int],
        *,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> Iterator[State]:
        """The states of one batch, one per network call; the last one's x are the latents.

        Their arrays are where the engine computes, and on a GPU they may be still to come: `on_host` brings them here.
        """
        noise = PictureNoise(seed, indices, self.network.facts.latent_shape)
        return denoise(
            self.model_for(indices, labels=labels, batch_size=batch_size, arrays=self._arrays),
            self._arrays.put(self.initial_scale * noise.initial()),
            self.steps,
            noise=_Brought(noise, self._arrays),
            fixes=self._fixes,
            prediction=self.network.schedule.prediction,
        )

    def on_host(self, state: State) -> State:
        """A state with NumPy arrays, its memory left out; on a GPU, waits until they are computed."""
        get = self._arrays.get
        return replace(
            state,
            x_in=get(state.x_in),
            raw=get(state.raw),
            eps=get(state.eps),
            x=get(state.x),
            memory=Memory(),
            m=state.m if state.m is None or isinstance(state.m, float) else get(state.m),
        )

    def model_for(
        self,
        indices: Sequence[int],
        *,
        labels: Sequence[int] | None = None,
        batch_size: int | None = None,
        arrays: Arrays | None = None,
    ) -> EpsModel:
        """The network as the loop calls it for these pictures: labels and guidance inside, no correction.

        batch_size: rows are filled up to it, so that batches of several sizes need the engine compiled for one;  those
        that the engine was compiled for win.
        arrays: where the states that it is called with live, None for NumPy's.
        """
        arrays = arrays or HostArrays()
        condition = self.network.facts.condition
        cond = uncond = None
        if condition is not None:
            cond = self._conditions(self.labels(indices, labels), arrays)
            if self.guidance_scale != 1:
                uncond = self._conditions(np.array([condition.null_class], dtype=np.int64), arrays)
        model = EngineModel.of(self.network.unet, rows=self._rows(batch_size or len(indices)))
        return guided(model, cond, uncond, self.guidance_scale)

    def labels(self, indices: Sequence[int], chosen: Sequence[int] | None = None) -> np.ndarray:
        """Class labels of pictures, (N,) int64, -1 without classes. Raises LabelError for one out of range."""
        condition = self.network.facts.condition
        if condition is None:
            if chosen is not None:
                raise UsageError(f"{self.network.place}: the network has no classes. Leave --class-label out.")
            return np.full(len(indices), -1, dtype=np.int64)
        check_labels(chosen or (), condition)
        return labels_for(indices, classes=condition.classes, null_class=condition.null_class, chosen=chosen)

    def decode(self, latents: Array, *, batch_size: int | None = None) -> Array | None:
        """(N, C, H, W) latents to (N, C, H, W) pictures in about [-1, 1], float32, not clipped, where the latents are.

        Without a decoder the latents are the pictures if they have 1 or 3 channels; else None.
        """
        decoder = self.network.decoder
        if decoder is None:
            return latents if latents.shape[1] in (1, 3) else None
        rows = None if self.network.slices else batch_size or min(self.batch_size, len(latents))
        return decode(decoder, latents, rows=rows)

    def kernels(self) -> tuple[Kernel, ...]:
        """What the engine runs for a full batch; () where the backend cannot tell."""
        return self.network.unet.kernels(self._shapes())

    def compiled_bytes(self) -> int | None:
        """Size of the compiled network that runs for a full batch; None where nothing was stored or built."""
        return self.network.unet.compiled_bytes(self._shapes())

    def close(self) -> None:
        """Close the engines. Closing twice is allowed."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _images(self, latents: Array, *, batch_size: int) -> np.ndarray | None:
        decoded = self.decode(latents, batch_size=batch_size)
        if decoded is None:
            return None
        return to_uint8(self._finite(self._arrays.get(decoded), "pictures"))

    def _finite(self, array: np.ndarray, what: str) -> np.ndarray:
        """The array itself. Raises Diverged."""
        if not np.isfinite(array).all():
            method = self.table.method
            other = "" if method == "off" else "another --correction, "
            raise Diverged(
                f"{self.network.place}: {self.table.key.backend} with correction {method} gave {what} that are not "
                f"finite. Try {other}a float32 remainder or another --backend."
            )
        return array

    def _conditions(self, labels: np.ndarray, arrays: Arrays) -> Conditions:
        assert self.network.embedding is not None, "a network with classes comes with a row for each"
        return {name: arrays.put(table[labels]) for name, table in self.network.embedding.items()}

    def _rows(self, batch_size: int) -> int:
        """Rows of one network call: guidance asks for every picture twice."""
        return batch_size if self.guidance_scale == 1 else 2 * batch_size

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Input shapes of the network for a full batch."""
        unet = self.network.unet
        rows = self._rows(self.batch_size)
        return input_shapes(
            unet.inputs,
            rows=group_rows(rows, row_sizes(unet, input_roles(unet.inputs).sample, rows)),
            state=self.network.facts.latent_shape,
            conditions=self.network.embedding,
        )


@dataclass(frozen=True)
class _Brought:
    """Noise that is drawn on the host and brought to where the loop runs."""

    noise: PictureNoise
    arrays: Arrays

    def step(self) -> Array:
        return self.arrays.put(self.noise.step())

    def probe(self) -> Array:
        return self.arrays.put(self.noise.probe())


def brought(fix: StepFix, arrays: Arrays) -> StepFix:
    """The row with its arrays where the loop runs."""
    held = {field.name: getattr(fix, field.name) for field in fields(fix)}
    return replace(fix, **{name: arrays.put(value) for name, value in held.items() if isinstance(value, np.ndarray)})


def default_batch(latent_shape: Sequence[int]) -> int:
    """Pictures at a time where nobody says: fewer of large ones."""
    return int(np.clip(_LATENT_NUMBERS // int(np.prod(latent_shape)), 1, _LARGEST_DEFAULT_BATCH))
