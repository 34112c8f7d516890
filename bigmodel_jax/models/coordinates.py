"""The coordinate check: how large activations are, and how much they move, at several widths.

Under a parametrisation that transfers, every activation keeps the size of its coordinates, and after a few steps has
moved by as much, whatever the width (Yang et al. 2022, appendix D.1). `activations` reads them off a model,
`slopes` turns sizes at several widths into exponents: 0 where the width does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from bigmodel_jax.models import laid
from bigmodel_jax.models.block import Attention, Block, Mlp
from bigmodel_jax.models.model import Model
from bigmodel_jax.models.transformer import Embed


def activations(model: Model, variables: Mapping[str, Any], **inputs: Any) -> dict[str, jax.Array]:
    """{"embed", "0/attn", "0/mlp", "0/stream", ..., "logits"}: what each part of a decoder or encoder puts out.

    Layers run one after the other, unscanned. Jit-able.
    """
    spec, found, layer = model.module.spec, {}, ""
    blocks = laid.blocks(dict(variables), spec.num_layers, model.blocks)

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal layer
        module = context.module
        if isinstance(module, Block):
            layer = f"{args[1]}/"
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            if isinstance(module, Embed):
                found["embed"] = out[0]
            elif isinstance(module, Attention):
                found[f"{layer}attn"] = out[0]
            elif isinstance(module, Mlp):
                found[f"{layer}mlp"] = out
            elif isinstance(module, Block):
                found[f"{layer}stream"] = out[0][0]
        return out

    with nn.intercept_methods(record):
        output = model.apply({**variables, "blocks": blocks}, train=False, **inputs)
    return found | {"logits": output.head(output.hidden)}


def sizes(now: Mapping[str, jax.Array], before: Mapping[str, jax.Array]) -> dict[str, float]:
    """Root mean square over all coordinates, of each activation and, as "moved/...", of its change."""
    out = {}
    for name, x in now.items():
        x, old = np.asarray(x, np.float64), np.asarray(before[name], np.float64)
        out |= {name: float(np.sqrt(np.mean(x**2))), f"moved/{name}": float(np.sqrt(np.mean((x - old) ** 2)))}
    return out


def slopes(by_width: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Exponent of each size in the width, a line through log size over log width. A size that is 0 has none."""
    widths = sorted(by_width)
    return {
        name: float(np.polyfit(np.log(widths), np.log([by_width[w][name] for w in widths]), 1)[0])
        for name in by_width[widths[0]]
        if all(by_width[w][name] > 0 for w in widths)
    }
