"""The story of a run, top to bottom: build, restore, loop, evaluate, save, close.

Step numbers count finished steps of data: a checkpoint "200" is the state after batches 0 to 199,
and the next batch is 200. The optimizer's own count is smaller where bad steps were skipped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bigmodel_jax import experiment as experiments
from bigmodel_jax import fingerprint, sections, tree
from bigmodel_jax import workdir as workdirs
from bigmodel_jax.checkpoint import Checkpointer
from bigmodel_jax.data.pipeline import Pipeline, Prefetch
from bigmodel_jax.errors import InputError, NumericAbort, Preempted
from bigmodel_jax.evaluate import evaluate, spec
from bigmodel_jax.experiment import Experiment
from bigmodel_jax.metrics import Clock, Log
from bigmodel_jax.parallel import hosts
from bigmodel_jax.parallel.feed import global_batch, local_rows
from bigmodel_jax.programs import Programs, set_up_process
from bigmodel_jax.screen import Screen
from bigmodel_jax.stopping import Best, Stopping

# A large model may take this long to compile before the watchdog calls it stuck.
COMPILE_GRACE_S = 3600.0


def train(config: Mapping[str, Any], path: str, *, allow_config_change: bool = False) -> dict[str, Any]:
    """Run an experiment in the directory `path` to its end, from where it stands.

    Args:
      config: resolved, see `experiment.resolve`.
      allow_config_change: continue although the config differs from the directory's.

    Returns:
      What result.json holds.

    Raises:
      InputError: config, data, checkpoint or directory cannot be used (nothing is lost).
      Preempted: asked to stop; the state is saved.
      NumericAbort: bad steps in a row, or one under the "crash" policy.
    """
    clock = Clock()
    set_up_process(sections.Runtime(**config["runtime"]))
    screen = Screen()
    for line in hosts.roster():
        screen.say(line)
    with contextlib.ExitStack() as stack:
        workdir, changes = enter(path, config, stack, allow_config_change)
        stack.enter_context(screen)
        with clock.span("prepare"):
            exp = prepared(config, workdir, screen)
        for line in changes:
            screen.say(line)
        return Loop(exp, Programs(exp), workdir, clock, screen, stack, allow_config_change).go()


def enter(
    path: str, config: Mapping[str, Any], stack: contextlib.ExitStack, allow_config_change: bool
) -> tuple[Any, list[str]]:
    """(the directory of a run, locked, lines that say how the config has changed since it was started)."""
    workdir = workdirs.open_workdir(path)
    if hosts.is_first():
        stack.enter_context(workdirs.lock(workdir))
    return workdir, workdirs.check_config(
        workdir, config, mechanics=experiments.MECHANICS, derived=experiments.DERIVED, allow=allow_config_change
    )


def prepared(config: Mapping[str, Any], workdir: Any, screen: Screen, devices: Any = None) -> Experiment:
    """The experiment with its data, and this start of it written down in its directory."""
    exp = experiments.build(config, devices=devices, progress=screen.preparing)
    if exp.data.train is None:
        raise InputError(f"data '{config['data']['name']}' has nothing to train on; name a data set (data.name)")
    if hosts.is_first():
        workdirs.record_start(workdir, exp.config)
        if exp.data.report:
            workdirs.write_json(workdir / "data.json", exp.data.report)
    return exp


class Loop:
    """The parts of one run, and the loop over them."""

    def __init__(
        self,
        exp: Experiment,
        programs: Programs,
        workdir: Any,
        clock: Clock,
        screen: Screen,
        stack: contextlib.ExitStack,
        allow_config_change: bool,
    ):
        self.exp, self.workdir, self.clock, self.screen = exp, workdir, clock, screen
        self.allow_config_change = allow_config_change
        self.settings = {name: exp.section(name) for name in sections.PLAIN}
        self.programs = programs
        runtime, saving = self.settings["runtime"], self.settings["checkpoint"]
        self.preemption = stack.enter_context(hosts.Preemption())
        self.watchdog = stack.enter_context(hosts.Watchdog(hosts.patience(runtime.watchdog_s)))
        self.checkpoints = stack.enter_context(
            Checkpointer(
                workdir / "checkpoints", keep_last=saving.keep_last, keep_every=saving.keep_every,
                asynchronous=saving.asynchronous, timeout_s=saving.timeout_s, log=screen.say,
            )
        )  # fmt: skip
        self.log = stack.enter_context(self.open_log())
        clock.describe(**exp.work())
        rows = exp.eval_rows
        self.evals = {name: (rows, spec(pipeline)) for name, pipeline in exp.data.evals.items()}
        self.fingerprint = exp.data.fingerprint
        self.key = jax.random.key(exp.run.seed)
        self.saved = -1
        self.restored: dict[str, Any] = {}
        self.tracing = self.met = False
        self.pending: tuple[int, Any, str] | None = None
        self.results: dict[str, Any] = {}
        self.stopping = Stopping.of(self.settings["eval"], exp.data.evals)
        self.best: Best | None = None
        self.bests = stack.enter_context(self.keep_best()) if self.stopping else None

    def open_log(self) -> Log:
        return Log(self.workdir, tensorboard=self.settings["log"].tensorboard, enabled=hosts.is_first())

    def go(self) -> dict[str, Any]:
        steps = self.exp.run.steps
        state, step = self.start()
        self.log.truncate(step)
        self.greet(step)
        with self.batches(step) as batches:
            while True:
                if step > self.saved and (step == steps or self.due("checkpoint", step)):
                    self.save(step, state)
                stop = step == steps
                if stop or self.due("eval", step):
                    self.evaluate(step, state)
                    stop |= self.judge(step, state)
                if self.preemption.asked(step):
                    self.leave(step, state)
                if stop:
                    break
                with self.clock.span("input"):
                    batch = next(batches)
                state = self.advance(step, state, batch)
                step += 1
        return self.finish(step, state)

    def greet(self, step: int) -> None:
        self.screen.start(self.exp, step, self.programs.state, self.clock)

    def due(self, section: str, step: int) -> bool:
        every = self.settings[section].every
        return every > 0 and step > 0 and step % every == 0

    def start(self) -> tuple[Any, int]:
        """State and next step: from the newest valid checkpoint, from `init_from`, or anew."""
        self.watchdog.pat(grace_s=COMPILE_GRACE_S)
        self.programs.begin(self.exp.batch_sizes(), self.evals)
        with self.clock.span("checkpoint"):
            found = self.checkpoints.restore(self.programs.state)
        if found is not None:
            state, self.restored = found
            self.saved = int(self.restored["step"])
            if self.restored["data"] != self.fingerprint:
                line = (
                    f"the data is not that of step {self.saved} (fingerprint {self.restored['data'][:12]} -> "
                    f"{self.fingerprint[:12]})"
                )
                if not self.allow_config_change:
                    raise InputError(f"{line}; restore the data, or --allow-config-change to go on with the new")
                self.screen.say(line)
            self.screen.say(f"resuming at step {self.saved}")
            return state, self.saved
        with self.clock.span("compile"):
            state = self.programs.init(self.key)
        if self.settings["init_from"].path:
            state, line = self.programs.initial_from(state, self.settings["init_from"], self.tell_names)
            self.screen.say(line)
        return state, 0

    def tell_names(self, report: Mapping[str, Any]) -> None:
        """Which parameters were taken over by `init_from`, in full, whether or not that is accepted."""
        if hosts.is_first():
            workdirs.write_json(self.workdir / "init_from.json", {"from": self.settings["init_from"].path, **report})

    def batches(self, start: int) -> Prefetch:
        """Global batches from `start` on, made ahead by a thread: from numpy, or from tf.data."""
        depth, stop = self.settings["runtime"].prefetch, self.exp.run.steps
        if self.exp.input == "numpy":
            return Prefetch(self.fetch, start, depth=depth, stop=stop)
        pipeline, place = self.exp.data.train, self.programs.batch_sharding
        shape = self.exp.cut(pipeline.size(start))
        rows = local_rows(place, shape)
        ready = iter(pipeline.tfdata(start, rows, prefetch=depth, stop_step=stop).as_numpy_iterator())
        return Prefetch(lambda _: global_batch(lambda _: next(ready), place, shape), start, depth=depth, stop=stop)

    def fetch(self, step: int) -> dict[str, jax.Array]:
        """The global batch of a step, placed on the devices. Runs in the prefetch thread."""
        pipeline = self.exp.data.train
        accumulation, rows = self.exp.cut(pipeline.size(step))
        return global_batch(lambda r: pipeline.batch(step, r), self.programs.batch_sharding, (accumulation, rows))

    def advance(self, step: int, state: Any, batch: Any) -> Any:
        """Run one step; look at the previous one's metrics while this one is computed."""
        size = self.exp.data.train.size(step)
        if not self.programs.ready(size):
            with self.clock.span("compile"):
                self.watchdog.pat(grace_s=COMPILE_GRACE_S)
                for each in self.exp.batch_sizes():
                    self.programs.step(each)
                self.clock.mark("first_step")
        if not self.met:
            # The first collective waits only seconds for peers that are still compiling.
            hosts.barrier("compiled", COMPILE_GRACE_S)
            self.met = True
        self.profile(step)
        with self.clock.span("step"):
            # Two runs were fed the same exactly where their ledgers say so; costs a look at every byte of the batch.
            seen = self.digest(batch) if self.settings["log"].ledger else ""
            state, metrics = self.programs.step(size)(state, batch, self.key)
            self.settle()
            self.pending = (step, metrics, seen)
        self.watchdog.pat()
        self.checkpoints.check()
        return state

    def digest(self, batch: Any) -> Any:
        return fingerprint.digest(batch)

    def settle(self) -> None:
        """Fetch the metrics of the step before: log them, and act on what they say."""
        if self.pending is None:
            return
        (step, metrics, seen), self.pending = self.pending, None
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.clock.count(self.exp.data.train.size(step))
        self.screen.advance(step + 1, row)
        with workdirs.told_of_divergence(self.workdir):
            self.note(step, row, self.log, self.exp.data.train, seen)

    def note(self, step: int, row: dict[str, float], log: Log, pipeline: Pipeline, seen: str) -> None:
        """Log what a step's metrics say.

        Raises:
          NumericAbort: it was one bad step too many.
        """
        done, settings = step + 1, self.settings["log"]
        bad = row["bad_streak"] > 0
        if bad:
            ids = pipeline.ids(step)
            log.event(done, "bad_step", {**row, "ids": np.asarray(ids).tolist()})
            self.screen.say(f"bad step {step}: loss {row['loss']:.4g}, example ids {_few(ids)}")
        if settings.ledger:
            log.event(done, "batch", {"ids": np.asarray(pipeline.ids(step)).tolist(), "hash": seen})
        if bad or done % settings.every == 0 or done == self.exp.run.steps or done == 1:
            log.write(done, {**row, **self.clock.rates()})
        guard = self.settings["guard"]
        if bad and (guard.policy == "crash" or row["bad_streak"] >= guard.limit):
            raise NumericAbort(
                f"step {step}: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}, "
                f"{int(row['bad_streak'])} bad steps in a row; example ids {_few(pipeline.ids(step))}"
            )

    def save(self, step: int, state: Any) -> None:
        """Checkpoint. The metrics up to `step` are on disk before it."""
        self.settle()
        self.log.flush()
        self.watchdog.pat(grace_s=self.settings["checkpoint"].timeout_s)
        with self.clock.span("checkpoint"):
            self.checkpoints.save(step, state, self.meta(step))
        self.saved = step

    def meta(self, step: int) -> dict[str, Any]:
        return meta(step, self.exp) | {"data": self.fingerprint}

    def keep_best(self) -> Checkpointer:
        """The folder of the best checkpoint, a checkpoint directory of its own with one step."""
        saving = self.settings["checkpoint"]
        return Checkpointer(
            self.workdir / "best", keep_last=1, asynchronous=saving.asynchronous, timeout_s=saving.timeout_s,
            log=lambda line: None,
        )  # fmt: skip

    def judge(self, step: int, state: Any) -> bool:
        """Keep the checkpoint if it is the best so far; whether to stop for lack of a better one."""
        if self.stopping is None or self.stopping.set not in self.results:
            return False
        self.best = self.stopping.best(self.log.history("eval", self.stopping.set)) if hosts.is_first() else None
        improved = bool(hosts.from_first(int(self.best is not None and self.best.step == step)))
        if improved and step not in self.bests.steps():
            with self.clock.span("checkpoint"):
                self.bests.save(step, state, self.meta(step))
        over = bool(hosts.from_first(int(self.best is not None and self.stopping.over(self.best))))
        if over and step > self.saved:
            self.save(step, state)
        if over:
            self.screen.say(
                f"stopped at step {step}: {self.settings['eval'].metric} was best at step "
                f"{self.best.step if self.best else '?'} and not better since"
            )
        return over

    def best_result(self) -> dict[str, Any]:
        """Every evaluation at the best step, for result.json."""
        if self.best is None:
            return {}
        sets = {name: dict(self.log.history("eval", name)).get(self.best.step) for name in self.exp.data.evals}
        return {"best": {"step": self.best.step, self.settings["eval"].metric: self.best.value, "eval": sets}}

    def evaluate(self, step: int, state: Any) -> None:
        """Every evaluation set; nothing is computed twice after a resume."""
        self.settle()
        settings = self.settings["eval"]
        with self.clock.span("eval"):
            for name, pipeline in self.exp.data.evals.items():
                found = self.log.find(step, "eval", name)
                if found is None:
                    self.watchdog.pat(grace_s=COMPILE_GRACE_S)
                    found = evaluate(
                        self.programs.evaluate(name, *self.evals[name]), state, pipeline,
                        self.programs.eval_sharding, self.exp.eval_rows,
                        coefficients=self.exp.objective.coefficients, batches=settings.batches,
                        stop=lambda: self.interrupted(step),
                    )  # fmt: skip
                    self.watchdog.pat()
                    if found is None:
                        return
                    self.log.event(step, "eval", found, name=name)
                self.results[name] = found
                self.screen.evaluated(step, name, found)

    def interrupted(self, step: int) -> bool:
        """Whether to leave an evaluation; asked at each of its batches, and so a sign of life."""
        self.watchdog.pat()
        return self.preemption.asked(step)

    def leave(self, step: int, state: Any) -> None:
        """Save and exit 75."""
        if step > self.saved:
            self.save(step, state)
        self.watchdog.pat(grace_s=self.settings["checkpoint"].timeout_s)
        with self.clock.span("checkpoint"):
            self.checkpoints.wait()
        raise Preempted(f"stopped at step {step} of {self.exp.run.steps}; the same command continues")

    def finish(self, step: int, state: Any) -> dict[str, Any]:
        """Wait for the last save, sample, and write result.json and the loss curve."""
        from bigmodel_jax import report

        self.profile(self.exp.run.steps)
        self.watchdog.pat(grace_s=COMPILE_GRACE_S)
        with self.clock.span("checkpoint"):
            self.checkpoints.wait()
            if self.bests is not None:
                self.bests.wait()
        sample = self.settings["sample"]
        text = ""
        if sample.length:
            with self.clock.span("sample"):
                text = report.sample(self.exp, self.programs.eval_variables(state), sample, self.key)
            self.screen.sampled(text)
        result = {"eval": self.results, **self.best_result(), **self.summary(step, state, self.exp), "sample": text}
        if hosts.is_first():
            with self.clock.span("report"):
                self.log.flush()
                report.plot(self.workdir)
                workdirs.write_json(self.workdir / "result.json", result)
        self.screen.finished(self.workdir, result)
        return result

    def summary(self, step: int, state: Any, exp: Experiment) -> dict[str, Any]:
        """What result.json says of a run's final state, data and time."""
        from bigmodel_jax import report

        return {
            "step": step,
            "updates": int(state["step"]),
            "parameters": tree.count(state["params"]),
            "state_hash": report.state_hash(state),
            "config_hash": experiments.config_hash(exp.config),
            "data": exp.data.fingerprint,
            "examples": exp.data.examples,
            "rows": exp.data.rows,
            "time": self.clock.summary(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def profile(self, step: int) -> None:
        """Open and close the profiler window."""
        window = self.settings["runtime"].profile
        if window and step == window[0]:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.tracing = True
        if self.tracing and (step == window[0] + window[1] or step == self.exp.run.steps):
            self.settle()
            jax.profiler.stop_trace()
            self.tracing = False


def meta(step: int, exp: Experiment) -> dict[str, Any]:
    """What a checkpoint says beside its arrays."""
    return {
        "step": step,
        "seed": exp.run.seed,
        "config": exp.config,
        "config_hash": experiments.config_hash(exp.config),
        "data": exp.data.fingerprint,
    }


def _few(ids: Any) -> str:
    shown = ", ".join(str(int(i)) for i in list(ids)[:8])
    return f"[{shown}{', ...' if len(ids) > 8 else ''}]"
