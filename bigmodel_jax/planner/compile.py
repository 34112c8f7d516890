"""The train step of a config, compiled for a target by a process of its own.

The step is the one a run uses: `experiment.build` with the target's devices, `Programs.lower_step`. The process
is a child because a compiler wants an environment set before jax starts, may need minutes and gigabytes,
and may end the process when a program does not fit. Results are kept by a hash of everything they depend on.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigmodel_jax import atomic, tree
from bigmodel_jax.data.storage import cache_root
from bigmodel_jax.errors import InputError, RunError
from bigmodel_jax.planner import compilers
from bigmodel_jax.planner.targets import Target, parse

PACKAGE = Path(__file__).resolve().parent.parent
# Sections that the compiled step does not depend on.
IRRELEVANT = ("checkpoint", "sample", "init_from", "eval", "seed")
# Rooms whose code decides what is compiled.
SOURCES = ("models", "learn", "parallel", "experiment.py", "programs.py", "planner/compile.py", "planner/compilers.py")


@dataclass(frozen=True)
class Compiled:
    """What a compiler says of one step. Bytes are per device.

    label: "compiler" (the target's own), or "estimate" (simulated CPU devices: exact for what is kept between
      steps, indicative for temporaries and collectives).
    refused: the compiler's reason why the program does not fit, "" where it compiled.
    memory: of a program that compiled: argument, output, alias, temporary, code. Of one that did not fit:
      needs, limit.
    state: {"params": ..., "opt": ..., "stats": ..., "other": ..., "batch": ...}.
    mesh: {axis: size}. hosts: process of each device of that mesh, in C order.
    leaves: parameters, [{"path", "shape", "dtype", "axes": mesh axes of each dimension, "bytes": per device}].
    work: of one example, see `Experiment.work`, and "parameters", "devices", and "examples", rows of the step.
    chip: rates measured of this machine's devices, for the target "here"; else {}.
    compiler, cpu_s, peak_rss: what compiled it, and what that cost.
    """

    label: str
    refused: str
    memory: dict[str, int]
    state: dict[str, int]
    mesh: dict[str, int]
    hosts: list[int]
    leaves: list[dict[str, Any]]
    work: dict[str, Any]
    device_kind: str
    chip: dict[str, Any]
    compiler: str
    cpu_s: float
    wall_s: float
    peak_rss: int
    folder: str

    @property
    def text(self) -> str:
        """The optimised program, as HLO text; "" where there is none."""
        file = Path(self.folder) / "program.txt.gz"
        return gzip.open(file, "rt").read() if file.is_file() else ""


def compile_for(config: Mapping[str, Any], target: Target, *, limit_s: float = 1200.0, again: bool = False) -> Compiled:
    """Compile the step of a resolved config for `target`, or fetch the result of having done so.

    Args:
      limit_s: wall seconds after which the child is ended.
      again: compile although there is a result.

    Raises:
      InputError: the config does not fit the target's devices, or no compiler knows the target.
      RunError: the child failed or took too long; names its log.
    """
    compiler = compilers.version(target)
    simulated = not compiler
    place = Path(cache_root()) / "plans" / _key(config, target, compiler)
    answer = place / "answer.json"
    if again or not answer.is_file():
        place.mkdir(parents=True, exist_ok=True)
        request = {"config": config, "target": str(target), "simulated": simulated}
        (place / "request.json").write_text(json.dumps(request))
        _run(place, compilers.environment(target, simulated), limit_s)
    said = json.loads(answer.read_text())
    if said.pop("status") == "input_error":
        raise InputError(said["message"])
    label = "estimate" if simulated or target.platform == "cpu" else "compiler"
    return Compiled(label=label, compiler=compiler or f"none for {target}", folder=str(place), **said)


def _key(config: Mapping[str, Any], target: Target, compiler: str) -> str:
    relevant = {name: value for name, value in config.items() if name not in IRRELEVANT}
    code = hashlib.sha256()
    for source in SOURCES:
        path = PACKAGE / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            code.update(file.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")]
    what = [relevant, str(target), compiler, versions, code.hexdigest()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:20]


def _run(place: Path, environment: Mapping[str, str], limit_s: float) -> None:
    """Run the child in `place`; its answer gets what it cost."""
    answer, log = place / "answer.json", place / "log.txt"
    answer.unlink(missing_ok=True)
    variables = {**os.environ, **environment}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), variables.get("PYTHONPATH")]))
    began = time.monotonic()
    with log.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "bigmodel_jax.planner.compile", str(place)], env=variables, stdout=out, stderr=out
        )
        usage = None
        try:
            while usage is None:
                pid, status, used = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    usage, child.returncode = used, os.waitstatus_to_exitcode(status)
                elif time.monotonic() - began > limit_s:
                    raise RunError(f"compiling took more than {limit_s:.0f} s and was ended; log: {log}")
                else:
                    time.sleep(0.05)
        finally:
            if usage is None:
                child.kill()
                child.wait()
    if not answer.is_file():
        raise RunError(f"compiling ended with status {child.returncode}: {_last(log)} (log: {log})")
    said = json.loads(answer.read_text())
    if said["status"] != "input_error":
        said |= {"cpu_s": round(usage.ru_utime + usage.ru_stime, 2), "wall_s": round(time.monotonic() - began, 2),
                 "peak_rss": usage.ru_maxrss * 1024}  # fmt: skip
    answer.write_text(json.dumps(said, indent=1))


def _last(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


# What follows runs in the child.


def main(place: Path) -> None:
    """Compile what request.json asks for; write answer.json and program.txt.gz."""
    request = json.loads((place / "request.json").read_text())
    target = parse(request["target"])
    try:
        answer = _answer(place, request["config"], target, request["simulated"])
    except InputError as error:
        answer = {"status": "input_error", "message": str(error)}
    atomic.write(place / "answer.json", json.dumps(answer))


def _answer(place: Path, config: dict[str, Any], target: Target, simulated: bool) -> dict[str, Any]:
    import jax

    from bigmodel_jax import experiment
    from bigmodel_jax.programs import Programs

    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_enable_x64", config["runtime"]["x64"])
    devices = compilers.devices(target, simulated)
    platform = "cpu" if simulated else target.platform or jax.default_backend()
    with compilers.tracing(platform):
        exp = experiment.build(config, devices=devices, load=False)
        programs = Programs(exp)
        size = max(exp.batch_sizes())
        lowered = programs.lower_step(size)
    out = {
        "state": _state_bytes(programs, size),
        "mesh": dict(exp.mesh.shape),
        "hosts": [device.process_index for device in exp.mesh.devices.flat],
        "leaves": _leaves(programs.state["params"]),
        "work": exp.work()
        | {"examples": size, "parameters": tree.count(programs.state["params"]), "devices": exp.mesh.size},
        "chip": _measured() if target.name == "here" else {},
        "device_kind": devices[0].device_kind,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = out_of_memory(str(error))
        if not sizes:
            raise
        return {"status": "refused", "refused": str(error).splitlines()[0], "memory": sizes, **out}
    with gzip.open(place / "program.txt.gz", "wt", compresslevel=3) as file:
        file.write(compiled.as_text())
    return {"status": "compiled", "refused": "", "memory": _memory(compiled), **out}


def _measured() -> dict[str, Any]:
    from bigmodel_jax.planner.here import here

    return asdict(here())


def _memory(compiled: Any) -> dict[str, int]:
    found = compiled.memory_analysis()
    return {
        "argument": found.argument_size_in_bytes, "output": found.output_size_in_bytes,
        "alias": found.alias_size_in_bytes, "temporary": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }  # fmt: skip


def _state_bytes(programs: Any, batch_size: int) -> dict[str, int]:
    """Bytes per device of each part of the state, and of the batch."""
    import jax

    from bigmodel_jax.parallel.feed import abstract_batch

    def held(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(leaf.dtype.itemsize * _product(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)

    state, exp = programs.state, programs.exp
    parts = {name: held(state[name]) for name in ("params", "opt", "stats")}
    parts["other"] = held([value for name, value in state.items() if name not in parts])
    batch = abstract_batch(exp.spec, programs.batch_sharding, exp.cut(batch_size))
    row = [leaf.sharding.shard_shape(leaf.shape[:2]) + leaf.shape[2:] for leaf in batch.values()]
    parts["batch"] = sum(_product(shape) * leaf.dtype.itemsize for shape, leaf in zip(row, batch.values(), strict=True))
    return parts


def _leaves(params: Any) -> list[dict[str, Any]]:
    """Where each parameter lives, largest first."""
    rows = []
    for path, leaf in tree.flatten(params).items():
        axes = [list(a) if isinstance(a, tuple) else [a] if a else [] for a in leaf.sharding.spec]
        axes += [[]] * (len(leaf.shape) - len(axes))
        each = _product(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        rows.append({"path": path, "shape": list(leaf.shape), "dtype": leaf.dtype.name, "axes": axes, "bytes": each})
    return sorted(rows, key=lambda row: -_product(row["shape"]))


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSALS = (
    r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm",
    r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
)


def out_of_memory(message: str) -> dict[str, int]:
    """{"needs": bytes, "limit": bytes} from a compiler's refusal; {} where it is another error.

    Needs are those of the temporaries alone where they are too many by themselves: libtpu then says no more.
    """
    found = next(filter(None, (re.search(form, message) for form in _REFUSALS)), None)
    if not found:
        return {}
    return {
        "needs": int(float(found[1]) * _UNITS[found[2]]),
        "limit": int(float(found[3]) * _UNITS[found[4]]),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
