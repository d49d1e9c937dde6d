"""References to the outputs of other instances inside the values of fields."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pipeline.address import shares

INSTANCE = re.compile(r"\$<([^>]*)>")
"""An output in a value whose instance is known: $<pretrain[seed=1]>/train."""


def fill(value: Any, outputs: Mapping[str, str]) -> Any:
    """Replaces the instances in a value with the URIs of their outputs."""
    if isinstance(value, str):
        return INSTANCE.sub(lambda match: outputs[match[1]], value)
    if isinstance(value, list | tuple):
        return type(value)(fill(item, outputs) for item in value)
    return value


def data_of(config: Any) -> list[tuple[str, Fraction]]:
    """[(URI, share)] of the datasets of a pre-training. Names of instances in the URIs may contain commas."""
    text, references = config.runtime.data, INSTANCE.findall(config.runtime.data)
    numbers = iter(range(len(references)))
    masked = INSTANCE.sub(lambda match: f"$<{next(numbers)}>", text)
    return [
        (INSTANCE.sub(lambda match: f"$<{references[int(match[1])]}>", uri), share) for uri, share in shares(masked)
    ]
