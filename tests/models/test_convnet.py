"""Plain convolutional networks against numpy, published sizes, dropout by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import MODELS
from bigmodel_jax.models.convnet import FORMS

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
WIDE = dict(dtype="float64", param_dtype="float64")


def np_net(p, x, stages, activation, reduce):
    for n, (_, k, stride, padding, side, step) in enumerate(stages):
        w = p[f"conv{n}"]
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        windows = sliding_window_view(x, (k, k), axis=(1, 2))[:, ::stride, ::stride]
        x = activation(np.einsum("bhwcij,ijco->bhwo", windows, w["kernel"]) + w["bias"])
        if side:
            x = reduce(sliding_window_view(x, (side, side), axis=(1, 2))[:, ::step, ::step], axis=(-1, -2))
    x = x.reshape(len(x), -1)
    for n in range(2):
        if f"layer{n}" in p:
            x = activation(x @ p[f"layer{n}"]["kernel"] + p[f"layer{n}"]["bias"])
    return x @ p["head"]["kernel"] + p["head"]["bias"]


def relu(x):
    return np.maximum(x, 0)


SMALL_ALEX = ((4, 5, 2, 2, 3, 2), (5, 3, 1, 1, 0, 0), (6, 3, 1, 1, 3, 2))


@pytest.mark.parametrize(
    ("options", "size", "stages", "activation", "reduce"),
    [
        (dict(form="lenet5"), 28, FORMS["lenet5"].stages, np.tanh, np.mean),
        (dict(form="alexnet", stages=SMALL_ALEX, hidden=(7, 5)), 31, SMALL_ALEX, relu, np.max),
    ],
)
def test_network_equals_numpy(options, size, stages, activation, reduce, x64):
    model = MODELS["convnet"](num_classes=3, in_channels=2, image_size=size, **options, **WIDE)
    r = np.random.default_rng(0)
    v = jax.tree.map(lambda s: jnp.asarray(0.3 * r.normal(size=s.shape)), model.abstract()[0])
    x = r.normal(size=(2, size, size, 2))

    def logits(v, x):
        out = model.apply(v, train=False, image=x)
        return out.head(out.hidden)

    got = jax.jit(logits, compiler_options=QUICK)(v, x)
    p = jax.tree.map(np.asarray, v["params"])
    expected = np_net(p, x, stages, activation, reduce)
    np.testing.assert_allclose(got, expected, atol=1e-10)
    other = {np.mean: np.max, np.max: np.mean}[reduce]
    assert np.abs(np_net(p, x, stages, activation, other) - expected).max() > 1e-3


def test_published_sizes():
    """LeNet-5 on 32 x 32 has 61,706 parameters with C3 fully connected; AlexNet 61,100,840 and 0.714 G
    multiply-adds, as in torchvision."""
    lenet = MODELS["convnet"](
        num_classes=10, in_channels=1, image_size=32, stages=((6, 5, 1, 0, 2, 2), (16, 5, 1, 0, 2, 2))
    )
    assert tree.count(lenet.abstract()[0]["params"]) == 61_706
    alexnet = MODELS["convnet"](num_classes=1000, in_channels=3, image_size=224, form="alexnet")
    assert tree.count(alexnet.abstract()[0]["params"]) == 61_100_840
    assert alexnet.flops(224, 224) == 2 * 714_188_480
    small = MODELS["convnet"](num_classes=10, in_channels=3, image_size=32, form="alexnet_small", width=0.5)
    shapes = tree.flatten(small.abstract()[0]["params"])
    assert shapes["conv4/kernel"].shape == (3, 3, 128, 128) and shapes["layer0/kernel"].shape == (4 * 4 * 128, 512)
    with pytest.raises(InputError, match="8 pixels is 4 wide at convolution 1"):
        MODELS["convnet"](num_classes=10, in_channels=1, image_size=8)
    with pytest.raises(InputError, match="did you mean 'lenet5'"):
        MODELS["convnet"](num_classes=10, in_channels=1, image_size=28, form="lenet-5")


def test_dropout_belongs_to_the_row_and_trains_only():
    model = MODELS["convnet"](num_classes=3, in_channels=1, image_size=8, form="lenet_small", dropout=0.5)
    shapes = model.abstract()[0]
    r = np.random.default_rng(0)
    v = jax.tree.map(lambda s: jnp.asarray(0.3 * r.normal(size=s.shape), jnp.float32), shapes)
    keys = jax.random.split(jax.random.key(0), 2)

    def runs(image, keys):
        def hidden(train, rows):
            return model.apply(v, train=train, rngs={"dropout": keys[rows]}, image=image[rows]).hidden

        return hidden(True, slice(None)), hidden(True, slice(1, 2)), hidden(False, slice(None))

    both, alone, plain = jax.jit(runs, compiler_options=QUICK)(jnp.ones((2, 8, 8, 1)), keys)
    np.testing.assert_allclose(alone[0], both[1], atol=1e-4)
    assert np.abs(both[0] - both[1]).max() > 1.0
    np.testing.assert_allclose(plain[0], plain[1], atol=1e-4)
