"""A config made small enough to run anywhere, and batches of numbers for it.

What is kept is what decides how a model is laid out: its kind, options, optimizer and objective. What shrinks is
size: layers, width, length, vocabulary, batch. Heads, experts and layers stay countable by eight devices.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from bigmodel_jax import schema
from bigmodel_jax.data.datasets import DATASETS
from bigmodel_jax.data.loaded import Spec
from bigmodel_jax.data.text import within
from bigmodel_jax.errors import InputError

ROWS, LENGTH, VOCAB, CLASSES, WIDTH, SIDE = 16, 16, 64, 10, 32, 32
# Largest values of leaves; 0 ("follows from others") stays 0.
LARGEST = {
    "model": {
        "vocab_size": VOCAB, "source_vocab_size": VOCAB, "num_classes": CLASSES, "embed_dim": WIDTH, "num_heads": 8,
        "mlp_dim": 2 * WIDTH, "decoder_mlp_dim": 2 * WIDTH, "token_dim": WIDTH // 2, "max_length": LENGTH,
        "hidden_dim": WIDTH, "num_experts": 8, "expert_dim": WIDTH, "shared_experts": 1, "window": 6,
        "relative_buckets": 8, "bn_group": 4, "expert_group": 4, "gn_groups": 4, "patch_size": 8, "grid": 4,
    },
    "data": {"length": LENGTH, "source_length": LENGTH, "size": SIDE},
    "objective": {"chunk": LENGTH // 2},
    "optimizer": {"freeze_layers": 1, "lr": 0.02},  # large steps from random weights would only amplify rounding
    "schedule": {"warmup": 1},
}  # fmt: skip


def shrunk(
    config: Mapping[str, Any], layers: int = 2, kept: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """(the resolved config made small, {leaf: (before, after)}).

    Args:
      layers: of a stack, at least; a pipeline needs a multiple of its pieces.
      kept: leaves to leave as they are, such as "model.num_layers".
    """
    small = copy.deepcopy(dict(config))
    for section, limits in LARGEST.items():
        for leaf, most in limits.items():
            if small[section].get(leaf):
                small[section][leaf] = min(small[section][leaf], most)
    model, before = small["model"], config["model"]
    pattern = len(model.get("layer_pattern", ""))
    for leaf in ("num_layers", "decoder_layers"):
        if model.get(leaf):
            model[leaf] = math.lcm(layers, pattern or 1) if model[leaf] > 1 else 1
    if model.get("num_kv_heads"):
        model["num_kv_heads"] = max(1, model["num_heads"] * before["num_kv_heads"] // before["num_heads"])
    if "head_dim" in model:
        model["head_dim"] = min(8, before["head_dim"] or before["embed_dim"] // before["num_heads"])
    if model["name"] == "resnet":
        stages = len(before["blocks"]) or (3 if before["depth"] % 6 == 2 and before["depth"] != 50 else 4)
        model["blocks"] = tuple(min(1, n) for n in before["blocks"]) or (1,) * stages
        model["channels"] = 8
    if model["name"] in ("mlp", "convnet"):
        small["data"] = copy.deepcopy(dict(config["data"]))  # sizes of layers follow those of the images
        model["hidden"] = tuple(min(WIDTH, n) for n in before["hidden"])
    small["batch_size"] = ROWS
    small["microbatch"] = ROWS // 2 if config["microbatch"] else 0
    for path in kept:
        _put(small, path, _leaf(config, path))
    return small, {path: pair for path, pair in schema.difference(config, small).items()}


def _leaf(config: Mapping[str, Any], path: str) -> Any:
    for part in path.split("."):
        config = config[part]
    return config


def _put(config: dict[str, Any], path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for part in sections:
        config = config[part]
    config[leaf] = value


def fields(config: Mapping[str, Any]) -> Spec:
    """{field: (shape of one row, dtype)} of a training batch of the config's data set."""
    section = {leaf: value for leaf, value in config["data"].items() if leaf != "name"}
    return DATASETS[config["data"]["name"]](**section).spec()


def sized(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the sizes a model takes from its data filled in without data.

    Raises:
      InputError: the data set has no training batches.
    """
    config = copy.deepcopy(dict(config))
    spec, model = fields(config), config["model"]
    if not spec:
        raise InputError(f"data '{config['data']['name']}' has nothing to train on; name a data set (data.name)")
    classes = len(config["objective"].get("class_weights", ())) or CLASSES
    found = {"vocab_size": VOCAB, "num_classes": classes}
    if "target" in spec:
        found["num_classes"] = math.prod(spec["target"][0])
    if "image" in spec:
        height, width, channels = spec["image"][0]
        found |= {"in_channels": channels, "image_size": height, "num_features": height * width * channels}
    if "features" in spec:
        found["num_features"] = math.prod(spec["features"][0])
    for leaf, size in found.items():
        if leaf in model and (not model[leaf] or leaf in ("in_channels", "image_size", "num_features")):
            model[leaf] = size
    return config


def batch(config: Mapping[str, Any], spec: Spec, rows: int, seed: int) -> dict[str, np.ndarray]:
    """A batch of random numbers with the fields of `spec`, each [rows, ...] and legal for the model.

    Rows end in padding of random length, a fifth of the targets weigh nothing, and packed rows hold several
    documents.

    Raises:
      InputError: a field that is not known.
    """
    rng = np.random.default_rng(seed)
    model = config["model"]
    vocab, classes = model.get("vocab_size", VOCAB), model.get("num_classes") or VOCAB
    length = spec["tokens"][0][0] if "tokens" in spec else 0
    pieces = _documents(rng, rows, length, 3 if "positions" in spec else 1)

    @functools.cache
    def sources() -> np.ndarray:
        width = spec["source_segments"][0][0]
        if "source_positions" not in spec:
            return _documents(rng, rows, width, 1)
        used = width - rng.integers(0, width // 4 + 1, (rows, 1))
        place = np.arange(width)
        # A target of every number has its source.
        return np.where(place < used, 1 + place * pieces.max(1, keepdims=True) // used, 0)

    def field(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in ("tokens", "targets", "masked_targets"):
            return rng.integers(0, vocab, shape)
        if name == "source":
            return rng.integers(0, model.get("source_vocab_size") or vocab, shape)
        if name in ("label", "label2", "labels"):
            return rng.integers(0, classes, shape)
        if name in ("weights", "masked_weights"):
            kept = rng.random(shape) < 0.8
            return kept & (pieces > 0) if name == "weights" and shape == pieces.shape else kept
        if name == "segments":
            return pieces
        if name == "source_segments":
            return sources()
        if name == "source_positions":
            return within(sources())
        if name == "positions":
            return within(pieces)
        if name == "masked_positions":
            return np.argsort(rng.random((rows, length)), axis=1)[:, : shape[1]]
        if name in ("start", "end"):
            return rng.integers(0, max(length // 2, 1), shape)
        if name == "token_types":
            return rng.integers(0, max(model.get("token_types", 2), 1), shape)
        if name == "bytes":
            return rng.integers(1, 5, shape)
        if name in ("image", "features", "target"):
            return rng.normal(size=shape)
        if name == "mix":
            return rng.random(shape)
        raise InputError(f"there are no made-up numbers for the batch field '{name}'; use --full with the data there")

    return {name: field(name, (rows, *shape)).astype(dtype) for name, (shape, dtype) in spec.items()}


def _documents(rng: np.random.Generator, rows: int, length: int, most: int) -> np.ndarray:
    """[rows, length]: numbers from 1 of the documents of each row, in order, and 0 where padding follows."""
    ends = np.sort(rng.integers(1, length + 1, (rows, most)), axis=1) if length else np.zeros((rows, most))
    ends[:, -1] = np.maximum(ends[:, -1], length - length // 4)
    place = np.arange(length)
    number = 1 + (place[None, :, None] >= ends[:, None, :]).sum(-1)
    return np.where(number > most, 0, number)
