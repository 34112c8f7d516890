"""Published models: the only room that knows foreign names. No torch, no transformers, and no pickle."""

from __future__ import annotations

from bigmodel_jax.hf import decoders, encoders, llama, vision
from bigmodel_jax.hf.family import Family

FAMILIES: dict[str, Family] = decoders.FAMILIES | llama.FAMILIES | encoders.FAMILIES | vision.FAMILIES

__all__ = ["FAMILIES", "Family"]
