"""ResNets against numpy: convolution, norms, whole networks, and the promises about groups of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import conv as C
from bigmodel_jax.models.resnet import merge, resnet
from bigmodel_jax.parallel import mesh as meshes
from bigmodel_jax.parallel import rules

TINY = dict(depth=8, channels=4, num_classes=5, in_channels=3, projection="conv")


def randomised(model, seed=0, dtype=np.float64):
    """Variables with nothing at 0 or 1: every scale, bias and statistic matters."""
    r = np.random.default_rng(seed)
    shapes, _ = model.abstract()

    def leaf(path, s):
        x = r.normal(size=s.shape)
        low = 0.5 if path.endswith(("var", "scale")) else 0.0
        return jnp.asarray(low + np.abs(x) if low else 0.4 * x, dtype)

    return tree.map_paths(leaf, shapes)


def image(n=4, side=8, seed=1):
    return np.random.default_rng(seed).normal(size=(n, side, side, 3))


def logits(model, variables, x, train=False):
    out = model.apply(variables, train=train, image=jnp.asarray(x))
    return out.head(out.hidden)


# --- an independent network in numpy ---


def np_conv(x, w, stride):
    k = w.shape[0]
    p = (k - 1) // 2
    x = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    windows = sliding_window_view(x, (k, k), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", windows, w)


def np_norm(x, p, s, eps=1e-5):
    return (x - s["mean"]) / np.sqrt(s["var"] + eps) * p["scale"] + p["bias"]


def np_resnet(variables, x, version, blocks, strides):
    """strides: of each convolution of a block that halves the image. Evaluation mode."""
    p, s = variables["params"], variables["stats"]
    relu = lambda a: np.maximum(a, 0)  # noqa: E731
    x = np_conv(x, p["stem"]["conv"]["kernel"], 1)
    if version == "v1.5":
        x = relu(np_norm(x, p["stem"]["norm"], s["stem"]["norm"]))
    for stage in range(len(blocks)):
        for block in range(blocks[stage]):
            name = (str(stage + 1), f"block{block + 1}")
            bp, bs = p["stages"][name[0]][name[1]], s["stages"][name[0]][name[1]]
            halve = stage > 0 and block == 0
            y, skip = x, x
            for i, own in enumerate(strides, 1):
                stride = own if halve else 1
                if version == "v2":
                    y = relu(np_norm(y, bp[f"norm{i}"], bs[f"norm{i}"]))
                    if i == 1 and "project" in bp:
                        skip = np_conv(y, bp["project"]["kernel"], max(strides) if halve else 1)
                    y = np_conv(y, bp[f"conv{i}"]["kernel"], stride)
                else:
                    y = np_norm(np_conv(y, bp[f"conv{i}"]["kernel"], stride), bp[f"norm{i}"], bs[f"norm{i}"])
                    y = relu(y) if i < len(strides) else y
            if version == "v1.5" and "project" in bp:
                skip = np_conv(x, bp["project"]["kernel"], max(strides) if halve else 1)
                skip = np_norm(skip, bp["project_norm"], bs["project_norm"])
            x = skip + y if version == "v2" else relu(skip + y)
    if version == "v2":
        x = relu(np_norm(x, p["norm"], s["norm"]))
    return x.mean(axis=(1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize(
    ("version", "block", "strides"),
    [("v1.5", "basic", (2, 1)), ("v1.5", "bottleneck", (1, 2, 1)), ("v2", "bottleneck", (1, 2, 1))],
)
def test_network_equals_numpy(x64, version, block, strides):
    model = resnet(**TINY, version=version, block=block, blocks=(2, 1), dtype="float64", param_dtype="float64")
    v = randomised(model)
    host = jax.tree.map(np.asarray, v)
    expected = np_resnet(host, image(), version, (2, 1), strides)
    got = jax.jit(lambda v, x: logits(model, v, x))(v, image())
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)
    # v1 proper has the bottleneck's stride on its first convolution: that must show.
    wrong = tuple(sorted(strides, reverse=True)) if len(strides) == 3 else strides[::-1]
    assert np.abs(np_resnet(host, image(), version, (2, 1), wrong) - expected).max() > 1e-3


@pytest.mark.parametrize("depth_params_macs", [
    (18, 11_689_512, 1_814_073_344), (34, 21_797_672, 3_663_761_408), (50, 25_557_032, 4_089_184_256),
    (101, 44_549_160, 7_801_405_440), (152, 60_192_808, 11_513_626_624),
])  # fmt: skip
def test_parameters_and_flops_are_the_published_ones(depth_params_macs):
    """Counts of the torchvision models of the same name, and their multiply-adds at 224x224."""
    depth, count, macs = depth_params_macs
    model = resnet(depth=depth)
    assert tree.count(model.abstract()[0]["params"]) == count
    assert model.flops(224, 224) == 2 * macs


def test_cifar_networks_are_those_of_section_4_2():
    """0.27 M, 0.85 M, 1.7 M parameters (table 6), and no parameter in the shortcuts."""
    for depth, count in ((20, 269_722), (56, 853_018), (110, 1_727_962)):
        params = resnet(depth=depth, num_classes=10).abstract()[0]["params"]
        assert tree.count(params) == count
    plain = resnet(depth=110, num_classes=10, shortcut=False).abstract()[0]["params"]
    assert jax.tree.structure(plain) == jax.tree.structure(params)


def test_plain_twin_adds_nothing(x64):
    options = dict(TINY, blocks=(1, 1), projection="pad", dtype="float64", param_dtype="float64")
    full, plain = resnet(**options), resnet(**options, shortcut=False)
    v = randomised(full)
    # With every branch silent a plain network sees nothing, a residual one sees the stem.
    quiet = tree.map_paths(lambda p, x: 0 * x if "/norm2/" in p and p.startswith("params") else x, v)
    assert np.ptp(logits(plain, quiet, image()), axis=0).max() == 0
    assert np.ptp(logits(full, quiet, image()), axis=0).max() > 1e-3


# --- convolution ---


@pytest.mark.parametrize(("b", "h", "w", "c", "o", "k", "stride"), [
    (4, 16, 17, 3, 5, 3, 1),   # kernel gradient by rows
    (3, 32, 16, 2, 3, 3, 1),
    (4, 2, 2, 8, 5, 3, 1),     # patches
    (2, 4, 4, 256, 3, 3, 2),
    (2, 9, 8, 3, 4, 1, 2),     # 1x1
    (2, 8, 8, 3, 4, 7, 2),     # XLA's own
])  # fmt: skip
def test_conv_is_lax_conv_forward_and_backward(b, h, w, c, o, k, stride):
    r = np.random.default_rng(0)
    x = r.normal(size=(b, h, w, c)).astype(np.float32)
    kernel = r.normal(size=(k, k, c, o)).astype(np.float32)

    def all_three(conv):
        def fn(x, kernel):
            y, back = jax.vjp(conv, x, kernel)
            return y, *back(jnp.cos(y))

        return jax.jit(fn)(x, kernel)

    ours = all_three(lambda a, b: C.conv(a, b, stride))
    reference = all_three(lambda a, b: C.lax_conv(a, b, stride, C.same(k)))
    flipped = all_three(lambda a, b: C.lax_conv(a, b[:, ::-1], stride, C.same(k)))
    for got, want in zip(ours, reference, strict=True):
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    if k > 1:
        assert np.abs(ours[0] - flipped[0]).max() > 0.1
    np.testing.assert_allclose(ours[0], np_conv(x, kernel, stride), atol=1e-3)


def test_platform_is_chosen_when_lowered():
    x, kernel = jnp.zeros((2, 2, 2, 8)), jnp.zeros((3, 3, 8, 4))
    fn = jax.jit(jax.grad(lambda x, k: C.conv(x, k).sum(), (0, 1)))
    lowered = {p: fn.trace(x, kernel).lower(lowering_platforms=(p,)) for p in ("cpu", "tpu", "cuda")}
    text = {platform: program.as_text() for platform, program in lowered.items()}
    assert "stablehlo.convolution" not in text["cpu"] and "stablehlo.dot_general" in text["cpu"]
    for platform in ("tpu", "cuda"):
        assert "stablehlo.convolution" in text[platform] and "stablehlo.dot_general" not in text[platform]
    assert "conditional" not in lowered["cpu"].compile().as_text()


def test_max_pool():
    x = image(2, 7)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    expected = sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(-1, -2))
    np.testing.assert_array_equal(C.max_pool(jnp.asarray(x, jnp.float32)), expected.astype(np.float32))


# --- norms ---


def test_batch_norm_closed_form(x64):
    r = np.random.default_rng(0)
    x, scale, bias = r.normal(2, 3, (6, 3, 2, 4)), r.normal(size=4), r.normal(size=4)
    y, mean, var = C.batch_norm(jnp.asarray(x), scale, bias, 2, 1e-5)
    groups = x.reshape(3, 2 * 3 * 2, 4)
    m, v = groups.mean(1, keepdims=True), groups.var(1, keepdims=True)
    expected = ((groups - m) / np.sqrt(v + 1e-5) * scale + bias).reshape(x.shape)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(mean, groups.mean(1).mean(0), atol=1e-12)
    np.testing.assert_allclose(var, groups.var(1, ddof=1).mean(0), atol=1e-12)
    assert np.abs(C.batch_norm(jnp.asarray(x), scale, bias, 3, 1e-5)[0] - expected).max() > 1e-2


def test_batch_norm_gradient_by_finite_differences(x64):
    r = np.random.default_rng(0)
    x, dy = r.normal(size=(4, 2, 2, 2)), r.normal(size=(4, 2, 2, 2))
    scale, bias = r.normal(size=2), r.normal(size=2)
    f = jax.jit(lambda x, s: (C.batch_norm(x, s, bias, 2, 1e-5)[0] * dy).sum())
    gx, gs = jax.grad(f, (0, 1))(x, scale)
    for at in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[at] = 1e-5
        assert abs((f(x + step, scale) - f(x - step, scale)) / 2e-5 - gx[at]) < 1e-7
    for c in range(2):
        step = 1e-5 * np.eye(2)[c]
        assert abs((f(x, scale + step) - f(x, scale - step)) / 2e-5 - gs[c]) < 1e-7


def test_group_norm_closed_form(x64):
    x = image(3, 4)[..., [0, 1, 2, 0, 1, 2]] + np.arange(6)
    norm = C.GroupNorm(groups=2, param_dtype=jnp.float64)
    scale, bias = np.linspace(0.5, 2, 6), np.linspace(-1, 1, 6)
    y = norm.apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x), True)
    g = x.reshape(3, 16, 2, 3)
    z = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, z.reshape(x.shape) * scale + bias, atol=1e-12)


def loss_and_updates(model, v, x, weights=None):
    def fn(params):
        out = model.apply({**v, "params": params}, train=True, image=x)
        w = jnp.cos(jnp.arange(out.hidden.shape[0] * 5).reshape(-1, 5)) if weights is None else weights
        return (out.head(out.hidden) * w).sum(), out.updates

    (loss, updates), grads = jax.value_and_grad(fn, has_aux=True)(v["params"])
    return loss, grads, updates


def worst(a, b):
    """Largest error of a leaf over its largest entry (floor: 1e-6 of the largest leaf)."""
    a, b = tree.flatten(a), tree.flatten(b)
    top = max(float(jnp.abs(x).max()) for x in a.values())
    return max(float(jnp.abs(a[k] - b[k]).max()) / max(float(jnp.abs(a[k]).max()), 1e-6 * top) for k in a)


def test_accumulation_and_layout_agree_for_one_group_size(x64):
    options = dict(TINY, blocks=(1,), dtype="float64", param_dtype="float64")
    model = resnet(**options, bn_group=2)
    v, x = randomised(model), jnp.asarray(image(8))
    w = jnp.cos(jnp.arange(40.0).reshape(8, 5))
    step = jax.jit(lambda v, x, w: loss_and_updates(model, v, x, w))
    whole = step(v, x, w)
    parts = [step(v, x[i : i + 4], w[i : i + 4]) for i in (0, 4)]
    summed = jax.tree.map(lambda a, b: a + b, *parts)
    assert worst(whole[:2], summed[:2]) < 1e-10
    assert worst(whole[2], jax.tree.map(lambda u: u / 2, summed[2])) < 1e-10

    other = resnet(**options, bn_group=4)
    assert worst(whole[1], jax.jit(lambda v, x, w: loss_and_updates(other, v, x, w))(v, x, w)[1]) > 1e-3

    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with rules.use(rules.Layout(mesh)):
        rows = meshes.batch_sharding(mesh, accumulated=False)
        _, axes = model.abstract()
        placed = jax.device_put(v, rules.shardings(axes, v, mesh))
        spread = jax.jit(lambda v, x, w: loss_and_updates(model, v, x, w))(placed, jax.device_put(x, rows), w)
    assert worst(whole, jax.device_get(spread)) < 1e-10


def test_updates_merge_once_and_evaluation_uses_them():
    model = resnet(**TINY, blocks=(1,), bn_momentum=0.75)
    v = jax.jit(model.init)(jax.random.key(0))
    x = jnp.asarray(image(4), jnp.float32)
    updates = model.apply(v, train=True, image=x).updates
    assert jax.tree.structure(updates) == jax.tree.structure(v["stats"])
    merged = model.merge(v["stats"], updates)
    stem = {k: np.asarray(t["stem"]["norm"]["var"]) for k, t in (("u", updates), ("m", merged))}
    np.testing.assert_allclose(stem["m"], 0.75 + 0.25 * stem["u"], rtol=1e-6)
    seen = C.lax_conv(x, v["params"]["stem"]["conv"]["kernel"], 1, C.same(3))
    np.testing.assert_allclose(stem["u"], np.var(seen, axis=(0, 1, 2), ddof=1), rtol=1e-5)
    out = model.apply(v, train=False, image=x)
    assert out.updates == {}
    assert np.abs(out.hidden - model.apply(v | {"stats": merged}, train=False, image=x).hidden).max() > 1e-3
    assert merge({}, {}, 0.9) == {}


# --- options ---


@pytest.mark.parametrize("version", ["v1.5", "v2"])
def test_zero_init_starts_at_the_identity_and_can_leave_it(version):
    model = resnet(**TINY, blocks=(1,), version=version)
    x = jnp.asarray(image(4), jnp.float32)
    start = jax.jit(lambda m, key: loss_and_updates(m, m.init(key), x)[1], static_argnums=0)
    grads = start(model, jax.random.key(0))
    flat = tree.flatten(grads["stages"])
    door = "norm2/scale" if version == "v1.5" else "conv2/kernel"
    assert all(np.abs(g).max() > 1e-6 for k, g in flat.items() if k.endswith(door))
    assert all(np.abs(g).max() == 0 for k, g in flat.items() if k.endswith("conv1/kernel"))
    awake = resnet(**TINY, blocks=(1,), version=version, zero_init=False)
    grads = start(awake, jax.random.key(0))
    assert np.abs(grads["stages"]["1"]["block1"]["conv1"]["kernel"]).max() > 1e-6


def test_initial_kernels_have_he_variance():
    model = resnet(depth=18, blocks=(1,), channels=128, num_classes=5, zero_init=False)
    v = jax.jit(model.init)(jax.random.key(0))
    kernel = np.asarray(v["params"]["stages"]["1"]["block1"]["conv2"]["kernel"])
    assert abs(kernel.std() / np.sqrt(2 / (9 * 128)) - 1) < 0.01
    assert set(np.unique(v["params"]["stages"]["1"]["block1"]["norm2"]["scale"])) == {1.0}


def test_remat_and_bfloat16():
    x = jnp.asarray(image(4), jnp.float32)
    runs = {}
    for name, more in (("plain", {}), ("remat", {"remat": "full"}), ("bf16", {"dtype": "bfloat16"})):
        model = resnet(**TINY, blocks=(1,), zero_init=False, **more)
        v = randomised(model, dtype=np.float32)
        runs[name] = jax.jit(lambda v, x, m=model: loss_and_updates(m, v, x))(v, x)
    assert worst(runs["plain"], runs["remat"]) < 1e-5
    assert {g.dtype for g in jax.tree.leaves(runs["bf16"])} == {jnp.dtype("float32")}
    error = abs(runs["plain"][0] - runs["bf16"][0]) / abs(runs["plain"][0])
    assert 1e-6 < error < 0.1


@pytest.mark.parametrize(("options", "message"), [
    ({"depth": 19}, "no ResNet of depth 19.*6n\\+2"),
    ({"version": "v3"}, "version 'v3' is none of v1, v1.5, v2"),
    ({"stem": "cifer"}, "did you mean 'cifar'"),
    ({"norm": "group", "channels": 16}, "gn_groups 32 does not divide 16 channels; legal: .1, 2, 4, 8, 16"),
])  # fmt: skip
def test_impossible_options(options, message):
    with pytest.raises(InputError, match=message):
        resnet(**options)


def trace(model, shape, train):
    """Shapes of the result; errors show when tracing."""
    variables, _ = model.abstract()
    return jax.eval_shape(lambda v, x: model.apply(v, train=train, image=x).hidden, variables, jnp.zeros(shape))


def test_impossible_inputs():
    model = resnet(**TINY, blocks=(1,), bn_group=3)
    assert trace(model, (6, 8, 8, 3), True).shape == (6, 4)
    with pytest.raises(InputError, match=r"bn_group 3 does not divide 4 rows; legal sizes: \[1, 2, 4\]"):
        trace(model, (4, 8, 8, 3), True)
    with pytest.raises(InputError, match=r"images are \(4, 8, 8, 1\), the model takes \[batch, height, width, 3\]"):
        trace(model, (4, 8, 8, 1), False)
    with pytest.raises(InputError, match="single value per channel"):
        trace(resnet(**TINY, blocks=(1, 1), bn_group=1), (2, 1, 1, 3), True)


def test_module_paths_are_what_the_docstring_says():
    shapes, axes = resnet(depth=50).abstract()
    names = set(tree.flatten(shapes["params"]))
    for path in ("stem/conv/kernel", "stages/1/block2/conv3/kernel", "stages/2/block1/project/kernel", "head/kernel"):
        assert path in names
    flat = tree.flatten(axes["params"], is_leaf=lambda a: isinstance(a, tuple))
    assert flat["stem/conv/kernel"] == (None, None, "conv_in", "conv_out")
    assert flat["head/kernel"] == ("conv_in", "classes") and flat["stem/norm/scale"] == ("norm",)
