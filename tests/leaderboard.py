"""Rows of a leaderboard for tests."""

import dataclasses

from pipeline.tracking.leaderboard import DECONTAMINATION, EVALUATION, TRAINING, VALIDATION, Row

SAME = {TRAINING: "photos 1111", VALIDATION: "photos 2222", DECONTAMINATION: "none", EVALUATION: "vtab 3333"}


def row(name, mean, *, suite="vtab1k", started=0, **changes):
    nothing = {field.name: None for field in dataclasses.fields(Row)}
    about = {
        "suite": suite,
        "started": started,
        "name": name,
        "checkpoint": name,
        "mean": mean,
        "groups": {},
        "tasks": {"pets": mean},
    }
    links = {"transfer_run": name, "transfer_url": "", "transfer_path": "", "config": {}}
    return Row(**{**nothing, **about, **links, "datasets": SAME | changes})
