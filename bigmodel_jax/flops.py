"""Model FLOPs in closed form, and the peak of the device they are held against.

A compiler's cost analysis counts the body of a scanned stack once, so utilisation is computed from
these forms. Two FLOPs per multiply-accumulate, matrix products and convolutions only; a training
step costs three forward passes (Kaplan et al. 2020, arXiv:2001.08361, section 2.1); attention is
not halved for causality (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), recomputation does
not count.
"""

from __future__ import annotations

import re

# Dense peak TFLOP/s of one jax device: (regex of its kind in lower case, {dtype: rate}, source),
# first match wins. Sparse rates are never used; "float32" is the plain rate, not TF32.
_HOPPER = {"bfloat16": 989.4, "float16": 989.4, "tensorfloat32": 494.7, "float32": 66.9, "float8": 1978.9}
PEAKS: tuple[tuple[str, dict[str, float], str], ...] = (
    (r"\bmig\b", {}, "n/a"),  # a slice of a device: no published rate
    (r"h200", _HOPPER, "NVIDIA H200 data sheet, SXM"),
    (
        r"h100 pcie",
        {"bfloat16": 756, "float16": 756, "tensorfloat32": 378, "float32": 51, "float8": 1513},
        "NVIDIA H100 data sheet, PCIe",
    ),
    (
        r"h100 nvl",
        {"bfloat16": 835, "float16": 835, "tensorfloat32": 417, "float32": 60, "float8": 1671},
        "NVIDIA H100 data sheet, NVL",
    ),
    (r"h100.*hbm3", _HOPPER, "NVIDIA H100 white paper, SXM5"),
    (
        r"a100",
        {"bfloat16": 312, "float16": 312, "tensorfloat32": 156, "float32": 19.5},
        "NVIDIA A100 data sheet",
    ),
    (r"v100-sxm2", {"float16": 125, "float32": 15.7}, "NVIDIA V100 data sheet, SXM2"),
    (r"\bt4\b", {"float16": 65, "float32": 8.1}, "NVIDIA T4 data sheet"),
    (r"tpu v6", {"bfloat16": 918}, "Google Cloud, TPU v6e"),
    (r"tpu v5 ?(lite|e)", {"bfloat16": 197}, "Google Cloud, TPU v5e"),
    (r"tpu v5", {"bfloat16": 459}, "Google Cloud, TPU v5p"),
    (r"tpu v4$", {"bfloat16": 275}, "Google Cloud, TPU v4"),
    (r"tpu v3", {"bfloat16": 61.5}, "Google Cloud, TPU v3: 123 per chip of two devices"),
    (r"tpu v2", {"bfloat16": 22.5}, "Google Cloud, TPU v2: 45 per chip of two devices"),
)


def _row(device_kind: str) -> tuple[dict[str, float], str]:
    kind = device_kind.lower()
    return next(((table, text) for part, table, text in PEAKS if re.search(part, kind)), ({}, "n/a"))


def peak(device_kind: str, dtype: str) -> float | None:
    """Peak dense FLOP/s of one device for matrix products in `dtype`, or None if not known.

    Args:
      device_kind: `jax.devices()[0].device_kind`.
      dtype: "bfloat16", "float16", "float32", "tensorfloat32", "float8".
    """
    rate = _row(device_kind)[0].get(dtype)
    return None if rate is None else rate * 1e12


def source(device_kind: str) -> str:
    """Where the peak of a device is from, or "n/a"."""
    return _row(device_kind)[1]


def utilisation(flops: float, seconds: float, peak_each: float | None, devices: int = 1) -> float | None:
    """Model FLOPs utilisation, or None ("n/a") where the peak is not known."""
    return None if not peak_each or seconds <= 0 else flops / seconds / peak_each / devices


def training(forward: float) -> float:
    """Training FLOPs from forward FLOPs: the backward pass has two products for each."""
    return 3.0 * forward


def transformer_forward(
    *,
    layers: int,
    width: int,
    heads: int,
    head_dim: int,
    mlp: int,
    vocab: int,
    length: int,
    kv_heads: int | None = None,
    gated: bool = False,
    head_share: float = 1.0,
) -> float:
    """Forward FLOPs per token of a Transformer stack: 2 N_matmul + 4 layers length heads head_dim.

    Embedding lookups count nothing; the output head does, tied or not.

    Args:
      width: model dimension. mlp: hidden dimension of the feed-forward layer.
      length: positions each query is compared with (the window, where there is one).
      kv_heads: key and value heads, default `heads`. gated: three feed-forward matrices, not two.
      head_share: share of positions that get logits (masked LM).
    """
    kv = heads if kv_heads is None else kv_heads
    attention = width * head_dim * (2 * heads + 2 * kv)
    feed_forward = width * mlp * (3 if gated else 2)
    matmul = layers * (attention + feed_forward) + head_share * width * vocab
    return 2.0 * matmul + 4.0 * layers * length * heads * head_dim


def transformer_training(**shape: float) -> float:
    """Training FLOPs per token: 6 N_matmul + 12 layers length heads head_dim."""
    return training(transformer_forward(**shape))  # type: ignore[arg-type]


def conv_forward(height: int, width: int, kernel: int, inputs: int, outputs: int, groups: int = 1) -> float:
    """Forward FLOPs of one square convolution with `height` x `width` outputs."""
    return 2.0 * height * width * kernel**2 * inputs * outputs / groups
