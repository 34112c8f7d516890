"""Hostile files are refused before memory is taken; good ones equal the reference library's, both ways."""

from __future__ import annotations

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors import numpy as reference

from bigmodel_jax.errors import InputError
from bigmodel_jax.hf import safetensors as st


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: list | None = None, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


HUGE = 1 << 61
# name: (bytes of the file, words of the refusal)
HOSTILE = {
    "empty": (b"", "too few"),
    "short": (b"\x02\0\0\0", "too few"),
    "header longer than the file": (raw({}, length=1000), "truncated"),
    "header of 2^63 bytes": (raw({}, length=1 << 63), "bound"),
    "header above the bound": (raw({}, length=st.MAX_HEADER + 1), "bound"),
    "not json": (raw(b"{nonsense"), "not JSON"),
    "a list": (raw(b"[1]"), "begin with"),
    "not utf-8": (raw(b'{"\xff\xfe": 1}'), "not JSON"),
    "deep nesting": (raw(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "not JSON"),
    "integer of many digits": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "not JSON"),
    "name twice": (raw(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'), "twice"),
    "key twice": (raw(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "twice"),
    "entry not an object": (raw({"a": 3}), "should have"),
    "field missing": (raw({"a": {"dtype": "F32", "shape": [0]}}), "should have"),
    "field too many": (raw({"a": entry(0, 0) | {"pickle": "x"}}), "should have"),
    "unknown dtype": (raw({"a": entry(0, 4, dtype="F4")}, bytes(4)), "dtype 'F4'"),
    "dtype not a string": (raw({"a": entry(0, 4, dtype=["F32"])}, bytes(4)), "dtype"),
    "negative dimension": (raw({"a": entry(0, 4, [-1, -1])}, bytes(4)), "shape"),
    "boolean dimension": (raw({"a": entry(0, 4, [True])}, bytes(4)), "shape"),
    "float dimension": (raw({"a": entry(0, 4, [1.0])}, bytes(4)), "shape"),
    "too many axes": (raw({"a": entry(0, 4, [1] * 17)}, bytes(4)), "shape"),
    "shape that overflows 64 bits": (raw({"a": entry(0, 4, [HUGE, HUGE])}, bytes(4)), "needs"),
    "shape larger than its bytes": (raw({"a": entry(0, 4, [2])}, bytes(4)), "needs 8"),
    "negative offset": (raw({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, bytes(4)), "data_offsets"),
    "offsets reversed": (raw({"a": entry(4, 0, [0])}, bytes(4)), "data_offsets"),
    "three offsets": (raw({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0, 0]}}), "data_offsets"),
    "past the end": (raw({"a": entry(0, 400)}, bytes(4)), "truncated"),
    "far past the end": (raw({"a": {"dtype": "U8", "shape": [HUGE], "data_offsets": [0, HUGE]}}), "truncated"),
    "overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps"),
    "same bytes twice": (raw({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "overlaps"),
    "gap": (raw({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "gap"),
    "hole at the start": (raw({"a": entry(4, 8)}, bytes(8)), "gap"),
    "bytes left over": (raw({"a": entry(0, 4)}, bytes(5)), "end at"),
    "data cut off": (raw({"a": entry(0, 4)}, bytes(3)), "truncated"),
    "parent path": (raw({"../../etc/passwd": entry(0, 0)}), "like a path"),
    "absolute path": (raw({"/etc/passwd": entry(0, 0)}), "like a path"),
    "windows path": (raw({"a\\b": entry(0, 0)}), "like a path"),
    "control characters": (raw({"a\x1b[2J": entry(0, 0)}), "control"),
    "lone surrogate": (raw(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "control"),
    "empty name": (raw({"": entry(0, 0)}), "0 characters"),
    "very long name": (raw({"a" * 5000: entry(0, 0)}), "5000 characters"),
    "metadata not strings": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_before_memory_is_taken(name, tmp_path):
    data, words = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError, match="to be trusted") as refused:
        st.open_tensors(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert words in str(refused.value) and str(refused.value).isprintable()
    assert peak < 3_000_000, f"{peak} bytes for a file of {len(data)}"


def test_the_same_file_unharmed_is_read(tmp_path):
    """The control of the table above: its building blocks make a good file."""
    values = np.arange(3, dtype=np.float32)
    (tmp_path / "model.safetensors").write_bytes(raw({"a": entry(0, 8), "b": entry(8, 12)}, values.tobytes()))
    tensors = st.open_tensors(tmp_path)
    np.testing.assert_array_equal(tensors.read("a"), values[:2])
    np.testing.assert_array_equal(tensors.read("b"), values[2:])


dimension = some.integers(-2, 3) | some.sampled_from([1 << 62, True, 1.5, None, "3"])
offset = some.integers(-3, 20) | some.sampled_from([1 << 63, None, "0"])
header = some.dictionaries(
    some.text(max_size=4) | some.sampled_from(["a", "../b", "__metadata__"]),
    some.fixed_dictionaries(
        {
            "dtype": some.sampled_from(["F32", "BF16", "U8", "BOOL", "F99", None]),
            "shape": some.lists(dimension, max_size=3),
            "data_offsets": some.lists(offset, max_size=3),
        }
    ),
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(about=header | some.binary(max_size=40), data=some.binary(max_size=20), cut=some.integers(0, 12))
def test_whatever_is_accepted_reads_as_the_reference_reads_it(tmp_path_factory, about, data, cut):
    """Any header: refused with one line, or every tensor is what the reference library makes of the same bytes."""
    text = raw(about, data)
    text = text[: len(text) - cut] if cut > 8 else text
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(text)
    try:
        tensors = st.open_tensors(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    theirs = dict(reference.load(text)) if not any(tensors.dtype(n) == ml_dtypes.bfloat16 for n in tensors) else None
    for name in tensors:
        array = tensors.read(name)
        assert array.nbytes <= len(data)
        if theirs is not None:
            assert array.tobytes() == theirs[name].tobytes() and array.shape == theirs[name].shape


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    out = {
        name: rng.integers(0, 2, (3, 5)).astype(name) if name == "bool" else rng.normal(size=(3, 5)).astype(name)
        for name in ("float64", "float32", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool")
    }
    return out | {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float32), "odd": np.ones(3, "u1")}


def write(folder, tensors: dict[str, np.ndarray], **options) -> list[str]:
    shapes = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    return st.write_folder(folder, shapes, lambda name: tensors[name], **options)


def test_files_are_the_reference_librarys_both_ways(tmp_path):
    mine, good = tmp_path / "model.safetensors", arrays()
    write(tmp_path, good)
    theirs = reference.load_file(mine)
    reference.save_file(good, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours = st.open_tensors(tmp_path / "theirs.safetensors")
    assert theirs.keys() == good.keys() == set(ours)
    for name, array in good.items():
        for found in (theirs[name], ours.read(name), st.open_tensors(mine).read(name)):
            assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


def test_narrow_floats_and_shards(tmp_path):
    """bfloat16 and float8, in several files with an index, in the order given; one file holds at most 60 bytes."""
    rng = np.random.default_rng(1)
    kinds = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float32)
    good = {f"t{i}.weight": rng.normal(size=(2, 6)).astype(kinds[i % 4]) for i in range(8)}
    files = write(tmp_path, good, shard_bytes=60)
    index = json.loads((tmp_path / st.INDEX).read_text())
    assert files[-1] == st.INDEX and len(files) == 5 and files[0] == "model-00001-of-00004.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in good.values())
    back = st.open_tensors(tmp_path)
    assert set(back) == set(good) and not (tmp_path / st.SINGLE).exists()
    for name, array in good.items():
        assert back.dtype(name) == array.dtype and back.read(name).tobytes() == array.tobytes()
        # The reference names the same dtype for the same bytes.
        text = (tmp_path / index["weight_map"][name]).read_bytes()
        shown = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])[name]["dtype"]
        assert (
            shown
            == {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float32": "F32"}[
                array.dtype.name
            ]
        )


def test_reading_is_lazy(tmp_path):
    """A tensor of 64 MB is opened, and a row of it read, for next to no memory."""
    big = np.zeros((4096, 4096), np.float32)
    write(tmp_path, {"big": big, "small": np.ones(3, np.float32)})
    del big
    tracemalloc.start()
    tensors = st.open_tensors(tmp_path)
    assert tensors.read("small").sum() == 3 and tensors.read("big")[7].sum() == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    with pytest.raises(ValueError, match="read-only"):
        tensors.read("big")[0, 0] = 1


# name: (change to a good index and its folder, words of the refusal)
def _elsewhere(index, folder):
    index["weight_map"]["a"] = "../model-00001-of-00002.safetensors"


def _absolute(index, folder):
    index["weight_map"]["a"] = "/etc/model.safetensors"


def _pickle(index, folder):
    index["weight_map"]["a"] = "model.bin"


def _absent(index, folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


def _promised(index, folder):
    index["weight_map"]["c"] = index["weight_map"]["a"]


def _forgotten(index, folder):
    del index["weight_map"]["b"]
    index["weight_map"]["a2"] = "model-00002-of-00002.safetensors"


def _swapped(index, folder):
    a, b = index["weight_map"]["a"], index["weight_map"]["b"]
    index["weight_map"] |= {"a": b, "b": a}


def _no_map(index, folder):
    index.pop("weight_map")


def _number(index, folder):
    index["weight_map"]["a"] = 3


INDEXES = {
    _elsewhere: "plain name", _absolute: "plain name", _pickle: "plain name", _absent: "not there",
    _promised: "in no file", _forgotten: "nowhere", _swapped: "but it is in", _no_map: "weight_map",
    _number: "plain name",
}  # fmt: skip


@pytest.mark.parametrize("change", INDEXES, ids=lambda f: f.__name__)
def test_an_index_that_disagrees_with_its_files(change, tmp_path):
    write(tmp_path, {"a": np.ones(4), "b": np.ones(4)}, shard_bytes=32)
    path = tmp_path / st.INDEX
    index = json.loads(path.read_text())
    assert set(st.open_tensors(tmp_path)) == {"a", "b"}  # unharmed
    change(index, tmp_path)
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=INDEXES[change]):
        st.open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_pickle_is_never_opened(name, tmp_path):
    """The file would create another one if anything unpickled it."""
    (tmp_path / name).write_bytes(b"cos\nmkdir\n(V" + str(tmp_path / "owned").encode() + b"\ntR.")
    with pytest.raises(InputError, match="pickle.*never opened") as refused:
        st.open_tensors(tmp_path)
    assert name in str(refused.value) and not (tmp_path / "owned").exists()


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="like a path"):
        write(tmp_path, {"../a": np.ones(1)})
    with pytest.raises(InputError, match="dtype complex64"):
        write(tmp_path, {"a": np.ones(1, np.complex64)})
    with pytest.raises(InputError, match="was to have shape"):
        st.write_folder(tmp_path, {"a": (np.dtype("f4"), (2,))}, lambda name: np.ones(3, np.float32))
    assert list(tmp_path.iterdir()) == []
