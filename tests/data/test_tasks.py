"""Tags per word, answers as spans, conversations: every label sits where the text says."""

import json

import numpy as np
import pytest
from test_published import saved, trained

from bigmodel_jax.data.answers import Spans, token_span
from bigmodel_jax.data.instructions import PLAIN, Chat, Instructions, parts, render
from bigmodel_jax.data.tagged import LabelledTokens, word_of_piece
from bigmodel_jax.data.tokenizer import Bytes
from bigmodel_jax.errors import InputError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(data):
    return data.load(seed=0, batch_size=2, eval_batch_size=2)


def same_spec(data, batch):
    return {k: v.shape[1:] for k, v in batch.items()} == {k: shape for k, (shape, _) in data.spec().items()}


def test_words_of_pieces():
    words = ["ab", "c", "def"]
    spans = np.array([[0, 1], [1, 2], [2, 4], [4, 6], [6, 8], [4, 5]])
    assert word_of_piece("ab c def", spans, words).tolist() == [0, 0, 1, 2, 2, -1]


def test_the_first_piece_of_a_word_carries_its_label(tmp_path):
    rows = [{"words": ["ab", "né", "x"], "labels": ["O", "LOC", "O"]}, {"words": "in Rome now", "labels": "O LOC O"}]
    data = LabelledTokens(train=write(tmp_path / "t.jsonl", rows * 4), length=10, validation_share=0.25)
    found = load(data)
    batch = found.train.source.gather(np.arange(len(found.train)))
    assert found.report["classes"] == ["LOC", "O"] and found.num_classes == 2 and same_spec(data, found.train.batch(0))
    for tokens, labels, weights in zip(batch["tokens"], batch["labels"], batch["weights"], strict=True):
        text = Bytes().decode(tokens)
        if text.startswith("ab"):  # [eos] a b _ n é(2 bytes) _ x [eos]
            assert weights.tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 1, 0] and labels[[1, 4, 8]].tolist() == [1, 0, 1]
        else:  # "now" does not fit
            assert text == "in Rome " and weights.tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 0, 0]
    cut = found.report["truncation"]
    assert cut["train"]["truncated"] + cut["validation"]["truncated"] == 4
    bad = write(tmp_path / "b.jsonl", [rows[0], {"words": ["a"], "labels": []}])
    with pytest.raises(InputError, match="b.jsonl line 2: 1 words in 'words', 0 labels"):
        load(LabelledTokens(train=bad))
    with pytest.raises(InputError, match="label 'LOC' is not one of"):
        load(LabelledTokens(train=str(tmp_path / "t.jsonl"), classes=("O", "PER"), length=10, validation_share=0.25))


CONTEXT = "The old town of Trier lies on the Moselle."


def question(answer, start=None, **more):
    start = CONTEXT.index(answer) if start is None and answer else start
    answers = {"text": [answer] if answer else [], "answer_start": [start] if answer else []}
    return {"question": "Where?", "context": CONTEXT, "answers": answers} | more


def test_answers_are_found_in_every_window_that_holds_them(tmp_path):
    rows = [question("Trier"), question("the Moselle"), question("")]
    data = Spans(
        train=write(tmp_path / "t.jsonl", rows), validation=write(tmp_path / "v.jsonl", rows), length=32, stride=12
    )
    found = load(data)
    batch = found.train.source.gather(np.arange(len(found.train)))
    assert same_spec(data, found.train.batch(0))
    rows = zip(batch["tokens"], batch["start"], batch["end"], strict=True)
    answers = [Bytes().decode(tokens[start : end + 1]) for tokens, start, end in rows]
    owner = found.about["validation"]["question"]
    by_question = {q: {a for a, o in zip(answers, owner, strict=True) if o == q} - {""} for q in range(3)}
    assert by_question == {0: {"Trier"}, 1: {"the Moselle"}, 2: set()}
    covered = {i for t, kind in zip(batch["tokens"], batch["token_types"], strict=True) for i in t[kind > 0]}
    assert {ord(c) for c in CONTEXT} <= covered  # every character is in some window
    assert batch["start"][np.array(owner) == 2].tolist() == [0, 0, 0]
    assert found.report["windows"]["train"] == {
        "questions": 3, "windows": 9, "with_answer": len([a for a in answers if a]), "questions_cut": 0,
        "answers_never_whole": 0,
    }  # fmt: skip
    references = found.about["validation"]["references"]
    assert references[0] == ["Trier"] and references[-1] == [""]
    short = load(Spans(train=str(tmp_path / "t.jsonl"), validation=str(tmp_path / "v.jsonl"), length=16, stride=5))
    assert short.report["windows"]["train"]["answers_never_whole"] == 1  # counted, not lost in silence


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_an_answer_is_read_from_the_context_and_not_decoded(kind, tmp_path):
    """A published tokenizer may lower letters and set spaces: "Jay-Z's 3.5" would come back as "jay - z ' s 3. 5"."""
    answer = "Jay-Z's 3.5"
    context = f"It is {answer} of Trier."
    given = {"text": [answer], "answer_start": [context.index(answer)]}
    rows = [{"question": "What?", "context": context, "answers": given}] * 2
    file, folder = write(tmp_path / "t.jsonl", rows), saved(trained(kind), tmp_path / "tokenizer")
    found = load(Spans(train=file, validation=file, tokenizer=folder, length=96, stride=8))
    batch, pieces = found.train.source.gather(np.arange(1)), found.about["validation"]["pieces"]
    first, last = int(batch["start"][0]), int(batch["end"][0])
    assert pieces[0].text(first, last).strip() == answer
    assert pieces[0].text(0, 1) == "" and pieces[0].text(90, 95) == ""
    if kind == "wordpiece":
        assert found.tokenizer.decode(batch["tokens"][0, first : last + 1]).strip() != answer


def test_a_wrong_offset_is_refused(tmp_path):
    good = write(tmp_path / "v.jsonl", [question("Trier")])
    bad = write(tmp_path / "t.jsonl", [question("Trier"), question("Trier", start=3)])
    with pytest.raises(InputError, match="t.jsonl line 2: the answer 'Trier' is not at character 3"):
        load(Spans(train=bad, validation=good, length=32, stride=12))
    with pytest.raises(InputError, match="must be more than data.stride 40"):
        load(Spans(train=good, validation=good, length=32, stride=40))
    assert token_span(np.array([[0, 3], [3, 6], [6, 9]]), 4, 8) == (1, 2)
    assert token_span(np.array([[3, 6], [6, 9]]), 2, 8) is None


TALK = [
    {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]  # fmt: skip
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_an_answer_ends_at_the_token_of_its_template():
    """The end of text, and what the template closes an answer with. Control: a template that closes it with text."""
    closed = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ pad_token }}\n{% endfor %}"
    assert Chat(Bytes(), closed).ends(TALK) == (Bytes().eos, Bytes().pad)
    for template in (PLAIN, CHATML, "{% for m in messages %}{{ m.content }}.{% endfor %}"):
        assert Chat(Bytes(), template).ends(TALK) == (Bytes().eos,)


@pytest.mark.parametrize("template", ["", CHATML])
def test_only_answers_are_learned(template):
    chat = Chat(Bytes(), template)
    ids, answer = chat.encode(TALK)
    pieces = [Bytes().decode(run) for run in np.split(ids, np.flatnonzero(np.diff(answer)) + 1)]
    assert [p.strip() for p in pieces[1::2]] == ["Hello.", "See you."] and not answer[0]
    ends = np.flatnonzero((ids == 256) & answer)
    assert len(ends) == 2, "the end of an answer is learned too: it is what stops generation"
    prompt = chat.prompt(TALK[:2])
    assert prompt == ids[: len(prompt)].tolist() and not answer[: len(prompt)].any() and answer[len(prompt)]


def test_templates_are_boxed_in_and_checked():
    whole = render(PLAIN, TALK, tokens={"eos_token": "</s>"})
    assert "".join(text for text, _ in parts(PLAIN, TALK, {"eos_token": "</s>"})) == whole
    with pytest.raises(InputError, match="rewrites what came before"):
        parts("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", TALK)
    with pytest.raises(InputError, match="not Jinja"):
        render("{% for %}", TALK)
    with pytest.raises(InputError, match="fails on this conversation.*only two"):
        render("{{ raise_exception('only two') }}", TALK)
    for escape in ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(InputError, match="SecurityError"):
            render(escape, TALK)
    with pytest.raises(InputError, match="U[+]FDD0"):
        Chat(Bytes()).encode([{"role": "assistant", "content": "a\ufdd0"}])


def test_conversations_are_packed_whole(tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK[1:3]}, {"messages": TALK[1:3]}, {"messages": TALK[:3]}]
    path = write(tmp_path / "t.jsonl", rows)
    data = Instructions(train=path, validation=path, length=120)
    found = load(data)
    batch = found.train.source.gather(np.arange(len(found.train)))
    assert same_spec(data, found.train.batch(0)) and len(found.train) == 3
    talks = 0
    for row in range(len(found.train)):
        for number in range(1, batch["segments"][row].max() + 1):
            own = batch["segments"][row] == number
            assert batch["positions"][row][own].tolist() == list(range(own.sum()))
            tokens, targets = batch["tokens"][row][own], batch["targets"][row][own]
            assert (tokens[1:] == targets[:-1]).all()
            learned = Bytes().decode(targets[batch["weights"][row][own] > 0])
            assert "Hello." in learned and "Hi" not in learned and "Be kind" not in learned
            talks += 1
    assert talks == 4 and not batch["weights"][batch["segments"] == 0].any()
    tight = load(Instructions(train=path, validation=path, length=40))
    assert tight.report["truncation"]["train"]["truncated"] == 2
    bad = write(tmp_path / "b.jsonl", [{"messages": TALK[:2]}])
    with pytest.raises(InputError, match="b.jsonl line 1: 'messages' should be a list"):
        load(Instructions(train=bad, validation=path))
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "2+2?", "response": "4"}] * 2)
    learned = load(Instructions(train=pairs, validation=pairs, messages="", length=40)).train.batch(0)
    assert Bytes().decode(learned["targets"][0][learned["weights"][0] > 0]).strip() == "4"


def test_a_held_out_conversation_asks_for_its_last_answer(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"messages": TALK, "who": "a"}, {"messages": TALK[1:3], "who": "b"}])
    data = Instructions(train=path, validation=path, length=120, group="who")
    found = load(data)
    about, chat = found.about["validation"], Chat(Bytes())
    assert len(found.train) == 2 and found.evals["validation"].batch(0)["segments"].max() == 1  # one to a row
    assert about["references"] == [["See you."], ["Hello."]] and about["group"] == ["a", "b"]
    for row, messages in enumerate((TALK[:4], TALK[1:2])):
        rows = found.evals["validation"].source.gather(np.array([row]))
        assert about["prompt"][row] == chat.prompt(messages) == rows["tokens"][0, : len(about["prompt"][row])].tolist()
        learned = np.flatnonzero(rows["weights"][0])
        assert learned[-1] + 2 - len(about["prompt"][row]) == about["new_tokens"][row]
    # Where the last answer is not in the row, the one before it is asked for; control: nothing else is.
    short = load(Instructions(train=path, validation=path, length=len(chat.prompt(TALK[:2])) + 5)).about["validation"]
    assert short["references"] == [["Hello."], ["Hello."]] and short["prompt"][0] == chat.prompt(TALK[:2])
    assert "group" not in short
