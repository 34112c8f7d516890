"""What the engine knows of a family of published models, and how its config.json is read.

A family is two functions between a foreign config and our `model` section and one table of rows. Options of a
foreign config that change the function and that we do not have must be refused by name: `only`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel_jax.errors import InputError, nearest
from bigmodel_jax.hf.rows import Table

Config = Mapping[str, Any]
_REQUIRED = object()

# foreign name -> ours. "gelu" is the exact one there, and the tanh form here.
ACTIVATIONS = {
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact", "relu": "relu",
}  # fmt: skip
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu"}


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    config: foreign config.json -> our model section ("name" and the leaves that differ from the defaults).
    foreign: complete model section -> foreign config.json, without what every config has.
    rows: complete model section -> table.
    prefix: what the names of a file of the bare model lack ("bert.").
    ignored: regexes of foreign names that hold no weights (masks kept as buffers).
    renames: (regex, replacement) for names that older files have.
    constants: names of the table -> tensors that the reference wants beside them and that hold no weights.
    fit: (our model section, names in the file) -> section: parts that a file may have beyond what config.json says.
    """

    config: Callable[[Config], dict[str, Any]]
    foreign: Callable[[Config], dict[str, Any]]
    rows: Callable[[Config], Table]
    prefix: str = ""
    ignored: Sequence[str] = ()
    renames: Sequence[tuple[str, str]] = ()
    constants: Callable[[Collection[str]], dict[str, np.ndarray]] = lambda names: {}
    fit: Callable[[dict[str, Any], Collection[str]], dict[str, Any]] = lambda section, names: section


def need(config: Config, key: str, default: Any = _REQUIRED) -> Any:
    """config[key], or its default.

    Raises:
      InputError: it must be given and is not.
    """
    value = config.get(key, default)
    if value is _REQUIRED:
        raise InputError(f"config.json of a '{config.get('model_type')}' has no '{key}'")
    return value


def integer(config: Config, key: str, default: Any = _REQUIRED) -> int:
    """A size: a positive integer that a model can have."""
    value = need(config, key, default)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise InputError(f"config.json: '{key}' = {value!r} should be a positive integer")
    return value


def number(config: Config, key: str, default: Any = _REQUIRED) -> float:
    """A finite number."""
    value = need(config, key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e12:
        raise InputError(f"config.json: '{key}' = {value!r} should be a number")
    return float(value)


def pick(config: Config, key: str, table: Mapping[Any, Any], default: Any = _REQUIRED) -> Any:
    """Our name of an option: table[config[key]].

    Raises:
      InputError: a value that we do not have, with those that we do.
    """
    value = need(config, key, default)
    if not isinstance(value, (str, bool, int, float)) or value not in table:
        legal = ", ".join(map(repr, table))
        raise InputError(
            f"config.json: '{key}' = {value!r} is not supported{nearest(str(value), map(str, table))}; known: {legal}"
        )
    return table[value]


def only(config: Config, **supported: Any) -> None:
    """Refuse options by name whose value is not the one given; absent and null count as supported.

    Raises:
      InputError: the option, its value and the supported one.
    """
    for key, value in supported.items():
        found = config.get(key)
        if found is not None and found != value:
            raise InputError(f"config.json: '{key}' = {found!r} is not supported, only {value!r}")


def name_of(table: Mapping[str, str], ours: str, option: str) -> str:
    """The foreign name of one of our options.

    Raises:
      InputError: the family has none.
    """
    for foreign, name in table.items():
        if name == ours:
            return foreign
    raise InputError(f"{option} '{ours}' has no name in this family; it has {sorted(set(table.values()))}")


# What follows the family's name in config.json's "architectures", and the head we call it.
ARCHITECTURES = {
    "ForCausalLM": "lm", "LMHeadModel": "lm", "ForMaskedLM": "lm", "ForPreTraining": "lm",
    "ForSequenceClassification": "classes", "ForTokenClassification": "tokens", "ForQuestionAnswering": "spans",
    "Model": "none",
}  # fmt: skip


def head(config: Config, default: str, legal: Sequence[str] = ("lm", "classes", "none")) -> dict[str, Any]:
    """{"head", and "num_classes" where it has classes} from "architectures" and the labels.

    Raises:
      InputError: an architecture whose head we do not have.
    """
    names = config.get("architectures") or []
    found = default
    if names:
        ends = [kind for end, kind in ARCHITECTURES.items() if str(names[0]).endswith(end)]
        if not ends or ends[0] not in legal:
            raise InputError(f"config.json: architecture {names[0]!r} is not supported; heads: {', '.join(legal)}")
        found = ends[0]
    if found not in ("classes", "tokens"):
        return {"head": found}
    return {"head": found, "num_classes": num_classes(config)}


def architecture(section: Config, family: str, lm: str = "ForCausalLM") -> dict[str, Any]:
    """{"architectures", and "id2label" where there are classes}: the inverse of `head`."""
    ends = {"lm": lm} | {kind: end for end, kind in ARCHITECTURES.items() if kind != "lm"}
    out: dict[str, Any] = {"architectures": [family + ends[section["head"]]]}
    if section["head"] in ("classes", "tokens"):
        out |= labels(numbered(section["num_classes"]))
    return out


def num_classes(config: Config) -> int:
    """How many classes a foreign config has: a label for each, or their number."""
    found = config.get("id2label")
    return len(found) if isinstance(found, Mapping) and found else integer(config, "num_labels", 2)


def numbered(classes: int) -> list[str]:
    """What classes without names are called."""
    return [f"LABEL_{i}" for i in range(classes)]


def labels(names: Sequence[str]) -> dict[str, Any]:
    """config.json's two tables of the names of classes."""
    return {"id2label": {str(i): x for i, x in enumerate(names)}, "label2id": {x: i for i, x in enumerate(names)}}


def class_names(config: Config) -> tuple[str, ...]:
    """Names of a foreign config's classes in their order; () where they are only numbered, or not one name for each."""
    found = config.get("id2label")
    if not isinstance(found, Mapping):
        return ()
    names = [str(found.get(str(i)) or "") for i in range(len(found))]
    return tuple(names) if all(names) and len(set(names)) == len(names) and names != numbered(len(names)) else ()


def kv_heads(section: Config) -> int:
    """Key-value heads of a model section, where 0 means as many as heads."""
    return section["num_kv_heads"] or section["num_heads"]


def mlp_dim(section: Config) -> int:
    """Width of the feed-forward layer, where 0 means four times the model's."""
    return section["mlp_dim"] or 4 * section["embed_dim"]


def head_dim(section: Config) -> int:
    """Features of a head, where 0 means an equal share of the model's."""
    return section["head_dim"] or section["embed_dim"] // section["num_heads"]
