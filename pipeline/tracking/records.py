"""The records of a spool, checked: a file may be damaged, or be edited by somebody.

`Delivery` moves a record that raises ValueError here to rejected.jsonl, so that it does not hold up the others."""

import os
from typing import Any, NamedTuple

ENTITIES = ("metrics", "params", "tags")
"""Kinds of records that have `values`."""
STATUSES = ("FINISHED", "FAILED", "KILLED")
MAX_INT = (1 << 63) - 1  # MLflow's times and steps
MAX_NAME_BYTES = 255  # of a file

# What a record that this program did not write can raise, besides the errors of the server.
INVALID = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Entity(NamedTuple):
    """One metric point, parameter or tag."""

    kind: str
    key: str
    value: Any
    """A number for a metric; text for a parameter or tag."""
    time: int = 0
    step: int = 0


def entities_of(record: dict) -> list[Entity]:
    """The points, parameters or tags of a record. Raises ValueError if it is not such a record."""
    kind, values = record["kind"], record.get("values")
    time, step = (_integer(record.get(name, 0), name) for name in ("time", "step"))
    if not isinstance(values, dict):
        raise ValueError("its values are not an object")
    read = _number if kind == "metrics" else _text
    return [Entity(kind, _text(key, "a name"), read(value, key), time, step) for key, value in values.items()]


def check_end(status: Any, time: Any, reason: Any) -> None:
    """Raises ValueError for the record of an end that MLflow has no words for."""
    if status not in STATUSES:
        raise ValueError(f"{status!r:.40} is not the status of a run that has ended")
    _integer(time, "time")
    _text(reason, "reason")


def check_artifact(path: Any, source: Any) -> None:
    """Raises ValueError for a path that cannot be that of an artifact. source: the name of the file that has its bytes."""
    for value in (path, source):
        name = os.path.basename(_text(value, "a path"))
        if name in ("", ".", "..") or len(name.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"{value!r:.40} is not the path of a file")


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_INT:
        raise ValueError(f"its {name} {value!r:.40} is not an integer of 64 bits")
    return value


def _number(value: Any, key: str) -> float:
    if not isinstance(value, (int, float)):
        raise ValueError(f"{key!r:.100} is {value!r:.40}, not a number")
    return float(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name!r:.100} is {value!r:.40}, not text")
    value.encode()  # raises UnicodeEncodeError for half a character
    if "\0" in value:
        raise ValueError(f"{name!r:.100} has a NUL")
    return value
