"""The platform a program is compiled for: that of this process, or another one's ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

# A jax context, so that a function traced for one platform is not reused for another.
_target = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def compile_for(platform: str) -> Iterator[None]:
    """Inside, kernels are chosen for `platform` ("cpu", "gpu" or "tpu"), whatever runs here."""
    with _target(platform):
        yield


def platform() -> str:
    """Its name: "cpu", "gpu" or "tpu"."""
    return _target.value or jax.default_backend()
