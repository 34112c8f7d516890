"""Vision Transformers against numpy, published sizes, positions at other resolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import MODELS
from bigmodel_jax.models.vit import resized

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TINY = dict(num_classes=3, in_channels=2, image_size=8, patch_size=4, num_layers=2, embed_dim=8, num_heads=2)


def np_norm(x, p, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def np_vit(p, image, pooling):
    b = len(image)
    cut = [image[:, i : i + 4, j : j + 4].reshape(b, -1) for i in (0, 4) for j in (0, 4)]
    x = np.stack(cut, 1) @ p["patches"]["kernel"].reshape(-1, 8) + p["patches"]["bias"]
    if pooling == "first":
        x = np.concatenate([np.broadcast_to(p["class_token"], (b, 1, 8)), x], 1)
    x = x + p["positions"]
    for n in range(2):
        q = jax.tree.map(lambda leaf, n=n: leaf[n], p["layers"])
        y, a = np_norm(x, q["norm_attn"]), q["attn"]
        k = {s: np.einsum("bld,dhk->bhlk", y, a[s]) + a[f"{s}_bias"][:, None] for s in "qkv"}
        scores = np.exp(k["q"] @ k["k"].swapaxes(-1, -2) / 2.0)
        y = scores / scores.sum(-1, keepdims=True) @ k["v"]
        x = x + np.einsum("bhlk,hkd->bld", y, a["out"]) + a["out_bias"]
        y = np_norm(x, q["norm_mlp"]) @ q["mlp"]["in"] + q["mlp"]["in_bias"]
        x = x + y * (1 + erf(y / np.sqrt(2))) / 2 @ q["mlp"]["out"] + q["mlp"]["out_bias"]
    x = np_norm(x, p["norm_final"])
    x = x[:, 0] if pooling == "first" else x.mean(1)
    return x @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_network_equals_numpy(pooling, x64):
    model = MODELS["vit"](**TINY, pooling=pooling, dtype="float64", param_dtype="float64")
    r = np.random.default_rng(0)
    v = jax.tree.map(lambda s: jnp.asarray(0.5 * r.normal(size=s.shape)), model.abstract()[0])
    image = r.normal(size=(2, 8, 8, 2))

    def logits(v, image):
        out = model.apply(v, train=False, image=image)
        return out.head(out.hidden)

    got = jax.jit(logits, compiler_options=QUICK)(v, image)
    p = jax.tree.map(np.asarray, v["params"])
    np.testing.assert_allclose(got, np_vit(p, image, pooling), atol=1e-10)
    # Control: patches in another order are another image, because of the positions.
    turned = np.roll(image, 4, axis=1)
    assert np.abs(np_vit(p, turned, pooling) - got).max() > 1e-3


def test_published_sizes():
    """ViT-B/16 and B/32 of torchvision: 86,567,656 and 88,224,232 parameters; B/16 17.56 G multiply-adds."""
    for patch, count in ((16, 86_567_656), (32, 88_224_232)):
        model = MODELS["vit"](num_classes=1000, in_channels=3, image_size=224, patch_size=patch)
        assert tree.count(model.abstract()[0]["params"]) == count
        if patch == 16:
            assert model.flops(224, 224) == pytest.approx(2 * 17.56e9, rel=2e-3)
    with pytest.raises(InputError, match="legal: .2, 4, 8."):
        MODELS["vit"](**TINY | dict(patch_size=3))


def test_positions_at_another_resolution(x64):
    """A linear ramp over the grid stays the ramp, sampled at the centres of the new patches."""
    ramp = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij"), -1).reshape(16, 2)
    same = resized(jnp.asarray(ramp), 4, (4, 4))
    np.testing.assert_array_equal(same, ramp)
    tall = np.asarray(resized(jnp.asarray(ramp), 4, (8, 4))).reshape(8, 4, 2)
    centres = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    np.testing.assert_allclose(tall[:, :, 0], np.broadcast_to(centres[:, None], (8, 4)), atol=1e-6)
    np.testing.assert_allclose(tall[:, :, 1], np.broadcast_to(np.arange(4.0), (8, 4)), atol=1e-6)
    # The parameters of one resolution fit a model for another one, by way of `grid`.
    small = MODELS["vit"](**TINY)
    large = MODELS["vit"](**TINY | dict(image_size=16, grid=2))
    assert jax.tree.map(lambda s: s.shape, small.abstract()[0]) == jax.tree.map(lambda s: s.shape, large.abstract()[0])
    out = jax.eval_shape(
        lambda v, x: large.apply(v, train=False, image=x).hidden, large.abstract()[0], np.zeros((1, 16, 16, 2), "f4")
    )
    assert out.shape == (1, 8)
