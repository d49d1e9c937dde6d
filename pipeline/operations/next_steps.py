"""Suggested commands after a job. Jobs print them at the end: `logs.show(after_pretraining(config))`."""

import os
import shlex
from collections.abc import Mapping

from pipeline import storage
from pipeline.credentials import redacted
from pipeline.tracking import resolve_tracking_uri
from pipeline.training.config import PretrainConfig


def after_preparing(datasets: Mapping[str, str]) -> str:
    """Commands to run after preparation. datasets: {split: URI} of the prepared datasets."""
    train = datasets.get("train") or next(iter(datasets.values()))
    held_out = next((datasets[name] for name in ("val", "validation", "test") if name in datasets), None)
    folder = os.path.dirname(train)
    beside = (
        os.path.dirname(folder) if os.path.basename(folder) == "data" else f"runs/{os.path.basename(folder) or 'run'}"
    )
    run = storage.join(beside or "runs", "pretrain")
    words = ["python", "jobs/pretrain.py", "--data", train]
    words += ["--validation", held_out] if held_out else ["--no-validation"]
    return _listed(
        {
            "look": f"python jobs/prepare.py describe {shlex.quote(train)}",
            "train": f"{shlex.join(words)} --output {shlex.quote(run)}   (--list-recipes shows the models)",
        }
    )


def after_pretraining(config: PretrainConfig) -> str:
    """Commands to run after pre-training, with addresses as given by the user."""
    output = config.runtime.output.rstrip("/")
    sets = os.path.dirname(config.runtime.data.rstrip("/")) or "."
    words = ["python", "jobs/transfer.py", "--checkpoint", output]
    if all(storage.exists(storage.join(sets, split, "manifest.json")) for split in ("train", "test")):
        words += ["--suite", "folder" if config.runtime.gpus else "frozen", "--data", sets]
    else:
        words += ["--suite", "vtab1k", "--data", "sets/vtab"]
    steps = {"look": look_at(config.runtime.tracking_uri), "transfer": shlex.join(words)}
    if "vtab1k" in words and not storage.exists("sets/vtab"):
        steps["transfer"] += "   (docs/vtab.md prepares sets/vtab)"
    if config.loss != "masked":
        export = ["python", "jobs/export.py", "--checkpoint", output, "--to", "timm", "--output", f"{output}-timm"]
        steps["export"] = f"{shlex.join(export)}   (needs the extra .[export])"
    return _listed(steps)


def after_transfer(suite: str, tracking_uri: str | None) -> str:
    """Commands to run after a transfer. suite: the name of the suite."""
    return _listed({"look": look_at(tracking_uri), "compare": f"python jobs/compare.py --suite {suite}"})


def look_at(tracking_uri: str | None) -> str:
    """The command and address that show the runs of this job in MLflow."""
    uri = resolve_tracking_uri(tracking_uri)
    if uri.startswith("http"):
        return f"open {redacted(uri)}"
    if uri == f"sqlite:///{os.path.abspath('mlflow.db')}" and os.path.exists("Makefile"):
        return "make ui, then open http://127.0.0.1:5000"
    return (
        f"python -m pipeline.tracking ui --tracking-uri {shlex.quote(redacted(uri))}, then open http://127.0.0.1:5000"
    )


def _listed(steps: Mapping[str, str]) -> str:
    return "\n".join(["next:", *(f"  {name:9s} {command}" for name, command in steps.items())])
