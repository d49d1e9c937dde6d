"""Pages of HTML: a leaderboard that sorts, compares and filters by itself, from values alone.

A page is one file without links to elsewhere: it is an artifact, a file beside the leaderboard's table, and what the server of
`python -m pipeline.tracking ui` answers under /leaderboard.
"""

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from pipeline.tracking.leaderboard import Row


def leaderboard_page(rows: Sequence[Row], inside: str = "") -> str:
    """The page. inside: what goes before a run's path under a server, to link to it; "" takes the runs' own addresses."""
    template = resources.files("pipeline.tracking").joinpath("leaderboard.html").read_text()
    common = set(rows[0].config.items()).intersection(*(row.config.items() for row in rows[1:])) if rows else set()
    values = json.dumps([_values(row, inside, common) for row in rows], separators=(",", ":"), allow_nan=False)
    return template.replace("/*ROWS*/[]", values.replace("</", "<\\/"))


def _values(row: Row, inside: str, common: set[tuple[str, str]]) -> dict[str, Any]:
    """common: fields that all rows share, which say nothing about a difference."""

    def address(url: str | None, path: str | None) -> str:
        if inside:
            return f"{inside}{path}" if path else ""
        return url if url and url.startswith("http") else ""

    return {
        "suite": row.suite,
        "name": row.name,
        "variant": row.variant or "",
        "checkpoint": row.checkpoint,
        "images": row.images_seen,
        "flops": row.train_flops,
        "hours": row.gpu_hours,
        "mean": round(row.mean, 3),
        "groups": {name: round(value, 3) for name, value in row.groups.items()},
        "tasks": {name: round(value, 3) for name, value in row.tasks.items()},
        "error": None if row.spread is None else round(row.spread, 3),
        "data": row.data_name or "",
        "config": dict(row.config.items() - common),
        "pretrain": address(row.pretrain_url, row.pretrain_path),
        "transfer": address(row.transfer_url, row.transfer_path),
    }


def text_page(title: str, text: str) -> str:
    """A page of one paragraph."""
    return f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><p>{escape(text)}</p>'
