"""Hardware that a program can be compiled for without having it, by name.

    v5p:8x8x8        a TPU slice: chip and topology (v4, v5e, v5p, v6e)
    2xv5e:16x16      several slices, joined by the slow network
    h100:8x8         NVIDIA nodes x GPUs of a node (a100, h100, h200)
    cpu:8            simulated devices of this machine
    here             the devices of this machine

A name says everything that the compiler needs, so it is also what a plan is stored under.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from bigmodel_jax.errors import InputError, nearest

# dims: of the topology; host: devices of one machine; kind: what jax calls a device, the key of the chip table.
_TPUS = {"v4": (3, 4, "TPU v4"), "v5e": (2, 4, "TPU v5 lite"), "v5p": (3, 4, "TPU v5"), "v6e": (2, 4, "TPU v6 lite")}
_GPUS = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
}
CHIPS = (*_TPUS, *_GPUS, "cpu")
EXAMPLES = "v5p:8x8x8, v5e:16x16, 2xv5e:16x16, h100:8x8, cpu:8, here"


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    platform: "tpu", "gpu" or "cpu", that kernels are chosen for; "" for those of this machine.
    kind: `device_kind` as jax names it, "" where it is this machine's.
    shape: of one slice: a TPU's topology, (nodes, GPUs), or (devices,).
    """

    name: str
    platform: str = ""
    chip: str = ""
    kind: str = ""
    shape: tuple[int, ...] = ()
    slices: int = 1

    @property
    def topology(self) -> str:
        """The shape as compilers spell it: "8x8x8"."""
        return "x".join(map(str, self.shape))

    @property
    def devices(self) -> int:
        """All devices, of all slices; 0 for this machine's, which only jax can count."""
        return self.slices * math.prod(self.shape) if self.shape else 0

    @property
    def per_host(self) -> int:
        """Devices of one machine."""
        if self.platform == "tpu":
            return min(_TPUS[self.chip][1], math.prod(self.shape))
        return self.shape[-1] if self.shape else 0

    @property
    def hosts(self) -> int:
        return self.devices // self.per_host if self.per_host else 0

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Dimensions of a TPU topology whose ends are joined: all of a v4 or v5p slice made of whole cubes of 4 x 4 x
        4, and those of 16 of a v5e or v6e slice. Of a topology that is asked for by name alone libtpu assumes none."""
        joined = tuple(size == 16 for size in self.shape)
        if len(self.shape) == 3:
            joined = (all(size % 4 == 0 for size in self.shape),) * 3
        return (*joined, False)[:3]

    def __str__(self) -> str:
        return self.name


HERE = Target("here")


def parse(text: str) -> Target:
    """The target of a name, see the module.

    Raises:
      InputError: not a target; one line with what is wrong and the nearest right one.
    """
    if text == "here":
        return HERE
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]+\d*[a-z]*):(\d+(?:x\d+)*)", text)
    if not found:
        chip = text.partition(":")[0]
        hint = nearest(chip, (*CHIPS, "here")) if ":" not in text else ""
        raise InputError(f"target '{text}' should read CHIP:SHAPE or SLICESxCHIP:SHAPE, such as {EXAMPLES}{hint}")
    slices, chip = int(found[1] or 1), found[2]
    shape = tuple(int(size) for size in found[3].split("x"))
    if chip not in CHIPS:
        raise InputError(f"target '{text}': unknown chip '{chip}'{nearest(chip, CHIPS)}; there are {', '.join(CHIPS)}")
    if slices < 1 or min(shape) < 1:
        raise InputError(f"target '{text}': sizes are at least 1")
    target = Target(text, _platform(chip), chip, _kind(chip), shape, slices)
    _check_shape(target)
    return target


def _platform(chip: str) -> str:
    return "tpu" if chip in _TPUS else "gpu" if chip in _GPUS else "cpu"


def _kind(chip: str) -> str:
    return _TPUS[chip][2] if chip in _TPUS else _GPUS.get(chip, "cpu")


def _check_shape(target: Target) -> None:
    chip, shape = target.chip, target.shape
    if target.platform == "tpu" and len(shape) != _TPUS[chip][0]:
        dims = _TPUS[chip][0]
        fix = "x".join(map(str, _spread(math.prod(shape), dims)))
        raise InputError(f"target '{target}': a {chip} topology has {dims} dimensions, for example {chip}:{fix}")
    if target.platform == "gpu" and (len(shape) != 2 or target.slices > 1):
        total = target.devices
        nodes = f"{max(total // 8, 1)}x{min(total, 8)}"
        raise InputError(f"target '{target}': write NODESxGPUS, such as {chip}:{nodes}")
    if target.platform == "cpu" and (len(shape) != 1 or target.slices > 1):
        raise InputError(f"target '{target}': simulated devices are a number, such as cpu:{target.devices}")


def _spread(total: int, dims: int) -> list[int]:
    """`total` as a product of `dims` sizes as equal as powers of its prime factors allow, small ones first."""
    sizes, factor = [1] * dims, 2
    factors = []
    while total > 1:
        while total % factor == 0:
            factors.append(factor)
            total //= factor
        factor += 1
    for prime in sorted(factors, reverse=True):
        sizes[sizes.index(min(sizes))] *= prime
    return sorted(sizes)
