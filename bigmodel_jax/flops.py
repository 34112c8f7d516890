"""Model FLOPs in closed form; what devices can do is in chips.py.

A compiler's cost analysis counts the body of a scanned stack once, so utilisation is computed from
these forms. Two FLOPs per multiply-accumulate, matrix products and convolutions only; a training
step costs three forward passes (Kaplan et al. 2020, arXiv:2001.08361, section 2.1); attention is
not halved for causality (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), recomputation does
not count.
"""

from __future__ import annotations


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


def conv_forward(height: int, width: int, kernel: int, inputs: int, outputs: int, groups: int = 1) -> float:
    """Forward FLOPs of one square convolution with `height` x `width` outputs."""
    return 2.0 * height * width * kernel**2 * inputs * outputs / groups
