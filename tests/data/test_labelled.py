"""Labelled texts: rows, splits and report of a small table, and everything that is refused."""

import json
import logging

import numpy as np
import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers, processors, trainers

from bigmodel_jax.data.answers import Spans
from bigmodel_jax.data.framing import Cut, fit_pair, frame_texts
from bigmodel_jax.data.labelled import CausalTable, LabelledText, MaskedTable, MaskedTablePairs
from bigmodel_jax.data.tokenizer import Bytes, load_tokenizer
from bigmodel_jax.errors import InputError


def table(folder, rows=60, name="train.csv"):
    lines = [f"text {i},{'rare' if i % 12 == 0 else 'often'},m{i // 4}" for i in range(rows)]
    (folder / name).write_text("text,label,movie\n" + "\n".join(lines) + "\n")
    return str(folder / name)


def load(**options):
    return LabelledText(**options).load(seed=1, batch_size=8, eval_batch_size=8)


def test_rows_are_framed_cut_and_padded():
    tokenizer, cut = Bytes(), Cut()
    rows = frame_texts(tokenizer, ["abc", "abcdefgh"], None, 6, cut)
    np.testing.assert_array_equal(rows["tokens"], [[256, 97, 98, 99, 256, 257], [256, 97, 98, 99, 100, 256]])
    np.testing.assert_array_equal(rows["segments"], [[1, 1, 1, 1, 1, 0], [1] * 6])
    assert cut.report() == {"rows": 2, "truncated": 1, "tokens": 11, "tokens_lost": 4}
    tokenizer.cls, tokenizer.sep = 3, 4
    pair = frame_texts(tokenizer, ["ab"], ["cdef"], 8, Cut())
    np.testing.assert_array_equal(pair["tokens"], [[3, 97, 98, 4, 99, 100, 101, 4]])
    np.testing.assert_array_equal(pair["token_types"], [[0, 0, 0, 0, 1, 1, 1, 1]])
    with pytest.raises(InputError, match="no room"):
        frame_texts(tokenizer, ["a"], ["b"], 3, Cut())


def framed(kind, folder, form):
    """(tokenizer of ours, the library's) of a small byte-level BPE with the special tokens of RoBERTa or BERT."""
    names = {"roberta": ("<s>", "</s>", "<pad>"), "bert": ("[CLS]", "[SEP]", "[PAD]")}[kind]
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.train_from_iterator(["a pair of texts"] * 9, trainers.BpeTrainer(
        special_tokens=list(names), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))  # fmt: skip
    first, last = ((name, engine.token_to_id(name)) for name in names[:2])
    make = {"roberta": processors.RobertaProcessing, "bert": processors.BertProcessing}[kind]
    engine.post_processor = make(last, first)
    config = {"cls_token": names[0], "sep_token": names[1], "pad_token": names[2], "eos_token": names[1]}
    folder.mkdir()
    if form == "json":
        (folder / "tokenizer.json").write_text(engine.to_str())
    else:  # nothing but the class says how texts are framed
        engine.model.save(str(folder))
        config["tokenizer_class"] = "RobertaTokenizer" if kind == "roberta" else "GPT2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(folder)), engine


@pytest.mark.parametrize(("kind", "form"), [("roberta", "json"), ("roberta", "files"), ("bert", "json")])
def test_two_texts_are_framed_as_the_library_frames_them(kind, form, tmp_path):
    """Controls: BERT has one separator and two token types, RoBERTa two separators and one type."""
    ours, engine = framed(kind, tmp_path / "tokenizer", form)
    texts, pairs = ["a pair", "of"], ["of texts", "a text, longer"]
    found = frame_texts(ours, texts, pairs, 32, Cut())
    alone = frame_texts(ours, texts, None, 32, Cut())
    for row in range(2):
        for rows, other in ((found, pairs[row]), (alone, None)):
            want = engine.encode(texts[row], other)
            used = rows["segments"][row] > 0
            assert rows["tokens"][row][used].tolist() == want.ids
            if other:
                assert rows["token_types"][row][used].tolist() == want.type_ids
                assert max(want.type_ids) == (kind == "bert")
        assert (found["tokens"][row] == ours.sep).sum() == {"roberta": 3, "bert": 2}[kind]
    asked = {"question": texts[0], "context": "of texts", "answers": {"text": ["texts"], "answer_start": [3]}}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    file, folder = str(tmp_path / "asked.jsonl"), str(tmp_path / "tokenizer")
    data = Spans(train=file, validation=file, tokenizer=folder, length=24, stride=2)
    rows = data.load(seed=0, batch_size=1, eval_batch_size=1).train.source.gather(np.array([0]))
    want = engine.encode(asked["question"], asked["context"])
    assert rows["tokens"][0][rows["segments"][0] > 0].tolist() == want.ids
    assert rows["token_types"][0][rows["segments"][0] > 0].tolist() == want.type_ids
    assert ours.decode(want.ids[rows["start"][0] : rows["end"][0] + 1]).strip() == "texts"
    cut = frame_texts(ours, texts, pairs, 8, Cut())["tokens"]
    assert ((cut == ours.sep).sum(1) == {"roberta": 3, "bert": 2}[kind]).all() and cut[1, -1] == ours.sep


@pytest.mark.parametrize("room", [1, 4, 7, 10, 30])
def test_the_longer_of_two_is_cut_first(room):
    for a in range(12):
        for b in range(12):
            n, m = a, b
            while n + m > room:
                n, m = (n - 1, m) if n >= m else (n, m - 1)
            assert fit_pair(a, b, room) == (n, m)


def test_a_table_becomes_splits_with_a_report(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="bigmodel_jax"):
        found = load(train=table(tmp_path), length=16, folds=3, fold=1, validation_share=0.2, group="movie")
    assert found.num_classes == 2 and found.report["classes"] == ["often", "rare"]
    counts = found.report["counts"]
    assert sum(sum(c.values()) for c in counts.values()) == 60 and min(counts["test"].values()) >= 1
    assert {n: len(p) for n, p in found.evals.items()} == {n: sum(counts[n].values()) for n in ("validation", "test")}
    said = " ".join(caplog.messages)
    assert "rare 6.2%" in said and "balanced objective.class_weights" in said
    batch = found.train.batch(0)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        k: ((8, *shape), dtype) for k, (shape, dtype) in LabelledText(length=16).spec().items()
    }
    text = Bytes().decode(batch["tokens"][0])
    assert batch["label"][0] == (int(text.split()[1]) % 12 == 0)
    movies = {n: {int(Bytes().decode(row).split()[1]) // 4 for row in p.source.gather(np.arange(len(p)))["tokens"]}
              for n, p in {"train": found.train, **found.evals}.items()}  # fmt: skip
    assert not (movies["train"] & movies["test"] or movies["train"] & movies["validation"])
    other = load(train=table(tmp_path), length=16, folds=3, fold=2, validation_share=0.2, group="movie")
    assert other.fingerprint != found.fingerprint
    again = load(train=table(tmp_path), length=16, folds=3, fold=1, validation_share=0.2, group="movie")
    assert again.fingerprint == found.fingerprint


def test_test_rows_leave_the_training_set(tmp_path):
    train, test = table(tmp_path, 24), table(tmp_path, 6, "test.csv")
    kept = load(train=train, test=test, validation_share=0.0, length=16)
    assert kept.report["duplicates"]["between"]["train/test"] == {"exact": 6, "normalised": 6}
    dropped = load(train=train, test=test, validation_share=0.0, length=16, drop_duplicates="exact")
    assert len(kept.train) == 24 and len(dropped.train) == 18 and len(dropped.evals["test"]) == 6
    assert dropped.report["duplicates"]["after_splitting"]["train/test"]["exact"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "labels"}, "no column 'labels'; did you mean 'label'"),
        ({"classes": ("often",)}, "only the label"),
        ({"classes": ("often", "never")}, "label 'rare' is not one of"),
        ({"classes": ("often", "never"), "other_labels": "drop"}, "no training row has the label 'never'"),
        ({"folds": 3, "fold": 3}, "data.fold 3 must lie in 0..2"),
        ({"validation_share": 0.0}, "nothing is held out"),
        ({"group": "film"}, "no column 'film'"),
        ({"train": ""}, "must name the training files"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        load(**{"train": table(tmp_path), "length": 16} | options)


def test_the_same_rows_without_labels_for_pretraining(tmp_path):
    options = {"train": table(tmp_path), "length": 16, "folds": 3, "fold": 1, "validation_share": 0.2, "group": "movie"}
    labelled, masked = load(**options), MaskedTable(**options).load(seed=1, batch_size=8, eval_batch_size=8)
    batch = masked.train.batch(0)
    assert {k: v.shape[1:] for k, v in batch.items()} == {k: s for k, (s, _) in MaskedTable(length=16).spec().items()}
    assert set(masked.evals) == {"validation"}, "the test set is not even evaluated on"

    def rows(source):
        found = source.gather(np.arange(len(source)))
        return {tuple(row[used > 0]) for row, used in zip(found["tokens"], found["segments"], strict=True)}

    assert rows(masked.train.source) == rows(labelled.train.source)
    assert not rows(masked.train.source) & rows(labelled.evals["test"].source)
    short = MaskedTable(**options | {"length": 6}).load(seed=1, batch_size=8, eval_batch_size=8)
    assert {row[1:5] for row in rows(short.train.source)} > {tuple(b"text")}
    assert len(short.train) >= 2 * len(masked.train)  # long texts go on in the next row
    learned = options | {"tokenizer": "bpe", "vocab_size": 330}
    again = MaskedTable(**learned).load(seed=2, batch_size=8, eval_batch_size=8)
    assert load(**learned).tokenizer.fingerprint == again.tokenizer.fingerprint
    causal = CausalTable(**options).load(seed=1, batch_size=8, eval_batch_size=8)
    batch = causal.train.batch(0)
    assert {k: v.shape[1:] for k, v in batch.items()} == {k: s for k, (s, _) in CausalTable(length=16).spec().items()}
    assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:])[batch["weights"][:, :-1] > 0].all()
    assert 0 < batch["weights"].mean() < 1
    longer = MaskedTable(**options | {"length": 17}).load(seed=1, batch_size=8, eval_batch_size=8)
    assert {tuple(row) for row in causal.train.source.gather(np.arange(len(causal.train.source)))["tokens"]} == {
        tuple(row) for row in longer.train.source.gather(np.arange(len(longer.train.source)))["tokens"]
    }


def test_masked_rows_end_to_end_hold_every_text_once_and_pairs_come_from_them(tmp_path):
    texts = [f"text number {n} is {'long ' * (n % 7)}" for n in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": t, "label": "ab"[n % 2]}) + "\n" for n, t in enumerate(texts)))
    leaves = dict(train=str(file), tokenizer="bpe", vocab_size=340, length=32, validation_share=0.2)
    sizes = dict(seed=0, batch_size=4, eval_batch_size=4)
    found = MaskedTable(**leaves, stream=True).load(**sizes)
    rows = found.train.source.gather(np.arange(len(found.train.source)))
    kept = rows["tokens"][rows["segments"] > 0]
    assert (rows["segments"][:-1] == 1).all()
    said = found.tokenizer.decode([int(i) for i in kept if i != found.tokenizer.eos])
    assert sum(len(t) for t in texts) > len(said) and all(said.count(f"number {n} is") <= 1 for n in range(60))
    assert sum(f"number {n} is" in said for n in range(60)) == int((kept == found.tokenizer.eos).sum()) == 48
    alone = MaskedTable(**leaves).load(**sizes)
    assert len(alone.train.source) > len(found.train.source)

    pairs = MaskedTablePairs(**leaves, static=True).load(**sizes)
    batch = pairs.train.batch(0)
    assert batch["tokens"].shape == (4, 32) and set(batch["token_types"].ravel()) == {0, 1}
    many = np.concatenate([pairs.train.batch(n)["random"] for n in range(40)])
    assert 0.35 < many.mean() < 0.65
    with pytest.raises(InputError, match="stream=False is for 'masked_table'"):
        MaskedTablePairs(**leaves, stream=False)
