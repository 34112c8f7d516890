"""Templates of launch/ to the files that a cluster runs.

A template names its holes {{like_this}}; a hole without a value, or a value without a hole, is an
error. Values from the command line are quoted for the shell before they come here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from bigmodel_jax.errors import InputError

TEMPLATES = Path(__file__).resolve().parent.parent.parent / "launch"
_HOLE = re.compile(r"\{\{(\w+)\}\}")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,48}[a-z0-9])?")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template file with its holes filled.

    Raises:
      InputError: no such template (a package installed without its repository).
      KeyError: holes and values do not match.
    """
    path = TEMPLATES / template
    if not path.is_file():
        raise InputError(f"no template {path}: launching needs the repository (pip install -e)")
    text = path.read_text()
    holes = set(_HOLE.findall(text))
    if holes != set(values):
        raise KeyError(f"{template}: holes without values {holes - set(values)}, values {set(values) - holes}")
    return _HOLE.sub(lambda match: values[match[1]], text)


def exports(environment: Mapping[str, str]) -> str:
    """Lines that export the environment in a shell."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())


def job_name(text: str) -> str:
    """A name that Slurm and Kubernetes accept, from a file name.

    Raises:
      InputError: nothing usable in it.
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:50].strip("-")
    if not _NAME.fullmatch(name):
        raise InputError(f"'{text}' gives no job name; use --name with letters, digits and dashes")
    return name


def sweep(axes: Sequence[str]) -> list[list[str]]:
    """Overrides of every point of a grid, from "optimizer.lr=1e-3,3e-4" and more of the kind.

    Raises:
      InputError: an axis without "=", a value with a space, or an axis given twice.
    """
    points: list[list[str]] = [[]]
    seen = set()
    for axis in axes:
        leaf, equals, values = axis.partition("=")
        if not equals or not leaf or not values or re.search(r"\s", axis) or leaf in seen:
            raise InputError(f"--sweep '{axis}' is not LEAF=VALUE,VALUE with each leaf once and no spaces")
        seen.add(leaf)
        points = [[*point, f"--config.{leaf}={value}"] for point in points for value in values.split(",")]
    return points
