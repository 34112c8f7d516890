"""Sources give what their files hold, by number, and refuse what they cannot read in one line."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import shard_files
from PIL import Image

from bigmodel_jax.data.order import Order, mix_ints
from bigmodel_jax.data.packing import best_fit
from bigmodel_jax.data.sources import (
    Arrays,
    ImageFolder,
    Mixture,
    Source,
    SyntheticImages,
    SyntheticTokens,
    TokenShards,
    interleave,
    whole_shares,
)
from bigmodel_jax.data.storage import Ranged
from bigmodel_jax.errors import InputError

SHARDS = [shard_files.documents(30, 1), shard_files.documents(17, 2), shard_files.documents(1, 3)]


def everything(source):
    return source.gather(np.arange(len(source)))


def stream_by_hand(shards, length):
    """Rows, one at a time, from the definition."""
    tokens, targets, weights = [], [], []
    for docs in shards:
        flat = [shard_files.EOS] + [t for d in docs for t in [*d.tolist(), shard_files.EOS]]
        for start in range(0, len(flat) - 1, length):
            row = flat[start : start + length + 1]
            real = len(row) - 1
            row = row + [shard_files.PAD] * (length + 1 - len(row))
            tokens.append(row[:-1])
            targets.append(row[1:])
            weights.append([1.0] * real + [0.0] * (length - real))
    return {"tokens": np.array(tokens), "targets": np.array(targets), "weights": np.array(weights)}


@pytest.mark.parametrize("length", [1, 7, 64, 5000])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_stream_rows_are_the_file_cut_up(tmp_path, length, dtype):
    source = TokenShards(shard_files.write(tmp_path, SHARDS, dtype=dtype), "train", length)
    want, got = stream_by_hand(SHARDS, length), everything(source)
    assert set(got) == set(want) and isinstance(source, Source)
    for name in want:
        assert np.array_equal(got[name], want[name]), name
    assert got["tokens"].dtype == got["targets"].dtype == np.int32 and got["weights"].dtype == np.float32
    assert got["weights"].sum() == source.tokens - len(SHARDS) == source.report["tokens"]
    pick = np.random.default_rng(0).integers(0, len(source), 50)
    some = source.gather(pick)
    assert all(np.array_equal(some[name], want[name][pick]) for name in want)
    assert not np.array_equal(some["targets"], want["targets"][(pick + 1) % len(source)])


def unpacked(batch):
    """The documents of packed rows, as tuples of (inputs, targets)."""
    found = []
    for r in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][r].max() + 1):
            here = batch["segments"][r] == segment
            found.append((tuple(batch["tokens"][r][here].tolist()), tuple(batch["targets"][r][here].tolist())))
            assert batch["positions"][r][here].tolist() == list(range(here.sum()))
    return found


def test_packed_rows_hold_whole_documents_once(tmp_path):
    source = TokenShards(shard_files.write(tmp_path, SHARDS), "train", 48, mode="pack")
    batch = everything(source)
    want = Counter(
        (shard_files.EOS, *d.tolist()) + ("->", *d.tolist(), shard_files.EOS) for docs in SHARDS for d in docs
    )
    assert Counter(a + ("->",) + b for a, b in unpacked(batch)) == want
    empty = batch["segments"] == 0
    assert np.array_equal(batch["weights"] == 0, empty) and batch["weights"].sum() == source.tokens - len(SHARDS)
    assert (batch["tokens"][empty] == shard_files.PAD).all() and (batch["positions"][empty] == 0).all()
    assert source.report["documents"] == 48 and source.report["documents_cut"] == 0
    assert source.report["padding"] == empty.sum() and source.report["rows"] == len(source)
    # Rows are numbered from 1 on, in order, padding last.
    steps = np.diff(np.where(empty, 99, batch["segments"]), axis=1)
    assert ((steps == 0) | (steps == 1) | (batch["segments"][:, 1:] == 0)).all()
    pick = np.random.default_rng(0).integers(0, len(source), 30)
    some = source.gather(pick)
    assert all(np.array_equal(some[name], batch[name][pick]) for name in batch)
    assert all(len(value) == 0 for value in source.gather(np.zeros(0, np.int64)).values())


@pytest.mark.parametrize("longest", [20, 2000])
def test_both_ways_of_reading_packed_rows_agree(tmp_path, monkeypatch, longest):
    """Few long pieces are copied, many short ones indexed: the same rows, from one shard and from three."""
    docs = shard_files.documents(60, 4, longest=longest)
    used = Counter()
    for name in ("_copy_pieces", "_index_pieces"):
        method = getattr(TokenShards, name)
        monkeypatch.setattr(TokenShards, name, lambda *a, m=method, n=name: (used.update([n]), m(*a))[1])
    for shards in ([docs], [docs[:20], docs[20:50], docs[50:]]):
        folder = shard_files.write(tmp_path / str(len(shards)), shards)
        source = TokenShards(folder, "train", 777, mode="pack")
        index = np.random.default_rng(0).integers(0, len(source), 20)
        index[:2] = [0, len(source) - 1]
        chosen = source.gather(index)
        monkeypatch.setattr("bigmodel_jax.data.token_rows.is_url", lambda folder: True)
        indexed = source.gather(index)
        monkeypatch.setattr("bigmodel_jax.data.token_rows.is_url", lambda folder: False)
        assert all(np.array_equal(chosen[k], indexed[k]) and chosen[k].dtype == indexed[k].dtype for k in indexed)
        assert (indexed["segments"] == 0).any()
    assert (used["_copy_pieces"] > 0) == (longest == 2000) and used["_index_pieces"] >= 2


def test_long_documents_are_cut_and_counted_without_losing_a_target(tmp_path):
    docs = [np.arange(2, 2 + n) for n in (3, 8, 25, 1)]
    source = TokenShards(shard_files.write(tmp_path, [docs]), "train", 8, mode="pack")
    batch = everything(source)
    assert source.report["documents_cut"] == 2 and source.report["pieces"] == 1 + 2 + 4 + 1
    targets = Counter(batch["targets"][batch["weights"] > 0].tolist())
    assert targets == Counter(t for d in docs for t in [*d.tolist(), shard_files.EOS])
    pairs = {(a, b) for x, y in unpacked(batch) for a, b in zip(x, y, strict=True)}
    assert pairs == {(a, b) for d in docs for a, b in zip([0, *d.tolist()], [*d.tolist(), 0], strict=True)}


def test_editing_one_document_leaves_the_rest_of_its_rows(tmp_path):
    docs = shard_files.documents(40, 5, longest=20)
    before = everything(TokenShards(shard_files.write(tmp_path / "a", [docs]), "train", 64, mode="pack"))
    edited = [d.copy() for d in docs]
    edited[7][:] = 199 - edited[7] % 3
    after = everything(TokenShards(shard_files.write(tmp_path / "b", [edited]), "train", 64, mode="pack"))
    assert np.array_equal(before["segments"], after["segments"])
    changed = (before["tokens"] != after["tokens"]) | (before["targets"] != after["targets"])
    rows, _ = np.nonzero(changed)
    assert len(set(rows)) == 1
    assert len(set(before["segments"][changed])) == 1, "only the edited document's own segment changes"
    assert before["segments"][rows[0]].max() > 1


def test_pack_index_is_kept_and_found_and_never_stale(tmp_path):
    folder = shard_files.write(tmp_path, SHARDS)
    first = TokenShards(folder, "train", 48, mode="pack")
    second = TokenShards(folder, "train", 48, mode="pack")
    assert first.report["index"] == "made" and second.report["index"] == "found"
    assert os.path.dirname(first.report["path"]) == os.path.join(folder, "pack")
    assert all(np.array_equal(a, everything(second)[k]) for k, a in everything(first).items())
    assert TokenShards(folder, "train", 47, mode="pack").report["index"] == "made"
    # Half an index is not believed.
    np.save(os.path.join(second.report["path"], "lengths.npy"), np.zeros(3, np.int32))
    assert TokenShards(folder, "train", 48, mode="pack").report["index"] == "made"
    shard_files.write(tmp_path, [shard_files.documents(30, 9)])
    assert TokenShards(folder, "train", 48, mode="pack").report["index"] == "made"


def test_pack_index_goes_to_the_cache_when_asked(tmp_path):
    folder = shard_files.write(tmp_path / "shards", SHARDS)
    made = TokenShards(folder, "train", 48, mode="pack", cache_dir=str(tmp_path / "cache"))
    assert made.report["path"].startswith(str(tmp_path / "cache")) and not os.path.exists(f"{folder}/pack")
    blocked = tmp_path / "file"
    blocked.write_text("")
    unkept = TokenShards(folder, "train", 48, mode="pack", cache_dir=str(blocked))
    assert unkept.report["index"] == "not kept" and len(unkept) == len(made)


def best_fit_by_hand(lengths, capacity):
    room = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [(r, j) for j, r in enumerate(room) if r >= length]
        if fitting:
            room[min(fitting)[1]] -= length
        else:
            room.append(capacity - length)
    return sorted(room)


def test_packing_is_best_fit_decreasing():
    rng = np.random.default_rng(0)
    for _ in range(40):
        capacity = int(rng.integers(1, 60))
        lengths = rng.integers(1, capacity + 1, rng.integers(1, 150))
        bins = best_fit(lengths, capacity)
        room = capacity - np.bincount(bins, weights=lengths)
        assert sorted(room.astype(int).tolist()) == best_fit_by_hand(lengths, capacity)
    lengths = rng.integers(1, 513, 20000)
    assert lengths.sum() / ((best_fit(lengths, 1024).max() + 1) * 1024) > 0.99


def on_memory(folder, name):
    fs = fsspec.filesystem("memory")
    for file in Path(folder).iterdir():
        if file.is_file():
            fs.pipe_file(f"/{name}/{file.name}", file.read_bytes())
    return f"memory://{name}"


@pytest.mark.parametrize("mode", ["stream", "pack"])
def test_url_equals_local(tmp_path, mode, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    folder = shard_files.write(tmp_path / "local", SHARDS)
    monkeypatch.setattr(np, "memmap", None) if mode == "stream" else None
    url = on_memory(folder, f"shards-{mode}")
    remote = TokenShards(url, "train", 16, mode=mode)
    got = everything(remote)
    monkeypatch.undo()
    local = TokenShards(folder, "train", 16, mode=mode, cache_dir=str(tmp_path / "other"))
    assert remote.fingerprint == local.fingerprint and len(remote) == len(local)
    assert all(np.array_equal(value, got[name]) for name, value in everything(local).items())


def test_ranged_reads_are_bounded_and_cached():
    values = np.arange(10_000, dtype="<u4")
    fsspec.filesystem("memory").pipe_file("/ranged.bin", values.tobytes())
    file = Ranged("memory://ranged.bin", np.dtype("<u4"), block_bytes=400, keep=4)
    pick = np.random.default_rng(0).integers(0, 10_000, 300)
    assert np.array_equal(file.take(pick), values[pick])
    before = file.fetched
    assert np.array_equal(file.take(np.array([[5, 1, 9_999]])), [[5, 1, 9_999]])
    assert file.fetched <= before + 2 and len(file._cache) == 4
    before = file.fetched
    file.take(np.array([7, 9_998]))
    assert file.fetched == before
    assert np.array_equal(file.take(np.array([12_000])), [9_999])
    assert np.array_equal(file.rows(np.array([3, 0]), 50), [np.arange(150, 201), np.arange(51)])


def edit_meta(folder, change):
    path = Path(folder) / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def truncate(path, by):
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:-by])


BAD_SHARDS = {
    "missing directory": (lambda d: os.rename(d, f"{d}-gone"), "does not exist"),
    "missing meta": (lambda d: os.remove(f"{d}/meta.json"), "no meta.json"),
    "broken meta": (lambda d: Path(d, "meta.json").write_text("{"), "cannot be read"),
    "other version": (lambda d: edit_meta(d, lambda m: m.update(version=7)), "version 1"),
    "lacking key": (lambda d: edit_meta(d, lambda m: m.pop("eos")), "lacks eos"),
    "bad dtype": (lambda d: edit_meta(d, lambda m: m.update(dtype="int8")), "uint16 or uint32"),
    "other dtype": (lambda d: edit_meta(d, lambda m: m.update(dtype="uint32")), "meta.json says"),
    "truncated": (lambda d: truncate(f"{d}/train-00000.bin", 2), "truncated"),
    "missing shard": (lambda d: os.remove(f"{d}/train-00000.bin"), "train-00000.bin is missing"),
    "missing index": (lambda d: os.remove(f"{d}/train-00000.idx"), "train-00000.idx is missing"),
    "disordered index": (
        lambda d: Path(d, "train-00000.idx").write_bytes(Path(d, "train-00000.idx").read_bytes()[::-1]),
        "rising",
    ),
    "no split": (lambda d: edit_meta(d, lambda m: m["splits"].pop("train")), "no split 'train'"),
    "empty split": (lambda d: edit_meta(d, lambda m: m["splits"]["train"].update(shards=[])), "empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_bad_shards_get_one_line(tmp_path, name):
    harm, words = BAD_SHARDS[name]
    folder = shard_files.write(tmp_path / "shards", SHARDS, more={"validation": [SHARDS[2]]})
    TokenShards(folder, "train", 16, mode="pack", cache_dir=str(tmp_path / "first"))
    harm(folder)
    with pytest.raises(InputError) as error:
        TokenShards(folder, "train", 16, mode="pack", cache_dir=str(tmp_path / "second"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bad_requests_get_one_line(tmp_path):
    folder = shard_files.write(tmp_path, SHARDS)
    for args, words in [
        (("train", 16, "packed"), "did you mean 'pack'"), (("train", 0), "at least 1"),
        (("test", 16), "only train"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            TokenShards(folder, *args)
    with pytest.raises(InputError, match="no file system"):
        TokenShards("nosuch://bucket/x", "train", 16)


def test_verify_finds_a_flipped_bit(tmp_path):
    folder = shard_files.write(tmp_path, SHARDS)
    TokenShards(folder, "train", 16).verify()
    data = bytearray(Path(folder, "train-00001.bin").read_bytes())
    data[40] ^= 4
    Path(folder, "train-00001.bin").write_bytes(data)
    with pytest.raises(InputError, match="train-00001.bin differs"):
        TokenShards(folder, "train", 16).verify()


def test_arrays():
    data = {"x": np.arange(12.0).reshape(6, 2), "label": np.arange(6)}
    source = Arrays(data)
    got = source.gather(np.array([5, 0, 5]))
    assert got["x"].tolist() == [[10, 11], [0, 1], [10, 11]] and got["label"].tolist() == [5, 0, 5]
    assert source.fingerprint == Arrays({k: v.copy() for k, v in reversed(data.items())}.copy()).fingerprint
    changed = {**data, "x": data["x"] + (np.arange(12).reshape(6, 2) == 7)}
    assert source.fingerprint != Arrays(changed).fingerprint
    for bad in ({}, {"x": np.zeros((0, 3))}, {"x": np.zeros(3), "y": np.zeros(4)}, {"x": np.float32(1)}):
        with pytest.raises(InputError):
            Arrays(bad)


def test_synthetic_is_a_function_of_the_index():
    tokens = SyntheticTokens(100, 32, 50, noise=0.1)
    all_rows = everything(tokens)
    some = tokens.gather(np.array([42, 7]))
    assert all(np.array_equal(some[k], v[[42, 7]]) for k, v in all_rows.items())
    assert np.array_equal(all_rows["tokens"][:, 1:], all_rows["targets"][:, :-1])
    steps = (all_rows["targets"] - all_rows["tokens"]) % 50
    stride = np.array([np.bincount(row, minlength=50).argmax() for row in steps])
    assert set(stride) == {1, 2, 3, 4}
    # A step is intact when both of its tokens are: 0.9 ** 2.
    assert abs((steps == stride[:, None]).mean() - 0.81) < 0.04
    images = SyntheticImages(200, (4, 4, 1), 3)
    batch = everything(images)
    means = np.stack([batch["image"][batch["label"] == c].mean(0) for c in range(3)])
    nearest = ((batch["image"][:, None] - means[None]) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == batch["label"]).mean() > 0.95 and batch["label"].dtype == np.int32
    assert np.array_equal(images.gather(np.array([9]))["image"][0], batch["image"][9])
    assert tokens.fingerprint != SyntheticTokens(100, 32, 50, seed=1).fingerprint


@pytest.mark.parametrize(
    "weights", [(1,), (0.7, 0.2, 0.1), (1, 1), (3, 5, 2, 7), (0.123456789, 0.2, 1 / 3), (0.99, 0.01)]
)
def test_mixture_shares_are_exact_to_one_in_every_prefix(weights):
    shares = whole_shares(weights)
    want = np.array(weights) / sum(weights)
    assert np.abs(np.array(shares) / sum(shares) - want).max() <= 2 / (1 << 14)
    turn = interleave(shares)
    counts = np.cumsum(turn[:, None] == np.arange(len(weights)), axis=0)
    drift = counts - np.arange(1, len(turn) + 1)[:, None] * np.array(shares) / sum(shares)
    assert np.abs(drift).max() <= 1 - 1 / max(2 * len(weights) - 2, 1) + 1e-9
    assert counts[-1].tolist() == shares
    if len(weights) == 4:
        shuffled = np.random.default_rng(0).permutation(np.repeat(turn, 50))
        counts = np.cumsum(shuffled[:, None] == np.arange(4), axis=0)
        drift = counts - np.arange(1, len(shuffled) + 1)[:, None] * np.array(shares) / sum(shares)
        assert np.abs(drift).max() > 1, "drawing at random does not pass"


def numbered(start, n):
    return Arrays({"x": np.arange(start, start + n)})


def test_mixture_walks_each_source_once_per_own_epoch():
    mixture = Mixture((numbered(0, 10), numbered(100, 50)), (0.5, 0.5))
    orders = mixture.orders(3, 1, 64)
    seen = mixture.gather(mixture.place(np.arange(200), orders))["x"]
    small, large = seen[seen < 100], seen[seen >= 100]
    assert len(small) == len(large) == 100
    for epoch in small.reshape(10, 10):
        assert sorted(epoch) == list(range(10))
    for epoch in large.reshape(2, 50):
        assert sorted(epoch) == list(range(100, 150))
    assert np.array_equal(small[:10], Order(10, mix_ints(3, 0)).index(np.arange(10)))
    pick = np.array([199, 3, 77])
    assert np.array_equal(mixture.gather(mixture.place(pick, orders))["x"], seen[pick])
    which, inside = mixture.split_index(np.array([9, 10, 59]))
    assert which.tolist() == [0, 1, 1] and inside.tolist() == [9, 0, 49] and len(mixture) == 60


def test_mixture_refuses_what_does_not_fit():
    one, two = numbered(0, 3), Arrays({"y": np.arange(3)})
    for sources, weights in [
        ((), ()),
        ((one,), (1, 2)),
        ((one, one), (1, 0)),
        ((one, one), (1, float("nan"))),
    ]:
        with pytest.raises(InputError, match="mixture"):
            Mixture(sources, weights)
    with pytest.raises(InputError, match="agree"):
        Mixture((one, two), (1, 1)).gather(np.array([0, 4]))
    assert Mixture((one,), (1,)).fingerprint != Mixture((one, one), (1, 1)).fingerprint
    assert Mixture((one, one), (1, 1)).fingerprint == Mixture((one, one), (2, 2)).fingerprint
    assert Mixture((one, one), (1, 1)).fingerprint != Mixture((one, one), (1, 3)).fingerprint


def make_images(folder):
    rng = np.random.default_rng(0)
    for label, name in enumerate(["cat", "dog"]):
        (folder / name).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(rng.integers(0, 256, (8 + 4 * label, 8, 3), dtype=np.uint8)).save(
                folder / name / f"{k}.png"
            )
    (folder / "dog" / "notes.txt").write_text("not an image")
    return folder


def test_image_folder(tmp_path):
    folder = make_images(tmp_path / "data")
    source = ImageFolder(str(folder), (8, 8))
    batch = source.gather(np.array([4, 0, 4]))
    assert batch["image"].shape == (3, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].tolist() == [1, 0, 1] and source.classes == ("cat", "dog") and len(source) == 6
    assert np.array_equal(batch["image"][1], np.asarray(Image.open(folder / "cat" / "0.png")))
    # 12 x 8 covered by 8 x 8 is its middle, unscaled.
    assert np.array_equal(batch["image"][0], np.asarray(Image.open(folder / "dog" / "1.png"))[2:10])
    assert not np.array_equal(
        ImageFolder(str(folder), (8, 8), fit="stretch").gather(np.array([4]))["image"], batch["image"][:1]
    )
    assert ImageFolder(str(folder), (5, 9), channels=1).gather(np.arange(2))["image"].shape == (2, 5, 9, 1)
    print_before = source.fingerprint
    (folder / "cat" / "2.png").unlink()
    assert ImageFolder(str(folder), (8, 8)).fingerprint != print_before


def test_image_folder_errors(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        ImageFolder(str(tmp_path / "none"), (8, 8))
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="no images"):
        ImageFolder(str(tmp_path / "empty"), (8, 8))
    folder = make_images(tmp_path / "data")
    truncate(folder / "dog" / "2.png", 60)
    source = ImageFolder(str(folder), (8, 8))
    source.gather(np.arange(5))
    with pytest.raises(InputError, match=r"dog/2\.png cannot be decoded") as error:
        source.gather(np.array([5]))
    assert "\n" not in str(error.value)


def test_reading_shards_imports_no_tensorflow_and_no_jax(tmp_path):
    folder = shard_files.write(tmp_path, SHARDS)
    code = (
        "import sys; from bigmodel_jax.data.pipeline import Pipeline;"
        "from bigmodel_jax.data.sources import TokenShards;"
        f"Pipeline(TokenShards({folder!r}, 'train', 8), 4).batch(3);"
        "heavy = 'jax', 'tensorflow', 'tensorflow_datasets', 'fsspec', 'PIL';"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"
