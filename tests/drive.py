"""Run `bigmodel` and send this very process a signal at a chosen moment.

    python tests/drive.py MOMENT STEP SIGNAL train --config ... --workdir ...

MOMENT: "step" (after step STEP is dispatched), "save" (right after the checkpoint of STEP began to
be written), "eval" (before the evaluation at STEP), "compile" (while the train step is compiled).
"""

from __future__ import annotations

import os
import signal
import sys


def after(cls, name, when, do):
    """Call do() after the method `name` of `cls`, on calls for which when(*args) holds."""
    original = getattr(cls, name)

    def wrapped(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        if when(*args):
            do()
        return out

    setattr(cls, name, wrapped)


def main() -> None:
    moment, step, number = sys.argv[1], int(sys.argv[2]), getattr(signal, sys.argv[3])
    from bigmodel_jax import checkpoint, cli, programs, train

    def send() -> None:
        os.kill(os.getpid(), number)

    def at(first, *_):
        return first == step

    if moment == "step":
        after(train.Loop, "advance", at, send)
    elif moment == "save":
        after(checkpoint.Checkpointer, "save", at, send)
    elif moment == "eval":
        original = train.Loop.evaluate
        train.Loop.evaluate = lambda run, s, state: (send() if s == step else None, original(run, s, state))[1]
    elif moment == "compile":
        after(programs.Programs, "lower_step", lambda *_: True, send)
    cli.main(sys.argv[4:])


if __name__ == "__main__":
    main()
