"""ResNet and ViT as published: configs in both directions, every weight there and back, statistics included."""

import json

import numpy as np
import pytest

from bigmodel_jax.errors import InputError
from bigmodel_jax.hf import FAMILIES, published
from bigmodel_jax.hf import safetensors as st
from bigmodel_jax.hf.rows import Plan

RESNET = {
    "model_type": "resnet", "architectures": ["ResNetForImageClassification"], "num_channels": 3, "embedding_size": 4,
    "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "bottleneck", "hidden_act": "relu",
    "downsample_in_first_stage": False, "id2label": {"0": "cat", "1": "dog", "2": "owl"},
}  # fmt: skip
VIT = {
    "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8, "patch_size": 4, "num_channels": 3,
    "hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-12, "id2label": {"0": "cat", "1": "dog", "2": "owl"},
}  # fmt: skip
CASES = {
    "bottleneck": RESNET,
    "bottleneck v1": RESNET | {"downsample_in_bottleneck": True},
    "basic": RESNET | {"layer_type": "basic", "hidden_sizes": [4, 8]},
    "vit": VIT,
    "vit without qkv bias": VIT | {"qkv_bias": False},
    "vit features": VIT | {"architectures": ["ViTModel"]},
}


def section_of(config):
    return published.complete(FAMILIES[config["model_type"]].config(config))


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_bitwise(name, tmp_path):
    """Random tensors under the published names -> our parameters -> the same bytes under the same names."""
    config = CASES[name]
    section = section_of(config)
    shapes = published.shapes_of(published.build(section))
    plan = Plan(FAMILIES[config["model_type"]].rows(section), shapes)
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=shape).astype(np.float32) for n, shape in plan.foreign.items()}
    if "resnet" in config["model_type"]:
        counters = {n.replace("running_mean", "num_batches_tracked") for n in tensors if n.endswith("running_mean")}
        tensors |= {n: np.zeros((), np.int64) for n in counters}
    spec = {n: (x.dtype, x.shape) for n, x in tensors.items()}
    st.write_folder(tmp_path, spec, tensors.__getitem__, st.SHARD_BYTES)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = published.open_folder(str(tmp_path))
    ours = dict(found.parameters())
    assert set(ours) == set(shapes) and set(found.ignored) == {n for n in tensors if n.endswith("tracked")}
    published.write_folder(str(tmp_path / "out"), found.section, ours, found.origin)
    back = st.open_tensors(tmp_path / "out")
    assert set(back) == set(tensors)  # the counters of batches too, which the reference wants
    assert all(back.read(n).tobytes() == tensors[n].tobytes() for n in back)
    # Without what the import kept, the config still says the same network.
    kind, config = published.express(found.section)
    assert kind == config["model_type"] == CASES[name]["model_type"] and section_of(config) == section


def test_the_stride_and_the_published_depths():
    """v1.5 has the bottleneck's stride on the 3x3 convolution; a published depth is read as such."""
    for name, strides in (("bottleneck", [1, 2, 1]), ("bottleneck v1", [2, 1, 1]), ("basic", [2, 1])):
        plan = published.build(section_of(CASES[name])).module.plan
        assert [stride for _, _, stride in plan.branch(1, 0)] == strides
    fifty = RESNET | {"embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]}
    section = section_of(fifty)
    assert section["depth"] == 50 and section["blocks"] == () and section["channels"] == 0
    narrow = published.complete({"name": "resnet", "depth": 18, "width": 0.5, "bn_group": 8, "num_classes": 3})
    kind, config = published.express(narrow)
    assert (kind, config["embedding_size"], config["depths"]) == ("resnet", 32, [2, 2, 2, 2])


def test_layouts_put_numbers_where_torch_reads_them():
    """A torch convolution is y[o] = sum over c, i, j of W[o, c, i, j] x[c, i, j]; a patch is one such sum."""
    from bigmodel_jax.hf.vision import kernel

    rng = np.random.default_rng(1)
    w, x = rng.normal(size=(5, 3, 4, 4)), rng.normal(size=(3, 4, 4))
    (ours,) = kernel.to_ours(w)
    np.testing.assert_allclose(np.einsum("ijc,ijco->o", x.transpose(1, 2, 0), ours), np.einsum("cij,ocij->o", x, w))
    assert np.abs(np.einsum("jic,ijco->o", x.transpose(1, 2, 0), ours) - np.einsum("cij,ocij->o", x, w)).max() > 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RESNET | {"hidden_sizes": [16, 48]}, "'hidden_sizes' = .16, 48. is not supported here, only .16, 32."),
        (RESNET | {"downsample_in_first_stage": True}, "downsample_in_first_stage"),
        (RESNET | {"hidden_act": "gelu"}, "hidden_act"),
        (RESNET | {"depths": [2, -1]}, "'depths' = -1 should be a positive integer"),
        (RESNET | {"architectures": ["ResNetModel"]}, "ResNetModel"),
        (VIT | {"pooler_act": "relu"}, "pooler_act"),
        (VIT | {"patch_size": 3}, "patch_size 3 does not divide image_size 8"),
        (VIT | {"image_size": [8, 4]}, "image_size"),
    ],
)
def test_what_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        published.build(section_of(config))
    cifar = published.complete({"name": "resnet", "depth": 20, "num_classes": 3})
    with pytest.raises(InputError, match="no published form"):
        published.express(cifar)
