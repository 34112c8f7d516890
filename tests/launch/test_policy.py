"""When a job is started again: the whole table, and the books that survive."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bigmodel_jax.launch import policy
from bigmodel_jax.launch.policy import Books, decide


@pytest.mark.parametrize(
    ("codes", "again", "code"),
    [
        ([0, 0], False, 0),
        ([75, 75], True, 75),
        ([75, 0], True, 75),
        ([1, 0], True, 1),
        ([77, 134], True, 134),
        ([-9, 134], True, 137),  # Popen's view of a kill
        ([137, 134], True, 137),  # a shell's
        ([139], True, 139),
        ([2, 134], False, 2),  # the peer died of the absence
        ([134, 76], False, 76),
        ([75, 2], False, 2),
        ([130], False, 130),  # Ctrl-C twice: somebody wants it to end
        ([127], False, 127),  # no such command
    ],
)
def test_what_exit_statuses_mean(codes, again, code):
    verdict, _ = decide(codes, Books(), newest=5)
    assert (verdict.again, verdict.code) == (again, code)


def test_three_retries_without_a_newer_checkpoint_and_any_number_with():
    books, seen = Books(), []
    for newest in (-1, -1, -1, -1):
        verdict, books = decide([1], books, newest)
        seen.append(verdict.again)
    assert seen == [True, True, True, False]
    books = Books()
    for newest in (10, 20, 20, 30, 40, 50, 50, 50):
        verdict, books = decide([134], books, newest)
        assert verdict.again
    assert books == Books(3, 50)
    verdict, _ = decide([134], books, 50)
    assert not verdict.again and "checkpoint 50" in verdict.reason


def test_a_preemption_clears_the_count():
    _, books = decide([1], Books(2, 10), 10)
    assert books.failures == 3
    _, books = decide([75], books, 12)
    assert books == Books(0, 12)


def test_the_books_live_in_the_directory_and_damage_is_survived(tmp_path):
    for number in range(3):
        assert policy.consider(tmp_path, [1]).again
        assert json.loads((tmp_path / "restarts.json").read_text())["failures"] == number + 1
    (tmp_path / "checkpoints" / "7" / "meta").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7" / "state").mkdir()
    (tmp_path / "checkpoints" / "9.corrupt" / "meta").mkdir(parents=True)
    (tmp_path / "checkpoints" / "11").mkdir()  # a ghost: no content
    assert policy.newest_checkpoint(tmp_path) == 7
    assert policy.consider(tmp_path, [1]).again  # a newer checkpoint: counted from one
    assert json.loads((tmp_path / "restarts.json").read_text()) == {"failures": 1, "checkpoint": 7}
    (tmp_path / "restarts.json").write_text("{broken")
    assert policy.consider(tmp_path, [0]).code == 0


def test_the_command_tells_a_script_by_its_status(tmp_path):
    def ask(*codes: int) -> int:
        command = [sys.executable, "-m", "bigmodel_jax.launch.policy", str(tmp_path), *map(str, codes)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert [ask(75, 75), ask(0), ask(2, 1)] == [0, 64, 2]
