"""`bigmodel convert`: a published model becomes a run, a run becomes a published model.

    --from hf:FOLDER --to RUN     config.json, a checkpoint at step 0, tokenizer/, and hf.json: what an export
                                  must repeat. `generate` and `init_from` work on it; it has no data of its own
                                  (data.name "none"), so `eval` needs --config.data.name=..., and it is not trained on.
    --from RUN --to hf:FOLDER     config.json, safetensors, tokenizer files

Parameters are placed on the devices one leaf at a time, under the mesh of the config: a model larger than one
host's memory passes through it leaf by leaf.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bigmodel_jax import experiment as experiments
from bigmodel_jax import offline, schema, sections, tree
from bigmodel_jax import workdir as workdirs
from bigmodel_jax.checkpoint import Checkpointer
from bigmodel_jax.data.instructions import Chat
from bigmodel_jax.data.pairs import Symbols
from bigmodel_jax.data.pieces import Tokenizer
from bigmodel_jax.data.published import FOLDER
from bigmodel_jax.data.spans import Sentinels
from bigmodel_jax.data.tokenizer import of_model
from bigmodel_jax.errors import InputError
from bigmodel_jax.experiment import Experiment
from bigmodel_jax.hf import published
from bigmodel_jax.hf.family import class_names
from bigmodel_jax.hf.published import Origin, Published
from bigmodel_jax.hf.tokenizer_json import tokenizer_json
from bigmodel_jax.learn import state as states
from bigmodel_jax.programs import Programs, set_up_process

PREFIX = "hf:"
ORIGIN = "hf.json"
# What a model with this head, or of this kind, is trained to do.
_HEADS = {"lm": "masked_lm", "none": "masked_lm", "classes": "classification", "tokens": "token_classification",
          "spans": "spans"}  # fmt: skip
_KINDS = {"encoder_decoder": "seq2seq", "recurrent_seq2seq": "seq2seq"}


def convert(
    source: str, target: str, overrides: Sequence[str] = (), *, step: offline.Step = None, family: str = "",
    dtype: str = "", shard_gb: float = 5.0,
) -> dict[str, Any]:  # fmt: skip
    """Carry out the verb; prints what was written as JSON.

    Args:
      source, target: one of them "hf:FOLDER", the other the directory of a run.
      overrides: of the new run's config, e.g. --config.model.param_dtype=float32 or --config.mesh.fsdp=8; when
        exporting, of the config the run is opened with.
      step: the checkpoint to export, default the newest.
      family, dtype, shard_gb: of the exported files: the model_type, the stored dtype, the size of a file.

    Raises:
      InputError: not exactly one side is "hf:", something is there already, or the model does not fit.
    """
    if source.startswith(PREFIX) == target.startswith(PREFIX):
        raise InputError(
            f"convert goes from {PREFIX}FOLDER to a run or from a run to {PREFIX}FOLDER, not '{source}' to '{target}'"
        )
    if source.startswith(PREFIX):
        for name, value in (("--family", family), ("--dtype", dtype)):
            if value:
                raise InputError(f"{name} is for exports; an import takes --config.model.param_dtype=...")
        if step is not None:
            raise InputError("--step and --best are for exports; a published model has no steps")
        report = to_run(source.removeprefix(PREFIX), target, overrides)
    else:
        report = to_folder(
            source, target.removeprefix(PREFIX), overrides, step=step, family=family, dtype=dtype,
            shard_bytes=int(shard_gb * 1e9),
        )  # fmt: skip
    print(json.dumps(report, indent=1))
    return report


def _objective(section: dict[str, Any]) -> str:
    kind, head = section["name"], section.get("head", "")
    if kind in _KINDS:
        return _KINDS[kind]
    if kind in ("decoder", "recurrent_lm") and head in ("", "lm", "none"):
        return "causal_lm"
    return _HEADS.get(head, "classification")


def _config(
    section: dict[str, Any], tokenizer: bool, origin: Mapping[str, Any], ends: Sequence[int], overrides: Sequence[str]
) -> dict[str, Any]:
    """The new run's resolved config. SGD keeps no slots beside the parameters: nobody trains this run on."""
    start = origin.get("decoder_start_token_id")
    names = class_names(origin) if section.get("head", "classes") in ("classes", "tokens") else ()
    raw = {
        "steps": 1, "model": section, "objective": {"name": _objective(section)},
        "data": {
            "name": "none", "tokenizer": f"{workdirs.RUN}/{FOLDER}" if tokenizer else "",
            "decoder_start": -1 if start is None else start, "ends": tuple(ends), "classes": names,
        },
        "optimizer": {"name": "sgd"}, "schedule": {"name": "constant"},
    }  # fmt: skip
    config = experiments.resolve(raw, [text for text in overrides if not text.startswith("--config.model.")])
    # Whatever the mesh, so that rows divide among its devices: nothing is computed with them here.
    return config | {"batch_size": jax.device_count(), "eval": config["eval"] | {"batch_size": jax.device_count()}}


def to_run(folder: str, run: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Write a run directory from a published folder; returns what was done."""
    model = [schema.parse_override(text) for text in overrides if text.startswith("--config.model.")]
    opened = published.open_folder(folder, {path.removeprefix("model."): value for path, value in model})
    tokenizer = of_model(folder)
    workdir = workdirs.open_workdir(run)
    if (workdir / "config.json").exists():
        raise InputError(f"'{run}' already holds a run; give another directory")
    runtime = dict(schema.parse_override(text) for text in overrides if text.startswith("--config.runtime."))
    set_up_process(sections.Runtime(**{path.removeprefix("runtime."): value for path, value in runtime.items()}))
    ends = published.end_tokens(folder, opened.origin.config)
    config = _config(opened.section, tokenizer is not None, opened.origin.config, ends, overrides)
    if tokenizer is not None:
        (workdir / FOLDER).mkdir(exist_ok=True)
        tokenizer.save(str(workdir / FOLDER))
    exp = experiments.build(workdirs.placed(config, workdir))
    state = _state(Programs(exp), opened)
    meta = {
        "step": 0, "seed": exp.run.seed, "config": config, "config_hash": experiments.config_hash(config),
        "data": exp.data.fingerprint,
    }  # fmt: skip
    with Checkpointer(workdir / "checkpoints") as checkpoints:
        checkpoints.save(0, state, meta)
    workdirs.write_json(workdir / ORIGIN, opened.origin.json())
    workdirs.record_start(workdir, config)
    parameters = state["params"]
    return {
        "model_type": opened.origin.model_type, "run": str(workdir), "parameters": tree.count(parameters),
        "bytes": tree.nbytes(parameters), "dtype": opened.section.get("param_dtype", "float32"),
        "tokenizer": tokenizer.kind if tokenizer is not None else "none", "left out": opened.ignored,
    }  # fmt: skip


def _state(programs: Programs, opened: Published) -> Any:
    """The state before the first update, with each leaf read and placed in its turn."""
    places = {path: leaf.sharding for path, leaf in tree.flatten(programs.state["params"]).items()}
    stats = tree.flatten(programs.state["stats"])
    places |= {f"stats/{path}": leaf.sharding for path, leaf in stats.items()}
    held: dict[str, dict[str, Any]] = {"params": {}, "stats": {}}
    for path, array in opened.parameters():
        kind = "stats" if path.startswith("stats/") else "params"
        leaf = jax.make_array_from_callback(array.shape, places[path], lambda index, a=array: a[index])
        held[kind][path.removeprefix("stats/")] = leaf
    variables = {kind: tree.unflatten(leaves) for kind, leaves in held.items()}
    exp = programs.exp
    window = exp.section("guard").window

    def create(variables: Any) -> Any:
        return states.create(lambda _: variables, exp.tx, None, window=window)

    return jax.jit(create, out_shardings=programs.shardings, donate_argnums=0)(variables)


def to_folder(
    run: str, folder: str, overrides: Sequence[str] = (), *, step: offline.Step = None, family: str = "",
    dtype: str = "", shard_bytes: int = published.st.SHARD_BYTES,
) -> dict[str, Any]:  # fmt: skip
    """Write a checkpoint of a run, default the newest, as a published folder; returns what was done.

    Averaged parameters are taken where the run keeps them; low-rank updates are merged.
    """
    if dtype and dtype not in published.PARAM_DTYPES:
        raise InputError(f"--dtype {dtype} is not one of {', '.join(published.PARAM_DTYPES)}")
    place = Path(folder)
    if (place / published.CONFIG).exists():
        raise InputError(f"'{folder}' already holds a model; give another folder")
    exp, programs, state, step = offline.open_run(run, overrides, step)
    workdir = workdirs.existing(run)
    origin = None
    if (workdir / ORIGIN).exists():
        origin = Origin(**json.loads((workdir / ORIGIN).read_text()))
    reader, writer = exp.data.source_tokenizer, exp.data.tokenizer
    if reader is not None and reader.fingerprint != writer.fingerprint:
        raise InputError(
            f"'{run}' reads with another tokenizer than it writes with, and a published model has one for both; "
            "train with data.target_tokenizer='' to publish it"
        )
    if isinstance(writer, (Symbols, Sentinels)):
        kind = type(writer).__name__.lower()
        raise InputError(f"the tokenizer of '{run}' is one of {kind}, which has no published form")
    variables = programs.eval_variables(state)
    arrays = tree.flatten(variables["params"])
    arrays |= {f"stats/{path}": leaf for path, leaf in tree.flatten(variables["stats"]).items()}
    section = published.complete(exp.config["model"])
    kind, files = published.write_folder(
        folder, section, {path: _Host(leaf) for path, leaf in arrays.items()}, origin, family=family, dtype=dtype,
        shard_bytes=shard_bytes, extra=_ids(exp), classes=exp.data.report.get("classes", ()),
    )  # fmt: skip
    if writer is not None:
        _save_tokenizer(writer, place)
    if exp.config["data"]["name"] == "instructions":
        _save_template(Chat(exp.data.tokenizer, exp.config["data"]["template"]), place)
    return {
        "model_type": kind, "folder": folder, "step": step, "parameters": tree.count(variables["params"]),
        "files": sorted(path.name for path in place.iterdir()), "weights": files,
    }  # fmt: skip


def _ids(exp: Experiment) -> dict[str, int | None]:
    """What config.json says of the tokenizer's ids; without it a reader takes its family's usual ones."""
    if exp.data.tokenizer is None:
        return {}
    roles = {f"{role}_token_id": getattr(exp.data.tokenizer, role) for role in ("bos", "eos", "pad")}
    ids: dict[str, int | None] = {name: index for name, index in roles.items() if index is not None}
    if exp.model.encode is None:
        return ids
    # BART's usual last token of an answer that was cut off is 2, whatever the tokenizer.
    return ids | {"decoder_start_token_id": exp.data.first_token, "forced_eos_token_id": None}


class _Host:
    """A parameter fetched from the devices layer by layer, as the rows ask for it."""

    def __init__(self, leaf: jax.Array):
        self.leaf, self.shape, self.dtype = leaf, leaf.shape, leaf.dtype

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.leaf[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.leaf, dtype)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The files that the tokenizer came with, or one of ours in its own form and as tokenizer.json."""
    tokenizer.save(str(folder))
    if tokenizer.kind != "published":
        for name, text in tokenizer_json(tokenizer).items():
            (folder / name).write_text(text)


def _save_template(chat: Chat, folder: Path) -> None:
    """The template that conversations were learned in, in tokenizer_config.json; a file beside it would come first."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = published.read_json(path) if path.exists() else {}
    path.write_text(json.dumps(config | {"chat_template": chat.published}, indent=1) + "\n")
