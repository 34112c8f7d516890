"""Tokenizers that come with published models, from the files they are published as.

    tokenizer.json                     anything the `tokenizers` library runs: BPE, WordPiece, Unigram
    vocab.txt                          WordPiece, as BERT's
    vocab.json + merges.txt            byte-level BPE, as GPT-2's
    tokenizer.model, spiece.model      SentencePiece, as Llama's

The first that is there is taken. Roles of ids (end of text, classification, mask ...) and the chat template are
read from tokenizer_config.json and special_tokens_map.json beside it. Not all of these are lossless: `lossless`
says so, and where it is False byte lengths are those of the pieces as text, not of the original.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bigmodel_jax import atomic
from bigmodel_jax.data.pieces import SPACE, Tokenizer, cores, one_line, piece_bytes, utf8
from bigmodel_jax.data.storage import is_url, join, read_bytes
from bigmodel_jax.errors import InputError

FOLDER = "tokenizer"  # below a run or a prepared directory
JSON, WORDPIECE, VOCAB, MERGES = "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
MAX_BYTES = 256 << 20
ROLES = ("eos", "bos", "pad", "mask", "unk", "cls", "sep")
# What an id is called where no file says what it is for.
_USUAL = {
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"), "pad": ("<pad>", "[PAD]"), "mask": ("<mask>", "[MASK]"),
    "unk": ("<unk>", "[UNK]"), "cls": ("[CLS]",), "sep": ("[SEP]",),
}  # fmt: skip

# Classes of fairseq's byte-level BPE, which puts two separators between two texts (Liu et al. 2019).
_DOUBLED = ("Roberta", "Longformer", "Bart", "LED")


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable character for each byte (Radford et al. 2019): {character: byte}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class Published(Tokenizer):
    """A published tokenizer. See Tokenizer; and

    files: {name: content} it was made from, which `save` writes again.
    lossless: decode(encode(x)) == x for every text. pair: (id before, ids between, id after two texts, token type of
    the second) where the tokenizer says how it frames them, else None.
    """

    kind = "published"
    pair: tuple[int, tuple[int, ...], int, int] | None = None

    def __init__(
        self, files: Mapping[str, bytes], table: Sequence[bytes], ids: Mapping[str, int], special: Iterable[int],
        where: str, first: Sequence[int] = (), lossless: bool = False,
    ):  # fmt: skip
        self.files, self.lossless = dict(files), lossless
        roles, self.chat_template = _roles(files, ids, where)
        fingerprint = hashlib.sha256()
        for name, content in sorted(files.items()):
            fingerprint.update(f"{name} {len(content)}\n".encode() + content)
        end = roles["eos"] if roles["eos"] is not None else roles["sep"]
        if end is None:
            raise InputError(f"the tokenizer in '{where}' names no eos_token; say which in tokenizer_config.json")
        pad = roles["pad"] if roles["pad"] is not None else end
        super().__init__(table, special, end, pad, roles["mask"], fingerprint.hexdigest())
        self.bos, self.cls, self.sep, self.unk = (roles[name] for name in ("bos", "cls", "sep", "unk"))
        starts = _config(files).get("add_bos_token") and self.bos is not None
        self._first = tuple(first) or ((self.bos,) if starts else ())

    def prompt(self, text: str) -> list[int]:
        ids = [*self._first, *self.encode(text).tolist()]
        return ids or [self.bos if self.bos is not None else self.eos]

    def save(self, directory: str) -> str:
        for name, content in self.files.items():
            atomic.write(os.path.join(directory, name), content)
        return FOLDER


class Rust(Published):
    """One that the `tokenizers` library runs."""

    def __init__(self, files: Mapping[str, bytes], engine: Any, where: str):
        engine.no_truncation()
        engine.no_padding()
        # Text that reads like a special token is text, unless the caller says otherwise.
        engine.encode_special_tokens = True
        self._engine = engine
        about = json.loads(engine.to_str())
        vocabulary = engine.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise InputError(f"the tokenizer in '{where}' has no vocabulary")
        added = {int(i): token for i, token in engine.get_added_tokens_decoder().items()}
        special = {i for i, token in added.items() if token.special}
        self._style = _style(about)
        table = [b""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            if index not in special:
                table[index] = token.encode() if index in added else _STYLES[self._style](token)
        super().__init__(
            files, table, vocabulary, special, where,
            first=self._framing(), lossless=self._style == "bytes" and not about.get("normalizer"),
        )  # fmt: skip
        self.pair = self._pair()

    def _pair(self) -> tuple[int, tuple[int, ...], int, int] | None:
        found = self._engine.encode("a", "a", add_special_tokens=True)
        first, second = ([i for i, text in enumerate(found.sequence_ids) if text == side] for side in (0, 1))
        if not first or not second or first[0] != 1 or second[-1] != len(found) - 2 or first[-1] + 1 == second[0]:
            return None
        between = tuple(found.ids[first[-1] + 1 : second[0]])
        return found.ids[0], between, found.ids[-1], found.type_ids[second[0]]

    def _framing(self) -> list[int]:
        """Special ids that the library puts before a text of a decoder: none, or the begin of text alone."""
        framed = self._engine.encode("a", add_special_tokens=True)
        marks = framed.special_tokens_mask
        n = next((i for i, mark in enumerate(marks) if not mark), 0)
        return framed.ids[:n] if n and not marks[-1] else []

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        for text in texts:
            utf8(text)
        return self._engine.encode_batch(list(texts), add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[np.ndarray]:
        return [np.array(found.ids, np.int32) for found in self._encoded(texts)]

    def encode_markup(self, text: str) -> np.ndarray:
        self._engine.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._engine.encode_special_tokens = True

    def encode_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        (found,) = self._encoded([text])
        return np.array(found.ids, np.int32), np.array(found.offsets, np.int32).reshape(-1, 2)

    def decode(self, ids: Iterable[int], continued: bool = False) -> str:
        if self._style == "bytes":
            return super().decode(ids)
        kept = [int(i) for i in ids]
        super().decode_bytes(kept)  # refuses ids outside the vocabulary
        text = self._engine.decode([i for i in kept if not self._special[i]], skip_special_tokens=True)
        return " " + text if continued and text and self._begins_word(kept) else text

    def _begins_word(self, ids: list[int]) -> bool:
        first = next((self.table[i] for i in ids if self.table[i]), b"")
        return first.startswith(b" ")

    def starts_word(self) -> np.ndarray:
        if self._style != "wordpiece":
            return super().starts_word()
        return np.array([s or piece[:1] == b" " for s, piece in zip(self._special, self.table, strict=True)], bool)


def _style(about: Mapping[str, Any]) -> str:
    """How tokens spell text: "bytes" (GPT-2's characters), "wordpiece" (## continues), or "space" (its sign)."""
    parts = json.dumps([about.get("pre_tokenizer"), about.get("decoder")])
    if '"ByteLevel"' in parts:
        return "bytes"
    return "wordpiece" if about["model"].get("type") == "WordPiece" else "space"


CHARACTERS = _bytes_of_characters()


def _byte_level(token: str) -> bytes:
    known = all(c in CHARACTERS for c in token)
    return bytes(CHARACTERS[c] for c in token) if known else token.encode()


def _wordpiece(token: str) -> bytes:
    return token[2:].encode() if token.startswith("##") else b" " + token.encode()


def _space(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()


_STYLES = {"bytes": _byte_level, "wordpiece": _wordpiece, "space": _space}


class Llama(Published):
    """A SentencePiece model with its own ids, which may normalise text and puts a space before it."""

    def __init__(self, files: Mapping[str, bytes], model: bytes, where: str):
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"'{where}' is not a SentencePiece model: {one_line(error)}") from None
        self._processor = processor
        size = processor.get_piece_size()
        special = [i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)]
        ids = {processor.id_to_piece(i): i for i in range(size)}
        begin = processor.bos_id()
        super().__init__(
            files, [piece_bytes(processor, i) for i in range(size)], ids, special, where,
            first=(begin,) if begin >= 0 and _config(files).get("add_bos_token", True) else (),
        )  # fmt: skip
        self._dummy = processor.encode("a", out_type=str)[:1] in ([SPACE + "a"], [SPACE])

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        encoded = self._processor.encode(list(texts), num_threads=threads or cores()) if texts else []
        return [np.array(ids, np.int32) for ids in encoded]

    def decode(self, ids: Iterable[int], continued: bool = False) -> str:
        text = super().decode(ids)
        return text[1:] if self._dummy and not continued and text.startswith(" ") else text

    def encode_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids, spans = super().encode_offsets(" " + text if self._dummy else text)
        ids = self.encode(text)
        return ids, np.clip(spans[: len(ids)] - self._dummy, 0, len(text))


def _config(files: Mapping[str, bytes]) -> dict[str, Any]:
    return _object(files, "tokenizer_config.json")


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} of the tokenizer is not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{name} of the tokenizer should hold a JSON object")
    return value


def _roles(files: Mapping[str, bytes], ids: Mapping[str, int], where: str) -> tuple[dict[str, int | None], str]:
    """({role: id or None}, chat template)."""
    config = _config(files)
    stated = _object(files, "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
    out: dict[str, int | None] = {}
    for role in ROLES:
        token = stated.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token not in ids:
            raise InputError(f"the tokenizer in '{where}' names {role}_token {token!r}, which it does not have")
        names = (token,) if isinstance(token, str) else _USUAL[role]
        out[role] = next((ids[name] for name in names if name in ids), None)
    # A file of its own comes first, as in transformers.
    template = files.get("chat_template.jinja", b"").decode("utf-8", "replace") or config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default") or next(iter(named.values()), "")
    return out, template if isinstance(template, str) else ""


def _wordpiece_engine(files: Mapping[str, bytes], where: str) -> Any:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    words = files[WORDPIECE].decode("utf-8").split("\n")
    words = [word.rstrip("\r") for word in words[: -1 if words[-1] == "" else None]]
    vocabulary = {word: i for i, word in enumerate(words)}
    config = _config(files)
    if len(vocabulary) != len(words) or "[UNK]" not in vocabulary:
        raise InputError(f"{WORDPIECE} in '{where}' repeats a piece, or has no [UNK]")
    engine = Engine(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    engine.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True), strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )  # fmt: skip
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    return _with_special(engine, files, vocabulary, where)


def _byte_engine(files: Mapping[str, bytes], where: str) -> Any:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocabulary = _object(files, VOCAB)
    lines = files[MERGES].decode("utf-8").split("\n")
    merges = [tuple(line.rstrip("\r").split(" ")) for line in lines if line and not line.startswith("#version")]
    if not all(type(i) is int for i in vocabulary.values()) or any(len(pair) != 2 for pair in merges):
        raise InputError(f"{VOCAB} and {MERGES} in '{where}' should map pieces to ids, and hold pairs of pieces")
    engine = Engine(models.BPE(vocabulary, merges))
    space = bool(_config(files).get("add_prefix_space", False))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    engine.decoder = decoders.ByteLevel()
    if str(_config(files).get("tokenizer_class", "")).startswith(_DOUBLED) and {"<s>", "</s>"} <= vocabulary.keys():
        ends = [(name, vocabulary[name]) for name in ("<s>", "</s>")]
        engine.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", ends)
    return _with_special(engine, files, vocabulary, where)


def _with_special(engine: Any, files: Mapping[str, bytes], ids: Mapping[str, int], where: str) -> Any:
    """Mark the ids that have a role, unless they spell text (GPT-2's end of text does not)."""
    roles, _ = _roles(files, ids, where)
    names = {i: name for name, i in ids.items()}
    engine.add_special_tokens([names[i] for i in sorted({i for i in roles.values() if i is not None})])
    return engine


def open_published(folder: str) -> Published | None:
    """The tokenizer of a folder (or URL) of a published model, None where there is none.

    Raises:
      InputError: files that are damaged, or disagree.
    """
    files: dict[str, bytes] = {}

    def take(*names: str) -> bool:
        for name in names:
            path = join(folder, name)
            try:
                if not is_url(path) and os.path.getsize(path) > MAX_BYTES:
                    raise InputError(f"'{path}' has more than {MAX_BYTES} bytes; that is no tokenizer")
                files[name] = read_bytes(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def beside() -> None:
        for name in BESIDE:
            take(name)

    if take(JSON):
        beside()
        from tokenizers import Tokenizer as Engine

        return _guarded(lambda: Rust(files, Engine.from_str(files[JSON].decode("utf-8")), folder), folder)
    if take(VOCAB, MERGES):
        beside()
        return _guarded(lambda: Rust(files, _byte_engine(files, folder), folder), folder)
    files.clear()
    if take(WORDPIECE):
        beside()
        return _guarded(lambda: Rust(files, _wordpiece_engine(files, folder), folder), folder)
    for name in SENTENCEPIECE:
        if take(name):
            beside()
            return Llama(files, files[name], join(folder, name))
    return None


def _guarded(make: Any, folder: str) -> Published:
    """The library's errors, and its panics, in one line."""
    try:
        return make()
    except (InputError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise InputError(f"the tokenizer in '{folder}' cannot be read: {one_line(error)}") from None
