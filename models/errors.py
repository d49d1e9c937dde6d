"""The exception for wrong input, and hints for misspelt names."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. The message names the file, key, flag or task and says what to do.

    Jobs print it as one line and exit with status 2 (`pipeline.config.run_job`). Other code catches it only to add context.
    """


def nearest(word: str, valid: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the most similar valid name, or '' if none is similar."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""


def plural(number: float | str, noun: str) -> str:
    """A number with its noun: "1 image", "1,234 images", "2 classes"."""
    text = number if isinstance(number, str) else f"{number:,}"
    if number == 1:
        return f"{text} {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{text} {noun[:-1]}ies"
    return f"{text} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


def shorten(names: Iterable[str], limit: int = 12) -> str:
    """'a, b, c and 7 more': the first `limit` names and the number of remaining ones."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
