"""What a data set gives a run: pipelines, sizes and a report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bigmodel_jax.data.order import BatchRamp
from bigmodel_jax.data.pipeline import Pipeline, describe

Spec = dict[str, tuple[tuple[int, ...], str]]
Progress = Callable[[str, float, float], None] | None


class Loaded(NamedTuple):
    """Pipelines of one data set. Sizes that do not apply are 0.

    image_size: side of square images. num_features: numbers per row, of images all of their values.
    num_classes: classes, or numbers to predict in a regression.

    source_tokenizer, source_vocab_size: of an encoder's text where it is not the decoder's; decoder_start: the
    token that a decoder's text begins with; ends: those that end it, where that is not the tokenizer's end of text
    alone.
    report: what a person should know of the data (class counts, duplicates, what was cut), JSON values;
      "classes" are the names of the labels.
    about: {evaluation set: {column: one value per example of its source}}, what `bigmodel eval` uses beside
      the batches: "text" shown to people, "references" (accepted texts, a list each) that make it a
      generation task, for a decoder with "prompt" (text, or token ids) and "new_tokens" (of the longest reference),
      "group" (examples of one group are not independent).
    """

    train: Pipeline | None
    evals: dict[str, Pipeline]
    tokenizer: Any = None
    vocab_size: int = 0
    num_classes: int = 0
    in_channels: int = 0
    image_size: int = 0
    num_features: int = 0
    prefers_tfdata: bool = False
    report: dict[str, Any] = {}
    about: Mapping[str, Mapping[str, Sequence[Any]]] = {}
    source_tokenizer: Any = None
    source_vocab_size: int = 0
    decoder_start: int = -1
    ends: tuple[int, ...] = ()

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end what is written: ends, or the tokenizer's end of text where none are given."""
        return self.ends or (self.tokenizer.eos,)

    @property
    def first_token(self) -> int:
        """What an encoder-decoder's text begins with: decoder_start, or the end of text where that is not given."""
        return self.decoder_start if self.decoder_start >= 0 else self.tokenizer.eos

    @property
    def fingerprint(self) -> str:
        """Of the training order and content, and of every evaluation set."""
        train = self.train.fingerprint if self.train else "none"
        parts = [train, *(f"{n}:{p.fingerprint}" for n, p in sorted(self.evals.items()))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def examples(self) -> dict[str, str]:
        """{"train" or evaluation set: fingerprint}: what two runs must share to be compared, seeds aside.

        Of the training set the examples alone; of an evaluation set also its transforms, which decide what is asked.
        """
        out = {"train": self.train.source.fingerprint if self.train else "none"}
        for name, held_out in self.evals.items():
            parts = [held_out.source.fingerprint, *map(describe, held_out.transforms)]
            out[name] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return out

    @property
    def rows(self) -> dict[str, int]:
        """{"train" or evaluation set: its examples}."""
        sets = {"train": self.train, **self.evals}
        return {name: len(pipeline.source) for name, pipeline in sets.items() if pipeline is not None}


def ramp(batch_size: int | tuple) -> int | BatchRamp:
    """A batch size, or a ramp from ((first step, rows), ...)."""
    return batch_size if isinstance(batch_size, int) else BatchRamp(tuple(map(tuple, batch_size)))
