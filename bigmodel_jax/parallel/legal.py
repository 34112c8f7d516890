"""Which layouts a model can take. What cannot be is refused with its reason and what would be legal nearby."""

from __future__ import annotations

import dataclasses

from bigmodel_jax.errors import InputError, nearest
from bigmodel_jax.parallel.mesh import batch_shards, divisors
from bigmodel_jax.parallel.pipeline import schedule
from bigmodel_jax.parallel.rules import Layout

RINGED = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a layout depends on. 0 means that the model has no such thing.

    stacks: layers of each stack of equal layers. lengths: of each sequence. heads: of queries.
    rows: global rows of one forward pass. group: as many rows that follow each other are routed together; 0: all.
    shared: layers have the same parameters.
    buffers: of experts with a capacity, one per group of rows.
    """

    model: str
    stacks: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    heads: int = 0
    experts: int = 0
    rows: int = 1
    group: int = 1
    shared: bool = False
    buffers: int = 0


def check(layout: Layout, facts: Facts) -> None:
    """Raises InputError for a layout that this model cannot take."""
    _choices(layout)
    _rings(layout)
    _stages(layout, facts)
    _context(layout, facts)
    experts, size = facts.experts, layout.size("expert")
    if size > 1 and not experts:
        raise InputError(f"mesh.expert {size} splits experts, and this {facts.model} has none; use mesh.fsdp instead")
    if size > 1 and experts % size:
        raise InputError(f"mesh.expert {size} does not divide {experts} experts; legal: {divisors(experts)}")
    shards = batch_shards(layout.mesh)
    if size > 1 and facts.buffers % shards:
        raise InputError(
            f"mesh.expert {size}: {facts.buffers} groups of rows do not divide over {shards} batch shards; make "
            "model.expert_group smaller, or model.capacity_factor 0"
        )
    if layout.size("context") > 1 and facts.buffers:
        raise InputError(
            f"mesh.context {layout.size('context')} cuts the groups of rows that a capacity is counted in; set "
            "model.capacity_factor=0, or use mesh.fsdp"
        )


def _choices(layout: Layout) -> None:
    legal = {
        "context": ("ring", "ulysses"), "zero": (3, 1), "offload": ("", "optimizer"), "dispatch": ("bounded", "ragged"),
    }  # fmt: skip
    leaves = {"context": "context_by"}
    for field, values in legal.items():
        found = getattr(layout, field)
        if found not in values:
            near = nearest(found, values) if isinstance(found, str) else ""
            raise InputError(f"mesh.{leaves.get(field, field)} = {found!r} should be one of {values}{near}")
    if layout.room < 0:
        raise InputError(f"mesh.room = {layout.room} is a multiple of an even share, or 0 for room for all")
    if layout.repeats < 1 or layout.microbatches < 0:
        raise InputError("mesh.repeats is at least 1, and mesh.microbatches at least 0 (as many as stages)")


def _rings(layout: Layout) -> None:
    if not layout.rings:
        return
    others = [f"mesh.{axis} {size}" for axis, size in layout.mesh.shape.items() if size > 1 and axis not in RINGED]
    if others or layout.zero != 3:
        raise InputError(
            f"mesh.weights_by rings gathers weights over fsdp beside data alone; with "
            f"{', '.join(others) or 'mesh.zero 1'} use mesh.weights_by=compiler"
        )


def _stages(layout: Layout, facts: Facts) -> None:
    stages = layout.size("stage")
    if stages == 1:
        if layout.repeats > 1 or layout.microbatches:
            raise InputError("mesh.repeats and mesh.microbatches are of a pipeline; they need mesh.stage above 1")
        return
    if not facts.stacks or facts.shared:
        what = "has one for all layers" if facts.shared else "has none"
        raise InputError(
            f"mesh.stage {stages} cuts a stack of layers with parameters of their own, and this {facts.model} {what}; "
            "use mesh.fsdp instead"
        )
    if not facts.group:
        raise InputError(
            f"mesh.stage {stages}: a pipeline cuts rows into microbatches, and this {facts.model} routes all together; "
            "set model.expert_group to 1 or more rows"
        )
    for layers in facts.stacks:
        if layers % (stages * layout.repeats):
            legal = [d for d in divisors(layers) if d % layout.repeats == 0]
            raise InputError(
                f"mesh.stage {stages} x mesh.repeats {layout.repeats} does not divide {layers} layers; legal "
                f"mesh.stage: {[d // layout.repeats for d in legal]}"
            )
    shards, parts = batch_shards(layout.mesh), schedule(layout).microbatches
    if parts % stages or facts.rows % (parts * shards * facts.group):
        legal = divisors(facts.rows // (shards * facts.group)) if facts.rows % (shards * facts.group) == 0 else []
        together = f" in groups of {facts.group}" if facts.group > 1 else ""
        raise InputError(
            f"mesh.microbatches {parts} should be a multiple of mesh.stage {stages} and cut the {facts.rows} rows of a "
            f"forward pass{together}, over {shards} batch shards, evenly; legal: "
            f"{[d for d in legal if d % stages == 0] or 'none: give it more rows'}"
        )


def _context(layout: Layout, facts: Facts) -> None:
    size = layout.size("context")
    if size == 1:
        return
    if not facts.lengths or not facts.heads:
        raise InputError(
            f"mesh.context {size} cuts the length that attention works over, and this {facts.model} has none; "
            "use mesh.fsdp instead"
        )
    for length in facts.lengths:
        if length % (2 * size):
            low = max(length // (2 * size), 1) * 2 * size
            raise InputError(
                f"mesh.context {size} cuts a length into {2 * size} pieces, which {length} does not divide into; legal "
                f"lengths are multiples of {2 * size}, the nearest {[low, low + 2 * size]}"
            )
    tensor = layout.size("tensor")
    if layout.context == "ulysses" and facts.heads % (size * tensor):
        legal = divisors(max(facts.heads // tensor, 1))
        raise InputError(
            f"mesh.context_by ulysses spreads {facts.heads} heads over context {size} x tensor {tensor}, which "
            f"does not divide; legal mesh.context: {legal}, or any with mesh.context_by=ring"
        )
