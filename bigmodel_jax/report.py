"""What a run leaves for people: a sample, a loss curve, and a hash that two equal states share."""

from __future__ import annotations

import math
from typing import Any

import jax

from bigmodel_jax import fingerprint, metrics, record
from bigmodel_jax.experiment import Experiment
from bigmodel_jax.generate import generate


def state_hash(state: Any) -> str:
    """Hash over the fingerprints of all leaves: equal for bitwise equal states on any mesh."""
    return fingerprint.digest(record.storable(state)[0])


def sample(exp: Experiment, variables: Any, settings: Any, key: jax.Array) -> str:
    """Prompt and continuation as text.

    Args:
      settings: prompt, length, temperature, top_k, top_p (the config section `sample`).
    """
    tokenizer = exp.data.tokenizer
    prompt = tokenizer.prompt(settings.prompt)
    longest = exp.config["model"].get("max_length", 0)
    new = settings.length
    if exp.config["model"].get("positions") == "learned":
        new = min(new, longest - len(prompt))
    [tokens] = generate(
        exp.model, variables, [prompt], length=new, key=key, temperature=settings.temperature,
        top_k=settings.top_k, top_p=settings.top_p, eos=exp.data.end_tokens, pad=tokenizer.pad,
    )  # fmt: skip
    return settings.prompt + tokenizer.decode(tokens.tolist(), continued=bool(settings.prompt))


def curves(rows: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """{"train" or evaluation set: (steps, losses)} from the rows of metrics.jsonl."""
    out: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row.get("event", "eval") == "eval" and math.isfinite(row.get("loss", math.nan)):
            steps, losses = out.setdefault(row.get("name", "train"), ([], []))
            steps.append(row["step"])
            losses.append(row["loss"])
    return out


def plot(workdir: Any) -> None:
    """Write loss.png from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
    for name, (steps, losses) in curves(metrics.read(workdir)).items():
        style = {"linewidth": 1.2} if name == "train" else {"marker": "o", "linewidth": 0}
        axis.plot(steps, losses, label=name, **style)
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats)")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    with (workdir / "loss.png").open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
