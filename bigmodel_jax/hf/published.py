"""A published model as a folder: config.json, safetensors; read into our parameters, and written from them.

What import cannot express in our config but export must repeat (the original config, stored dtypes, which names
were there) is `Origin`, plain JSON kept beside the converted run. Without it, export builds a config of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel_jax import schema, tree
from bigmodel_jax.errors import InputError, nearest
from bigmodel_jax.hf import FAMILIES, encdec, vision
from bigmodel_jax.hf import safetensors as st
from bigmodel_jax.hf.family import Family, class_names, labels
from bigmodel_jax.hf.rows import Plan, View
from bigmodel_jax.models import MODELS, Model

CONFIG, GENERATION = "config.json", "generation_config.json"
MAX_CONFIG = 4 << 20
# Leaves that say how a model is computed, trained or first drawn, not which function it is.
NOT_THE_FUNCTION = {
    "attention", "unroll", "remat", "dtype", "param_dtype", "init", "init_std", "depth_scaled_init", "dropout",
    "attention_dropout", "embed_dropout", "head_dropout", "bn_group", "bn_momentum", "zero_init",
    "expert_group",
}  # fmt: skip
PARAM_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Origin:
    """Where a run's parameters came from.

    config: the foreign config.json. bare: names lack the family's prefix. dtypes: {name: dtype} where it is not
    the parameters'. tied: names of repeated tensors that the file held.
    """

    model_type: str
    config: dict[str, Any]
    bare: bool = False
    dtypes: dict[str, str] = field(default_factory=dict)
    tied: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Published:
    """A folder that has been checked: the model it is, and its tensors, unread.

    section: the complete model section. view: tensors by the names of the table. ignored: names left out.
    """

    section: dict[str, Any]
    model: Model
    origin: Origin
    plan: Plan
    view: View
    ignored: list[str]

    def parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """(path, array) of each parameter; statistics are "stats/...". Memory for one at a time."""
        return self.plan.to_ours(self.view)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
      InputError: no such file, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise InputError(f"'{path}' has more than {MAX_CONFIG} bytes; that is no {path.name}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is not JSON: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(value, dict):
        raise InputError(f"'{path}' should hold a JSON object")
    return value


def family_of(config: Mapping[str, Any], where: str) -> tuple[str, Family]:
    """(model_type, Family) of a foreign config.

    Raises:
      InputError: no model_type, or one that is not known, with the nearest.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"'{where}' names no model_type; known: {', '.join(sorted(FAMILIES))}")
    if kind not in FAMILIES:
        raise InputError(
            f"'{where}': model_type {kind[:60]!r} is not known{nearest(kind, FAMILIES)}; "
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    return kind, FAMILIES[kind]


def end_tokens(path: str, config: Mapping[str, Any]) -> list[int]:
    """Tokens at which a published model stops writing: of generation_config.json, else of its config; [] for none.

    Raises:
      InputError: they are neither an id nor a list of ids.
    """
    beside = Path(path) / GENERATION
    stated = (read_json(beside) if beside.exists() else {}).get("eos_token_id")
    where, stated = (CONFIG, config.get("eos_token_id")) if stated is None else (GENERATION, stated)
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if any(type(index) is not int for index in ids):
        raise InputError(f"'{Path(path) / where}': eos_token_id {stated!r} should be an id or a list of ids")
    return ids


def complete(section: Mapping[str, Any]) -> dict[str, Any]:
    """A model section with every leaf, defaults filled in."""
    values = {key: value for key, value in section.items() if key != "name"}
    fn = schema.choose(MODELS, section["name"], "model.name")
    return {"name": section["name"], **schema.complete(values, "model.", fn)}


def build(section: Mapping[str, Any]) -> Model:
    """The model of a complete section."""
    return MODELS[section["name"]](**{key: value for key, value in section.items() if key != "name"})


def shapes_of(model: Model) -> dict[str, Any]:
    """{path: ShapeDtypeStruct} of parameters, and of statistics as "stats/..."."""
    variables, _ = model.abstract()
    stats = {f"stats/{path}": leaf for path, leaf in tree.flatten(variables["stats"]).items()}
    return tree.flatten(variables["params"]) | stats


def open_folder(path: str, changes: Mapping[str, Any] | None = None) -> Published:
    """Check a published folder; reads config.json and headers, no weights.

    Args:
      changes: leaves of the model section to set otherwise, e.g. {"param_dtype": "float32"}.

    Raises:
      InputError: no config or weights, options or names that do not fit ours, shapes that differ.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"no folder '{path}' with a published model")
    config = read_json(folder / CONFIG)
    kind, family = family_of(config, str(folder / CONFIG))
    tensors = st.open_tensors(folder)
    names, bare = _names(family, tensors)
    section = complete(family.fit(family.config(config), names) | _dtypes(tensors) | dict(changes or {}))
    _check_counts(section, tensors, folder)
    model = build(section)
    shapes = shapes_of(model)
    _check_size(shapes, tensors, folder)
    plan = Plan(family.rows(section), shapes)
    if bare:
        names = {_prefixed(name, family, plan): stored for name, stored in names.items()}
    ignored = [name for name in names if any(re.search(p, name) for p in family.ignored)]
    view = View(tensors, {name: stored for name, stored in names.items() if name not in ignored})
    plan.check(view)
    main = np.dtype(section["param_dtype"])
    origin = Origin(
        kind, config, bare,
        dtypes={n: str(view.dtype(n)) for n in view if view.dtype(n) != main},
        tied=[row.foreign for row in plan.tied if row.foreign in view],
    )  # fmt: skip
    return Published(section, model, origin, plan, view, ignored)


def _names(family: Family, tensors: st.Tensors) -> tuple[dict[str, str], bool]:
    """({name in today's spelling: name in the file}, whether the family's prefix is left out)."""
    names: dict[str, str] = {}
    for stored in tensors:
        name = stored
        for pattern, replacement in family.renames:
            name = re.sub(pattern, replacement, name)
        if name in names:
            raise InputError(f"'{names[name]}' and '{stored}' are both the tensor '{name}'")
        names[name] = stored
    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in names)
    return names, bare


def _prefixed(name: str, family: Family, plan: Plan) -> str:
    return name if name in plan.foreign else family.prefix + name


def _dtypes(tensors: st.Tensors) -> dict[str, str]:
    """Parameters in the dtype of the file; in the widest one where it has several (which is exact)."""
    found = {tensors.dtype(name) for name in tensors if tensors.dtype(name).kind in "fV"}
    wide = np.result_type(*found) if len(found) < 2 or np.dtype("float64") in found else np.dtype("float32")
    name = wide.name if found and wide.name in PARAM_DTYPES else "float32"
    return {"param_dtype": name, "dtype": name}


def _check_counts(section: Mapping[str, Any], tensors: st.Tensors, folder: Path) -> None:
    """As below, for what a model is built from one by one. (Layers that share weights have no tensor each.)"""
    for leaf, value in section.items():
        if ("layers" in leaf or "experts" in leaf) and type(value) is int and value > max(1000, len(tensors)):
            raise InputError(f"'{folder / CONFIG}' asks for {leaf} = {value}, the file holds {len(tensors)} tensors")


def _check_size(shapes: Mapping[str, Any], tensors: st.Tensors, folder: Path) -> None:
    """Sizes of a config are claims, too: refused before anything is made by them."""
    ours = sum(math.prod(leaf.shape) for leaf in shapes.values())
    theirs = sum(math.prod(tensors.shape(name)) for name in tensors)
    if ours > 4 * theirs + 1_000_000:
        raise InputError(f"'{folder / CONFIG}' describes {ours:,} parameters, the file holds {theirs:,} numbers")


def express(section: Mapping[str, Any], only: str = "") -> tuple[str, dict[str, Any]]:
    """(model_type, foreign config) of our model: a family that says all of it, and takes it back unchanged.

    Args:
      section: complete model section. only: the family to use, "" for any.

    Raises:
      InputError: none can, with the nearest family and what it lacks.
    """
    if only and only not in FAMILIES:
        raise InputError(f"family '{only}' is not known{nearest(only, FAMILIES)}; known: {', '.join(sorted(FAMILIES))}")
    wanted = _canonical(section)
    best: tuple[int, str] = (10**6, ": no family has this kind of model")
    for kind in [only] if only else FAMILIES:
        try:
            config = {"model_type": kind, **FAMILIES[kind].foreign(section)}
            back = _canonical(complete(FAMILIES[kind].config(config) | {"dtype": section["dtype"]}))
        except (InputError, KeyError) as error:
            what = f": '{kind}' cannot say it: {error}"
            best = min(best, (1000, what)) if isinstance(error, InputError) else best
            continue
        different = [k for k in wanted.keys() | back.keys() if wanted.get(k) != back.get(k)]
        if not different:
            return kind, config
        said = ", ".join(f"model.{k}={back.get(k)!r} (here {wanted.get(k)!r})" for k in sorted(different)[:6])
        more = f" and {len(different) - 6} more" if len(different) > 6 else ""
        far = len(different) + 100 * ("name" in different)  # another kind of model is no near one
        best = min(best, (far, f"; the nearest that has one, a '{kind}', has {said}{more}"))
    raise InputError(f"this model has no published form{best[1]}")


def _canonical(section: Mapping[str, Any]) -> dict[str, Any]:
    section = (vision.MEANINGS | encdec.MEANINGS).get(section["name"], dict)(section)
    out = {key: value for key, value in section.items() if key not in NOT_THE_FUNCTION}
    width, heads = out.get("embed_dim", 0), out.get("num_heads", 0)
    if width and heads:
        sizes = {"num_kv_heads": heads, "mlp_dim": 4 * width, "head_dim": width // heads, "token_dim": width}
        for leaf, size in sizes.items():
            if leaf in out:
                out[leaf] = out[leaf] or size
    if out.get("layer_pattern"):
        out["layer_pattern"] = (out["layer_pattern"] * out["num_layers"])[: out["num_layers"]]
    if out.get("qkv_bias") is None and "bias" in out:
        out["qkv_bias"] = out["bias"]
    if out.get("head") not in ("classes", "tokens"):
        out.pop("num_classes", None)
    if out.get("head") != "classes" and not out.get("pooler"):
        out.pop("pooling", None)
    return out


def write_folder(
    path: str,
    section: Mapping[str, Any],
    parameters: Mapping[str, Any],
    origin: Origin | None = None,
    *,
    family: str = "",
    dtype: str = "",
    shard_bytes: int = st.SHARD_BYTES,
    extra: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """Write config.json and weights; returns (model_type, names of the files).

    Args:
      section: complete model section.
      parameters: {path: array}, statistics as "stats/...".
      origin: what the import kept; its config is repeated with what differs now, its dtypes and names as well.
      family: the model_type to write, default the origin's, else the first that fits.
      dtype: of the stored tensors, default that of the parameters.
      extra: keys for config.json where the origin's has none, such as the tokenizer's eos_token_id.
      classes: names of a classifier's outputs, in their order; not used where there is not one for each.

    Raises:
      InputError: the model has no published form.
    """
    kind, config = express(section, family or (origin.model_type if origin else ""))
    if origin and origin.model_type != kind:
        origin = None
    plan = Plan(FAMILIES[kind].rows(section), parameters)
    bare = bool(origin and origin.bare)

    def stored(name: str) -> str:
        return name.removeprefix(FAMILIES[kind].prefix) if bare else name

    main = np.dtype(dtype or section["param_dtype"])
    kept = {} if dtype or not origin else origin.dtypes
    sources = {name: name for name in plan.foreign}
    if origin:
        sources |= {row.foreign: row.of for row in plan.tied if row.foreign in origin.tied}
    names = {stored(name): source for name, source in sources.items()}
    shapes = {stored(name): (np.dtype(kept.get(name, main)), plan.foreign[source]) for name, source in sources.items()}
    constants = {stored(name): x for name, x in FAMILIES[kind].constants(plan.foreign).items()}
    shapes |= {name: (x.dtype, x.shape) for name, x in constants.items()}

    def tensor(name: str) -> np.ndarray:
        return constants[name] if name in constants else plan.to_foreign(names[name], parameters)

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    whole = dict(extra or {}) | _config(config, origin) | {"torch_dtype": main.name}
    if "id2label" in config and len(classes) == section["num_classes"] and class_names(whole) != tuple(classes):
        whole |= labels(classes)
    files = st.write_folder(folder, shapes, tensor, shard_bytes)
    (folder / CONFIG).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    return kind, [CONFIG, *files]


def _config(config: dict[str, Any], origin: Origin | None) -> dict[str, Any]:
    """The original config where it still describes this model; otherwise ours over the original's rest."""
    if origin is None:
        return config
    family = FAMILIES[origin.model_type]
    same = _canonical(complete(family.config(origin.config))) == _canonical(complete(family.config(config)))
    rest = {key: value for key, value in origin.config.items() if key != "dtype"}
    return rest if same else rest | config
