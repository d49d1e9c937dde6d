"""The jobs that can be stages: config, inputs, outputs, and identity.

A kind defines which fields of its config are inputs (identified by content, not location), which one is the output, and
which do not affect the output (execution settings). All other fields are part of the identity of a stage."""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError, nearest

SHARDS, CHECKPOINTS = "shards", "checkpoints"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One job as a stage."""

    name: str
    script: str
    """Path of the command, relative to the project."""
    words: tuple[str, ...] = ()
    """Subcommand."""
    config: str
    """module:class of its fields."""
    recipes: str | None = None
    """module:name of {name: function that returns a config}."""
    default: str | None = None
    """The recipe that counts without `recipe`."""
    recipe_flag: str = "recipe"
    positional: str | None = None
    """Positional argument of the command."""
    reads: tuple[str, ...] = ()
    """Fields with URIs of inputs whose content affects the output."""
    observes: tuple[str, ...] = ()
    """Fields with URIs of inputs that do not affect the output, such as a validation set."""
    required: tuple[str, ...] = ()
    """Fields that are required in a stage but optional in the job."""
    ignores: tuple[str, ...] = ()
    """Fields that do not affect the output."""
    joins: tuple[str, ...] = ()
    """Fields whose change continues in the same output instead of a new one."""
    formats: tuple[str, ...] = ()
    """Formats whose version is part of the identity."""
    marker: tuple[str, ...] = ()
    """Files that mark a complete output; the first one that exists is used."""
    extra: tuple[str, ...] = ()
    """Fixed arguments of the command."""
    cpus: Callable[[Any], float | None] = lambda config: 1.0
    """CPUs of the job; None: the whole machine."""
    gpus: Callable[[Any], float] = lambda config: 0.0
    optional_gpus: Callable[[Any], float] = lambda config: 0.0
    """Maximum number of GPUs of the job, if available."""


WHERE = ("address", "tracking", "tracking_uri")


def _pretrain_cpus(config: Any) -> float:
    return max(1.0, config.runtime.workers * config.runtime.cpus_per_worker)


def _transfer_cpus(config: Any) -> float | None:
    return float(config.workers * config.cpus_per_worker) if config.workers else None


def _transfer_gpus(config: Any) -> float:
    return config.workers * config.gpus_per_worker if config.workers else math.inf


def _num_cpus(config: Any) -> float | None:
    return float(config.num_cpus) if config.num_cpus else None


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="prepare",
            script="jobs/prepare.py",
            config="pipeline.data.prepare.config:PrepareJob",
            recipes="pipeline.data.prepare.config:RECIPES",
            default="jpeg256",
            reads=("source", "labels", "label_map", "decontaminate"),
            required=("source",),
            ignores=(*WHERE, "num_cpus", "max_reject_fraction"),
            formats=(SHARDS,),
            marker=("manifest.json", "*/manifest.json"),
            cpus=_num_cpus,
        ),
        Kind(
            name="vtab",
            script="jobs/prepare.py",
            words=("vtab",),
            config="pipeline.vtab.config:VtabConfig",
            positional="tasks",
            reads=("raw",),
            ignores=(*WHERE, "num_cpus", "download"),
            formats=(SHARDS,),
            marker=("*/*/manifest.json",),
            cpus=_num_cpus,
        ),
        Kind(
            name="pretrain",
            script="jobs/pretrain.py",
            config="pipeline.training.config:PretrainConfig",
            recipes="pipeline.training.recipes:RECIPES",
            default="demo",
            reads=("data", "init_from"),
            observes=("validation", "fewshot.train", "fewshot.test"),
            formats=(SHARDS, CHECKPOINTS),
            marker=("checkpoints/*/COMMIT.json",),
            cpus=_pretrain_cpus,
            gpus=lambda config: float(config.runtime.workers if config.runtime.gpus else 0),
        ),
        Kind(
            name="transfer",
            script="jobs/transfer.py",
            config="pipeline.transfer.suites:TransferConfig",
            recipes="pipeline.transfer.suites:SUITES",
            default="demo",
            recipe_flag="suite",
            reads=("checkpoint", "data", "decontamination", "real_labels", "class_names"),
            required=("checkpoint", "data"),
            ignores=(
                *WHERE,
                "micro_batch",
                "compile",
                "workers",
                "gpus_per_worker",
                "cpus_per_worker",
                "retries",
                "experiment",
            ),
            joins=("tasks", "seeds"),
            formats=(SHARDS, CHECKPOINTS),
            marker=("scores.json",),
            cpus=_transfer_cpus,
            optional_gpus=_transfer_gpus,
        ),
        Kind(
            name="evaluate",
            script="jobs/evaluate.py",
            config="pipeline.operations.evaluation:EvaluateConfig",
            reads=("runs", "data"),
            ignores=(
                *(
                    "tracking_uri",
                    "hook",
                    "transfer.address",
                    "transfer.tracking_uri",
                    "transfer.micro_batch",
                    "transfer.compile",
                ),
                *("transfer.workers", "transfer.gpus_per_worker", "transfer.cpus_per_worker", "transfer.retries"),
            ),
            formats=(SHARDS, CHECKPOINTS),
            extra=("--once",),
            cpus=lambda config: _transfer_cpus(config.transfer),
            optional_gpus=lambda config: _transfer_gpus(config.transfer),
        ),
        Kind(
            name="export",
            script="jobs/export.py",
            config="pipeline.operations.options:ExportConfig",
            reads=("checkpoint", "images"),
            ignores=("tracking_uri",),
            formats=(CHECKPOINTS,),
            marker=("*",),
        ),
        Kind(
            name="visualize",
            script="jobs/visualize.py",
            config="pipeline.operations.options:VisualizeConfig",
            reads=("checkpoint", "images"),
            ignores=("tracking_uri", "log"),
            formats=(CHECKPOINTS,),
            marker=("numbers.json",),
        ),
        Kind(
            name="compare",
            script="jobs/compare.py",
            config="pipeline.operations.options:CompareConfig",
            ignores=("tracking_uri", "log"),
            marker=("leaderboard.json",),
        ),
        Kind(
            name="promote",
            script="jobs/pipeline.py",
            words=("promote",),
            config="pipeline.graph.promotion:PromoteConfig",
            reads=("scores",),
            ignores=("tracking_uri",),
            marker=("promotion.json",),
        ),
    )
}


def find(name: str, where: str) -> Kind:
    """The kind with that name; a file cannot name `promote`. Raises UserError with the nearest name."""
    jobs = [kind for kind in KINDS if kind != "promote"]
    if name not in jobs:
        raise UserError(f'{where}: unknown job "{name}"{nearest(name, jobs)}; jobs: {", ".join(jobs)}')
    return KINDS[name]


@functools.cache
def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def config_class(kind: Kind) -> Any:
    """The dataclass with the fields of the kind."""
    return _load(kind.config)


def recipe_names(kind: Kind) -> list[str]:
    """The valid values of `recipe`."""
    return list(_recipes(kind))


def _recipes(kind: Kind) -> Mapping[str, Callable[[], Any]]:
    if kind.recipes is None:
        return {}
    if kind.name == "transfer":
        suites, config = _load("pipeline.transfer.suites:SUITES"), config_class(kind)
        return {name: functools.partial(config, suite=name) for name in suites}
    return _load(kind.recipes)


def start(kind: Kind, recipe: str | None, given: Mapping[str, Any], where: str) -> Any:
    """The config that the fields of a stage override. Raises UserError for an unknown recipe or a missing required field."""
    recipes = _recipes(kind)
    if recipe is not None and recipe not in recipes:
        if not recipes:
            raise UserError(f"{where}: the job {kind.name} has no recipes")
        raise UserError(f'{where}: {kind.name} has no {kind.recipe_flag} "{recipe}"{nearest(recipe, recipes)}')
    cls = config_class(kind)
    if recipes:
        base = recipes[recipe or kind.default or ""]()
        if type(base) is not cls:  # the job has fields in addition to those of the recipe
            base = cls(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
        return base
    empty: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in given and field.name != "output":
            raise UserError(f"{where}: the field {field.name} is missing: {kind.name} needs it")
        if required:
            empty[field.name] = ""
    return cls(**empty)


@functools.cache
def versions(formats: tuple[str, ...]) -> dict[str, int]:
    """Versions of the formats in this program."""
    places = {
        SHARDS: "pipeline.data.format.constants:VERSION",
        CHECKPOINTS: "pipeline.weights.checkpoints:FORMAT",
    }
    return {name: _load(places[name]) for name in formats}


def task_names(config: Any) -> list[str] | None:
    """Tasks of a transfer config; None if they depend on the data sets that an earlier stage produces."""
    return _load("pipeline.transfer.suites:task_names")(config)


def check_config(kind: Kind, config: Any, where: str) -> None:
    """Runs the checks of the job that do not need its data. Raises UserError."""
    checks = {"pretrain": "pipeline.training.plan:check_values", "transfer": "pipeline.transfer.suites:check_config"}
    try:
        if place := checks.get(kind.name):
            _load(place)(config)
        for field in kind.required:
            if not getattr(config, field):
                raise UserError(f"the field {field} is missing: {kind.name} needs it")
        if kind.name == "prepare":
            _load("pipeline.data.prepare.checks:parse_splits")(config.splits)
            if config.download_only:
                raise UserError(
                    "the field download_only makes archives and no dataset; run jobs/prepare.py for it first"
                )
        if kind.name == "evaluate" and not config.runs and not config.model:
            raise UserError("nothing to evaluate: give the field runs or model")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
