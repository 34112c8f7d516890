"""Our tokenizers as tokenizer.json, so that what was trained here opens elsewhere with the same ids.

Bytes are byte-level BPE without merges. A SentencePiece model of ours becomes the library's BPE (whose merges
are read off the pieces: SentencePiece joins the neighbours whose union has the best score) or Unigram, both
with byte fallback. The result is compared with the original on sample texts, and not written where it differs: a
unigram model with runs of tabs as symbols does, and keeps to tokenizer.model.
"""

from __future__ import annotations

import json
import math
from typing import Any

from bigmodel_jax.data.pieces import SPACE, Bytes, Tokenizer
from bigmodel_jax.data.published import CHARACTERS

SPECIAL = {"eos": "<|endoftext|>", "pad": "<pad>", "mask": "<mask>"}
SAMPLES = (
    "Hello, world! It's 3.14\n", "def f(x):\n\tif x:\n\t\treturn  [x, 'naïve café']\n", "  \n\n\t\t\t\t\tend ",
    "你好 \U0001f642 Ω≈ç√ \x00\x7f", "The quick brown fox jumps over the lazy dog; THE END", "",
)  # fmt: skip


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, str]:
    """{file name: text} of one of our tokenizers; {} where the library's form would give other ids."""
    engine, names = _of_bytes(tokenizer) if isinstance(tokenizer, Bytes) else _of_pieces(tokenizer)
    if any(engine.encode(t, add_special_tokens=False).ids != tokenizer.encode(t).tolist() for t in SAMPLES):
        return {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {f"{role}_token": name for role, name in names.items()}
    config |= {"clean_up_tokenization_spaces": False}
    return {"tokenizer.json": engine.to_str(), "tokenizer_config.json": json.dumps(config, indent=1) + "\n"}


def _of_bytes(tokenizer: Tokenizer) -> tuple[Any, dict[str, str]]:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    ids = dict(CHARACTERS) | {name: getattr(tokenizer, role) for role, name in SPECIAL.items()}
    engine = Engine(models.BPE(ids, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL.values()])
    return engine, SPECIAL


def _of_pieces(tokenizer: Any) -> tuple[Any, dict[str, str]]:
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Engine

    processor = tokenizer.processor
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    scores = [processor.get_score(i) for i in range(len(pieces))]
    special = tokenizer.special()
    plain = [i for i in range(len(pieces)) if not special[i] and not processor.is_byte(i)]
    unknown = processor.unk_id()
    learned = [i for i in plain if "\t" not in pieces[i]]  # runs of tabs are symbols given to the training
    if all(math.isclose(scores[i], round(scores[i])) for i in learned):
        merges = _merges({pieces[i]: scores[i] for i in learned})
        model = models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token=pieces[unknown], fuse_unk=True,
            byte_fallback=True,
        )  # fmt: skip
    else:
        model = models.Unigram(list(zip(pieces, scores, strict=True)), unknown, byte_fallback=True)
    engine = Engine(model)
    engine.normalizer = normalizers.Replace(" ", SPACE)
    engine.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    engine.add_special_tokens(
        [AddedToken(pieces[i], special=True, normalized=False) for i in range(len(pieces)) if special[i]]
    )
    engine.add_tokens([AddedToken(pieces[i], normalized=False) for i in plain if "\t" in pieces[i]])
    names = {role: pieces[getattr(tokenizer, role)] for role in SPECIAL if getattr(tokenizer, role) is not None}
    return engine, names | {"unk": pieces[unknown]}


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the best union first."""
    found = []
    for piece, score in scores.items():
        pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        found += [(-score, left, right) for left, right in pairs if left in scores and right in scores]
    return [(left, right) for _, left, right in sorted(found, key=lambda item: item[0])]
