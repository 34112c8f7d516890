"""Low-rank updates: nothing at first, base + scale * A B later, and a base that never moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import inherit, tree
from bigmodel_jax.checkpoint import Checkpointer
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import objectives, optim, schedules
from bigmodel_jax.learn import state as states
from bigmodel_jax.learn import step as steps
from bigmodel_jax.models import MODELS
from bigmodel_jax.models.lora import add, lora, sides
from bigmodel_jax.parallel.mesh import make_mesh
from bigmodel_jax.parallel.rules import Layout


def encoder():
    """Only its shapes are used: compiling a stack costs seconds (tests/test_finetune.py trains one)."""
    return MODELS["encoder"](
        vocab_size=20, num_layers=2, embed_dim=16, num_heads=2, max_length=8, head="classes", num_classes=3
    )


def plain():
    return MODELS["mlp"](num_features=8, num_classes=3, hidden=(16, 16))


@pytest.fixture(scope="module")
def model():
    return lora(plain(), 2, 4.0, (r"^layer1/kernel$",), (r"^head/",))


@pytest.fixture(scope="module")
def batch():
    features = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    label = (features[:, 0] > 0).astype(np.int32)
    return {"features": features, "label": label, "weights": np.ones(8, np.float32)}


@pytest.fixture(scope="module")
def trained(model, batch):
    """(state before, state after four steps)."""
    shapes, axes = model.abstract()
    tx = optim.make(shapes["params"], lr=schedules.make("constant", 0.02, 0, 9), axes=axes["params"], weight_decay=0.1)
    state = jax.jit(lambda key: states.create(model.init, tx, key, ema=True))(jax.random.key(0))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    fn = steps.make_train_step(model.apply, model.merge, objectives.classification(), tx, ema=0.5, layout=Layout(mesh))
    fn = jax.jit(fn)
    after = state
    for _ in range(4):
        after, metrics = fn(after, jax.tree.map(lambda x: x[None], batch), jax.random.key(1))
    return state, after, metrics


def test_sides_of_weights():
    cases = {
        ("layers", "embed", "mlp"): (1, 1), ("layers", "heads", "head_dim", "embed"): (1, 2),
        ("vocab", "embed"): (0, 1), ("spatial", "spatial", "conv_in", "conv_out"): (0, 3),
        ("layers", "experts", "embed", "mlp"): (2, 1), ("layers", "norm"): None, ("layers", "heads", "head_dim"): None,
    }  # fmt: skip
    assert {axes: sides(axes) for axes in cases} == cases


def test_the_start_is_the_base_and_the_base_never_moves(model, trained, batch):
    before, after, metrics = trained
    base = plain()
    start = tree.flatten(model.whole({"params": before["params"], "frozen": before["frozen"]}))
    reference = tree.flatten(base.init(jax.random.key(0))["params"])
    assert start.keys() == reference.keys()
    for path, leaf in reference.items():
        np.testing.assert_allclose(start[path], leaf, atol=1e-6, err_msg=path)  # B is zero
    for path, leaf in tree.flatten(before["frozen"]).items():
        assert np.asarray(leaf).tobytes() == np.asarray(tree.flatten(after["frozen"])[path]).tobytes()
    params = tree.flatten(after["params"])
    assert set(params) == {"head/kernel", "head/bias", "lora/layer1/kernel/a", "lora/layer1/kernel/b"}
    assert all(np.any(params[p] != leaf) for p, leaf in tree.flatten(before["params"]).items())
    slots = tree.flatten(after["opt"]["mu"])
    assert slots.keys() == params.keys() and set(tree.flatten(after["ema"])) == set(params)


def test_merged_weights_are_base_plus_scaled_product(model, trained, batch):
    after = trained[1]
    variables = states.variables(after)
    merged = tree.flatten(model.whole(variables))
    params, base = tree.flatten(after["params"]), tree.flatten(after["frozen"])
    a, b = (np.asarray(params[f"lora/layer1/kernel/{h}"], np.float64) for h in "ab")
    assert a.shape == (16, 2) and b.shape == (2, 16)
    wanted = base["layer1/kernel"] + 4.0 / 2 * a @ b
    np.testing.assert_allclose(merged["layer1/kernel"], wanted, atol=1e-6)
    assert np.abs(wanted - base["layer1/kernel"]).max() > 1e-4
    np.testing.assert_array_equal(merged["layer0/kernel"], base["layer0/kernel"])
    inputs = {"features": batch["features"]}

    def logits(variables, which):
        out = which.apply(variables, train=False, **inputs)
        return out.head(out.hidden)

    adapted, alone, already, old = jax.jit(
        lambda v: (
            logits(v, model), logits({"params": model.whole(v)}, plain()), logits({"params": model.whole(v)}, model),
            logits({"params": v["frozen"] | {"head": v["params"]["head"]}}, plain()),
        )
    )(variables)  # fmt: skip
    np.testing.assert_allclose(adapted, alone, atol=1e-5)
    np.testing.assert_allclose(adapted, already, atol=1e-5)
    assert np.abs(np.asarray(adapted) - old).max() > 1e-3


def test_a_checkpoint_is_whole_and_starts_a_plain_model(model, trained, tmp_path):
    after = trained[1]
    meta = {"step": 4, "config": {"lora": {"rank": 2, "alpha": 4.0}}}
    with Checkpointer(tmp_path) as saver:
        saver.save(4, after, meta)
        restored, _ = saver.restore(after)
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), restored["frozen"], after["frozen"])
    assert all(jax.tree.leaves(same))
    target = jax.tree.map(jnp.zeros_like, plain().init(jax.random.key(3))["params"])
    found, report = inherit.init_from(str(tmp_path), target, ema=False)
    assert not report["missing"] and not report["unexpected"]
    wanted = tree.flatten(model.whole(states.variables(after)))
    for path, leaf in tree.flatten(found).items():
        np.testing.assert_allclose(leaf, wanted[path], atol=1e-6, err_msg=path)


def test_stacks_and_heads_are_multiplied_side_by_side():
    rng = np.random.default_rng(0)
    base, a, b = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 4, 2)), rng.normal(size=(2, 2, 5))
    wanted = base + 0.5 * np.einsum("nhkr,nrd->nhkd", a, b)  # [N, H, K, D], an attention output
    np.testing.assert_allclose(add(*map(jnp.asarray, (base, a, b)), 0.5), wanted, rtol=1e-5)
    a, b = rng.normal(size=(2, 3, 2)), rng.normal(size=(2, 2, 4, 5))
    wanted = base + 0.5 * np.einsum("ndr,nrhk->ndhk", a, b)  # [N, D, H, K], a query
    np.testing.assert_allclose(add(*map(jnp.asarray, (base, a, b)), 0.5), wanted, rtol=1e-5)


def test_layouts_place_factors_like_their_weight():
    model = lora(encoder(), 2, 4.0, (r"attn/(q|out)$", r"mlp/in$"), (r"^head/",))
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    shapes, axes = model.abstract()
    tx = optim.make(shapes["params"], lr=schedules.make("constant", 0.1, 0, 9), axes=axes["params"])
    state = jax.eval_shape(lambda key: states.create(model.init, tx, key), jax.random.key(0))
    places = tree.flatten(states.shardings(state, axes, Layout(mesh)))
    assert places["params/lora/layers/attn/q/a"].spec[1] == "fsdp"  # [N, D, r]
    assert places["params/lora/layers/attn/q/b"].spec[2] == "tensor"  # [N, r, H, K]
    assert "tensor" in places["opt/mu/lora/layers/mlp/in/b"].spec[2]
    assert places["frozen/layers/attn/q"].spec[1:3] == ("fsdp", "tensor")


def test_what_cannot_be_adapted_is_refused():
    model = encoder()
    with pytest.raises(InputError, match="no parameter matches 'attn/query'"):
        lora(model, 2, 4.0, ("attn/query",), ())
    with pytest.raises(InputError, match="norm_attn/scale' with axes .* is not a matrix"):
        lora(model, 2, 4.0, ("norm_attn/scale",), ())
    with pytest.raises(InputError, match=r"rank 99 must lie in 1..16"):
        lora(model, 99, 4.0, ("attn/q$",), ())
    with pytest.raises(InputError, match="not a regex"):
        lora(model, 2, 4.0, ("(",), ())
