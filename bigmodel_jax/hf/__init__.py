"""Published models: the only room that knows foreign names. No torch, no transformers, and no pickle."""

from __future__ import annotations

from bigmodel_jax.hf import decoders, encdec, encoders, llama, mixtures, vision
from bigmodel_jax.hf.family import Family

FAMILIES: dict[str, Family] = (
    decoders.FAMILIES | llama.FAMILIES | mixtures.FAMILIES | encoders.FAMILIES | encdec.FAMILIES | vision.FAMILIES
)

__all__ = ["FAMILIES", "Family"]
