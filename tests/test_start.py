"""Starting again costs no compilation, and never imports TensorFlow."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests import tiny

COUNTED = """
import json, sys
import jax
seen = {}
jax.monitoring.register_event_listener(lambda event, **kw: seen.__setitem__(event, seen.get(event, 0) + 1))
from bigmodel_jax import cli
cli.run(sys.argv[1:])
cache = {name.rsplit("/", 1)[1]: count for name, count in seen.items() if "compilation_cache" in name}
print(json.dumps({"cache": cache, "modules": [m for m in ("tensorflow", "tensorboard", "torch") if m in sys.modules]}))
"""


def start(tmp_path, name: str, *overrides: str) -> dict:
    environment = {**os.environ, "BIGMODEL_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": ""}
    config = tmp_path / "config.py"
    config.write_text(f"def get_config():\n    return {tiny.raw('decoder', tmp_path) | {'steps': 3}!r}\n")
    command = [sys.executable, "-c", COUNTED, "train", "--config", str(config), "--workdir", str(tmp_path / name)]
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_start_has_no_cache_miss(tmp_path):
    first = start(tmp_path, "first")
    assert first["cache"].get("cache_misses", 0) > 2 and first["modules"] == []
    second = start(tmp_path, "second")
    assert second["cache"].get("cache_misses", 0) == 0, second
    assert second["cache"]["cache_hits"] > 2
    # Control: another model is another program.
    assert start(tmp_path, "third", "--config.model.embed_dim=48")["cache"]["cache_misses"] > 0
