"""Pairs of texts, the pronouncing dictionary, and span corruption against its definition."""

import jax
import numpy as np
import pytest

from bigmodel_jax.data.datasets import DATASETS, Text
from bigmodel_jax.data.order import RowRng
from bigmodel_jax.data.pairs import Ragged, Symbols, Teach, hold_out, pack, pronunciations
from bigmodel_jax.data.spans import CorruptSpans, counts, lengths
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import objectives
from bigmodel_jax.models import MODELS
from tests import tiny

DICT = """# a comment
hello HH AH0 L OW1
hello(2) HH EH0 L OW1
read R EH1 D
read(2) R IY1 D
refill R IY0 F IH1 L # verb
refill(2) R IY1 F IH0 L
a.m. EY2 EH1 M
don't D OW1 N T
"""


def test_a_dictionary_gives_every_pronunciation_once(tmp_path):
    path = tmp_path / "cmudict.dict"
    path.write_text(DICT)
    words, said = pronunciations(str(path))
    assert list(zip(words, said, strict=True)) == [
        ("hello", "HH AH L OW"), ("hello", "HH EH L OW"), ("read", "R EH D"), ("read", "R IY D"),
        ("refill", "R IY F IH L"), ("don't", "D OW N T"),
    ]  # fmt: skip
    assert len(pronunciations(str(path), stress=True)[0]) == 7
    data = DATASETS["cmudict"](path=str(path), validation_fraction=0.25, source_length=5, length=5, drop_long=True)
    splits = data.splits(0)
    train, held = (set(splits[name][0]) for name in ("train", "validation"))
    assert len(held) == 1 and not train & held and train | held == set(words)
    loaded = data.load(seed=1, batch_size=2, eval_batch_size=4)
    longest = {name: sum(len(w) >= 5 for w in splits[name][0]) for name in splits}
    assert loaded.report["train"]["too_long"] == longest["train"]
    assert len(loaded.train.source) == len(splits["train"][0]) - longest["train"]
    assert len(loaded.evals["validation"].source) == len(splits["validation"][0])


def test_a_batch_reads_as_its_texts(tmp_path):
    rows = ["source\ttarget", "ab\tx y", "b\ty", "abc\tz", "ab\ty y x", "c\tx"]
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(rows) + "\n")
    data = DATASETS["pairs"](
        files=str(path), validation_fraction=0.3, source_tokenizer="characters", target_tokenizer="words",
        source_length=5, length=4,
    )  # fmt: skip
    loaded = data.load(seed=0, batch_size=3, eval_batch_size=2)
    batch = loaded.train.batch(0)
    assert {name: (x.shape[1:], x.dtype.name) for name, x in batch.items()} == data.spec()
    reader, writer = loaded.source_tokenizer, loaded.tokenizer
    known = {tuple(row.split("\t")) for row in rows[1:]}
    for r in range(3):
        source = batch["source"][r][batch["source_segments"][r] > 0]
        target = batch["targets"][r][batch["weights"][r] > 0]
        assert (reader.decode(source), writer.decode(target)) in known
        assert source[-1] == reader.eos and target[-1] == writer.eos
        assert batch["tokens"][r].tolist() == [writer.eos, *batch["targets"][r][:-1].tolist()]
    assert (loaded.vocab_size, loaded.source_vocab_size) == (writer.vocab_size, reader.vocab_size)
    shared = DATASETS["pairs"](files=str(path)).load(seed=0, batch_size=3, eval_batch_size=2)
    assert shared.source_vocab_size == 0 and shared.source_tokenizer.encode("x a").min() > 2
    with pytest.raises(InputError, match="neither a file nor one of"):
        DATASETS["pairs"](files=str(path), source_tokenizer="letters").load(seed=0, batch_size=3, eval_batch_size=2)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A file of 300 pairs of words of 1 to 9 letters and what they say, and the pairs."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(300):
        word = "".join(rng.choice(list("abcdef"), rng.integers(1, 10)))
        rows.append((word, " ".join(letter.upper() for letter in word if letter != "e") or "E"))
    path = tmp_path_factory.mktemp("pairs") / "many.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in [("source", "target"), *rows]))
    return path, rows


def pairs_of(path, **options):
    data = DATASETS["pairs"](
        files=str(path), validation_fraction=0.1, source_tokenizer="characters", target_tokenizer="words",
        source_length=30, length=24, **options,
    )  # fmt: skip
    return data, data.load(seed=3, batch_size=5, eval_batch_size=5)


def test_packed_rows_hold_every_pair_once_and_the_same_ones_for_any_seed(many):
    path, rows = many
    data, loaded = pairs_of(path, packed=True)
    _, alone = pairs_of(path)
    reader, writer, source = loaded.source_tokenizer, loaded.tokenizer, loaded.train.source
    found = []
    for r in range(len(source)):
        row = {name: x[0] for name, x in Teach(reader.pad, writer.pad, 1)(source.gather(np.array([r])), None).items()}
        for n in range(1, row["segments"].max() + 1):
            reads, says = row["source_segments"] == n, row["segments"] == n
            found.append((reader.decode(row["source"][reads]), writer.decode(row["targets"][says])))
            assert row["targets"][says][-1] == writer.eos and row["source"][reads][-1] == reader.eos
            assert row["tokens"][says].tolist() == [1, *row["targets"][says][:-1].tolist()]
            assert row["positions"][says].tolist() == list(range(says.sum()))
            assert row["source_positions"][reads].tolist() == list(range(reads.sum()))
        assert (row["weights"] == (row["segments"] > 0)).all()
    held = data.splits(3)["validation"]
    assert sorted(found) == sorted(set_aside(rows, held[0]))
    tokens = sum(len(word) + 1 for word, _ in found)
    assert tokens / (30 * len(source)) > 0.85 and len(alone.train.source) == len(found)
    assert loaded.report["train"]["rows"] == len(source)
    batch = loaded.train.batch(0)
    assert {name: (x.shape[1:], x.dtype.name) for name, x in batch.items()} == data.spec()
    given = DATASETS["pairs"](files=str(path), validation=str(path), source_length=30, length=30, packed=True)
    two = [given.load(seed=seed, batch_size=5, eval_batch_size=5) for seed in (3, 4)]
    assert two[0].examples == two[1].examples, "runs of two seeds can be compared"
    # Evaluation: one pair a row, as wide as the longest.
    one = loaded.evals["validation"].batch(0)
    assert "segments" not in one and one["source"].shape[1] == 1 + max(map(len, held[0]))
    assert len(pack([], [], (3, 3))) == 0


def set_aside(rows, held):
    return [row for row in rows if row[0] not in set(held)]


@pytest.mark.parametrize("positions", ["rotary", "learned", "none"])
def test_a_pair_learns_the_same_in_company_as_alone(many, positions):
    """Sums of the loss over all pairs, float64; without segments they differ."""
    path, _ = many
    (_, packed), (_, alone) = pairs_of(path, packed=True), pairs_of(path)
    with jax.enable_x64(True):
        model = MODELS["encoder_decoder"](
            vocab_size=packed.vocab_size, source_vocab_size=packed.source_vocab_size, num_layers=1, embed_dim=8,
            num_heads=2, max_length=32, positions=positions, relative_buckets=8 * (positions == "none"), dropout=0.0,
            embed_dropout=0.0, attention_dropout=0.0, dtype="float64", param_dtype="float64",
        )  # fmt: skip
        variables = model.init(jax.random.key(0))

        def total(loaded, drop=()):
            source = loaded.train.source
            teach = Teach(loaded.source_tokenizer.pad, loaded.tokenizer.pad, loaded.decoder_start)
            batch = teach(source.gather(np.arange(len(source))), None)
            batch = {name: x for name, x in batch.items() if name not in drop}
            sums = jax.jit(lambda batch: objectives.seq2seq().sums(model.apply, variables, batch, train=False)[0])
            return float(sums(batch)["loss"]), batch["weights"].sum()

        (whole, count), (parts, same) = total(packed), total(alone)
        assert count == same and whole == pytest.approx(parts, rel=1e-12)
        assert abs(total(packed, ("segments",))[0] / parts - 1) > 1e-6


def test_symbols_rows_and_splits():
    symbols = Symbols.of(["AH B", "B K"], " ")
    assert symbols.decode(symbols.encode("K AH AH")) == "K AH AH"
    assert symbols.encode("K ZZ").tolist() == [symbols.vocab_size - 1, 2]
    rows = Ragged({"source": ([np.array([1, 2]), np.array([], np.int32), np.array([3])], 3)})
    assert rows.gather(np.array([2, 0, 1])).popitem()[1].tolist() == [[3, -1, -1], [1, 2, -1], [-1, -1, -1]]
    with pytest.raises(InputError, match="more than 1"):
        Ragged({"source": ([np.array([1, 2])], 1)})
    given = {"source": np.array([[4, -1]], np.int32), "target": np.array([[5, 1, -1]], np.int32)}
    taught = Teach(7, 8, 9)(given, None)
    assert {name: x.tolist() for name, x in taught.items()} == {
        "source": [[4, 7]], "source_segments": [[1, 0]], "tokens": [[9, 5, 1]], "targets": [[5, 1, 8]],
        "weights": [[1.0, 1.0, 0.0]],
    }  # fmt: skip
    sources = [f"s{i % 40}" for i in range(100)]
    for seed in (0, 1):
        out = hold_out(sources, sources, 0.25, seed)
        held = set(out["validation"][0])
        assert len(held) == 10 and not held & set(out["train"][0])
        assert sum(len(s) for s, _ in out.values()) == 100
    assert hold_out(sources, sources, 0.25, 0) != hold_out(sources, sources, 0.25, 1)


def restored(batch, row, first_sentinel):
    """(text with every run put back, runs) of one row of a corrupted batch."""
    source = batch["source"][row][batch["source_segments"][row] > 0].tolist()
    target = batch["targets"][row][batch["weights"][row] > 0].tolist()
    runs, at = {}, None
    for token in target[:-1]:
        at = token if token >= first_sentinel else at
        runs.setdefault(at, [])
        runs[at] += [token] * (token != at)
    out = []
    for token in source[:-1]:
        out += runs[token] if token >= first_sentinel else [token]
    return out, list(runs.values()), source


@pytest.mark.parametrize("row, rate, mean", [(128, 0.15, 3.0), (64, 0.5, 8.0), (7, 0.15, 3.0)])
def test_runs_put_back_give_the_text(row, rate, mean):
    n = 300
    corrupt = CorruptSpans(1000, 20, eos=1, pad=0, start=0, rate=rate, mean_span=mean)
    tokens = (np.arange(n * row) % 900 + 5).reshape(n, row)
    weights = np.ones((n, row))
    weights[1, row // 2 :] = 0
    batch = corrupt({"tokens": tokens, "weights": weights}, RowRng(3, np.arange(n)))
    assert (batch["source"].shape[1], batch["targets"].shape[1]) == lengths(row, rate, mean)
    noise, spans = (int(x[0]) for x in counts(np.array([row]), rate, mean))
    place = np.zeros(row)
    for r in range(n):
        real = int(weights[r].sum())
        text, runs, source = restored(batch, r, 1000)
        assert text == tokens[r, :real].tolist()
        assert source[-1] == 1 and source[0] < 1000  # kept tokens first
        names = [token for token in source if token >= 1000]
        assert names == [1019 - j for j in range(len(runs))]
        if r != 1:
            assert (sum(map(len, runs)), len(runs)) == (noise, spans) and min(map(len, runs)) > 0
            place += ~np.isin(tokens[r], source)
    assert batch["source_segments"][np.arange(n) != 1].all() and batch["weights"][np.arange(n) != 1].all()
    # The first place is always kept. A single run can only lie at the end; several lie anywhere.
    assert place[0] == 0 and place[-1] == n - 1
    assert place.sum() == noise * (n - 1)
    assert (place[row // 4 : -row // 4].min() > 0) == (spans > 1)
    # Pure in (seed, position): any rows, any order; another epoch has other runs.
    some = corrupt({"tokens": tokens[[7, 2]], "weights": weights[[7, 2]]}, RowRng(3, np.array([7, 2])))
    assert all((some[name] == batch[name][[7, 2]]).all() for name in some)
    later = corrupt({"tokens": tokens, "weights": weights}, RowRng(3, np.arange(n) + n))
    assert ((later["source"] != batch["source"]).any(1).mean() > 0.9) == (spans > 1)


def test_span_text_is_text_with_sentinels(tmp_path):
    options = dict(corpus=tiny.corpus(tmp_path / "corpus"), tokenizer="bytes", validation_fraction=0.2,
                   cache=str(tmp_path / "cache"))  # fmt: skip
    data = DATASETS["span_text"](length=32, sentinels=4, **options)
    loaded = data.load(seed=0, batch_size=4, eval_batch_size=4)
    plain = Text(length=32, **options).load(seed=0, batch_size=4, eval_batch_size=4)
    batch, text = loaded.train.batch(0), plain.train.batch(0)
    assert {name: (x.shape[1:], x.dtype.name) for name, x in batch.items()} == data.spec()
    size = plain.vocab_size
    assert (loaded.vocab_size, loaded.decoder_start) == (size + 4, plain.tokenizer.pad)
    for r in range(4):
        assert restored(batch, r, size)[0] == text["tokens"][r][text["weights"][r] > 0].tolist()
    assert "<extra_id_0>" in loaded.tokenizer.decode(batch["targets"][0])
    with pytest.raises(InputError, match="more than 1 sentinels"):
        DATASETS["span_text"](length=32, sentinels=1, rate=0.5, **options).load(
            seed=0, batch_size=4, eval_batch_size=4
        ).train.batch(0)
