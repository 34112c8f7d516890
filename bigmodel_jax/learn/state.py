"""The training state: one plain dict, and where each of its leaves lives.

    {"step": int32, updates applied,   "params": ..., "stats": ..., "opt": ..., "guard": ...,
     "ema": like params, only when averaging is on,
     "frozen": what is neither trained nor averaged, only where the model has it}

Optimizer leaves are matched to parameters by path and shape, never by partition metadata carried
through the optimizer: the slot "opt/mu/layers/attn/q" ends in its parameter's path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from bigmodel_jax import tree as trees
from bigmodel_jax.parallel.rules import Layout
from bigmodel_jax.parallel.rules import shardings as places

# Memory of the host that a device reads by itself.
HOST = "pinned_host"

State = dict[str, Any]


def guard(window: int = 64, noise: bool = False) -> dict[str, jax.Array]:
    """Fresh counters of the numeric guard.

    "losses" and "norms" [window] hold the last admitted values in a ring, "admitted" counts them,
    "bad_streak" the bad steps since the last good one, "skipped" all steps left out; with `noise`, "noise"
    holds the averages of the noise meter.
    """
    meter = {"noise": jnp.zeros((2,), jnp.float32)} if noise else {}
    return meter | {
        "losses": jnp.zeros((window,), jnp.float32),
        "norms": jnp.zeros((window,), jnp.float32),
        "admitted": jnp.zeros((), jnp.int32),
        "bad_streak": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }


def variables(state: State, ema: bool = False) -> dict[str, Any]:
    """What the model is evaluated with: parameters, or their average, and everything else that is not trained."""
    fixed = {name: state[name] for name in ("frozen",) if name in state}
    return {"params": state["ema" if ema else "params"], "stats": state["stats"]} | fixed


def create(
    init: Callable[[jax.Array], dict[str, Any]],
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    ema: bool = False,
    window: int = 64,
    noise: bool = False,
) -> State:
    """State before the first update. Pure: use it under `jax.eval_shape` or `initialize`.

    Args:
      init: key -> {"params": ..., "stats": ...} (Model.init).
      ema: keep an average of the parameters, starting at their initial values.
      window: admitted steps that the spike guard remembers. noise: measure the gradient noise scale.
    """
    variables = init(key)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": variables["params"],
        "stats": variables.get("stats", {}),
        "opt": tx.init(variables["params"]),
        "guard": guard(window, noise),
    }
    if variables.get("frozen"):
        state["frozen"] = variables["frozen"]
    if ema:
        # A copy: two leaves in one buffer could not both be donated.
        state["ema"] = jax.tree.map(jnp.copy, variables["params"])
    return state


def shardings(abstract: State, axes: dict[str, Any], layout: Layout) -> State:
    """Tree of NamedSharding for every leaf of the state.

    Args:
      abstract: `jax.eval_shape` of the state.
      axes: {"params": logical axes, "stats": logical axes} (from Model.abstract).
    """
    mesh, rules = layout.mesh, layout.rules
    params = trees.flatten(gradients(abstract, axes, layout))
    weights = trees.flatten(places(axes["params"], abstract["params"], mesh, layout.weights))
    shapes = {path: leaf.shape for path, leaf in trees.flatten(abstract["params"]).items()}
    stats = places(axes.get("stats", {}), abstract["stats"], mesh, rules)
    whole = NamedSharding(mesh, PartitionSpec())

    def of_slot(path: str, leaf: Any) -> NamedSharding:
        owner = _owner(path, params)
        found = whole if owner is None else _like(params[owner], shapes[owner], leaf.shape)
        return found.with_memory_kind(HOST) if layout.offload == "optimizer" and leaf.ndim else found

    out = {
        key: jax.tree.map(lambda _: whole, value)
        for key, value in abstract.items()
        if key not in ("params", "stats", "opt", "ema", "frozen")
    }
    out["params"] = trees.map_paths(lambda path, _: weights[path], abstract["params"])
    out["stats"] = stats
    out["opt"] = trees.map_paths(of_slot, abstract["opt"])
    if "frozen" in abstract:
        out["frozen"] = places(axes["frozen"], abstract["frozen"], mesh, layout.weights)
    if "ema" in abstract:
        out["ema"] = trees.map_paths(lambda path, _: params[path], abstract["ema"])
    return out


def gradients(abstract: State, axes: dict[str, Any], layout: Layout) -> Any:
    """Tree of NamedSharding of the gradients: cut as the optimizer's slots are, also under ZeRO-1."""
    return places(axes["params"], abstract["params"], layout.mesh, layout.rules)


def _owner(path: str, params: dict[str, Any]) -> str | None:
    """Longest parameter path that `path` ends in."""
    parts = path.split("/")
    suffixes = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((suffix for suffix in suffixes if suffix in params), None)


def _like(sharding: NamedSharding, owner: tuple[int, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of a slot: its parameter's, less the dimension that a factored slot lacks."""
    if shape == owner:
        return sharding
    entries = list(sharding.spec) + [None] * (len(owner) - len(sharding.spec))
    for d in reversed(range(len(owner))):
        if shape == owner[:d] + owner[d + 1 :]:
            return NamedSharding(sharding.mesh, PartitionSpec(*entries[:d], *entries[d + 1 :]))
    return NamedSharding(sharding.mesh, PartitionSpec())


def initialize(
    create_fn: Callable[[jax.Array], State],
    layout_tree: State,
    key: jax.Array,
    compiler_options: dict[str, Any] | None = None,
) -> State:
    """Run `create_fn(key)` with every leaf made in place, on the devices that keep it."""
    return jax.jit(create_fn, out_shardings=layout_tree, compiler_options=compiler_options)(key)
