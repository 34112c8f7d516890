"""jax's splash attention, a Pallas kernel for TPU, behind the values of this package.

Shapes: B batch, L length, H heads, G key-value groups, K head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.scores import Rule
from bigmodel_jax.parallel import rules

_HEADS = ("batch", None, "heads", "head_dim")  # it needs the whole length: see ring.py for one that is cut


def splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: Rule, interpret: bool = False) -> jax.Array:
    """Attention of q [B, L, H, K] over k, v [B, L, G, K] with causal, window and segment masks.

    The compiler cannot split a Pallas kernel, so under an active mesh it runs per device, on its
    rows and heads.

    Args:
      interpret: run the kernel's semantics without a TPU (for tests).
    """
    segments = mask.segments_q

    def local(q, k, v, segments):
        return _local(q, k, v, segments, mask.causal, mask.window, rule, interpret)

    layout = rules.active()
    if layout is None or layout.mesh.size == 1:
        return local(q, k, v, segments)
    mesh = layout.mesh
    heads = rules.spec(_HEADS, q.shape, mesh, layout.rules)
    if rules.spec(_HEADS, k.shape, mesh, layout.rules) != heads:
        # Fewer groups than head shards: give every head its own copy of its group.
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    rows = rules.spec(("batch", None), q.shape[:2], mesh, layout.rules)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec() if segments is None else rows),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, segments)


def _local(q, k, v, segments, causal: bool, window: int, rule: Rule, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as tpu

    length, heads = q.shape[1:3]
    size = (length, length)
    if window:
        one: object = tpu.LocalMask(size, (window - 1, 0 if causal else window - 1), 0)
    else:
        one = tpu.CausalMask(size) if causal else tpu.FullMask(size)
    kernel = tpu.make_splash_mha(
        tpu.MultiHeadMask([one] * heads),
        block_sizes=_sizes(tpu, length),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=rule.softcap or None,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    scaled = (q * jnp.asarray(rule.scale, q.dtype)).astype(q.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))
    if segments is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        ids = tpu.SegmentIds(q=segments, kv=segments)
        out = jax.vmap(kernel)(q, k, v, ids)
    return jnp.swapaxes(out, 1, 2)


def _sizes(tpu, length: int):
    """Blocks of 512 where they divide the length, as MaxText and AXLearn use; else 128."""
    block = next(b for b in (512, 256, 128) if length % b == 0)
    return tpu.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
