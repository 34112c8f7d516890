"""Heads of decoder and encoder against the same in numpy."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import experiment, schema, tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import decoder, encoder
from bigmodel_jax.models.heads import pooled
from bigmodel_jax.models.spec import EncoderSpec, Spec
from tests import tiny

TINY = {"vocab_size": 37, "num_layers": 1, "embed_dim": 16, "num_heads": 2, "max_length": 12, "init_std": 0.3}
TOKENS = np.random.default_rng(0).integers(0, 37, (3, 9)).astype(np.int32)
SEGMENTS = (np.arange(9) < np.array([9, 4, 1])[:, None]).astype(np.int32)


def built(maker=encoder, **options):
    model = maker(**TINY | options)
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), model.abstract()[0])


def run(model, variables, **inputs):
    @jax.jit
    def f(variables, inputs):
        out = model.apply(variables, train=False, **inputs)
        return out.hidden, out.head(out.hidden), out.extra

    return f(variables, inputs)


def test_pooling_takes_real_tokens_only():
    x = np.random.default_rng(2).normal(size=(3, 9, 4)).astype(np.float32)
    lengths = SEGMENTS.sum(1)
    np.testing.assert_array_equal(pooled(x, SEGMENTS, "first"), x[:, 0])
    np.testing.assert_array_equal(pooled(x, SEGMENTS, "last"), [row[n - 1] for row, n in zip(x, lengths, strict=True)])
    means = np.stack([row[:n].mean(0) for row, n in zip(x, lengths, strict=True)])
    np.testing.assert_allclose(pooled(x, SEGMENTS, "mean"), means, atol=1e-6)
    np.testing.assert_array_equal(pooled(x, None, "last"), x[:, -1])
    assert np.abs(pooled(x, None, "mean") - means).max() > 0.1


def test_classes_read_the_pooled_text():
    model, variables = built(head="classes", num_classes=5, pooler=True)
    plain, _ = built(head="none", pooler=True)
    p = variables["params"]
    assert p["head"]["kernel"].shape == (16, 5) and p["head"]["bias"].shape == (5,)
    hidden, logits, _ = run(model, variables, tokens=TOKENS, segments=SEGMENTS)
    states = {k: v for k, v in p.items() if k != "head"}
    every, same, extra = run(plain, {"params": states}, tokens=TOKENS, segments=SEGMENTS)
    np.testing.assert_array_equal(every, same)
    expected = np.tanh(np.asarray(every, np.float64)[:, 0] @ p["pooler"]["kernel"] + p["pooler"]["bias"])
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    np.testing.assert_array_equal(extra["pooled"], hidden)
    np.testing.assert_allclose(logits, expected @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-4)
    assert logits.shape == (3, 5) and logits.dtype == jnp.float32

    keys = jax.random.split(jax.random.key(0), 3)
    dropped = built(head="classes", num_classes=5, pooler=True, dropout=0.0, attention_dropout=0.0,
                    embed_dropout=0.0, head_dropout=0.5)[0]  # fmt: skip
    out = dropped.apply(variables, tokens=TOKENS, segments=SEGMENTS, train=True, rngs={"dropout": keys}).hidden
    kept = out != 0
    assert 0.2 < kept.mean() < 0.8
    np.testing.assert_allclose(out[kept], 2 * expected[kept], atol=1e-5)


def test_a_decoder_classifies_by_its_last_real_token():
    """What follows the last real token does not matter; the token itself does."""
    model, variables = built(decoder, head="classes", num_classes=3)
    assert set(variables["params"]["head"]) == {"kernel"}
    _, logits, _ = run(model, variables, tokens=TOKENS, segments=SEGMENTS)
    behind = np.where(SEGMENTS > 0, TOKENS, 5)
    np.testing.assert_array_equal(run(model, variables, tokens=behind, segments=SEGMENTS)[1], logits)
    last = np.where(np.arange(9) == SEGMENTS.sum(1)[:, None] - 1, (TOKENS + 1) % 37, TOKENS)
    assert np.abs(run(model, variables, tokens=last, segments=SEGMENTS)[1] - logits).max(1).min() > 1e-3


@pytest.mark.parametrize(("head", "outputs"), [("tokens", 4), ("spans", 2)])
def test_heads_of_each_token(head, outputs):
    model, variables = built(head=head, num_classes=4)
    hidden, logits, extra = run(model, variables, tokens=TOKENS)
    p = variables["params"]["head"]
    assert logits.shape == (3, 9, outputs) and extra == {}
    np.testing.assert_allclose(logits, np.asarray(hidden) @ p["kernel"] + p["bias"], atol=1e-4)


def test_next_sentence_reads_the_pooler_and_leaves_the_mlm_head_alone():
    model, variables = built(pooler=True, nsp=True)
    hidden, logits, extra = run(model, variables, tokens=TOKENS)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    state = np.tanh(np.asarray(hidden)[:, 0] @ p["pooler"]["kernel"] + p["pooler"]["bias"])
    np.testing.assert_allclose(extra["nsp"], state @ p["nsp"]["kernel"] + p["nsp"]["bias"], atol=1e-4)
    alone, _ = built()
    bare = {k: v for k, v in variables["params"].items() if k not in ("pooler", "nsp")}
    assert set(tree.flatten(alone.abstract()[0]["params"])) == set(tree.flatten(bare))
    np.testing.assert_array_equal(run(alone, {"params": bare}, tokens=TOKENS)[1], logits)


def test_signatures_are_the_config_reference():
    for maker, spec in ((decoder, Spec), (encoder, EncoderSpec)):
        leaves = schema.leaves(maker)
        assert leaves["vocab_size"] == (inspect.Parameter.empty, int)
        assert leaves["head"] == ("lm", str) and leaves["norm_eps"][0] == spec.norm_eps
        assert set(leaves) == {field.name for field in dataclasses.fields(spec)}
    assert schema.leaves(encoder)["dropout"] == (0.1, float) and schema.leaves(decoder)["dropout"] == (0.0, float)
    with pytest.raises(InputError, match="should be float"):
        schema.complete({"vocab_size": 3, "dropout": "much"}, "model.", decoder)


@pytest.mark.parametrize(("options", "message"), [
    ({"head": "class"}, "classes"), ({"head": "classes"}, "num_classes"), ({"nsp": True}, "pooler=True"),
    ({"pooling": "max"}, "mean"), ({"head_dropout": 1.0}, r"\[0, 1\)"),
])  # fmt: skip
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        encoder(**TINY | options)


def test_only_a_head_of_classes_needs_their_number(tmp_path):
    raw = tiny.raw("encoder", tmp_path)
    raw["model"]["vocab_size"] = 300
    experiment.build(experiment.resolve(raw), load=False)
    raw["model"]["head"] = "classes"
    with pytest.raises(InputError, match=r"model\.num_classes"):
        experiment.build(experiment.resolve(raw), load=False)
