"""The fault matrix at full size: each fault injected N times, counted, resumable.

    python -m benchmarks.faults [--row NAME ...] [--limit N] [--out results/faults.json]

Every trial is a pure function of (row, trial number), so an interrupted run goes on where it stopped.
A trial passes only if the state that comes back is, byte for byte, one that was saved, and the
newest undamaged one. "harmless" counts trials whose damage hit bytes that carry no state.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import zlib
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from bigmodel_jax import atomic, checkpoint, tree  # noqa: E402
from bigmodel_jax.checkpoint import Checkpointer  # noqa: E402
from bigmodel_jax.errors import InputError, RunError  # noqa: E402

STEPS = (1, 2, 3)


def state(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {
        "params": {
            "w": jnp.asarray(rng.standard_normal((257, 64), np.float32)),
            "b": jnp.asarray(rng.standard_normal(64), jnp.bfloat16),
        },
        "step": jnp.int32(step),
    }


def equal(a: dict, b: dict) -> bool:
    a, b = tree.flatten(a), tree.flatten(b)
    return a.keys() == b.keys() and all(np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a)


def saved(directory: Path) -> None:
    with Checkpointer(directory, keep_last=9) as saver:
        for step in STEPS:
            saver.save(step, state(step), {"step": step})


def restored(directory: Path) -> int | None:
    """The step that comes back; its bytes are checked against what was saved."""
    with Checkpointer(directory, log=lambda line: None) as saver:
        found = saver.restore(state(0))
    if found is None:
        return None
    if not equal(found[0], state(found[1]["step"])):
        raise AssertionError(f"step {found[1]['step']} came back with other bytes")
    return found[1]["step"]


def files(step: Path) -> list[Path]:
    return sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)


def by_size(step: Path, rng: np.random.Generator) -> Path:
    """A file, as likely as it is large: damage falls on bytes, not on names."""
    sizes = np.array([p.stat().st_size for p in files(step)], float)
    return files(step)[rng.choice(len(sizes), p=sizes / sizes.sum())]


def flip(step: Path, rng: np.random.Generator) -> None:
    path = by_size(step, rng)
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def truncate(step: Path, rng: np.random.Generator) -> None:
    path = files(step)[rng.integers(len(files(step)))]
    os.truncate(path, int(rng.integers(path.stat().st_size)))


def delete(step: Path, rng: np.random.Generator) -> None:
    files(step)[rng.integers(len(files(step)))].unlink()


def zero_page(step: Path, rng: np.random.Generator) -> None:
    path = by_size(step, rng)
    data = bytearray(path.read_bytes())
    start = int(rng.integers(max(1, len(data) // 512 + 1))) * 512 if len(data) > 512 else 0
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def swap(step: Path, rng: np.random.Generator) -> None:
    """Two files of equal role from two steps, or two files of one step, trade places."""
    mine = files(step)
    first = mine[rng.integers(len(mine))]
    other = step.parent / "1" / first.relative_to(step)
    second = other if other.exists() and rng.random() < 0.5 else mine[rng.integers(len(mine))]
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    if step in second.parents:
        second.write_bytes(a)


def ghost(step: Path, rng: np.random.Generator) -> None:
    path = step.parent / str(int(rng.integers(4, 10**6)))
    path.mkdir()
    for part in ("state", "meta", "d"):
        if rng.random() < 0.5:
            (path / part).mkdir()


def damage(fault: Callable[[Path, np.random.Generator], None], rng: np.random.Generator, work: Path) -> str:
    saved(work / "c")
    fault(work / "c" / "3", rng)
    step = restored(work / "c")
    if step == 3:  # `restored` has proved the bytes: the damage carried no state
        return "passed" if fault is ghost else "harmless"
    return "passed" if step == 2 and fault is not ghost else f"came back with step {step}"


SAVER = """
    import itertools, sys
    import jax.numpy as jnp
    from bigmodel_jax.checkpoint import Checkpointer
    saver = Checkpointer(sys.argv[1], keep_last=2, log=lambda line: None)
    size = int(sys.argv[2])
    found = saver.restore({"w": jnp.zeros((size,))})
    first = 0 if found is None else found[1]["step"] + 1
    assert found is None or bool((found[0]["w"] == found[1]["step"]).all())
    print("restored", first - 1, flush=True)
    for step in itertools.count(first):
        saver.save(step, {"w": jnp.full((size,), step, jnp.float32)}, {"step": step})
        print("committed", -1 if saver.committed is None else saver.committed, flush=True)
"""


def kill_in_save(rng: np.random.Generator, work: Path) -> str:
    """kill -9 at a random moment of a stream of asynchronous saves, then the same again."""
    committed, size = -1, int(rng.integers(1000, 2_000_000))
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVER), str(work / "c"), str(size)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline, heard = None, []
        for line in child.stdout:
            heard.append(line)
            if line.startswith("committed"):
                deadline = deadline or time.monotonic() + rng.uniform(0, 0.3)
            if deadline and time.monotonic() > deadline:
                break
        child.kill()
        heard += child.stdout.read().splitlines(keepends=True)  # a torn last line has no end
        child.wait()
        if not heard or not heard[0].startswith("restored"):
            return "the restart failed"
        if int(heard[0].split()[1]) < committed:
            return f"went back to {heard[0].split()[1]} after {committed} was committed"
        committed = max(
            [committed] + [int(h.split()[1]) for h in heard if h.startswith("committed") and h.endswith("\n")]
        )
    return "passed"


def disk_full(rng: np.random.Generator, work: Path) -> str:
    """A real full disk where mounting is allowed, and errors of the writer otherwise."""
    disk = work / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(rng.integers(600, 1100))}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return "cannot mount a tmpfs here"
    free, checkpoint._free_bytes = checkpoint._free_bytes, lambda directory: None
    try:
        big = {"w": jnp.asarray(rng.standard_normal(100_000), jnp.float32)}
        good = 0
        saver = Checkpointer(disk / "c", keep_last=9, log=lambda line: None)
        try:
            for step in range(1, 9):
                saver.save(step, big)
                saver.wait()
                good = step
            return "the disk never filled up"
        except InputError as error:
            if "No space left" not in str(error):
                return f"unclear message: {error}"
        with Checkpointer(disk / "c") as again:
            found = again.restore(big)
            return (
                "passed" if good and found and equal(found[0], big) and again.latest() == good else "lost the good step"
            )
    finally:
        checkpoint._free_bytes = free
        subprocess.run(["umount", str(disk)], check=True)


GRIDS = [(8, 1), (4, 2), (2, 4), (1, 8), (1, 1), (2, 2), (3, 2)]


def reshard(rng: np.random.Generator, work: Path) -> str:
    def shardings(grid: tuple[int, int]) -> dict:
        mesh = Mesh(np.array(jax.devices()[: grid[0] * grid[1]]).reshape(grid), ("a", "b"))

        def one(x: jax.Array) -> NamedSharding:
            names = [n if x.shape[i] % mesh.shape[n] == 0 else None for i, n in zip(range(x.ndim), "ab", strict=False)]
            return NamedSharding(mesh, PartitionSpec(*names))

        return jax.tree.map(one, value)

    shape = tuple(int(n) * 8 if rng.random() < 0.5 else int(n) for n in rng.integers(1, 40, 2))
    value = {
        "w": rng.standard_normal(shape).astype(np.float32),
        "v": rng.standard_normal((37, 16)).astype(np.float16),
    }
    first, second = (GRIDS[i] for i in rng.integers(len(GRIDS), size=2))
    placed = jax.device_put(value, shardings(first))
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), placed, shardings(second))
    with Checkpointer(work / "c") as saver:
        saver.save(1, placed)
        back = saver.restore(target)[0]
    right = equal(back, placed) and all(
        a.sharding == b.sharding for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(target), strict=True)
    )
    return "passed" if right else f"{first} -> {second} differs"


HOSTILE = [
    "../x",
    "/etc/x",
    "a/../../x",
    "..",
    "",
    "~/x",
    "a\0b",
    "$(touch x)",
    "`touch x`",
    "a\nb",
    "C:\\x",
    "a;b",
    "é",
    "%2e%2e/x",
]
EVIL = [
    {"__reduce__": ["os.system", "touch owned"]},
    {"$ref": "file:///etc/passwd"},
    ["!!python/object/apply:os.system"],
    {"leaves": {"../x": {}}},
    {"step": "__import__('os')"},
    "x" * 100_000,
    {"a": {"b": {"c": [None, 1e308, -0.0]}}},
]


def hostile(rng: np.random.Generator, work: Path) -> str:
    """Names must be refused; metadata must come back as data, and a forged record must not load."""
    inside = work / "in" / "c"
    inside.parent.mkdir()
    name = HOSTILE[rng.integers(len(HOSTILE))]
    saver = Checkpointer(inside, log=lambda line: None)
    try:
        saver.save(1, {name + ("/y" if rng.random() < 0.3 else ""): jnp.zeros(3)})
        return f"saved under the name {name!r}"
    except InputError:
        pass
    evil = EVIL[rng.integers(len(EVIL))]
    saver.save(1, state(1), {"step": 1, "evil": evil})
    saver.close()
    path = inside / "1" / "meta" / "metadata"
    with Checkpointer(inside, readonly=True, log=lambda line: None) as reader:
        if reader.restore(state(0))[1]["evil"] != evil:
            return "metadata changed on the way"
        record = json.loads(path.read_text())
        record[str(rng.choice(["leaves", "step", "meta", "format", "digest"]))] = evil
        path.write_text(json.dumps(record))
        try:
            reader.restore(state(0))
        except RunError:
            pass
    outside = [p for p in work.rglob("*") if "owned" in p.name or (p.is_file() and inside not in p.parents)]
    return f"wrote {outside[0]}" if outside else "passed"


Rows = dict[str, tuple[int, Callable[[np.random.Generator, Path], str]]]
"""Name of a fault -> (trials wanted, one trial of a random generator in an empty folder)."""
ROWS: Rows = {
    "kill -9 inside an asynchronous save": (100, kill_in_save),
    "disk full, 1 process": (20, disk_full),
    "bit flip": (100, lambda rng, work: damage(flip, rng, work)),
    "truncate": (100, lambda rng, work: damage(truncate, rng, work)),
    "delete": (100, lambda rng, work: damage(delete, rng, work)),
    "zero page": (100, lambda rng, work: damage(zero_page, rng, work)),
    "swapped file": (100, lambda rng, work: damage(swap, rng, work)),
    "ghost directory": (100, lambda rng, work: damage(ghost, rng, work)),
    "reshard pairs": (30, reshard),
    "hostile names and metadata": (200, hostile),
}


def main(rows: Rows, description: str) -> None:
    """Trials that are missing of these rows, each counted at once."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--row", action="append", choices=list(rows), help="only these rows")
    parser.add_argument("--limit", type=int, default=10**9, help="at most this many new trials a row")
    parser.add_argument("--out", default="results/faults.json")
    options = parser.parse_args()
    out = Path(options.out)
    table = json.loads(out.read_text()) if out.exists() else {}
    for name in options.row or rows:
        wanted, trial = rows[name]
        row = table.setdefault(name, {"wanted": wanted, "done": 0, "passed": 0, "harmless": 0, "failures": []})
        for number in range(row["done"], min(wanted, row["done"] + options.limit)):
            rng = np.random.default_rng([zlib.crc32(name.encode()), number])
            with tempfile.TemporaryDirectory() as work:
                try:
                    verdict = trial(rng, Path(work))
                except Exception as error:
                    verdict = f"{type(error).__name__}: {str(error)[:200]}"
                shutil.rmtree(work, ignore_errors=True)
                Path(work).mkdir(exist_ok=True)
            row["done"] += 1
            if verdict in ("passed", "harmless"):
                row[verdict] += 1
            else:
                row["failures"].append(f"trial {number}: {verdict}")
            out.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(out, json.dumps(table, indent=1) + "\n")
        print(
            f"{name:38} {row['done']:4}/{wanted:<4} passed {row['passed']:4} "
            f"harmless {row['harmless']:3} failed {len(row['failures'])}",
            flush=True,
        )
        for failure in row["failures"][:5]:
            print(f"    {failure}", flush=True)


if __name__ == "__main__":
    main(ROWS, __doc__.splitlines()[0])
