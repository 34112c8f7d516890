"""Generation tasks: what a model writes for each input of an evaluation set, beside what it should have written.

An encoder-decoder is asked once for each distinct source, and any target that the set lists for it counts as right.
A decoder is asked where the data gives prompts and references (`Loaded.about`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from bigmodel_jax.data.pipeline import Pipeline
from bigmodel_jax.experiment import Experiment
from bigmodel_jax.generate import Generator, Sampling


@dataclass(frozen=True)
class Task:
    """ids: example number of each input [n]. prompts: what the decoder begins with; sources: what an encoder
    reads, or None. references: accepted texts of each. texts: the inputs for people. length: new tokens at most.
    """

    ids: np.ndarray
    prompts: list[list[int]]
    sources: list[list[int]] | None
    references: list[list[str]]
    texts: list[str]
    length: int


def task(exp: Experiment, name: str, pipeline: Pipeline, batches: int = 0, length: int = 0) -> Task | None:
    """The generation task of an evaluation set; None where it is none.

    Args:
      batches: the first so many, 0 for all. length: new tokens at most, 0: of the longest target, or 64.
    """
    columns = exp.data.about.get(name, {})
    if exp.model.encode is not None and "source" in exp.spec:
        return _pairs(exp, columns, pipeline, batches, length)
    if exp.model.cache is None or not {"prompt", "references"} <= set(columns):
        return None
    count = len(columns["prompt"]) if not batches else min(len(columns["prompt"]), batches * pipeline.size(0))
    given, tokenizer = columns["prompt"][:count], exp.data.tokenizer
    prompts = [tokenizer.prompt(prompt) if isinstance(prompt, str) else list(prompt) for prompt in given]
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in given]
    references = [list(accepted) for accepted in columns["references"][:count]]
    longest = max(columns.get("new_tokens", [64])[:count])
    return Task(np.arange(count), prompts, None, references, texts, length or longest)


def _pairs(exp: Experiment, columns: Any, pipeline: Pipeline, batches: int, length: int) -> Task:
    """Distinct sources in order, each with all its targets."""
    data = exp.data
    reader = data.source_tokenizer or data.tokenizer
    first: dict[bytes, int] = {}
    ids, sources, references = [], [], []
    longest = 1
    for step in range(min(batches or pipeline.num_eval_batches, pipeline.num_eval_batches)):
        batch, numbers = pipeline.batch(step), pipeline.ids(step)
        for row in np.flatnonzero(numbers >= 0):
            source = batch["source"][row][batch["source_segments"][row] > 0].astype(np.int32)
            target = batch["targets"][row][batch["weights"][row] > 0]
            longest = max(longest, len(target))
            place = first.setdefault(source.tobytes(), len(ids))
            if place == len(ids):
                ids.append(int(numbers[row]))
                sources.append(source.tolist())
                references.append([])
            given = columns["references"][numbers[row]] if "references" in columns else [data.tokenizer.decode(target)]
            references[place] += [text for text in given if text not in references[place]]
    texts = [reader.decode(source) for source in sources]
    return Task(np.array(ids), [[data.first_token]] * len(ids), sources, references, texts, length or longest)


def predict(exp: Experiment, variables: Any, asked: Task, rows: int) -> list[str]:
    """Greedy answers, in order; `rows` inputs at a time, those of about one length together.

    A prompt that leaves fewer positions than `asked.length` gets those, apart from the others: what is written never
    depends on `rows`.
    """
    tokenizer = exp.data.tokenizer
    model = Generator(exp.model, variables, layout=exp.layout, eos=exp.data.end_tokens, pad=tokenizer.pad)

    def write(places: Sequence[int], length: int) -> list[str]:
        sources = None if asked.sources is None else [asked.sources[i] for i in places]
        found = model(
            [asked.prompts[i] for i in places], length=length, key=jax.random.key(0),
            sampling=Sampling(temperature=0.0), sources=sources,
        )  # fmt: skip
        return [tokenizer.decode(row.tokens, continued=asked.sources is None) for row in found]

    def answer(places: Sequence[int]) -> list[str]:
        longest = model.longest()
        room = {i: min(longest - len(asked.prompts[i]), asked.length) if longest else asked.length for i in places}
        if len(set(room.values())) == 1 and room[places[0]] > 0:
            return write(places, room[places[0]])
        return [write([i], room[i])[0] if room[i] > 0 else "" for i in places]

    sizes = [len(ids) for ids in (asked.sources or asked.prompts)]
    return in_batches(answer, sizes, rows)


def in_batches(answer: Callable[[Sequence[int]], list[str]], sizes: Sequence[int], rows: int) -> list[str]:
    """`answer(places)` for all places, the longest first; the last batch repeats one to be as large as the others."""
    order = np.argsort(-np.asarray(sizes), kind="stable")
    out = [""] * len(sizes)
    for start in range(0, len(order), rows):
        some = order[start : start + rows].tolist()
        filled = some + [some[0]] * (min(rows, len(order)) - len(some))
        for place, text in zip(some, answer(filled), strict=False):
            out[place] = text
    return out
