"""The matmuls of a feed-forward layer alone, in jax or torch: the ceiling of a training step's speed.

Forward, input gradient and weight gradient of [rows, dim] x [dim, 4 dim] and back, as a row of
benchmarks/train_step.py: how much of its ratios is the compiler's matmul and not our program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _layer(x: Any, up: Any, down: Any, g: Any) -> tuple[Any, ...]:
    """Six products on x, g [rows, dim], up [dim, wide], down [wide, dim]; plain `@` in either library."""
    h, dh = x @ up, g @ down.T
    return h @ down, dh @ up.T, x.T @ dh, h.T @ g


def step_fn(library: str, rows: int, dim: int, repeats: int = 6) -> Callable[[], float]:
    """A closure that runs `repeats` layers and returns 0.0."""
    rng = np.random.default_rng(0)
    shapes = ((rows, dim), (dim, 4 * dim), (4 * dim, dim), (rows, dim))
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    if library == "torch":
        import torch

        operands = [torch.from_numpy(array) for array in arrays]
        layer, wait = torch.no_grad()(_layer), lambda out: out
    else:
        import jax

        operands, layer, wait = [jax.device_put(array) for array in arrays], jax.jit(_layer), jax.block_until_ready

    def step() -> float:
        for _ in range(repeats):
            wait(layer(*operands))
        return 0.0

    return step
