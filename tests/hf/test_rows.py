"""Tables of names: layouts are bitwise inverses, and nothing is left over silently."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from bigmodel_jax.errors import InputError
from bigmodel_jax.hf import FAMILIES, published, rows
from bigmodel_jax.hf import safetensors as st
from bigmodel_jax.hf.rows import Plan, Row, Tied, View

H, K, D = 3, 4, 5
# name: (layout, shapes of the foreign tensors, shapes of ours)
LAYOUTS = {
    "same": (rows.same, [(D, 2)], [(D, 2)]),
    "transpose": (rows.transpose, [(7, D)], [(D, 7)]),
    "heads_in": (rows.heads_in(H), [(H * K, D)], [(D, H, K)]),
    "heads_out": (rows.heads_out(H), [(D, H * K)], [(H, K, D)]),
    "heads_bias": (rows.heads_bias(H), [(H * K,)], [(H, K)]),
    "fused": (rows.then(rows.split(3), rows.heads_in(H)), [(3 * H * K, D)], [(D, H, K)] * 3),
    "fused bias": (rows.then(rows.split(3), rows.heads_bias(H)), [(3 * H * K,)], [(H, K)] * 3),
    "per head": (rows.then(rows.split_heads(H), rows.heads_in(H)), [(H * 3 * K, D)], [(D, H, K)] * 3),
    "per head bias": (rows.then(rows.split_heads(H), rows.heads_bias(H)), [(H * 3 * K,)], [(H, K)] * 3),
    "experts": (rows.stack(rows.transpose), [(7, D)] * 4, [(4, D, 7)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=10, deadline=None)
@given(dtype=some.sampled_from(["float32", "float16", "int8", ml_dtypes.bfloat16]), seed=some.integers(0, 99))
def test_layouts_are_bitwise_inverses(name, dtype, seed):
    layout, theirs, ours = LAYOUTS[name]
    rng = np.random.default_rng(seed)
    foreign = [(rng.normal(size=shape) * 50).astype(dtype) for shape in theirs]
    there = layout.to_ours(*foreign)
    assert [x.shape for x in there] == ours
    back = layout.to_foreign(*there)
    assert all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(foreign, back, strict=True))
    assert len(back) == len(foreign)
    again = layout.to_ours(*layout.to_foreign(*there))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(there, again, strict=True))


def test_layouts_put_numbers_where_torch_reads_them():
    """Against the definition: foreign linear layers compute y = W x, heads are consecutive blocks of y."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=D), rng.normal(size=(H * K, D))
    (ours,) = rows.heads_in(H).to_ours(w)
    np.testing.assert_allclose(np.einsum("d,dhk->hk", x, ours), (w @ x).reshape(H, K))
    y, out = rng.normal(size=(H, K)), rng.normal(size=(D, H * K))
    (ours,) = rows.heads_out(H).to_ours(out)
    np.testing.assert_allclose(np.einsum("hk,hkd->d", y, ours), out @ y.reshape(-1))
    fused = rng.normal(size=(3 * H * K, D))  # NeoX: head by head its q, k and v
    q, k, v = LAYOUTS["per head"][0].to_ours(fused)
    mixed = (fused @ x).reshape(H, 3, K)
    for i, part in enumerate((q, k, v)):
        np.testing.assert_allclose(np.einsum("d,dhk->hk", x, part), mixed[:, i])


@dataclasses.dataclass
class Box:
    """A foreign model in memory."""

    tensors: dict[str, np.ndarray]

    def __iter__(self):
        return iter(self.tensors)

    def __contains__(self, name):
        return name in self.tensors

    def shape(self, name):
        return self.tensors[name].shape

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name):
        return self.tensors[name]


TABLE = [
    Row("emb", "embed"),
    Row("h.{n}.qkv", ("layers/q", "layers/k", "layers/v"), rows.then(rows.split(3), rows.heads_in(2))),
    Row(("h.{n}.e.0", "h.{n}.e.1"), "layers/experts", rows.stack(rows.transpose)),
    Row("h.{n}.even", "layers/even", start=0, step=2),
    Tied("out", "emb"),
]


def small(layers: int = 3) -> tuple[Box, dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    tensors = {"emb": rng.normal(size=(7, 4))}
    for n in range(layers):
        tensors |= {f"h.{n}.qkv": rng.normal(size=(12, 4)), f"h.{2 * n}.even": rng.normal(size=(2,))}
        tensors |= {f"h.{n}.e.{e}": rng.normal(size=(6, 4)) for e in range(2)}
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    shapes = {
        "embed": (7, 4), **{f"layers/{x}": (layers, 4, 2, 2) for x in "qkv"},
        "layers/experts": (layers, 2, 4, 6), "layers/even": (layers, 2),
    }  # fmt: skip
    return Box(tensors), {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}


def test_there_and_back_is_bitwise_and_stacked():
    box, shapes = small()
    plan = Plan(TABLE, shapes)
    plan.check(box)
    ours = dict(plan.to_ours(box))
    assert {path: x.shape for path, x in ours.items()} == {path: x.shape for path, x in shapes.items()}
    np.testing.assert_array_equal(ours["layers/q"][2], box.read("h.2.qkv")[:4].T.reshape(4, 2, 2))
    np.testing.assert_array_equal(ours["layers/experts"][1, 1], box.read("h.1.e.1").T)
    np.testing.assert_array_equal(ours["layers/even"][2], box.read("h.4.even"))
    assert set(plan.foreign) == set(box)
    for name in plan.foreign:
        assert plan.to_foreign(name, ours).tobytes() == box.read(name).tobytes(), name


def test_every_mismatch_is_listed_at_once():
    box, shapes = small()
    plan = Plan(TABLE, shapes)
    box.tensors["h.3.qkv"] = box.tensors.pop("h.1.qkv")
    box.tensors["emb"] = np.zeros((8, 4), np.float32)
    box.tensors["mask"] = np.zeros(3, np.float32)
    with pytest.raises(InputError) as refused:
        plan.check(box, ignored=["^mask$"])
    line = str(refused.value)
    for words in ("not in the file: h.1.qkv", "not known: h.3.qkv", "emb [8, 4] instead of [7, 4]"):
        assert words in line
    assert "mask" not in line and "\n" not in line
    with pytest.raises(InputError, match="not known: h.3.qkv, mask"):
        plan.check(box)


def test_tables_that_do_not_cover_the_model():
    _, shapes = small()
    with pytest.raises(InputError, match="parameters without a row: embed; .*twice: layers/k, layers/lost"):
        Plan([*TABLE[1:], Row("x", "layers/lost"), Row("y", "layers/k")], shapes)


def test_tied_tensors_may_be_absent_and_must_be_equal():
    box, shapes = small()
    plan = Plan(TABLE, shapes)
    box.tensors["out"] = box.tensors["emb"].copy()
    plan.check(box)
    dict(plan.to_ours(box))
    box.tensors["out"][0, 0] += 1e-6
    with pytest.raises(InputError, match="'out' and 'emb' differ"):
        dict(plan.to_ours(box))


def tiny(kind: str) -> dict:
    """A foreign config of each family, small, with what an export would write."""
    sizes = {"vocab_size": 40, "num_layers": 3, "embed_dim": 16, "num_heads": 4, "max_length": 24}
    section = {
        "gpt2": {"name": "decoder", **sizes},
        "llama": {
            "name": "decoder", **sizes, "num_kv_heads": 2, "norm": "rmsnorm", "norm_bias": False, "bias": False,
            "positions": "rotary", "activation": "swiglu", "tied_embeddings": False, "mlp_dim": 40,
        },
        "bert": {"name": "encoder", **sizes, "pooler": True, "nsp": True},
    }[kind]  # fmt: skip
    return published.complete(section)


@pytest.mark.parametrize("kind, head", [
    ("gpt2", "lm"), ("gpt2", "classes"), ("llama", "lm"), ("llama", "none"), ("bert", "lm"), ("bert", "classes"),
    ("bert", "tokens"), ("bert", "spans"), ("bert", "none"),
])  # fmt: skip
def test_a_folder_there_and_back(kind, head, tmp_path):
    """Random parameters -> folder -> the same section and the same parameters; folder -> folder, bitwise."""
    section = tiny(kind) | {"head": head, "nsp": kind == "bert" and head == "lm"}
    section |= {"num_classes": 5} if head in ("classes", "tokens") else {}
    section |= {"pooler": kind == "bert" and head in ("lm", "classes", "none")}
    if kind == "gpt2" and head == "classes":
        section["head_bias"] = False
    rng = np.random.default_rng(0)
    shapes = published.shapes_of(published.build(section))
    ours = {path: rng.normal(size=leaf.shape).astype(leaf.dtype) for path, leaf in shapes.items()}
    first, second = tmp_path / "first", tmp_path / "second"
    published.write_folder(str(first), section, ours)
    found = published.open_folder(str(first))
    assert found.origin.model_type == kind
    assert published._canonical(found.section) == published._canonical(section)
    back = dict(found.parameters())
    assert back.keys() == ours.keys()
    for path in ours:
        np.testing.assert_array_equal(back[path], ours[path], err_msg=path)
    published.write_folder(str(second), found.section, back, found.origin)
    assert (first / st.SINGLE).read_bytes() == (second / st.SINGLE).read_bytes()
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    section = tiny("bert")
    shapes = published.shapes_of(published.build(section))
    rng = np.random.default_rng(1)
    ours = {path: rng.normal(size=leaf.shape).astype(leaf.dtype) for path, leaf in shapes.items()}
    published.write_folder(str(folder), section, ours)
    return folder, ours


def rewrite(folder, there, change) -> None:
    """The folder's tensors under names and dtypes that `change(name, array)` gives; None leaves one out."""
    tensors = st.open_tensors(folder)
    new = dict(pair for name in tensors if (pair := change(name, tensors.read(name))) is not None)
    st.write_folder(there, {k: (x.dtype, x.shape) for k, x in new.items()}, new.get, shard_bytes=4000)
    (there / "config.json").write_text((folder / "config.json").read_text())


def test_old_names_bare_names_and_mixed_dtypes_come_back_as_they_were(bert, tmp_path):
    """gamma and beta, no "bert." prefix, shards, norms in float32 and the rest in bfloat16, a buffer."""
    folder, ours = bert
    there, out = tmp_path / "in", tmp_path / "out"
    there.mkdir()

    def change(name, x):
        name = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
        return name, x if "LayerNorm" in name else x.astype(ml_dtypes.bfloat16)

    rewrite(folder, there, change)
    found = published.open_folder(str(there))
    assert found.origin.bare and found.section["param_dtype"] == "float32"
    parameters = dict(found.parameters())
    np.testing.assert_array_equal(parameters["embed/norm/scale"], ours["embed/norm/scale"])
    rounded = ours["layers/attn/q"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(parameters["layers/attn/q"], rounded)
    published.write_folder(str(out), found.section, parameters, found.origin, shard_bytes=4000)
    before, after = st.open_tensors(there), st.open_tensors(out)
    assert set(after) == {name.replace("gamma", "weight") for name in before}
    for name in before:
        new = after.read(name.replace("gamma", "weight"))
        assert new.dtype == before.dtype(name) and new.tobytes() == before.read(name).tobytes(), name


def test_a_bfloat16_model_stays_one(bert, tmp_path):
    rewrite(bert[0], tmp_path, lambda name, x: (name, x.astype(ml_dtypes.bfloat16)))
    found = published.open_folder(str(tmp_path))
    assert found.section["param_dtype"] == found.section["dtype"] == "bfloat16" and not found.origin.dtypes
    asked = published.open_folder(str(tmp_path), {"param_dtype": "float32"})
    assert {leaf.dtype.name for _, leaf in asked.parameters()} == {"float32"}


CONFIGS = {
    "unknown type": ({"model_type": "brt"}, "did you mean 'bert'"),
    "no type": ({"model_type": None}, "names no model_type"),
    "option": ({"position_embedding_type": "relative_key"}, "position_embedding_type.*relative_key"),
    "activation": ({"hidden_act": "gelu_nw"}, "did you mean 'gelu_new'"),
    "missing": ({"hidden_size": None}, "hidden_size"),
    "head": ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice"),
    "not a size": ({"num_hidden_layers": "6"}, "num_hidden_layers.*positive integer"),
    "too many layers": ({"num_hidden_layers": 2**31 - 1}, "num_layers = 2147483647, the file holds"),
    "too large": ({"vocab_size": 2**31 - 1}, "parameters, the file holds"),
    "other layers": ({"num_hidden_layers": 4}, "not in the file: bert.encoder.layer.3.attention"),
    "other width": ({"intermediate_size": 32}, r"intermediate.dense.bias \[64\] instead of \[32\]"),
    "heads": ({"num_attention_heads": 3}, "num_heads=3"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_refused(name, bert, tmp_path):
    import json

    changes, words = CONFIGS[name]
    rewrite(bert[0], tmp_path, lambda name, x: (name, x))
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(InputError, match=words) as refused:
        published.open_folder(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_model_without_a_published_form_is_told_the_nearest():
    with pytest.raises(InputError, match="nearest .* a 'llama', has .*model.qk_norm=False .here True."):
        published.express(tiny("llama") | {"qk_norm": True, "attention_softcap": 3.0}, "llama")
    assert set(FAMILIES) >= {"gpt2", "llama", "bert"}


def test_a_view_reads_under_other_names():
    box, _ = small()
    view = View(box, {"table": "emb"})
    assert list(view) == ["table"] and "emb" not in view and view.shape("table") == (7, 4)
    np.testing.assert_array_equal(view.read("table"), box.read("emb"))
