"""Whether two runs of the same steps are the same numbers, leaf by leaf. Numpy alone.

A run is {part: {leaf: array}}, with parts such as "loss", "gradients" and "parameters". The error of a leaf is
max |a - b| / max |a|, the denominator floored at 1e-6 of the largest value of its part.

float64 is the proof: rounding in another order stays near 1e-15, a wrong collective shows at 1e-3 and above. In a
narrower precision two right layouts may differ by whatever that precision rounds, so a leaf is also right when it is
no farther from the float64 run than FARTHER times what the first layout is.

A gradient that is zero in theory (the bias of keys under a softmax, of a convolution before batch norm) is rounding
noise in any run. The float64 run tells which those are; they are measured against the largest gradient, and what an
optimizer makes of them (Adam and Lion turn noise into whole steps) is not judged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Run = Mapping[str, Mapping[str, np.ndarray]]

FLOOR = 1e-6
ZERO = 1e-12
FARTHER = 4.0
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}
WHY = {
    "float64": "sums in another order round to 1e-15; a wrong sum shows at 1e-3",
    "float32": f"or no farther from float64 than {FARTHER:g} times the first layout: where gradients cancel, float32 "
    "has fewer digits",
    "bfloat16": f"one rounding step, or no farther from float64 than {FARTHER:g} times the first layout: two right "
    "layouts differ by what bfloat16 rounds",
    "float16": f"one rounding step, or no farther from float64 than {FARTHER:g} times the first layout",
}


@dataclass(frozen=True)
class Row:
    """One leaf. error: as above. allowed: what it may be. note: why, where it is not the precision's tolerance."""

    part: str
    leaf: str
    shape: tuple[int, ...]
    error: float
    allowed: float
    largest: float
    note: str = ""

    @property
    def good(self) -> bool:
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """Of what is allowed; the worst leaf has the largest."""
        return self.error / self.allowed


@dataclass(frozen=True)
class Verdict:
    """rows: worst first. moved: largest change of a parameter leaf over the steps, relative to it."""

    precision: str
    rows: tuple[Row, ...]
    moved: float
    finite: bool

    @property
    def agreed(self) -> bool:
        """Everything is within what is allowed, and there was something to compare."""
        return self.finite and self.moved > 0 and all(row.good for row in self.rows)

    def reason(self) -> str:
        """The worst leaf in words, or why nothing was proven."""
        if not self.finite:
            return "loss or gradients are not finite: nothing is proven"
        if not self.moved > 0:
            return "no parameter moved: nothing is proven"
        worst = self.rows[0]
        return f"worst leaf {worst.part} {worst.leaf}: {worst.error:.1e} of {worst.allowed:.0e} allowed"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "precision": self.precision, "agreed": self.agreed, "reason": self.reason(), "moved": self.moved,
            "tolerance": TOLERANCES[self.precision], "why": WHY[self.precision],
            "leaves": [asdict(row) | {"good": row.good} for row in self.rows],
        }  # fmt: skip


def zero_gradients(run: Run) -> frozenset[str]:
    """Leaves whose gradient is zero in theory, as a float64 run shows."""
    gradients = run["gradients"]
    top = _top(gradients)
    return frozenset(leaf for leaf, g in gradients.items() if _largest(g) <= ZERO * top)


def compare(
    a: Run, b: Run, precision: str, zeros: Collection[str] = (), exact: Run | None = None, start: Run | None = None
) -> Verdict:
    """How far `b` is from `a`.

    Args:
      precision: of the computation, a key of TOLERANCES.
      zeros: leaves whose gradient is zero in theory.
      exact: the float64 run of the layout of `a`, to judge a narrower precision.
      start: {"parameters": ...} before the first step, to see that they moved.

    Raises:
      ValueError: the runs do not have the same leaves.
    """
    rows = []
    for part in a:
        if a[part].keys() != b[part].keys():
            raise ValueError(f"{part}: leaves differ: {sorted(a[part].keys() ^ b[part].keys())}")
        top = _top(a[part])
        reach = _reach(a[part], exact[part], top) if exact is not None else {}
        for leaf, value in a[part].items():
            if leaf in zeros and part != "gradients":
                continue
            rows.append(_row(part, leaf, value, b[part][leaf], top, precision, leaf in zeros, exact, reach))
    before = start["parameters"] if start is not None else {}
    moved = max((error(value, a["parameters"][leaf], FLOOR) for leaf, value in before.items()), default=np.inf)
    finite = all(np.isfinite(x).all() for run in (a, b) for part in run.values() for x in part.values())
    return Verdict(precision, tuple(sorted(rows, key=lambda row: -row.share)), float(moved), finite)


def _row(
    part: str, leaf: str, a: np.ndarray, b: np.ndarray, top: float, precision: str, zero: bool,
    exact: Run | None, reach: Mapping[str, float],
) -> Row:  # fmt: skip
    floor = top if zero else FLOOR * top
    found, allowed, note = error(a, b, floor), TOLERANCES[precision], "zero in theory" if zero else ""
    if exact is not None and found > allowed:
        distance, bound = error(exact[part][leaf], b, floor), FARTHER * max(reach[leaf], reach[""])
        if bound > allowed:
            found, allowed, note = distance, bound, "distance from float64"
    return Row(part, leaf, tuple(np.shape(a)), found, allowed, _largest(a), note)


def _reach(a: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray], top: float) -> dict[str, float]:
    """Distance of each leaf from float64, and of the middle one as "": a leaf of few numbers may be near by luck."""
    far = {leaf: error(exact[leaf], value, FLOOR * top) for leaf, value in a.items()}
    return far | {"": float(np.median(list(far.values()))) if far else 0.0}


def error(a: np.ndarray, b: np.ndarray, floor: float) -> float:
    """max |a - b| / max(max |a|, floor); infinite where something is not finite."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if not a.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        far = float(np.max(np.abs(a - b)))
    if not np.isfinite(far):
        return np.inf
    return far / max(_largest(a), floor) if far else 0.0


def _largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(x, np.float64)), initial=0.0))


def _top(part: Mapping[str, np.ndarray]) -> float:
    return max((_largest(x) for x in part.values()), default=0.0)
