"""Small programs in zeros and ones, by branch and bound over their linear relaxations.

    minimise  goal @ x  where  limits @ x <= most,  groups @ x == 1,  0 <= x <= upper,  x whole

(Land and Doig, 1960; the most promising node first.) SciPy's own integer solver prints to standard output behind
Python's back, HiGHS 1.12 does, and there a command's JSON must stand alone; its linear solver does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

NODES = 500
"""Nodes split at most, seconds for hundreds of unknowns; then the best solution so far is taken, with its gap."""

WHOLE = 1e-6
"""A solution of the relaxation this close to 0 or 1 is there."""

_INFEASIBLE = 2


@dataclass(frozen=True, eq=False)
class Program:
    """See above: goal, upper (n,); limits (l, n), most (l,); groups (g, n)."""

    goal: np.ndarray
    limits: np.ndarray
    most: np.ndarray
    groups: np.ndarray
    upper: np.ndarray


def solve(
    program: Program, whole: Callable[[np.ndarray], np.ndarray], *, gap: float, constant: float = 0.0
) -> tuple[np.ndarray, float]:
    """A solution and the gap that is proven for it: how much lower, relative to goal @ x + constant, the least may be.

    whole: makes any solution of the relaxation a whole one within the limits, and a whole one no worse. gap: what is
    good enough. The program must have a solution.
    """
    best, least = np.zeros_like(program.goal), np.inf
    nodes: list[tuple[float, int, np.ndarray, np.ndarray, np.ndarray]] = []
    limits, groups, number = csr_array(program.limits), csr_array(program.groups), count()

    def visit(low: np.ndarray, high: np.ndarray) -> None:
        nonlocal best, least
        bounds = np.stack([low, high], axis=1)
        found = linprog(program.goal, limits, program.most, groups, np.ones(len(program.groups)), bounds)
        if found.status == _INFEASIBLE:
            return
        assert found.success, found.message
        if program.goal @ (tried := whole(found.x)) < least:
            best, least = tried, float(program.goal @ tried)
        heappush(nodes, (found.fun, next(number), found.x, low, high))

    def missing() -> float:
        """How much lower an unvisited solution may be."""
        return max(0.0, least - nodes[0][0]) if nodes else 0.0

    visit(np.zeros_like(program.upper), program.upper)
    for _ in range(NODES):
        if missing() <= gap * (least + constant):
            break
        _, _, x, low, high = heappop(nodes)
        i = int((np.abs(program.goal) * np.minimum(x, 1 - x)).argmax())
        for value in (0.0, 1.0):
            at = np.arange(len(x)) == i
            visit(np.where(at, value, low), np.where(at, value, high))
    return best, missing() / (least + constant) if least + constant else 0.0
