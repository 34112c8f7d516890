"""The log survives kills without gaps or repeats; the clock's parts add up; TensorBoard can read us."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from bigmodel_jax import events
from bigmodel_jax.metrics import Clock, Log, read


def _steps(workdir, event=""):
    return [row["step"] for row in read(workdir, event)]


def _fill(workdir, first, last, **options):
    with Log(workdir, **options) as log:
        log.truncate(first - 1)
        for step in range(first, last + 1):
            log.write(step, {"loss": 1.0 / step})
            if step % 4 == 0:
                log.event(step, "eval", {"loss": 0.5}, name="validation")


@pytest.mark.parametrize("segmented", [False, True])
def test_resume_leaves_no_gap_and_no_duplicate(tmp_path, segmented):
    _fill(tmp_path, 1, 10, segmented=segmented)
    _fill(tmp_path, 7, 12, segmented=segmented)  # restored at step 6
    assert _steps(tmp_path) == list(range(1, 13))
    assert _steps(tmp_path, "eval") == [4, 8, 12]
    with Log(tmp_path, segmented=segmented) as log:  # negative control: no truncation
        log.write(9, {"loss": 0.0})
    assert _steps(tmp_path) != list(range(1, 13))


@pytest.mark.parametrize("torn", [b'{"step": 11, "lo', b'{"step": 11, "loss": 1.0}', b"\0" * 64 + b"\n", b"\xff\xfe\n"])
def test_torn_last_line_is_dropped(tmp_path, torn):
    _fill(tmp_path, 1, 10, tensorboard=False)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    _fill(tmp_path, 11, 12, tensorboard=False)
    assert _steps(tmp_path) == list(range(1, 13))
    for line in path.read_text().splitlines():
        json.loads(line)


def test_kill_9_loses_no_written_row(tmp_path):
    code = f"""
        import itertools
        from bigmodel_jax.metrics import Log
        log = Log({str(tmp_path)!r})
        for step in itertools.count(1):
            log.write(step, {{"loss": 1.0}})
            print(step, flush=True)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if int(line) >= 300:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    steps = _steps(tmp_path)
    assert steps[:300] == list(range(1, 301)) and steps == list(range(1, len(steps) + 1))


def test_rows_hold_non_finite_numbers_and_numpy(tmp_path):
    row = {"a": math.nan, "b": -math.inf, "c": np.float32(0.5), "d": np.arange(3), "e": {"f": [math.inf]}}
    with Log(tmp_path) as log:
        log.event(3, "bad_step", row)
        with pytest.raises(ValueError, match="time"):
            log.write(4, {"time": 1.0})
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    [back] = read(tmp_path, "bad_step")
    assert math.isnan(back["a"]) and back["b"] == -math.inf and back["e"] == {"f": [math.inf]}
    assert back["c"] == 0.5 and back["d"] == [0, 1, 2]


def test_an_evaluation_is_found_after_a_resume(tmp_path):
    _fill(tmp_path, 1, 8)
    with Log(tmp_path) as log:
        log.truncate(4)
        assert log.find(4, "eval", "validation") == {"loss": 0.5}
        assert log.find(8, "eval", "validation") is None and log.find(4, "eval", "test") is None


def test_a_disabled_log_writes_nothing(tmp_path):
    _fill(tmp_path, 1, 5, enabled=False)
    assert list(tmp_path.iterdir()) == []


def test_crc32c_has_the_published_values():
    # RFC 3720, appendix B.4.
    assert events.crc32c(b"\0" * 32) == 0x8A9136AA
    assert events.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert events.crc32c(bytes(range(32))) == 0x46DD794E


def test_tensorboard_reads_the_files_and_forgets_what_was_undone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    def load():
        accumulator = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
        accumulator.Reload()
        if "train/loss" in accumulator.Tags()["scalars"]:
            return {e.step: e.value for e in accumulator.Scalars("train/loss")}
        return {e.step: float(tensor_util.make_ndarray(e.tensor_proto)) for e in accumulator.Tensors("train/loss")}

    _fill(tmp_path, 1, 10)
    assert load() == pytest.approx({step: 1 / step for step in range(1, 11)})
    with Log(tmp_path) as log:
        log.truncate(6)
        log.write(7, {"loss": -7.0, "huge": 1e300, "nan": math.nan})
    assert load() == pytest.approx({**{step: 1 / step for step in range(1, 7)}, 7: -7.0})


def test_writing_events_imports_neither_tensorflow_nor_tensorboard(tmp_path):
    code = f"""
        import sys
        from bigmodel_jax.metrics import Log
        with Log({str(tmp_path)!r}) as log:
            log.write(1, {{"loss": 1.0}})
        assert not {{"tensorflow", "tensorboard"}} & set(sys.modules)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert list((tmp_path / "tensorboard").iterdir())


class _Time:
    now = 100.0

    def __call__(self):
        return self.now


def test_clock_spans_are_exclusive_and_add_up_to_wall_time():
    time = _Time()
    clock = Clock(time)
    time.now += 1.0
    with clock.span("compile"):
        time.now += 5.0
    clock.describe(tokens_per_example=100, flops_per_example=1e9, peak=1e12)
    for _ in range(4):
        with clock.span("input"):
            time.now += 0.25
        with clock.span("step"):
            time.now += 1.5
            with clock.span("eval"):
                time.now += 2.0
        clock.count(8)
        time.now += 0.25
    summary = clock.summary()
    assert summary["seconds"] == {"compile": 5.0, "eval": 8.0, "input": 1.0, "other": 2.0, "step": 6.0}
    assert summary["wall_s"] == sum(summary["seconds"].values()) == time.now - 100.0
    assert summary["goodput"] == 6.0 / 22.0
    # From the first step's begin to the last count: 4 x 1.75 + 3 x 0.25 s, evaluation left out.
    rates = clock.rates()
    assert rates["step_s"] == pytest.approx(7.75 / 4)
    assert rates["examples_per_s"] == pytest.approx(32 / 7.75)
    assert rates["tokens_per_s"] == pytest.approx(3200 / 7.75)
    assert rates["mfu"] == pytest.approx(32e9 / 7.75 / 1e12)
    assert clock.rates() == rates  # two readers see the same


def test_clock_without_a_known_peak_claims_no_mfu():
    clock = Clock()
    clock.describe(flops_per_example=1e9, peak=None)
    with clock.span("step"):
        pass
    clock.count(1)
    assert "mfu" not in clock.rates() and "tokens_per_s" not in clock.rates()
