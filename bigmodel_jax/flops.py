"""Model FLOPs in closed form, and the peak of the device they are held against.

A compiler's cost analysis counts the body of a scanned stack once, so utilisation is computed from
these forms. Two FLOPs per multiply-accumulate, matrix products and convolutions only; a training
step costs three forward passes (Kaplan et al. 2020, arXiv:2001.08361, section 2.1); attention is
not halved for causality (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), recomputation does
not count.
"""

from __future__ import annotations

from collections.abc import Sequence

# Dense peak FLOP/s of one jax device, by lower-case substrings of its kind, first match wins.
# Sparse figures are never used. "bfloat16" also stands for float16; "float32" is the plain
# (not TF32) rate where the vendor states one.
_TB = 1e12
PEAKS: tuple[tuple[str, dict[str, float], str], ...] = (
    ("h200", {"bfloat16": 989.4 * _TB, "tensorfloat32": 494.7 * _TB, "float32": 66.9 * _TB, "float8": 1978.9 * _TB}, "NVIDIA H200 data sheet, SXM"),
    ("h100 pcie", {"bfloat16": 756 * _TB, "tensorfloat32": 378 * _TB, "float32": 51 * _TB, "float8": 1513 * _TB}, "NVIDIA H100 data sheet, PCIe"),
    ("h100 nvl", {"bfloat16": 835 * _TB, "tensorfloat32": 417 * _TB, "float32": 60 * _TB, "float8": 1671 * _TB}, "NVIDIA H100 data sheet, NVL"),
    ("h100", {"bfloat16": 989.4 * _TB, "tensorfloat32": 494.7 * _TB, "float32": 66.9 * _TB, "float8": 1978.9 * _TB}, "NVIDIA H100 white paper, SXM5"),
    ("a100", {"bfloat16": 312 * _TB, "tensorfloat32": 156 * _TB, "float32": 19.5 * _TB}, "NVIDIA A100 data sheet"),
    ("v100", {"float16": 125 * _TB, "float32": 15.7 * _TB}, "NVIDIA V100 data sheet, SXM2"),
    ("l40s", {"bfloat16": 362 * _TB, "tensorfloat32": 183 * _TB, "float32": 91.6 * _TB}, "NVIDIA L40S data sheet"),
    ("nvidia l4", {"bfloat16": 121 * _TB, "tensorfloat32": 60 * _TB, "float32": 30.3 * _TB}, "NVIDIA L4 data sheet"),
    ("tesla t4", {"float16": 65 * _TB, "float32": 8.1 * _TB}, "NVIDIA T4 data sheet"),
    ("tpu v6", {"bfloat16": 918 * _TB}, "Google Cloud, TPU v6e"),
    ("tpu v5p", {"bfloat16": 459 * _TB}, "Google Cloud, TPU v5p"),
    ("tpu v5 lite", {"bfloat16": 197 * _TB}, "Google Cloud, TPU v5e"),
    ("tpu v5e", {"bfloat16": 197 * _TB}, "Google Cloud, TPU v5e"),
    ("tpu v5", {"bfloat16": 459 * _TB}, "Google Cloud, TPU v5p"),
    ("tpu v4", {"bfloat16": 275 * _TB}, "Google Cloud, TPU v4"),
    ("tpu v3", {"bfloat16": 61.5 * _TB}, "Google Cloud, TPU v3: 123 per chip of two devices"),
    ("tpu v2", {"bfloat16": 22.5 * _TB}, "Google Cloud, TPU v2: 45 per chip of two devices"),
)  # fmt: skip


def peak(device_kind: str, dtype: str) -> float | None:
    """Peak dense FLOP/s of one device for matrix products in `dtype`, or None if not known.

    Args:
      device_kind: `jax.devices()[0].device_kind`.
      dtype: "bfloat16", "float16", "float32", "tensorfloat32", "float8".
    """
    kind = device_kind.lower()
    for part, table, _ in PEAKS:
        if part in kind:
            return table.get(dtype, table.get("bfloat16") if dtype == "float16" else None)
    return None


def source(device_kind: str) -> str:
    """Where the peak of a device is from, or "n/a"."""
    return next((text for part, _, text in PEAKS if part in device_kind.lower()), "n/a")


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


def _out(size: int, stride: int) -> int:
    return -(-size // stride)


def resnet_forward(
    *,
    blocks: Sequence[int],
    bottleneck: bool,
    size: int,
    classes: int,
    width: int = 64,
    stem: str = "imagenet",
    channels: int = 3,
) -> float:
    """Forward FLOPs per square image of a ResNet v1.5 (stride in the 3x3; He et al. 2015, table 1).

    Args:
      blocks: residual blocks per stage. bottleneck: 1x1-3x3-1x1 blocks with 4x expansion.
      size: image side. width: channels of the first stage. stem: "imagenet" (7x7/2 and pooling) or
        "cifar" (3x3, no pooling, option-A shortcuts without parameters).
    """
    side = _out(size, 2) if stem == "imagenet" else size
    total = conv_forward(side, side, 7 if stem == "imagenet" else 3, channels, width)
    side = _out(side, 2) if stem == "imagenet" else side
    inputs = width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        outputs = inner * 4 if bottleneck else inner
        for block in range(count):
            stride = 2 if stage and not block else 1
            after = _out(side, stride)
            if bottleneck:
                total += conv_forward(side, side, 1, inputs, inner)
                total += conv_forward(after, after, 3, inner, inner)
                total += conv_forward(after, after, 1, inner, outputs)
            else:
                total += conv_forward(after, after, 3, inputs, inner)
                total += conv_forward(after, after, 3, inner, inner)
            if stem == "imagenet" and (stride != 1 or inputs != outputs):
                total += conv_forward(after, after, 1, inputs, outputs)
            side, inputs = after, outputs
    return total + 2.0 * inputs * classes
