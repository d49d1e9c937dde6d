"""The exception for wrong input, and hints for misspelt names."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. The message names the file, key, flag or task and says what to do.

    Jobs print it as one line and exit with status 2 (`pipeline.config.run_job`); other code does not catch it.
    """


def nearest(word: str, valid: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the most similar valid name, or '' if none is similar."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""


def shorten(names: Iterable[str], limit: int = 12) -> str:
    """'a, b, c and 7 more': the first `limit` names and the number of remaining ones."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
