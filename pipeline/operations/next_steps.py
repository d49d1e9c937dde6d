"""Suggested commands after a job. Jobs print them at the end: `logs.show(after_pretraining(config))`."""

import os
from collections.abc import Mapping, Sequence

from pipeline import lines, storage
from pipeline.credentials import redacted
from pipeline.tracking import resolve_tracking_uri
from pipeline.training.config import PretrainConfig

Step = tuple[Sequence[str], str]
"""The words of a command, and a remark about it."""
ADDRESS = "http://127.0.0.1:5000"
COLUMN = 12


def after_preparing(datasets: Mapping[str, str]) -> str:
    """Commands to run after preparation. datasets: {split: URI} of the prepared datasets."""
    train = datasets.get("train") or next(iter(datasets.values()))
    held_out = next((datasets[name] for name in ("val", "validation", "test") if name in datasets), None)
    folder = os.path.dirname(train)
    beside = (
        os.path.dirname(folder) if os.path.basename(folder) == "data" else f"runs/{os.path.basename(folder) or 'run'}"
    )
    words = ["python", "jobs/pretrain.py", "--data", train]
    words += ["--validation", held_out] if held_out else ["--no-validation"]
    words += ["--output", storage.join(beside or "runs", "pretrain")]
    return _listed(
        {
            "look": (["python", "jobs/prepare.py", "describe", train], ""),
            "train": (words, "--list-recipes shows the models"),
        }
    )


def after_pretraining(config: PretrainConfig) -> str:
    """Commands to run after pre-training, with addresses as given by the user."""
    output = config.runtime.output.rstrip("/")
    sets = os.path.dirname(config.runtime.data.rstrip("/")) or "."
    words, remark = ["python", "jobs/transfer.py", "--checkpoint", output], ""
    if all(storage.exists(storage.join(sets, split, "manifest.json")) for split in ("train", "test")):
        words += ["--suite", "folder" if config.runtime.gpus else "frozen", "--data", sets]
    else:
        words += ["--suite", "vtab1k", "--data", "sets/vtab"]
        remark = "" if storage.exists("sets/vtab") else "docs/vtab.md prepares sets/vtab"
    steps = {"look": look_at(config.runtime.tracking_uri), "transfer": (words, remark)}
    if config.loss != "masked":
        export = ["python", "jobs/export.py", "--checkpoint", output, "--to", "timm", "--output", f"{output}-timm"]
        steps["export"] = (export, "needs the extra .[export]")
    return _listed(steps)


def after_transfer(suite: str, tracking_uri: str | None) -> str:
    """Commands to run after a transfer. suite: the name of the suite."""
    compare = ["python", "jobs/compare.py", "--suite", suite]
    return _listed({"look": look_at(tracking_uri), "compare": (compare, "")})


def look_at(tracking_uri: str | None) -> Step:
    """The command that shows the runs of this job in MLflow, and the address to open."""
    uri = resolve_tracking_uri(tracking_uri)
    if uri.startswith("http"):
        return ["open", redacted(uri)], ""
    if uri == f"sqlite:///{os.path.abspath('mlflow.db')}" and os.path.exists("Makefile"):
        return ["make", "ui"], f"then open {ADDRESS}"
    words = ["python", "-m", "pipeline.tracking", "ui", "--tracking-uri", redacted(uri)]
    return words, f"then open {ADDRESS}"


def _listed(steps: Mapping[str, Step]) -> str:
    """The commands, each from the same column on; the remark stands beside a short command or below."""
    shown = ["next:"]
    for name, (words, remark) in steps.items():
        first, *more = lines.command(words, COLUMN)
        remark = f"({remark})" if remark else ""
        beside = remark and not more and COLUMN + len(first) + 3 + len(remark) <= lines.WIDTH
        shown.append(f"  {name:{COLUMN - 3}s} {first}{f'   {remark}' if beside else ''}")
        shown += [" " * COLUMN + row for row in more]
        shown += [" " * COLUMN + remark] if remark and not beside else []
    return "\n".join(shown)
