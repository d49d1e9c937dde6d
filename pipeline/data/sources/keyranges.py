"""Divides a range of names into ranges with about equal numbers of names, by few requests to a store that lists by name.

A range (after, upto] has the names greater than `after` and at most `upto` (None: all). The names are seen as a tree of
their characters. From the first name of a range, binary search finds the beginning that all names of the range share;
then one request for each different next character finds the branches, which become the new ranges. Names in folders and
names without any folder are divided alike."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

Range = tuple[str, str | None]
First = Callable[[str], str | None]  # the first name greater than the argument, or None

THREADS = 16  # requests at a time
LAST = 0x10FFFF
SURROGATES = range(0xD800, 0xE000)  # code points that UTF-8 does not have


def divide(first: First, after: str, upto: str | None, count: int) -> list[Range]:
    """Consecutive ranges, about `count`, with all names of a range; none for a range without names, and fewer if there
    are no more branches. first: returns the first name greater than its argument, or None."""
    if count < 2:
        return [(after, upto)]
    ranges: list[Range] = [(after, upto)]
    with ThreadPoolExecutor(THREADS) as pool:
        while ranges and 2 * len(ranges) <= count:
            most = max(2, 2 * count // len(ranges))
            parts = pool.map(functools.partial(_branches, first, most), ranges)
            following = [part for branches in parts for part in branches]
            if len(following) <= len(ranges):
                return following
            ranges = following
    return ranges


def _branches(first: First, most: int, names: Range) -> list[Range]:
    """At most `most` ranges, one for each branch; the last one has the rest."""
    after, upto = names

    def next_after(name: str | None) -> str | None:
        found = None if name is None else first(name)
        return found if found is not None and (upto is None or found <= upto) else None

    start = next_after(after)
    if start is None:
        return []
    while (shared := _shared(start, next_after)) == len(start):  # the first name is the beginning of all others
        following = next_after(start)
        if following is None:
            return [names]
        start = following
    ends: list[str] = []
    found: str | None = start
    while found is not None and len(ends) < most - 1:
        end = successor(found[: shared + 1])
        found = next_after(end)
        if end is not None and found is not None:
            ends.append(end)
    return list(zip([after, *ends], [*ends, upto], strict=True))


def _shared(start: str, next_after: Callable[[str | None], str | None]) -> int:
    """The length of the beginning of `start`, the first name, that all names share."""
    low, high = 0, len(start)
    while low < high:
        middle = (low + high + 1) // 2
        if next_after(successor(start[:middle])) is None:
            low = middle
        else:
            high = middle - 1
    return low


def successor(prefix: str) -> str | None:
    """The smallest text, of as many characters or fewer, that is greater than all with this prefix; None: there is none."""
    for length in range(len(prefix), 0, -1):
        code = ord(prefix[length - 1]) + 1
        if code <= LAST:
            return prefix[: length - 1] + chr(SURROGATES.stop if code in SURROGATES else code)
    return None
