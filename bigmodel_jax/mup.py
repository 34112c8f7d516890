"""Maximal-update parametrisation: how initial sizes and learning rates follow the width and the depth.

Hyper-parameters found on a small base model then hold for a wide and deep one. What a parameter needs follows from
its logical axes: which of its two sides, the one a product sums over ("in") and the one it leaves ("out"), grows with
the width. With r_in and r_out the factors by which they grew over the base model (1: that side does not grow):

    deviation at the start       1/sqrt(r_in) * min(1, sqrt(r_out / r_in))
    learning rate   entrywise    1 / r_in                               Adam, Lion: every entry moves by about lr
                    gradient     r_out / r_in                           SGD, momentum
                    orthogonal   sqrt(r_out / r_in / max(r_in, r_out))  Muon scaled to an entry's size, see below
                    relative     that of entrywise over the deviation   Adafactor: moves by a share of its RMS

Each makes a matrix, and its update, map features of size 1 to features of size 1, whatever the width: spectral norms
sqrt(out / in) (Yang, Simon and Bernstein 2023, condition 1). For Adam and SGD the table is that of Yang et al. 2022
(Tensor Programs V, table 3; a tied table is theirs of table 8, with 1 / width before the logits). Muon's update has all
singular values equal; with the factor sqrt(max(in, out)) that gives it the RMS of an Adam update (muon.py) its norm
grows as sqrt(width) where Adam's grows as the width, so its rate falls as 1 / sqrt(width).

Scores of attention are q.k / head_dim. Branches of the residual stream are multiplied by base depth / depth, which
keeps learning rates as they are (Dey et al. 2025, CompleteP, table 1 with alpha = 1; with alpha = 1/2 of Yang et al.
2023 they would fall as 1 / sqrt(depth), and layers become linear in their parameters). Gradients shrink as
1 / (width * depth), and so does Adam's eps. Weight decay times learning rate stays what it was, as in CompleteP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH = frozenset({"embed", "embed_act", "norm", "mlp", "heads", "kv_heads", "head_dim"})
"""Logical axes that grow with the width."""
STACK = (None, "layers", "experts")
"""Leading axes that number matrices."""
_SIDE = {"heads": "heads", "kv_heads": "heads", "head_dim": "heads", "spatial": "inputs", "conv_in": "inputs"}

LearningRate = Callable[[float, float], float]
"""(r_in, r_out) -> factor of the learning rate."""


@dataclass(frozen=True)
class Ratio:
    """Width and depth of a model over those of its base."""

    width: float = 1.0
    depth: float = 1.0


STANDARD = Ratio()


def sides(axes: Sequence[str | None]) -> tuple[int, int] | None:
    """(stack dimensions, dimensions that are contracted) of a weight with these logical axes; None for no matrix.

    >>> sides(("layers", "embed", "heads", "head_dim")), sides(("heads", "head_dim", "embed")), sides(("norm",))
    ((1, 1), (0, 2), None)
    """
    start = 0
    while start < len(axes) and axes[start] in STACK:
        start += 1
    groups = [_SIDE.get(str(name), f"{name}{d if name is None else ''}") for d, name in enumerate(axes[start:])]
    changes = [d for d in range(1, len(groups)) if groups[d] != groups[d - 1]]
    return (start, changes[0]) if len(changes) == 1 else None


def growth(axes: Sequence[str | None], width: float) -> tuple[float, float]:
    """(r_in, r_out) of a parameter; a bias, a norm and a row of a table have no side that is summed over.

    >>> growth(("layers", "embed", "mlp"), 4), growth(("vocab", "embed"), 4), growth(("embed", "vocab"), 4)
    ((4, 4), (1.0, 4), (4, 1.0))
    """
    found = sides(axes)
    into, out = ((), axes) if found is None else (axes[: sum(found)], axes[sum(found) :])
    return tuple(width if WIDTH.intersection(side) else 1.0 for side in (into, out))


def deviation(r_in: float, r_out: float) -> float:
    """Factor of the standard deviation that a matrix starts with."""
    return r_in**-0.5 * min(1.0, r_out / r_in) ** 0.5


def entrywise(r_in: float, r_out: float) -> float:
    return 1 / r_in


def gradient(r_in: float, r_out: float) -> float:
    return r_out / r_in


def orthogonal(r_in: float, r_out: float) -> float:
    return (r_out / r_in / max(r_in, r_out)) ** 0.5


def relative(r_in: float, r_out: float) -> float:
    return entrywise(r_in, r_out) / deviation(r_in, r_out)


def gradient_size(axes: Sequence[str | None] | None, ratio: Ratio) -> float:
    """How large an entry of the gradient is, over the base model."""
    layered = bool(axes) and axes[0] == "layers"
    return 1 / (ratio.width * (ratio.depth if layered else 1.0))
