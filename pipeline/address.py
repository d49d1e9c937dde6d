r"""Addresses of training data: one data set, or a mixture "sets/a/train=0.7,sets/b/train=0.3".

In a mixture, a comma that is part of a path is written "\,": pipelines have such folders (runs/lr=0.1\,seed=1-3f2a/train).

Light imports only, so that configs, trackers and pipeline files can read an address.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction

from pipeline import storage
from pipeline.errors import UserError

SPLITS = ("train", "training", "val", "valid", "validation", "test", "eval")
GENERIC = ("data", "dataset", "datasets", "shards", "sets", "prepared")
SMALLEST_SHARE = Fraction(1, 1_000_000)
_COMMA = re.compile(r"(?<!\\),")
_WEIGHTED = re.compile(r"(.+)=((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)")


def is_mixture(text: str) -> bool:
    """Whether an address names several data sets: items separated by commas, each ending with =WEIGHT."""
    items = _COMMA.split(text)
    return len(items) > 1 and all(_WEIGHTED.fullmatch(item.strip()) for item in items)


def hint(text: str) -> str:
    """A hint for the error about a missing data set, if the address looks like a mixture."""
    several = "," in text and not is_mixture(text)
    return "; a mixture has a weight above 0 for each data set: sets/a=0.7,sets/b=0.3" if several else ""


def shares(text: str) -> list[tuple[str, Fraction]]:
    """[(address, share of the images)] of the data sets of an address; the shares add up to 1. Raises UserError for an
    invalid weight, and for a data set that is named twice."""
    if not is_mixture(text):
        return [(text, Fraction(1))]
    weights = {uri: Fraction(weight) for uri, weight in _items(text)}
    total = sum(weights.values())
    for uri, weight in weights.items():
        if weight / total < SMALLEST_SHARE:
            raise UserError(
                f"--data {text}: the share of {uri} is below one in {SMALLEST_SHARE.denominator:,}; remove it, or "
                "raise its weight"
            )
    return [(uri, weight / total) for uri, weight in weights.items()]


def _items(text: str) -> list[tuple[str, str]]:
    """[(address, weight)] of a mixture, as given."""
    found: list[tuple[str, str]] = []
    for match in (_WEIGHTED.fullmatch(item.strip()) for item in _COMMA.split(text)):
        assert match is not None  # is_mixture
        uri, weight = match[1].strip().replace("\\,", ","), match[2]
        if not 0 < float(weight) < math.inf:
            raise UserError(f'--data {text}: the weight of "{uri}" must be a number above 0')
        if any(storage.normalise(uri) == storage.normalise(other) for other, _ in found):
            raise UserError(f"--data {text}: {uri} is named twice; name it once, with the sum of its weights")
        found.append((uri, weight))
    return found


def uris(text: str) -> list[str]:
    """The data sets of an address, without weights."""
    return [uri for uri, _ in shares(text)]


def normalise(text: str) -> str:
    """The address with absolute paths, because Ray's workers run in another folder."""
    if not is_mixture(text):
        return storage.normalise(text)
    return ",".join(f"{_escape(storage.normalise(uri))}={weight}" for uri, weight in _items(text))


def data_address(parts: Sequence[tuple[str, Fraction]]) -> str:
    """The address, with absolute paths, of data sets with these shares; the inverse of `shares`."""
    if len(parts) == 1:
        return storage.normalise(parts[0][0])
    common = math.lcm(*(share.denominator for _, share in parts))
    return ",".join(f"{_escape(storage.normalise(uri))}={share * common}" for uri, share in parts)


def _escape(uri: str) -> str:
    return uri.replace(",", "\\,")


def mixture_fingerprint(fingerprints: Sequence[str], parts: Sequence[Fraction]) -> str:
    """The fingerprint of a mixture: a hash of the contents of its data sets, in order, and their shares."""
    content = [[fingerprint, str(share)] for fingerprint, share in zip(fingerprints, parts, strict=True)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def data_name(text: str) -> str:
    """The name of training data: the last meaningful part of its address.

    s3://bucket/imagenet/train -> imagenet, runs/demo/data/train -> demo, photos -> photos, a/train=1,b/train=2 -> a+b.
    """
    return "+".join(names(uris(text))) if is_mixture(text) else _name(text)


def _name(uri: str) -> str:
    folder = re.sub(r"@[1-9][0-9]*$", "", re.sub(r"^\w+://", "", uri))  # a revision of a dataset has its name
    parts = [part for part in folder.split("/") if part]
    useful = [part for part in parts if part.lower() not in SPLITS + GENERIC]
    return useful[-1] if useful else (parts[-1] if parts else uri)


def names(addresses: Sequence[str]) -> list[str]:
    """A unique short name for each data set of a mixture."""
    short = [_name(uri) for uri in addresses]
    names: list[str] = []
    for i, name in enumerate(short, 1):
        if short.count(name) > 1:
            numbered = (f"{name}-{n}" for n in itertools.count(i))
            name = next(other for other in numbered if other not in names and other not in short)
        names.append(name)
    return names
