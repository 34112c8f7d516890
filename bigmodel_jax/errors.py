"""What can go wrong, as exit codes a scheduler can act on.

A message is one line: what is wrong, where, and what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_INPUT = 2
EXIT_PREEMPTED = 75
EXIT_NUMERIC = 76
EXIT_WATCHDOG = 77
EXIT_DISAGREEMENT = 78
EXIT_DOES_NOT_FIT = 79


class RunError(Exception):
    """A run ended for a reason that can be said in one line. Exit code 1: a scheduler may retry."""

    exit_code = 1


class InputError(RunError):
    """Config, data, checkpoint or work directory cannot be used as given. Never worth a retry."""

    exit_code = EXIT_INPUT


class Preempted(RunError):
    """The run saved its state and left because it was asked to. Start it again to continue."""

    exit_code = EXIT_PREEMPTED


class NumericAbort(RunError):
    """Loss or gradient stayed non-finite or spiked for too long. A retry would repeat it."""

    exit_code = EXIT_NUMERIC


class Disagreement(RunError):
    """Two layouts of one experiment compute different numbers. A retry would repeat it."""

    exit_code = EXIT_DISAGREEMENT


class DoesNotFit(RunError):
    """A planned step needs more memory than the target's devices have. The message says what would fit."""

    exit_code = EXIT_DOES_NOT_FIT


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest of `names`, or "" when nothing is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
