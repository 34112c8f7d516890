"""The Transformer against a second one written in numpy, and its promises one by one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from scipy.special import erf

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import cache as caches
from bigmodel_jax.models import decoder, encoder
from bigmodel_jax.models.spec import REMAT
from bigmodel_jax.parallel import mesh as meshes
from bigmodel_jax.parallel import rules
from tests.models.test_attention import np_slopes

TINY = {"vocab_size": 37, "num_layers": 2, "embed_dim": 16, "num_heads": 4, "max_length": 24, "init_std": 0.3}
TOKENS = np.random.default_rng(0).integers(0, 37, (3, 18)).astype(np.int32)


def forward(model, variables, train=False, **inputs):
    @jax.jit
    def f(variables, inputs):
        out = model.apply(variables, train=train, **inputs)
        return out.head(out.hidden), out.cache

    return f(variables, inputs)


def built(maker=decoder, **options):
    """A model with random parameters, biases included (filled here: nothing to compile)."""
    model = maker(**TINY | options)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        center = 1.0 if path.endswith("scale") else 0.0
        return jnp.asarray(center + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return model, tree.map_paths(fill, model.abstract()[0])


# ---- the same network in numpy, float64, one row at a time -------------------------------------------------


def np_norm(x, p, kind, eps):
    x = x - (x.mean(-1, keepdims=True) if kind == "layernorm" else 0)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p.get("bias", 0)


NP_ACT = {
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "swiglu": lambda x: x / (1 + np.exp(-x)),
}
NP_ACT["geglu"] = NP_ACT["gelu"]


def np_attention(x, p, o, causal, seen):
    length = len(x)
    q, k, v = (np.einsum("ld,dhk->hlk", x, p[n]) + p.get(f"{n}_bias", np.zeros(1))[..., None, :] for n in "qkv")
    if o.get("qk_norm"):
        q, k = np_norm(q, p["norm_q"], o["norm"], 1e-5), np_norm(k, p["norm_k"], o["norm"], 1e-5)
    i = np.arange(length)
    if o["positions"] == "rotary":
        half = int(q.shape[-1] * o.get("rope_fraction", 1.0)) // 2
        theta = o.get("rope_local_theta") if o.get("window") else 0
        frequencies = (theta or 10_000.0) ** (-np.arange(half) / half) / (1 if theta else o.get("rope_factor", 1))
        angle = i[:, None] * frequencies

        def turn(x):
            z = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angle)
            return np.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)

        q, k = turn(q), turn(k)
    k, v = (np.repeat(x, len(q) // len(k), axis=0) for x in (k, v))
    s = q @ np.swapaxes(k, 1, 2) * (o.get("attention_scale") or q.shape[-1] ** -0.5)
    cap = o.get("attention_softcap")
    s = cap * np.tanh(s / cap) if cap else s
    gap = i[:, None] - i
    if o["positions"] == "alibi":
        s = s - np_slopes(len(q))[:, None, None] * abs(gap)
    seen = seen & (gap >= 0 if causal else True) & (abs(gap) < (o.get("window") or length))
    e = np.exp(s) * seen
    return np.einsum("hlk,hkd->ld", e / e.sum(-1, keepdims=True) @ v, p["out"]) + p.get("out_bias", 0)


def np_mlp(x, p, o):
    act = NP_ACT[o["activation"]]
    if "gate" in p:
        h = act(x @ p["gate"] + p.get("gate_bias", 0)) * (x @ p["up"] + p.get("up_bias", 0))
    else:
        h = act(x @ p["in"] + p.get("in_bias", 0))
    return h @ p["out"] + p.get("out_bias", 0)


def np_transformer(params, tokens, o, causal, seen=True):
    """logits [L, V] of one row."""
    offset = o.get("norm_offset", 0)
    p = tree.map_paths(lambda path, x: np.asarray(x, np.float64) + (offset if path.endswith("scale") else 0), params)
    where, eps = o["norm_placement"], o.get("norm_eps", 1e-5)
    x = p["embed"]["tokens"][tokens] * o.get("embed_scale", 1.0)
    i = np.arange(len(tokens))
    if o["positions"] == "learned":
        x = x @ p["embed"]["project"] if causal and "project" in p["embed"] else x
        x = x + p["embed"]["positions"][i + o.get("position_offset", 0)]
    if o["positions"] == "sinusoidal":
        half = x.shape[1] // 2
        angle = i[:, None] / 10_000.0 ** (np.arange(half) / (half - 1))
        x = x + np.concatenate([np.sin(angle), np.cos(angle)], 1)
    x = x + (p["embed"]["types"][0] if "types" in p["embed"] else 0)
    if "norm" in p["embed"]:
        x = np_norm(x, p["embed"]["norm"], o["norm"], eps)
    if "project_bias" in p["embed"]:
        x = x @ p["embed"]["project"] + p["embed"]["project_bias"]
    for n in range(2):
        w = p["layer"] if "layer" in p else jax.tree.map(lambda leaf, n=n: leaf[n], p["layers"])
        own = o | ({"window": 0} if (o.get("layer_pattern") or "ll")[n] == "g" else {})

        def norm(y, name, w=w):
            return np_norm(y, w[name], o["norm"], eps)

        def attn(y, w=w, own=own):
            return np_attention(y, w["attn"], own, causal, seen)

        if where == "post":
            x = norm(x + attn(x), "norm_attn")
            x = norm(x + np_mlp(x, w["mlp"], o), "norm_mlp")
        elif where == "sandwich":
            x = x + norm(attn(norm(x, "norm_attn")), "norm_attn_post")
            x = x + norm(np_mlp(norm(x, "norm_mlp"), w["mlp"], o), "norm_mlp_post")
        elif o.get("residual") == "parallel":
            x = x + attn(norm(x, "norm_attn")) + np_mlp(norm(x, "norm_mlp"), w["mlp"], o)
        else:
            x = x + attn(norm(x, "norm_attn"))
            x = x + np_mlp(norm(x, "norm_mlp"), w["mlp"], o)
    x = np_norm(x, p["norm_final"], o["norm"], eps) if where != "post" else x
    head = p.get("head", {})
    if "dense" in head:
        x = np_norm(NP_ACT[o["activation"]](x @ head["dense"] + head["dense_bias"]), head["norm"], o["norm"], eps)
    x = x @ head["project"] if "project" in head else x
    y = x @ head.get("kernel", p["embed"]["tokens"].T) + head.get("bias", 0)
    cap = o.get("final_softcap")
    return cap * np.tanh(y / cap) if cap else y


GPT2 = {"positions": "learned", "norm": "layernorm", "norm_placement": "pre", "activation": "gelu"}
LLAMA = {"positions": "rotary", "norm": "rmsnorm", "norm_placement": "pre", "activation": "swiglu",
         "num_kv_heads": 2, "bias": False, "norm_bias": False, "tied_embeddings": False}  # fmt: skip
BERT = {"positions": "learned", "norm": "layernorm", "norm_placement": "post", "activation": "gelu_exact",
        "norm_eps": 1e-12}  # fmt: skip
# Windowed and full layers in turn, each kind with rotations of its own; norms scaled by 1 + w.
GEMMA = LLAMA | {"norm_placement": "sandwich", "activation": "geglu", "window": 5, "attention_softcap": 4.0,
                 "final_softcap": 3.0, "embed_scale": 4.0, "num_kv_heads": 1, "head_dim": 6,
                 "qk_norm": True, "layer_pattern": "lg", "rope_local_theta": 100.0, "rope_scaling": "linear",
                 "rope_factor": 3.0, "norm_offset": 1.0, "attention_scale": 0.3}  # fmt: skip
NEOX = GPT2 | {"positions": "rotary", "rope_fraction": 0.5, "residual": "parallel", "head_bias": True}
ALIBI = GPT2 | {"positions": "alibi", "embed_norm": True, "activation": "relu", "mlp_dim": 24}
ORIGINAL = GPT2 | {"positions": "sinusoidal", "norm_placement": "post", "num_kv_heads": 2}
NOPE = LLAMA | {"positions": "none", "bias": True}
OPT = GPT2 | {"norm_placement": "post", "activation": "relu", "position_offset": 2, "token_dim": 8, "bias": False,
              "qkv_bias": True}  # fmt: skip
ALBERT = BERT | {"shared_layers": True, "token_dim": 8, "position_offset": 3}
VARIANTS = {"gpt2": GPT2, "llama": LLAMA, "gemma": GEMMA, "opt": OPT, "neox": NEOX, "alibi": ALIBI,
            "original": ORIGINAL, "nope": NOPE, "post": BERT}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_decoder_equals_numpy_and_cached_decoding_equals_full(name):
    options = VARIANTS[name]
    model, variables = built(**options)
    logits, _ = forward(model, variables, tokens=TOKENS)
    expected = np.stack([np_transformer(variables["params"], row, options, True) for row in TOKENS])
    assert logits.dtype == jnp.float32 and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())

    # Prompts of 5, 9 and 12 tokens, padded on the right to 12; then one token at a time, from a cache that keeps
    # an array per layer (rings where there is a window) and, for two variants, from the stacked one as well.
    prompt = np.array([5, 9, 12], np.int32)
    padded = np.where(np.arange(12) < prompt[:, None], TOKENS[:, :12], 36)
    atol = 1e-5 * max(1.0, float(np.abs(logits).max()))
    for slots in (12, 20) if name in ("llama", "gemma") else (12,):
        first, cache = forward(model, variables, tokens=padded, cache=model.cache(3, slots, jnp.float32))
        for row, n in enumerate(prompt):
            np.testing.assert_allclose(first[row, :n], logits[row, :n], atol=atol)
        if slots == 12:
            cache = caches.opened(cache, jnp.asarray(prompt), 18, model.windows)
        cache["length"] = jnp.asarray(prompt)
        step = jax.jit(lambda v, c, t: model.apply(v, train=False, cache=c, tokens=t))
        for i in range(6):
            at = prompt + i
            out = step(variables, cache, TOKENS[np.arange(3), at][:, None])
            cache = out.cache
            np.testing.assert_allclose(out.head(out.hidden)[:, 0], logits[np.arange(3), at], atol=atol)
        np.testing.assert_array_equal(cache["length"], prompt + 6)
        wrong = step(variables, cache | {"length": cache["length"] * 0}, TOKENS[:, 5:6])
        assert np.abs(wrong.head(wrong.hidden)[:, 0] - logits[:, 5]).max() > 100 * atol


@pytest.mark.parametrize(("base", "window"), [(BERT, 4), (ALBERT, 0)])
def test_encoder_equals_numpy_with_padding(base, window):
    model, variables = built(encoder, window=window, **base)
    segments = (np.arange(18) < np.array([18, 11, 7])[:, None]).astype(np.int32)
    logits, _ = forward(model, variables, tokens=TOKENS, segments=segments)
    options = base | {"window": window}
    for row in range(3):
        real = segments[row] == 1
        expected = np_transformer(variables["params"], TOKENS[row][real], options, False)
        np.testing.assert_allclose(logits[row][real], expected, atol=1e-4)
    assert np.abs(forward(model, variables, tokens=TOKENS)[0] - logits)[1].max() > 0.01


def test_packed_documents_are_isolated_bitwise():
    """Editing document A leaves B's logits bitwise equal, and B's equal B alone."""
    model, variables = built(**LLAMA)
    segments = np.repeat([1, 2, 0], [7, 8, 3])[None].repeat(3, 0).astype(np.int32)
    positions = np.concatenate([np.arange(7), np.arange(8), np.arange(3)])[None].repeat(3, 0).astype(np.int32)
    other = np.where(segments == 1, (TOKENS + 5) % 37, TOKENS)
    a, _ = forward(model, variables, tokens=TOKENS, segments=segments, positions=positions)
    b, _ = forward(model, variables, tokens=other, segments=segments, positions=positions)
    np.testing.assert_array_equal(a[:, 7:15], b[:, 7:15])
    assert np.abs(a[:, :7] - b[:, :7]).max() > 0.1
    alone, _ = forward(model, variables, tokens=TOKENS[:, 7:15])
    np.testing.assert_allclose(a[:, 7:15], alone, atol=1e-5)
    leaky = forward(model, variables, tokens=other)[0] - forward(model, variables, tokens=TOKENS)[0]
    assert np.abs(leaky[:, 7:15]).max() > 1e-3


def test_prefix_sees_itself_whole():
    """Within the prefix attention is bidirectional, behind it causal."""
    model, variables = built(**LLAMA)

    def moved(prefix):
        changed = TOKENS.copy()
        changed[:, 6] = (changed[:, 6] + 1) % 37
        a, b = (forward(model, variables, tokens=t, prefix=prefix)[0] for t in (TOKENS, changed))
        return np.abs(a - b).max(-1) > 0

    seen = moved(np.array([0, 7, 10], np.int32))
    assert not seen[0, :6].any() and seen[0, 6:].all()
    assert seen[1:].all()


def test_parameters_do_not_depend_on_unroll_or_remat():
    """Same tree, same loss and gradients; a policy that keeps less recomputes more matmuls."""
    reference, matmuls = None, {}
    for options in ({"remat": "none", "unroll": 2}, *({"remat": name} for name in REMAT)):
        model, variables = built(**GPT2 | options)

        def loss(params, model=model):
            out = model.apply({"params": params, "stats": {}}, train=True, tokens=TOKENS)
            return jnp.mean(jnp.square(out.head(out.hidden)))

        name = options["remat"]
        if "unroll" not in options:
            matmuls[name] = str(jax.make_jaxpr(jax.grad(loss))(variables["params"])).count("dot_general")
        if name in ("dots", "attention"):
            continue  # compiled once for the two ends and the middle is enough
        got = (variables, *jax.jit(jax.value_and_grad(loss))(variables["params"]))
        reference = reference or got
        assert tree.flatten(got).keys() == tree.flatten(reference).keys()
        for (path, a), b in zip(tree.flatten(got).items(), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4, err_msg=f"{options} {path}")
    assert matmuls["none"] <= matmuls["dots"] <= matmuls["minimal"] < matmuls["attention"] < matmuls["full"]


def test_names_axes_and_init():
    model = decoder(**TINY | GPT2 | {"num_layers": 3, "embed_dim": 64})
    shapes, axes = model.abstract()
    names = tree.flatten(shapes["params"])
    assert set(names) == {
        "embed/tokens", "embed/positions", "norm_final/scale", "norm_final/bias",
        *(f"layers/attn/{n}{b}" for n in ("q", "k", "v", "out") for b in ("", "_bias")),
        *(f"layers/mlp/{n}{b}" for n in ("in", "out") for b in ("", "_bias")),
        *(f"layers/{n}/{b}" for n in ("norm_attn", "norm_mlp") for b in ("scale", "bias")),
    }  # fmt: skip
    flat = tree.flatten(axes["params"], is_leaf=lambda x: isinstance(x, tuple))
    assert flat["layers/attn/q"] == ("layers", "embed", "heads", "head_dim")
    assert flat["embed/tokens"] == ("vocab", "embed")
    assert names["embed/tokens"].shape == (37, 64)
    assert all(len(flat[n]) == names[n].ndim for n in names)
    assert {a for t in flat.values() for a in t if a} <= set(rules.LOGICAL)
    params = tree.flatten(jax.jit(model.init)(jax.random.key(1))["params"])
    assert all(isinstance(x, jax.Array) for x in params.values())
    for name, std in (("embed/tokens", 0.3), ("layers/mlp/in", 0.3), ("layers/mlp/out", 0.3 / 6**0.5)):
        assert abs(float(params[name].std()) / std - 1) < 0.05
    first, second = params["layers/mlp/in"][:2]
    assert np.abs(first - second).max() > 0.1
    spread = decoder(**TINY | {"embed_dim": 64, "init": "fan_in"}).init(jax.random.key(0))["params"]
    assert abs(float(spread["layers"]["mlp"]["in"].std()) * 8 - 1) < 0.05


def test_dropout_depends_on_row_key_layer_and_site_only():
    """Equal for any microbatch and mesh; on only in training; different per row and per layer."""
    rates = {"dropout": 0.3, "attention_dropout": 0.2, "embed_dropout": 0.1}
    model, variables = built(**GPT2 | rates)
    tokens = np.repeat(TOKENS[:1], 8, 0)
    keys = jax.random.split(jax.random.key(5), 8)

    def run(tokens, keys, train=True):
        @jax.jit
        def f(variables, tokens, keys):
            return model.apply(variables, train=train, tokens=tokens, rngs={"dropout": keys}).hidden

        return f(variables, tokens, keys)

    whole = run(tokens, keys)
    np.testing.assert_allclose(run(tokens[4:], keys[4:]), whole[4:], atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 0.1
    off = run(tokens, keys, train=False)
    np.testing.assert_array_equal(off, forward_hidden(model, variables, tokens))
    assert np.abs(off - whole).max() > 0.1
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with rules.use(rules.Layout(mesh)):
        np.testing.assert_allclose(run(tokens, keys), whole, atol=1e-5)
    other = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    with rules.use(rules.Layout(mesh)):
        assert np.abs(run(tokens, other) - whole).max() > 0.1


def forward_hidden(model, variables, tokens):
    return jax.jit(lambda v, t: model.apply(v, train=False, tokens=t).hidden)(variables, tokens)


@pytest.mark.parametrize("name", ["llama", "gemma", "alibi", "original"])
def test_float64_end_to_end(name, x64):
    """No float32 anywhere in the program, forward or backward."""
    options = VARIANTS[name] | {"dtype": "float64", "param_dtype": "float64"}
    model, variables = built(**options)

    def loss(params):
        out = model.apply({"params": params, "stats": {}}, train=True, tokens=TOKENS)
        return jnp.mean(jnp.square(out.head(out.hidden)))

    program = str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))
    assert "f64" in program and not re.findall(r"\bb?f(?:16|32)\[", program)
    logits, _ = forward(model, variables, tokens=TOKENS)
    expected = np_transformer(variables["params"], TOKENS[0], options, True)
    np.testing.assert_allclose(logits[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("maker", [decoder, encoder])
def test_bfloat16_multiplies_in_bfloat16(maker):
    """Every matmul has bfloat16 operands, forward and backward; logits and gradients are float32."""

    def operands(dtype):
        model, variables = built(maker, dtype=dtype)

        def loss(params):
            out = model.apply({"params": params, "stats": {}}, train=True, tokens=TOKENS)
            logits = out.head(out.hidden)
            assert logits.dtype == jnp.float32
            return jnp.mean(jnp.square(logits))

        text = jax.jit(jax.grad(loss)).lower(variables["params"]).as_text()
        assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(jax.eval_shape(jax.grad(loss), variables["params"])))
        pairs = re.findall(r"stablehlo\.dot_general.*: \(tensor<[^>]*?(\w+)>, tensor<[^>]*?(\w+)>\)", text)
        return {re.sub(r"^.*x", "", d) for pair in pairs for d in pair}

    assert operands("bfloat16") == {"bf16"}
    assert operands("float32") == {"f32"}


def counted_flops(jaxpr):
    """Matmul FLOPs of a program, loops included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[d] for d in contract])
            total += 2 * int(np.prod(eqn.outvars[0].aval.shape)) * int(depth)
        for inner in jaxprs_in_params(eqn.params):
            total += eqn.params.get("length", 1) * counted_flops(inner)
    return total


CLASSES = BERT | {"head": "classes", "num_classes": 9, "pooler": True}


@pytest.mark.parametrize(
    ("maker", "options"),
    [(decoder, GPT2), (decoder, GEMMA), (decoder, OPT), (encoder, BERT), (encoder, ALBERT), (encoder, CLASSES)],
)
def test_flops_count_every_matmul(maker, options):
    plain = options | {"attention": "reference", "window": 0, "layer_pattern": ""}
    model, variables = built(maker, **plain)

    def logits(variables, tokens):
        out = model.apply(variables, train=False, tokens=tokens)
        return out.head(out.hidden)

    program = jax.make_jaxpr(logits)(variables, TOKENS).jaxpr
    length = TOKENS.shape[1]
    assert counted_flops(program) == pytest.approx(TOKENS.size * model.flops(length), rel=1e-12)
    # One of two layers compares a query with the 5 keys of its window, or 9 where it looks both ways.
    mixed = maker(**TINY | plain | {"window": 5, "layer_pattern": "gl"})
    seen = 5 if maker is decoder else 9
    width = 4 * (options.get("head_dim") or 4)
    assert model.flops(length) - mixed.flops(length) == pytest.approx(4 * (length - seen) * width)


def test_depth_does_not_grow_the_program():
    def lines(layers):
        model = decoder(**TINY | {"num_layers": layers})
        shapes, _ = model.abstract()
        f = jax.jit(lambda v: model.apply(v, train=False, tokens=TOKENS).hidden)
        return len(f.lower(shapes).as_text().splitlines())

    assert lines(24) == lines(6)


def test_head_is_a_pytree_function_of_any_tokens():
    model, variables = built(encoder, **BERT)
    out = jax.jit(lambda v: model.apply(v, train=False, tokens=TOKENS))(variables)
    assert jax.tree.structure(out.head) == jax.tree.structure(jax.tree.map(jnp.zeros_like, out.head))
    whole = out.head(out.hidden)
    assert whole.shape == (3, 18, 37)
    np.testing.assert_allclose(out.head(out.hidden[:, 4:6]), whole[:, 4:6], atol=1e-5)
    np.testing.assert_allclose(out.head(out.hidden[1, 3]), whole[1, 3], atol=1e-5)


WRONG = [
    ({"positions": "rotery"}, "rotary"), ({"norm": "batchnorm"}, "layernorm"), ({"num_kv_heads": 3}, r"\[1, 2, 4\]"),
    ({"embed_dim": 18}, "head_dim"), ({"dropout": 1.0}, r"\[0, 1\)"), ({"remat": "ful"}, "full"),
    ({"residual": "parallel", "norm_placement": "post"}, "pre or sandwich"), ({"num_layers": 0}, "at least 1"),
    ({"attention": "flash"}, "blockwise"), ({"positions": "rotary", "head_dim": 1}, "rope_fraction"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_name_what_would_be_right(options, message):
    with pytest.raises(InputError, match=message):
        decoder(**TINY | options)


def test_wrong_inputs():
    model, variables = built()
    cases = [
        (model, {"tokens": np.zeros((1, 25), np.int32)}, "max_length=24"),
        (model, {"tokens": TOKENS, "token_types": TOKENS}, "token_types"),
        (model, {"tokens": TOKENS, "segments": TOKENS, "cache": model.cache(3, 20, jnp.float32)}, "segments"),
        (encoder(**TINY), {"tokens": TOKENS, "prefix": TOKENS[:, 0]}, "encoder"),
    ]
    for wrong, inputs, message in cases:
        with pytest.raises(InputError, match=message):
            wrong.apply(variables, train=False, **inputs)
