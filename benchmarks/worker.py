"""One contestant of a benchmark in a process of its own: answers "step" with what a step cost.

    python -m benchmarks.worker MODULE JSON

imports MODULE, calls its step_fn(**JSON), and then for every line on stdin runs one step and prints
{"wall_ms", "cpu_s", "peak_mb", "loss"}: wall time of the step, CPU seconds of all threads, and the
largest resident set of the process so far. Standard library only, so any interpreter can run it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time


def main() -> None:
    # What the contestant prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    step = importlib.import_module(sys.argv[1]).step_fn(**json.loads(sys.argv[2]))
    print(json.dumps({"ready": True, "python": sys.version.split()[0]}), file=answers)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        cost = {"wall_ms": 1e3 * (time.perf_counter() - wall), "cpu_s": time.process_time() - cpu}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(cost | {"peak_mb": peak, "loss": loss}), file=answers)


if __name__ == "__main__":
    main()
