"""A config section is the keyword arguments of the function it builds.

There is no base config: the leaves, their types and their defaults are read off the signatures of
the functions that use them, so a leaf nobody reads cannot exist, and a resolved config lists every
value that a run depended on.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from bigmodel_jax.errors import InputError, nearest

_REQUIRED = inspect.Parameter.empty


def leaves(*fns: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """{leaf: (default, annotation)} of the parameters that are keyword-only or have a default.

    Other positional parameters are wiring that the program supplies. All fields of a dataclass
    count. Several functions together form one section.
    """
    out = {}
    for fn in fns:
        hints = typing.get_type_hints(fn.__init__ if inspect.isclass(fn) else fn)
        every = dataclasses.is_dataclass(fn)
        for p in inspect.signature(fn).parameters.values():
            if every or p.kind is p.KEYWORD_ONLY or p.default is not _REQUIRED:
                out[p.name] = (p.default, hints.get(p.name, Any))
    return out


def _accepts(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (bool, str, dict):
        return isinstance(value, origin)
    if origin in (tuple, collections.abc.Sequence):
        return isinstance(value, (tuple, list))
    args = typing.get_args(hint)
    if args and origin is not typing.Literal:
        return any(_accepts(value, arg) for arg in args)
    if origin is type(None):
        return value is None
    return True


def _plain(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, tuple):
        return tuple(_plain(item, Any) for item in value)
    if hint is float and isinstance(value, int):
        return float(value)
    return value


def complete(values: Mapping[str, Any], where: str, *fns: Callable[..., Any]) -> dict[str, Any]:
    """All leaves of `fns`: those given in `values`, checked, and the defaults of the rest.

    Raises:
      InputError: a name that none of them takes (with the nearest one), a value of another type,
        or a required leaf left out.
    """
    known = leaves(*fns)
    for key in values:
        if key not in known:
            hint = nearest(key, known) or f"; legal: {', '.join(sorted(known))}"
            raise InputError(f"config has no leaf '{where}{key}'{hint}")
    out = {}
    for key, (default, hint) in known.items():
        value = values.get(key, default)
        if value is _REQUIRED:
            raise InputError(f"config leaf '{where}{key}' must be given")
        if value is None and hint is str:
            value = "none"  # the word, which a command line has already read as no value
        if not _accepts(value, hint):
            wanted = getattr(hint, "__name__", str(hint))
            raise InputError(f"config leaf '{where}{key}' = {value!r} should be {wanted}")
        out[key] = _plain(value, hint)
    return out


def choose(table: Mapping[str, Any], name: Any, where: str) -> Any:
    """`table[name]`, or an InputError that lists the legal names."""
    if name not in table:
        legal = ", ".join(sorted(table))
        raise InputError(f"config leaf '{where}' = {name!r} is unknown{nearest(str(name), table)}; legal: {legal}")
    return table[name]


def parse_override(argument: str) -> tuple[str, Any]:
    """("optimizer.lr", 0.001) from "--config.optimizer.lr=1e-3"; bare words are strings."""
    path, equals, text = argument.removeprefix("--config.").partition("=")
    if not equals or not path:
        raise InputError(f"override {argument!r} should read --config.SECTION.LEAF=VALUE")
    word = {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    try:
        return path, ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return path, text


def override(values: dict[str, Any], path: str, value: Any) -> None:
    """Set values["a"]["b"] = value for the path "a.b", in place."""
    *sections, leaf = path.split(".")
    node = values
    for depth, section in enumerate(sections):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise InputError(f"config leaf '{'.'.join(sections[: depth + 1])}' has no leaves below it")
    if isinstance(node.get(leaf), dict) and not isinstance(value, dict):
        raise InputError(f"config '{path}' is a section; set one of its leaves")
    node[leaf] = value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} from nested dicts. An empty dict is a leaf."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{leaf: (old, new)} where two resolved configs differ; a leaf that is absent reads "(absent)"."""
    before, after = flat(old), flat(new)
    absent = "(absent)"
    pairs = {k: (before.get(k, absent), after.get(k, absent)) for k in sorted(before | after)}
    return {k: v for k, v in pairs.items() if _listed(v[0]) != _listed(v[1])}


def _listed(value: Any) -> Any:
    """JSON turns tuples into lists; both mean the same here."""
    return [_listed(item) for item in value] if isinstance(value, (tuple, list)) else value
