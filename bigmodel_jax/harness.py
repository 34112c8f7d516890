"""Our models under the lm-eval harness (Gao et al., "A framework for few-shot language model evaluation").

    from bigmodel_jax.harness import Bigmodel
    from lm_eval import simple_evaluate
    simple_evaluate(model=Bigmodel("runs/first"), tasks=["arc_easy"])

or `bigmodel eval --workdir runs/first --tasks NAME --include FOLDER`. Needs the extra "harness". Importing this
module imports lm-eval, so nothing else in the package does. torch is never needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import offline
from bigmodel_jax import workdir as workdirs
from bigmodel_jax.errors import InputError
from bigmodel_jax.generate import Generator, Sampling
from bigmodel_jax.learn.losses import token_losses
from bigmodel_jax.metrics import encode
from bigmodel_jax.parallel import hosts, rules
from bigmodel_jax.parallel.mesh import fill

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise InputError(f"the lm-eval harness is not usable ({error}); pip install bigmodel_jax[harness]") from None

BUCKET = 64  # lengths are padded to multiples of it, so that few programs are compiled


class Bigmodel(TemplateLM):
    """A run directory as the harness's model: a causal LM with its own tokenizer.

    Args:
      workdir: of the run. overrides: "--config.a.b=value". step: checkpoint, default the latest; "best"
        for the one in best/.
      batch_size: rows at a time. max_length: tokens of context, default the model's or data's length.
      max_gen_toks: new tokens where a task does not say.
      prefix: begin every context as the tokenizer begins a document (our own: with the end-of-text token).

    Errors: InputError for a run that is no causal LM, and a continuation longer than max_length.
    """

    def __init__(
        self,
        workdir: str,
        *,
        overrides: Sequence[str] = (),
        step: offline.Step = None,
        batch_size: int = 16,
        max_length: int = 0,
        max_gen_toks: int = 128,
        prefix: bool = True,
    ):
        super().__init__()
        self.exp, self.programs, state, self.step = offline.open_run(workdir, overrides, step)
        self.tokenizer = self.exp.data.tokenizer
        if self.tokenizer is None or self.exp.model.cache is None:
            raise InputError(f"'{workdir}' is no causal language model; the harness scores only those")
        self.variables = self.programs.eval_variables(state)
        config = self.exp.config
        self.max_length = max_length or config["model"].get("max_length", 0) or config["data"].get("length", 0) or 1024
        self.batch_size, self.max_gen_toks, self.prefix = batch_size, max_gen_toks, prefix
        self._score = jax.jit(self._sums)
        self.generator = Generator(
            self.exp.model, self.variables, layout=self.exp.layout, eos=self.exp.data.end_tokens,
            pad=self.tokenizer.pad,
        )  # fmt: skip

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        begin = getattr(self.tokenizer, "bos", None)
        return self.tokenizer.eos if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if self.prefix and add_special_tokens is not False:
            return self.tokenizer.prompt(string)
        return self.tokenizer.encode(string).tolist()

    def _sums(self, variables: Any, tokens: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
        """(log-probability [B] of the weighted targets, whether each of them is the most likely [B])."""
        with rules.use(self.exp.layout):
            out = self.exp.model.apply(variables, tokens=tokens, train=False)
            chunk = self.exp.config["objective"].get("chunk", 0)
            nats, right = token_losses(out.hidden, out.head, targets, chunk=chunk)
            used = weights > 0
            return rules.everywhere((-jnp.sum(jnp.where(used, nats, 0.0), axis=1), jnp.all(right | ~used, axis=1)))

    def _batches(self, sizes: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """(places of up to batch_size requests of about one length, the length they are padded to)."""
        order = np.argsort(-sizes, kind="stable")
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            yield some, min(-(-int(sizes[some].max()) // BUCKET) * BUCKET, max(self.max_length, int(sizes[some].max())))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it. A context that is
        too long loses its beginning."""
        for _, context, continuation in requests:
            if not context or len(continuation) > self.max_length:
                raise InputError(
                    f"harness: a continuation of {len(continuation)} tokens after {len(context)}; it needs one token "
                    f"of context, and at most max_length {self.max_length}"
                )
        rows = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        scored = [len(continuation) for _, _, continuation in requests]
        out: list[Any] = [None] * len(rows)
        count = fill(self.batch_size, self.exp.mesh)
        for places, width in self._batches(np.array([len(row) - 1 for row in rows])):
            tokens, targets = np.full((2, count, width), self.tokenizer.pad, np.int32)
            weights = np.zeros((count, width), np.float32)
            for row, place in enumerate(places):
                ids, size = rows[place], len(rows[place]) - 1
                tokens[row, :size], targets[row, :size] = ids[:-1], ids[1:]
                weights[row, size - scored[place] : size] = 1.0
            batch = jax.device_put((tokens, targets, weights), self.programs.eval_sharding)
            sums, greedy = jax.device_get(self._score(self.variables, *batch))
            for row, place in enumerate(places):
                out[place] = (float(sums[row]), bool(greedy[row]))
        for (request, _, _), answer in zip(requests, out, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return out

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token predicted once, in disjoint windows of max_length."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            tokens = self.tokenizer.encode(request.args[0]).tolist()
            pieces = get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for pair in map(make_disjoint_window, pieces):
                windows.append((None, *pair))
                owner.append(number)
        found = self._loglikelihood_tokens(windows)
        sums = np.bincount(owner, [value for value, _ in found], minlength=len(requests)) if owner else []
        answers = [float(value) for value in sums] or [0.0] * len(requests)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first stop string; greedy unless a task asks to sample."""
        out: list[Any] = [None] * len(requests)
        kinds: dict[tuple[int, Sampling], list[int]] = {}
        for place, request in enumerate(requests):
            options = request.args[1]
            length = int(options.get("max_gen_toks") or options.get("max_new_tokens") or self.max_gen_toks)
            how = Sampling(
                temperature=float(options.get("temperature", 1.0)) if options.get("do_sample", False) else 0.0,
                top_k=int(options.get("top_k", 0)), top_p=float(options.get("top_p", 1.0)),
            )  # fmt: skip
            kinds.setdefault((length, how), []).append(place)
        for (length, how), places in kinds.items():
            room = self.max_length - length
            if room < 1:
                raise InputError(f"harness: {length} new tokens leave no context of max_length {self.max_length}")
            prompts = {place: self.tok_encode(requests[place].args[0])[-room:] for place in places}
            for some, _ in self._batches(np.array([len(prompts[place]) for place in places])):
                chosen = [places[i] for i in some]
                for place, text in zip(chosen, self._written(requests, chosen, prompts, length, how), strict=True):
                    out[place] = text
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return out

    def _written(
        self, requests: list[Any], chosen: list[int], prompts: dict[int, list[int]], length: int, how: Sampling
    ) -> list[str]:
        """Texts of one batch; a row ends early once its text holds one of its stop strings."""
        stops = [requests[place].args[1].get("until") for place in chosen]

        def text(tokens: list[int]) -> str:
            return self.tokenizer.decode(tokens, continued=True)

        def ended(row: int, tokens: list[int]) -> bool:
            return cut(text(tokens), stops[row]) != text(tokens)

        key = jax.random.key(chosen[0])
        rows = self.generator([prompts[place] for place in chosen], length=length, key=key, sampling=how, ended=ended)
        return [cut(text(row.tokens), stops[number]) for number, row in enumerate(rows)]


def cut(text: str, stops: str | Sequence[str] | None) -> str:
    """`text` up to the first of the stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text


def evaluate_tasks(
    workdir: str,
    overrides: Sequence[str],
    *,
    tasks: Sequence[str],
    include: str = "",
    step: offline.Step = None,
    out: str = "",
    limit: int = 0,
) -> dict[str, Any]:
    """Harness tasks on a run; prints the harness's table and writes tasks.json.

    Args:
      tasks: names the harness knows, or of YAML files in the folder `include`. limit: first examples of each, 0 all.
      out: directory of tasks.json, default eval/ in the run's.

    Errors: InputError for an unknown task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    # The harness's own tasks take ten seconds to list, so only if the given folder lacks one.
    manager = TaskManager(include_path=include or None, include_defaults=False)
    if set(tasks) - set(manager.match_tasks(list(tasks))):
        manager = TaskManager(include_path=include or None)
    unknown = sorted(set(tasks) - set(manager.match_tasks(list(tasks))))
    if unknown:
        raise InputError(f"the harness has no task '{unknown[0]}'; --include names the folder of your own")
    model = Bigmodel(workdir, overrides=overrides, step=step)
    found = simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit or None, log_samples=False
    )
    report = {"run": workdir, "step": model.step} | {
        key: found[key] for key in ("results", "versions", "n-shot", "n-samples", "higher_is_better") if key in found
    }  # fmt: skip
    if hosts.is_first():
        folder = workdirs.open_workdir(out or str(workdirs.existing(workdir) / "eval"))
        workdirs.write_json(folder / "tasks.json", json.loads(json.dumps(encode(report), default=str)))
        print(make_table(found))
    return report
