"""A corpus becomes the same shards however often prepare is interrupted, and nothing is dropped unsaid."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigmodel_jax.data.corpus import Tally, list_entries, read_documents
from bigmodel_jax.data.filters import Filters, repeated_lines, shares
from bigmodel_jax.data.prepare import prepare
from bigmodel_jax.data.shards import token_dtype
from bigmodel_jax.data.tokenizer import load_tokenizer
from bigmodel_jax.errors import InputError, RunError

SMALL = {"vocab_size": 512, "validation_fraction": 0.2, "shard_tokens": 15000}
CHILD = """
import json, os, signal, sys
from bigmodel_jax.data.prepare import prepare
source, out, settings, calls, stage = json.loads(sys.argv[1])
left = [abs(calls)]
def dying(name, real):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, call)
if calls:
    for name in ("fsync", "replace", "rename") if calls > 0 else ("rename",):
        dying(name, getattr(os, name))
def progress(name, done, total):
    if name == stage and done >= total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
print(prepare(source, out, progress=progress, **settings)["fingerprint"])
"""


def start(source, out, settings, calls: int = 0, stage: str = "") -> subprocess.Popen:
    """prepare in a process that kills itself before its n-th file operation (n < 0: rename) or in a stage."""
    arguments = json.dumps([str(source), str(out), settings, calls, stage])
    return subprocess.Popen([sys.executable, "-c", CHILD, arguments], stdout=subprocess.PIPE, text=True)


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def texts_of(folder: Path, split: str) -> list[str]:
    """The documents of a split, read with numpy from the format as written down, not with our reader."""
    meta, tokenizer = json.loads((folder / "meta.json").read_text()), load_tokenizer(str(folder))
    out = []
    for shard in meta["splits"][split]["shards"]:
        tokens = np.fromfile(folder / shard["file"], np.dtype(meta["dtype"]).newbyteorder("<"))
        ends = np.fromfile(folder / shard["file"].replace(".bin", ".idx"), "<u8").astype(int)
        assert len(tokens) == shard["tokens"] == ends[-1] and len(ends) == shard["documents"]
        assert tokens[0] == meta["eos"] and (tokens[ends - 1] == meta["eos"]).all()
        assert (tokens == meta["eos"]).sum() == len(ends) + 1
        pieces = [tokenizer.decode(tokens[a : b - 1]) for a, b in zip([1, *ends[:-1]], ends, strict=True)]
        assert sum(len(text.encode()) for text in pieces) == shard["bytes"]
        assert tokenizer.byte_lengths()[tokens].sum() == shard["bytes"]
        for suffix, key in ((".bin", "sha256"), (".idx", "idx_sha256")):
            data = (folder / shard["file"].replace(".bin", suffix)).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard[key]
        out += pieces
    assert sum(s["tokens"] for s in meta["splits"][split]["shards"]) == meta["splits"][split]["tokens"]
    return out


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Sixty files of the standard library (about 0.3 MB) and one file twice."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [text for _, text in read_documents(list_entries(["stdlib"])) if 500 < len(text) < 12000]
    random.Random(0).shuffle(texts)
    for number, text in enumerate(texts[:60]):
        (folder / f"{number:02d}.py").write_bytes(text.encode())
    (folder / "zz-copy.py").write_bytes(texts[0].encode())
    return folder


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare(str(corpus), str(out), **SMALL)
    return out


def test_every_document_is_in_one_split_and_reads_back(corpus, prepared):
    train, validation = texts_of(prepared, "train"), texts_of(prepared, "validation")
    originals = [p.read_bytes().decode() for p in sorted(corpus.iterdir())]
    assert sorted(train + validation) == sorted(set(originals)) and len(train) + len(validation) == 60
    assert 3 < len(validation) < 25
    meta = json.loads((prepared / "meta.json").read_text())
    assert meta["version"] == 1 and meta["dtype"] == "uint16" and meta["vocab_size"] == 512
    assert meta["tokenizer_fingerprint"] == load_tokenizer(str(prepared)).fingerprint
    assert len(meta["splits"]["train"]["shards"]) > 3, "several shards, or the tests below prove little"
    assert all(s["tokens"] <= 15000 or s["documents"] == 1 for s in meta["splits"]["train"]["shards"])
    assert meta["report"]["read"] == 61 and meta["report"]["kept"] == 60
    assert meta["report"]["dropped"] == {"exact_duplicate": 1}
    assert sorted(os.listdir(prepared.parent)) == ["tokens"], "no working files are left"
    assert token_dtype(65536) == "uint16" and token_dtype(65537) == "uint32"


def test_second_run_is_free_and_fingerprints_are_stable(corpus, prepared, tmp_path, monkeypatch):
    before = content(prepared)
    with monkeypatch.context() as patched:
        patched.setattr("bigmodel_jax.data.prepare._lock", lambda *_: pytest.fail("went to work"))
        meta = prepare(str(corpus), str(prepared), **SMALL)
    assert content(prepared) == before
    again = prepare(f"{corpus}/*.py", str(tmp_path / "again"), **SMALL)
    assert again["fingerprint"] == meta["fingerprint"], "where the files lie does not matter"
    other = prepare(str(corpus), str(tmp_path / "other"), **SMALL | {"seed": 1})
    assert other["fingerprint"] != meta["fingerprint"]


KILLS = [{"calls": n} for n in (1, 3, 4, 6, 9, 12, 15, 20, 30, -1)] + [
    {"stage": stage} for stage in ("read", "tokenizer", "train", "validation")
]


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: "-".join(map(str, *kill.items())))
def test_killed_anywhere_and_run_again_gives_the_same_bytes(corpus, prepared, tmp_path, kill):
    out = tmp_path / "tokens"
    process = start(corpus, out, SMALL, **kill)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists(), "nothing incomplete is ever visible"
    prepare(str(corpus), str(out), **SMALL)
    assert content(out) == content(prepared)
    assert os.listdir(tmp_path) == ["tokens"]


def test_a_rerun_resumes_instead_of_starting_over(corpus, tmp_path):
    out = tmp_path / "tokens"
    start(corpus, out, SMALL, stage="validation").communicate()
    stages: list[str] = []
    prepare(str(corpus), str(out), **SMALL, progress=lambda stage, done, total: stages.append(stage))
    assert "read" not in stages and "tokenizer" not in stages and "validation" in stages
    fresh: list[str] = []
    prepare(str(corpus), str(tmp_path / "b"), **SMALL, progress=lambda stage, done, total: fresh.append(stage))
    assert list(dict.fromkeys(fresh)) == ["read", "tokenizer", "train", "validation"]


def test_leftovers_of_other_settings_are_not_mixed_in(corpus, prepared, tmp_path):
    out = tmp_path / "tokens"
    start(corpus, out, SMALL | {"vocab_size": 600}, stage="validation").communicate()
    prepare(str(corpus), str(out), **SMALL)
    assert content(out) == content(prepared)


@pytest.mark.parametrize("calls", [1, 20, -1, -2])
def test_a_killed_rebuild_loses_neither_the_old_nor_the_new(corpus, prepared, tmp_path, calls):
    out, source, plain = tmp_path / "tokens", str(corpus), {"tokenizer": "bytes"}
    old = prepare(source, str(out), **plain)["fingerprint"]
    process = start(source, out, SMALL | {"rebuild": True}, calls=calls)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and out.exists() == (calls != -2)
    stages: list[str] = []
    log = lambda stage, done, total: stages.append(stage)  # noqa: E731
    if calls % 2:  # whoever comes next may want either
        assert prepare(source, str(out), **plain, progress=log)["fingerprint"] == old and stages == []
    prepare(source, str(out), **SMALL, rebuild=True, progress=log)
    assert content(out) == content(prepared) and os.listdir(tmp_path) == ["tokens"]
    assert stages == [] or calls > 0, "what was ready is published"


def test_processes_at_once_do_not_disturb_each_other(corpus, prepared, tmp_path):
    processes = [start(corpus, tmp_path / "tokens", SMALL) for _ in range(3)]
    prints = {process.communicate()[0].strip() for process in processes}
    assert prints == {json.loads((prepared / "meta.json").read_text())["fingerprint"]}
    assert content(tmp_path / "tokens") == content(prepared) and os.listdir(tmp_path) == ["tokens"]


def test_waiting_for_another_process_is_bounded(corpus, tmp_path):
    import fcntl

    with open(tmp_path / ".tokens.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process") as caught:
            prepare(str(corpus), str(tmp_path / "tokens"), wait_s=0.2)
        assert caught.value.exit_code == 1, "a scheduler may try again"


def test_the_split_of_a_document_survives_additions(corpus, prepared, tmp_path):
    bigger = tmp_path / "bigger"
    bigger.mkdir()
    for path in corpus.iterdir():
        (bigger / path.name).write_bytes(path.read_bytes())
    for number in range(20):
        (bigger / f"0-new-{number}.py").write_text(f"added = {number}\n" * 40)
    prepare(str(bigger), str(tmp_path / "out"), **SMALL)
    assert set(texts_of(prepared, "validation")) <= set(texts_of(tmp_path / "out", "validation"))
    assert set(texts_of(prepared, "train")) <= set(texts_of(tmp_path / "out", "train"))
    prepare(str(corpus), str(tmp_path / "seed"), **SMALL | {"seed": 7})
    assert set(texts_of(prepared, "validation")) != set(texts_of(tmp_path / "seed", "validation"))


def test_a_directory_made_otherwise_is_refused_and_untouched(corpus, prepared, tmp_path):
    before = content(prepared)
    with pytest.raises(InputError, match="vocab_size 512 instead of 600"):
        prepare(str(corpus), str(prepared), **SMALL | {"vocab_size": 600})
    (tmp_path / "a.txt").write_text("other\ntext")
    with pytest.raises(InputError, match="other documents"):
        prepare(f"lines:{tmp_path}/a.txt", str(prepared), **SMALL)
    assert content(prepared) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for rebuild in (False, True):
        with pytest.raises(InputError, match="not written by prepare"):
            prepare(str(corpus), str(tmp_path / "mine"), rebuild=rebuild, **SMALL)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_changed_damaged_and_touched_inputs(tmp_path):
    source, out = tmp_path / "in.txt", str(tmp_path / "out")
    source.write_text("\n".join(f"line number {i}" for i in range(50)))
    spec, settings = f"lines:{source}", {"tokenizer": "bytes", "validation_fraction": 0.2}
    first = prepare(spec, out, **settings)
    os.utime(source, (1, 1))
    stages: list[str] = []
    log = lambda stage, done, total: stages.append(stage)  # noqa: E731
    assert prepare(spec, out, **settings, progress=log)["fingerprint"] == first["fingerprint"]
    assert set(stages) == {"read"}, "a touched file is read and compared, not prepared again"
    stages.clear()
    prepare(spec, out, **settings, progress=log)
    assert stages == []
    source.write_text(source.read_text().replace("7", "8"))
    with pytest.raises(InputError, match="other documents"):
        prepare(spec, out, **settings)
    assert prepare(spec, out, **settings, rebuild=True)["fingerprint"] != first["fingerprint"]
    shard = Path(out) / "train-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(InputError, match=f"{len(whole) - 2} bytes instead of {len(whole)}"):
        prepare(spec, out, **settings)
    prepare(spec, out, **settings, rebuild=True)
    assert shard.read_bytes() == whole


def test_filters_count_what_they_drop(tmp_path):
    cases = {
        "good": "Plain words in a sentence of ordinary length.",
        "empty": " \n\t",
        "too_short": "tiny",
        "too_long": "very long words " * 40,
        "not_printable": "abc\x00\x01\x02\x03 more words here",
        "not_alphabetic": "1234 5678 9012 3456 7890 ab",
        "long_line": "x" * 80 + "\nshort words\nother words",
        "repeated_lines": "same line\nsame line\nsame line\nsame line",
    }
    for name, text in cases.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "undecodable.txt").write_bytes(b"caf\xe9 latin-1")
    filters = {
        "min_characters": 20, "max_characters": 400, "min_printable": 0.9, "min_alphabetic": 0.5,
        "max_line": 60, "max_repeated_lines": 0.5,
    }  # fmt: skip
    meta = prepare(
        str(tmp_path),
        str(tmp_path / "o" / "out"),
        tokenizer="bytes",
        validation_fraction=0,
        dedup_exact=False,
        **filters,
    )
    expected = dict.fromkeys([*cases, "undecodable"], 1)
    assert expected.pop("good") and meta["report"]["dropped"] == expected
    assert meta["report"]["read"] == 9 == meta["report"]["kept"] + sum(meta["report"]["dropped"].values())
    assert meta["report"]["examples"]["too_short"] == ["too_short.txt"]
    assert "0xe9 at offset 3" in meta["report"]["examples"]["undecodable"][0]
    assert texts_of(tmp_path / "o" / "out", "train") == [cases["good"]]
    assert Filters().reason(cases["not_printable"]) is None, "off unless asked for"


def test_filter_measures_against_counting():
    assert shares("ab1\x00\n ") == (5 / 6, 2 / 4)
    assert repeated_lines("a\n\n a \nb\nb\nb\n") == 3 / 5 and repeated_lines("\n\n") == 0.0
    for wrong in ({"min_printable": 2.0}, {"max_line": -1}, {"min_characters": 9, "max_characters": 3}):
        with pytest.raises(InputError):
            Filters(**wrong)


def test_near_duplicates_and_normalisation(tmp_path):
    random_words = random.Random(3)
    base = [[f"w{random_words.randrange(999)}" for _ in range(100)] for _ in range(8)]
    lines = [" ".join(words) for words in base] + [
        " ".join([*base[0][:-1], "changed"]),
        "e\u0301 caf\u00e9",
        "\u00e9 cafe\u0301",
    ]
    (tmp_path / "in.txt").write_text("\n".join(lines))
    common = {"tokenizer": "bytes", "validation_fraction": 0.0}
    spec = f"lines:{tmp_path}/in.txt"
    meta = prepare(spec, str(tmp_path / "near"), dedup_near=True, normalise="nfc", **common)
    assert meta["report"]["dropped"] == {"exact_duplicate": 1, "near_duplicate": 1}
    assert texts_of(tmp_path / "near", "train") == [*lines[:8], "\u00e9 caf\u00e9"]
    plain = prepare(spec, str(tmp_path / "plain"), **common)
    assert plain["report"]["kept"] == 11, "neither happens unless asked for"


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl_lines_and_gz(tmp_path, packed):
    texts = ["one \u2581\n two", "three\r\n\x00", "four \U0001f600"]
    rows = [json.dumps({"body": text, "id": i}) for i, text in enumerate(texts)]
    rows += [
        "",
        "{broken",
        json.dumps({"bodi": "x"}),
        json.dumps([1]),
        '{"body": "\\ud800"}',
        json.dumps({"body": 5}),
    ]
    writer, suffix = (gzip.open, ".gz") if packed else (open, "")
    with writer(tmp_path / f"a.jsonl{suffix}", "wb") as file:
        file.write("\n".join(rows).encode() + b"\n\xff\n")
    with writer(tmp_path / f"b.txt{suffix}", "wb") as file:
        file.write(b"first\r\nsecond\n\nthird")
    specs = [f"{tmp_path}/a.jsonl{suffix}", f"lines:{tmp_path}/b.txt{suffix}"]
    meta = prepare(specs, str(tmp_path / "out"), tokenizer="bytes", field="body", validation_fraction=0)
    assert texts_of(tmp_path / "out", "train") == [*texts, "first", "second", "third"]
    assert meta["report"]["dropped"] == {
        "malformed_json": 1, "no_field": 3, "undecodable": 2, "empty": 2, "exact_duplicate": 0,
    }  # fmt: skip
    tally = Tally()
    list(read_documents(list_entries(specs), field="body", tally=tally))
    assert "did you mean 'bodi'" in " ".join(tally.examples["no_field"])
    with pytest.raises(InputError, match="a.jsonl.*:5: "):
        prepare(specs, str(tmp_path / "strict"), tokenizer="bytes", field="body", strict=True)


def test_sources_behind_a_url(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("b.txt", "a.txt", "c.jsonl"):
        memory.pipe(f"/prepare-test/{name}", b'{"text": "from c"}' if name[0] == "c" else f"from {name[0]}".encode())
    prepare("memory://prepare-test", str(tmp_path / "out"), tokenizer="bytes", validation_fraction=0)
    assert texts_of(tmp_path / "out", "train") == ["from a", "from b", "from c"]
    prepare("memory://prepare-test", str(tmp_path / "out"), tokenizer="bytes", validation_fraction=0)
    with pytest.raises(InputError, match="memory://prepare-none"):
        list(read_documents(list_entries(["memory://prepare-none.txt"])))


def test_the_standard_library_without_its_tests():
    entries, everything = list_entries(["stdlib"]), list_entries(["stdlib"], tests=True)
    names = {entry.name for entry in entries}
    assert {"os.py", "json/decoder.py", "unittest/case.py"} <= names and len(everything) > len(entries)
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(name.split("/")[:-1]) for name in names)
    assert [e.name for e in entries] == sorted(names, key=os.fsencode)
    assert list_entries(["stdlib"]) == entries


def test_tiny_corpora_get_a_validation_split_or_an_error(tmp_path):
    (tmp_path / "two.txt").write_text("one\ntwo")
    (tmp_path / "one.txt").write_text("only")
    for seed in range(4):
        for fraction in (1e-9, 1 - 1e-9):
            out = tmp_path / f"{seed}-{fraction}"
            meta = prepare(
                f"lines:{tmp_path}/two.txt",
                str(out),
                tokenizer="bytes",
                validation_fraction=fraction,
                seed=seed,
            )
            assert sorted(texts_of(out, "train") + texts_of(out, "validation")) == ["one", "two"]
            assert meta["splits"]["train"]["documents"] == meta["splits"]["validation"]["documents"] == 1
            assert "would have been empty" in meta["report"]["moved"]
    with pytest.raises(InputError, match="one document"):
        prepare(f"{tmp_path}/one.txt", str(tmp_path / "out"), tokenizer="bytes")
    alone = prepare(f"{tmp_path}/one.txt", str(tmp_path / "out"), tokenizer="bytes", validation_fraction=0)
    assert alone["splits"]["validation"] == {"shards": [], "tokens": 0, "documents": 0, "bytes": 0}


def test_a_given_tokenizer_is_taken_over(corpus, prepared, tmp_path):
    for path in (prepared, prepared / "tokenizer.model"):
        meta = prepare(str(corpus), str(tmp_path / path.stem), tokenizer=str(path), validation_fraction=0.2)
        assert meta["tokenizer_fingerprint"] == load_tokenizer(str(prepared)).fingerprint
        assert texts_of(tmp_path / path.stem, "validation") == texts_of(prepared, "validation")


def test_hostile_names(tmp_path):
    folder = tmp_path / "in\nput $(touch x) \u202e"
    folder.mkdir()
    for number, name in enumerate([b"new\nline.txt", b"\xff\xfe.txt", b"-rf", b"a'b\"c.txt", b"..hidden"]):
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_text(f"text {number}")
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff\n.txt")).write_bytes(b"\xff")
    os.mkfifo(folder / "pipe.txt")
    (folder / "loop").symlink_to(folder)
    out = tmp_path / "out $(x)\n"
    meta = prepare(str(folder), str(out), tokenizer="bytes", validation_fraction=0)
    assert sorted(texts_of(out, "train")) == [f"text {i}" for i in range(4)]
    assert meta["report"]["dropped"]["undecodable"] == 1
    example = meta["report"]["examples"]["undecodable"][0]
    assert "\n" not in example and example.encode()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([folder.name, out.name])


BAD = {
    "missing": ("/nowhere/at/all", {}, "does not exist"),
    "misspelt": ("stdlb", {}, "did you mean 'stdlib'"),
    "no match": ("{tmp}/*.nothing", {}, "holds no files"),
    "empty folder": ("{tmp}/void", {}, "holds no files"),
    "no source": ([], {}, "no source"),
    "only blank": ("{tmp}/blank.txt", {}, "no document is left .*1 empty"),
    "only binary": ("{tmp}/binary", {}, "no document is left .*1 undecodable"),
    "strict binary": ("{tmp}/binary", {"strict": True}, "binary: byte 0xff at offset 0"),
    "damaged gz": ("{tmp}/cut.gz", {}, "damaged .gz"),
    "not gz": ("{tmp}/not.gz", {}, "damaged .gz"),
    "tfds": ("tfds:lm1b:train", {}, "tfds:NAME:SPLIT:FIELD"),
    "tokenizer": ("stdlib", {"tokenizer": "bpee"}, "did you mean 'bpe'"),
    "pieces": ("stdlib", {"pieces": "words"}, "did you mean 'word'"),
    "normalise": ("stdlib", {"normalise": "nfcc"}, "did you mean 'nfc'"),
    "fraction": ("stdlib", {"validation_fraction": 1.0}, "below 1"),
    "shards": ("stdlib", {"shard_tokens": 0}, "shard_tokens"),
    "vocabulary": ("{tmp}/two", {"vocab_size": 4096}, "more than this text can fill"),
    "url out": ("stdlib", {"out": "gs://bucket/x"}, "local directory"),
    "out under a file": (
        "{tmp}/two",
        {"out": "{tmp}/binary/out"},
        "cannot prepare .*[Nn]ot a directory|exists",
    ),
    "out is a file": ("{tmp}/two", {"out": "{tmp}/binary"}, "not a directory"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_what_cannot_be_used_gets_one_line(tmp_path, case):
    spec, settings, expected = BAD[case]
    (tmp_path / "void").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.txt").write_text("some text")
    (tmp_path / "two" / "b.txt").write_text("other text")
    (tmp_path / "blank.txt").write_text("  \n ")
    (tmp_path / "binary").write_bytes(b"\xff\x00\xfe")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"text " * 1000)[:-12])
    (tmp_path / "not.gz").write_bytes(b"plain text")
    before = sorted(p.name for p in tmp_path.iterdir())
    spec = spec.format(tmp=tmp_path) if isinstance(spec, str) else spec
    settings = dict(settings)
    out = settings.pop("out", "{tmp}/out").format(tmp=tmp_path)
    with pytest.raises(InputError, match=expected) as caught:
        prepare(spec, out, **settings)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "nothing is left behind"


def test_a_full_disk_keeps_what_is_done(corpus, prepared, tmp_path, monkeypatch):
    real, calls = os.fsync, [0]

    def full(handle):
        calls[0] += 1
        if calls[0] > 8:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device; finished work is kept"):
        prepare(str(corpus), str(tmp_path / "tokens"), **SMALL)
    monkeypatch.undo()
    stages: list[str] = []
    prepare(str(corpus), str(tmp_path / "tokens"), **SMALL, progress=lambda s, done, total: stages.append(s))
    assert content(tmp_path / "tokens") == content(prepared) and "read" not in stages
