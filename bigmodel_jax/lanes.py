"""Several runs as one program: lane k computes what run k computes alone.

The runs share everything but their seed, peak learning rate and weight decay. Each has its own data order,
initial values and dropout; the two numbers are leaves of the state, so that one program serves all. Lanes are cut
over the devices. A device goes through its own

    vmap    side by side: few large kernels instead of many small ones, for accelerators
    map     one after the other inside the program, for a CPU
    turns   one after the other by calling one lane's program for each, for a CPU and convolutions, which XLA
            runs three times slower inside a loop or as grouped ones (jax 0.10.2)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import experiment as experiments
from bigmodel_jax import schema
from bigmodel_jax.errors import InputError
from bigmodel_jax.experiment import Experiment
from bigmodel_jax.learn import step as steps
from bigmodel_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from bigmodel_jax.programs import Programs

VARIED = ("lr", "weight_decay")
"""Leaves of `optimizer` that differ between lanes as numbers of the state; the seed differs through data and keys."""
MAY_DIFFER = ("seed", *(f"optimizer.{leaf}" for leaf in VARIED))
WAYS = ("vmap", "map", "turns")


def check(configs: Sequence[dict[str, Any]]) -> None:
    """Refuse runs that cannot share a program.

    Raises:
      InputError: they differ in more than may vary, or use what each run decides by itself.
    """
    first = configs[0]
    for config in configs[1:]:
        for leaf, (a, b) in schema.difference(first, config).items():
            if leaf not in MAY_DIFFER:
                raise InputError(f"lanes differ in {leaf} ({a!r} and {b!r}); they may in {', '.join(MAY_DIFFER)}")
    for leaf, wanted in (("eval.metric", ""), ("eval.patience", 0), ("runtime.profile", ())):
        section, _, name = leaf.partition(".")
        if first[section][name] not in (wanted, []):
            raise InputError(f"{leaf} is decided run by run: train these alone, or leave it {wanted!r}")
    if jax.process_count() > 1:
        raise InputError("lanes run in one process; give each process lanes of its own")


class LanePrograms(Programs):
    """The programs of one experiment, over lanes. A state, batch or metric has lanes in front: as a leading
    dimension K, or with `turns` as a list of K.

    Args:
      exps: built on one device each, alike but for what may vary.
      by: one of WAYS, "" for what suits the platform.
    """

    def __init__(self, exps: Sequence[Experiment], by: str = ""):
        super().__init__(exps[0])
        self.solo = Programs(exps[0])
        self.exps = exps
        self.by = by or self._suited()
        devices = 1 if self.by == "turns" else math.gcd(len(exps), jax.device_count())
        self.mesh = make_mesh(devices=jax.devices()[:devices])
        self.place = replicated(self.mesh) if self.by == "turns" else batch_sharding(self.mesh, accumulated=False)
        self.batch_sharding = self.eval_sharding = self.place
        varied = {leaf: jax.ShapeDtypeStruct((), jnp.result_type(float)) for leaf in VARIED}
        self.state = self._abstract(self.solo.state | {"varied": varied})

    def _suited(self) -> str:
        if jax.default_backend() != "cpu":
            return "vmap"
        text = self.solo.lower_step(self.exp.batch_sizes()[0]).as_text()
        return "turns" if "stablehlo.convolution" in text else "map"

    def _abstract(self, one: Any, lanes: bool = True) -> Any:
        """Shapes of what holds `one` for each lane, or with `turns` inside its program."""
        front = (len(self.exps),) if self.by != "turns" else ()
        out = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*front, *leaf.shape), leaf.dtype, sharding=self.place), one
        )
        return [out] * len(self.exps) if self.by == "turns" and lanes else out

    def _over(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` of one lane as a function of what the program holds."""
        if self.by == "turns":
            return fn

        def local(*args: Any) -> Any:
            return jax.vmap(fn)(*args) if self.by == "vmap" else jax.lax.map(lambda each: fn(*each), args)

        return jax.shard_map(
            local, mesh=self.mesh, in_specs=self.place.spec, out_specs=self.place.spec, check_vma=False
        )

    def together(self, lanes: Sequence[Any]) -> Any:
        """One value with lanes in front from one for each lane, on the devices."""
        if self.by == "turns":
            return [jax.device_put(one, self.place) for one in lanes]
        return jax.tree.map(lambda *leaves: self._placed(leaves), *lanes)

    def _placed(self, leaves: Sequence[Any]) -> jax.Array:
        if jax.dtypes.issubdtype(leaves[0].dtype, jax.dtypes.prng_key):
            return jax.device_put(jnp.stack(leaves), self.place)
        return jax.device_put(np.stack([np.asarray(leaf) for leaf in leaves]), self.place)

    def lane(self, state: Any, k: int) -> Any:
        """The state of run k, as it would be alone."""
        first = self.mesh.devices.flat[0]
        one = state[k] if self.by == "turns" else jax.tree.map(lambda leaf: jax.device_put(leaf[k], first), state)
        return {name: part for name, part in one.items() if name != "varied"}

    def init(self, key: Any) -> Any:
        """The initial states, each made as its run makes it alone, from `init_from` too.

        Args:
          key: of each lane, K of them.
        """
        return self.together([self._with_numbers(self.solo.init(key[k]), k) for k in range(len(self.exps))])

    def initial_from(self, state: Any, settings: Any, tell: Any = lambda report: None) -> tuple[Any, str]:
        """As of a single run, for every lane."""
        lanes, line = [], ""
        for k in range(len(self.exps)):
            one, line = self.solo.initial_from(self.lane(state, k), settings, tell)
            lanes.append(self._with_numbers(one, k))
        return self.together(lanes), line

    def _with_numbers(self, state: Any, k: int) -> Any:
        settings = self.exps[k].config["optimizer"]
        numbers = {leaf: jnp.asarray(settings[leaf], jnp.result_type(float)) for leaf in VARIED}
        return state | {"varied": numbers}

    def lower_step(self, batch_size: int) -> Any:
        """The train step: (states, batches, keys) -> (states, metrics); of one lane with `turns`."""
        exp, abstract = self.exp, self.exp.model.abstract()

        def one(state: Any, batch: Any, key: jax.Array) -> tuple[Any, Any]:
            fn = self.solo.train_step(*experiments.optimizer(exp.config, exp.model, abstract, **state["varied"]))
            new, metrics = fn({name: part for name, part in state.items() if name != "varied"}, batch, key)
            return new | {"varied": state["varied"]}, metrics

        held = self.state[0] if self.by == "turns" else self.state
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
        inputs = self._batch(exp.spec, exp.cut(batch_size)), self._abstract(key, lanes=False)
        return jax.jit(self._over(one), donate_argnums=0, out_shardings=self.place).lower(held, *inputs)

    def lower_evaluate(self, rows: int, spec: Any) -> Any:
        """The evaluation, each lane on its own batch; of one lane with `turns`."""
        held = self.state[0] if self.by == "turns" else self.state
        fn = steps.make_eval_step(self.exp.model.apply, self.exp.objective, ema=self.ema > 0)
        return jax.jit(self._over(fn), out_shardings=self.place).lower(held, self._batch(spec, (rows,)))

    def _batch(self, spec: Any, shape: tuple[int, ...]) -> Any:
        rows = {name: jax.ShapeDtypeStruct((*shape, *row), dtype) for name, (row, dtype) in spec.items()}
        return self._abstract(rows, lanes=False)

    def step(self, batch_size: int) -> Any:
        """The compiled train step of all lanes."""
        compiled = super().step(batch_size)
        if self.by != "turns":
            return compiled

        def in_turn(states: Any, batches: Any, keys: Any) -> tuple[Any, Any]:
            pairs = [compiled(*each) for each in zip(states, batches, keys, strict=True)]
            return [state for state, _ in pairs], _columns([metrics for _, metrics in pairs])

        return in_turn

    def evaluate(self, name: str, rows: int, spec: Any) -> Any:
        """The compiled evaluation of all lanes: {metric: (K sums, K weights)}."""
        compiled = super().evaluate(name, rows, spec)
        if self.by != "turns":
            return compiled
        return lambda states, batches: _columns([compiled(*each) for each in zip(states, batches, strict=True)])


def _columns(lanes: Sequence[Any]) -> Any:
    """{name: [value of each lane]}, pairs as pairs of lists."""
    first = lanes[0]
    return {
        name: tuple(list(part) for part in zip(*(one[name] for one in lanes), strict=True))
        if isinstance(value, tuple) else [one[name] for one in lanes]
        for name, value in first.items()
    }  # fmt: skip
