"""`bigmodel eval`: what a checkpoint is worth on every evaluation set, with intervals, as JSON and as a page.

Sums come first, as in the training loop. Then one record per example, measured by what the records
hold (classes, labelled tokens, spans, numbers, likelihood), and generated text where an example has
references. Everything is computed from records ordered by example id, so it does not depend on batch
size, devices or processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from bigmodel_jax import answers, offline
from bigmodel_jax import experiment as experiments
from bigmodel_jax import workdir as workdirs
from bigmodel_jax.data.pipeline import Pipeline
from bigmodel_jax.data.text import TargetBytes
from bigmodel_jax.data.token_rows import TokenShards
from bigmodel_jax.data.windows import DocumentWindows
from bigmodel_jax.errors import InputError
from bigmodel_jax.evaluate import collect, evaluate, spec
from bigmodel_jax.experiment import Experiment
from bigmodel_jax.measures import classification, generated, likelihood, page, plots, spans
from bigmodel_jax.parallel import hosts
from bigmodel_jax.programs import Programs

Records = dict[str, np.ndarray]
SHOWN = 400  # characters of an example's text
_ENOUGH = 16  # tokens below which a document's mean loss says little


@dataclass(frozen=True)
class Options:
    """context: tokens of an evaluation window (0: data.length); stride: new ones per window (0: half of it).
    resamples, level, seed, method: of the intervals, see measures/intervals.py. worst: examples to show.
    length: new tokens of a generated answer at most (0: of the longest target, or 64). bleu: sacrebleu's
    tokenizer."""

    context: int = 0
    stride: int = 0
    resamples: int = 1000
    level: float = 0.95
    seed: int = 0
    method: str = "bca"
    worst: int = 12
    length: int = 0
    bleu: str = "13a"

    def bootstrap(self) -> dict[str, Any]:
        return {"resamples": self.resamples, "level": self.level, "seed": self.seed, "method": self.method}


@dataclass
class Measured:
    """One evaluation set. result: JSON values; plots: {kind: PNG}; pictures: {example id: PNG}."""

    result: dict[str, Any]
    plots: dict[str, bytes] = field(default_factory=dict)
    pictures: dict[int, bytes] = field(default_factory=dict)


class Examples:
    """The examples of one evaluation set: their records, and what people and measures may ask of them."""

    def __init__(self, exp: Experiment, name: str, pipeline: Pipeline, records: Records):
        self.exp, self.pipeline, self.records = exp, pipeline, records
        self.ids = records["id"]
        self.columns = exp.data.about.get(name, {})

    def column(self, name: str) -> list[Any] | None:
        """A column of `Loaded.about`, in the order of the records; None where there is none."""
        values = self.columns.get(name)
        return None if values is None else [values[i] for i in self.ids]

    def rows(self, places: Sequence[int]) -> dict[str, np.ndarray]:
        """Batch rows {name: [n, ...]} of the records at these places."""
        size = self.pipeline.size(0)
        parts = [self.pipeline.batch(int(i) // size, [int(i) % size]) for i in self.ids[list(places)]]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def text(self, place: int) -> str:
        """The example as text; "" where it is none."""
        given = self.columns.get("text")
        if given is not None:
            return str(given[self.ids[place]])
        data = self.exp.data
        row = {name: value[0] for name, value in self.rows([place]).items()}
        if "source" in row:
            reader = data.source_tokenizer or data.tokenizer
            return reader.decode(row["source"][row["source_segments"] > 0]) if reader is not None else ""
        if data.tokenizer is None or "tokens" not in row:
            return ""
        tokens = row["tokens"].copy()
        if "masked_positions" in row:
            used = row["masked_weights"] > 0
            tokens[row["masked_positions"][used]] = row["masked_targets"][used]
        real = row["segments"] > 0 if "segments" in row else np.ones(len(tokens), bool)
        return data.tokenizer.decode(tokens[real])

    def target(self, place: int) -> dict[str, str]:
        """{"target": what should be written}, of a pair of texts; {} of others."""
        if "source" not in self.exp.spec:
            return {}
        row = self.rows([place])
        return {"target": self.exp.data.tokenizer.decode(row["targets"][0][row["weights"][0] > 0])}


def evaluate_run(
    path: str,
    overrides: Sequence[str],
    step: offline.Step = None,
    *,
    out: str = "",
    as_json: bool = False,
    options: Options = Options(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Measure one checkpoint on every evaluation set; prints a table and writes eval.json, index.html, PNGs.

    Args:
      out: directory for them; "" is eval/ in the run's.
      as_json: print eval.json's content instead of the table.

    Returns:
      What eval.json holds. "eval" is {set: sums as in the training loop}, "sets" {set: measures}.
    """
    exp, programs, state, step = offline.open_run(path, overrides, step)
    if not exp.data.evals:
        raise InputError(f"'{path}' has no evaluation set; its data holds nothing out")
    settings = exp.section("eval")
    sums, found = {}, {}
    for name, pipeline in exp.data.evals.items():
        sums[name] = evaluate(
            programs.evaluate(name, exp.eval_rows, spec(pipeline)), state, pipeline, programs.eval_sharding,
            exp.eval_rows, coefficients=exp.objective.coefficients, batches=settings.batches,
        )  # fmt: skip
        if exp.objective.records is not None:
            found[name] = measure_set(exp, programs, state, name, pipeline, options)
        asked = answers.task(exp, name, pipeline, settings.batches, options.length)
        if asked is not None:
            texts = answers.predict(exp, programs.eval_variables(state), asked, exp.eval_rows)
            found[f"{name}-generated"] = _generated(asked, texts, exp.data.about.get(name, {}), options)
    report = {
        "run": str(path), "step": step, "eval": sums,
        "facts": _facts(exp, step), "options": options.__dict__,
        "sets": {name: each.result for name, each in found.items()},
    }  # fmt: skip
    if hosts.is_first():
        folder = workdirs.open_workdir(out or str(workdirs.existing(path) / "eval"))
        write(folder, report, found)
        print(json.dumps(report, indent=1, sort_keys=True) if as_json else table(report, folder))
    return report


def _facts(exp: Experiment, step: int) -> dict[str, Any]:
    return {
        "step": f"{step:,}",
        "model": exp.config["model"]["name"],
        "objective": exp.config["objective"]["name"],
        "data": f"{exp.config['data']['name']} {exp.data.fingerprint[:12]}",
        "config": experiments.config_hash(exp.config),
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def measure_set(
    exp: Experiment, programs: Programs, state: Any, name: str, pipeline: Pipeline, options: Options
) -> Measured:
    """Records of one set, and everything they can tell."""
    source = pipeline.source
    by_document = exp.config["objective"]["name"] == "causal_lm" and isinstance(source, TokenShards)
    if by_document:
        pipeline = windows(exp, pipeline, options)
    elif options.context or options.stride:
        raise InputError(f"evaluation set '{name}' is not made of documents; --context and --stride need a causal LM")
    step = programs.records(exp.eval_rows, spec(pipeline))
    limit = exp.section("eval").batches
    records = collect(step, state, pipeline, programs.eval_sharding, exp.eval_rows, batches=limit)
    examples = Examples(exp, name, pipeline, records)
    kinds = {"logits": _classes, "start_logits": _spans, "prediction": _numbers}
    fn = next((fn for key, fn in kinds.items() if key in records), _tokens)
    found = fn(examples, options)
    found.result["level"] = options.level
    if limit:
        found.result["about"] += f"; the first {limit} batches only"
    return found


def windows(exp: Experiment, pipeline: Pipeline, options: Options) -> Pipeline:
    """The documents behind a pipeline of token rows, as overlapping windows."""
    context = options.context or exp.config["data"]["length"]
    longest = exp.config["model"].get("max_length", 0)
    if longest and context > longest:
        raise InputError(f"--context {context} is longer than the model's max_length {longest}")
    source = DocumentWindows(pipeline.source, context, options.stride or max(context // 2, 1))
    sizes = TargetBytes(exp.data.tokenizer.byte_lengths())
    return Pipeline(source, exp.eval_rows, pipeline.seed, (sizes,), shuffle=False)


def _result(kind: str, about: str, units: str, found: Mapping[str, Any], worst: list[dict]) -> dict[str, Any]:
    known = ("values", "intervals", "notes")
    details = {key: value for key, value in found.items() if key not in (*known, "per_example")}
    return {"kind": kind, "about": about, "units": units, "worst": worst, "details": details} | {
        key: found[key] for key in known
    }  # fmt: skip


def _worst(loss: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-np.nan_to_num(loss, nan=np.inf), kind="stable")[:count]


def _classes(examples: Examples, options: Options) -> Measured:
    """Images, texts or tables with one label each, or texts with one per token."""
    records, names = examples.records, list(examples.exp.data.report.get("classes", ()))
    groups, logits = examples.column("group"), records["logits"]
    per_token = "labels" in records
    if per_token:
        used = records["weights"] > 0
        owner = np.repeat(np.arange(len(used)), used.sum(axis=1))
        groups = owner if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1][owner]
        probabilities, labels = classification.softmax(logits[used]), records["labels"][used]
    else:
        probabilities, labels = classification.softmax(logits), records["label"]
    names = names if len(names) == logits.shape[-1] else []
    found = classification.measure(probabilities, labels, names=names, groups=groups, **options.bootstrap())
    loss = records["loss"] / np.maximum(records.get("weight", 1.0), 1e-9)
    worst, pictures = [], {}
    for place in _worst(loss, options.worst):
        entry = {"id": int(examples.ids[place]), "loss": _finite(loss[place])}
        if not per_token:
            called = int(probabilities[place].argmax())
            entry |= {"label": found["classes"][int(labels[place])], "predicted": found["classes"][called]}
            entry["confidence"] = _finite(probabilities[place, called])
        if "image" in examples.exp.spec:
            pictures[entry["id"]] = plots.picture(examples.rows([place])["image"][0])
        else:
            entry["text"] = _cut(examples.text(place))
        worst.append(entry)
    about = f"{len(labels):,} labelled tokens of {len(loss):,} texts" if per_token else f"{len(labels):,} examples"
    if groups is not None:
        units = "texts" if examples.column("group") is None else "groups"
        about += f"; the intervals resample {len(np.unique(groups)):,} {units}"
    drawn = {}
    if found["roc"]:
        drawn["roc"] = plots.roc(found["roc"])
    if found["confusion"] is not None:
        drawn["confusion"] = plots.confusion(found["confusion"], found["classes"])
    if found["calibration"]:
        drawn["reliability"] = plots.reliability(found["calibration"], found["values"]["ece"])
    return Measured(_result("classes", about, "examples", found, worst), drawn, pictures)


def _tokens(examples: Examples, options: Options) -> Measured:
    """Likelihood of tokens: by document where there are any, else by row."""
    records, source = examples.records, examples.pipeline.source
    documents = isinstance(source, DocumentWindows)
    groups = source.groups(examples.ids) if documents else examples.column("group")
    found = likelihood.tokens(
        records["loss"], records["weight"], correct=records.get("correct"), sizes=records.get("bytes"),
        groups=groups, **options.bootstrap(),
    )  # fmt: skip
    sums = likelihood.by_group({k: records[k] for k in ("loss", "weight")}, groups)
    mean = sums["loss"] / np.maximum(sums["weight"], 1e-9)
    units = "documents" if documents else "examples" if groups is None else "groups"
    about = f"{len(mean):,} {units}, {found['tokens']:,} tokens"
    if documents:
        about += (
            f"; windows of {source.context} tokens, {source.stride} of them new: each token is predicted once, from "
            f"all of its document before it or at least {source.context - source.stride} tokens of it"
        )
    worst = []
    enough = sums["weight"] >= _ENOUGH
    if not documents or not enough.any():
        enough[:] = True
    names = np.unique(groups) if groups is not None else np.arange(len(mean))
    for place in _worst(np.where(enough, mean, -np.inf), options.worst):
        entry = {"id": _plain(names[place]), "loss": _finite(mean[place]), "tokens": int(sums["weight"][place])}
        if documents:
            tokenizer = examples.exp.data.tokenizer
            entry["text"] = _cut(tokenizer.decode(source.text_tokens(int(names[place]), SHOWN)))
        else:
            first = place if groups is None else int(np.flatnonzero(np.asarray(groups) == names[place])[0])
            entry |= {"text": _cut(examples.text(first))} | examples.target(first)
        worst.append(entry)
    nll = found["values"]["nll"]
    drawn = {} if nll is None else {"spread": plots.spread(mean, f"nats per token of each of the {units}", nll)}
    return Measured(_result("tokens", about, units, found, worst), drawn)


def _spans(examples: Examples, options: Options) -> Measured:
    """Extractive answers, the best span of all windows of a question, as text against the accepted answers."""
    records, tokenizer = examples.records, examples.exp.data.tokenizer
    rows = examples.rows(range(len(examples.ids)))
    candidate = rows["token_types"] > 0 if "token_types" in rows else np.arange(rows["tokens"].shape[1])[None] > 0
    start, end = (np.where(candidate, records[f"{name}_logits"], -np.inf) for name in ("start", "end"))
    first, last, score = spans.best_span(start, end)
    none = records["start_logits"][:, 0].astype(np.float64) + records["end_logits"][:, 0]
    pieces = examples.column("pieces")

    def text(row: int, a: int, b: int) -> str:
        # As the context has it: what a tokenizer decodes may lack capitals and have other spaces.
        return (pieces[row].text(a, b) if pieces else tokenizer.decode(rows["tokens"][row, a : b + 1])).strip()

    texts = [text(i, first[i], last[i]) for i in range(len(first))]
    references, groups = examples.column("references"), examples.column("group")
    if references is None:
        own = enumerate(zip(records["start"], records["end"], strict=True))
        references = [[text(i, a, b)] if b else [""] for i, (a, b) in own]
    question = np.asarray(examples.column("question") or examples.ids)
    names, windows_of = np.unique(question, return_inverse=True)
    # As in SQuAD 2.0: "no answer" wins where every window prefers it, if some question has none.
    some_without = any("" in accepted or not accepted for accepted in references)
    chosen, written, loss = [], [], np.zeros(len(names))
    for place in range(len(names)):
        mine = np.flatnonzero(windows_of == place)
        best = mine[np.argmax(score[mine])]
        chosen.append(best)
        written.append("" if some_without and none[mine].min() > score[best] else texts[best])
        loss[place] = records["loss"][mine].mean()
    wanted = [list(references[best]) for best in chosen]
    groups = None if groups is None else [groups[best] for best in chosen]
    found = spans.measure(written, wanted, groups=groups, **options.bootstrap())
    worst = [
        {
            "id": int(examples.ids[chosen[place]]), "loss": _finite(loss[place]), "predicted": written[place],
            "answers": wanted[place], "text": _cut(examples.text(chosen[place])),
        }
        for place in _worst(loss, options.worst)
    ]  # fmt: skip
    about = f"{len(names):,} questions in {len(first):,} windows"
    return Measured(_result("spans", about, "questions", found, worst))


def _numbers(examples: Examples, options: Options) -> Measured:
    """Predicted numbers."""
    records, groups = examples.records, examples.column("group")
    found = likelihood.numbers(records["prediction"], records["target"], groups=groups, **options.bootstrap())
    error = np.abs(records["prediction"] - records["target"]).reshape(len(examples.ids), -1).mean(axis=1)
    worst = [
        {
            "id": int(examples.ids[place]), "loss": _finite(records["loss"][place]),
            "target": np.ravel(records["target"][place]).tolist(),
            "predicted": np.ravel(records["prediction"][place]).tolist(),
        }
        for place in _worst(records["loss"], options.worst)
    ]  # fmt: skip
    drawn = {"spread": plots.spread(error, "absolute error of each of the examples", float(error.mean()))}
    return Measured(_result("numbers", f"{len(error):,} examples", "examples", found, worst), drawn)


def _generated(asked: answers.Task, texts: Sequence[str], columns: Mapping[str, Any], options: Options) -> Measured:
    """Written answers against their references; the ones furthest from them are shown."""
    groups = columns.get("group")
    groups = None if groups is None else [groups[i] for i in asked.ids]
    found = generated.measure(texts, asked.references, groups=groups, tokenize=options.bleu, **options.bootstrap())
    each = found["per_example"]
    wrong = np.array(each["exact_match"]) + np.array(each["f1"])
    worst = [
        {
            "id": int(asked.ids[place]), "written": texts[place], "references": asked.references[place],
            "text": _cut(asked.texts[place]),
        }
        for place in np.argsort(wrong, kind="stable")[: options.worst] if wrong[place] < 2
    ]  # fmt: skip
    count = sum(map(len, asked.references))
    about = f"{len(texts):,} inputs with {count:,} accepted texts; greedy, at most {asked.length} tokens"
    out = Measured(_result("generated", about, "inputs", found, worst))
    out.result["level"] = options.level
    return out


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"


def write(folder: epath.Path, report: Mapping[str, Any], found: Mapping[str, Measured]) -> None:
    """eval.json, index.html, and SET-PLOT.png and SET-example-ID.png beside them."""
    for name, each in found.items():
        for kind, png in each.plots.items():
            (folder / f"{name}-{kind}.png").write_bytes(png)
        for number, png in each.pictures.items():
            (folder / f"{name}-example-{number}.png").write_bytes(png)
    workdirs.write_json(folder / "eval.json", report)
    drawn = {name: each.plots for name, each in found.items()}
    shown = {name: each.pictures for name, each in found.items()}
    (folder / "index.html").write_text(page.render(report, drawn, shown))


def table(report: Mapping[str, Any], folder: Any) -> str:
    """What the terminal shows."""
    lines = [f"{report['run']} at step {report['step']}"]
    for name, sums in report["eval"].items():
        shown = ", ".join(f"{page.title(k)} {page.number(v)}" for k, v in sums.items() if k != "examples")
        lines.append(f"{name}, as in training: {shown}")
    for name, result in report["sets"].items():
        lines += ["", f"{name}: {result['about']}"]
        rows = [("measure", "value", f"{100 * result['level']:g}% interval", ""), *page.table(result)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        for row in rows:
            cells = [row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3]]
            lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join([*lines, "", f"page: {folder / 'index.html'}"])
