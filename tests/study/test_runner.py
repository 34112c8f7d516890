"""Studies killed, shared and recorded, with a stand-in for `bigmodel train` that keeps its promises in milliseconds."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from bigmodel_jax import atomic, cli, status
from bigmodel_jax.errors import InputError, Preempted
from bigmodel_jax.study import journal, runner, spec
from bigmodel_jax.study.store import Store, same

# Saves every step, leaves with 75 when asked, 76 when it diverges; says in ran.txt when it has come to its end.
TRAINER = """
import json, os, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv if "=" in word and word.startswith("--config."))
folder = sys.argv[sys.argv.index("--workdir") + 1]
variant = sys.argv[sys.argv.index("--config") + 1].partition(":")[2]
seed = int(words["--config.seed"])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
step = int(open(folder + "/step").read()) if os.path.exists(folder + "/step") else 0
if "lr=9" in variant:
    sys.exit("bigmodel: no such thing") if seed else os._exit(2)
if "lr=0.3" in variant and not step:
    open(folder + "/step", "w").write("1")
    os._exit(1)  # crashes once
while step < 6:
    time.sleep(0.03)
    step += 1
    open(folder + "/.step", "w").write(str(step))
    os.replace(folder + "/.step", folder + "/step")
    if asked:
        sys.exit(75)
open(os.path.dirname(folder) + "/../ran.txt", "a").write(os.path.basename(folder) + "\\n")
if "lr=7" in variant:
    open(folder + "/diverged.json", "w").write("{}")
    sys.exit(76)
loss = seed + len(variant) / 10
start = words.get("--config.init_from.path", "").strip("'")
if start:
    loss += float(open(start + "/loss").read())
open(folder + "/loss", "w").write(str(loss))
sets = {"validation": {"loss": loss}, "long": {"loss": 3 * loss}}
rows = [{"step": 6, "event": "eval", "name": name, **numbers} for name, numbers in sets.items()]
open(folder + "/metrics.jsonl", "w").write("".join(json.dumps(row) + "\\n" for row in rows))
result = {"eval": sets, "examples": {"train": "t", "validation": words.get("--eval", "v"), "long": "l"}}
open(folder + "/.result", "w").write(json.dumps(result))
os.replace(folder + "/.result", folder + "/result.json")
"""


def study_file(folder: Path, rates: tuple = (0.1, 0.2), names: tuple = ("sgd", "adam"), **fields) -> str:
    study = dict(
        name="killed", title="t", source="s", seeds=(0, 1, 2), metric="validation/loss", mode="min",
        base=dict(
            steps=6, model=dict(name="linear"), objective=dict(name="classification"), optimizer=dict(name="sgd"),
            schedule=dict(name="constant"), data=dict(name="digits"),
        ),
        grid={"optimizer.lr": rates, "optimizer.name": names}, baseline=f"lr={rates[0]},name={names[0]}",
    )  # fmt: skip
    file = folder / "configs" / "killed.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"def get_study():\n    return {study | fields!r}\n")
    return str(file)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    path = tmp_path / "trainer.py"
    path.write_text(textwrap.dedent(TRAINER))
    monkeypatch.setattr(runner, "TRAIN", (sys.executable, str(path)))


def carried_out(file: str, workdir: Path, **options) -> list[spec.Row]:
    store = Store(spec.read(file), workdir, record=options.pop("record", False))
    return runner.Runner(store, say=lambda line: None, **options).run(store.cells())


def in_a_process(file: str, workdir: Path) -> int:
    """Process id of a runner; it exits 0, 75 when asked to stop, or 1."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        carried_out(file, workdir, processes=2)
        code = 0
    except Preempted as error:
        code = error.exit_code
    finally:
        os._exit(code)


def ended(workdir: Path) -> list[str]:
    """Cells whose run came to its end, as often as it did."""
    path = workdir / "ran.txt"
    return path.read_text().split() if path.exists() else []


def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def table(rows: list[spec.Row]) -> list[tuple]:
    return [(row.variant, row.seed, row.status, row.values.get("validation/loss")) for row in rows]


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_study_killed_five_times_ends_with_the_same_table_and_runs_no_cell_twice(tmp_path, trainer):
    file, workdir = study_file(tmp_path), tmp_path / "w"
    for turn, (number, code) in enumerate(
        ((signal.SIGKILL, 9), (signal.SIGTERM, 75), (signal.SIGKILL, 9), (signal.SIGTERM, 75), (signal.SIGKILL, 9))
    ):
        pid = in_a_process(file, workdir)
        until(lambda least=2 * turn + 1: len(ended(workdir)) >= least)
        os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
        assert code == (status & 0x7F or os.waitstatus_to_exitcode(status))
    rows = carried_out(file, workdir, processes=2)
    assert len(rows) == 12 and table(rows) == table(carried_out(file, tmp_path / "unbroken", processes=4))
    assert sorted(ended(workdir)) == sorted(row.cell for row in rows)
    again = carried_out(file, workdir)  # nothing is left to do
    assert again == rows and len(ended(workdir)) == 12


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_runners_share_a_study_and_each_cell_is_run_once(tmp_path, trainer):
    file, workdir = study_file(tmp_path), tmp_path / "w"
    pids = [in_a_process(file, workdir) for _ in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert len(ended(workdir)) == len(set(ended(workdir))) == 12


def test_divergence_is_a_result_and_failure_is_told(tmp_path, trainer):
    said = []
    store = Store(spec.read(study_file(tmp_path, rates=(0.3, 7, 9), names=("sgd",), seeds=(0, 1))), tmp_path / "w")
    work = runner.Runner(store, 3, say=said.append)
    rows = {(row.variant, row.seed): row.status for row in work.run(store.cells())}
    for rate, ended_as in ((0.3, "done"), (7, "diverged")):
        assert rows[f"lr={rate},name=sgd", 0] == rows[f"lr={rate},name=sgd", 1] == ended_as
    assert rows["lr=9,name=sgd", 1] == "failed" and "no such thing" in "\n".join(said)
    assert len(work.failed) == 2
    assert not any("again" in line and "lr=9,name=sgd seed 0" in line for line in said)  # 2 is never retried
    assert sum("again from the start" in line for line in said) >= 2  # 1 is


def test_recorded_rows_count_on_another_machine_and_after_a_new_option(tmp_path, trainer):
    file = study_file(tmp_path, names=("sgd",), seeds=(0,))
    first = carried_out(file, tmp_path / "w", record=True)
    path = tmp_path / "results" / "studies" / "killed.jsonl"
    assert len(path.read_text().splitlines()) == 2 and str(tmp_path) not in path.read_text()
    assert table(carried_out(file, tmp_path / "elsewhere", record=True)) == table(first)
    assert not (tmp_path / "elsewhere" / "ran.txt").exists()
    # An option that did not exist then does not matter while the study leaves it alone; a value that differs does.
    store = Store(spec.read(file), tmp_path / "w", record=True)
    cell = store.cells()[0]
    old = json.loads(path.read_text().splitlines()[0])["config"]
    del old["optimizer"]["clip"]
    assert same(old, cell)
    assert not same(old, dataclasses.replace(cell, given=cell.given | {"optimizer.clip"}))
    old["batch_size"] = 64
    assert not same(old, cell)


def test_a_recorded_row_without_a_new_metric_is_replaced(tmp_path, trainer):
    fields = dict(names=("sgd",), seeds=(0,))
    carried_out(study_file(tmp_path, **fields), tmp_path / "w", record=True)
    path = tmp_path / "results" / "studies" / "killed.jsonl"
    file = study_file(tmp_path, **fields, metric="long/loss - validation/loss")
    rows = carried_out(file, tmp_path / "elsewhere", record=True)  # run once more: the numbers are not in the record
    assert len(ended(tmp_path / "elsewhere")) == 2
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["cell"] for line in lines] == [row.cell for row in rows]
    assert all({"validation/loss", "long/loss - validation/loss"} <= set(line["values"]) for line in lines)
    assert table(carried_out(file, tmp_path / "third", record=True)) == table(rows)
    assert ended(tmp_path / "third") == []
    # An appender that waited while the file was replaced writes to the new one.
    with open(path, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=journal.append, args=(path, {"cell": "late"}))
        waiting.start()
        time.sleep(0.2)
        atomic.write(path, path.read_text())
    waiting.join()
    assert [line["cell"] for line in journal.lines(path)] == [*(row.cell for row in rows), "late"]


def test_rows_of_other_data_are_not_compared(tmp_path, trainer):
    study = spec.read(study_file(tmp_path, names=("sgd",), seeds=(0,)))
    store = Store(study, tmp_path / "w")
    rows = runner.Runner(store, 2, say=lambda line: None).run(store.cells())
    spec.check_comparable(study, rows)
    for field, what in (("eval_fingerprint", "evaluation"), ("data_fingerprint", "data")):
        other = [rows[0], dataclasses.replace(rows[1], **{field: "other"})]
        with pytest.raises(InputError, match=f"'lr=0.1,name=sgd' seed 0.*'lr=0.2,name=sgd' seed 0.*{what} fingerprint"):
            spec.check_comparable(study, other)


def test_a_slurm_array_of_runners(tmp_path, capsys):
    file = study_file(tmp_path)
    words = ["study", "run", file, "--workdir", str(tmp_path / "w"), "--slurm", "3", "--processes", "2", "--record"]
    cli.run([*words, "--dry-run", "--sbatch=--mem=1G", "--only", "lr=0.1,name=sgd", "--pilot", "2"])
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert {"#SBATCH --array=0-2", "#SBATCH --mem=1G", "#SBATCH --requeue"} <= set(script.splitlines())
    assert f"study run {file} --processes 2 --together 1 --record --only lr=0.1,name=sgd --pilot 2 --workdir" in script
    assert not (tmp_path / "w").exists()


def test_a_pilot_is_the_first_seeds_and_the_rest_goes_on_from_it(tmp_path, trainer, capsys):
    file, workdir = study_file(tmp_path, names=("sgd",)), tmp_path / "w"
    words = ["study", "run", file, "--workdir", str(workdir), "--processes", "2"]
    cli.run([*words, "--pilot", "2"])
    assert len(ended(workdir)) == 4 and "lr=0.1,name=sgd: 2 of 2 seeds" in capsys.readouterr().out
    cli.run(["study", "report", file, "--workdir", str(workdir), "--pilot", "2"])
    found = json.loads((workdir / "report" / "report.json").read_text())
    assert [variant["n"] for variant in found["variants"]] == [2, 2]
    cli.run(words)
    assert len(ended(workdir)) == len(set(ended(workdir))) == 6
    with pytest.raises(InputError, match="--pilot 4: study 'killed' has 3 seeds"):
        cli.run([*words, "--pilot", "4"])


def test_a_difference_of_two_metrics_is_one(tmp_path, trainer):
    """The stand-in's loss on the long set is three times that on the other; both sets are the fingerprint."""
    file = study_file(tmp_path, metric="long/loss - validation/loss", seeds=(1,))
    row = carried_out(file, tmp_path / "w")[0]
    wanted = 2 * (1 + len(row.variant) / 10)
    assert row.values["long/loss - validation/loss"] == pytest.approx(wanted)
    assert row.curve == [(6, pytest.approx(wanted))] and row.eval_fingerprint == "l v"
    file = study_file(tmp_path, metric="long/loss - short/loss", seeds=(1,))
    with pytest.raises(InputError, match="has no metric 'short/loss'"):
        carried_out(file, tmp_path / "w")


def test_variants_that_start_from_other_runs(tmp_path, trainer, capsys):
    """Each starts from the run of its own seed, made once and before it, and not made again for a report."""
    first = {"long": {"steps": 12}, "short": {"steps": 6, "optimizer.lr": 0.2}}
    variants = {"a": {"init_from.path": "first:long"}, "b": {"init_from.path": "first:long", "optimizer.lr": 0.3},
                "none": {}}  # fmt: skip
    fields = dict(first=first | {"short": first["short"]}, grid={}, variants=variants, baseline="none")
    with pytest.raises(InputError, match="no variant starts from 'first:short'"):
        spec.read(study_file(tmp_path, **fields))
    variants["b"]["init_from.path"] = "first:shrt"
    with pytest.raises(InputError, match="starts from 'first:shrt', which is not there; did you mean 'short'"):
        spec.read(study_file(tmp_path, **fields))
    variants["b"]["init_from.path"] = "first:short"
    file = study_file(tmp_path, **fields)
    rows = carried_out(file, tmp_path / "w", processes=2, record=True)
    # The stand-in's loss: seed + letters / 10, and that of where it starts.
    assert [(row.variant, row.seed) for row in rows] == [(name, seed) for seed in range(3) for name in variants]
    expected = {"a": 0.1 + 1.0, "b": 0.1 + 1.1, "none": 0.4}
    for row in rows:
        own = row.seed * (1 if row.variant == "none" else 2)
        assert row.values["validation/loss"] == pytest.approx(own + expected[row.variant])
    assert len(ended(tmp_path / "w")) == 9 + 6
    # Another first stage is another cell of what starts from it, and of nothing else.
    before = {cell.variant: cell.id for cell in Store(spec.read(file), tmp_path / "w").cells()}
    first["long"]["steps"] = 18
    after = {cell.variant: cell.id for cell in Store(spec.read(study_file(tmp_path, **fields)), tmp_path / "w").cells()}
    assert {name for name in before if before[name] != after[name]} == {"a"}
    # From the record alone nothing runs again.
    first["long"]["steps"] = 12
    file = study_file(tmp_path, **fields)
    assert table(carried_out(file, tmp_path / "elsewhere", record=True)) == table(rows)
    assert ended(tmp_path / "elsewhere") == []
    # The first stage is recorded for what it cost; a further variant elsewhere has to make it again, and says so.
    path = tmp_path / "results" / "studies" / "killed.jsonl"
    recorded = [json.loads(line) for line in path.read_text().splitlines()]
    spent = {(row["variant"], row["seed"]): row["wall_s"] for row in recorded if row["purpose"] == "first"}
    assert set(spent) == {(f"first:{name}", seed) for name in first for seed in range(3)} and len(recorded) == 15
    cli.run(["study", "status", file, "--workdir", str(tmp_path / "elsewhere"), "--record"])
    said = capsys.readouterr().out
    assert f"started from 6 runs of a first stage, 6 done in {status.span(sum(spent.values()))}" in said
    cli.run(["study", "status", file, "--workdir", str(tmp_path / "nowhere")])
    assert "6 runs of a first stage, 0 done" in capsys.readouterr().out
    file = study_file(
        tmp_path, **fields | dict(variants=variants | {"c": {"init_from.path": "first:long", "steps": 7}})
    )
    told, store = [], Store(spec.read(file), tmp_path / "elsewhere", record=True)
    runner.Runner(store, 2, say=told.append).run(store.cells())
    assert told[0].startswith("3 runs that others start from are recorded, their checkpoints are not: made again here")
    assert len(ended(tmp_path / "elsewhere")) == 6
    assert len(path.read_text().splitlines()) == 18
