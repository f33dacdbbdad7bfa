"""Every correction by its name on the command line, and the function that fits it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qncd_deploy.correct import d2dpm, dns, linear, ptqd, qdrift, qncd, stepbaq, tac, tcec
from qncd_deploy.correct.fitting import Study
from qncd_deploy.correct.record import StepFix


@dataclass(frozen=True)
class Method:
    """A way to fill a correction table. published: one of a paper, as published or repaired; else our own."""

    name: str
    fit: Callable[[Study], tuple[StepFix, ...]]
    published: bool = True


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("qncd", qncd.fit),
        Method("qncd:paper", lambda study: qncd.fit_paper(study.steps)),
        Method("ptqd", ptqd.fit),
        Method("ptqd:paper", ptqd.fit_paper),
        Method("tac", tac.fit),
        Method("tac:paper", tac.fit_paper),
        Method("d2dpm", d2dpm.fit),
        Method("d2dpm:paper", d2dpm.fit_paper),
        Method("s-d2dpm", d2dpm.fit_stochastic),
        Method("s-d2dpm:paper", d2dpm.fit_stochastic_paper),
        Method("qdrift", qdrift.fit),
        Method("dns", dns.fit),
        Method("stepbaq", stepbaq.fit),
        Method("tcec", tcec.fit),
        Method("mix", linear.fit_mix, published=False),
        Method("map", linear.fit_map, published=False),
        Method("filter", linear.fit_filter, published=False),
    )
}
"""`NAME` is the repaired form, `NAME:paper` the faithful one where they differ."""
