"""What published hardware can do, as data: the one table that utilisation and plans read.

A row is one jax device. Rates are dense (never sparse); "float32" is the plain rate, not TF32.
Interconnect rates count one direction: what a device can send while it receives as much. A figure
that is not published firmly is left out, and everything that needs it says "n/a".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device.

    peaks: {dtype: FLOP/s of matrix products}. memory_bytes, memory_rate: its own memory and bytes/s to it.
    link_rate: bytes/s that it sends over all links of the fast network (ICI, NVLink). torus: that network's
    dimensions, 0 for a switch. slow_rate: bytes/s over the network between slices or nodes. sources: {figure: where it
    is from}.

    Of a device that was measured (planner/here.py) also: sustained, rates of matrix products in the middle of a
    training step, below the peaks; launch_s, seconds that every launched piece costs beside its work; element_rates:
    element operations per second outside of matrix products, {"simple", "transcendental"}; cache_bytes, cache_rate: a
    piece whose traffic is at most so many bytes finds it in a cache; fresh_s: seconds for the first touch of a byte of
    newly given memory.
    """

    name: str
    kind: str
    peaks: Mapping[str, float]
    memory_bytes: float = 0.0
    memory_rate: float = 0.0
    link_rate: float = 0.0
    torus: int = 0
    slow_rate: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)
    sustained: Mapping[str, float] = field(default_factory=dict)
    launch_s: float = 0.0
    element_rates: Mapping[str, float] = field(default_factory=dict)
    cache_bytes: float = 0.0
    cache_rate: float = 0.0
    fresh_s: float = 0.0

    def source(self, figure: str) -> str:
        """Where "peaks", "memory", "links" or "slow" is from, or "n/a"."""
        return self.sources.get(figure, "n/a")


def _tpu(name, kind, bf16, memory, rate, link, torus, slow, page, **more) -> Chip:
    """TFLOP/s, GiB, GB/s, GB/s in one direction, dimensions, Gbit/s."""
    fp8 = {"float8": more["fp8"] * 1e12} if "fp8" in more else {}
    where = f"Google Cloud, {page}"
    return Chip(
        name, kind, {"bfloat16": bf16 * 1e12, **fp8}, memory * GiB, rate * 1e9, link * 1e9, torus, slow * 1e9 / 8,
        {"peaks": where, "memory": where, "links": f"{where}: half of the bidirectional rate", "slow": where}
        if slow else {"peaks": where, "memory": where, "links": where},
    )  # fmt: skip


def _gpu(name, kind, peaks, memory, rate, link, slow, sheet) -> Chip:
    """{dtype: TFLOP/s}, bytes, GB/s, GB/s of NVLink in one direction, Gbit/s of the network card of one GPU."""
    where = f"NVIDIA {sheet} data sheet"
    sources = {"peaks": where, "memory": where}
    sources |= {"links": f"{where}: half of the bidirectional NVLink rate"} if link else {}
    card = f"NVIDIA DGX {slow[1]} data sheet: a network card of {slow[0]} Gbit/s for each GPU" if slow else ""
    sources |= {"slow": card} if slow else {}
    rates = {dtype: tera * 1e12 for dtype, tera in peaks.items()}
    return Chip(name, kind, rates, memory, rate * 1e9, link * 1e9, 0, slow[0] * 1e9 / 8 if slow else 0.0, sources)


def _halves(bf16: float, fp32: float, fp8: float = 0.0) -> dict[str, float]:
    """Tensor-core rates are halved with every doubling of the element."""
    rates = {"bfloat16": bf16, "float16": bf16, "tensorfloat32": bf16 / 2, "float32": fp32}
    return rates | ({"float8": fp8} if fp8 else {})


_HOPPER = {"bfloat16": 989.4, "float16": 989.4, "tensorfloat32": 494.7, "float32": 66.9, "float8": 1978.9}

# First match of `kind` in jax's device_kind, lower case.
CHIPS: tuple[Chip, ...] = (
    Chip("slice of a GPU", r"\bmig\b", {}),  # no published rate
    _gpu("B200", r"b200", _halves(2250, 75, 4500), 180e9, 7700, 900, (400, "B200"), "HGX B200"),
    _gpu("H200", r"h200", _HOPPER, 143_771 * 2**20, 4800, 450, (400, "H200"), "H200 SXM"),
    _gpu("H100 PCIe", r"h100 pcie", _halves(756, 51, 1513), 81_559 * 2**20, 2000, 300, (), "H100 PCIe"),
    _gpu("H100 NVL", r"h100 nvl", _halves(835, 60, 1671), 94e9, 3900, 300, (), "H100 NVL"),
    _gpu("H100", r"h100.*hbm3", _HOPPER, 81_559 * 2**20, 3350, 450, (400, "H100"), "H100 SXM"),
    _gpu("A100 80GB", r"a100.*80gb", _halves(312, 19.5), 80 * GiB, 2039, 300, (200, "A100"), "A100 80GB SXM"),
    _gpu("A100", r"a100", _halves(312, 19.5), 40 * GiB, 1555, 300, (200, "A100"), "A100 40GB SXM"),
    _gpu("V100", r"v100-sxm2", {"float16": 125, "float32": 15.7}, 16 * GiB, 900, 150, (), "V100 SXM2"),
    _gpu("T4", r"\bt4\b", {"float16": 65, "float32": 8.1}, 15 * GiB, 300, 0, (), "T4"),
    # Two devices of jax to a chip from here on where the comment says so.
    _tpu("tpu7x", r"tpu ?(v7|7x)", 1153.5, 96, 3690, 300, 3, 50, "TPU7x, half of a chip", fp8=2307),  # two
    _tpu("v6e", r"tpu v6", 918, 32, 1638, 400, 2, 100, "TPU v6e"),
    _tpu("v5e", r"tpu v5 ?(lite|e)", 197, 16, 819, 200, 2, 25, "TPU v5e"),
    _tpu("v5p", r"tpu v5", 459, 95, 2765, 600, 3, 50, "TPU v5p"),
    _tpu("v4", r"tpu v4$", 275, 32, 1200, 300, 3, 0, "TPU v4"),
    _tpu("v3", r"tpu v3", 61.5, 16, 450, 0, 2, 0, "TPU v3, half of a chip"),  # two
    _tpu("v2", r"tpu v2", 22.5, 8, 300, 0, 2, 0, "TPU v2, half of a chip"),  # two
)
UNKNOWN = Chip("unknown", r"$^", {})


def chip(device_kind: str) -> Chip:
    """The row of a device; one without figures where it is not in the table.

    Args:
      device_kind: `jax.devices()[0].device_kind`.
    """
    kind = device_kind.lower()
    return next((row for row in CHIPS if re.search(row.kind, kind)), UNKNOWN)


def peak(device_kind: str, dtype: str) -> float | None:
    """Peak dense FLOP/s of one device for matrix products in `dtype`, or None if not known.

    Args:
      dtype: "bfloat16", "float16", "float32", "tensorfloat32", "float8".
    """
    return chip(device_kind).peaks.get(dtype)
