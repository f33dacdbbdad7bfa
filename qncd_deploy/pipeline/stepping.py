"""Networks of one bundle that differ in the bits of their activations, and which timesteps take which.

All have the integer weights of the bundle's own plan, byte for byte; only the grids of activations are chosen anew,
from the same statistics. Which calls may have fewer bits is PTQD's rule (quant/step_bits.py), measured on pictures that
nothing else uses, each network at the float sampler's own states. What it costs is measured on the same pictures, all
networks sampling freely: the rule compares SNRs of single calls, and nothing in it bounds the error of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qncd_deploy.calib.observers import TensorStats
from qncd_deploy.engines.base import BaseEngine
from qncd_deploy.engines.stepped import SteppedEngine
from qncd_deploy.errors import ExportError
from qncd_deploy.pipeline.draft import Draft
from qncd_deploy.pipeline.free_run import batch_size, model_for, picture_snr_db
from qncd_deploy.pipeline.network import FloatNetwork
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.output_error import running
from qncd_deploy.pipeline.progress import Tick
from qncd_deploy.quant.decide import with_act_bits
from qncd_deploy.quant.policy import Policy
from qncd_deploy.quant.step_bits import CallSNR, find_ranges, forward_snr, quantization_snr
from qncd_deploy.specs import EpsModel
from qncd_deploy.stepping import Stepping, save_stepping
from qncd_deploy.steps import eps_from_output
from qncd_deploy.study import FreeRun, RecordedStudy, Setting

FIRST_PICTURE = 7 << 28
"""Pictures from here on: shared with no other use of a seed."""


@dataclass(frozen=True, eq=False)
class Steps:
    """What became of --step-bits.

    stepping: the ranges, None where the rule gives every call to the widest network;  drafts: the narrower networks
    that a range has, by the suffix of their files;  calls: what was measured of each call of the bundle's own sampler;
    latent_snr_db: mean over free-running pictures by the bits of a network throughout;  stepped_snr_db: as the ranges
    say;  pictures: how many.
    """

    stepping: Stepping | None
    drafts: Mapping[str, Draft]
    calls: tuple[CallSNR, ...]
    latent_snr_db: Mapping[int, float]
    stepped_snr_db: float
    pictures: int

    @property
    def roles(self) -> dict[str, str]:
        """What the files of the narrower networks are for, beside those of the bundle's own."""
        if self.stepping is None:
            return {}
        found = {"stepping": "stepping.json"}
        for suffix in self.drafts:
            found |= {f"master{suffix}": f"unet{suffix}.onnx", f"plan{suffix}": f"plan{suffix}.json"}
            found |= {f"{role}{suffix}": f"unet{suffix}-{role}.onnx" for role in ("trt", "ort")}
        return found

    def write(self, folder: Path) -> None:
        """Write the ranges and the plans; the graphs lie there already."""
        if self.stepping is not None:
            save_stepping(folder / self.roles["stepping"], self.stepping)
        for suffix, draft in self.drafts.items():
            (folder / self.roles[f"plan{suffix}"]).write_text(draft.plan.dumps(), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        widest = max(self.latent_snr_db)
        taken = [widest if self.stepping is None else self.stepping.act_bits(call.t) for call in self.calls]
        return {
            "ranges": [] if self.stepping is None else self.stepping.to_json()["ranges"],
            "calls": [{**call.to_json(), "act_bits": bits} for call, bits in zip(self.calls, taken, strict=True)],
            "pictures": self.pictures,
            "latent_snr_db": {
                **{str(bits): round(value, 2) for bits, value in self.latent_snr_db.items()},
                "stepped": round(self.stepped_snr_db, 2),
            },
        }


def find_steps(
    network: FloatNetwork,
    draft: Draft,
    stats: Mapping[str, TensorStats],
    policy: Policy,
    options: ExportOptions,
    scratch: Path,
    tick: Tick,
) -> Steps:
    """Measure every width of options.step_bits, and choose. draft: the bundle's own network, which is the widest.

    One engine of each width and the float one are open at a time. Raises: ExportError for a network without timestep.
    """
    if network.inputs.timestep is None:
        raise ExportError("--step-bits: the network takes no timestep, so nothing would choose. Leave it out.")
    assert network.schedule is not None
    drafts = {bits: _narrowed(draft, bits, stats, policy) for bits in options.step_bits}
    pictures = range(FIRST_PICTURE, FIRST_PICTURE + options.fit_size)
    setting = Setting(network.schedule, network.sampler, pictures, options.seed, tuple(network.facts.latent_shape))
    # the float network once, every width at its states and freely, and the networks in turns
    total, done = len(setting.steps) * (2 * len(drafts) + 2), 0

    def model_of(engine: BaseEngine) -> EpsModel:
        model = model_for(network, engine, pictures, batch=batch_size(network, len(pictures)))

        def predict(x: np.ndarray, t: float) -> np.ndarray:
            nonlocal done
            done += 1
            tick(done, total)
            return model(x, t)

        return predict

    with ExitStack() as opened:
        exact = model_of(opened.enter_context(running(network.model, None, scratch)))
        engines = {
            bits: opened.enter_context(running(each.master(), each.plan, scratch)) for bits, each in drafts.items()
        }
        studies = {
            bits: RecordedStudy(setting, exact, model_of(engine), scratch / "steps-float", scratch / f"steps-a{bits}")
            for bits, engine in engines.items()
        }
        for study in studies.values():
            study.record()
        calls = tuple(_calls(studies))
        stepping = find_ranges(calls)
        truth = next(iter(studies.values())).exact(len(setting.steps))
        snr = {bits: _free(study.run(), truth) for bits, study in studies.items()}
        stepped = snr[max(snr)]
        if stepping is not None:
            engine = SteppedEngine([(each.from_t, engines[each.act_bits]) for each in stepping.ranges])
            stepped = _free(FreeRun(setting, model_of(engine)), truth)
    suffixes = {} if stepping is None else stepping.suffixes
    return Steps(
        stepping=stepping,
        drafts={suffix: drafts[bits] for bits, suffix in suffixes.items() if suffix},
        calls=calls,
        latent_snr_db=snr,
        stepped_snr_db=stepped,
        pictures=len(pictures),
    )


def _narrowed(draft: Draft, bits: int, stats: Mapping[str, TensorStats], policy: Policy) -> Draft:
    if bits == policy.act_bits:
        return draft
    return replace(draft, plan=with_act_bits(draft.plan, stats, replace(policy, act_bits=bits)))


def _calls(studies: Mapping[int, RecordedStudy]) -> Iterator[CallSNR]:
    """Of every call, from the pairs of all networks at the same inputs."""
    for pairs in zip(*(study.pairs() for study in studies.values()), strict=True):
        step, prediction = pairs[0].step, next(iter(studies.values())).prediction
        exact, *found = (
            eps_from_output(output, pairs[0].x, step.abar_call, prediction)
            for output in (pairs[0].e, *(each.q for each in pairs))
        )
        snr = {bits: quantization_snr(exact, eps) for bits, eps in zip(studies, found, strict=True)}
        yield CallSNR(step.t, forward_snr(step.abar_call), snr)


def _free(run: FreeRun, truth: np.ndarray) -> float:
    """Mean SNR in dB of the final latents against the float network's."""
    for _ in run.setting.steps:
        run.advance()
    return float(picture_snr_db(truth, run.x).mean())
