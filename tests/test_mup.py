"""Mu-parametrisation: what each parameter needs, the base model is the standard one, and the coordinate check."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.coordinates import Probe, model_of
from bigmodel_jax import mup, tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import optim
from bigmodel_jax.models import decoder, encoder
from bigmodel_jax.models.coordinates import slopes
from bigmodel_jax.models.spec import Spec

WIDE = {"vocab_size": 37, "num_layers": 4, "embed_dim": 64, "num_heads": 4, "max_length": 8}


def axes_of(model):
    return tree.flatten(model.abstract()[1]["params"], is_leaf=lambda a: isinstance(a, tuple))


def test_every_parameter_is_an_input_a_hidden_matrix_or_an_output():
    found = {
        **axes_of(decoder(**WIDE, num_kv_heads=2, activation="swiglu", tied_embeddings=False, head_bias=True)),
        **{f"enc/{p}": a for p, a in axes_of(encoder(**WIDE, pooler=True, nsp=True)).items()},
        **{f"moe/{p}": a for p, a in axes_of(decoder(**WIDE, num_experts=4)).items()},
    }
    kinds = {(1, 1): "free", (1, 4): "input", (4, 4): "hidden", (4, 1): "output"}
    got = {path: kinds[mup.growth(axes, 4)] for path, axes in found.items()}
    by_hand = {
        "output": {"head/kernel", "enc/nsp/kernel", "moe/layers/moe/router"},
        "free": {"head/bias", "enc/head/bias", "enc/nsp/bias"},
        "hidden": {f"{p}layers/attn/{w}" for p in ("", "enc/", "moe/") for w in ("q", "k", "v", "out")}
        | {f"layers/mlp/{w}" for w in ("gate", "up", "out")}
        | {"enc/layers/mlp/in", "enc/layers/mlp/out", "moe/layers/moe/in", "moe/layers/moe/out"}
        | {"enc/pooler/kernel", "enc/head/dense"},
    }
    for kind, paths in by_hand.items():
        assert {path for path, k in got.items() if k == kind} == paths
    assert {"embed/tokens", "embed/positions", "layers/attn/q_bias", "norm_final/scale"} <= set(got)


def test_factors_are_those_of_the_papers():
    r = 4.0  # Yang et al. 2022, table 3: deviation (root of the variance), SGD, Adam
    for (r_in, r_out), start, sgd, adam in (
        ((1, r), 1, r, 1), ((r, r), r**-0.5, 1, 1 / r), ((r, 1), 1 / r, 1 / r, 1 / r),
    ):  # fmt: skip
        assert mup.deviation(r_in, r_out) == pytest.approx(start)
        assert mup.gradient(r_in, r_out) == pytest.approx(sgd)
        assert mup.entrywise(r_in, r_out) == pytest.approx(adam)
    # Muon: lr * sqrt(max(in, out)), its update's spectral norm, over sqrt(out / in), the one wanted, stays as it was.
    for rows, columns, r_in, r_out in ((6, 8, r, r), (8, 6, r, r), (8, 6, r, 1.0), (6, 8, 1.0, r)):
        base = max(rows, columns) ** 0.5 / (columns / rows) ** 0.5
        rows, columns = rows * r_in, columns * r_out
        assert mup.orthogonal(r_in, r_out) * max(rows, columns) ** 0.5 / (columns / rows) ** 0.5 == pytest.approx(base)


def test_a_model_of_the_bases_sizes_is_the_standard_one():
    spec = Spec(**WIDE)
    own = Spec(**WIDE, mup_width=64, mup_depth=4, mup_head_dim=16)
    assert own.ratio == mup.STANDARD and own.score_scale == spec.score_scale == 0.25
    wide = Spec(**WIDE | {"num_heads": 2}, mup_head_dim=16)
    assert wide.score_scale == pytest.approx(0.25 * 16 / 32)
    for changes, says in (
        ({"mup_width": -1}, "mup_width=-1 is a size"), ({"mup_width": 16, "token_dim": 8}, "token_dim=0"),
        ({"mup_depth": 2, "norm_placement": "post"}, "norm_placement='pre'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            Spec(**WIDE | changes)


def updated(ratio, name, axes, params, **options):
    """{path: update} of the first step on gradients of 1e-8, smaller by the width, in layers also by the depth."""
    tx = optim.make(params, name=name, lr=lambda s: jnp.float32(1.0), axes=axes, ratio=ratio, **options)
    small = {path: 1e-8 / ratio.width / (ratio.depth if path.startswith("l/") else 1) for path in tree.flatten(params)}
    grads = tree.map_paths(lambda path, p: jnp.full(p.shape, small[path]), params)
    return tree.flatten(tx.update(grads, tx.init(params), params)[0])


def test_learning_rates_eps_and_decay_follow_the_width():
    axes = {"l": {"w": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}}
    axes |= {"t": ("vocab", "embed"), "k": ("embed", "vocab")}
    params = jax.tree.map(lambda a: jnp.ones((2,) * len(a)), axes, is_leaf=lambda a: isinstance(a, tuple))
    one, four = (updated(r, "adamw", axes, params, weight_decay=0.1) for r in (mup.STANDARD, mup.Ratio(4.0, 2.0)))
    factor = {"l/w": 1 / 4, "l/bias": 1, "t": 1, "k": 1 / 4}
    # Gradients are as small as eps: without its scaling the directions would differ. Decay is 0.1 of both.
    for path, decayed in (("l/w", 0.1), ("l/bias", 0.0), ("t", 0.1), ("k", 0.1)):
        np.testing.assert_allclose(one[path], -0.5 - decayed, rtol=1e-5)
        np.testing.assert_allclose(four[path], -0.5 * factor[path] - decayed, rtol=1e-5)
    sgd = updated(mup.Ratio(4.0, 1.0), "sgd", axes, params)
    assert [float(sgd[p].ravel()[0] / -2.5e-9) for p in factor] == pytest.approx([1, 4, 4, 1 / 4], rel=1e-5)
    with pytest.raises(InputError, match="does not follow the width"):
        updated(mup.Ratio(4.0, 1.0), "adamw", axes, params, weight_decay=0.1, decay="l2")


@pytest.fixture(scope="module")
def probes():
    return {width: Probe(model_of(width, True, layers=1, remat="none")) for width in (32, 256)}


def test_initial_sizes_follow_the_width(probes):
    small, wide = (tree.flatten(probe.init(jax.random.key(0))) for probe in probes.values())
    want = {"embed/tokens": 1, "layers/attn/q": 8**-0.5, "layers/attn/out": 8**-0.5, "layers/mlp/out": 8**-0.5}
    for path, factor in want.items():
        assert np.std(wide[path]) / np.std(small[path]) == pytest.approx(factor, rel=0.06), path


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_activations_move_as_far_at_any_width(probes, optimizer):
    def exponents(ratio):
        by_width = slopes({w: p.sizes(optimizer, ratio or p.model.ratio, seeds=1) for w, p in probes.items()})
        return {name: by_width[name] for name in ("moved/0/attn", "moved/0/mlp", "moved/0/stream")}, by_width

    held, every = exponents(None)
    assert max(map(abs, held.values())) < (0.15 if optimizer == "adamw" else 0.1), held
    # Logits shrink towards a limit, never as fast as their random part, 1 / sqrt(width): the learned one stays.
    assert -0.45 < every["moved/logits"] < 0.1 and abs(every["moved/embed"]) < 0.05
    # The control: the same models, whose optimizer is not told of their width. Muon's updates are bounded by norm, so
    # that it errs less.
    loose, _ = exponents(mup.STANDARD)
    if optimizer == "adamw":
        assert min(loose.values()) > 0.4, loose
    else:
        assert max(loose.values()) > 0.15 and all(loose[name] > held[name] + 0.12 for name in held), loose


def test_the_stream_does_not_move_further_the_deeper_it_is():
    """Exponents in the depth. Branches of 1 / depth: their part that is random at the start falls as 1 / sqrt(depth),
    so the stream shrinks towards a limit. Control: branches that add up as in a shallow one.
    """

    def exponents(**options):
        found = []
        for layers in (4, 16):
            probe = Probe(model_of(32, True, layers=layers, remat="none", **options))
            sizes = probe.sizes("adamw", probe.model.ratio, seeds=1)
            found.append([sizes[f"{kind}{layers - 1}/stream"] for kind in ("", "moved/")])
        return np.log(np.divide(found[1], found[0])) / np.log(4)

    assert all(-0.65 < slope < 0.1 for slope in exponents(mup_depth=2))
    assert all(slope > 0.5 for slope in exponents())


def test_branches_and_logits_are_those_of_the_plain_model_made_smaller():
    plain, scaled = decoder(**WIDE), decoder(**WIDE, mup_width=16, mup_depth=2)
    rng = np.random.default_rng(0)
    params = tree.map_paths(lambda path, p: jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), plain.abstract()[0])
    halved = tree.map_paths(lambda path, p: p / 2 if "layers" in path and "/out" in path else p, params)
    tokens = np.arange(6)[None] % 37

    def logits(model, variables):
        out = model.apply(variables, train=False, tokens=tokens)
        return out.head(out.hidden)

    got = jax.jit(lambda p: logits(scaled, p))(params)
    want, other = jax.jit(lambda p, h: (logits(plain, h) / 4, logits(plain, p) / 4))(params, halved)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(got - other).max() > 0.01
