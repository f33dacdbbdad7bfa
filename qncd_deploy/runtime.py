"""From a bundle to pictures: open it, open an engine, run the host loop, decode. No torch, no onnx, no diffusers.

with Bundle.open(Path("export/fashion-ldm-w8a8")).sampler() as sampler:
    save_pictures(Path("grid.png"), sampler.sample(16, labels=[3], seed=0))
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from qncd_deploy.bundle import Manifest, check_files, read_manifest
from qncd_deploy.conditions import bundle_prompts, condition_table
from qncd_deploy.correct.choice import chosen_table
from qncd_deploy.correct.record import CorrectionTable, ScheduleKey, Tables, identity_table, load_tables
from qncd_deploy.engines.base import (
    BaseEngine,
    Effort,
    Remainder,
    default_backend,
    find_backend,
    make_engine_id,
    open_engine,
)
from qncd_deploy.engines.decoder import require_slices, require_tiles
from qncd_deploy.engines.stepped import SteppedEngine
from qncd_deploy.engines.stored import give_blobs, stored_for, stored_source
from qncd_deploy.engines.text import prompt_encoder
from qncd_deploy.errors import BundleError, UsageError
from qncd_deploy.files import canonical_json
from qncd_deploy.sampler import Network, Sampler, Text
from qncd_deploy.schedule import Schedule
from qncd_deploy.stepping import Stepping, load_stepping
from qncd_deploy.steps import SamplerConfig
from qncd_deploy.subjects import at_size

ONE_SIZE = ("decoder-tile", "text-encoder", "text-encoder-2")
"""Roles of graphs that are the same for pictures of any size."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A way to sample, for which correction tables are fitted; None is the bundle's own choice. See Bundle.settled."""

    scheduler: str | None = None
    n_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None


AS_EXPORTED = Sampling()
"""The bundle's own way."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read and whose files were checked. effort: for engines compiled for a run."""

    path: Path
    manifest: Manifest
    effort: Effort = BaseEngine.effort

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Bundle:
        """Read the manifest and, with `verify`, refuse files that changed (see bundle.check_files).

        Raises: BundleError if it is no bundle, incomplete, changed on disk or of an unknown schema.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if verify:
            check_files(path, manifest)
        return cls(path, manifest)

    def at_size(self, height: int | None = None, width: int | None = None) -> Bundle:
        """The same bundle for pictures of another size, in pixels; None is as it is. Raises UsageError for a size that
        the network does not draw.
        """
        model = at_size(self.manifest.model, height=height, width=width)
        return self if model is self.manifest.model else replace(self, manifest=replace(self.manifest, model=model))

    @property
    def sides(self) -> tuple[int, int] | None:
        """(height, width) of its pictures, as at_size chose them; None for a bundle that draws one size only."""
        model = self.manifest.model
        return None if model.size_multiple is None else model.sides

    @cached_property
    def plan(self) -> dict[str, Any]:
        """plan.json as it is."""
        plan: dict[str, Any] = json.loads(self.file("plan").read_text(encoding="utf-8"))
        return plan

    @property
    def plan_sha(self) -> str:
        """Hash of plan.json, which correction tables are keyed by; of all plans and of the timesteps each is for where
        there are several.
        """
        if self.stepping is None:
            return self._sha256("plan")
        roles = ("stepping", *(f"plan{suffix}" for suffix in self.stepping.suffixes.values()))
        return _digest({role: self._sha256(role) for role in roles})

    @cached_property
    def stepping(self) -> Stepping | None:
        """Which timesteps take which bits of activations; None where all take the plan's. Raises BundleError."""
        return load_stepping(self.file("stepping")) if "stepping" in self.manifest.roles else None

    @property
    def around(self) -> tuple[str, ...]:
        """Roles of the graphs beside the network, of one input each: decoders, of pictures and of tiles, and text
        encoders.
        """
        text = self.manifest.model.text
        encoders = () if text is None else tuple(encoder for _, encoder in text.roles)
        return tuple(role for role in ("decoder", "decoder-tile", *encoders) if role in self.manifest.roles)

    def network_roles(self, role: str) -> tuple[str, ...]:
        """The graphs that sampling with the graph of this role runs: its siblings of fewer bits, if the bundle has any,
        and itself.
        """
        suffixes = ("",) if self.stepping is None else self.stepping.suffixes.values()
        return tuple(role + suffix for suffix in suffixes if role + suffix in self.manifest.roles) or (role,)

    def network_id(self, roles: Sequence[str]) -> str:
        """Hash of all that sampling with these graphs runs; graph_id where it is one."""
        if len(roles) == 1:
            return self.graph_id(roles[0])
        return _digest({**{role: self.graph_id(role) for role in roles}, "stepping": self._sha256("stepping")})

    def open_network(
        self, backend: str, roles: Sequence[str], *, remainder: Remainder | None = None, threads: int | None = None
    ) -> BaseEngine:
        """The engine of a graph; of all of network_roles, one that chooses by the timestep. Whoever opens it closes it.

        Raises: as open_engine.
        """
        with ExitStack() as opened:
            parts = [
                opened.enter_context(self.open_part(backend, role, remainder=remainder, threads=threads))
                for role in roles
            ]
            engine = parts[0]
            if len(parts) > 1:
                assert self.stepping is not None
                floors = [each.from_t for each in self.stepping.ranges]
                engine = SteppedEngine(list(zip(floors, parts, strict=True)))
            opened.pop_all()
            return engine

    def open_part(
        self, backend: str, role: str, *, remainder: Remainder | None = "f32", threads: int | None = None
    ) -> BaseEngine:
        """The engine of one graph. Whoever opens it closes it. Raises as open_engine."""
        return open_engine(backend, self.file(role), remainder=remainder, threads=threads, effort=self.effort)

    def graph_id(self, role: str) -> str:
        """Hash of a graph and of all external weights, which compiled blobs are keyed by."""
        files = self.manifest.files
        own = self.manifest.roles[role]
        parts = {name: facts.sha256 for name, facts in files.items() if name == own or name.endswith(".data")}
        return _digest(parts)

    def file(self, role: str) -> Path:
        """The file with this role in the manifest. Raises BundleError naming the roles there are."""
        if role not in self.manifest.roles:
            held = ", ".join(sorted(self.manifest.roles))
            raise BundleError(f"{self.path}: holds no {role!r} file, only {held}. Run `qncd export` again.")
        return self.path / self.manifest.roles[role]

    def corrections(self, files: Sequence[Path] = ()) -> list[Tables]:
        """What these correction files hold, and last what the bundle's own does, nothing if it has none.

        Raises BundleError for a damaged one.
        """
        held = "corrections" in self.manifest.roles
        own = load_tables(self.file("corrections")) if held else Tables(self.path / "corrections.npz", (), {})
        return [*(load_tables(path) for path in files), own]

    @property
    def schedule(self) -> Schedule:
        """The network's noise schedule. Raises BundleError for a bring-your-own graph that came without one."""
        if self.manifest.model.schedule is None:
            raise BundleError(
                f"{self.path}: has no noise schedule, since it was made from a bare graph, so it cannot sample. "
                "Run `qncd export` again with --config naming one."
            )
        return Schedule.from_json(self.manifest.model.schedule)

    def sampler_config(
        self, *, scheduler: str | None = None, n_steps: int | None = None, eta: float | None = None
    ) -> SamplerConfig:
        """The bundle's own sampler with these changes. Raises ScheduleError if they contradict each other."""
        own = SamplerConfig(**(self.manifest.model.sampler or {"scheduler": "ddim", "n_steps": 20, "eta": 0.0}))
        scheduler = scheduler or own.scheduler
        if eta is None:
            eta = own.eta if scheduler == own.scheduler else 0.0
        return SamplerConfig(scheduler, own.n_steps if n_steps is None else n_steps, eta)

    def guidance(self, scale: float | None = None) -> float:
        """The guidance scale to use: `scale`, else the bundle's own. Raises UsageError for no number and without a
        null class to guide by.
        """
        condition = self.manifest.model.condition
        scale = self.manifest.model.guidance_scale if scale is None else scale
        if not math.isfinite(scale):
            raise UsageError(f"--guidance-scale {scale}: expected a number.")
        if scale != 1 and condition is None:
            raise UsageError(f"{self.path}: the network has no classes, so --guidance-scale {scale:g} means nothing.")
        if scale != 1 and condition is not None and condition.null_class is None:
            raise UsageError(
                f"{self.path}: --guidance-scale {scale:g} needs a null class, and none is known. If the network has "
                "one, name it with `qncd export --null-class K`; else use --guidance-scale 1."
            )
        return scale

    def settled(self, sampling: Sampling) -> Sampling:
        """The same with nothing left open. Raises as sampler_config and guidance do."""
        config = self.sampler_config(scheduler=sampling.scheduler, n_steps=sampling.n_steps, eta=sampling.eta)
        return Sampling(
            scheduler=config.scheduler,
            n_steps=config.n_steps,
            eta=config.eta,
            guidance_scale=self.guidance(sampling.guidance_scale),
        )

    def key(self, sampling: Sampling, engine_id: str) -> ScheduleKey:
        """What correction tables are fitted for: this way to sample with this engine. Raises as settled does."""
        return ScheduleKey.of(
            self.schedule,
            self.sampler_config(scheduler=sampling.scheduler, n_steps=sampling.n_steps, eta=sampling.eta),
            guidance_scale=self.guidance(sampling.guidance_scale),
            backend=engine_id,
            plan_sha=self.plan_sha,
            sides=self.sides,
        )

    def sampler(
        self,
        backend: str | None = None,
        *,
        float_twin: bool = False,
        correction: str = "auto",
        batch_size: int | None = None,
        scheduler: str | None = None,
        n_steps: int | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        remainder: Remainder | None = None,
        threads: int | None = None,
        tables: Sequence[Path] = (),
        blobs: Sequence[Path] = (),
        act_bits: int | None = None,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
    ) -> Sampler:
        """Open the engines and choose the correction: everything but the pictures.

        backend: openvino, onnxruntime, torch; None for the first of them that this machine has.
        float_twin: the float network instead, computed in float32 on every engine and never corrected.
        correction: "auto" (what was chosen when tables were fitted for exactly this way to sample, else off and one
            logged line), "off", or a method's name, which must have been fitted for it.
        batch_size: pictures at a time;  scheduler ... guidance_scale: None for the bundle's own.
        remainder: precision of the layers left in float, None for the backend's default.
        tables: correction files to look into before the bundle's own.  blobs: what `qncd build` compiled, used for the
            shapes it was made for; those for other machines are passed over, unless there are no others.
        act_bits: of a bundle whose activations have other bits at other timesteps, these at all of them.
        vae_slicing, vae_tiling: decode one picture at a time, or in overlapping tiles, which need less memory.

        Raises: UsageError, ScheduleError, EngineError or BundleError, each with what to do.
        """
        backend = backend or default_backend()
        if float_twin and (correction not in ("auto", "off") or remainder not in (None, "f32") or act_bits is not None):
            raise UsageError("the float twin is the reference: it takes no correction, no bits, no remainder but f32.")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch size {batch_size}: expected 1 or more.")
        remainder = "f32" if float_twin else remainder
        sampling = Sampling(scheduler=scheduler, n_steps=n_steps, eta=eta, guidance_scale=guidance_scale)
        key = self.key(sampling, make_engine_id(backend, remainder))
        if act_bits is not None:
            key = replace(key, plan_sha=self._sha256(f"plan{self._suffix(act_bits)}"))
        table = identity_table(key) if float_twin else self.correction_table(correction, key, tables)
        role = "float" if float_twin else find_backend(backend).role(remainder)
        roles = self.network_roles(role) if act_bits is None else (role + self._suffix(act_bits),)
        with ExitStack() as opened:
            unet = opened.enter_context(self.open_network(backend, roles, remainder=remainder, threads=threads))
            parts = unet.parts if isinstance(unet, SteppedEngine) else (unet,)
            engines = dict(zip(roles, parts, strict=True))
            part = self._decoder_role(slicing=vae_slicing, tiling=vae_tiling)
            if part is not None:
                engines[part] = opened.enter_context(self.open_part(backend, part, threads=threads))
            self.load_blobs(engines, blobs)
            if vae_slicing and part is not None:
                require_slices(engines[part], self.path, backend)
            if vae_tiling and part is not None:
                require_tiles(engines[part], self.manifest.model.latent_shape)
            network = Network(
                place=self.path,
                source=self.network_id(roles),
                facts=self.manifest.model,
                schedule=self.schedule,
                unet=unet,
                decoder=None if part is None else engines[part],
                embedding=self.embedding,
                text=self._text(backend, threads, blobs),
                slices=vae_slicing,
            )
            return Sampler(
                network,
                config=self.sampler_config(scheduler=scheduler, n_steps=n_steps, eta=eta),
                guidance_scale=key.guidance_scale,
                table=table,
                batch_size=batch_size,
                resources=opened.pop_all(),
            )

    def _decoder_role(self, *, slicing: bool, tiling: bool) -> str | None:
        """Of the graph to decode with, None if there is none. Raises UsageError for a way that the bundle lacks."""
        flag = "--vae-tiling" if tiling else "--vae-slicing"
        if "decoder" not in self.manifest.roles:
            if slicing or tiling:
                raise UsageError(f"{flag}: {self.path} has no decoder. Leave it out.")
            return None
        if tiling and "decoder-tile" not in self.manifest.roles:
            raise UsageError(
                f"{flag}: {self.path} was exported for pictures too small for tiles, so it has no decoder of tiles. "
                "Leave it out."
            )
        return "decoder-tile" if tiling else "decoder"

    def _suffix(self, act_bits: int) -> str:
        """Of the roles of a network with activations of these bits at all timesteps. Raises UsageError."""
        suffixes = {} if self.stepping is None else self.stepping.suffixes
        if act_bits not in suffixes:
            held = ", ".join(map(str, suffixes)) or "one network only, not several"
            raise UsageError(f"{self.path}: activations of {act_bits} bits were asked for, it has {held}.")
        return suffixes[act_bits]

    def _sha256(self, role: str) -> str:
        return self.manifest.files[self.manifest.roles[role]].sha256

    @cached_property
    def embedding(self) -> Mapping[str, np.ndarray] | None:
        """What the network is told of every class, (classes, ...) by graph input; None without classes. Raises
        BundleError.
        """
        return condition_table(self.manifest.model, self.file)

    @cached_property
    def prompts(self) -> tuple[str, ...] | None:
        """The bundle's own prompts, by label; None where the network takes none. Raises BundleError."""
        return bundle_prompts(self.manifest.model, self.file)

    def _text(self, backend: str, threads: int | None, blobs: Sequence[Path]) -> Text | None:
        """How prompts are encoded here; nothing is opened before they are."""
        facts = self.manifest.model.text
        if facts is None or self.prompts is None:
            return None

        def open_encoder(role: str) -> BaseEngine:
            with ExitStack() as opened:
                source = self.graph_id(role)
                engine = opened.enter_context(self.open_part(backend, role, threads=threads))
                give_blobs({source: engine}, [blob for blob in blobs if stored_source(blob) == source])
                opened.pop_all()
                return engine

        towers = [(self.file(words), partial(open_encoder, role)) for words, role in facts.roles]
        return Text(self.prompts, prompt_encoder(towers, facts))

    def load_blobs(self, engines: Mapping[str, BaseEngine], blobs: Sequence[Path]) -> None:
        """Give engines, by their graphs' roles, what was compiled of them for pictures of this size. Raises EngineError
        as give_blobs does.
        """
        open_here = {self.graph_id(role): engine for role, engine in engines.items()}
        others = {self.graph_id(role) for role in self.around} - open_here.keys()
        any_size = {self.graph_id(role) for role in engines if self.sides is not None and role not in ONE_SIZE}
        latents = self.manifest.model.latent_shape
        fit = [b for b in blobs if stored_source(b) not in any_size or stored_for(b, latents)]
        give_blobs(open_here, fit, others=others)

    def correction_table(self, method: str, key: ScheduleKey, files: Sequence[Path]) -> CorrectionTable:
        """The table to use, from the first file that has it, the bundle's own last. Raises as chosen_table does, and
        BundleError for a damaged file.
        """
        return chosen_table(method, key, self.corrections(files), bundle=self.path)


def _digest(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()
