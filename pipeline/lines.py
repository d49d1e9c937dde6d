"""Text for a terminal of 80 columns: wrapped lines, commands that can be pasted, and tables.

print(fit(f"{name}: prepared={rows} shards={shards} {uri}"))
command(["python", "jobs/pretrain.py", "--data", uri])   [first line, continued lines]
table([["task", "mean"], ["pets", "92.10"]])             the first column is cut if the others need the space
"""

import re
import shlex
import sys
from collections.abc import Sequence

WIDTH = 80
LABEL = 24
"""A path stays beside a label of at most this many columns, also if both are longer than a line."""


def cut(text: str, width: int) -> str:
    """Shortens a text to a number of columns."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def is_terminal() -> bool:
    """Whether a person reads the output on a terminal."""
    return sys.stdout.isatty()


def fit(text: str, indent: int = 4, width: int = WIDTH) -> str:
    """The text with its long lines broken between words on a terminal; unchanged in a pipe or a file, where programs search
    for whole lines.

    Continued lines are indented by `indent` more than the line. Only a path, or another word that is too long, can
    make a line longer; it then ends the line."""
    if not is_terminal():
        return text
    return "\n".join(row for line in text.split("\n") for row in _fit_line(line, indent, width))


def _fit_line(line: str, indent: int, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    margin = " " * (len(line) - len(line.lstrip(" ")) + indent)
    first, *words = re.findall(r" *[^ ]+", line)
    rows = [first]
    for word in words:
        stays = "/" in word or len(margin) + len(word.lstrip()) > width
        if len(rows[-1]) + len(word) <= width or (stays and len(rows[-1]) <= LABEL):
            rows[-1] += word
        else:
            rows.append(margin + word.lstrip())
    return rows


def with_prefix(prefix: str, words: Sequence[str]) -> list[str]:
    """Lines of words, each with the same prefix, for programs that search for it. None without words."""
    rows: list[str] = []
    for word in words:
        if rows and len(rows[-1]) + 1 + len(word) <= WIDTH:
            rows[-1] += f" {word}"
        else:
            rows.append(f"{prefix} {word}")
    return rows


def command(words: Sequence[str], indent: int = 0) -> list[str]:
    """The lines of a command, broken with a backslash; a flag stays with its first value. indent: columns before the
    first line."""
    groups: list[str] = []
    for before, word in zip(["--", *words], words, strict=False):
        if groups and before.startswith("--") and not word.startswith("--"):
            groups[-1] += f" {shlex.quote(word)}"
        else:
            groups.append(shlex.quote(word))
    rows = [groups[0]]
    for group in groups[1:]:
        if indent + len(rows[-1]) + 1 + len(group) + len(" \\") <= WIDTH:
            rows[-1] += f" {group}"
        else:
            rows.append(f"    {group}")
    return [f"{row} \\" for row in rows[:-1]] + rows[-1:]


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Rows of cells, the first row with the titles, as aligned columns; columns without a value are left out.

    left: numbers of the columns with text, aligned to the left; the others hold numbers. If the table is wider than a
    line, its text columns are shortened, the widest first."""
    kept = [i for i in range(len(rows[0])) if any(row[i] not in ("", "–") for row in rows[1:])] or [0]
    widths = {i: max(len(row[i]) for row in rows) for i in kept}
    while sum(widths.values()) + 2 * (len(kept) - 1) > WIDTH:
        widest = max((i for i in kept if i in left), key=lambda i: widths[i], default=None)
        if widest is None or widths[widest] <= 4:
            break
        widths[widest] -= 1
    lines = []
    for row in rows:
        cells = [f"{cut(row[i], w):{'<' if i in left else '>'}{w}s}" for i, w in widths.items()]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
