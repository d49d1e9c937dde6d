"""Links to folders in a listing of local files: which ones are followed."""

import logging
import os
import re

MAX_LINKS = 3  # links to folders on the path of a listed file
MOST_NAMED = 10  # links that are not followed, in the log
HIDDEN = re.compile(r"/\.")
Roots = tuple[str, ...]
"""Real paths of a listed folder and of the folders behind the links on the way."""

logger = logging.getLogger(__name__)
_warned: set[str] = set()


def follow_link(path: str, roots: Roots) -> Roots:
    """The roots of the files behind a link to a folder; empty for a link that a listing does not follow, with a warning.

    roots: the real paths of the listed folder, and of the folders behind the links on the way to this one. A link to a
    folder that is listed in its own place is not followed, unless that place is in a hidden folder, nor one to a folder
    that contains such a root. Behind a link, at most MAX_LINKS - 1 further ones are followed: otherwise the files of
    folders that link to one another would be listed once for each order of the folders.
    """
    target, reason = os.path.realpath(path), ""
    for root in roots:
        if _is_within(root, target) or (_is_within(target, root) and not HIDDEN.search(target[len(root) :])):
            reason = f"it leads to {target}, which is or has a folder that is listed already"
    if not reason and len(roots) > MAX_LINKS:
        reason = f"it is behind {MAX_LINKS} other links"
    if not reason:
        return (*roots, target)
    if len(_warned) < MOST_NAMED and path not in _warned:
        _warned.add(path)
        last = "; further ones are not named" if len(_warned) == MOST_NAMED else ""
        logger.warning("%s: the link is not followed, because %s%s", path, reason, last)
    return ()


def _is_within(path: str, folder: str) -> bool:
    """Whether a real path is a folder or in it."""
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")
