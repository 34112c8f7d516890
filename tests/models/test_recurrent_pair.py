"""Recurrent encoder-decoders against numpy, with each attention; cached decoding; what is not read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import MODELS
from bigmodel_jax.models import cache as caches

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)
WIDE = dict(dtype="float64", param_dtype="float64")
SIZES = dict(vocab_size=9, source_vocab_size=7, embed_dim=5, hidden_dim=4)
KINDS = {
    "additive": dict(cell="gru", num_layers=1, decoder_layers=2, decoder_dim=6),
    "general": dict(cell="lstm", num_layers=2, attention="general"),
    "none": dict(cell="gru", attention="none", bidirectional=False, bridge="copy", num_layers=2),
}
SOURCE = np.random.default_rng(5).integers(0, 7, (2, 5)).astype(np.int32)
LENGTHS = np.array([5, 3])
SEGMENTS = (np.arange(5) < LENGTHS[:, None]).astype(np.int32)
TOKENS = np.random.default_rng(6).integers(0, 9, (2, 4)).astype(np.int32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def np_step(kind, p, x, state, extra=0.0):
    """One step with our weights; x [D], state list of [H]; extra [A, H] joins the input's share."""
    h = state[0]
    a = np.einsum("d,adh->ah", x, p["kernel"]) + p["bias"] + extra
    r = np.einsum("k,akh->ah", h, p["recurrent"])
    if kind == "lstm":
        i, o, f, g = a + r
        c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
        return [sigmoid(o) * np.tanh(c), c]
    z, reset = sigmoid(a[0] + r[0]), sigmoid(a[1] + r[1])
    return [(1 - z) * np.tanh(a[2] + reset * (r[2] + p["recurrent_bias"])) + z * h]


def np_layer(kind, p, x, state):
    states = []
    for row in x:
        states.append(state := np_step(kind, p, row, state))
    return states


def np_pair(p, name, source, tokens):
    """Logits [L, V] of one row, source without padding."""
    options = KINDS[name]
    kind, count = options["cell"], {"lstm": 2, "gru": 1}[options["cell"]]
    x, ends = p["encoder"]["embed"]["tokens"][source], []
    for n in range(options["num_layers"]):
        q = p["encoder"][f"layer{n}"]
        zero = [np.zeros(4)] * count
        runs = [np_layer(kind, q["forward"], x, zero)]
        outputs = [[s[0] for s in runs[0]]]
        if "backward" in q:
            runs.append(np_layer(kind, q["backward"], x[::-1], zero))
            outputs.append([s[0] for s in runs[1]][::-1])
        x = np.concatenate(outputs, axis=-1)
        ends.append([np.concatenate([run[-1][w] for run in runs]) for w in range(count)])
    memory, layers = x, options.get("decoder_layers", options["num_layers"])
    if name == "none":
        states = ends
    else:
        b = p["bridge"]
        states = [
            [np.tanh(ends[-1][w] @ b[f"{'hc'[w]}{n}_kernel"] + b[f"{'hc'[w]}{n}_bias"]) for w in range(count)]
            for n in range(layers)
        ]
    d, at, out = p["decoder"], p["decoder"].get("attention"), []

    def read(h):
        if name == "additive":
            e = np.tanh(h @ at["query"] + memory @ at["key"]) @ at["score"][:, 0]
        else:
            e = memory @ (h @ at["query"])
        weight = np.exp(e - e.max())
        return weight / weight.sum() @ memory

    cells = [d[f"layer{n}"]["forward"] for n in range(layers) if f"layer{n}" in d]
    for token in tokens:
        y, new = d["embed"]["tokens"][token], []
        if name == "additive":
            context = read(states[0][0])
            extra = np.einsum("e,aeh->ah", context, d["attended"]["context"])
            new.append(np_step(kind, d["attended"]["forward"], y, states[0], extra))
            y = new[0][0]
        for q in cells:
            new.append(np_step(kind, q, y, states[len(new)]))
            y = new[-1][0]
        states = new
        if name == "general":
            context = read(y)
        if name != "none":
            y = np.tanh(np.concatenate([context, y]) @ at["join"])
        out.append(y @ p["head"]["kernel"] + p["head"]["bias"])
    return np.array(out)


@functools.cache
def results(name):
    """(params, logits: at once, cached, of step 1 with rows exchanged, with other padding, other sources)."""
    with jax.enable_x64(True):
        model = MODELS["recurrent_seq2seq"](**SIZES, **WIDE, **KINDS[name])
        r = np.random.default_rng(1)
        v = jax.tree.map(lambda s: jnp.asarray(0.7 * r.normal(size=s.shape)), model.abstract()[0])

        def logits(out):
            return out.head(out.hidden)

        @jit
        def every(v, source, tokens):
            # Three sources at once: as it is, with other padding, with another first token.
            padded = jnp.where(SEGMENTS > 0, source, (source + 1) % 7)
            other = source.at[:, 0].set((source[:, 0] + 1) % 7)
            three, real = jnp.concatenate([source, padded, other]), jnp.tile(SEGMENTS, (3, 1))
            out = model.apply(v, source=three, source_segments=real, tokens=jnp.tile(tokens, (3, 1)), train=False)
            full = logits(out)
            memory = model.encode(v, source=source, source_segments=SEGMENTS)
            cache = model.cache(2, 4, jnp.float64)
            first = model.apply(
                v, memory=memory, memory_segments=SEGMENTS, tokens=tokens[:, :1], train=False, cache=cache
            )

            def step(cache, token):
                out = model.apply(v, tokens=token[:, None], train=False, cache=cache)
                return out.cache, logits(out)[:, 0]

            _, rest = jax.lax.scan(step, first.cache, tokens[:, 1:].T)
            cached = jnp.concatenate([logits(first), rest.swapaxes(0, 1)], 1)
            _, turned = step(caches.taken(first.cache, jnp.array([1, 0]), stacked=True), tokens[::-1, 1])
            return full[:2], cached, turned, full[2:4], full[4:]

        got = [np.asarray(x) for x in every(v, jnp.asarray(SOURCE), jnp.asarray(TOKENS))]
        return jax.tree.map(np.asarray, v["params"]), *got


@pytest.mark.parametrize("name", KINDS)
def test_logits_equal_numpy_and_cached_decoding(name):
    params, full, cached, turned, padded, other = results(name)
    for row in (0, 1):
        expected = np_pair(params, name, SOURCE[row, : LENGTHS[row]], TOKENS[row])
        np.testing.assert_allclose(full[row], expected, atol=1e-11)
    np.testing.assert_allclose(cached, full, atol=1e-12)
    np.testing.assert_allclose(turned[::-1], full[:, 1], atol=1e-12)  # what beams do to a cache
    np.testing.assert_allclose(padded, full, atol=1e-12)
    assert np.abs(other - full).min(-1).max() > 1e-4  # control: a changed source is seen
    short = np_pair(params, name, SOURCE[0, :4], TOKENS[0])
    assert np.abs(short - full[0]).max() > 1e-4  # control: so is its last token


def test_sizes_and_what_does_not_fit():
    for name, options in KINDS.items():
        model = MODELS["recurrent_seq2seq"](**SIZES, **options)
        shapes = tree.flatten(model.abstract()[0]["params"])
        assert ("decoder/attention/query" in shapes) == (name != "none")

        def loss(v, model=model):
            out = model.apply(v, source=SOURCE, source_segments=SEGMENTS, tokens=TOKENS, train=False)
            return jnp.sum(out.head(out.hidden))

        # Every parameter has a gradient of its own shape (that it can be traced is not a matter of course:
        # some products have hand-written derivatives).
        given = model.abstract()[0]
        gradient = jax.eval_shape(jax.grad(loss), given)
        assert jax.tree.map(lambda s: s.shape, gradient) == jax.tree.map(lambda s: s.shape, given)
    # Without attention and with "copy" every matrix but the tables multiplies one token of its side.
    side = {s: sum(np.prod(v.shape) for k, v in shapes.items() if k.startswith(s) and v.ndim == 3) for s in
            ("encoder", "decoder")}  # fmt: skip
    assert model.flops(3, 10) == 2 * (3 * side["encoder"] + 10 * (side["decoder"] + 4 * 9))
    shared = MODELS["recurrent_seq2seq"](vocab_size=9, embed_dim=4)
    tables = [path for path in tree.flatten(shared.abstract()[0]["params"]) if path.endswith("tokens")]
    assert tables == ["embed/tokens"]
    with pytest.raises(InputError, match="bridge='dense' fits any"):
        MODELS["recurrent_seq2seq"](vocab_size=9, num_layers=2, decoder_layers=1, bridge="copy")
    with pytest.raises(InputError, match="did you mean 'additive'"):
        MODELS["recurrent_seq2seq"](vocab_size=9, attention="aditive")
    with pytest.raises(InputError, match="needs source, memory"):
        jax.eval_shape(lambda v: shared.apply(v, tokens=TOKENS, train=False).hidden, shared.abstract()[0])
