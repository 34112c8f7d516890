"""Encoder-decoders: the original Transformer against numpy, cached decoding, and what may be seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import encoder_decoder
from bigmodel_jax.models.positions import relative_buckets
from tests.models.test_transformer import np_mlp, np_norm

V, D, H, S, L = 23, 16, 4, 7, 6
TINY = dict(vocab_size=V, num_layers=2, decoder_layers=3, embed_dim=D, num_heads=H, mlp_dim=20, max_length=12,
            remat="none", attention="reference")  # fmt: skip
T5 = dict(positions="none", relative_buckets=8, relative_distance=16, attention_scale=1.0, norm="rmsnorm",
          norm_bias=False, norm_placement="pre", bias=False, embed_scale=1.0, head_scale=D**-0.5)  # fmt: skip
BART = dict(positions="learned", position_offset=2, embed_norm=True, activation="gelu_exact", head_bias=True,
            source_vocab_size=31)  # fmt: skip
RNG = np.random.default_rng(2)
SOURCE, TOKENS = (RNG.integers(0, V, (3, n)).astype(np.int32) for n in (S, L))
SEGMENTS = np.ones((3, S), np.int32)
SEGMENTS[1, 4:] = 0


def built(**options):
    model = encoder_decoder(**TINY | options)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        return jnp.asarray((1.0 if path.endswith("scale") else 0.0) + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return model, tree.map_paths(fill, model.abstract()[0])


def np_attention(x, memory, p, seen, bias=0.0, scale=None):
    q, k, v = (np.einsum("ld,dhk->hlk", y, p[n]) + p.get(f"{n}_bias", np.zeros(1))[..., None, :]
               for n, y in (("q", x), ("k", memory), ("v", memory)))  # fmt: skip
    s = q @ np.swapaxes(k, 1, 2) * (scale or q.shape[-1] ** -0.5) + bias
    e = np.exp(s) * seen
    return np.einsum("hlk,hkd->ld", e / e.sum(-1, keepdims=True) @ v, p["out"]) + p.get("out_bias", 0)


def np_buckets(gap, both, number, far):
    """One at a time, as the paper's text has it."""
    own = number // 2 if both else number
    exact, d = own // 2, abs(gap) if both else max(gap, 0)
    if d >= exact:
        d = min(own - 1, exact + int(np.log(d / exact) / np.log(far / exact) * (own - exact) + 1e-9))
    return d + (own if both and gap < 0 else 0)


def np_stack(p, tokens, o, causal, table, memory=None, seen_memory=True):
    x = table[tokens] * (o.get("embed_scale") or D**0.5)
    i = np.arange(len(tokens))
    if o["positions"] == "sinusoidal":
        angle = i[:, None] / 10_000.0 ** (np.arange(D // 2) / (D // 2 - 1))
        x = x + np.concatenate([np.sin(angle), np.cos(angle)], 1)
    if o["positions"] == "learned":
        x = np_norm(x + p["embed"]["positions"][2 + i], p["embed"]["norm"], "layernorm", 1e-5)
    gap, bias = i[:, None] - i, 0.0
    if "relative" in p:
        cell = np.vectorize(lambda g: np_buckets(g, not causal, 8, 16))(gap)
        bias = np.moveaxis(p["relative"]["table"][cell], -1, 0)
    kind, post, scale = o.get("norm", "layernorm"), o.get("norm_placement") != "pre", o.get("attention_scale")
    for n in range(len(p["layers"]["norm_mlp"]["scale"])):
        w = jax.tree.map(lambda leaf, n=n: leaf[n], p["layers"])

        def part(x, name, fn, w=w):
            if post:
                return np_norm(x + fn(x), w[name], kind, 1e-5)
            return x + fn(np_norm(x, w[name], kind, 1e-5))

        own = gap >= 0 if causal else seen_memory
        x = part(x, "norm_attn", lambda y, w=w, own=own: np_attention(y, y, w["attn"], own, bias, scale))
        if memory is not None:
            x = part(x, "norm_cross", lambda y, w=w: np_attention(y, memory, w["cross"], seen_memory, 0.0, scale))
        x = part(x, "norm_mlp", lambda y, m=w["mlp"]: np_mlp(y, m, {"activation": "relu"} | o))
    return x if post else np_norm(x, p["norm_final"], kind, 1e-5)


CASES = {"original": dict(positions="sinusoidal"), "bart_with_two_tables": BART, "t5": T5}


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy_and_cached_decoding_equals_full(name, x64):
    options = CASES[name]
    model, variables = built(**options, dtype="float64", param_dtype="float64")

    @jax.jit
    def everything(variables):
        inputs = {"source": SOURCE, "source_segments": SEGMENTS}
        out = model.apply(variables, train=False, tokens=TOKENS, **inputs)
        memory = model.encode(variables, train=False, **inputs)
        # Two tokens with the memory, the others from the cache alone.
        found, cache = [], model.cache(3, L, jnp.float64)
        for i, j in ((0, 2), (2, 6)):
            given = {"memory": memory, "memory_segments": SEGMENTS} if i == 0 else {}
            step = model.apply(variables, train=False, tokens=TOKENS[:, i:j], cache=cache, **given)
            cache = step.cache
            found.append(step.head(step.hidden))
        bare = model.apply(variables, train=False, tokens=TOKENS, source=SOURCE)
        return *(x.head(x.hidden) for x in (out, bare)), jnp.concatenate(found, axis=1), memory

    full, bare, cached, memory = everything(variables)
    np.testing.assert_allclose(cached, full, atol=1e-12)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    for b in range(3):
        seen = SEGMENTS[b] > 0
        shared = p.get("embed", {}).get("tokens")
        tables = [p[side]["embed"]["tokens"] if shared is None else shared for side in ("encoder", "decoder")]
        expected = np_stack(p["encoder"], SOURCE[b], options, False, tables[0], seen_memory=seen)
        np.testing.assert_allclose(memory[b][seen], expected[seen], atol=1e-10)
        y = np_stack(p["decoder"], TOKENS[b], options, True, tables[1], expected, seen)
        logits = y * options.get("head_scale", 1.0) @ tables[1].T + p.get("head", {}).get("bias", 0)
        np.testing.assert_allclose(full[b], logits, atol=1e-10)
    # Control: without the padding of the source the second row is another.
    change = np.abs(bare - full).max(axis=(1, 2))
    assert change[1] > 1e-3 and change[[0, 2]].max() < 1e-12


def test_buckets_are_those_of_the_paper_everywhere():
    gaps = np.arange(-200, 201)
    for both in (True, False):
        for number, far in ((32, 128), (8, 16)):
            found = relative_buckets(jnp.asarray(gaps), both, number, far)
            assert found.tolist() == [np_buckets(g, both, number, far) for g in gaps]


def test_packed_pairs_do_not_see_each_other():
    model, variables = built(**T5)
    pairs = np.array([[1, 1, 1, 2, 2, 2, 0]] * 3, np.int32)
    targets = np.array([[1, 1, 2, 2, 2, 0]] * 3, np.int32)
    given = dict(train=False, source_segments=pairs, tokens=TOKENS, segments=targets)
    run = jax.jit(lambda source: model.apply(variables, source=source, **given).hidden)
    changed = SOURCE.copy()
    changed[:, 4] = (changed[:, 4] + 1) % V
    apart = np.abs(run(SOURCE) - run(changed)).max(axis=(0, 2))
    assert apart[:2].max() == 0 and apart[2:5].min() > 0


def test_options_and_inputs_that_do_not_fit():
    for options, message in (
        (dict(residual="parallel", norm_placement="pre"), "cross-attention"),
        (dict(relative_buckets=8), "positions='none'"),
        (dict(num_experts=4), "alone"),
        (dict(head="classes", num_classes=2), "lm and none"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            encoder_decoder(**TINY | options)
    model, variables = built()
    with pytest.raises(InputError, match="needs source, memory, or a cache"):
        model.apply(variables, train=False, tokens=TOKENS)
    with pytest.raises(InputError, match="either source or memory"):
        model.apply(variables, train=False, tokens=TOKENS, source=SOURCE, memory=jnp.zeros((3, S, D)))


def test_flops_are_six_per_weight_that_multiplies_and_four_per_score():
    """Weights counted from the shapes: encoder ones per source token, decoder ones per target token, keys and
    values of cross-attention per source token."""
    model, variables = built(**T5)
    flat = {path: leaf.size for path, leaf in tree.flatten(variables["params"]).items()}
    matrices = {path: size for path, size in flat.items() if path.split("/")[-1] in ("q", "k", "v", "in", "out")}
    of_source = [path for path in matrices if path.startswith("encoder") or path[-7:] in ("cross/k", "cross/v")]
    source = sum(matrices[path] for path in of_source)
    target = sum(matrices.values()) - source + V * D
    scores = 2 * S * S + 3 * L * L + 3 * L * S
    assert model.flops(S, L) == 2.0 * (source * S + target * L) + 4.0 * scores * D
