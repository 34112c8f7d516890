"""Train several seeds (or learning rates) of one config as one program; each leaves what it would leave alone.

The group has a directory of its own with the checkpoints of all lanes together, from which it continues; every
lane has the directory of its run with config.json, metrics.jsonl, result.json and its last checkpoint. Times in
metrics and results are those of the whole group.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bigmodel_jax import evaluate as evaluation
from bigmodel_jax import experiment as experiments
from bigmodel_jax import lanes, report, sections
from bigmodel_jax import workdir as workdirs
from bigmodel_jax.checkpoint import Checkpointer
from bigmodel_jax.data.pipeline import Prefetch
from bigmodel_jax.errors import InputError, NumericAbort
from bigmodel_jax.experiment import Experiment
from bigmodel_jax.metrics import Clock, Log
from bigmodel_jax.programs import set_up_process
from bigmodel_jax.screen import Screen
from bigmodel_jax.train import COMPILE_GRACE_S, Loop, enter, meta, prepared
from bigmodel_jax.variants import overridden


def train_lanes(
    configs: Sequence[Mapping[str, Any]], folders: Sequence[str], path: str, *, allow_config_change: bool = False
) -> list[dict[str, Any] | None]:
    """Run experiments that differ in seed, lr and weight decay to their ends, from where they stand.

    Args:
      configs: resolved, one for each lane. folders: where each lane's run goes. path: of the group.

    Returns:
      What each lane's result.json holds; None where it diverged.

    Raises:
      InputError, Preempted: as of one run. NumericAbort: every lane has diverged.
    """
    # A lane is whole on one device, and the group decides on how many of them it is spread.
    configs = [{**config, "mesh": {**config["mesh"], "data": -1}} for config in configs]
    clock = Clock()
    set_up_process(sections.Runtime(**configs[0]["runtime"]))
    lanes.check(configs)
    screen = Screen()
    with contextlib.ExitStack() as stack:
        group = workdirs.open_workdir(path)
        stack.enter_context(workdirs.lock(group))
        entered = [
            enter(folder, config, stack, allow_config_change) for folder, config in zip(folders, configs, strict=True)
        ]
        _same_lanes(group, configs)
        stack.enter_context(screen)
        one = jax.devices()[:1]
        with clock.span("prepare"):
            exps = [
                prepared(config, workdir, screen, one) for config, (workdir, _) in zip(configs, entered, strict=True)
            ]
        for line in dict.fromkeys(line for _, changes in entered for line in changes):
            screen.say(line)
        workdirs_of_lanes = [workdir for workdir, _ in entered]
        loop = LaneLoop(exps, workdirs_of_lanes, group, clock, screen, stack, allow_config_change)
        return loop.go()


def train_together(raw: Mapping[str, Any], overrides: Sequence[str], args: Any) -> None:
    """`bigmodel train` with --seeds 0,1,2 (each run in WORKDIR/seed-N) or --lanes FILE.

    The file is a JSON list of {"workdir": directory of the run, "overrides": {leaf: value}}.

    Raises:
      InputError: not such a list, or not integers. Others as `train_lanes`.
    """
    if args.seeds:
        try:
            seeds = [int(word) for word in args.seeds.split(",")]
        except ValueError:
            raise InputError(f"--seeds {args.seeds!r} should be integers with commas between, such as 0,1,2") from None
        given = [{"workdir": f"{args.workdir}/seed-{seed}", "overrides": {"seed": seed}} for seed in seeds]
    else:
        try:
            given = json.loads(Path(args.lanes).read_text())
            given = [{"workdir": str(lane["workdir"]), "overrides": dict(lane["overrides"])} for lane in given]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--lanes '{args.lanes}' is no list of workdir and overrides: {error}") from None
    folders = [lane["workdir"] for lane in given]
    if not folders or len(set(folders)) < len(folders):
        raise InputError(f"lanes need a directory each, not {folders}")
    configs = [experiments.resolve(overridden(raw, lane["overrides"]), overrides) for lane in given]
    train_lanes(configs, folders, args.workdir, allow_config_change=args.allow_config_change)


def _same_lanes(group: Any, configs: Sequence[Mapping[str, Any]]) -> None:
    """The group's checkpoints number its lanes, so these must be the ones it was started with."""
    found = [{"seed": c["seed"], **{leaf: c["optimizer"][leaf] for leaf in lanes.VARIED}} for c in configs]
    path = group / "lanes.json"
    if path.exists() and json.loads(path.read_text()) != found:
        raise InputError(f"'{group}' was started with other lanes (lanes.json); give another --workdir")
    workdirs.write_json(path, found)


class _Logs(contextlib.ExitStack):
    """The logs of all lanes, where the loop has one."""

    def __init__(self, logs: Sequence[Log]):
        super().__init__()
        self.logs = [self.enter_context(log) for log in logs]

    def truncate(self, step: int) -> None:
        for log in self.logs:
            log.truncate(step)

    def flush(self) -> None:
        for log in self.logs:
            log.flush()


class LaneLoop(Loop):
    """The loop of train.py over a group; a lane that diverges is left behind, and the others go on."""

    def __init__(
        self, exps: Sequence[Experiment], folders: Sequence[Any], group: Any, clock: Clock, screen: Screen,
        stack: contextlib.ExitStack, allow_config_change: bool,
    ):  # fmt: skip
        self.exps, self.folders = exps, folders
        self.given_up: dict[int, str] = {}
        programs = lanes.LanePrograms(exps)
        super().__init__(exps[0], programs, group, clock, screen, stack, allow_config_change)
        joined = "\n".join(exp.data.fingerprint for exp in exps)
        self.fingerprint = hashlib.sha256(joined.encode()).hexdigest()
        self.key = programs.together([jax.random.key(exp.run.seed) for exp in exps])
        work = self.exp.work()
        clock.describe(**work | {"flops_per_example": len(exps) * work["flops_per_example"]})
        self.results: dict[str, list[dict[str, Any] | None]] = {}

    @property
    def live(self) -> list[int]:
        return [k for k in range(len(self.exps)) if k not in self.given_up]

    def open_log(self) -> Any:
        board = self.settings["log"].tensorboard
        return _Logs([Log(folder, tensorboard=board) for folder in self.folders])

    def start(self) -> tuple[Any, int]:
        """As of one run; a lane that had diverged by then stays behind."""
        state, step = super().start()
        self.given_up = {int(k): reason for k, reason in self.restored.get("given_up", {}).items()}
        for k, reason in self.given_up.items():
            workdirs.write_json(self.folders[k] / workdirs.DIVERGED, {"reason": reason})
        return state, step

    def meta(self, step: int) -> dict[str, Any]:
        return super().meta(step) | {"given_up": {str(k): reason for k, reason in self.given_up.items()}}

    def greet(self, step: int) -> None:
        self.screen.start(self.exp, step, self.programs.solo.state, self.clock)
        self.screen.say(f"{len(self.exps)} lanes ({self.programs.by}) on {self.programs.mesh.size} devices")

    def batches(self, start: int) -> Prefetch:
        return Prefetch(self.fetch, start, depth=self.settings["runtime"].prefetch, stop=self.exp.run.steps)

    def fetch(self, step: int) -> Any:
        """The batches of a step, each lane's as its run gets it alone."""
        shape = self.exp.cut(self.exp.data.train.size(step))
        return self.programs.together([shaped(exp.data.train.batch(step), shape) for exp in self.exps])

    def digest(self, batch: Any) -> list[Any]:
        split = [
            batch[k] if isinstance(batch, list) else {name: leaf[k] for name, leaf in batch.items()}
            for k in range(len(self.exps))
        ]
        return [super(LaneLoop, self).digest(one) for one in split]

    def settle(self) -> None:
        """Each lane's metrics go to its own log."""
        if self.pending is None:
            return
        (step, metrics, seen), self.pending = self.pending, None
        rows = {name: [float(x) for x in values] for name, values in jax.device_get(metrics).items()}
        self.clock.count(self.exp.data.train.size(step))
        live = self.live
        shown = {name: float(np.mean([values[k] for k in live])) for name, values in rows.items()}
        self.screen.advance(step + 1, shown)
        for k in live:
            row = {name: values[k] for name, values in rows.items()}
            try:
                with workdirs.told_of_divergence(self.folders[k]):
                    self.note(step, row, self.log.logs[k], self.exps[k].data.train, seen[k] if seen else "")
            except NumericAbort as error:
                self.given_up[k] = str(error)
                self.screen.say(f"lane {k} (seed {self.exps[k].run.seed}) diverged: {error}")
                if not self.live:
                    raise

    def evaluate(self, step: int, state: Any) -> None:
        """Every evaluation set, each lane on its own batches of it."""
        self.settle()
        wanted = self.settings["eval"].batches
        with self.clock.span("eval"):
            for name, (rows, spec) in self.evals.items():
                logs = self.log.logs
                found = [log.find(step, "eval", name) for log in logs]
                if any(found[k] is None for k in self.live):
                    self.watchdog.pat(grace_s=COMPILE_GRACE_S)
                    found = self._measured(name, rows, spec, state, step, wanted)
                    self.watchdog.pat()
                    if found is None:
                        return
                    for k in self.live:
                        if logs[k].find(step, "eval", name) is None:
                            logs[k].event(step, "eval", found[k], name=name)
                self.results[name] = found
                for k in self.live:
                    self.screen.evaluated(step, f"{name} seed {self.exps[k].run.seed}", found[k])

    def _measured(self, name: str, rows: int, spec: Any, state: Any, step: int, wanted: int) -> list[Any] | None:
        pipelines = [exp.data.evals[name] for exp in self.exps]
        number = min(wanted, pipelines[0].num_eval_batches) if wanted else pipelines[0].num_eval_batches
        total = evaluation.totals(
            lambda batch: self.programs.evaluate(name, rows, spec)(state, batch),
            lambda index: self.programs.together([dict(each.batch(index)) for each in pipelines]),
            number, stop=lambda: self.preemption.asked(step),
        )  # fmt: skip
        if total is None:
            return None
        examples = float(min(len(pipelines[0].source), number * rows))
        return [
            evaluation.means(
                {metric: (float(pair[0][k]), float(pair[1][k])) for metric, pair in total.items()},
                self.exp.objective.coefficients,
            ) | {"examples": examples}
            for k in range(len(self.exps))
        ]  # fmt: skip

    def finish(self, step: int, state: Any) -> list[dict[str, Any] | None]:
        """Every lane's result, curve and last checkpoint, as its run would leave them."""
        with self.clock.span("checkpoint"):
            self.checkpoints.wait()
        self.log.flush()
        return [self._finish_lane(k, step, state) if k in self.live else None for k in range(len(self.exps))]

    def _finish_lane(self, k: int, step: int, state: Any) -> dict[str, Any]:
        exp, folder, one = self.exps[k], self.folders[k], self.programs.lane(state, k)
        sample, text = self.settings["sample"], ""
        if sample.length:
            variables = self.programs.solo.eval_variables(one)
            text = report.sample(exp, variables, sample, jax.random.key(exp.run.seed))
        with self.clock.span("checkpoint"), Checkpointer(folder / "checkpoints", keep_last=1) as saver:
            if step not in saver.steps():
                saver.save(step, one, meta(step, exp))
        evals = {name: found[k] for name, found in self.results.items()}
        result = {"eval": evals, **self.summary(step, one, exp), "sample": text, "lanes": len(self.exps)}
        with self.clock.span("report"):
            report.plot(folder)
            workdirs.write_json(folder / "result.json", result)
        self.screen.say(f"done: {folder}")
        return result


def shaped(batch: Mapping[str, np.ndarray], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf).reshape(*shape, *leaf.shape[1:]) for name, leaf in batch.items()}
