"""What a step may send: bytes per kind of traffic and mesh axes, against a closed form or a recorded table.

A weight that silently stays whole, or an activation whose place is no longer pinned, shows as
bytes that should not be there, or as bytes that are missing: both depart from the budget.
"""

from __future__ import annotations

from collections.abc import Mapping

from bigmodel_jax.planner.costs import Costs

Table = Mapping[str, float]
# What a compiler may write in one way or another: TPU and GPU scatter sums that CPU leaves whole.
VERBS = {"all-gather": "gathered", "all-reduce": "summed", "reduce-scatter": "summed", "collective-permute": "passed"}


def table(costs: Costs) -> dict[str, float]:
    """{"gathered over fsdp": payload bytes per device and step}: all traffic, by verb and mesh axes."""
    out: dict[str, float] = {}
    for collective in costs.collectives:
        key = f"{VERBS.get(collective.kind, 'exchanged')} over {'+'.join(collective.axes)}"
        out[key] = out.get(key, 0.0) + collective.payload_bytes
    return out


def departures(found: Table, allowed: Table, tolerance: float = 0.03) -> list[str]:
    """Where a table leaves its budget, one line each; none: within it.

    Args:
      tolerance: of each entry, up or down; entries below this share of the whole budget (sums of scalars and norms)
        are not compared.
    """
    floor = tolerance * sum(allowed.values())
    lines = []
    for key in sorted({*found, *allowed}):
        has, may = found.get(key, 0.0), allowed.get(key, 0.0)
        if max(has, may) > floor and abs(has - may) > tolerance * may:
            change = f"{has / may:.2f} of" if may else "not in"
            lines.append(f"{key}: {has / 1e6:.3f} MB, {change} the budget ({may / 1e6:.3f} MB)")
    return lines


def dense_decoder(
    *,
    layers: int,
    layer_bytes: float,
    table_bytes: float,
    activation_bytes: float,
    replicas: tuple[str, int],
    shards: tuple[str, int],
    features: tuple[str, int],
    apart: int = 1,
) -> dict[str, float]:
    """Payload bytes of a training step of a decoder with tied embeddings that keeps its activations.

    Every weight is gathered over the shards for the forward and for the backward pass (Rajbhandari et al. 2020,
    arXiv:1910.02054, section 7), the embedding table once; gradients are summed over shards and over replicas. Over the
    features the two halves of every layer each sum activations once forward and once backward (Shoeybi et al. 2019,
    arXiv:1909.08053, section 3), and the embedding and the head once.

    Args:
      layer_bytes: weights of all layers, as they travel. table_bytes: of the embedding table. activation_bytes: of
        one [rows, length, width] array of a device. replicas, shards, features: (mesh axis, devices along it).
      apart: sums for the gradient of an attention's input: 1 where the compiler first adds what comes from queries,
        keys and values (TPU), 3 where it sums each (CPU).
    """
    (replica, copies), (shard, pieces), (feature, parts) = replicas, shards, features
    out = {}
    if pieces > 1:
        out[f"gathered over {shard}"] = (2 * layer_bytes + table_bytes) / parts
        out[f"summed over {shard}"] = (layer_bytes + table_bytes) / parts
    if copies > 1:
        out[f"summed over {replica}"] = (layer_bytes + table_bytes) / parts / pieces
    if parts > 1:
        out[f"summed over {feature}"] = ((3 + apart) * layers + 2) * activation_bytes
    return out
