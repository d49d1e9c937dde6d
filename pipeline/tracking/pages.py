"""HTML pages: an interactive leaderboard that sorts, compares and filters in the browser.

A page is one self-contained file. It is logged as an artifact, written next to the table of the leaderboard, and served
by `python -m pipeline.tracking ui` at /leaderboard.
"""

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from pipeline.tracking.leaderboard import Row, data_note

DIGITS = 6
"""Of the numbers in a page, which it rounds to two: three digits would round twice, 64.0351 to 64.035 and then to 64.03."""


def leaderboard_page(rows: Sequence[Row], inside: str = "") -> str:
    """The leaderboard as HTML. inside: prefix of links to runs on the same server;
    "" links to the runs' own addresses."""
    template = resources.files("pipeline.tracking").joinpath("leaderboard.html").read_text()
    common = set(rows[0].config.items()).intersection(*(row.config.items() for row in rows[1:])) if rows else set()
    suites = dict.fromkeys(row.suite for row in rows)
    notes = {suite: data_note([row for row in rows if row.suite == suite]) for suite in suites}
    template = template.replace("/*NOTES*/{}", json.dumps(notes).replace("</", "<\\/"))
    values = json.dumps([_values(row, inside, common) for row in rows], separators=(",", ":"), allow_nan=False)
    return template.replace("/*ROWS*/[]", values.replace("</", "<\\/"))


def _values(row: Row, inside: str, common: set[tuple[str, str]]) -> dict[str, Any]:
    """The values of one row. common: configuration values that all rows share, which are omitted."""

    def address(url: str | None, path: str | None) -> str:
        if inside:
            return f"{inside}{path}" if path else ""
        return url if url and url.startswith("http") else ""

    return {
        "suite": row.suite,
        "started": row.started,
        "name": row.name,
        "variant": row.variant or "",
        "checkpoint": row.checkpoint,
        "images": row.images_seen,
        "flops": row.train_flops,
        "hours": row.gpu_hours,
        "mean": round(row.mean, DIGITS),
        "groups": {name: round(value, DIGITS) for name, value in row.groups.items()},
        "tasks": {name: round(value, DIGITS) for name, value in row.tasks.items()},
        "error": None if row.spread is None else round(row.spread, DIGITS),
        "data": row.data_name or "",
        "datasets": row.datasets,
        "config": dict(row.config.items() - common),
        "pretrain": address(row.pretrain_url, row.pretrain_path),
        "transfer": address(row.transfer_url, row.transfer_path),
    }


def text_page(title: str, text: str) -> str:
    """A page with one paragraph."""
    return f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><p>{escape(text)}</p>'
