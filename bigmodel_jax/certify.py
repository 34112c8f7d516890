"""The layout certificate: the same few steps in two layouts, compared leaf by leaf.

    bigmodel certify --config FILE --mesh one --mesh data=2,fsdp=2,tensor=2

Runs anywhere, on simulated devices: the config is made small (small.py), or taken as it is with --full. Both layouts
get the same initial state and batches and run the program that training runs (`programs.Programs`); the one addition
is an optimizer slot that keeps the gradients it was given. agreement.py says when two runs are the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from bigmodel_jax import agreement, experiment, schema, small, tree
from bigmodel_jax.errors import Disagreement, InputError
from bigmodel_jax.experiment import Experiment
from bigmodel_jax.parallel.feed import global_batch
from bigmodel_jax.parallel.mesh import AXES
from bigmodel_jax.programs import Programs
from bigmodel_jax.sections import MeshSize

# What the partitioner does stays the same, and compiling takes half as long.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    # The older way to compile fusions, no option later: half as long again.
    QUICK |= {"xla_cpu_use_fusion_emitters": False}
SHOWN = 8

Batches = Callable[[Experiment, int, np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Certificate:
    """layouts: (first, second). changes: {leaf: (before, after)} of the config. verdicts: one per precision."""

    layouts: tuple[str, str]
    steps: int
    changes: dict[str, tuple[Any, Any]]
    data: str
    verdicts: tuple[agreement.Verdict, ...]

    @property
    def agreed(self) -> bool:
        return all(verdict.agreed for verdict in self.verdicts)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        verdicts = [verdict.plain() for verdict in self.verdicts]
        return dataclasses.asdict(self) | {"agreed": self.agreed, "jax": jax.__version__, "verdicts": verdicts}


def parse_mesh(text: str) -> dict[str, Any]:
    """The config section `mesh` from "data=2,fsdp=2", or from "one": a single device. Axes left out are 1.

    Raises:
      InputError: an unknown leaf or a value of another type, with the nearest legal one.
    """
    leaves: dict[str, Any] = {axis: 1 for axis in AXES}
    for word in () if text == "one" else text.split(","):
        name, equals, _ = word.partition("=")
        if not equals:
            raise InputError(f"mesh '{text}' should read like data=2,fsdp=4, or one: '{word}' has no value")
        leaves[name] = schema.parse_override(f"--config.{word}")[1]
    section = schema.complete(leaves, "mesh.", MeshSize)
    if min(section[axis] for axis in AXES) < 1:
        raise InputError(f"mesh '{text}': the size of every axis is at least 1")
    return section


def count(mesh: Mapping[str, Any]) -> int:
    """Devices of a section `mesh`."""
    return math.prod(mesh[axis] for axis in AXES)


def simulate(devices: int) -> None:
    """Give this process so many simulated devices; too late once jax has begun, then there must be enough."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        if len(jax.devices()) < devices:
            raise InputError(f"this process has {len(jax.devices())} devices, the mesh needs {devices}") from None


def recording(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`tx` with one more slot, "gradients": those it was given last, before clipping and decay."""

    def init(params: Any) -> dict[str, Any]:
        return tx.init(params) | {"gradients": jax.tree.map(lambda p: jax.numpy.zeros_like(p), params)}

    def update(given: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        own = {slot: value for slot, value in state.items() if slot != "gradients"}
        change, own = tx.update(given, own, params, **more)
        kept = tree.flatten(state["gradients"]) | tree.flatten(given)
        return change, own | {"gradients": tree.unflatten(kept)}

    return optax.GradientTransformationExtraArgs(init, update)


def initial(exp: Experiment, seed: int = 7) -> dict[str, Any]:
    """A state on the host: parameters drawn at random, so that none of them starts at the zero that would hide the
    gradients of those behind it."""
    rng = np.random.default_rng(seed)

    def drawn(path: str, leaf: Any) -> np.ndarray:
        center = 1.0 if path.endswith("scale") else 0.0
        return (center + rng.normal(size=leaf.shape) / max(math.prod(leaf.shape), 1) ** 0.25).astype(leaf.dtype)

    def resting(path: str, leaf: Any) -> np.ndarray:
        return np.full(leaf.shape, 1.0 if path.endswith("var") else 0.0, leaf.dtype)

    abstract = Programs(exp).state
    state = tree.map_paths(resting, {name: abstract[name] for name in abstract if name != "opt"})
    for name in ("params", "frozen"):
        if name in abstract:
            state[name] = tree.map_paths(drawn, abstract[name])
    if "ema" in abstract:
        state["ema"] = state["params"]
    return state | {"opt": jax.device_get(exp.tx.init(state["params"]))}


class Side:
    """One layout of an experiment, its optimizer from `recording`, compiled."""

    def __init__(self, exp: Experiment):
        self.exp, self.programs = exp, Programs(exp)
        self.size = exp.batch_sizes()[0]
        self.step = self.programs.lower_step(self.size).compile(compiler_options=QUICK)

    def run(self, start: Mapping[str, Any], batches: Batches, steps: int) -> dict[str, dict[str, np.ndarray]]:
        """{part: {leaf: array}} after so many steps from `start`: "loss" of each step, "gradients" of the first,
        "parameters", and where there are any "statistics" and "average"."""
        exp, place = self.exp, self.programs.batch_sharding
        state, key = jax.device_put(dict(start), self.programs.shardings), jax.random.key(self.exp.run.seed)
        losses, first = {}, {}
        for step in range(steps):
            batch = global_batch(lambda rows, s=step: batches(exp, s, rows), place, exp.cut(self.size))
            state, metrics = self.step(state, batch, key)
            losses[f"step {step}"] = np.asarray(metrics["loss"])
            first = first or tree.flatten(jax.device_get(state["opt"]["gradients"]))
        out = {"loss": losses, "gradients": first}
        for part, name in (("parameters", "params"), ("statistics", "stats"), ("average", "ema")):
            if jax.tree.leaves(state.get(name, {})):
                out[part] = tree.flatten(jax.device_get(state[name]))
        return out


def made_up(exp: Experiment, step: int, rows: np.ndarray) -> Mapping[str, np.ndarray]:
    """Rows of the synthetic batch of a step."""
    whole = small.batch(exp.config, exp.spec, exp.batch_sizes()[0], 1000 + step)
    return {name: value[rows] for name, value in whole.items()}


def real(exp: Experiment, step: int, rows: np.ndarray) -> Mapping[str, np.ndarray]:
    """Rows of the training batch of a step."""
    return exp.data.train.batch(step, rows)


def in_precision(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config computing in `dtype`, "" for its own. float64 is float64 throughout, also moments that a config
    keeps narrower."""
    if not dtype:
        return dict(config)
    wide = {"model": {"dtype": dtype, "param_dtype": dtype}, "optimizer": {"mu_dtype": "", "dtype": ""}}
    out = dict(config) | {"runtime": config["runtime"] | {"x64": dtype == "float64"}}
    for section, leaves in wide.items():
        out[section] = config[section] | {leaf: v for leaf, v in leaves.items() if leaf in config[section]}
    return out


def built(config: Mapping[str, Any], mesh: Mapping[str, Any], load: bool = False) -> Experiment:
    """The experiment of a config on a mesh, its optimizer recording gradients."""
    exp = experiment.build(dict(config) | {"mesh": dict(mesh)}, devices=jax.devices()[: count(mesh)], load=load)
    return dataclasses.replace(exp, tx=recording(exp.tx))


def certify(
    config: Mapping[str, Any],
    meshes: tuple[Mapping[str, Any], Mapping[str, Any]],
    *,
    steps: int = 3,
    precisions: Sequence[str] = ("float64", ""),
    load: bool = False,
    batches: Batches = made_up,
) -> tuple[agreement.Verdict, ...]:
    """One verdict per precision.

    Args:
      config: resolved and as it shall run.
      meshes: sections `mesh`, see `parse_mesh`; the first is what the second is held against.
      precisions: "" is the config's own; float64 comes first where it is asked for, as the others are judged by it.
      load: build with the config's data.

    Raises:
      InputError: a layout that the experiment refuses.
    """
    verdicts, exact, zeros = [], None, frozenset()
    own = config["model"]["dtype"]
    for dtype in precisions:
        name = dtype or own
        if any(verdict.precision == name for verdict in verdicts):
            continue
        with jax.enable_x64(name == "float64"):
            experiments = [built(in_precision(config, dtype), mesh, load) for mesh in meshes]
            start = initial(experiments[0])
            runs = [Side(exp).run(start, batches, steps) for exp in experiments]
        if name == "float64":
            zeros = agreement.zero_gradients(runs[0])
        before = {"parameters": tree.flatten(start["params"])}
        verdicts.append(agreement.compare(*runs, name, zeros, exact=exact, start=before))
        exact = runs[0] if name == "float64" else exact
    return tuple(verdicts)


def certify_config(
    config: Mapping[str, Any],
    layouts: Sequence[str],
    *,
    kept: Sequence[str] = (),
    steps: int = 3,
    float64: bool = False,
    full: bool = False,
    out: str = "",
    say: Callable[[str], None] = print,
) -> Certificate:
    """What the verb does: shrink, run, show, write.

    Args:
      kept: leaves that shrinking leaves alone.
      float64: only in float64, the strict proof.
      full: the config as it is, with its data where they are there.
      out: file for the certificate as JSON.

    Raises:
      Disagreement: the layouts compute different numbers.
    """
    if len(layouts) != 2:
        raise InputError(f"--mesh is given twice, for the two layouts to compare, not {len(layouts)} times")
    if steps < 1:
        raise InputError(f"--steps {steps} should be at least 1")
    meshes = tuple(parse_mesh(text) for text in layouts)
    simulate(max(map(count, meshes)))
    config, changes, load, data = _prepared(config, meshes, kept, full)
    for line in _opening(layouts, meshes, changes, data):
        say(line)
    verdicts = certify(
        config, meshes, steps=steps, precisions=("float64",) if float64 else ("float64", ""), load=load,
        batches=real if load else made_up,
    )  # fmt: skip
    certificate = Certificate(tuple(layouts), steps, changes, data, verdicts)
    for line in show(certificate):
        say(line)
    if out:
        Path(out).write_text(json.dumps(certificate.plain(), indent=1) + "\n")
    if not certificate.agreed:
        wrong = next(verdict for verdict in verdicts if not verdict.agreed)
        raise Disagreement(
            f"mesh {layouts[1]} does not compute what {layouts[0]} does, in {wrong.precision}: {wrong.reason()}"
        )
    return certificate


def _prepared(
    config: Mapping[str, Any], meshes: Sequence[Mapping[str, Any]], kept: Sequence[str], full: bool
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]], bool, str]:
    """(config, changes, whether to load data, what the data are)."""
    made = "made-up numbers with the fields of the data"
    if not full:
        pieces = math.lcm(*(mesh["stage"] * mesh["repeats"] for mesh in meshes))
        shrunk, changes = small.shrunk(small.sized(config), pieces if pieces > 1 else 2, kept)
        return shrunk, changes, False, made
    try:
        found = experiment.build(dict(config) | {"mesh": parse_mesh("one")}, devices=jax.devices()[:1])
    except InputError as error:
        return small.sized(config), {}, False, f"{made}, for its own cannot be read ({error})"
    return found.config, {}, True, "its own"


def _opening(
    layouts: Sequence[str], meshes: Sequence[Mapping[str, Any]], changes: Mapping[str, tuple[Any, Any]], data: str
) -> list[str]:
    lines = [f"layout: {text}, devices: {count(mesh)}" for text, mesh in zip(layouts, meshes, strict=True)]
    if changes:
        lines.append("made small: " + ", ".join(f"{leaf} {a!r} -> {b!r}" for leaf, (a, b) in changes.items()))
    return [*lines, f"data: {data}"]


def show(certificate: Certificate) -> list[str]:
    """The lines that a person reads."""
    lines = []
    for verdict in certificate.verdicts:
        word = "the same numbers" if verdict.agreed else "DIFFERENT"
        lines.append(f"{verdict.precision}, {certificate.steps} steps: {word}; {verdict.reason()}")
        lines.append(f"  allowed {agreement.TOLERANCES[verdict.precision]:.0e}: {agreement.WHY[verdict.precision]}")
        lines.append(f"  {'part':12} {'leaf':40} {'error':>9} {'allowed':>9} {'largest':>9}")
        for row in verdict.rows[:SHOWN]:
            numbers = f"{row.error:9.1e} {row.allowed:9.1e} {row.largest:9.1e}"
            lines.append(f"  {row.part:12} {row.leaf:40} {numbers}  {row.note}{'' if row.good else '  <--'}".rstrip())
        rest = len(verdict.rows) - SHOWN
        if rest > 0:
            lines.append(f"  and {rest} more leaves, {'all better' if verdict.agreed else 'in --out'}")
    return lines
