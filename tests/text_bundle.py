"""Bundles of text networks in a few lines of ONNX, with what they say of a prompt in NumPy; imports no torch.

out = 0.5 x + (mean over tokens of hidden) W [+ pooled V + time_ids U]        hidden = table[ids] + positions
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from clip_words import TOKENS, clip_tokenizer
from onnx import numpy_helper, parser

from qncd_deploy.bundle import ConditionFacts, Manifest, ModelFacts, TextFacts, write_manifest
from qncd_deploy.files import save_npz
from qncd_deploy.schedule import Schedule
from qncd_deploy.specs import TensorSpec

LATENT = (4, 8, 8)
WIDTHS = (6, 10)
POOLED = 5
PROMPTS = ("a photo of the cat", "dog on mars", "watercolour")
SIZES = (64, 64, 0, 0, 64, 64)
SCHEDULE = Schedule.scaled_linear(0.00085, 0.012)
UNET = """<ir_version: 9, opset_import: ["" : 18]>
net (float[batch,4,SIDES] sample, float[batch] timestep, float[batch,77,WIDTH] encoder_hidden_states MORE)
    => (float[batch,4,SIDES] out) {
    mean = ReduceMean<keepdims=0>(encoder_hidden_states, axis1)
    told = MatMul(mean, W)
    BODY
    shift = Unsqueeze(all, axes23)
    kept = Mul(sample, half)
    out = Add(kept, shift)
}"""
PLAIN = "all = Identity(told)"
POOLING = """
    more = MatMul(text_embeds, V)
    sized = MatMul(time_ids, U)
    some = Add(told, more)
    all = Add(some, sized)"""
ENCODER = """<ir_version: 9, opset_import: ["" : 18]>
encode (int64[batch,77] input_ids) => (float[batch,77,WIDTH] hidden MORE) {
    rows = Gather(table, input_ids)
    hidden = Add(rows, positions)
    BODY
}"""
DECODER = """<ir_version: 9, opset_import: ["" : 18]>
decode (float[batch,4,SIDES] latents) => (float[batch,3,PIXELS] images) {
    y = Conv(latents, w)
    images = Resize<mode="nearest",coordinate_transformation_mode="asymmetric",nearest_mode="floor">(y, , factors)
}"""


def arrays(encoders: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)

    def numbers(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    tokens = clip_tokenizer().get_vocab_size()
    held = {"W": numbers(sum(WIDTHS[:encoders]), 4), "V": numbers(POOLED, 4), "U": 0.01 * numbers(6, 4)}
    for number, width in enumerate(WIDTHS):
        held |= {f"table{number}": numbers(tokens, width), f"positions{number}": 0.1 * numbers(TOKENS, width)}
    return {**held, "P": numbers(WIDTHS[1], POOLED), "w": 0.1 * numbers(3, 4, 1, 1)}


def tokenizers(encoders: int) -> list[object]:
    return [clip_tokenizer(), clip_tokenizer(pad="!")][:encoders]


def condition(texts: Sequence[str], encoders: int) -> dict[str, np.ndarray]:
    """What the network is told of each text, by hand."""
    held, hidden, pooled = arrays(encoders), [], None
    for number, words in enumerate(tokenizers(encoders)):
        ids = np.array([encoding.ids for encoding in words.encode_batch(list(texts))])
        hidden.append(held[f"table{number}"][ids] + held[f"positions{number}"])
        pooled = hidden[-1][:, 0] @ held["P"] if number else None
    told = {"encoder_hidden_states": np.concatenate(hidden, axis=-1)}
    if pooled is not None:
        told |= {"text_embeds": pooled, "time_ids": np.tile(np.array(SIZES, np.float32), (len(texts), 1))}
    return told


def output(x: np.ndarray, told: dict[str, np.ndarray], encoders: int) -> np.ndarray:
    """The network, by hand."""
    held = arrays(encoders)
    shift = told["encoder_hidden_states"].mean(axis=1) @ held["W"]
    if encoders > 1:
        shift = shift + told["text_embeds"] @ held["V"] + told["time_ids"] @ held["U"]
    return 0.5 * x + shift[:, :, None, None]


def write_text_bundle(
    folder: Path, *, encoders: int = 1, guidance: float = 7.5, n_steps: int = 4, any_size: bool = False
) -> Path:
    """A bundle as it is exported, but for the quantization, with two encoders as of SDXL. any_size: of pictures whose
    sides are multiples of 16; else of 64 x 64 only.
    """
    folder.mkdir(parents=True)
    held, width = arrays(encoders), sum(WIDTHS[:encoders])
    pooling = encoders > 1
    inputs = f", float[batch,{POOLED}] text_embeds, float[batch,6] time_ids" if pooling else ""
    constants = {"axis1": np.array([1]), "axes23": np.array([2, 3]), "half": np.float32(0.5)}
    weights = {name: held[name] for name in ("W", "V", "U")[: 3 if pooling else 1]}
    body = POOLING if pooling else PLAIN
    sides = ("height", "width") if any_size else LATENT[1:]
    text = UNET.replace("WIDTH", str(width)).replace("MORE", inputs).replace("BODY", body)
    text = text.replace("SIDES", ",".join(map(str, sides)))
    for name in ("unet", "unet-ort", "unet-float"):
        _save(folder / f"{name}.onnx", text, {**constants, **weights})
    for name, latent in (("vae-decoder", sides), ("vae-decoder-tile", (5, 5))):
        pixels = [8 * side if isinstance(side, int) else f"{side}8" for side in latent]
        text = DECODER.replace("SIDES", ",".join(map(str, latent))).replace("PIXELS", ",".join(map(str, pixels)))
        _save(folder / f"{name}.onnx", text, {"w": held["w"], "factors": np.array([1, 1, 8, 8], np.float32)})
    facts = TextFacts(encoders, TOKENS, time_ids=SIZES if pooling else None, zero_null=False)
    roles = {"master": "unet.onnx", "ort": "unet-ort.onnx", "float": "unet-float.onnx", "decoder": "vae-decoder.onnx"}
    roles |= {"decoder-tile": "vae-decoder-tile.onnx"}
    roles |= {"plan": "plan.json", "prompts": "prompts.txt", "prompt-embedding": "prompt-embedding.npz"}
    for number, ((words, encoder), tokenizer) in enumerate(zip(facts.roles, tokenizers(encoders), strict=True)):
        roles |= {words: f"{words}.json", encoder: f"{encoder}.onnx"}
        tokenizer.save(str(folder / f"{words}.json"))
        tables = {"table": held[f"table{number}"], "positions": held[f"positions{number}"]}
        more = f", float[batch,{POOLED}] pooled" if number else ""
        body = "first = Gather<axis=1>(hidden, zero)\npooled = MatMul(first, P)" if number else ""
        tables |= {"zero": np.array(0), "P": held["P"]} if number else {}
        graph = ENCODER.replace("WIDTH", str(WIDTHS[number])).replace("MORE", more).replace("BODY", body)
        _save(folder / f"{encoder}.onnx", graph, tables)
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    told = condition([*PROMPTS, ""], encoders)
    save_npz(folder / "prompt-embedding.npz", told)
    (folder / "plan.json").write_text(json.dumps({"schema": 1, "format": "w8a8", "layers": []}))
    specs = [
        TensorSpec("sample", "float32", ("batch", LATENT[0], *sides)),
        TensorSpec("timestep", "float32", ("batch",)),
    ]
    specs += [TensorSpec(name, "float32", ("batch", *rows.shape[1:])) for name, rows in told.items()]
    model = ModelFacts(
        family="diffusers",
        inputs=tuple(specs),
        latent_shape=LATENT,
        image_shape=(3, 64, 64),
        schedule=SCHEDULE.to_json(),
        sampler={"scheduler": "ddim", "n_steps": n_steps, "eta": 0.0},
        guidance_scale=guidance,
        condition=ConditionFacts("text", len(PROMPTS) + 1, len(PROMPTS)),
        text=facts,
        size_multiple=16 if any_size else None,
    )
    write_manifest(folder, Manifest("words", "w8a8", model, roles, {"unet": "ab"}, {}, 0, {}))
    return folder


def _save(path: Path, text: str, weights: dict[str, np.ndarray]) -> None:
    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    onnx.checker.check_model(model)
    onnx.save(model, path)
