"""The first run left everything it promises, learnt what it promises, in the time it promises."""

import json
import sys
from pathlib import Path

run, seconds = Path(sys.argv[1]), int(sys.argv[2])
files = ["config.json", "env.json", "metrics.jsonl", "result.json", "loss.png", "checkpoints"]
missing = [name for name in files if not (run / name).exists()]
assert not missing, f"{run} lacks {missing}"
assert list(run.rglob("events.out.tfevents.*")), "no TensorBoard events"
bits = json.loads((run / "result.json").read_text())["eval"]["validation"]["bits_per_byte"]
print(f"held-out bits per byte {bits:.3f}, {seconds} s")
# gzip -9 takes 1.86 bits per byte on these files (benchmarks/text_baselines.py); 5% above it is the bar.
assert bits < 1.86 * 1.05, f"bits per byte {bits}"
assert seconds <= 120, f"the first run took {seconds} s"
