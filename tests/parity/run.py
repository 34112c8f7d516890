"""Each published family against `transformers`, both ways, on small random models.

    python tests/parity/run.py                   cases whose row is missing, missed its goal or is stale: made with
                                                 other code (models/, hf/, this folder) or other versions
    python tests/parity/run.py CASE ... | --all  these, or every one

Needs the environment of tests/parity/requirements.txt.

reference -> ours    save_pretrained, import: outputs and gradients of a loss in float32
ours -> reference    fresh parameters, export, from_pretrained: the same
bitwise              reference -> ours -> export keeps every tensor; ours -> export -> import every parameter
control              two rows of the table exchanged: the outputs must differ

Writes results/parity.json, row by row, each with what it was made with; exits 1 where one misses its goal.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error"}
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from bigmodel_jax import tree  # noqa: E402
from bigmodel_jax.errors import RunError  # noqa: E402
from bigmodel_jax.hf import FAMILIES, published  # noqa: E402
from bigmodel_jax.hf import safetensors as st  # noqa: E402
from bigmodel_jax.hf.rows import Plan, Row  # noqa: E402
from tests.parity.families import CASES, VOCAB, Case  # noqa: E402
from tests.parity.recorded import code_hash, due  # noqa: E402

RESULTS = ROOT / "results" / "parity.json"
LOGITS, GRADIENTS, CONTROL = 1e-4, 1e-3, 1e-2
ROWS, LENGTH, SOURCE = 3, 14, 11
Arrays = dict[str, np.ndarray]


def reference(case: Case) -> Any:
    """A reference with parameters large enough that every one of them matters."""
    torch.manual_seed(0)
    cls = getattr(transformers, case.reference)
    config = cls.config_class(**case.config)
    config._attn_implementation = "eager"
    model = cls(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            kernel = 0.6 / np.sqrt(np.prod(p.shape[1:]))  # of a convolution
            p.add_(torch.randn_like(p) * (0.1 if p.ndim == 1 else 0.15 if p.ndim == 2 else kernel))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(torch.randn_like(b) * 0.2)
            if name.endswith("running_var"):
                b.add_(torch.rand_like(b))
    return model


def inputs(case: Case, config: Any) -> tuple[dict[str, Any], Arrays, Arrays]:
    """(inputs of the reference, inputs of ours, {"mask": which outputs count, "labels": what the loss asks for})."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(4, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    mask = np.ones_like(tokens)
    if case.kind == "image":
        image = rng.normal(size=(ROWS, 16, 16, 3)).astype(np.float32)
        theirs = {"pixel_values": torch.tensor(image.transpose(0, 3, 1, 2))}
        return theirs, {"image": image}, {"mask": np.ones(ROWS)}
    if case.kind == "decoder":
        return {"input_ids": torch.tensor(tokens).long()}, {"tokens": tokens}, {"mask": mask}
    pad = config.pad_token_id or 0
    if case.kind == "encoder-decoder":
        source = rng.integers(4, VOCAB, (ROWS, SOURCE)).astype(np.int32)
        seen = np.ones_like(source)
        seen[1, -4:], source[1, -4:] = 0, pad
        theirs = {"input_ids": source, "attention_mask": seen, "decoder_input_ids": tokens}
        ours = {"source": source, "source_segments": seen, "tokens": tokens}
        return {k: torch.tensor(v).long() for k, v in theirs.items()}, ours, {"mask": mask}
    mask[1, -5:], tokens[1, -5:] = 0, pad
    theirs, ours = {"input_ids": tokens, "attention_mask": mask}, {"tokens": tokens, "segments": mask}
    if case.kind.startswith("encoder") and getattr(config, "type_vocab_size", 0) > 1:
        types = np.sort(rng.integers(0, 2, tokens.shape).astype(np.int32), axis=1)
        theirs, ours = theirs | {"token_type_ids": types}, ours | {"token_types": types}
    about = {"mask": np.ones(ROWS) if case.kind.endswith("classes") else mask}
    return {k: torch.tensor(v).long() for k, v in theirs.items()}, ours, about


def their_outputs(model: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    out = model(**given)
    if "start_logits" in out:
        return {"main": torch.stack([out.start_logits, out.end_logits], -1)}
    names = {"logits": "main", "prediction_logits": "main", "seq_relationship_logits": "nsp", "sop_logits": "nsp"}
    found = {name: out[key] for key, name in names.items() if key in out}
    return found or {"main": out.last_hidden_state, "pooled": out.pooler_output}


def our_outputs(model: Any, variables: Any, given: Arrays, names: list[str]) -> dict[str, Any]:
    out = model.apply(variables, train=False, **{k: jnp.asarray(v) for k, v in given.items()})
    return {name: out.head(out.hidden) if name == "main" else out.extra[name] for name in names}


def probes(outputs: dict[str, Any], mask: np.ndarray) -> Arrays:
    """Fixed random targets: one class per output position, and zero weight where nothing is asked."""
    rng = np.random.default_rng(2)
    return {
        name: np.eye(x.shape[-1], dtype=np.float32)[rng.integers(0, x.shape[-1], x.shape[:-1])]
        * (mask[..., None] if mask.shape == tuple(x.shape[:-1]) else 1.0)
        for name, x in outputs.items()
    }


def compare(case: Case, model: Any, folder: str, work: Path) -> dict[str, Any]:
    """Outputs and gradients of the reference and of ours with the parameters of `folder`."""
    given, ours_given, about = inputs(case, model.config)
    opened = published.open_folder(folder, case.model)
    flat = {path: jnp.asarray(x) for path, x in opened.parameters()}
    variables = split(flat)
    model.zero_grad()
    theirs = their_outputs(model, given)
    targets = probes(theirs, about["mask"])
    loss = -sum((torch.tensor(t) * torch.log_softmax(theirs[name], -1)).mean() for name, t in targets.items())
    loss.backward()

    def our_loss(params: Any) -> Any:
        outputs = our_outputs(opened.model, variables | {"params": params}, ours_given, names)
        value = -sum(jnp.mean(targets[name] * jax.nn.log_softmax(x, -1)) for name, x in outputs.items())
        return value, outputs

    names = list(theirs)
    (_, outputs), gradients = jax.jit(jax.value_and_grad(our_loss, has_aux=True))(variables["params"])
    worst = 0.0
    for name, x in theirs.items():
        x = x.detach().numpy()
        counts = about["mask"].astype(bool) if about["mask"].shape == x.shape[:-1] else np.ones(x.shape[:-1], bool)
        worst = max(worst, float(np.abs(np.asarray(outputs[name]) - x)[counts].max()))
    largest = float(max(np.abs(x.detach().numpy()).max() for x in theirs.values()))
    relative, name = gradient_difference(opened, model, gradients, work)
    control = swapped_difference(case, opened, ours_given, outputs)
    return {"outputs": worst, "largest": largest, "gradients": relative, "worst": name, "control": control}


def split(flat: dict[str, Any]) -> dict[str, Any]:
    params = {path: x for path, x in flat.items() if not path.startswith("stats/")}
    stats = {path.removeprefix("stats/"): x for path, x in flat.items() if path.startswith("stats/")}
    return {"params": tree.unflatten(params), "stats": tree.unflatten(stats)}


def gradient_difference(opened: Any, model: Any, gradients: Any, work: Path) -> tuple[float, str]:
    """(largest |g - g'| / |g'| over tensors, its name). Theirs are written as if they were parameters, so that
    they come under their published names, whatever the reference calls them in memory."""
    shadow = copy.deepcopy(model)
    with torch.no_grad():
        for p, mine in zip(shadow.parameters(), model.parameters(), strict=True):
            p.copy_(torch.zeros_like(p) if mine.grad is None else mine.grad)
    shadow.save_pretrained(work / "gradients")
    theirs, flat = st.open_tensors(work / "gradients"), tree.flatten(gradients)
    constant = {name for name, _ in model.named_buffers()}  # BART's bias of the logits, a parameter of ours
    flat |= {path: np.zeros(x.shape) for path, x in opened.plan.shapes.items() if path.startswith("stats/")}
    whole = np.sqrt(sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in flat.values()))
    found, prefix = [], FAMILIES[opened.origin.model_type].prefix  # which a file of the bare model lacks
    for name in opened.plan.foreign:
        if any(path.startswith("stats/") for path in opened.plan.owner[name][0].paths) or name in constant:
            continue
        if name in dict(model.named_buffers()):
            continue  # not trained there (BART's bias of the logits)
        mine = np.asarray(opened.plan.to_foreign(name, flat), np.float64)
        other = theirs.read(name if name in theirs else name.removeprefix(prefix))
        # A gradient that is zero in exact arithmetic (of a key's bias) has no relative error.
        size = max(float(np.linalg.norm(other)), 1e-4 * whole)
        found.append((float(np.linalg.norm(mine - other)) / size, name))
    return max(found)


def swapped_difference(case: Case, opened: Any, given: Arrays, outputs: dict[str, Any]) -> float:
    """Largest change of an output when the table gives two of our parameters each other's tensors."""
    shapes = opened.plan.shapes
    paths = sorted((p for p in shapes if len(shapes[p].shape) > 2), key=lambda p: "attn" not in p)
    pairs = ((a, b) for i, a in enumerate(paths) for b in paths[i + 1 :] if shapes[a].shape == shapes[b].shape)
    a, b = next(pairs)
    other = {a: b, b: a}
    table = [
        Row(row.names, tuple(other.get(path, path) for path in row.paths), row.layout, row.start, row.step)
        for row in opened.plan.rows
    ]
    wrong = split(dict(Plan(table, shapes).to_ours(opened.view)))
    found = our_outputs(opened.model, wrong, given, list(outputs))
    return float(max(np.abs(np.asarray(found[n]) - np.asarray(outputs[n])).max() for n in outputs))


def bitwise(case: Case, source: str, work: Path) -> tuple[bool, bool]:
    """(folder -> ours -> folder keeps every tensor, ours -> folder -> ours every parameter)."""
    first = published.open_folder(source, case.model)
    ours = dict(first.parameters())
    published.write_folder(str(work / "again"), first.section, ours, first.origin)
    before, after = st.open_tensors(source), st.open_tensors(work / "again")
    left_out = [name for name in before if any(re.search(p, name) for p in FAMILIES[first.origin.model_type].ignored)]
    names = set(after) - set(left_out)
    kept = set(before) - set(left_out) == names and all(
        before.read(n).tobytes() == after.read(n).tobytes() and before.dtype(n) == after.dtype(n) for n in names
    )
    back = dict(published.open_folder(str(work / "again"), case.model).parameters())
    same = back.keys() == ours.keys() and all(back[p].tobytes() == ours[p].tobytes() for p in ours)
    return kept, same


def fresh(case: Case, source: str, work: Path) -> str:
    """A folder that we wrote, of the same model with other parameters and no memory of the reference's files."""
    opened = published.open_folder(source, case.model)
    rng = np.random.default_rng(3)
    ours = {}
    for path, leaf in opened.plan.shapes.items():
        scale = 0.15 if len(leaf.shape) > 1 else 0.1
        base = 1.0 if path.endswith("scale") or "var" in path else 0.0
        ours[path] = (base + np.clip(rng.normal(size=leaf.shape), -3, 3) * scale).astype(leaf.dtype)
    published.write_folder(str(work / "ours"), opened.section, ours, family=opened.origin.model_type)
    return str(work / "ours")


def check(name: str) -> dict[str, Any]:
    """The row of one case."""
    case, began = CASES[name], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = reference(case)
        model.save_pretrained(work / "theirs")
        there = compare(case, model, str(work / "theirs"), work)
        kept, same = bitwise(case, str(work / "theirs"), work)
        written = fresh(case, str(work / "theirs"), work)
        loaded, report = type(model).from_pretrained(written, attn_implementation="eager", output_loading_info=True)
        if hasattr(model.config, "pad_token_id"):
            loaded.config.pad_token_id = model.config.pad_token_id  # a tokenizer's, and there is none here
        back = compare(case, loaded.float().eval(), written, work)
        unread = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    ok = (
        all(way["outputs"] <= LOGITS and way["gradients"] <= GRADIENTS for way in (there, back))
        and kept and same and not unread and there["control"] >= CONTROL
    )  # fmt: skip
    return {
        "reference": case.reference, "ok": bool(ok), "reference_to_ours": there, "ours_to_reference": back,
        "import_export_bitwise": kept, "export_import_bitwise": same, "not_read_by_reference": unread,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def recorded() -> dict[str, Any]:
    """{case: row} of the result so far."""
    return json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else {}


def record(rows: dict[str, Any]) -> None:
    """Rows into the result, beside what it has of other cases."""
    cases = recorded() | rows
    RESULTS.write_text(json.dumps({
        "command": "python tests/parity/run.py", "cases": {name: cases[name] for name in CASES if name in cases},
        "goals": {"outputs": LOGITS, "gradients": GRADIENTS, "control": CONTROL},
    }, indent=1, sort_keys=True) + "\n")  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CASE", help='"albert, classes", or "albert" for all of its cases')
    parser.add_argument("--all", action="store_true", help="also those whose row is of today's code and versions")
    args = parser.parse_args(argv)
    if unknown := [n for n in args.names if n not in CASES and n not in {c.split(",")[0] for c in CASES}]:
        print(f"unknown cases: {', '.join(unknown)}; known: {', '.join(CASES)}", file=sys.stderr)
        return 2
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    # Taken once: code that is edited during a run is not the code of its rows.
    made_with = {
        "code": code_hash(ROOT), "python": platform.python_version(), "torch": torch.__version__,
        "jax": jax.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    stale = due(recorded(), CASES, made_with)
    print(f"{len(stale)} of {len(CASES)} rows are missing, missed their goal or are stale", flush=True)
    named = [name for name in CASES if name in args.names or name.split(",")[0] in args.names]
    chosen = list(CASES) if args.all else named if args.names else stale
    rows: dict[str, Any] = {}
    for name in chosen:
        try:
            rows[name] = check(name)
        except (RunError, Exception) as error:
            rows[name] = {"reference": CASES[name].reference, "ok": False, "error": f"{type(error).__name__}: {error}"}
        row = rows[name]
        row["made_with"] = made_with
        shown = (
            row.get("error")
            or " ".join(
                f"{way}: outputs {row[way]['outputs']:.1e} gradients {row[way]['gradients']:.1e} ({row[way]['worst']})"
                for way in ("reference_to_ours", "ours_to_reference")
            )
            + f" control {row['reference_to_ours']['control']:.2g} bitwise {row['import_export_bitwise']}"
        )
        print(f"{'ok  ' if row['ok'] else 'MISS'} {name}: {shown}"[:600], flush=True)
        record(rows)
    return 0 if all(row["ok"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
