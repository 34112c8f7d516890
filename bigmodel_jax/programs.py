"""The compiled programs of a run: initialise, train step per batch size, evaluate.

Each is lowered from shapes alone, so the same code serves a run, a test that lowers a 70B config
without memory for it, and a plan. Compiled ahead of time, a program cannot recompile behind the
loop's back: another shape is an error, not a slow step.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from bigmodel_jax import tree
from bigmodel_jax.data.storage import cache_root
from bigmodel_jax.errors import InputError
from bigmodel_jax.experiment import Experiment
from bigmodel_jax.learn import layers, optim
from bigmodel_jax.learn import state as states
from bigmodel_jax.learn import step as steps
from bigmodel_jax.parallel import hosts
from bigmodel_jax.parallel.feed import abstract_batch
from bigmodel_jax.parallel.mesh import batch_sharding

# Kernels with a fixed order of additions, chosen without timing them.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


def compiler_options() -> dict[str, Any]:
    """On a CPU, LLVM's last level takes a third of the time to compile initialisation and an eighth of a step's, and
    makes neither faster."""
    return {"xla_backend_optimization_level": 2} if jax.default_backend() == "cpu" else {}


def compilation_cache(setting: str) -> str:
    """Turn on jax's persistent cache; returns its directory, "" when off.

    Args:
      setting: a directory, "" for the user's cache directory, "off".
    """
    if setting == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    directory = setting or os.path.join(cache_root(), "compiled")
    jax.config.update("jax_compilation_cache_dir", directory)
    # Every program, however small: a second start then compiles nothing at all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


def set_up_process(runtime: Any) -> None:
    """Process-wide settings that must come before the first array (config section `runtime`).

    Raises:
      InputError: the platform asked for is not there.
    """
    if runtime.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if runtime.deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    hosts.initialise()
    hosts.require_platform(runtime.platform)
    jax.config.update("jax_enable_x64", runtime.x64)
    compilation_cache(runtime.compilation_cache)


class Programs:
    """Lowered and compiled programs of one experiment."""

    def __init__(self, exp: Experiment):
        self.exp = exp
        self.ema = exp.config["optimizer"]["ema"]
        self._create = functools.partial(
            states.create,
            exp.model.init,
            exp.tx,
            ema=self.ema > 0,
            window=exp.section("guard").window,
            noise=exp.section("guard").noise_scale > 0,
        )
        shapes = jax.eval_shape(self._create, jax.random.key(0))
        _, self.axes = exp.model.abstract()
        self.shardings = states.shardings(shapes, self.axes, exp.layout)
        self.state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes, self.shardings,
        )  # fmt: skip
        self.batch_sharding = batch_sharding(exp.mesh)
        self.eval_sharding = batch_sharding(exp.mesh, accumulated=False)
        self._started: dict[Any, Future] = {}
        self.compilations = 0

    def begin(self, sizes: tuple[int, ...], evals: dict[str, Any]) -> None:
        """Start compiling what a run will need, in the background: XLA leaves the interpreter lock,
        so that the step is compiled while parameters are made. One after the other: evaluation can wait.

        Args:
          sizes: global batch sizes of train steps.
          evals: {name: (rows, spec)} of evaluation batches.
        """
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")
        for size in sizes:
            self._started[size] = pool.submit(self._compile_step, size)
        for name, (rows, spec) in evals.items():
            self._started[name] = pool.submit(self._compile_evaluate, rows, spec)
        pool.shutdown(wait=False)

    def init(self, key: jax.Array) -> Any:
        """The initial state, each leaf made where it lives."""
        return states.initialize(self._create, self.shardings, key, compiler_options())

    def initial_from(self, state: Any, settings: Any, tell: Any = lambda report: None) -> tuple[Any, str]:
        """(state with parameters from another run or a published model, one line that says which).

        Optimizer state starts anew; the average of the parameters, where kept, starts at them.

        Args:
          tell: receives the report of names before it is judged.
        """
        from bigmodel_jax import inherit

        axes = self.axes
        base, rest = _base(state["params"], state.get("frozen", {}))
        found, report = inherit.init_from(
            settings.path, base, rename=settings.rename, skip=settings.skip, ema=settings.ema,
            strict=settings.strict, axes=_base(axes["params"], axes.get("frozen", {}), _is_axes)[0],
            resize={"vocab": settings.resize_vocab, "positions": settings.resize_positions}, tell=tell,
        )  # fmt: skip
        flat = tree.flatten(found) | rest
        for name in ("params", "frozen"):
            if name in state:
                old = tree.flatten(state[name])
                state = {**state, name: tree.unflatten({path: flat[path] for path in old})}
        if "ema" in state:
            state["ema"] = jax.tree.map(lambda leaf: leaf.copy(), state["params"])
        return state, inherit.say(report, settings.path)

    def train_step(self, learning_rate: Any, tx: Any, layout: Any = None, gradients: Any = None) -> Any:
        """(state, batch, key) -> (state, metrics), not yet jitted; without layout for one device."""
        exp, guard = self.exp, self.exp.section("guard")
        settings, params = exp.config["optimizer"], self.state["params"]
        return steps.make_train_step(
            exp.model.apply, exp.model.merge, exp.objective, tx,
            lr=learning_rate,
            guard=steps.Guard(spike=guard.spike_factor, skip=True, noise_scale=guard.noise_scale),
            ema=self.ema,
            layout=layout,
            gradients=gradients,
            frozen=optim.frozen(settings["groups"], params, self.axes["params"], settings["freeze_layers"]),
            frozen_rows=layers.frozen_rows(params, self.axes["params"], settings["freeze_layers"]),
            norms=2 if exp.section("log").norms else 0,
        )  # fmt: skip

    def lower_step(self, batch_size: int) -> Any:
        """The train step of this global batch size, lowered and not compiled."""
        exp = self.exp
        gradients = states.gradients(self.state, self.axes, exp.layout)
        fn = self.train_step(exp.learning_rate, exp.tx, exp.layout, gradients)
        batch = abstract_batch(exp.spec, self.batch_sharding, exp.cut(batch_size))
        key = jax.eval_shape(jax.random.key, 0)
        return steps.jit_train_step(fn, self.shardings, exp.mesh).lower(self.state, batch, key)

    def _compile_step(self, batch_size: int) -> Any:
        compiled = self.lower_step(batch_size).compile(compiler_options())
        self.compilations += 1
        return compiled

    def ready(self, batch_size: int) -> bool:
        """Whether `step(batch_size)` is compiled and costs nothing now."""
        return batch_size in self._started and self._started[batch_size].done()

    def step(self, batch_size: int) -> Any:
        """The compiled train step: (state, batch, key) -> (state, metrics). Donates the state."""
        if batch_size not in self._started:
            self._started[batch_size] = Future()
            self._started[batch_size].set_result(self._compile_step(batch_size))
        return self._started[batch_size].result()

    def lower_evaluate(self, rows: int, spec: Any) -> Any:
        """The evaluation step for batches of `rows` with the fields of `spec`, lowered."""
        exp = self.exp
        fn = steps.make_eval_step(exp.model.apply, exp.objective, layout=exp.layout, ema=self.ema > 0)
        return self.lower_rows(fn, rows, spec)

    def lower_rows(self, fn: Callable[[Any, Any], Any], rows: int, spec: Any) -> Any:
        """fn of (state, batch of `rows` with the fields of `spec`), lowered."""
        batch = abstract_batch(spec, self.eval_sharding, (rows,))
        return steps.jit_eval_step(fn, self.shardings, self.exp.mesh).lower(self.state, batch)

    def _compile_evaluate(self, rows: int, spec: Any) -> Any:
        return self.lower_evaluate(rows, spec).compile(compiler_options())

    def evaluate(self, name: str, rows: int, spec: Any) -> Any:
        """The compiled evaluation of set `name`: (state, batch) -> {metric: (sum, weight)}."""
        if name not in self._started:
            self._started[name] = Future()
            self._started[name].set_result(self._compile_evaluate(rows, spec))
        return self._started[name].result()

    def records(self, rows: int, spec: Any) -> Any:
        """The compiled records of batches of `rows`: (state, batch) -> {name: [rows, ...]}.

        Raises:
          InputError: the objective has none.
        """
        exp = self.exp
        if exp.objective.records is None:
            raise InputError(f"objective '{exp.config['objective']['name']}' gives no per-example records")
        fn = steps.make_record_step(exp.model.apply, exp.objective, layout=exp.layout, ema=self.ema > 0)
        return self.lower_rows(fn, rows, spec).compile(compiler_options())

    def eval_variables(self, state: Any) -> dict[str, Any]:
        """Parameters to evaluate and sample with: the average where one is kept."""
        variables = states.variables(state, self.ema > 0)
        if "frozen" not in variables:
            return variables
        # Once here, not at every token.
        return {"params": jax.jit(self.exp.model.whole)(variables), "stats": variables["stats"]}


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def _base(params: Any, frozen: Any, is_leaf: Any = None) -> tuple[Any, dict[str, Any]]:
    """(parameters under the names of the plain model, the adapters' own by path)."""
    flat = tree.flatten(params, is_leaf) | tree.flatten(frozen, is_leaf)
    own = {path: leaf for path, leaf in flat.items() if path.startswith("lora/")}
    return tree.unflatten({path: leaf for path, leaf in flat.items() if path not in own}), own
