"""The page: whole, self-contained, escaped, and holding the numbers it was given."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from PIL import Image

from qncd_deploy.bundle import ConditionFacts, FileFacts, Manifest, ModelFacts
from qncd_deploy.engines.base import Kernel
from qncd_deploy.errors import BundleError
from qncd_deploy.evaluate.bench_result import BenchResult, BenchRow
from qncd_deploy.evaluate.compare import Comparison
from qncd_deploy.evaluate.contest import Contest
from qncd_deploy.evaluate.judge import Figures
from qncd_deploy.evaluate.measure import Measurement
from qncd_deploy.evaluate.metrics import Estimate
from qncd_deploy.evaluate.plots import LINES
from qncd_deploy.evaluate.report import ReportData, group_layers, render, write_report

EVIL = "<script>alert('x')</script>&\"$x_1$"


class Reader(HTMLParser):
    """Text, attributes and tags of a page, and what is wrong with its nesting."""

    VOID = frozenset(("meta", "img", "br"))

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.open, self.sources = "", [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def layer(name: str, bits: int | None, weight: float | None = None, act: float | None = None, reason: str = "") -> dict:
    return {
        "name": name,
        "op": "Conv",
        "shape": [64, 32, 3, 3],
        "weight_bits": bits,
        "act_bits": bits,
        "sqnr_db": weight,
        "act_sqnr_db": act,
        "reason": reason,
    }


def picture_set(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)


def comparison() -> Comparison:
    common = {"engine": "openvino-f32", "n": 64, "seed": 5, "first": 0, "calls": 4}
    curves = {"latent_snr_db": (50.0, 45.0, 41.0, float("inf")), "output_snr_db": (40.0, 38.0, 36.0, 30.0)}
    float_twin = Figures(
        "float",
        correction="off",
        extra_calls=0,
        fid=Estimate(0.299, 0.28, 0.31, 64),
        accuracy=Estimate(0.942, 0.9, 0.96, 64),
        **common,
    )
    quantized = Figures(
        "as sampled",
        correction="qncd",
        extra_calls=2,
        psnr=Estimate(46.0312, 45.5, 46.5, 64),
        ssim=Estimate(0.9871, 0.98, 0.99, 64),
        shift=Estimate(0.000612, 0.0004, 0.0008, 64),
        fid=Estimate(0.294, 0.28, 0.31, 64),
        inception_score=Estimate(6.13, 6.0, 6.2, 64),
        accuracy=Estimate(0.9375, 0.9, 0.96, 64),
        **common,
        **curves,
    )
    other = replace(quantized, name=EVIL, correction="off", extra_calls=0)
    wild = Figures("wild", correction="dns", extra_calls=0, diverged="pictures that are not finite", **common)
    images = {"float": picture_set(0), "as sampled": picture_set(1), EVIL: picture_set(2)}
    return Comparison(float_twin, (quantized, other, wild), ("class 7", "class 0", "class 3"), images)


def bench_result() -> BenchResult:
    def row(name: str, times: tuple[float, ...], figures: Figures | None) -> BenchRow:
        names = ("call_ms", "call_p90_ms", "speedup", "picture_ms", "host", "host_ms")
        measured = [Measurement(name, "ms", times, {}) for name in names]
        kernels = (Kernel("Convolution", "i8", "brgemm", 41),)
        return BenchRow(name, "w8a8", "openvino-bf16", "off", 0, *measured, 9 << 20, *[None] * 3, kernels, figures)

    rows = (row("exact", (8.0, 8.1, 8.2), None), row("quick", (2.0, 3.0, 9.0), comparison().variants[0]))
    return BenchResult(rows, "exact", "exact", {"processor": "Some CPU", "rounds": "3"})


def contest() -> Contest:
    curve = (40.0, 30.0, 20.0, 15.0)
    return Contest(
        choice="filter+ibc",
        objective="shift",
        pictures=64,
        confidence=0.95,
        figures={"off": 0.0654, "ptqd": 0.0122, "filter": 0.0077, "filter+ibc": 0.00301},
        screened={"off": 0.0711, "ptqd": 0.0131, "filter": 0.0081, "tac:paper": 13.6, "filter+ibc": 0.0035},
        best="filter+ibc",
        confirmed={"off": 0.068, "filter+ibc": 0.0041},
        wins=1.0,
        confirming=128,
        refused={"tac": f"tac: 3 pictures to fit on {EVIL}"},
        latent_snr_db=dict.fromkeys(("off", "ptqd", "filter", "filter+ibc", "tac:paper"), curve),
    )


def data() -> ReportData:
    model = ModelFacts(
        "compvis-ldm",
        (),
        (4, 8, 8),
        (1, 32, 32),
        None,
        {"scheduler": "plms", "n_steps": 17, "eta": 0.0},
        1.5,
        ConditionFacts("class-tokens", 11, 10),
    )
    smoothing = {
        "folded": 1,
        "network_error": [1e-4, 9e-5],
        "latent_snr_db": [43.8, 44.9],
        "blocks": {
            "mid.conv2.weight": {"factors": "qncd alpha 0.5", "folded": True, "block_error": [1e-3, 2e-4]},
        },
        "linears": {
            "to_q.weight": {
                "layers": ["to_q.weight", "to_k.weight"],
                "factors": "smoothquant alpha 0.3",
                "folded": False,
                "block_error": [1e-3, 9e-4],
            },
        },
    }
    splitting = {"split": 1, "convolutions": {"up.conv_shortcut.weight": {"split": True, "error": [2e-3, 1e-3]}}}
    bits = {
        "budget": "--avg-bits 4.25",
        "average": 4.2468,
        "layers": {"W4": 120, "W8": 12},
        "predicted_noise": 0.00114,
        "predicted_noise_uniform": {"W4": 0.00481, "W8": 0.00061},
    }
    manifest = Manifest(
        EVIL,
        "w8a8",
        model,
        {"float": "unet-float.onnx", "master": "unet.onnx"},
        {"checkpoint": "12345678" * 8},
        {},
        5,
        {"openvino": "2026.4.1"},
        {"smoothing": smoothing, "splitting": splitting, "bits": bits},
        {"unet.onnx": FileFacts("ab" * 32, 1234567), "plan.json": FileFacts("cd" * 32, 512)},
    )
    layers = [
        layer("good.weight", 8, 45.0, 41.7),
        layer("bad.weight", 8, 44.0, 17.3),
        layer("worst weight", 4, 12.9, None),
        layer("exact.weight", 8),
        layer("first.weight", None, reason=f"first convolution {EVIL}"),
        layer("last.weight", None, reason="last convolution"),
    ]
    return ReportData(
        manifest,
        layers,
        {"unet-float.onnx": 24 << 20, "unet.onnx": 8 << 20},
        "qncd export model.ckpt --int8 --exclude 'a<b'",
        comparison(),
        machine={"processor": "Other CPU", "cores": "2"},
        bench=bench_result(),
        contests={"openvino-f32": contest()},
        notes=[f"a note {EVIL}"],
    )


def test_the_page_is_well_formed_and_self_contained(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", data())
    page = (tmp_path / "report.html").read_text("utf-8")
    reader = Reader(page)
    assert reader.open == []
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in reader.sources)
    assert "script" not in reader.tags
    assert page.count("<svg") == 7  # shift, PSNR; two sets of curves; bars on all and on half, curves of the contest


def test_everything_foreign_is_escaped() -> None:
    page = render(data())
    assert "<script" not in page
    text = Reader(page).text
    assert text.count(EVIL) >= 5  # title, heading, variant, note, reason
    assert "--exclude 'a<b'" in text


def test_the_page_holds_its_numbers() -> None:
    text = re.sub(r"\s+", " ", Reader(render(data())).text)
    for words in (
        "4 of 6 weighted layers quantized, plms with 17 steps, guidance 1.5",
        "46.0 dB", "95 % interval 45.5 to 46.5, 64 pictures", "46.03", "0.00061", "0.0004 – 0.0008", "0.9871", "6.13",
        "0.9375", "0.9420", "0.299", "4 + 2", "seed 5",
        "8.0 MiB", "24.0 MiB in float: 3.0 times smaller",
        "class 7, ", "difference times 8",
        "shift 0.0041 instead of 0.068 without correction on 128 fresh pictures, which nothing was chosen by, "
        "better in 100 %",
        "The best single published method, ptqd, reaches 0.0122.",
        "made of the best, taken 0.00301 0.0035", "best published 0.0122 0.0131", "published 13.6",
        "tacnot fitted: tac: 3 pictures", "first 32",
        "Other CPU",
        "openvino-bf16", "3.00 ± 1.75", "41", "Some CPU", "quick, call_ms: noisy",
        "mid.conv2.weight", "30.0", "37.0", "qncd alpha 0.5", "to_q.weight, to_k.weight",
        "up.conv_shortcut.weight", "27.0",
        "1.2 MiB", "0.5 KiB", "abababababababab",
        "1234567812345678", "2026.4.1",
        "64×32×3×3, 8/8 bits", "17.3", "12.9", "last convolution",
    ):  # fmt: skip
        assert words in text, words


def test_the_layer_that_loses_most_comes_first_and_floats_go_by_reason() -> None:
    groups = group_layers(data().layers)
    assert [each["name"] for each in groups.quantized] == ["worst weight", "bad.weight", "good.weight", "exact.weight"]
    assert [[each["name"] for each in members] for members in groups.floats.values()] == [
        ["first.weight"],
        ["last.weight"],
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_those_given_and_differences_magnified_around_grey(channels: int) -> None:
    exact = np.full((1, 2, 2, channels), 100, np.uint8)
    found = exact.copy()
    found[0, 0, 0], found[0, 0, 1], found[0, 1, 0] = 103, 96, 130  # +3, -4, +30 levels; the last is out of range
    given = comparison()
    shown = replace(given, images={"float": exact, "as sampled": found}, captions=("",))
    page = render(replace(data(), comparison=shown))
    pngs = [base64.b64decode(code) for code in re.findall(r"base64,([^\"]+)", page)]
    pictures = [np.asarray(Image.open(io.BytesIO(png))).reshape(2, 2, channels) for png in pngs]
    np.testing.assert_array_equal(pictures[0], exact[0])
    np.testing.assert_array_equal(pictures[1], found[0])
    np.testing.assert_array_equal(pictures[2][..., 0], [[152, 96], [255, 128]])
    assert "class -1" not in page


def test_curves_take_the_pages_colours_and_the_same_data_give_the_same_page() -> None:
    page = render(data())
    assert page == render(data())
    assert "currentColor" in page
    assert "#010203" not in page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "font-family" not in drawn
    assert "as sampled" in drawn and "network call" in drawn  # text stays text


def test_the_variant_that_the_bundle_is_can_be_named() -> None:
    page = render(replace(data(), variant=EVIL))
    assert re.search(r'class="main">\s*<td class="w">&lt;script&gt;', page)


def with_contest(given: Contest) -> ReportData:
    bare = data()
    manifest = replace(bare.manifest, quality={})
    return replace(bare, manifest=manifest, comparison=None, contests={"openvino-f32": given})


def words(given: ReportData) -> str:
    return re.sub(r"\s+", " ", Reader(render(given)).text)


def test_why_nothing_is_corrected_or_something_that_does_not_help() -> None:
    weak = replace(contest(), choice="off", wins=0.894)
    said = words(with_contest(weak))
    assert "openvino-f32: no correction" in said
    assert "the best, filter+ibc, is better in 89 % of the resamples of 128 fresh pictures, and 95 % are" in said
    alone = replace(weak, figures={"off": 0.1}, screened={"off": 0.1}, best=None, wins=None, latent_snr_db={})
    page = render(with_contest(alone))
    assert "nothing is better than that" in page and "<svg" not in page
    assert "Taken because it was asked for by name" in words(with_contest(replace(weak, choice="ptqd")))
    alone = replace(weak, choice="ptqd", best=None, pictures=0, figures={}, screened={}, latent_snr_db={})
    page = words(with_contest(alone))
    assert "Taken because it was asked for by name" in page and "candidate" not in page


def test_an_objective_where_more_is_better() -> None:
    said = words(with_contest(replace(contest(), choice="off", objective="psnr")))
    assert "PSNR in dB, more is better" in said and "shift, less" not in said


def test_of_many_variants_as_many_curves_as_can_be_read_the_best_first() -> None:
    given = comparison()
    plain = replace(given.variants[0], name="plain", correction="off")
    many = [
        replace(
            given.variants[0],
            name=f"way {n}",
            shift=Estimate(0.1 * n, 0.1 * n, 0.1 * n, 64),
            latent_snr_db=(50.0 - n, 40.0 - n),
        )
        for n in range(9, 0, -1)
    ]
    page = render(replace(data(), comparison=replace(given, variants=(*many, plain))))
    free = page[page.index("Latent, running freely") : page.index("Network output")]
    drawn = [name for name in ("plain", *(f"way {n}" for n in range(1, 10))) if f">{name}<" in free]
    assert drawn == ["plain", "way 1", "way 2", "way 3", "way 4", "way 9"]  # way 9 is the bundle's own
    assert f"{LINES} of 10, the best by shift" in free
    overview = page[page.index("<h4>Shift") : page.index("<h4>PSNR")]
    places = [overview.index(f">{name}<") for name in ("way 1", "way 5", "way 9")]
    assert places == sorted(places) and ">plain<" in overview
    network = page[page.index("Network output") : page.index("<h2>Corrections")]
    assert "way 9" not in network  # one network, one curve: nothing to name


def test_bars_of_layers_are_as_long_as_their_decibels() -> None:
    page = render(data())
    layers = page[page.index("<h2>Layers") :]
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", layers)]
    assert widths == [round(100 * db / 45, 1) for db in (12.9, 44.0, 17.3, 45.0, 41.7)]


def test_a_network_that_cannot_sample_has_a_page_too() -> None:
    bare = data()
    manifest = replace(
        bare.manifest,
        model=replace(bare.manifest.model, sampler=None, guidance_scale=1.0),
        quality={"output_sqnr_db": 33.25},
    )
    page = render(ReportData(manifest, bare.layers, bare.graph_bytes, bare.command))
    text = Reader(page).text
    assert "33.2 dB" in text or "33.3 dB" in text
    for absent in ("Fidelity", "Pictures", "call by call", "Speed", "Smoothing", "Corrections", "PSNR"):
        assert absent not in text


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere/report\.html: cannot be written"):
        write_report(tmp_path / "nowhere" / "report.html", data())


def test_a_budget_of_bits_is_accounted_for() -> None:
    page = words(data())
    for said in (
        "Weights take 4.25 bits on average (--avg-bits 4.25): 120 W4, 12 W8 of those to choose from",
        "predicted error of the output is 0.11 %, 0.48 % with all W4, 0.06 % with all W8.",
    ):
        assert said in page
