"""Registered models: versions, aliases and scores.

A model version is one checkpoint. Its weights are copied to MLflow together with the code to run them. Its scores are
tags of the version and metrics of its LoggedModel, and its description is a model card. Each pair of recipe and data
set, and each pipeline, has its own registered model, because versions of one model are compared. The alias `candidate`
is the version with the best validation, or once versions have scores, the best version that was never promoted.
`champion` is the version that was promoted last, by scheduled evaluation or by the rule of a pipeline.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.commit import COMMIT, Damaged, check_content, read_commit
from pipeline.errors import UserError
from pipeline.tracking import names
from pipeline.tracking.card import CardFacts, collect_facts, model_card, plain_text
from pipeline.tracking.environment import PROJECT
from pipeline.tracking.search import search_runs
from pipeline.tracking.server import client, experiment_id, global_server, resolve_tracking_uri

logger = logging.getLogger(__name__)
CANDIDATE, CHAMPION = "candidate", "champion"
PROMOTED = "promoted"  # tag of a version: the time when it became the champion
WEIGHTS = ("model.safetensors", "config.json")  # files of a checkpoint that a registered model needs
# Requirements of the registered classifier, pinned to the versions used for training; ray and deepspeed are not needed.
SERVING = ("mlflow-skinny", "torch", "numpy", "pandas", "pillow", "safetensors", "scipy")


@dataclass(frozen=True, slots=True)
class Version:
    """One model version with its checkpoint, its training run, and its evaluations by `suite:suite version`."""

    name: str
    version: int
    checkpoint: str
    run_id: str
    model_id: str
    step: int
    aliases: tuple[str, ...]
    top1: float | None = None
    """Top-1 of the checkpoint on the validation set of its run, in percent."""
    validation: str = ""
    """Fingerprint of that validation set."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    was_promoted: bool = False
    """Whether the version is, or has been, the champion."""


def register(checkpoint: str, *, name: str = "vit", run_id: str | None = None, uri: str | None = None) -> Version:
    """Registers a committed checkpoint as a new version of the model `name`, and as `candidate` if it is better.

    Returns the existing version if the checkpoint is already registered. Raises UserError for a checkpoint without
    COMMIT.json, and Damaged, before MLflow has anything of it, if a copied file does not match its checksum.
    """
    uri, checkpoint = resolve_tracking_uri(uri), storage.normalise(checkpoint)
    try:
        commit = read_commit(checkpoint)
    except FileNotFoundError as error:
        raise UserError(f"{checkpoint}: no complete checkpoint (COMMIT.json is missing)") from error
    for version in versions(name, uri):
        if version.checkpoint == checkpoint:
            return version
    with tempfile.TemporaryDirectory(prefix="register-") as scratch:
        folder = os.path.join(scratch, "model")
        save_classifier(checkpoint, folder)
        mlflow = client(uri)
        run_id = run_id or run_of(checkpoint, uri)
        if run_id:
            experiment = mlflow.get_run(run_id).info.experiment_id
        else:  # weights that do not come from a run on this server
            experiment = experiment_id(uri, names.PRETRAIN)
        trained = mlflow.get_run(run_id).data.tags if run_id else {}
        facts = collect_facts(checkpoint, commit, trained.get(names.RECIPE, ""), run_id or "")
        storage.write_bytes(os.path.join(folder, "README.md"), model_card(facts).encode())
        tags = _version_tags(facts, trained)
        step = f"step-{commit['step']}"
        model = mlflow.create_logged_model(experiment, step, run_id, tags, {"checkpoint": checkpoint}, "vit")
        try:
            mlflow.log_model_artifacts(model.model_id, folder)
        except BaseException:
            mlflow.finalize_logged_model(model.model_id, "FAILED")
            raise
    mlflow.finalize_logged_model(model.model_id, "READY")
    _ensure_model(name, uri)
    with global_server(uri):  # MLflow looks up the logged model on its global server
        made = mlflow.create_model_version(
            name,
            f"models:/{model.model_id}",
            run_id,
            {**tags, "model_id": model.model_id},
            description=plain_text(model_card(facts)),
            model_id=model.model_id,
        )
    everything = versions(name, uri)
    version = next(version for version in everything if version.version == int(made.version))
    present = next((other for other in everything if CANDIDATE in other.aliases), None)
    if present is None or _is_better(version, present):
        mlflow.set_registered_model_alias(name, CANDIDATE, made.version)
        return dataclasses.replace(version, aliases=(*version.aliases, CANDIDATE))
    if version.top1 is None:
        reason = "was not validated"
    elif version.validation != present.validation:
        reason = "was measured on other validation data"
    else:
        reason = "is not better on the same validation data"
    logger.info("%s@%s remains version %d: version %d %s", name, CANDIDATE, present.version, version.version, reason)
    return version


def _version_tags(facts: CardFacts, trained: Mapping[str, str]) -> dict[str, str]:
    """Tags of a version. trained: tags of the run that trained it."""
    commit = facts.commit
    tags = {names.CHECKPOINT: facts.checkpoint, "step": str(commit["step"])}
    if "images_seen" in commit:
        tags[names.IMAGES_SEEN] = str(commit["images_seen"])
    if facts.recipe:
        tags[names.RECIPE] = facts.recipe
    if (top1 := commit.get("metrics", {}).get(names.VAL_TOP1)) is not None:
        tags[names.VAL_TOP1] = f"{top1:.4f}"
    for role, manifest in (("train", facts.data), ("validation", facts.validation)):
        key = f"{names.DATA_FINGERPRINT}.{role}"
        if fingerprint := manifest.get("fingerprint") or trained.get(key):
            tags[key] = str(fingerprint)
    return tags


def _is_better(new: Version, present: Version) -> bool:
    """Whether a new version takes the alias `candidate` from the present one.

    Versions are compared by top-1 on the same validation data. Without validation, only versions of one run are
    comparable, and the later step is better.
    """
    if new.top1 is None or present.top1 is None:
        same_run = _run_folder(new.checkpoint) == _run_folder(present.checkpoint)
        return new.top1 is not None or (present.top1 is None and same_run and new.step > present.step)
    return new.validation == present.validation and new.top1 >= present.top1


def register_first(ranked: Iterable[str], **options: Any) -> Version | None:
    """Registers the first of some checkpoints that is not damaged, as `register` does; None if all are."""
    for checkpoint in ranked:
        try:
            return register(checkpoint, **options)
        except Damaged as error:
            logger.warning("not registered: %s", error)
    return None


def _run_folder(checkpoint: str) -> str:
    return checkpoint.rpartition("/checkpoints/")[0] or checkpoint


def save_classifier(checkpoint: str, folder: str) -> None:
    """Writes the pyfunc model to a local folder: weights, `models/`, signature and an input example. Raises Damaged for
    a file that does not match its checksum in COMMIT.json."""
    import importlib.metadata

    import numpy as np
    from mlflow import pyfunc
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from PIL import Image

    weights = os.path.join(folder + "-weights")
    os.makedirs(weights)
    recorded = read_commit(checkpoint)["files"]
    for file in WEIGHTS:
        original, copy = storage.join(checkpoint, file), os.path.join(weights, file)
        if file not in recorded:
            raise Damaged(f"{original}: not one of the files that {COMMIT} lists; use another checkpoint")
        try:
            storage.copy_file(original, copy)
        except FileNotFoundError as error:
            raise Damaged(f"{original}: missing; use another checkpoint") from error
        with open(copy, "rb") as opened:
            check_content(original, hashlib.file_digest(opened, "sha256").hexdigest(), recorded[file]["sha256"])
    storage.copy_file(storage.join(checkpoint, COMMIT), os.path.join(weights, COMMIT))
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
        # without the build ("+cpu"), which is not on the default package index
        pip_requirements=[f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in SERVING],
    )


def _frame(images: list[bytes]) -> Any:
    import pandas as pd

    return pd.DataFrame({"image": images})


def _ensure_model(name: str, uri: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client(uri).create_registered_model(
            name,
            description="Checkpoints of one recipe on one data set; `candidate` is the best by validation, `champion` the best by transfer scores.",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def run_of(checkpoint: str, uri: str) -> str | None:
    """The id of the pretrain run whose output folder contains the checkpoint, or None."""
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
    """Every version of a registered model, oldest first; empty if the model does not exist."""
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
                top1=float(item.tags[names.VAL_TOP1]) if names.VAL_TOP1 in item.tags else None,
                validation=item.tags.get(f"{names.DATA_FINGERPRINT}.validation", ""),
                evaluations=evaluations,
                was_promoted=PROMOTED in item.tags or CHAMPION in by_version.get(int(item.version), []),
            )
        )
    return sorted(made, key=lambda version: version.version)


def _evaluations(tags: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{suite:suite version: summary}. Tags in another format are ignored."""
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
    """The version with the address `models:/NAME/VERSION` or `models:/NAME@ALIAS`; None for other addresses."""
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@(.+))", address)
    if not match:
        return None
    name, number, alias = match.groups()
    return next((v for v in versions(name, uri) if str(v.version) == number or alias in v.aliases), None)


def versions_of(checkpoint: str, uri: str | None = None) -> list[Version]:
    """The registered versions of a checkpoint, under all model names."""
    found = client(resolve_tracking_uri(uri)).search_model_versions(f"tags.`{names.CHECKPOINT}` = '{checkpoint}'")
    return [
        v for name in sorted({item.name for item in found}) for v in versions(name, uri) if v.checkpoint == checkpoint
    ]


def record_evaluation(
    version: Version, key: str, result: Mapping[str, Any], run_id: str, uri: str | None = None
) -> None:
    """Writes an evaluation to the tags of the version and the metrics of its LoggedModel. Repeating it has no effect.

    key: `suite:suite version`. result: mean, spread (percentage points), scores {task: top-1 in percent}. run_id: the
    run that logged the scores.
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
    _renew_card(version, {key: dict(result)}, uri)
    scores = {names.MEAN_SCORE: result["mean"]}
    scores |= {names.SCORE + task: score for task, score in result["scores"].items()}
    for metric, score in scores.items():
        # The same point as in the run: MLflow does not store it twice, and adds it to the model.
        points = [point for point in mlflow.get_metric_history(run_id, metric) if point.value == score]
        time_ms, step = (points[-1].timestamp, points[-1].step) if points else (int(time.time() * 1000), version.step)
        mlflow.log_metric(run_id, metric, score, time_ms, step, model_id=version.model_id)


def _renew_card(version: Version, evaluations: Mapping[str, Mapping[str, Any]], uri: str | None) -> None:
    """Updates the model card with new scores, if the checkpoint can still be read."""
    mlflow, number = client(resolve_tracking_uri(uri)), str(version.version)
    recipe = mlflow.get_model_version(version.name, number).tags.get(names.RECIPE, "")
    try:
        commit = read_commit(version.checkpoint)
        facts = collect_facts(version.checkpoint, commit, recipe, version.run_id)
    except (OSError, UserError) as error:
        logger.warning("the card of %s %s keeps its old scores: %s", version.name, number, error)
        return
    card = model_card(facts, {**version.evaluations, **evaluations})
    mlflow.update_model_version(version.name, number, plain_text(card))


def set_alias(version: Version, alias: str, uri: str | None = None) -> None:
    client(resolve_tracking_uri(uri)).set_registered_model_alias(version.name, alias, str(version.version))


def promote(version: Version, uri: str | None = None) -> None:
    """Makes a version the champion and records the time."""
    client(resolve_tracking_uri(uri)).set_model_version_tag(
        version.name, str(version.version), PROMOTED, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    )
    set_alias(version, CHAMPION, uri)


def name_candidate(name: str, key: str, uri: str | None = None) -> int | None:
    """Sets `candidate` to the version with the best mean of the evaluation `key` that was never promoted. Returns its
    number.

    If there is no such version, removes the alias and returns None.
    """
    waiting = [v for v in versions(name, uri) if not v.was_promoted and key in v.evaluations]
    if waiting:
        best = max(waiting, key=lambda version: (version.evaluations[key]["mean"], version.version))
        set_alias(best, CANDIDATE, uri)
        return best.version
    if any(CANDIDATE in version.aliases for version in versions(name, uri)):
        client(resolve_tracking_uri(uri)).delete_registered_model_alias(name, CANDIDATE)
    return None
