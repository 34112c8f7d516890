"""Tiny experiments of the three kinds, on data that every machine has. Seconds each."""

from __future__ import annotations

import itertools
from pathlib import Path

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho".split()


def corpus(folder: Path, documents: int = 60) -> str:
    """Small text files, each different, in a folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = itertools.count(7)
    for index in range(documents):
        words = [WORDS[(next(numbers) * 7919 + index * 31) % 9973 % len(WORDS)] for _ in range(40 + index % 17)]
        (folder / f"{index:03d}.txt").write_text(f"document {index}\n" + " ".join(words) + "\n")
    return str(folder)


def raw(kind: str, folder: Path) -> dict:
    """A raw config of kind "decoder", "encoder" or "resnet", without its defaults."""
    common = {
        "seed": 3,
        "steps": 12,
        "batch_size": 8,
        "eval": {"batch_size": 8},
        "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.01, "clip": 1.0},
        "schedule": {"name": "cosine", "warmup": 3},
        "log": {"every": 1},
    }
    if kind == "resnet":
        return common | {
            "model": {"name": "resnet", "depth": 8, "width": 0.5, "bn_group": 8},
            "objective": {"name": "classification", "label_smoothing": 0.1},
            "data": {"name": "digits", "pad_crop": 1, "rotate": 10.0, "mixup": 0.2},
        }
    sizes = {"num_layers": 2, "embed_dim": 32, "num_heads": 2, "max_length": 32}
    text = {
        "corpus": corpus(folder / "corpus"), "tokenizer": "bytes", "length": 32,
        "validation_fraction": 0.2, "cache": str(folder / "cache"),
    }  # fmt: skip
    if kind == "encoder":
        return common | {
            "model": {"name": "encoder", **sizes},
            "objective": {"name": "masked_lm"},
            "data": {"name": "masked_text", **text},
        }
    return common | {
        "model": {"name": "decoder", "dropout": 0.1, **sizes},
        "objective": {"name": "causal_lm"},
        "data": {"name": "text", **text},
    }
