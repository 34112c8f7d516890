"""Closed forms against the compiler's count, published numbers, and the models themselves."""

import jax
import jax.numpy as jnp
import pytest

from bigmodel_jax import flops
from bigmodel_jax.models import MODELS

SHAPE = {"layers": 2, "width": 64, "heads": 4, "head_dim": 16, "mlp": 256, "vocab": 512, "length": 32}


def _cost(layers, gated, kv_heads):
    """FLOPs XLA counts in loss and gradient of a hand-written, unrolled, matmul-only stack."""
    d, h, k, f, v, length, batch = 64, 4, 16, 256, 512, 32, 2
    g = kv_heads

    def forward(p, x):
        for w in p["layers"]:
            q = jnp.einsum("bld,dgrk->blgrk", x, w["q"])
            key, value = jnp.einsum("bld,dgk->blgk", x, w["k"]), jnp.einsum("bld,dgk->blgk", x, w["v"])
            scores = jnp.einsum("blgrk,bmgk->bgrlm", q, key)
            mixed = jnp.einsum("bgrlm,bmgk->blgrk", scores, value)
            x = jnp.einsum("blgrk,grkd->bld", mixed, w["o"])
            up = x @ w["up"]
            x = (up * (x @ w["gate"]) if gated else up) @ w["down"]
        return jnp.vdot(x @ p["head"], x @ p["head"])

    shapes = {
        "q": (d, g, h // g, k),
        "k": (d, g, k),
        "v": (d, g, k),
        "o": (g, h // g, k, d),
        "up": (d, f),
        "down": (f, d),
    }
    shapes |= {"gate": (d, f)} if gated else {}
    make = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    params = {
        "layers": [{n: make(s) for n, s in shapes.items()} for _ in range(layers)],
        "head": make((d, v)),
    }
    compiled = jax.jit(jax.grad(forward, argnums=(0, 1))).lower(params, make((batch, length, d))).compile()
    return compiled.cost_analysis()["flops"] / (batch * length)


def training_flops(**shape) -> float:
    return flops.training(flops.transformer_forward(**shape))


@pytest.mark.parametrize("gated,kv_heads", [(False, 4), (True, 2)])
def test_training_flops_equal_the_compilers_count(gated, kv_heads):
    ours = training_flops(**SHAPE, gated=gated, kv_heads=kv_heads)
    theirs = _cost(2, gated, kv_heads)
    assert ours == pytest.approx(theirs, rel=0.02)
    wrong = training_flops(**{**SHAPE, "layers": 1}, gated=gated, kv_heads=kv_heads)
    assert wrong != pytest.approx(theirs, rel=0.02)


def test_gpt2_124m_is_six_n_plus_attention():
    shape = {
        "layers": 12,
        "width": 768,
        "heads": 12,
        "head_dim": 64,
        "mlp": 3072,
        "vocab": 50257,
        "length": 1024,
    }
    n = 12 * 12 * 768**2 + 50257 * 768
    assert n == 123_532_032
    assert training_flops(**shape) == 6 * n + 12 * 12 * 1024 * 768


# MACs at 224 of torchvision's models (stride in the 3x3), as its model tables publish them.
@pytest.mark.parametrize("depth, gmacs", [(18, 1.814), (34, 3.664), (50, 4.089), (101, 7.801), (152, 11.514)])
def test_resnets_at_224(depth, gmacs):
    assert MODELS["resnet"](depth=depth).flops(224, 224) / 2e9 == pytest.approx(gmacs, rel=1e-3)


def test_resnet20_on_cifar():
    # He et al. 2015, section 4.2; 40.55 million multiply-accumulates without shortcut parameters.
    ours = MODELS["resnet"](depth=20, num_classes=10).flops(32, 32)
    assert ours / 2e6 == pytest.approx(40.55, rel=2e-3)


def test_utilisation():
    assert flops.utilisation(1e15, 2.0, None) is None
    assert flops.utilisation(989.4e12, 2.0, 989.4e12, devices=2) == pytest.approx(0.25)
