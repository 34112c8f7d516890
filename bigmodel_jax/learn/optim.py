"""Optimizers: one leaf rule each, under one update that clips, decays and scales.

Every optimizer here is a rule for a single leaf, (gradient, slots, parameter, t) -> (direction,
slots), and the update of a parameter is
    p <- p - lr(step) * group_lr * (direction + decoupled_decay * p).
Written per leaf, clipping, moments, decay and the step fuse into one pass over memory, and a
frozen parameter simply has no slots. The result is an optax GradientTransformation; its state is
    {"count": int32, "<slot>": nested dict with the parameter's own path}.

Parameters are grouped by ordered (regex, options) rules over their paths; first match wins.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigmodel_jax import mup
from bigmodel_jax import tree as trees
from bigmodel_jax.errors import InputError, nearest
from bigmodel_jax.learn import layers
from bigmodel_jax.learn import muon as muon_rule

Slots = dict[str, jax.Array]
Keep = Callable[[jax.Array, jax.Array], jax.Array]
Groups = Sequence[tuple[str, Mapping[str, Any]]]

GROUP_OPTIONS = ("lr", "decay", "freeze")
DECAYS = ("decoupled", "l2", "none")
DEFAULT_GROUPS: Groups = ((r"(^|/|_)(bias|scale|norm)", {"decay": 0.0}), (r".*", {}))
"""No weight decay on biases and norms."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """init(p) -> slots; update(g, slots, p, t, keep) -> (direction, slots).

    t is 1 at the first update; every slot returned is keep(new, old), and the direction is made
    of kept slots where the algorithm allows it. growth: how the learning rate follows the width.
    """

    init: Callable[[Any], Slots]
    update: Callable[..., tuple[jax.Array, Slots]]
    growth: mup.LearningRate = mup.entrywise


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a rule may know of its parameter: shape, logical axes (None where not given), and how large its
    gradient is over that of the base model (mup.py)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...] | None
    gradient: float = 1.0

    @property
    def stacked(self) -> int:
        """Leading dimensions that number layers."""
        return 1 if self.axes and self.axes[0] == "layers" else 0


def wide(dtype: Any) -> Any:
    """The dtype that moments, norms and sums are kept in: float32, or float64 as given."""
    return jnp.promote_types(dtype, jnp.float32)


def _zeros(p: Any, dtype: str = "") -> jax.Array:
    return jnp.zeros(p.shape, jnp.dtype(dtype) if dtype else wide(p.dtype))


def adam(
    leaf: Leaf,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: str = "",
    bias_correction: bool = True,
) -> Rule:
    """Adam (Kingma & Ba 2015, algorithm 1), eps outside the root; "adamw" is the same rule.

    mu_dtype: "bfloat16" halves the first moment; the second stays float32 or wider.
    """

    def update(g: jax.Array, s: Slots, p: jax.Array, t: jax.Array, keep: Keep) -> tuple[jax.Array, Slots]:
        mu = b1 * s["mu"].astype(g.dtype) + (1 - b1) * g
        nu = keep(b2 * s["nu"] + (1 - b2) * jnp.square(g), s["nu"])
        kept = keep(mu.astype(s["mu"].dtype), s["mu"])
        mu = kept if kept.dtype == g.dtype else mu  # a narrow moment is only stored narrow
        c1, c2 = (1 - b1**t, 1 - b2**t) if bias_correction else (1.0, 1.0)
        # Scalars first: one division and one root per element.
        direction = (mu / c1) / (jnp.sqrt(nu / c2) + eps * leaf.gradient)
        return direction, {"mu": kept, "nu": nu}

    return Rule(lambda p: {"mu": _zeros(p, mu_dtype), "nu": _zeros(p)}, update)


def sgd(leaf: Leaf) -> Rule:
    """Plain gradient descent, no slots."""
    return Rule(lambda p: {}, lambda g, s, p, t, keep: (g, {}), mup.gradient)


def momentum(leaf: Leaf, beta: float = 0.9) -> Rule:
    """Heavy ball: v <- beta v + g, direction v (no dampening, as in torch and ONNX)."""

    def update(g: jax.Array, s: Slots, p: jax.Array, t: jax.Array, keep: Keep) -> tuple[jax.Array, Slots]:
        v = keep(beta * s["momentum"] + g, s["momentum"])
        return v, {"momentum": v}

    return Rule(lambda p: {"momentum": _zeros(p)}, update, mup.gradient)


def nesterov(leaf: Leaf, beta: float = 0.9) -> Rule:
    """Nesterov momentum as in Sutskever et al. 2013: direction g + beta v with the new v."""

    def update(g: jax.Array, s: Slots, p: jax.Array, t: jax.Array, keep: Keep) -> tuple[jax.Array, Slots]:
        v = keep(beta * s["momentum"] + g, s["momentum"])
        return g + beta * v, {"momentum": v}

    return Rule(lambda p: {"momentum": _zeros(p)}, update, mup.gradient)


def lion(leaf: Leaf, b1: float = 0.9, b2: float = 0.99, mu_dtype: str = "") -> Rule:
    """Lion (Chen et al. 2023, algorithm 2): the sign of an interpolated momentum."""

    def update(g: jax.Array, s: Slots, p: jax.Array, t: jax.Array, keep: Keep) -> tuple[jax.Array, Slots]:
        mu = s["mu"].astype(g.dtype)
        direction = jnp.sign(b1 * mu + (1 - b1) * g)
        return direction, {"mu": keep((b2 * mu + (1 - b2) * g).astype(s["mu"].dtype), s["mu"])}

    return Rule(lambda p: {"mu": _zeros(p, mu_dtype)}, update)


def adafactor(
    leaf: Leaf,
    exponent: float = 0.8,
    threshold: float = 1.0,
    min_factored: int = 128,
    scale_by_parameter: bool = True,
    eps: float = 1e-30,
    eps_scale: float = 1e-3,
) -> Rule:
    """Adafactor (Shazeer & Stern 2018, algorithms 4 and 5), without first moment.

    The two largest dimensions are factored when both reach `min_factored`; layers of a stack are
    factored, clipped and scaled one by one.

    Args:
      exponent: decay of the second moment is 1 - t^-exponent.
      threshold: an update whose RMS is larger is scaled down to it.
      scale_by_parameter: multiply by max(RMS(p), eps_scale): lr is then relative.
    """
    inner = range(leaf.stacked, len(leaf.shape))
    largest = sorted(sorted(inner, key=lambda d: -leaf.shape[d])[:2])
    factored = len(largest) == 2 and min(leaf.shape[d] for d in largest) >= min_factored

    def init(p: Any) -> Slots:
        if not factored:
            return {"nu": _zeros(p)}
        shapes = {
            name: p.shape[:d] + p.shape[d + 1 :] for name, d in zip(("nu_columns", "nu_rows"), largest, strict=True)
        }
        return {name: jnp.zeros(shape, wide(p.dtype)) for name, shape in shapes.items()}

    def rms(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(inner), keepdims=True))

    def update(g: jax.Array, s: Slots, p: jax.Array, t: jax.Array, keep: Keep) -> tuple[jax.Array, Slots]:
        b2 = 1 - t**-exponent
        square = jnp.square(g) + eps
        if factored:
            first, second = largest
            rows = keep(b2 * s["nu_rows"] + (1 - b2) * jnp.mean(square, axis=second), s["nu_rows"])
            columns = b2 * s["nu_columns"] + (1 - b2) * jnp.mean(square, axis=first)
            columns = keep(columns, s["nu_columns"])
            mean = jnp.mean(rows, axis=first, keepdims=True)
            row_scale = jnp.expand_dims(jax.lax.rsqrt(rows / mean), second)
            direction = g * row_scale * jnp.expand_dims(jax.lax.rsqrt(columns), first)
            slots = {"nu_columns": columns, "nu_rows": rows}
        else:
            nu = keep(b2 * s["nu"] + (1 - b2) * square, s["nu"])
            direction, slots = g * jax.lax.rsqrt(nu), {"nu": nu}
        direction = direction / jnp.maximum(1.0, rms(direction) / threshold)
        if scale_by_parameter:
            direction = direction * jnp.maximum(rms(p), eps_scale)
        return direction, slots

    return Rule(init, update, mup.relative if scale_by_parameter else mup.entrywise)


def muon(
    leaf: Leaf,
    beta: float = 0.95,
    steps: int = 5,
    scale: float = 0.2,
    dtype: str = "",
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
) -> Rule:
    """Muon on matrices (see muon.py), AdamW on everything else.

    scale: the orthogonal update is multiplied by scale * sqrt(max(rows, columns)), which gives it
      the RMS of an AdamW update, so that one lr and one decay fit both (Liu et al. 2025, eq. 4).
    dtype: of the Newton-Schulz iteration; default that of the momentum.
    """
    shape = muon_rule.matrix_shape(leaf.axes, leaf.shape) if leaf.axes is not None else None
    if shape is None:
        return adam(leaf, b1, b2, eps)

    def update(g: jax.Array, s: Slots, p: jax.Array, t: jax.Array, keep: Keep) -> tuple[jax.Array, Slots]:
        v = keep(beta * s["momentum"] + g, s["momentum"])
        x = (g + beta * v).reshape(shape)
        x = x.astype(jnp.dtype(dtype)) if dtype else x
        x = muon_rule.orthogonalize(x, steps).astype(v.dtype)
        return scale * math.sqrt(max(shape[1:])) * x.reshape(v.shape), {"momentum": v}

    return Rule(lambda p: {"momentum": _zeros(p)}, update, mup.orthogonal)


OPTIMIZERS: dict[str, Callable[..., Rule]] = {
    "adamw": adam,
    "adam": adam,
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
}


def _checked_rule(name: str, options: Mapping[str, Any]) -> Callable[[Leaf], Rule]:
    if name not in OPTIMIZERS:
        raise InputError(f"unknown optimizer '{name}' of {tuple(OPTIMIZERS)}{nearest(name, OPTIMIZERS)}")
    known = [p for p in inspect.signature(OPTIMIZERS[name]).parameters if p != "leaf"]
    for option in options:
        if option not in known:
            raise InputError(
                f"optimizer '{name}' has no option '{option}', only {tuple(known)}{nearest(option, known)}"
            )
    return lambda leaf: OPTIMIZERS[name](leaf, **options)


def assign_groups(groups: Groups, params: Any) -> dict[str, dict[str, Any]]:
    """{path: {"lr": multiplier, "decay": multiplier, "freeze": bool}} of every parameter.

    Raises:
      InputError: an unknown option, or parameters that no rule covers (all listed).
    """
    for pattern, options in groups:
        for option in options:
            if option not in GROUP_OPTIONS:
                raise InputError(
                    f"optimizer group '{pattern}' has no option '{option}', only {GROUP_OPTIONS}"
                    f"{nearest(option, GROUP_OPTIONS)}"
                )
    # An empty option dict is a rule too, hence the marker.
    marked = [(pattern, {"lr": 1.0, "decay": 1.0, "freeze": False} | dict(o)) for pattern, o in groups]
    flat = trees.flatten(params)
    missing = [path for path in flat if trees.first_match(marked, path, None) is None]
    if missing:
        raise InputError(f"optimizer groups cover no rule for: {', '.join(missing)}")
    return {path: trees.first_match(marked, path) for path in flat}


def frozen(groups: Groups, params: Any, axes: Any = None, freeze_layers: int = 0) -> frozenset[str]:
    """Paths of the parameters that `groups` or `freeze_layers` freeze whole: no slots, no gradient, no update."""
    fixed = layers.frozen_rows(params, axes, freeze_layers)
    whole = {path for path, leaf in trees.flatten(params).items() if fixed.get(path, 0) >= max(leaf.shape, default=1)}
    return frozenset(p for p, o in assign_groups(groups, params).items() if o["freeze"] or p in whole)


def global_norm(tree: Any) -> jax.Array:
    """Root of the sum of squares of all leaves, in float32 or wider."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros(())
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(wide(x.dtype)))) for x in leaves))


def make(
    params: Any,
    *,
    name: str = "adamw",
    lr: Callable[[jax.Array], jax.Array],
    axes: Any = None,
    clip: float = 0.0,
    decay: str = "decoupled",
    weight_decay: float = 0.0,
    groups: Groups = DEFAULT_GROUPS,
    layer_decay: float = 1.0,
    freeze_layers: int = 0,
    ratio: mup.Ratio = mup.STANDARD,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Build the optimizer for these parameters.

    Args:
      params: tree of arrays or ShapeDtypeStruct.
      lr: schedule, updates applied -> rate.
      axes: same tree with logical axis names; tells muon and adafactor what is a layer stack.
      clip: largest global gradient norm; 0 is off. Frozen parameters do not count.
      decay: "decoupled": p <- p - lr * weight_decay * p (AdamW, Loshchilov & Hutter 2019);
        "l2": weight_decay * p joins the (clipped) gradient and so passes through the moments;
        "none": weight_decay must be 0.
      groups: ordered (regex, {"lr": multiplier, "decay": multiplier, "freeze": bool}).
      layer_decay, freeze_layers: see layers.py; both need `axes`.
      ratio: of the model to the one whose `lr` and `weight_decay` these are; see mup.py. Needs `axes`.
      options: of the named optimizer.

    Returns:
      init(params) -> state and update(gradients, state, params) -> (updates, state). Gradients
      of frozen parameters may be absent; present ones get zero updates. update(..., good=flag)
      keeps the old state bitwise where the flag is False; the caller then drops the updates.

    Raises:
      InputError: unknown optimizer, option, decay or group option; an uncovered parameter.
    """
    if decay not in DECAYS:
        raise InputError(f"unknown decay '{decay}' of {DECAYS}{nearest(decay, DECAYS)}")
    if decay == "none" and not _is_zero(weight_decay):
        raise InputError(f"decay 'none' with weight_decay {weight_decay}; name it {DECAYS[:2]}")
    rule = _checked_rule(name, options)
    settings = assign_groups(groups, params)
    for path in frozen(groups, params, axes, freeze_layers):
        settings[path] = settings[path] | {"freeze": True}
    for path, factor in layers.multipliers(params, axes, layer_decay, freeze_layers).items():
        settings[path] = settings[path] | {"lr": settings[path]["lr"] * factor}
    flat_axes = trees.flatten(axes, is_leaf=lambda a: isinstance(a, tuple)) if axes else {}
    rules = {
        path: rule(Leaf(tuple(leaf.shape), flat_axes.get(path), mup.gradient_size(flat_axes.get(path), ratio)))
        for path, leaf in trees.flatten(params).items()
        if not settings[path]["freeze"]
    }
    if ratio.width != 1:
        _follow_width(settings, rules, flat_axes, ratio.width, decay)
    return optax.GradientTransformationExtraArgs(
        lambda p: _init(rules, p),
        lambda g, s, p=None, *, good=None, **_: _update(rules, settings, lr, clip, decay, weight_decay, g, s, p, good),
    )


def _follow_width(
    settings: dict[str, dict[str, Any]], rules: Mapping[str, Rule], axes: Mapping[str, Any], width: float, decay: str
) -> None:
    """Scale the learning rates; learning rate times decay stays as it was."""
    if decay == "l2":
        raise InputError("decay 'l2' passes through the moments and does not follow the width; name it decoupled")
    for path, rule in rules.items():
        factor = rule.growth(*mup.growth(axes[path], width))
        own = settings[path]
        settings[path] = own | {"lr": own["lr"] * factor, "decay": own["decay"] / factor}


def _init(rules: Mapping[str, Rule], params: Any) -> dict[str, Any]:
    slots: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in trees.flatten(params).items():
        for slot, value in (rules[path].init(leaf) if path in rules else {}).items():
            slots.setdefault(slot, {})[path] = value
    nested = {slot: trees.unflatten(values) for slot, values in slots.items()}
    return {"count": jnp.zeros((), jnp.int32)} | nested


def _update(
    rules: Mapping[str, Rule], settings: Mapping[str, Mapping[str, Any]], lr: Callable,
    clip: float, decay: str, weight_decay: float, gradients: Any, state: Any, params: Any,
    good: jax.Array | None,
) -> tuple[Any, Any]:  # fmt: skip
    flat = trees.flatten(gradients)
    weights = trees.flatten(params)
    slots = {slot: trees.flatten(value) for slot, value in state.items() if slot != "count"}
    rate = lr(state["count"])
    t = (state["count"] + 1).astype(rate.dtype)
    keep = _keeper(good)
    live = {path: g for path, g in flat.items() if path in rules}
    scale = clip / jnp.maximum(global_norm(live), clip) if clip else None
    updates = {path: jnp.zeros_like(g) for path, g in flat.items() if path not in rules}
    for path, g in live.items():
        p = weights[path]
        master = p.astype(wide(p.dtype))
        g = g.astype(master.dtype)
        g = g if scale is None else g * scale.astype(g.dtype)
        decays = decay != "none" and not _is_zero(weight_decay) and not _is_zero(settings[path]["decay"])
        wd = weight_decay * settings[path]["decay"] if decays else 0.0
        if decays and decay == "l2":
            g = g + wd * master
        own = {slot: values[path] for slot, values in slots.items() if path in values}
        direction, own = rules[path].update(g, own, master, t.astype(g.dtype), keep)
        if decays and decay == "decoupled":
            direction = direction + wd * master
        updates[path] = _step(rate, settings[path]["lr"], direction)
        for slot, value in own.items():
            slots[slot][path] = value
    nested = {slot: trees.unflatten(values) for slot, values in slots.items()}
    ordered = trees.unflatten({path: updates[path] for path in flat})
    return ordered, {"count": keep(state["count"] + 1, state["count"])} | nested


def _is_zero(value: Any) -> bool:
    """Whether a number is known to be 0; one that is varied inside a program is not."""
    return isinstance(value, (int, float)) and value == 0


def _step(rate: jax.Array, factor: Any, direction: jax.Array) -> jax.Array:
    """-rate * factor * direction; where a layer's factor is 0 the number that leaves any parameter as it is."""
    update = (-rate * jnp.asarray(factor)).astype(direction.dtype) * direction
    # x + (-0.0) is x bit for bit; x + 0.0 is not, for x = -0.0, and 0 * inf would be NaN.
    return update if isinstance(factor, float) else jnp.where(jnp.asarray(factor) == 0, -0.0, update)


def _keeper(good: jax.Array | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(new, old) -> the one to keep, cut off from what reads it.

    Without the barrier XLA:CPU computes a parameter's update from the *old* moments, beside the
    new ones, and must copy every moment first because both are written in place.
    """

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(new if good is None else jnp.where(good, new, old))

    return keep


def apply(params: Any, updates: Any) -> Any:
    """params + updates in the dtype of params; a parameter without an update stays as it is."""
    flat = trees.flatten(updates)
    return trees.map_paths(
        lambda path, p: (p + flat[path].astype(wide(p.dtype))).astype(p.dtype) if path in flat else p,
        params,
    )
