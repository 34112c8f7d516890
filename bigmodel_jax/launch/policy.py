"""What to do when the processes of a job have ended: one pure decision for every launcher.

A crash is retried at most `RETRIES` times without a newer checkpoint: a job that advances may crash
for ever, one that does not must not burn a cluster. The count lives in the run's directory
(`restarts.json`), so that it survives the machine that decides.

    python -m bigmodel_jax.launch.policy WORKDIR CODE...   # exit status 0: start it again

Standard library only: it runs on login nodes, and inside batch scripts after a crash.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bigmodel_jax import atomic
from bigmodel_jax.errors import EXIT_INPUT, EXIT_NUMERIC, EXIT_PREEMPTED, EXIT_WATCHDOG

RETRIES = 3
# 1: an error of the run; 134, 137, 139: abort, kill, segmentation fault; 143: SIGTERM before a handler.
CRASHES = (1, EXIT_WATCHDOG, 134, 137, 139, 143)
# A retry would repeat these.
FINAL = (EXIT_INPUT, EXIT_NUMERIC)


class Verdict(NamedTuple):
    """again: start the job anew. code: exit status of the job if it ends here. reason: one line."""

    again: bool
    code: int
    reason: str


class Books(NamedTuple):
    """failures: crashes in a row since the newest checkpoint was `checkpoint` (-1: none)."""

    failures: int = 0
    checkpoint: int = -1


def shell_code(code: int) -> int:
    """Exit status as a shell gives it: -9 (killed by signal 9) is 137."""
    return 128 - code if code < 0 else code


def decide(codes: Sequence[int], books: Books, newest: int) -> tuple[Verdict, Books]:
    """Whether to start again, from the exit statuses of all processes.

    Args:
      codes: of every process; negative for a signal.
      newest: step of the newest checkpoint, -1 for none.

    A status that no retry helps (2, 76) decides over those of the peers, which die of its absence;
    then crashes; then 75, whose state is saved; 0 needs all.
    """
    seen = sorted({shell_code(code) for code in codes})
    final = [code for code in seen if code in FINAL]
    if final:
        return Verdict(False, final[0], f"exit {final[0]}: a retry would repeat it"), books
    odd = [code for code in seen if code not in (0, EXIT_PREEMPTED, *CRASHES)]
    if odd:
        return Verdict(False, odd[0], f"exit {odd[0]} is none that a run gives: not retried"), books
    crashed = [code for code in seen if code in CRASHES]
    if crashed:
        failures = books.failures + 1 if newest <= books.checkpoint else 1
        books = Books(failures, max(newest, books.checkpoint))
        what = f"exit {', '.join(map(str, crashed))}"
        where = f"checkpoint {newest}" if newest >= 0 else "the start"
        if failures > RETRIES:
            return Verdict(False, crashed[-1], f"{what}: {failures} times without a checkpoint after {where}"), books
        return Verdict(True, crashed[-1], f"{what}: again from {where} ({failures} of {RETRIES})"), books
    if EXIT_PREEMPTED in seen:
        return Verdict(True, EXIT_PREEMPTED, f"preempted: again from checkpoint {newest}"), Books(0, newest)
    return Verdict(False, 0, "done"), Books(0, newest)


def newest_checkpoint(workdir: str | os.PathLike) -> int:
    """Step of the newest committed checkpoint below a local `workdir`, -1 for none.

    A directory counts when both of its parts are there; whether its bytes are sound is for the run
    to find out.
    """
    folder = Path(workdir) / "checkpoints"
    found = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return max((int(p.name) for p in found if (p / "meta").is_dir() and (p / "state").is_dir()), default=-1)


def consider(workdir: str | os.PathLike, codes: Sequence[int]) -> Verdict:
    """`decide` with the books of the run's directory, which are brought up to date."""
    path = Path(workdir) / "restarts.json"
    try:
        books = Books(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        books = Books()
    verdict, books = decide(codes, books, newest_checkpoint(workdir))
    if path.parent.is_dir():
        atomic.write(path, json.dumps(books._asdict()) + "\n")
    return verdict


def main(argv: Sequence[str]) -> int:
    """Print the reason; 0 to start again, otherwise the job's exit status (never 0: 64 for done)."""
    verdict = consider(argv[0], [int(code) for code in argv[1:]])
    print(verdict.reason, file=sys.stderr)
    return 0 if verdict.again else verdict.code or 64


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
