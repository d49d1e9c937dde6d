"""The suites of transfer.

A suite is a function that maps a TransferConfig to tasks; its docstring gives its source. Values are from the paper
(arXiv 2010.11929, table 4 and appendix B.1.1; BiT is arXiv 1912.11370, VTAB arXiv 1910.04867)."""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.address import data_name
from pipeline.config import fingerprint, from_dict, to_dict
from pipeline.errors import StorageError, UserError, nearest, plural
from pipeline.revision_names import manifest_uri
from pipeline.training.config import PretrainConfig
from pipeline.transfer.protocols import L2_GRID, PROBES, FineTune, Head, Probe, Split, TransferTask
from pipeline.vtab.tasks import TABLE as VTAB

if TYPE_CHECKING:
    from pipeline.data.format import Dataset

# {group: tasks} of VTAB, in the order of the paper's Table 9.
VTAB_GROUPS = {
    group: tuple(name for name, task in VTAB.items() if task.group == group)
    for group in ("natural", "specialized", "structured")
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """Evaluation of one checkpoint on the tasks of a suite."""

    suite: str = "demo"
    """Tasks and protocol; --list-recipes describes the suites."""
    checkpoint: str | None = None
    """Checkpoint folder; run folder (uses the last complete checkpoint); weights (.npz, .safetensors, a Hugging Face or
    timm folder) with --variant; a model of another library (timm:NAME, timm:NAME@FILE, hf:FOLDER); or an MLflow URI
    (models:/NAME/VERSION, models:/NAME@ALIAS, runs:/ID/PATH)."""
    data: str | None = None
    """Folder or s3:// prefix with a prepared dataset DATA/TASK for each task, as written by `jobs/prepare.py vtab all`
    or `--splits`."""
    output: str | None = None
    """Folder or s3:// prefix for results, figures and the report. Repeating the command continues unfinished work.
    None: runs/SUITE/transfer-FINGERPRINT."""
    tasks: tuple[str, ...] = ()
    """Tasks to run. None: all tasks of the suite."""
    seeds: int = 1
    """Number of fine-tuning runs per task; the table shows their mean and standard deviation."""

    # Overrides of the protocol of the suite.
    lrs: tuple[float, ...] = ()
    """Learning rates. Several are compared on the development split (VTAB: train800 and val200) before the final
    training."""
    steps: int | None = None
    """Optimiser steps per fine-tuning run. None: that of the suite; the same applies to the next four flags."""
    batch_size: int | None = None
    """Images per step."""
    resolution: int | None = None
    """Input size of the model, in pixels."""
    warmup: int | None = None
    """Warm-up steps of the learning rate."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights, per step, 0 to 1. 0: evaluate the last weights."""

    l2: float = 1024.0
    """L2 strength of few-shot regression, a power of two. 0: the strength with the best mean rank over the tasks, as in
    the paper."""
    real_labels: str | None = None
    """ImageNet's real.json, for the suite `paper`. None: DATA/imagenet/real.json, if it exists."""
    decontamination: str | None = None
    """Pre-training dataset prepared with --decontaminate, its duplicates.parquet, or JSON {task: [keys]}. Adds the
    accuracy without test images that are in the pre-training data."""
    random_encoder: bool | None = None
    """Also run the suite with random weights as a baseline without pre-training. By default only for the suite demo."""
    variant: str | None = None
    """Architecture of weights without a configuration, such as B/16."""
    class_names: str | None = None
    """Names of the checkpoint's classes, for the suite head: a text file with one name per line, or a prepared dataset
    with the same classes in the same order. None: those in the checkpoint."""

    micro_batch: int = 64
    """Images per forward pass, with gradient accumulation. It is halved when GPU memory runs out."""
    compile: bool = False
    """Compile this project's models for fine-tuning on GPUs: faster steps after a longer start of each process."""
    workers: int | None = None
    """Number of worker processes. None: as many as the GPUs (or the CPU cores) allow."""
    gpus_per_worker: float = 1.0
    """GPUs per worker; 0.5 runs two tasks on each GPU. Without GPUs the workers use CPU cores."""
    cpus_per_worker: int = 1
    """CPU cores (and decoding threads) per worker."""
    retries: int = 2
    """Maximum number of restarts of a task after its process died or its data was unavailable."""
    address: str | None = None
    """Ray cluster to join (auto or host:port). None: the cluster of the submitted job, or an embedded Ray."""
    experiment: str = "transfer"
    """Name of the MLflow experiment."""
    tracking_uri: str | None = None
    """MLflow server. None: MLFLOW_TRACKING_URI, or SQLite in the current folder."""

    def fine_tune(self, **suite: Any) -> FineTune:
        """Applies the overrides of this config to a protocol. Fewer steps shorten the warm-up proportionally."""
        protocol = FineTune(**suite)
        steps = self.steps or protocol.steps
        own: dict[str, Any] = {
            "lrs": self.lrs or None,
            "steps": steps,
            "batch_size": self.batch_size,
            "resolution": self.resolution,
            "warmup": round(protocol.warmup * steps / protocol.steps) if self.warmup is None else self.warmup,
            "ema_decay": self.ema_decay,
        }
        return dataclasses.replace(protocol, **{key: value for key, value in own.items() if value is not None})


def _data(config: TransferConfig) -> str:
    if not config.data:
        raise UserError(f"suite {config.suite} needs --data: the folder of prepared datasets")
    return storage.normalise(config.data)


def _dev_split(train: Split, share: float) -> tuple[Split, Split]:
    """(the rest, the dev split) of a training set."""
    return dataclasses.replace(train, part=(share, 1.0)), dataclasses.replace(train, part=(0.0, share))


def _prepared(uri: str) -> bool:
    return storage.exists(manifest_uri(uri))


def _train_and_test(uri: str) -> bool:
    return _prepared(storage.join(uri, "train")) and _prepared(storage.join(uri, "test"))


# ---------------------------------------------------------------- the suites


def demo(config: TransferConfig, model: dict[str, Any]) -> list[TransferTask]:
    """Small tasks on images that are not in the demo's pre-training data (runs/demo/digits): fine-tuning at 1.5x
    resolution, few-shot, linear probe and k-NN. Half a minute on two cores."""
    root = storage.normalise(config.data or "runs/demo/digits")
    train, test = Split(uri=storage.join(root, "train")), Split(uri=storage.join(root, "test"))
    tune, image_size = _dev_split(train, 0.2), model["image_size"]
    tuned = {"steps": 60, "batch_size": 64, "lrs": (0.03,), "warmup": 6, "crop": "squash", "flip": False}
    protocol = config.fine_tune(**{**tuned, "resolution": round(1.5 * image_size)})
    probes = [Probe(kind=kind, resolution=image_size, resize=image_size) for kind in PROBES]
    return [
        TransferTask(name="finetune", train=train, test=test, tune=tune, protocol=protocol),
        *(TransferTask(name=probe.kind, train=train, test=test, protocol=probe) for probe in probes),
    ]


def vtab1k(config: TransferConfig, model: dict[str, Any]) -> list[TransferTask]:
    """VTAB-1k with the protocol of the ViT paper: 19 tasks x 1,000 examples, 384 px, 2,500 steps of 512, SGD 0.01,
    cosine.

    Augmentation is BiT's (squash to 448, random 384 crop, flip, with its exemptions); warm-up 500 steps as in the
    published code. Expected flat means: H/14 JFT 77.63, L/16 JFT 76.28, L/16 ImageNet-21k 72.72.
    """

    def protocol(name: str) -> FineTune:
        crop = "random" if VTAB[name].random_crop else "squash"
        return config.fine_tune(steps=2500, lrs=(0.01,), warmup=500, crop=crop, flip=VTAB[name].flip)

    return _vtab(config, protocol)


def vtab1k_224(config: TransferConfig, model: dict[str, Any]) -> list[TransferTask]:
    """VTAB-1k with the protocol of task_adaptation, which most later papers use: 224 px, no augmentation, 1,000 steps
    of 64, SGD 0.01 with x0.1 at 300, 600 and 900, warm-up 80."""
    protocol = config.fine_tune(
        resolution=224, steps=1000, batch_size=64, lrs=(0.01,), decay="step", warmup=80, crop="squash", flip=False
    )
    return _vtab(config, lambda name: protocol)


def _vtab(config: TransferConfig, protocol: Callable[[str], FineTune]) -> list[TransferTask]:
    root = _data(config)

    def task(name: str, group: str) -> TransferTask:
        uri = storage.join(root, name)
        return TransferTask(
            name=name,
            group=group,
            train=Split(uri=storage.join(uri, "train800val200")),
            test=Split(uri=storage.join(uri, "test")),
            tune=(Split(uri=storage.join(uri, "train800")), Split(uri=storage.join(uri, "val200"))),
            protocol=protocol(name),
        )

    return [task(name, group) for group, names in VTAB_GROUPS.items() for name in names]


def paper(config: TransferConfig, model: dict[str, Any]) -> list[TransferTask]:
    """Table 2 of the paper without VTAB: ImageNet and ReaL, CIFAR-10, CIFAR-100, Pets, Flowers-102.

    Table 4's steps and learning rates, chosen on its dev split (1, 2, 2, 10 and 10% of train). ImageNet at 512 px (518
    for /14) with averaged weights (decay 0.9999); `--resolution 384 --ema-decay 0` gives Table 5.
    DATA/<name>/{train,test}."""
    low, high = (0.001, 0.003, 0.01, 0.03), (0.003, 0.01, 0.03, 0.06)
    root = _data(config)

    def task(name: str, dev: float, **protocol: object) -> TransferTask:
        uri = storage.join(root, name)
        train = Split(uri=storage.join(uri, "train"))
        return TransferTask(
            name=name,
            train=train,
            test=Split(uri=storage.join(uri, "test")),
            tune=_dev_split(train, dev),
            protocol=config.fine_tune(**protocol),
        )

    by_14 = model["variant"].endswith("/14") or model.get("patch_size") == 14
    resolution = 518 if by_14 else 512  # section 4.1: a multiple of the patch
    real = config.real_labels or storage.join(root, "imagenet", "real.json")
    imagenet = task("imagenet", 0.01, steps=20_000, lrs=high, warmup=500, resolution=resolution, ema_decay=0.9999)
    if config.real_labels or storage.exists(real):
        imagenet = dataclasses.replace(imagenet, real_labels=real)
    return [
        imagenet,
        task("cifar10", 0.02, steps=10_000, lrs=low, warmup=500),
        task("cifar100", 0.02, steps=10_000, lrs=low, warmup=500),
        task("pets", 0.1, steps=500, lrs=low, warmup=100),
        task("flowers102", 0.1, steps=500, lrs=low, warmup=100),
    ]


def folder(config: TransferConfig, model: dict[str, Any]) -> list[TransferTask]:
    """Fine-tuning on your own datasets: DATA/{train,test} or DATA/<name>/{train,test}, as written by `prepare
    --splits`.

    The length follows BiT (500 steps below 20,000 examples, 10,000 below 500,000, else 20,000). The learning rate is
    chosen from those of the paper on a tenth of train. 384 px."""

    def task(name: str, uri: str) -> TransferTask:
        train = Split(uri=storage.join(uri, "train"))
        examples = len(train.open())
        steps = 500 if examples < 20_000 else 10_000 if examples < 500_000 else 20_000
        return TransferTask(
            name=name,
            train=train,
            test=Split(uri=storage.join(uri, "test")),
            tune=_dev_split(train, 0.1),
            protocol=config.fine_tune(steps=steps, lrs=(0.001, 0.003, 0.01, 0.03), warmup=steps // 20),
        )

    return [task(name, uri) for name, uri in _own_datasets(config)]


def frozen(config: TransferConfig, model: dict[str, Any]) -> list[TransferTask]:
    """No fine-tuning: 1, 5, 10 and 25-shot ridge regression, linear probe and k-NN on the features of every dataset.

    DATA/{train,test}, DATA/<name>/{train,test}, or VTAB tasks. The few-shot evaluation is the paper's (section 4.1):
    images squashed to 256, centre crop 224 (in proportion for another --resolution).
    """
    size = config.resolution or model["image_size"]
    tasks = []
    for name, uri in _own_datasets(config):
        train = Split(uri=storage.join(uri, "train" if _train_and_test(uri) else "train800val200"))
        test = Split(uri=storage.join(uri, "test"))
        for kind in PROBES:
            probe = Probe(kind=kind, resolution=size, resize=round(size * 256 / 224))
            tasks.append(TransferTask(name=f"{name}-{kind}", train=train, test=test, protocol=probe))
    return tasks


def head(config: TransferConfig, model: dict[str, Any]) -> list[TransferTask]:
    """No training: top-1, top-5 and loss of the checkpoint's own classifier on labelled datasets, as in the validation
    of its training (resolution, preprocessing, precision). Classes are matched by name.

    DATA itself, DATA/test or DATA/val, or such datasets DATA/<name>. --resolution interpolates position embeddings.
    """
    trained = from_dict(PretrainConfig, model["pretrain"], "pretrain in config.json") if model.get("pretrain") else None
    view = (trained or PretrainConfig(image_size=model["image_size"])).evaluation_view
    size = config.resolution or view.size
    protocol = Head(
        resolution=size,
        resize=round((view.resize or view.size) * size / view.size),
        loss="sigmoid" if trained is not None and trained.loss == "sigmoid" else "softmax",
        precision=trained.engine.precision if trained is not None else "fp32",
        classes=fingerprint(list(model["classes"])) if model.get("classes") else "",
    )
    return [TransferTask(name=name, test=Split(uri=uri), protocol=protocol) for name, uri in _labelled_datasets(config)]


def _labelled_datasets(config: TransferConfig) -> list[tuple[str, str]]:
    """(name, dataset) of DATA, of its test or validation split, or of each folder in DATA with one of these."""
    root = _data(config)

    def find(folder: str) -> str | None:
        places = (folder, *(storage.join(folder, split) for split in ("test", "val", "validation")))
        return next((place for place in places if _prepared(place)), None)

    if place := find(root):
        return [(root.rsplit("/", 1)[-1], place)]
    found = [(name, find(storage.join(root, name))) for name in storage.list_folders(root)]
    datasets = [(name, place) for name, place in found if place]
    if not datasets:
        raise UserError(
            f"{root}: no prepared dataset; expected {root}/manifest.json, {root}/test, {root}/val, or these in {root}/<name>"
        )
    return datasets


def _own_datasets(config: TransferConfig) -> list[tuple[str, str]]:
    """(name, folder) of all datasets under --data with both a train and a test split. runs/photos/data is called photos."""
    root = _data(config)
    if _train_and_test(root):
        return [(data_name(root), root)]
    found = [
        (name, storage.join(root, name))
        for name in storage.list_folders(root)
        if _train_and_test(storage.join(root, name)) or (config.suite == "frozen" and name in VTAB)
    ]
    if not found:
        raise UserError(f"{root}: no dataset with train and test; expected {root}/train or {root}/<name>/train")
    return found


SUITES: dict[str, Callable[[TransferConfig, dict[str, Any]], list[TransferTask]]] = {
    "demo": demo,
    "vtab1k": vtab1k,
    "vtab1k-224": vtab1k_224,
    "paper": paper,
    "folder": folder,
    "frozen": frozen,
    "head": head,
}
NOMINAL = {"variant": "B/16", "image_size": 224}
"""A placeholder model configuration, for the data sets of a suite, which do not depend on the model."""
NAMED_TASKS = ("demo", "vtab1k", "vtab1k-224", "paper")
"""Suites whose task names do not depend on the data."""


def check_config(config: TransferConfig) -> None:
    """Raises UserError for an unknown suite or invalid settings."""
    if config.suite not in SUITES:
        raise UserError(f'unknown suite "{config.suite}"{nearest(config.suite, SUITES)}; suites: {", ".join(SUITES)}')
    for name in ("steps", "batch_size", "resolution", "seeds", "micro_batch", "workers", "cpus_per_worker"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not 0 < config.gpus_per_worker <= 1:
        raise UserError(f"--gpus-per-worker must be above 0 and at most 1, not {config.gpus_per_worker:g}")
    for name in ("retries", "warmup"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UserError(f"--{name} must be at least 0, not {value}")
    if not all(0 < lr < math.inf for lr in config.lrs):
        raise UserError(f"--lrs must be positive, not {' '.join(f'{lr:g}' for lr in config.lrs)}")
    if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
        raise UserError(f"--ema-decay must be in [0, 1), not {config.ema_decay:g}")
    if config.l2 and config.l2 not in L2_GRID:
        raise UserError(f"--l2 {config.l2:g} is not a power of two from 2^-10 to 2^19; 0 chooses by mean rank")
    if config.tasks and config.suite in NAMED_TASKS:
        build_tasks(dataclasses.replace(config, data="-", real_labels="-"), NOMINAL)


def task_names(config: TransferConfig) -> list[str] | None:
    """Names of the tasks of a config; None for a suite whose tasks depend on the data."""
    if config.tasks or config.suite not in NAMED_TASKS:
        return list(config.tasks) or None
    nominal = {"variant": "B/16", "image_size": 224}
    return [task.name for task in build_tasks(dataclasses.replace(config, data="-", real_labels="-"), nominal)]


def suite_version(config: TransferConfig) -> str:
    """Identifies the measurement: settings and content of the data, but not locations or execution settings.

    Uses the fingerprint of a dataset and the checksum of a file, or the URI if it cannot be read.
    """
    elsewhere = {
        *("checkpoint", "output", "micro_batch", "compile", "workers", "gpus_per_worker", "cpus_per_worker", "retries"),
        *("address", "experiment", "tracking_uri", "data", "real_labels", "decontamination"),
        *("variant", "random_encoder", "class_names"),
    }
    settings = {key: value for key, value in to_dict(config).items() if key not in elsewhere}
    files = {name: _content(getattr(config, name)) for name in ("real_labels", "decontamination", "class_names")}
    try:
        content: object = {
            task.name: [_content(split.uri) for split in (*task.splits.values(), *(task.tune or ()))]
            for task in build_tasks(config, NOMINAL)
        }
    except StorageError:  # an outage must not change the version of the suite
        raise
    except (UserError, OSError):
        content = config.data
    return fingerprint([settings, files, content])


def find_datasets(config: TransferConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(task.role, URI, manifest) of the readable datasets of a suite."""
    with contextlib.suppress(UserError, OSError):
        for task in build_tasks(config, NOMINAL):
            for role, split in task.splits.items():
                with contextlib.suppress(UserError, OSError):
                    yield f"{task.name}.{role}", split.uri, storage.read_json(manifest_uri(split.uri))


def _content(uri: str | None) -> str | None:
    """The fingerprint of a dataset, the checksum of a file, or the URI if it cannot be read."""
    if not uri:
        return None
    try:
        manifest = manifest_uri(uri)
        if storage.exists(manifest):
            return str(storage.read_json(manifest)["fingerprint"])
        return hashlib.sha256(storage.read_bytes(uri)).hexdigest()
    except StorageError:
        raise
    except (UserError, OSError, KeyError, TypeError):
        return storage.normalise(uri)


def build_tasks(config: TransferConfig, model: dict[str, Any]) -> list[TransferTask]:
    """The tasks of a config for a model with this configuration. Raises UserError for an unknown task."""
    tasks = SUITES[config.suite](config, model)
    names = [task.name for task in tasks]
    for name in config.tasks:
        if name not in names:
            raise UserError(
                f'suite {config.suite} has no task "{name}"{nearest(name, names)}; tasks: {", ".join(names)}'
            )
    return [task for task in tasks if not config.tasks or task.name in config.tasks]


def open_datasets(tasks: Sequence[TransferTask]) -> dict[Split, "Dataset"]:
    """Opens all datasets of the tasks. Raises a UserError that names all tasks with missing or unusable data."""
    datasets: dict[Split, Dataset] = {}
    problems: dict[str, str] = {}
    for task in tasks:
        swept = isinstance(task.protocol, FineTune) and len(task.protocol.lrs) > 1
        for split in (*task.splits.values(), *((task.tune or ()) if swept else ())):
            try:
                if split not in datasets:
                    datasets[split] = split.open()
                    datasets[split].check_shards()
            except StorageError:
                raise
            except UserError as error:
                problems.setdefault(task.name, str(error))
        if task.name not in problems and (problem := _problem(task, datasets, swept)):
            problems[task.name] = problem
    check_problems(problems, tasks)
    return datasets


def check_problems(problems: Mapping[str, str], tasks: Sequence[TransferTask]) -> None:
    """Raises a UserError that lists all problems, if there are any. problems: {task: problem}."""
    if problems:
        lines = "".join(f"\n  {name}: {problem}" for name, problem in problems.items())
        raise UserError(
            f"{len(problems)} of {plural(len(tasks), 'task')} cannot run:{lines}\n"
            "prepare the missing data, or select other tasks with --tasks"
        )


def _problem(task: TransferTask, datasets: "Mapping[Split, Dataset]", swept: bool) -> str | None:
    """Why a task cannot run on its opened datasets. swept: it compares learning rates."""
    found = [datasets[split] for split in task.splits.values()]
    if task.train is not None:
        train, test = found
        if list(train.classes) != list(test.classes):
            return f"{task.train.uri} and {task.test.uri} have different classes"
        if train.multilabel or not train.classes:
            return f"{task.train.uri}: transfer needs exactly one label per training image"
    if any(d.encoding == "patches" and task.protocol.resolution % d.manifest.image["patch_size"] for d in found):
        return f"resolution {task.protocol.resolution} is not a multiple of the stored patch size"
    if swept and not task.tune:
        return "this task has no dev split for choosing a learning rate; give one value to --lrs"
    return None
