"""The model families by the name a config gives them."""

from __future__ import annotations

from bigmodel_jax.models.model import Model, Output
from bigmodel_jax.models.resnet import resnet
from bigmodel_jax.models.transformer import decoder, encoder

MODELS = {"decoder": decoder, "encoder": encoder, "resnet": resnet}

__all__ = ["MODELS", "Model", "Output"]
