"""The float network, from a checkpoint or from the user's own graph: what every later stage works on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import yaml

from qncd_deploy.bundle import ConditionFacts, ModelFacts
from qncd_deploy.engines.decoder import tile_shape
from qncd_deploy.errors import CheckpointError, ExportError, UsageError, first_line
from qncd_deploy.export.graph import Inputs, find_inputs, find_sites, macs_by_layer
from qncd_deploy.export.passes.normalise import normalise
from qncd_deploy.export.passes.sizes import SizeRules, at_size
from qncd_deploy.export.resblocks import find_resblocks
from qncd_deploy.export.trace import trace, trace_decoder
from qncd_deploy.models.load import load_source
from qncd_deploy.models.source import SourceModel, Text
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.prompts import prompt_table, read_prompts, shipped_prompts
from qncd_deploy.quant.plan import LayerSite
from qncd_deploy.quant.qncd import ResBlock
from qncd_deploy.sample import labels_for
from qncd_deploy.schedule import Schedule, scheduler_name_from_diffusers
from qncd_deploy.specs import SIDES, Conditions, TensorSpec
from qncd_deploy.steps import SamplerConfig, make_steps

if TYPE_CHECKING:
    from qncd_deploy.models.text import TextEncoder

GUIDANCE = 1.5
TEXT_GUIDANCE = 7.5
"""The default scales where there is a null class to guide away from, and where prompts are guided."""

LARGE_MACS = 20e9
"""Multiplications of a row: the demo has 0.3e9, LDM-4 97e9, Stable Diffusion 340e9."""

FEW_STEPS = 4
"""What models distilled to few steps are published with (SDXL-Turbo: Sauer et al., arXiv:2311.17042)."""


@dataclass(frozen=True, eq=False)
class FloatNetwork:
    """A float graph in normal form with what its structure says, and the facts of the model around it.

    schedule: None for a graph that came without one.  size_rules: what frees the model's sizes again, None where it has
    one only; the decoder's are free then.  embedding: what the network is told of every class, (classes,
    ...) by graph input; of a text model, every prompt.  prompts: those, without the negative one;  encoders: what made
    the rows of them.  files: what it was read from, by a name for the manifest.  companions: files that go into the
    bundle as they are.
    """

    model: ir.Model
    inputs: Inputs
    sites: tuple[LayerSite, ...]
    resblocks: tuple[ResBlock, ...]
    facts: ModelFacts
    schedule: Schedule | None
    files: Mapping[str, Path]
    decoder: ir.Model | None = None
    decoder_tile: ir.Model | None = None
    size_rules: SizeRules | None = None
    embedding: Mapping[str, np.ndarray] | None = None
    prompts: tuple[str, ...] = ()
    encoders: tuple[TextEncoder, ...] = ()
    companions: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_large(self) -> bool:
        """A network of which a CPU takes seconds a row, so that what runs it many times is kept short there."""
        return sum(macs_by_layer(self.model, self.sites).values()) > LARGE_MACS

    @property
    def sampler(self) -> SamplerConfig:
        """How the bundle samples by default; only a network with a schedule has one."""
        assert self.facts.sampler is not None
        return SamplerConfig(**self.facts.sampler)


def read_network(options: ExportOptions) -> FloatNetwork:
    """Read, convert and trace what the options name.

    Raises: CheckpointError, ExportError, ScheduleError or UsageError, each naming the file and what to do.
    """
    return _from_graph(options) if options.brings_graph else _from_checkpoint(options)


def _from_checkpoint(options: ExportOptions) -> FloatNetwork:
    source = load_source(
        options.checkpoint,
        config=options.config,
        null_class=options.null_class,
        scheduler=options.scheduler,
        height=options.height,
        width=options.width,
    )
    schedule = _spaced(source.schedule, options)
    sampler = SamplerConfig(source.scheduler, options.n_steps, options.eta)
    make_steps(schedule, sampler)  # refuses a wrong number of steps before minutes are spent
    told = _told_by_prompts(source.text, options) if source.text is not None else _told_by_classes(source, options)
    model, rules = trace(source.unet, source.input_specs, sides=source.latent_shape[1:]), None
    if source.any_size:
        model, rules = at_size(model, dict(zip(SIDES, source.latent_shape[1:], strict=True)))
    decoder = None
    if source.decoder is not None:
        decoder = trace_decoder(source.decoder, source.latent_shape, any_size=source.any_size)
    tiles = None if source.decoder is None else tile_shape(source.latent_shape, source.image_shape)
    tile = None if source.decoder is None or tiles is None else trace_decoder(source.decoder, tiles)
    inputs = find_inputs(model, sample="sample", timestep="timestep")
    return FloatNetwork(
        model=model,
        inputs=inputs,
        sites=find_sites(model, inputs),
        resblocks=find_resblocks(model, inputs),
        facts=ModelFacts(
            family=source.family,
            inputs=source.input_specs,
            latent_shape=source.latent_shape,
            image_shape=None if decoder is None else source.image_shape,
            schedule=schedule.to_json(),
            sampler={"scheduler": sampler.scheduler, "n_steps": sampler.n_steps, "eta": sampler.eta},
            guidance_scale=_guidance(source, told.condition, options),
            condition=told.condition,
            text=None if source.text is None else source.text.facts,
            size_multiple=source.size_multiple if source.any_size else None,
        ),
        schedule=schedule,
        files={**source.files, **({} if options.prompts_file is None else {"prompts": options.prompts_file})},
        decoder=decoder,
        size_rules=rules,
        embedding=told.rows,
        prompts=told.prompts,
        encoders=() if source.text is None else source.text.encoders,
        decoder_tile=tile,
        companions=source.companions,
        notes=(*source.notes, *_few_steps_note(source, sampler)),
    )


@dataclass(frozen=True, eq=False)
class _Told:
    """What the network can be told: rows of its conditions, and what they stand for."""

    condition: ConditionFacts | None
    rows: Mapping[str, np.ndarray] | None
    prompts: tuple[str, ...] = ()


def _told_by_classes(source: SourceModel, options: ExportOptions) -> _Told:
    if options.prompts_file is not None:
        raise UsageError(f"--prompts-file {options.prompts_file}: the network takes no prompts. Leave it out.")
    condition = source.condition
    if condition is None:
        return _Told(None, None)
    return _Told(ConditionFacts(condition.kind, condition.classes, condition.null_class), condition.rows)


def _told_by_prompts(text: Text, options: ExportOptions) -> _Told:
    """A table of prompts, the last row being that of no negative one."""
    prompts = shipped_prompts() if options.prompts_file is None else read_prompts(options.prompts_file)
    towers = [(encoder.tokenizer, encoder.encode) for encoder in text.encoders]
    rows = prompt_table(prompts, None, towers, text.facts)
    return _Told(ConditionFacts("text", len(prompts) + 1, len(prompts)), rows, prompts)


def _guidance(source: SourceModel, condition: ConditionFacts | None, options: ExportOptions) -> float:
    """The scale that was asked for, or the usual one. Raises UsageError if there is nothing to guide away from."""
    null_class = None if condition is None else condition.null_class
    scale = options.guidance_scale
    if scale is None:
        if null_class is None or source.few_steps:
            return 1.0
        return GUIDANCE if source.text is None else TEXT_GUIDANCE
    if scale != 1 and null_class is None:
        raise UsageError(
            f"--guidance-scale {scale:g}: guidance needs a null class, and none is known. Name it with --null-class K."
        )
    return scale


def condition_rows(network: FloatNetwork, indices: Sequence[int]) -> tuple[Conditions | None, Conditions | None]:
    """Rows of the conditions for pictures whose labels take turns, and the null rows of guidance; None where there are
    none.
    """
    condition = network.facts.condition
    if condition is None:
        return None, None
    assert network.embedding is not None, "a network with classes comes with a row for each"
    labels = labels_for(indices, classes=condition.classes, null_class=condition.null_class)
    tables, null = network.embedding.items(), condition.null_class
    given = {name: table[labels] for name, table in tables}
    return given, None if null is None else {name: table[[null]] for name, table in tables}


def _few_steps_note(source: SourceModel, sampler: SamplerConfig) -> tuple[str, ...]:
    if not source.few_steps or sampler.n_steps <= FEW_STEPS:
        return ()
    return (
        f"The scheduler is one of models made for few steps, so guidance is off; try --n-steps {FEW_STEPS} instead of "
        f"{sampler.n_steps}.",
    )


def _from_graph(options: ExportOptions) -> FloatNetwork:
    path = options.checkpoint
    if options.null_class is not None:
        raise UsageError("--null-class: a bare graph is not sampled with guidance. Leave it out.")
    if options.guidance_scale not in (None, 1.0):
        raise UsageError("--guidance-scale: a bare graph is not sampled with guidance. Leave it out.")
    unused = {"--height": options.height, "--width": options.width, "--prompts-file": options.prompts_file}
    for flag, value in unused.items():
        if value is not None:
            raise UsageError(f"{flag} {value}: a bare graph is quantized as it is. Leave it out.")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Give a float ONNX graph.")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's and onnx's own classes, depending on where the file is damaged
        raise CheckpointError(f"{path}: not a readable ONNX graph ({first_line(error)}).") from error
    if "" not in model.opset_imports or not model.graph.outputs:  # an empty file reads as an empty model
        raise CheckpointError(f"{path}: holds no ONNX operators. Export the network again.")
    model = _located(path, model)
    inputs = find_inputs(model)
    if len(model.graph.outputs) != 1:
        raise ExportError(f"{path}: {len(model.graph.outputs)} outputs, expected one. Export the network without them.")
    schedule, sampler = _schedule_of(options)
    specs = tuple(_spec(value) for value in model.graph.inputs)
    (sample,) = (spec for spec in specs if spec.name == inputs.sample)
    latent_shape = tuple(size for size in sample.shape[1:] if isinstance(size, int))
    if schedule is not None and len(latent_shape) != 3:
        raise ExportError(f"{path}: input {sample.name!r} is {list(sample.shape)}; sampling needs fixed C, H and W.")
    if schedule is not None and (unfed := inputs.labels + inputs.conditions):
        raise ExportError(
            f"{path}: input {unfed[0]!r} is a condition, and a bare graph is sampled without any. Leave --config out."
        )
    files = {"graph": path} | ({} if options.config is None else {"config": options.config})
    files |= {external.name: path.parent / external.name for external in _external_files(path, model)}
    return FloatNetwork(
        model=model,
        inputs=inputs,
        sites=find_sites(model, inputs),
        resblocks=find_resblocks(model, inputs),
        facts=ModelFacts(
            family="onnx",
            inputs=specs,
            latent_shape=latent_shape,
            image_shape=None,
            schedule=None if schedule is None else schedule.to_json(),
            sampler=None
            if sampler is None
            else {"scheduler": sampler.scheduler, "n_steps": sampler.n_steps, "eta": sampler.eta},
            guidance_scale=1.0,
            condition=None,
        ),
        schedule=schedule,
        files=files,
    )


def _located(path: Path, model: ir.Model) -> ir.Model:
    try:
        return normalise(model)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:  # external weights that are missing or cut short
        raise CheckpointError(f"{path}: its weights cannot be read ({first_line(error)}).") from error


def _external_files(path: Path, model: ir.Model) -> list[Path]:
    tensors = (value.const_value for value in model.graph.initializers.values())
    names = {Path(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return sorted(name for name in names if (path.parent / name).is_file())


def _spaced(schedule: Schedule, options: ExportOptions) -> Schedule:
    """The schedule with the timesteps that were asked for."""
    spacing = options.timestep_spacing
    return schedule if spacing is None else replace(schedule, timestep_spacing=spacing)


def _schedule_of(options: ExportOptions) -> tuple[Schedule | None, SamplerConfig | None]:
    """The schedule of a bare graph, read from the diffusers scheduler config that --config names."""
    if options.config is None:
        for flag, value in (("--scheduler", options.scheduler), ("--timestep-spacing", options.timestep_spacing)):
            if value is not None:
                raise UsageError(f"{flag}: a bare graph needs its schedule too. Give --config scheduler_config.json.")
        return None, None
    try:
        config = yaml.safe_load(options.config.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{options.config}: cannot be read ({first_line(error)}).") from error
    if not isinstance(config, dict) or "_class_name" not in config:
        raise CheckpointError(f"{options.config}: not a scheduler config of diffusers (no _class_name).")
    schedule = _spaced(Schedule.from_diffusers(json.loads(json.dumps(config))), options)
    name = options.scheduler or scheduler_name_from_diffusers(config["_class_name"])
    sampler = SamplerConfig(name, options.n_steps, options.eta)
    make_steps(schedule, sampler)
    return schedule, sampler


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.shape is not None and value.dtype is not None
    shape = tuple(size if isinstance(size, int) else size.value or f"dim{i}" for i, size in enumerate(value.shape))
    return TensorSpec(value.name, value.dtype.numpy().name, shape)
