"""Writes the compiled programs that test_hlo.py reads: one small training step as each compiler prints it.

    python tests/planner/programs/generate.py cpu:4 | tpu:v5e:2x2 | gpu:h100:1x4

Three scanned layers of two matrices, tanh between, weights cut over (fsdp, tensor) and rows over fsdp. What does not
bear on costs (source lines, most of the compiler's configuration) is taken out, so that the files stay small.
"""

import os
import re
import sys
from pathlib import Path

from bigmodel_jax.planner import compilers, targets

LAYERS, ROWS, WIDTH, HIDDEN = 3, 512, 256, 512


def step(weights, x):
    import jax
    import jax.numpy as jnp

    def loss(weights):
        def layer(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        out, _ = jax.lax.scan(layer, x, weights)
        return jnp.mean(out * out)

    value, gradient = jax.value_and_grad(loss)(weights)
    return value, jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradient)


def compiled(target: targets.Target) -> str:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    devices = np.array(compilers.devices(target, simulated=False)).reshape(2, 2)
    mesh = Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = {"up": ("fsdp", "tensor"), "down": ("tensor", "fsdp")}
    cut = {name: NamedSharding(mesh, PartitionSpec(None, *axes)) for name, axes in place.items()}
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    shape = {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)}
    weights = {name: jax.ShapeDtypeStruct(shape[name], jnp.bfloat16, sharding=cut[name]) for name in shape}
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=rows)
    out = (NamedSharding(mesh, PartitionSpec()), cut)
    return jax.jit(step, out_shardings=out).lower(weights, x).compile().as_text()


def stripped(text: str) -> str:
    text = re.sub(r"(?ms)^FileNames$.*?(?=^%|^ENTRY)", "", text)
    text = re.sub(r', metadata=\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\}', "", text)
    kept = r'"(?:known_trip_count|lhs_contracting_dimensions)"'
    lines = [
        line if re.search(kept, line) else re.sub(r", backend_config=(\{.*\}|\"[^\"]*\")$", "", line)
        for line in text.splitlines()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    platform, name = sys.argv[1].split(":", 1)
    target = targets.parse(sys.argv[1] if platform == "cpu" else name)
    os.environ.update(compilers.environment(target, simulated=False))
    sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    Path(__file__).with_name(f"{platform}.txt").write_text(stripped(compiled(target)))
