"""Pages of HTML: a leaderboard that sorts, compares and filters by itself, from values alone.

A page is one file without links to elsewhere: it is an artifact, a file beside the leaderboard's table, and what the server of
`python -m pipeline.tracking ui` answers under /leaderboard.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from pipeline.tracking.leaderboard import Row


def leaderboard_page(rows: Sequence[Row], inside: str = "") -> str:
    """The page. inside: what goes before a run's path under a server, to link to it; "" takes the runs' own addresses."""
    template = resources.files("pipeline.tracking").joinpath("leaderboard.html").read_text()
    values = json.dumps([_values(row, inside) for row in rows], separators=(",", ":"), allow_nan=False)
    return template.replace("/*ROWS*/[]", values.replace("</", "<\\/"))


def _values(row: Row, inside: str) -> dict[str, Any]:
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
        "config": dict(row.config),
        "pretrain": address(row.pretrain_url, row.pretrain_path),
        "transfer": address(row.transfer_url, row.transfer_path),
    }


def changed_fields(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """{field: (first, second)} of the fields that differ."""
    keys = sorted({**first, **second})
    return {key: (first.get(key, ""), second.get(key, "")) for key in keys if first.get(key) != second.get(key)}


def text_page(title: str, text: str) -> str:
    """A page of one paragraph."""
    return f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><p>{escape(text)}</p>'
