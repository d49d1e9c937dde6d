"""Registered models: versions, aliases and scores.

A model version stands for one checkpoint that is worth keeping. Its weights are copied into MLflow with the code to run
them; its scores are tags here and metrics of the LoggedModel behind it. Alias `candidate` is the newest version,
`champion` the one that scheduled evaluation has found best.
"""

import contextlib
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.tracking import names
from pipeline.tracking.environment import PROJECT
from pipeline.tracking.search import search_runs
from pipeline.tracking.server import client, experiment_id, process_wide, resolve_tracking_uri

CANDIDATE, CHAMPION = "candidate", "champion"
# What the registered classifier needs, in the versions that trained it: neither ray nor deepspeed.
SERVING = ("mlflow-skinny", "torch", "numpy", "pandas", "pillow", "safetensors", "scipy")


@dataclass(frozen=True, slots=True)
class Version:
    """One model version: its checkpoint, the run that trained it, and its evaluations by `suite:suite version`."""

    name: str
    version: int
    checkpoint: str
    run_id: str
    model_id: str
    step: int
    aliases: tuple[str, ...]
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)


def register(checkpoint: str, *, name: str = "vit", run_id: str | None = None, uri: str | None = None) -> Version:
    """Makes a committed checkpoint folder a new version of the model `name`, alias `candidate`.

    A checkpoint that is registered already is returned as it is. Raises UserError when it has no COMMIT.json.
    """
    uri, checkpoint = resolve_tracking_uri(uri), storage.normalise(checkpoint)
    try:
        commit = storage.read_json(storage.join(checkpoint, "COMMIT.json"))
    except FileNotFoundError as error:
        raise UserError(f"{checkpoint}: no complete checkpoint (COMMIT.json is missing)") from error
    for version in versions(name, uri):
        if version.checkpoint == checkpoint:
            return version
    mlflow = client(uri)
    run_id = run_id or run_of(checkpoint, uri)
    if run_id:
        experiment = mlflow.get_run(run_id).info.experiment_id
    else:  # weights that no run of this server made
        experiment = experiment_id(uri, names.PRETRAIN)
    tags = {names.CHECKPOINT: checkpoint, "step": str(commit["step"])}
    if "images_seen" in commit:
        tags[names.IMAGES_SEEN] = str(commit["images_seen"])
    step = f"step-{commit['step']}"
    model = mlflow.create_logged_model(experiment, step, run_id, tags, {"checkpoint": checkpoint}, "vit")
    try:
        with tempfile.TemporaryDirectory(prefix="register-") as scratch:
            _save_classifier(checkpoint, os.path.join(scratch, "model"))
            mlflow.log_model_artifacts(model.model_id, os.path.join(scratch, "model"))
    except BaseException:
        mlflow.finalize_logged_model(model.model_id, "FAILED")
        raise
    mlflow.finalize_logged_model(model.model_id, "READY")
    _ensure_model(name, uri)
    with process_wide(uri):  # MLflow looks the logged model up there, whatever the client's own address
        made = mlflow.create_model_version(
            name, f"models:/{model.model_id}", run_id, {**tags, "model_id": model.model_id}, model_id=model.model_id
        )
    mlflow.set_registered_model_alias(name, CANDIDATE, made.version)
    return next(version for version in versions(name, uri) if version.version == int(made.version))


def _save_classifier(checkpoint: str, folder: str) -> None:
    """The pyfunc model: weights, `models/`, signature and an input example, in a local folder."""
    import importlib.metadata

    import numpy as np
    from mlflow import pyfunc
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from PIL import Image

    weights = os.path.join(folder + "-weights")
    os.makedirs(weights)
    for file in ("model.safetensors", "config.json", "COMMIT.json"):  # the last has their checksums, for who reads them
        if file != "COMMIT.json" or storage.exists(storage.join(checkpoint, file)):
            storage.copy_file(storage.join(checkpoint, file), os.path.join(weights, file))
    with open(os.path.join(weights, "config.json")) as opened:
        size = int(json.load(opened)["model"]["image_size"])
    picture = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), 127, np.uint8)).save(picture, "png")
    inputs: list = [ColSpec(DataType.binary, "image")]
    outputs: list = [
        ColSpec(DataType.string, "label"),
        ColSpec(DataType.long, "index"),
        ColSpec(DataType.double, "probability"),
    ]
    pyfunc.save_model(
        folder,
        python_model=os.path.join(PROJECT, "pipeline", "tracking", "classifier.py"),
        artifacts={"checkpoint": weights},
        code_paths=[os.path.join(PROJECT, "models")],
        signature=ModelSignature(Schema(inputs), Schema(outputs)),
        input_example=_frame([picture.getvalue()]),
        # without the build ("+cpu"), which only an index of its own has
        pip_requirements=[f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in SERVING],
    )


def _frame(images: list[bytes]) -> Any:
    import pandas as pd

    return pd.DataFrame({"image": images})


def _ensure_model(name: str, uri: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client(uri).create_registered_model(name, description="Vision Transformers and their transfer scores.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def run_of(checkpoint: str, uri: str) -> str | None:
    """The pretrain run whose output folder holds the checkpoint."""
    for run in search_runs(names.PRETRAIN, uri=uri):
        output = run.tags.get(names.PLACE + "runtime.output", "")
        if output and checkpoint.startswith(storage.normalise(output) + "/"):
            return run.id
    return None


def model_names(uri: str | None = None) -> list[str]:
    """The names of all registered models."""
    found: list[str] = []
    token = None
    while True:
        page = client(resolve_tracking_uri(uri)).search_registered_models(page_token=token)
        found += [model.name for model in page]
        token = page.token
        if not token:
            return found


def versions(name: str, uri: str | None = None) -> list[Version]:
    """Every version of a registered model, oldest first; none when the model does not exist."""
    mlflow = client(resolve_tracking_uri(uri))
    found, token = [], None
    while True:
        page = mlflow.search_model_versions(f"name = '{name}'", max_results=100, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            break
    if not found:
        return []
    by_version: dict[int, list[str]] = {}
    for alias, number in mlflow.get_registered_model(name).aliases.items():
        by_version.setdefault(int(number), []).append(alias)
    made = []
    for item in found:
        evaluations = _evaluations(item.tags)
        made.append(
            Version(
                name=name,
                version=int(item.version),
                checkpoint=item.tags.get(names.CHECKPOINT) or item.source or "",
                run_id=item.run_id or "",
                model_id=item.tags.get("model_id", ""),
                step=int(item.tags.get("step", 0)),
                aliases=tuple(by_version.get(int(item.version), [])),
                evaluations=evaluations,
            )
        )
    return sorted(made, key=lambda version: version.version)


def _evaluations(tags: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{suite:suite version: summary}; a tag that somebody else wrote counts as no evaluation."""
    found = {}
    for key, value in tags.items():
        if key.startswith("evaluation."):
            with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
                summary = json.loads(value)
                found[key.removeprefix("evaluation.")] = {
                    **summary,
                    "mean": float(summary["mean"]),
                    "spread": float(summary["spread"]),
                }
    return found


def version_at(address: str, uri: str | None = None) -> Version | None:
    """The version that `models:/NAME/VERSION` or `models:/NAME@ALIAS` names; None for another address."""
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@(.+))", address)
    if not match:
        return None
    name, number, alias = match.groups()
    return next((v for v in versions(name, uri) if str(v.version) == number or alias in v.aliases), None)


def versions_of(checkpoint: str, uri: str | None = None) -> list[Version]:
    """The registered versions that a checkpoint is, under whatever model names."""
    found = client(resolve_tracking_uri(uri)).search_model_versions(f"tags.`{names.CHECKPOINT}` = '{checkpoint}'")
    return [
        v for name in sorted({item.name for item in found}) for v in versions(name, uri) if v.checkpoint == checkpoint
    ]


def record_evaluation(
    version: Version, key: str, result: Mapping[str, Any], run_id: str, uri: str | None = None
) -> None:
    """Writes an evaluation (`suite:suite version`) to the version's tags and its LoggedModel's metrics.

    result: mean, spread (percent points), scores {task: top-1 in percent}; `run_id`: the run that has logged them.
    Repeating it changes nothing.
    """
    mlflow = client(resolve_tracking_uri(uri))
    suite = key.partition(":")[0]
    summary = {"mean": result["mean"], "spread": result["spread"], "run": run_id}
    number = str(version.version)
    known = json.loads(mlflow.get_model_version(version.name, number).tags.get(f"evaluation.{key}", "{}"))
    if known | {"run": run_id} == summary:
        return
    mlflow.set_model_version_tag(version.name, number, f"evaluation.{key}", json.dumps(summary))
    mlflow.set_model_version_tag(version.name, number, f"{names.MEAN_SCORE}.{suite}", f"{result['mean']:.2f}")
    for task, score in result["scores"].items():
        mlflow.set_model_version_tag(version.name, number, f"{names.SCORE}{task}", f"{score:.2f}")
    scores = {names.MEAN_SCORE: result["mean"]}
    scores |= {names.SCORE + task: score for task, score in result["scores"].items()}
    for metric, score in scores.items():
        # The very point that the run has: MLflow keeps it once there, and adds it to the model.
        points = [point for point in mlflow.get_metric_history(run_id, metric) if point.value == score]
        time_ms, step = (points[-1].timestamp, points[-1].step) if points else (int(time.time() * 1000), version.step)
        mlflow.log_metric(run_id, metric, score, time_ms, step, model_id=version.model_id)


def set_alias(version: Version, alias: str, uri: str | None = None) -> None:
    client(resolve_tracking_uri(uri)).set_registered_model_alias(version.name, alias, str(version.version))
