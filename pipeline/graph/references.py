"""References to the outputs of other instances inside the values of fields."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pipeline.data.address import shares

INSTANCE = re.compile(r"\$<([^>]*)>")
"""An output inside a value, once the instance is known: $<pretrain[seed=1]>/train."""


def fill(value: Any, outputs: Mapping[str, str]) -> Any:
    """The value with the addresses of outputs in place of the instances that make them."""
    if isinstance(value, str):
        return INSTANCE.sub(lambda match: outputs[match[1]], value)
    if isinstance(value, list | tuple):
        return [fill(item, outputs) for item in value]
    return value


def data_of(config: Any) -> list[tuple[str, Fraction]]:
    """[(address, share)] of the data sets of a pre-training; names of instances in them may have commas."""
    text, references = config.runtime.data, INSTANCE.findall(config.runtime.data)
    numbers = iter(range(len(references)))
    masked = INSTANCE.sub(lambda match: f"$<{next(numbers)}>", text)
    return [
        (INSTANCE.sub(lambda match: f"$<{references[int(match[1])]}>", uri), share) for uri, share in shares(masked)
    ]
