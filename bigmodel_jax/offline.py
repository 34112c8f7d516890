"""Open a finished or running run for reading; and `prepare`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

from bigmodel_jax import experiment as experiments
from bigmodel_jax import record, schema, sections
from bigmodel_jax import workdir as workdirs
from bigmodel_jax.checkpoint import Checkpointer
from bigmodel_jax.data.datasets import DATASETS
from bigmodel_jax.data.prepare import prepare
from bigmodel_jax.errors import InputError
from bigmodel_jax.experiment import Experiment
from bigmodel_jax.programs import Programs, set_up_process
from bigmodel_jax.screen import Screen

Step = int | Literal["best"] | None


def open_run(path: str, overrides: Sequence[str], step: Step = None) -> tuple[Experiment, Programs, Any, int]:
    """(experiment, programs, state, step) of a checkpoint, restored for reading only.

    Args:
      step: of checkpoints/; "best" is the one in best/, None the newest that is valid.

    Raises:
      InputError: no run or no such checkpoint there, or an override that does not fit.
    """
    workdir = workdirs.existing(path)
    folder = workdir / "checkpoints"
    if step == "best":
        there, folder = record.steps(folder), workdir / "best"
        if not record.steps(folder):
            raise InputError(
                f"'{path}' has no best checkpoint, which a run keeps that names an eval.metric; "
                f"leave out --best, or give --step one of {there or 'none'}"
            )
    if step is not None:  # answered before any data is read
        step, _ = record.find(folder, None if step == "best" else step)
    config = workdirs.placed(json.loads((workdir / "config.json").read_text()), workdir)
    config = experiments.resolve(_renamed(config, overrides), overrides)
    set_up_process(sections.Runtime(**config["runtime"]))
    screen = Screen()
    with screen:
        exp = experiments.build(config, progress=screen.preparing)
    programs = Programs(exp)
    with Checkpointer(folder, readonly=True, log=screen.say) as checkpoints:
        found = checkpoints.restore(programs.state, step)
    if found is None:
        raise InputError(f"'{path}' has no checkpoint yet; train it first")
    state, meta = found
    return exp, programs, state, int(meta["step"])


def _renamed(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Without the leaves of sections that an override gives another name, such as another data set.

    The classes stay where the other data set takes them: their order is that of the model's outputs, not of its rows.
    """
    for path, name in map(schema.parse_override, overrides):
        section, _, leaf = path.partition(".")
        if leaf == "name" and config.get(section, {}).get("name") != name:
            classes = config[section].get("classes") if section == "data" else ()
            kept = {"classes": classes} if classes and hasattr(DATASETS.get(name), "classes") else {}
            config = config | {section: kept}
    return config


def prepare_corpus(sources: Sequence[str], out: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Write token shards; prints what was kept, and what was dropped and why.

    Args:
      overrides: "--config.LEAF=VALUE" of `data.prepare.prepare`, for example --config.vocab_size=8192.
    """
    values = dict(schema.parse_override(text) for text in overrides)
    hidden = ("progress", "wait_s")
    settings = schema.complete(values, "", prepare)
    settings = {key: value for key, value in settings.items() if key not in hidden}
    with Screen() as screen:
        meta = prepare(list(sources), out, progress=screen.preparing, **settings)
    splits = {
        name: {key: split[key] for key in ("documents", "tokens", "bytes")} for name, split in meta["splits"].items()
    }
    shown = {"splits": splits, "vocab_size": meta["vocab_size"], "fingerprint": meta["fingerprint"]}
    print(json.dumps({**shown, "report": meta.get("report", {})}, indent=1))
    sys.stdout.flush()
    return meta
