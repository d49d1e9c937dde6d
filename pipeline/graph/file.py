"""The pipeline file as data: YAML, or a Python function that returns a `Pipeline`."""

import os
import re
import runpy
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from pipeline import config as configuration
from pipeline import credentials, storage
from pipeline.errors import UserError

MOST_BYTES = 1 << 20  # of a pipeline file: larger ones are refused before they are parsed
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
RESERVED = ("pipeline", "matrix", "promote")
PROMOTE = "promote"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a stage occupies while it runs."""

    cpus: float | None = None
    """CPU cores; default: what the job's own fields say (workers, cpus_per_worker, num_cpus), else all of the machine."""
    gpus: float | None = None
    """GPUs; default: what the job's own fields say."""
    memory: float | None = None
    """GB that the stage's entry point asks for on a cluster; default 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One job of this project with its fields. `${STAGE.output}` in a field stands for another stage's output."""

    job: str
    """prepare, vtab, pretrain, transfer, evaluate, export, visualize or compare."""
    recipe: str | None = None
    """Recipe of the job that the fields are laid over; of transfer: the suite."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the job by their dotted names, or nested."""
    matrix: dict[str, list[Any]] = field(default_factory=dict)
    """Values of a field, or of `recipe`, by its name: one instance of the stage for every combination."""
    after: list[str] = field(default_factory=list)
    """Stages that have to be done first, beyond those that fields refer to."""
    retries: int | None = None
    """How often a failed attempt is tried again; default: the pipeline's."""
    resources: Resources = field(default_factory=Resources)
    """What the stage occupies, where the job's own fields do not say it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """The rule by which a checkpoint becomes the champion of the pipeline's registered model."""

    over: list[str]
    """Transfer stages whose scores count; those of one checkpoint are averaged."""
    metric: str = "mean"
    """mean, or the name of a task in percent."""
    at_least: float | None = None
    """A smaller score is not promoted."""
    no_worse_than: Literal["champion"] | None = None
    """champion: a score below the present champion's, measured in the same way, is not promoted."""
    margin: float = 0.0
    """How many standard errors of the difference a score may be below the champion's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """For the cost of stages, in dollars."""

    cpu_hour: float | None = None
    gpu_hour: float | None = None
    gpu: str = "h100"
    """The GPU that estimates assume, as jobs/plan.py names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """Named stages, and where everything about them is kept."""

    name: str
    """Name of the pipeline, of its MLflow run and of its registered model."""
    output: str = ""
    """Folder, local or s3://, of state and outputs; default runs/NAME."""
    stages: dict[str, Stage] = field(default_factory=dict)
    """{name: stage}, in any order."""
    promote: Promotion | None = None
    """Rule for the registered model."""
    retries: int = 1
    """How often a failed attempt of a stage is tried again."""
    parallel: int = 16
    """Stages that run at the same time, at most."""
    prices: Prices = field(default_factory=Prices)
    """For costs in dollars."""
    tracking_uri: str | None = None
    """MLflow server of all stages; default MLFLOW_TRACKING_URI, or SQLite in this folder."""

    @property
    def root(self) -> str:
        """The absolute address of `output`."""
        return storage.normalise(self.output or f"runs/{self.name}")


def load(place: str) -> Pipeline:
    """The pipeline that a .yaml file, or the function `pipeline` of a .py file, describes. Raises UserError naming the key."""
    if place.endswith(".py"):
        return _load_python(place)
    try:
        data = storage.read_bytes(place)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{place}: no such pipeline file") from error
    if len(data) > MOST_BYTES:
        raise UserError(f"{place}: {len(data)} bytes are too many for a pipeline file (at most {MOST_BYTES})")
    try:
        text = data.decode()
        values = yaml.load(credentials.take_from_yaml(text), Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{place}: not valid YAML ({' '.join(str(error).split())})") from error
    return from_dict(values, place)


def _load_python(place: str) -> Pipeline:
    if not os.path.isfile(place):
        raise UserError(f"{place}: no such pipeline file")
    try:
        made = runpy.run_path(place).get("pipeline")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place}: fails as a Python file ({type(error).__name__}: {error})") from error
    made = made() if callable(made) else made
    if not isinstance(made, Pipeline):
        raise UserError(f"{place}: has no function `pipeline` that returns a pipeline.graph.file.Pipeline")
    return check(made, place)


def from_dict(values: Any, where: str = "pipeline") -> Pipeline:
    """The pipeline of plain values. Raises UserError naming an unknown key and the nearest valid one."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: a pipeline has the keys name, output and stages; found {values!r:.60}")
    for key in ("name", "stages"):
        if not values.get(key):
            raise UserError(f"{where}: the key {key} is missing")
    for name, stage in values["stages"].items() if isinstance(values["stages"], dict) else ():
        if isinstance(stage, dict) and "job" not in stage:
            raise UserError(f"{where}.stages.{name}: the key job is missing: which job the stage is")
    if isinstance(values.get("promote"), dict):
        over = values["promote"].get("over")
        if not over:
            raise UserError(f"{where}.promote: the key over is missing: the transfer stages whose scores count")
        values = {**values, "promote": {**values["promote"], "over": [over] if isinstance(over, str) else over}}
    return check(configuration.from_dict(Pipeline, values, where), where)


def check(pipeline: Pipeline, where: str) -> Pipeline:
    """The pipeline itself. Raises UserError for names and numbers that cannot be."""
    for name in (pipeline.name, *pipeline.stages):
        if not NAME.fullmatch(name):
            raise UserError(f'{where}: the name "{name}" is not letters, digits, - and _ (at most 63, a letter first)')
    for name in RESERVED:
        if name in pipeline.stages:
            raise UserError(f'{where}: no stage may be called "{name}", which has a meaning in references')
    if not pipeline.stages:
        raise UserError(f"{where}: has no stages")
    counts = {"retries": pipeline.retries} | {f"stages.{n}.retries": s.retries for n, s in pipeline.stages.items()}
    for key, value in counts.items():
        if value is not None and value < 0:
            raise UserError(f"{where}: {key} {value} must be at least 0")
    if pipeline.parallel < 1:
        raise UserError(f"{where}: parallel {pipeline.parallel} must be at least 1")
    return pipeline


def to_yaml(pipeline: Pipeline) -> str:
    """The file of a pipeline that a Python function made, without what has its default."""
    plain = configuration.to_dict(pipeline)
    defaults = configuration.to_dict(Pipeline(name="", stages={}))
    kept = {key: value for key, value in plain.items() if value != defaults[key]}
    empty = configuration.to_dict(Stage(job=""))
    kept["stages"] = {
        name: {key: value for key, value in stage.items() if value != empty[key]}
        for name, stage in plain["stages"].items()
    }
    return yaml.safe_dump(kept, sort_keys=False, width=110)


class _UniqueKeys(yaml.SafeLoader):
    """YAML with an error for a key that stands twice: the first stage of that name would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                name = self.construct_object(key, deep=True)
                if isinstance(name, str) and name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f'the key "{name}" stands twice', key.start_mark
                    )
                seen.add(name if isinstance(name, str) else repr(name))
        return super().construct_mapping(node, deep)
