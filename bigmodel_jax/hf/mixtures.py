"""Published mixtures of experts: Mixtral (Jiang et al. 2024)."""

from __future__ import annotations

from typing import Any

from bigmodel_jax.hf import family as f
from bigmodel_jax.hf.family import Config, Family
from bigmodel_jax.hf.llama import base_config, base_foreign, base_rows, pattern
from bigmodel_jax.hf.rows import Row, Table, stack, transpose


def _mixtral_config(c: Config) -> dict[str, Any]:
    """The gate's jitter and its loss coefficient are training settings of the reference, not of the function."""
    return base_config(c) | pattern(c, "l") | {
        "num_experts": f.integer(c, "num_local_experts", 8),
        "experts_per_token": f.integer(c, "num_experts_per_tok", 2),
    }  # fmt: skip


def _mixtral_foreign(s: Config) -> dict[str, Any]:
    return base_foreign(s, "Mixtral") | {
        "sliding_window": s["window"] or None, "num_local_experts": s["num_experts"],
        "num_experts_per_tok": s["experts_per_token"], "intermediate_size": s["expert_dim"] or f.mlp_dim(s),
    }  # fmt: skip


def _mixtral_rows(s: Config) -> Table:
    moe = "model.layers.{n}.block_sparse_moe"
    table = [row for row in base_rows(s) if not (isinstance(row, Row) and row.paths[0].startswith("layers/mlp/"))]
    table.append(Row(f"{moe}.gate.weight", "layers/moe/router", transpose))
    for theirs, ours in {"w1": "gate", "w3": "up", "w2": "out"}.items():
        names = tuple(f"{moe}.experts.{e}.{theirs}.weight" for e in range(s["num_experts"]))
        table.append(Row(names, f"layers/moe/{ours}", stack(transpose)))
    return table


FAMILIES = {
    "mixtral": Family(
        _mixtral_config, _mixtral_foreign, _mixtral_rows, "model.", ignored=(r"rotary_emb\.inv_freq$",)
    ),
}  # fmt: skip
