"""Every backend against the reference, and the reference against numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.models import blockwise as blockwise_module
from bigmodel_jax.models import target
from bigmodel_jax.models.attention import BACKENDS, attention, choose
from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.positions import alibi_slopes
from bigmodel_jax.models.scores import Rule
from bigmodel_jax.models.splash import splash

B, L, H, G, K = 2, 150, 4, 2, 16
SEGMENTS = np.repeat([1, 2, 3, 0], [40, 60, 30, 20])[None].repeat(B, 0).astype(np.int32)
PREFIX = np.array([0, 70], np.int32)
KV_LENGTH = np.array([0, 90], np.int32)  # row 0 sees nothing at all

MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "window": Mask(causal=True, window=20),
    "two_sided_window": Mask(window=20),
    "segments": Mask(causal=True, segments_q=SEGMENTS),
    "prefix": Mask(causal=True, prefix=PREFIX),
    "prefix_window": Mask(causal=True, window=33, prefix=PREFIX),
    "kv_length": Mask(kv_length=KV_LENGTH),
}
RULES = {"plain": {}, "softcap": {"softcap": 2.0}, "alibi": {"alibi": True}}


def inputs(length=L, memory=L, heads=H, groups=G, dim=K, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, length, heads, dim), (B, memory, groups, dim), (B, memory, groups, dim)]
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    return q, k, v, jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)


def visible(mask, length, memory):
    """The definition in Mask's docstring, pair by pair."""
    out = np.zeros((B, length, memory), bool)
    for b, i, j in itertools.product(range(B), range(length), range(memory)):
        at = i + (0 if mask.offset is None else mask.offset[b])
        seen = not mask.causal or j <= at or (mask.prefix is not None and j < mask.prefix[b])
        seen = seen and (not mask.window or abs(at - j) < mask.window)
        if mask.segments_q is not None:
            kv = mask.segments_q if mask.segments_kv is None else mask.segments_kv
            seen = seen and mask.segments_q[b, i] == kv[b, j]
        out[b, i, j] = seen and (mask.kv_length is None or j < mask.kv_length[b])
    return out


def np_slopes(heads):
    """A geometric sequence that starts at 2^(-8/n), which is also its ratio (Press et al. 2022, section 3); for n that
    are no power of two, as the authors' code has it, that of the power below and every other one of the power above.
    """
    below = max(2**n for n in range(heads) if 2**n <= heads)
    slopes = [2 ** (-8 / below)]
    while len(slopes) < below:
        slopes.append(slopes[-1] * slopes[0])
    return np.array((slopes + (np_slopes(2 * below)[::2].tolist() if heads > below else []))[:heads])


def numpy_attention(q, k, v, seen, softcap=0.0, alibi=False, offset=0):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    per = q.shape[2] // k.shape[2]
    k, v = k.repeat(per, axis=2), v.repeat(per, axis=2)
    s = np.einsum("blhk,bmhk->bhlm", q, k) / np.sqrt(q.shape[-1])
    if softcap:
        s = softcap * np.tanh(s / softcap)
    if alibi:
        i, j = np.arange(q.shape[1])[:, None] + offset, np.arange(k.shape[1])
        s = s - np_slopes(q.shape[2])[:, None, None] * abs(i - j)
    e = np.where(seen[:, None], np.exp(s - s.max()), 0.0)
    total = e.sum(-1, keepdims=True)
    return np.einsum("bhlm,bmhk->blhk", e / np.where(total > 0, total, 1.0), v)


# Exponents of 1/2 where the number of heads is no power of two; 112 are BLOOM's 176B.
EXPONENTS = {
    3: [4, 8, 2],
    6: [2, 4, 6, 8, 1, 3],
    12: [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5],
    112: [n / 8 for n in range(1, 65)] + [n / 16 for n in range(1, 97, 2)],
}


def test_slopes_of_any_number_of_heads_are_those_of_the_paper():
    for heads in (1, 2, 3, 5, 8, 6, 12, 20, 32, 112):
        np.testing.assert_allclose(alibi_slopes(heads), np_slopes(heads), rtol=1e-12)
    for heads, exponents in EXPONENTS.items():
        np.testing.assert_allclose(alibi_slopes(heads), 0.5 ** np.array(exponents), rtol=1e-12)
        # Control: the closed form of a power of two is another.
        assert np.abs(alibi_slopes(heads) - 0.5 ** (8 / heads * np.arange(1, heads + 1))).max() > 0.02


def run(backend, mask, rule, q, k, v, d):
    @jax.jit
    def all_of_it(q, k, v, d):
        out, pull = jax.vjp(lambda *x: attention(*x, mask, backend=backend, **rule), q, k, v)
        return out, *pull(d)

    return all_of_it(q, k, v, d)


@pytest.mark.parametrize("mask_name", MASKS)
def test_reference_equals_numpy(mask_name):
    q, k, v, _ = inputs()
    mask = MASKS[mask_name]
    seen = visible(mask, L, L)
    for rule in RULES.values():
        out = attention(q, k, v, mask, backend="reference", **rule)
        np.testing.assert_allclose(out, numpy_attention(q, k, v, seen, **rule), atol=2e-5)
    if mask_name != "full":
        wrong = numpy_attention(q, k, v, np.ones_like(seen))
        assert np.abs(attention(q, k, v, mask, backend="reference") - wrong).max() > 0.1


GRID = [("blockwise", m, r) for m in MASKS for r in ("plain",)]
GRID += [("blockwise", "prefix_window", "softcap"), ("blockwise", "prefix_window", "alibi")]
GRID += [("dot_product", m, "plain") for m in MASKS]
GRID += [("dot_product", "causal", "alibi")]


@pytest.mark.parametrize(("backend", "mask_name", "rule_name"), GRID)
def test_backends_equal_the_reference(backend, mask_name, rule_name):
    """Forward and all three gradients, grouped heads, a length that no block divides."""
    mask, rule, args = MASKS[mask_name], RULES[rule_name], inputs()
    got, expected = run(backend, mask, rule, *args), run("reference", mask, rule, *args)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)
        assert np.abs(b).max() > 0.1
    if mask_name == "kv_length":
        assert all((np.asarray(x)[0] == 0).all() for x in got)


def test_blockwise_bands_and_offset(monkeypatch):
    """Long rows become loops over blocks; a cache shifts the queries. Other lengths than keys."""
    monkeypatch.setattr(blockwise_module, "UNROLLED", 3)
    monkeypatch.setattr(blockwise_module, "block_rows", lambda: 8)
    assert blockwise_module.bands(71, 8) == [(0, 8, 3), (24, 8, 3), (48, 8, 2), (64, 7, 1)]
    q, k, v, d = inputs(length=71, memory=99)
    for mask in (
        Mask(causal=True, window=13, segments_q=SEGMENTS[:, :71], segments_kv=SEGMENTS[:, 1:100]),
        Mask(causal=True, offset=jnp.array([5, 28], jnp.int32)),
    ):
        got, expected = (run(b, mask, {"softcap": 3.0}, q, k, v, d) for b in ("blockwise", "reference"))
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
        expected = numpy_attention(q, k, v, visible(mask, 71, 99), softcap=3.0)
        np.testing.assert_allclose(got[0], expected, atol=2e-5)


def test_blockwise_memory_is_linear_in_length():
    """Doubling the length doubles the temporaries; the reference's grow fourfold."""

    def temporaries(backend, length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        f = jax.grad(lambda q, k, v: attention(q, k, v, Mask(causal=True), backend=backend).sum(), (0, 1, 2))
        return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("blockwise", 4096) < 2.3 * temporaries("blockwise", 2048)
    assert temporaries("reference", 4096) > 3.5 * temporaries("reference", 2048)


@pytest.mark.parametrize("mask_name", ["causal", "window", "segments"])
def test_splash_equals_the_reference(mask_name):
    """The TPU kernel's semantics, interpreted."""
    q, k, v, d = inputs(length=128, memory=128, dim=64)
    mask = {"causal": Mask(causal=True), "window": Mask(causal=True, window=20),
            "segments": Mask(causal=True, segments_q=jnp.asarray(SEGMENTS[:, 10:138]))}[mask_name]  # fmt: skip

    def f(q, k, v):
        return splash(q, k, v, mask, Rule(scale=0.125, softcap=2.0), interpret=True)

    out, pull = jax.vjp(f, q, k, v)
    expected = run("reference", mask, {"softcap": 2.0}, q, k, v, d)
    for a, b in zip((out, *pull(d)), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("backend", ["reference", "blockwise", "dot_product"])
def test_causality_by_gradients(backend):
    """Output i moves with keys 0 .. i and with no other (and with all of them when not causal)."""
    q, k, v, _ = inputs(length=70, memory=70)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(causal, i):
        mask = Mask(causal=causal)
        return jax.grad(lambda k, v: attention(q, k, v, mask, backend=backend)[:, i].sum(), (0, 1))(k, v)

    def touched(mask, i):
        dk, dv = gradients(mask.causal, i)
        return np.abs(np.asarray(dk)).max((0, 2, 3)) > 0, np.abs(np.asarray(dv)).max((0, 2, 3)) > 0

    for dk, dv in (touched(Mask(causal=True), 66), touched(Mask(causal=True), 1)):
        last = np.flatnonzero(dv)[-1]
        assert last in (1, 66) and dv[: last + 1].all() and dk[: last + 1].all()
        assert not dv[last + 1 :].any() and not dk[last + 1 :].any()
    assert touched(Mask(), 1)[1].all()


@pytest.mark.parametrize("backend", ["reference", "blockwise", "dot_product"])
def test_segments_are_isolated_bitwise(backend):
    q, k, v, _ = inputs()
    f = jax.jit(lambda q, k, v, s: attention(q, k, v, Mask(causal=True, segments_q=s), backend=backend))
    first = np.asarray(SEGMENTS[0] == 1)
    other = [jnp.where(first[None, :, None, None], x + 3.0, x) for x in (q, k, v)]
    a, b = f(q, k, v, SEGMENTS), f(*other, SEGMENTS)
    np.testing.assert_array_equal(a[:, ~first], b[:, ~first])
    assert np.abs(a[:, first] - b[:, first]).max() > 0.1
    together = jnp.ones_like(SEGMENTS)
    assert np.abs(f(q, k, v, together) - f(*other, together))[:, ~first].max() > 0.1


def test_float64_and_bfloat16(x64):
    q, k, v, d = (x.astype(jnp.float64) for x in inputs())
    mask = MASKS["window"]
    expected = numpy_attention(q, k, v, visible(mask, L, L))
    for backend in ("reference", "blockwise"):
        out, *_ = wide = run(backend, mask, {}, q, k, v, d)
        assert all(x.dtype == jnp.float64 for x in wide)
        np.testing.assert_allclose(out, expected, atol=1e-12)
        low = run(backend, mask, {}, *(x.astype(jnp.bfloat16) for x in (q, k, v, d)))[0]
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(low.astype(jnp.float64), expected, atol=0.05)


def test_dropout_is_a_function_of_the_row_key():
    """Same mask in every backend, whatever the tiling and whichever rows come along."""
    q, k, v, d = inputs()
    keys = jax.random.split(jax.random.key(3), B)
    rule = {"dropout": 0.4, "dropout_keys": keys}
    got, expected = (run(b, Mask(causal=True), rule, q, k, v, d) for b in ("blockwise", "reference"))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    f = jax.jit(lambda q, k, v, keys: attention(q, k, v, Mask(causal=True), dropout=0.4, dropout_keys=keys))
    np.testing.assert_allclose(f(q[1:], k[1:], v[1:], keys[1:]), got[0][1:], atol=1e-6)
    assert np.abs(f(q, k, v, keys[::-1]) - got[0]).max() > 0.1
    assert abs(f(q, k, jnp.ones_like(v), keys)[:, 20:].mean() - 1.0) < 0.02


def shape(length=512, memory=512, dim=64, dtype=jnp.bfloat16):
    return (jax.ShapeDtypeStruct((2, length, 4, dim), dtype), jax.ShapeDtypeStruct((2, memory, 4, dim), dtype))


CHOICES = [
    ("cpu", shape(), Mask(causal=True), {}, "blockwise", "on cpu"),
    ("cpu", shape(length=1), Mask(causal=True, offset=PREFIX), {}, "reference", "single query"),
    ("cpu", shape(), Mask(causal=True), {"bias": True}, "reference", "bias array"),
    ("gpu", shape(), Mask(causal=True), {}, "cudnn", "fused"),
    ("gpu", shape(), MASKS["segments"], {}, "cudnn", "fused"),
    ("gpu", shape(8192, 8192), Mask(causal=True, segments_q=SEGMENTS), {}, "blockwise", "on gpu"),
    ("gpu", shape(dtype=jnp.float32), Mask(causal=True), {}, "blockwise", "float32"),
    ("gpu", shape(), Mask(causal=True), {"softcap": 30.0}, "blockwise", "softcap"),
    ("tpu", shape(), Mask(causal=True, segments_q=SEGMENTS), {"softcap": 30.0}, "splash", "fused"),
    ("tpu", shape(), MASKS["prefix"], {}, "blockwise", "prefix"),
    ("tpu", shape(500, 500), Mask(causal=True), {}, "blockwise", "multiple of 128"),
]


@pytest.mark.parametrize("case", CHOICES, ids=lambda c: f"{c[0]}-{c[4]}-{c[5]}")
def test_auto_chooses_and_says_why(case):
    platform, (q, k), mask, options, name, reason = case
    with target.compile_for(platform):
        got, why = choose(q, k, mask, **options)
    assert got == name and reason in why


def test_impossible_explicit_choices_name_the_possible_ones():
    q, k = shape(dtype=jnp.float32)
    for backend, options, reason in (
        ("cudnn", {}, "GPU"), ("splash", {}, "TPU"), ("dot_product", {"softcap": 1.0}, "softcap"),
        ("blockwise", {"bias": True}, "bias"), ("dot_product", {"dropout": 0.1}, "dropout"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason) as error:
            choose(q, k, Mask(), backend=backend, **options)
        assert "possible: ['auto', 'reference'" in str(error.value)
    with pytest.raises(InputError, match="flash"):
        choose(q, k, Mask(), backend="flash")
    for backend in BACKENDS:
        possible = choose(q, k, Mask(), backend=backend, platform="tpu")[0] if backend != "cudnn" else "cudnn"
        assert possible == backend
