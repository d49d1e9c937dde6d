"""Reads pipeline files: YAML, or a Python function that returns a `Pipeline`."""

import json
import math
import os
import re
import runpy
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from pipeline import config as configuration
from pipeline import credentials, storage
from pipeline.errors import UserError
from pipeline.hardware import find_gpu

MAX_BYTES = 1 << 20  # in a pipeline file; larger files are refused before parsing
MAX_VALUES = 100_000  # in a pipeline file, with expanded aliases
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
RESERVED = ("pipeline", "matrix", "promote")
PROMOTE = "promote"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Resources of a running stage."""

    cpus: float | None = None
    """CPU cores; default: from the fields of the job (workers, cpus_per_worker, num_cpus), otherwise the whole
    machine."""
    gpus: float | None = None
    """GPUs; default: from the fields of the job."""
    memory: float | None = None
    """Memory request of the entry point on a cluster, in GB; default 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One job of this project with its fields. `${STAGE.output}` in a field stands for another stage's output."""

    job: str
    """prepare, vtab, pretrain, transfer, evaluate, export, visualize or compare."""
    recipe: str | None = None
    """Recipe of the job (for transfer: the suite), which the fields override."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the job by their dotted names, or nested."""
    matrix: dict[str, list[Any]] = field(default_factory=dict)
    """Values of a field, or of `recipe`, by its name: one instance of the stage for every combination."""
    after: list[str] = field(default_factory=list)
    """Stages that have to finish first, in addition to those that fields refer to."""
    retries: int | None = None
    """Number of retries of a failed attempt; default: that of the pipeline."""
    resources: Resources = field(default_factory=Resources)
    """Resources of the stage, if the fields of the job do not determine them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """The promotion rule for the champion of the pipeline's registered model."""

    over: list[str]
    """Transfer stages whose scores count; those of one checkpoint are averaged."""
    metric: str = "mean"
    """mean, or the name of a task in percent."""
    at_least: float | None = None
    """Minimum score for promotion."""
    no_worse_than: Literal["champion"] | None = None
    """champion: do not promote a score below that of the current champion on the same suite."""
    margin: float = 0.0
    """Allowed difference below the score of the champion, in standard errors of the difference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """For the cost of stages, in dollars."""

    cpu_hour: float | None = None
    gpu_hour: float | None = None
    gpu: str = "h100"
    """The GPU that estimates assume, as jobs/plan.py names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """A pipeline: its named stages and settings."""

    name: str
    """Name of the pipeline, of its MLflow run and of its registered model."""
    output: str = ""
    """Folder, local or s3://, of state and outputs; default runs/NAME."""
    stages: dict[str, Stage] = field(default_factory=dict)
    """{name: stage}, in any order."""
    promote: Promotion | None = None
    """Rule for the registered model."""
    retries: int = 1
    """Number of retries of a failed attempt of a stage."""
    parallel: int = 16
    """Maximum number of concurrent stages."""
    prices: Prices = field(default_factory=Prices)
    """For costs in dollars."""
    tracking_uri: str | None = None
    """MLflow server of all stages; default MLFLOW_TRACKING_URI, or SQLite in this folder."""

    @property
    def root(self) -> str:
        """The absolute address of `output`."""
        return storage.normalise(self.output or f"runs/{self.name}")


def load(place: str) -> Pipeline:
    """Loads a pipeline from a .yaml file, or from the function `pipeline` of a .py file. Raises UserError that names the
    invalid key."""
    if place.endswith(".py"):
        return _load_python(place)
    try:
        data = storage.read_bytes(place, 0, MAX_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{place}: no such pipeline file") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{place}: a pipeline file has at most {MAX_BYTES} bytes")
    return from_dict(_read_yaml(data, place), place)


def _read_yaml(data: bytes, place: str) -> Any:
    """The plain values of a YAML document. Raises UserError with the line number."""
    try:
        return credentials.take_from_values(yaml.load(data.decode("utf-8-sig"), Loader=_Strict), place)
    except UserError:
        raise
    except _NotStrict as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{place}{line}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{place}: not valid YAML: {configuration.yaml_problem(error)}") from None


def _load_python(place: str) -> Pipeline:
    if not os.path.isfile(place):
        raise UserError(f"{place}: no such pipeline file")
    try:
        made = runpy.run_path(place).get("pipeline")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place}: the Python file fails ({type(error).__name__}: {error})") from error
    made = made() if callable(made) else made
    if not isinstance(made, Pipeline):
        raise UserError(f"{place}: has no function `pipeline` that returns a pipeline.graph.file.Pipeline")
    return from_dict(configuration.to_dict(made), place)  # dataclasses do not check types


def from_dict(values: Any, where: str = "pipeline") -> Pipeline:
    """Builds a pipeline from plain values. Raises UserError that names an unknown key and the nearest valid one."""
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: a pipeline has the keys name, output and stages; found {configuration.shown(values) if isinstance(values, (dict, list)) else type(values).__name__}"
        )
    for key in ("name", "stages"):
        if not values.get(key):
            raise UserError(f"{where}: the key {key} is missing")
    for name, stage in values["stages"].items() if isinstance(values["stages"], dict) else ():
        if isinstance(stage, dict) and "job" not in stage:
            raise UserError(f"{where}.stages.{name}: the key job is missing")
    if isinstance(values.get("promote"), dict):
        over = values["promote"].get("over")
        if not over:
            raise UserError(f"{where}.promote: the key over is missing: the transfer stages whose scores count")
        values = {**values, "promote": {**values["promote"], "over": [over] if isinstance(over, str) else over}}
    return check_pipeline(configuration.from_dict(Pipeline, values, where), where)


def check_pipeline(pipeline: Pipeline, where: str) -> Pipeline:
    """Validates a pipeline. Raises UserError for invalid names and numbers."""
    for name in (pipeline.name, *pipeline.stages):
        if not NAME.fullmatch(name):
            raise UserError(
                f"{where}: invalid name {json.dumps(name)}: use a letter, then letters, digits, - and _, at most 63 in all"
            )
    for name in RESERVED:
        if name in pipeline.stages:
            raise UserError(f'{where}: the stage name "{name}" is reserved for references; choose another')
    if not pipeline.stages:
        raise UserError(f"{where}: has no stages")
    if pipeline.parallel < 1:
        raise UserError(f"{where}: parallel {pipeline.parallel} must be at least 1")
    for key, value in _numbers(pipeline).items():
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"{where}: {key} {value} must be a number of at least 0")
    try:
        find_gpu(pipeline.prices.gpu)
    except UserError as error:
        raise UserError(f"{where}: prices.gpu: {error}") from error
    return pipeline


def _numbers(pipeline: Pipeline) -> dict[str, float | None]:
    """{key: value} of the numbers that must not be negative."""
    found: dict[str, float | None] = {"retries": pipeline.retries}
    found |= {"prices.cpu_hour": pipeline.prices.cpu_hour, "prices.gpu_hour": pipeline.prices.gpu_hour}
    for name, stage in pipeline.stages.items():
        found[f"stages.{name}.retries"] = stage.retries
        for key in ("cpus", "gpus", "memory"):
            found[f"stages.{name}.resources.{key}"] = getattr(stage.resources, key)
    if pipeline.promote is not None:
        found |= {"promote.margin": pipeline.promote.margin, "promote.at_least": pipeline.promote.at_least}
    return found


def to_yaml(pipeline: Pipeline) -> str:
    """The YAML file of a pipeline, without values that equal their defaults."""
    plain = configuration.to_dict(pipeline)
    defaults = configuration.to_dict(Pipeline(name="", stages={}))
    kept = {key: value for key, value in plain.items() if value != defaults[key]}
    empty = configuration.to_dict(Stage(job=""))
    kept["stages"] = {
        name: {key: value for key, value in stage.items() if value != empty[key]}
        for name, stage in plain["stages"].items()
    }
    return yaml.safe_dump(kept, sort_keys=False, width=110)


class _NotStrict(yaml.constructor.ConstructorError):
    """A document that is YAML, but not that of a pipeline. Its `problem` names at most one key."""


class _Strict(yaml.SafeLoader):
    """YAML loader for pipeline files.

    Duplicate keys are errors, because the first stage of that name would be silently lost; so are keys that YAML does
    not parse as strings (yes, 1, 2026-01-01). The limit on values counts expanded aliases, because a few lines can
    expand to billions."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                text = f'"{key.value:.40}"' if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                remedy = "; put it in quotes" if isinstance(key, yaml.ScalarNode) else ""
                raise _NotStrict(
                    None, None, f"a key must be a string, and YAML does not parse {text} as one{remedy}", key.start_mark
                )
            if key.value in seen:
                raise _NotStrict(None, None, f'the key "{key.value:.40}" is given twice', key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values in a node with expanded aliases. known: counts by id; 0 while a node is being counted.

    Raises ConstructorError above `MAX_VALUES`, and for a node that contains itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if known[id(node)] == 0:
            raise _NotStrict(None, None, "an alias refers to a node that contains it", node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    count = 1
    for child in children:
        count += _count(child, known)
        if count > MAX_VALUES:
            problem = f"more than {MAX_VALUES:,} values with expanded aliases"
            raise _NotStrict(None, None, problem, node.start_mark)
    known[id(node)] = count
    return count
