"""What the devices of this machine can do, measured in a few seconds.

Small compiled programs, each bound by one resource: matrix products by the arithmetic units (square
ones for the peak; the gradient of a stack of matrices for what a training step can sustain, whose
operands are in no cache), a long array copied in slices by memory, a short one rewritten in place
by the cache, chains of additions or exponentials by the vector units, tiny dependent operations by
what launching a piece costs. Each is run with two lengths of its loop and the difference counts,
so that what is paid once per call does not; the fastest of several runs is taken. The result is
kept under a fingerprint of the machine, and says how it was made.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel_jax.chips import Chip
from bigmodel_jax.data.storage import cache_root
from bigmodel_jax.planner.costs import costs
from bigmodel_jax.planner.hlo import read

VERSION = 1
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MiB = 2**20
LAYERS = 6


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What makes a resource the bound: width of square products; width and rows (tokens) of a network's layers; bytes
    of a long and of a short array."""

    product: int
    layer: int
    rows: int
    long: int
    short: int


SIZES = {"cpu": Sizes(512, 512, 1024, 64 * MiB, MiB // 2), "gpu": Sizes(4096, 4096, 8192, 1024 * MiB, 16 * MiB)}
DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("float32", "bfloat16", "float16")}


def here(clock: str = "wall", again: bool = False) -> Chip:
    """Rates of one device of this process, from the cache or measured now.

    Args:
      clock: "wall", or "cpu" for seconds of processor time, which other programs on the machine disturb less.
      again: measure even if this machine is known.
    """
    where = Path(cache_root()) / "here" / f"{fingerprint()}-{clock}.json"
    if where.is_file() and not again:
        return Chip(**json.loads(where.read_text()))
    found = measure(clock)
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    return found


def fingerprint() -> str:
    """Names this machine and the versions that its rates depend on."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = (VERSION, platform.node(), _processor(), cores, jax.__version__, jax.devices()[0].device_kind,
             jax.device_count(), os.environ.get("XLA_FLAGS", ""))  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def measure(clock: str = "wall", repeats: int = 4) -> Chip:
    """Measure now, see the module. Some ten seconds of processor time on two cores.

    Raises:
      KeyError: a clock that is not in `CLOCKS`.
    """
    device = jax.devices()[0]
    backend = "cpu" if device.platform == "cpu" else "gpu"
    sizes = SIZES[backend]
    rate = functools.partial(_rate, CLOCKS[clock], repeats)
    peaks = {dtype: rate(*_products(sizes.product, dtype)) for dtype in DTYPES[backend]}
    sustained = {dtype: rate(*_network(sizes, dtype)) for dtype in DTYPES[backend]}
    memory, cache = rate(*_move(sizes.long)), rate(*_rewrite(sizes.short))
    simple, transcendental = (rate(*_chain(sizes.short, kind)) for kind in ("simple", "transcendental"))
    launch = _launch(CLOCKS[clock], repeats)
    fresh = _fresh(CLOCKS[clock], repeats, sizes.long, memory)
    stats = device.memory_stats() or {}
    unit = f"{clock} seconds, fastest of {repeats}, jax {jax.__version__}"
    return Chip(
        name="here", kind=device.device_kind, peaks=peaks, sustained=sustained, memory_rate=memory, cache_rate=cache,
        memory_bytes=float(stats.get("bytes_limit", 0) or _system_memory()),
        cache_bytes=float(2 * sizes.short), launch_s=launch, fresh_s=fresh,
        element_rates={"simple": simple, "transcendental": transcendental},
        sources=_sources(sizes, unit),
    )  # fmt: skip


def _sources(sizes: Sizes, unit: str) -> dict[str, str]:
    long, short, width = f"{sizes.long // MiB} MiB", f"{sizes.short // 1024} KiB", sizes.layer
    return {
        "peaks": f"measured: products of {sizes.product} x {sizes.product} matrices, {unit}",
        "sustained": f"measured: gradient of {LAYERS} layers of {width} x {width} at {sizes.rows} rows, {unit}",
        "memory": f"measured: {long} written from as many, slice by slice, {unit}",
        "cache": f"measured: {short} rewritten in place, {unit}",
        "elements": f"measured: chains of additions, and exponentials, {unit}",
        "launch": f"measured: a chain of tiny sums that are not fused, {unit}",
        "fresh": f"measured: {long} written to new memory, {unit}",
    }


def _system_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


Probe = tuple[Callable[[Any], Any], Any, float, int]
"""(body of a loop over a carried value, its first value, amount of work in one turn, turns)."""


def _rate(now: Callable[[], float], repeats: int, body: Callable, start: Any, amount: float, turns: int) -> float:
    """Amount of work a second: time of 5 `turns` less time of `turns`, both the fastest of several."""

    @functools.partial(jax.jit, donate_argnums=1)
    def run(times, carry):
        return jax.lax.fori_loop(0, times, lambda _, c: body(c), carry)

    carry = jax.block_until_ready(run(1, jax.device_put(start)))
    fastest = {turns: float("inf"), 5 * turns: float("inf")}
    for _ in range(repeats):
        for times in fastest:
            began = now()
            carry = jax.block_until_ready(run(times, carry))
            fastest[times] = min(fastest[times], now() - began)
    short, long = fastest.values()
    return 4 * turns * amount / max(long - short, 1e-9)


def _products(n: int, dtype: str) -> Probe:
    right = jnp.full((n, n), 1.0 / n, dtype)
    return (lambda left: (left @ right).astype(dtype)), jnp.ones((n, n), dtype), 2.0 * n**3, 8


def _network(sizes: Sizes, dtype: str) -> Probe:
    """Forward and backward of a stack of matrices, every one its own: nothing is found in a cache by luck."""
    rows, width = sizes.rows, sizes.layer
    inputs = jnp.full((rows, width), 0.5, dtype)

    def loss(weights):
        out, _ = jax.lax.scan(lambda x, w: (x @ w, None), inputs, weights)
        return jnp.sum(out.astype(jnp.float32))

    def body(weights):
        return (weights - 1e-9 * jax.grad(loss)(weights)).astype(dtype)

    flops = 3 * LAYERS * 2.0 * rows * width**2
    return body, jnp.full((LAYERS, width, width), 1.0 / width, dtype), flops, 1


def _move(size: int) -> Probe:
    """Slices of 2 MiB are read in one place and written to another."""
    slices = size // (2 * MiB)
    from_, to = jnp.ones((slices, MiB // 2), jnp.float32), jnp.zeros((slices, MiB // 2), jnp.float32)

    def body(carry):
        source, target, at = carry
        made = jax.lax.dynamic_index_in_dim(source, at % slices, keepdims=False) * 1.0001 + 1e-6
        return source, jax.lax.dynamic_update_index_in_dim(target, made, at % slices, 0), at + 1

    return body, (from_, to, jnp.int32(0)), 4.0 * MiB, slices


def _rewrite(size: int) -> Probe:
    return (lambda x: x * 1.0001 + 1e-6), jnp.ones(size // 4, jnp.float32), 2.0 * size, max(2, 16 * MiB // size)


def _chain(size: int, kind: str) -> Probe:
    """Eight multiply-adds, or one exponential, to one read and write: arithmetic is the bound."""
    elements = size / 4

    def additions(x):
        y = x
        for _ in range(8):
            y = y * 0.999 + x
        return y

    if kind == "simple":
        return additions, jnp.ones(size // 4, jnp.float32), 16 * elements, 8
    return (lambda x: jnp.exp(-x)), jnp.ones(size // 4, jnp.float32), elements, 8


def _launch(now: Callable[[], float], repeats: int) -> float:
    """Seconds that a launched piece costs: chains of running sums over eight numbers, which are never fused."""

    def chain(x, links):
        for _ in range(links):
            x = jax.lax.optimization_barrier(jnp.cumsum(x)[::-1] * 0.1)
        return x

    start = jnp.ones(8, jnp.float32)
    pieces, fastest = [], []
    for links in (2, 66):
        run = jax.jit(functools.partial(chain, links=links)).lower(start).compile()
        pieces.append(sum(op.count for op in costs(read(run.as_text()), {}).ops))
        seconds = float("inf")
        for _ in range(40 * repeats):
            began = now()
            jax.block_until_ready(run(start))
            seconds = min(seconds, now() - began)
        fastest.append(seconds)
    return max(0.0, fastest[1] - fastest[0]) / (pieces[1] - pieces[0])


def _fresh(now: Callable[[], float], repeats: int, size: int, memory: float) -> float:
    """Seconds for the first touch of a byte: a result in new memory, less the traffic itself."""
    make = jax.jit(lambda x: jnp.broadcast_to(x, (size // 4,)))
    jax.block_until_ready(make(1.0))
    fastest = float("inf")
    for n in range(repeats):
        began = now()
        found = jax.block_until_ready(make(float(n)))
        fastest = min(fastest, now() - began)
        del found
    return max(0.0, fastest / size - 1.0 / memory)
