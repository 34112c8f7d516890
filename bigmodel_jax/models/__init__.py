"""The model families by the name a config gives them."""

from __future__ import annotations

from bigmodel_jax.models.convnet import convnet
from bigmodel_jax.models.encdec import encoder_decoder
from bigmodel_jax.models.mlp import linear, mlp
from bigmodel_jax.models.model import Model, Output
from bigmodel_jax.models.recurrent import recurrent_classifier, recurrent_lm
from bigmodel_jax.models.recurrent_pair import recurrent_seq2seq
from bigmodel_jax.models.resnet import resnet
from bigmodel_jax.models.transformer import decoder, encoder
from bigmodel_jax.models.vit import vit

MODELS = {
    "decoder": decoder,
    "encoder": encoder,
    "encoder_decoder": encoder_decoder,
    "resnet": resnet,
    "vit": vit,
    "convnet": convnet,
    "linear": linear,
    "mlp": mlp,
    "recurrent_lm": recurrent_lm,
    "recurrent_classifier": recurrent_classifier,
    "recurrent_seq2seq": recurrent_seq2seq,
}

__all__ = ["MODELS", "Model", "Output"]
