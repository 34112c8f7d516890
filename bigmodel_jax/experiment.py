"""The front hall: from a config file to an `Experiment`, the values a run is made of.

Nothing below this floor sees a ConfigDict. A section of a config is the keyword arguments of one
function (see schema.py); what a file leaves out takes that function's default, and the resolved
config with every value is what a run records, hashes and compares on resume.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_collections

from bigmodel_jax import chips, flops, schema, variants
from bigmodel_jax.data.datasets import DATASETS, Loaded
from bigmodel_jax.errors import InputError, nearest
from bigmodel_jax.learn import optim, schedules
from bigmodel_jax.learn.objectives import OBJECTIVES, Objective
from bigmodel_jax.models import MODELS
from bigmodel_jax.models.lora import lora
from bigmodel_jax.models.model import Model
from bigmodel_jax.models.routing import groups
from bigmodel_jax.parallel import legal
from bigmodel_jax.parallel.mesh import AXES, check_batch, fill, make_mesh
from bigmodel_jax.parallel.pipeline import schedule
from bigmodel_jax.parallel.rings import dimensions
from bigmodel_jax.parallel.rules import Layout
from bigmodel_jax.sections import (
    PLAIN,
    Optimizer,
    Run,
    Schedule,
)

# section: (functions by name, leaves that all of them share)
NAMED = {
    "model": (MODELS,),
    "objective": (OBJECTIVES,),
    "optimizer": (optim.OPTIMIZERS, Optimizer),
    "schedule": (schedules.SCHEDULES, Schedule),
    "data": (DATASETS,),
}
# Model sizes that a config may leave to the data.
FROM_DATA = ("vocab_size", "source_vocab_size", "num_classes", "in_channels", "image_size", "num_features")
DERIVED = tuple(f"model.{leaf}" for leaf in FROM_DATA)
# How a run is carried out. These may differ between a run and its continuation.
MECHANICS = ("mesh", "runtime", "log", "checkpoint", "microbatch")


@dataclass(frozen=True)
class Experiment:
    """Everything a run is made of, built from a resolved config.

    spec: {field: (shape of one row, dtype)} of a training batch.
    data: pipelines and tokenizer; None when built abstractly.
    """

    config: dict[str, Any]
    model: Model
    objective: Objective
    learning_rate: Callable[[Any], Any]
    tx: Any
    layout: Layout
    spec: dict[str, tuple[tuple[int, ...], Any]]
    data: Loaded | None

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.layout.mesh

    def section(self, name: str) -> Any:
        """A plain section as its frozen dataclass, for example `section("eval").every`."""
        return PLAIN[name](**self.config[name])

    @property
    def run(self) -> Run:
        return Run(**{leaf: self.config[leaf] for leaf in schema.leaves(Run)})

    def batch_sizes(self) -> tuple[int, ...]:
        """The distinct global batch sizes of the run, one for most."""
        size = self.run.batch_size
        return (size,) if isinstance(size, int) else tuple(sorted({rows for _, rows in size}))

    @property
    def input(self) -> str:
        """Who makes training batches: "numpy" or "tfdata"."""
        wanted = self.section("runtime").input
        several = len(self.batch_sizes()) > 1
        if wanted == "tfdata" and several:
            raise InputError("runtime.input tfdata makes batches of one size; with a ramp of sizes use numpy")
        if wanted == "auto":
            return "tfdata" if self.data.prefers_tfdata and not several else "numpy"
        return wanted

    @property
    def eval_rows(self) -> int:
        """Rows of an evaluation batch: eval.batch_size, and what it lacks to fill every device alike."""
        return fill(self.config["eval"]["batch_size"], self.mesh, schedule(self.layout).microbatches)

    def cut(self, batch_size: int) -> tuple[int, int]:
        """(accumulation steps A, rows of a microbatch M) for a global batch size."""
        accumulation = check_batch(batch_size, min(self.run.microbatch, batch_size), self.mesh)
        return accumulation, batch_size // accumulation

    def work(self) -> dict[str, Any]:
        """What one example is worth: tokens, training FLOPs, and the peak of all devices if known."""
        if "image" in self.spec:
            height, width, _ = self.spec["image"][0]
            tokens, forward = 0, self.model.flops(height, width)
        elif "features" in self.spec:
            tokens, forward = 0, self.model.flops()
        else:
            (tokens,) = self.spec["tokens"][0]
            forward = tokens * self.model.flops(tokens) if self.model.encode is None else 0.0
            if self.model.encode is not None:
                (source,) = self.spec["source"][0]
                tokens, forward = source + tokens, self.model.flops(source, tokens)
        device = self.mesh.devices.flat[0]
        peak = chips.peak(device.device_kind, self.config["model"]["dtype"])
        return {
            "tokens_per_example": tokens,
            "flops_per_example": flops.training(forward),
            "peak": peak and peak * self.mesh.size,
        }


def read(path: str) -> dict[str, Any]:
    """Raw config from "FILE.py" or "FILE.py:ARG": get_config() or get_config(arg) as nested dicts.

    Where the file lists its ARGS, arg must be one of them. Of a study's file without get_config, ARG is a variant.
    The file may import others as `configs.NAME`: the folder above `configs`, or above its own, is searched first.
    """
    file, _, arg = path.partition(":")
    module = _module(file)
    if not hasattr(module, "get_config") and hasattr(module, "get_study"):
        return _of_variant(read_study(file), arg)
    if arg and (known := _arguments(module)) is not None and arg not in known:
        if not known:
            raise InputError(f"config '{file}' takes no argument, and so not '{arg}'")
        raise InputError(f"config '{file}' has no '{arg}'{nearest(arg, known)}; it has {', '.join(known)}")
    return _plain(_called(path, lambda: module.get_config(arg) if arg else module.get_config()))


def arguments(file: str) -> tuple[str, ...] | None:
    """What FILE.py:ARG takes: ARGS of the file, () if it takes nothing, None if it does not say."""
    return _arguments(_module(file))


def _arguments(module: Any) -> tuple[str, ...] | None:
    if hasattr(module, "ARGS"):
        return module.ARGS
    takes_none = hasattr(module, "get_config") and not inspect.signature(module.get_config).parameters
    return () if takes_none else None


def read_study(file: str) -> dict[str, Any]:
    """get_study() of a file as nested dicts.

    Raises:
      InputError: no such file or function, or it raises.
    """
    module = _module(file)
    if not hasattr(module, "get_study"):
        raise InputError(f"'{file}' is no study: it has no get_study()")
    return _plain(_called(file, module.get_study))


def _of_variant(study: Mapping[str, Any], name: str) -> dict[str, Any]:
    known = variants.expand(study.get("variants", {}), study.get("grid", {}))
    known |= {f"first:{first}": changes for first, changes in study.get("first", {}).items()}
    name = name or study.get("baseline", "")
    if name not in known:
        raise InputError(f"the study has no variant '{name}'{nearest(name, known)}")
    return variants.overridden(study["base"], known[name])


def _module(file: str) -> Any:
    source = Path(file)
    if not source.is_file():
        near = sorted(source.parent.glob("*.py")) if source.parent.is_dir() else []
        raise InputError(f"no config file '{file}'{nearest(file, map(str, near))}")
    folder = source.resolve().parent
    root = next((str(p.parent) for p in (folder, *folder.parents) if p.name == "configs"), str(folder.parent))
    if root not in sys.path:
        sys.path.insert(0, root)
    module_spec = importlib.util.spec_from_file_location(f"config_{source.stem}", source)
    module = importlib.util.module_from_spec(module_spec)
    _called(file, lambda: module_spec.loader.exec_module(module))
    return module


def _called(path: str, fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"config '{path}' does not load: {type(error).__name__}: {error}") from error


def _plain(value: Any) -> Any:
    """Nested dicts of what may hold a ConfigDict anywhere."""
    value = value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def resolve(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The config with every leaf: file, then overrides ("--config.a.b=value"), then defaults.

    Raises:
      InputError: unknown section, leaf or name, or a value of another type; one line, with the
        nearest legal name.
    """
    raw = json.loads(json.dumps(raw))
    for argument in overrides:
        schema.override(raw, *schema.parse_override(argument))
    top = schema.leaves(Run)
    legal = [*top, *PLAIN, *NAMED]
    for key in raw:
        if key not in legal:
            raise InputError(f"config has no section or leaf '{key}'{nearest(key, legal)}")
    out = schema.complete({k: v for k, v in raw.items() if k in top}, "", Run)
    for section, fn in PLAIN.items():
        out[section] = schema.complete(_dict(raw, section), f"{section}.", fn)
    for section, (table, *more) in NAMED.items():
        values = dict(_dict(raw, section))
        name = values.pop("name", None)
        fn = schema.choose(table, name, f"{section}.name")
        for size in FROM_DATA:
            if size in schema.leaves(fn) and section == "model":
                values.setdefault(size, 0)
        out[section] = {"name": name, **schema.complete(values, f"{section}.", *more, fn)}
    return out


def _dict(raw: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    values = raw.get(section, {})
    if not isinstance(values, Mapping):
        raise InputError(f"config '{section}' is a section of leaves, not {values!r}")
    return values


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of what determines the result: the resolved config without its mechanics."""
    what = {key: value for key, value in config.items() if key not in MECHANICS}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def build(
    config: Mapping[str, Any],
    *,
    devices: Sequence[Any] | None = None,
    load: bool = True,
    progress: Callable[..., None] | None = None,
) -> Experiment:
    """Build an experiment from a resolved config.

    Args:
      devices: devices of the mesh, default all.
      load: False builds without touching data, for lowering and planning; the model's sizes must
        then be in the config.
      progress: called as data is prepared.

    Raises:
      InputError: sizes that do not fit together, or data that cannot be read.
    """
    config = json.loads(json.dumps(config), object_hook=_tuples)
    run = Run(**{leaf: config[leaf] for leaf in schema.leaves(Run)})
    _check_sizes(run, config)
    layout = _layout(devices=devices, **config["mesh"])
    dataset = DATASETS[config["data"]["name"]](**_without_name(config["data"]))
    data = None
    if load:
        data = dataset.load(
            seed=run.seed,
            batch_size=run.batch_size,
            eval_batch_size=fill(config["eval"]["batch_size"], layout.mesh, schedule(layout).microbatches),
            progress=progress,
        )
    _fit_model_to_data(config, data)
    model = MODELS[config["model"]["name"]](**_without_name(config["model"]))
    if config["lora"]["rank"]:
        model = lora(model, **config["lora"])
    objective = OBJECTIVES[config["objective"]["name"]](**_without_name(config["objective"]))
    learning_rate, tx = optimizer(config, model, model.abstract())
    experiment = Experiment(
        config=config, model=model, objective=objective, learning_rate=learning_rate, tx=tx,
        layout=layout, spec=dataset.spec(), data=data,
    )  # fmt: skip
    for size in experiment.batch_sizes():
        accumulation, rows = experiment.cut(size)
        check_layout(layout, config, experiment.spec, rows)
        if accumulation > 1 and not objective.additive:
            raise InputError(
                f"objective '{config['objective']['name']}' is not a sum over examples, so microbatch "
                f"must be 0 or {size}"
            )
        _check_groups(config["model"], accumulation, rows)
    decay = config["guard"]["noise_scale"]
    if decay and (not 0 < decay < 1 or all(experiment.cut(size)[0] == 1 for size in experiment.batch_sizes())):
        raise InputError(f"guard.noise_scale {decay} is a decay in (0, 1), and needs a microbatch smaller than a batch")
    return experiment


def optimizer(
    config: Mapping[str, Any], model: Model, abstract: tuple[Any, Any], **varied: Any
) -> tuple[Callable[[Any], Any], Any]:
    """(learning rate by step, gradient transformation) of a resolved config.

    abstract: of the model. varied: lr or weight_decay as arrays, for programs of several runs (lanes.py).
    """
    section = {**config["optimizer"], **varied}
    learning_rate = schedules.make(peak=section["lr"], total=config["steps"], **config["schedule"])
    shapes, axes = abstract
    options = {k: v for k, v in section.items() if k not in ("lr", "ema")}
    tx = optim.make(shapes["params"], lr=learning_rate, axes=axes["params"], ratio=model.ratio, **options)
    return learning_rate, tx


def _layout(*, devices: Sequence[Any] | None, slices: int, context_by: str, weights_by: str, **leaves: Any) -> Layout:
    """The section `mesh` as a value."""
    schema.choose({"compiler": None, "rings": None}, weights_by, "mesh.weights_by")
    mesh = make_mesh({axis: leaves.pop(axis) for axis in AXES}, devices, slices)
    return Layout(mesh, context=context_by, rings=dimensions(mesh) if weights_by == "rings" else (), **leaves)


def check_layout(layout: Layout, config: Mapping[str, Any], fields: Mapping[str, Any], rows: int) -> None:
    """Raises InputError for a layout that a config's model cannot take with microbatches of so many rows."""
    legal.check(layout, _facts(config, fields, rows))


def _facts(config: Mapping[str, Any], fields: Mapping[str, Any], rows: int) -> legal.Facts:
    """What of this experiment a layout depends on."""
    model = config["model"]
    attends = "num_heads" in model
    layers = (model["num_layers"], *filter(None, [model.get("decoder_layers", 0)])) if attends else ()
    lengths = {fields[name][0][0] for name in ("tokens", "source") if name in fields} if attends else ()
    experts = model.get("num_experts", 0)
    return legal.Facts(
        model["name"], stacks=layers, lengths=tuple(sorted(lengths)), heads=model.get("num_heads", 0),
        experts=experts, rows=rows, buffers=_buffers(model, rows), group=model["expert_group"] if experts else 1,
        shared=bool(model.get("shared_layers")),
    )  # fmt: skip


def _buffers(model: Mapping[str, Any], rows: int) -> int:
    return groups(rows, model["expert_group"]) if model.get("num_experts") and model["capacity_factor"] else 0


def _check_groups(model: Mapping[str, Any], accumulation: int, rows: int) -> None:
    """Batch norm and experts need fixed groups of rows before a batch may be cut into microbatches."""
    grouped = model.get("num_experts", 0) and model["expert_group"]
    if model.get("num_experts", 0) and (accumulation > 1 if grouped == 0 else rows % grouped):
        raise InputError(
            f"model.expert_group {grouped} does not cut the {rows} rows of each of {accumulation} microbatches into "
            f"whole groups; legal: {[d for d in range(1, rows + 1) if rows % d == 0]}"
        )
    group = model.get("bn_group", 0) if model.get("norm") == "batch" else 0
    if model.get("norm") == "batch" and group == 0 and accumulation > 1:
        raise InputError(
            f"model.bn_group 0 normalises over a whole microbatch, so {accumulation} microbatches would be "
            f"another model; set model.bn_group to a divisor of {rows}, or microbatch to 0"
        )
    if group and rows % group:
        legal = [d for d in range(1, rows + 1) if rows % d == 0]
        raise InputError(f"model.bn_group {group} does not divide the {rows} rows of a microbatch; legal: {legal}")


def _check_sizes(run: Run, config: Mapping[str, Any]) -> None:
    if run.steps < 1:
        raise InputError(f"config leaf 'steps' = {run.steps} should be at least 1")
    if config["eval"]["batch_size"] < 1:
        raise InputError(f"config leaf 'eval.batch_size' = {config['eval']['batch_size']} should be at least 1")
    if config["guard"]["policy"] not in ("skip", "crash"):
        raise InputError(f"config leaf 'guard.policy' = {config['guard']['policy']!r} should be skip or crash")
    if config["runtime"]["input"] not in ("auto", "numpy", "tfdata"):
        found = config["runtime"]["input"]
        raise InputError(f"config leaf 'runtime.input' = {found!r} should be auto, numpy or tfdata")
    if config["runtime"]["x64"] is False and "float64" in (
        config["model"].get("dtype"),
        config["model"].get("param_dtype"),
    ):
        raise InputError("model.dtype float64 needs --config.runtime.x64=True")


def _fit_model_to_data(config: dict[str, Any], data: Loaded | None) -> None:
    """Take sizes left at 0 from the data; refuse sizes that contradict it."""
    model = config["model"]
    for leaf in FROM_DATA:
        if leaf not in model or (leaf == "num_classes" and model.get("head") in ("lm", "spans", "none")):
            continue
        found = getattr(data, leaf) if data is not None else 0
        if leaf == "source_vocab_size" and (not found or data.vocab_size == model[leaf]):
            continue  # source and target share a vocabulary, with one table or two
        if model[leaf] == 0 and not found:
            raise InputError(f"config leaf 'model.{leaf}' must be given when there is no data to take it from")
        if model[leaf] == 0:
            model[leaf] = found
        elif found and model[leaf] != found and not (leaf == "vocab_size" and found < model[leaf]):
            # A table may have more rows than the tokenizer has ids (padded to a round number), never fewer.
            raise InputError(
                f"config leaf 'model.{leaf}' = {model[leaf]}, but the data has {found}; "
                f"leave it 0 to take it from the data"
            )
    length, longest = config["data"].get("length", 0), model.get("max_length", 0)
    length = max(length, *config["data"].get("eval_lengths", ()), 0)
    if longest and length > longest:
        raise InputError(f"data.length or eval_lengths {length} is longer than model.max_length {longest}")


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        return tuple(convert(item) for item in value) if isinstance(value, list) else value

    return {key: convert(value) for key, value in values.items()}


def _without_name(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "name"}
