"""Fields of a job config by dotted name, as in the flags of the job: reading, checking, and writing as flags."""

import dataclasses
import functools
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline import config as configuration
from pipeline.errors import UserError, nearest

Path = tuple[str, ...]


def paths(cls: Any) -> dict[str, tuple[Path, Any]]:
    """{flag name without dashes: (path of field names, type)}. A nested config may have no prefix, as in tyro."""
    return _paths(cls)


@functools.cache
def _paths(cls: Any) -> dict[str, tuple[Path, Any]]:
    found: dict[str, tuple[Path, Any]] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        notes = getattr(hint, "__metadata__", ())
        kind = typing.get_args(hint)[0] if notes else hint
        if dataclasses.is_dataclass(kind):
            prefix = "" if any(getattr(note, "name", None) == "" for note in notes) else f"{field.name}."
            for name, (path, inner) in paths(kind).items():
                found[prefix + name] = ((field.name, *path), inner)
        else:
            found[field.name] = ((field.name,), kind)
    return found


def flat(values: Mapping[str, Any], cls: Any, where: str) -> dict[str, Any]:
    """Nested or dotted fields as {dotted name: value}. Raises UserError for an unknown field."""
    known = paths(cls)
    groups = {name.rpartition(".")[0] for name in known} - {""}
    found: dict[str, Any] = {}
    for key, value in _flatten(values, groups, known):
        if key not in known:
            raise UserError(f'{where}: unknown field "{key}"{nearest(key, known)}')
        if key in found:
            raise UserError(f'{where}: the field "{key}" is given twice')
        found[key] = value
    return found


def _flatten(values: Mapping[str, Any], groups: set[str], known: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if isinstance(value, Mapping) and name not in known and (name in groups or not groups):
            for inner, item in value.items():
                yield from _flatten({f"{name}.{inner}": item}, groups, known)
        else:
            yield name, value


def with_values(config: Any, values: Mapping[str, Any], where: str) -> Any:
    """A copy of the config with new values by dotted name. Raises UserError for a value of the wrong type."""
    known = paths(type(config))
    tree: dict[str, Any] = {}
    for name, value in values.items():
        path, hint = known[name]
        if isinstance(value, str | int | float) and not isinstance(value, bool) and takes_many(hint):
            value = [value]  # one source, one learning rate
        if isinstance(value, int) and hint is str and not isinstance(value, bool):
            value = str(value)  # steps: 400
        read = configuration.from_dict(hint, value, f"{where}.{name}")
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = read
    return configuration.with_dependent_values(_replace(config, tree), config)


def takes_many(hint: Any) -> bool:
    """Whether a field of this type is a list of values."""
    return typing.get_origin(hint) in (tuple, list)


def _replace(config: Any, tree: Mapping[str, Any]) -> Any:
    changes = {
        name: _replace(getattr(config, name), value)
        if isinstance(value, dict) and dataclasses.is_dataclass(getattr(config, name))
        else value
        for name, value in tree.items()
    }
    return dataclasses.replace(config, **changes)


def get(config: Any, name: str) -> Any:
    """The value of a dotted field."""
    path, _ = paths(type(config))[name]
    for part in path:
        config = getattr(config, part)
    return config


def flags(values: Mapping[str, Any]) -> list[str]:
    """Words of a command line: {"optimizer.lr": 0.001} is --optimizer.lr 0.001, and None is --optimizer.no-lr."""
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if value is None or isinstance(value, bool):
            group, dot, last = flag.rpartition(".")
            words.append(f"--{flag}" if value else f"--{group}{dot}no-{last}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(str, value)]
        elif str(value).startswith("-"):
            words.append(f"--{flag}={value}")
        else:
            words += [f"--{flag}", str(value)]
    return words
