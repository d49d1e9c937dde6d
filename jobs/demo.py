"""Run the whole pipeline on small data, in a few minutes on a laptop: prepare, pretrain, transfer.

    python jobs/demo.py                          scikit-learn's digits
    python jobs/demo.py --data photos/           your own class folders
    python jobs/demo.py --data photos/ --fresh   the same from the start

Calls the same functions as jobs/prepare.py, jobs/pretrain.py and jobs/transfer.py, with two training workers, an embedded Ray,
ZeRO-1 on gloo, and MLflow on SQLite. A demo that was stopped continues when it is started again.
"""

import re
import time
from dataclasses import dataclass, replace

from pipeline import cluster, storage
from pipeline.config import fingerprint, parse, run_job
from pipeline.data.format import Manifest
from pipeline.data.prepare import RECIPES as PREPARE
from pipeline.training.config import PretrainConfig
from pipeline.training.recipes import RECIPES as PRETRAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    data: str | None = None
    """Your own images: a folder of class folders, local or s3://. None: handwritten digits."""
    output: str | None = None
    """Folder for everything that the demo makes. None: runs/demo, or runs/demo-NAME for your own images."""
    sample: int = 3000
    """Largest number of your images to use."""
    steps: int | None = None
    """Number of pre-training steps. None: as the demo recipe says."""
    fresh: bool = False
    """First remove what an earlier demo left in the output folder."""


def demo() -> DemoConfig:
    """Two training workers, three to five minutes on two cores."""
    return DemoConfig()


def main(argv: list[str]) -> int:
    config = parse(argv, {"demo": demo}, "demo", prog="jobs/demo.py", description=__doc__ or "")
    from pipeline.tracking import names, resolve_tracking_uri
    from pipeline.training import run
    from pipeline.transfer import TransferConfig, run_suite

    start = time.perf_counter()
    output = storage.normalise(config.output or _default_output(config.data))
    if config.fresh:
        storage.remove(output, recursive=True)
    data = storage.join(output, "data")
    cluster.configure(num_cpus=2)
    connect = cluster.connect

    _title("prepare")
    manifests = _prepare(config, data)
    prepared = sum(manifest.rows for manifest in manifests.values())
    shards = sum(len(manifest.shards) for manifest in manifests.values())
    rejects = sum(sum(manifest.rejects.values()) for manifest in manifests.values())
    if (classes := len(manifests["train"].classes)) > prepared / 5:
        print(
            f"note: {prepared} images of {classes} classes show that everything works; they are too few to learn from"
        )

    _title("pretrain")
    training = _training(config, data, output, manifests["train"].rows)
    trained = run.pretrain(training, recipe="demo")
    if "images" in trained:
        print(run.summarize(trained))

    _title("transfer")
    suite = TransferConfig(
        suite="demo", checkpoint=trained["checkpoint"], data=data, output=storage.join(output, "transfer"), workers=2
    )
    connect()
    scores = run_suite(suite)

    top1, loss_first, loss_last = trained[names.VAL_TOP1], trained["loss_first"], trained["loss_last"]
    _title("result")
    print(f"{'pre-trained, held-out images':32s}{100 * top1:7.2f}")
    for name, score in scores.scores.items():
        print(f"{f'transfer {name}':32s}{score:7.2f}")
    print("(top-1 accuracy, %)\n")
    print(f"demo: prepared={prepared} shards={shards} rejects={rejects}")
    print(f"demo: loss_first={loss_first:.4f} loss_last={loss_last:.4f} top1={top1:.4f}")
    print("demo: transfer " + " ".join(f"{name}={score / 100:.4f}" for name, score in scores.scores.items()))
    print(f"demo: seconds={time.perf_counter() - start:.1f}")
    print(f"\nCompare the runs in the MLflow UI: make ui, then open http://127.0.0.1:5000  ({resolve_tracking_uri()})")
    return 1 if scores.failures else 0


def _prepare(config: DemoConfig, output: str) -> dict[str, Manifest]:
    """The manifests of train and test. Folders of these names in the user's data are the splits; else a fifth is held out."""
    from pipeline.data.prepare import prepare

    digits = replace(PREPARE["demo"](), output=output)
    if not config.data:
        return prepare(digits)
    source = storage.normalise(config.data)
    images = replace(digits, source=(source,), size=40, sample=config.sample)
    filesystem, path = storage.filesystem(source)
    folders = (
        {name.rstrip("/").rpartition("/")[2] for name in filesystem.ls(path, detail=False)}
        if filesystem.isdir(path)
        else set()
    )
    held_out = next((name for name in ("test", "val", "validation") if name in folders), None)
    if "train" not in folders or held_out is None:
        return prepare(images)
    manifests = {}
    for split, folder, sample in (("train", "train", 4 * config.sample // 5), ("test", held_out, config.sample // 5)):
        part = replace(images, source=(storage.join(source, folder),), output=storage.join(output, split), splits=())
        (manifests[split],) = prepare(replace(part, sample=sample)).values()
    return manifests


def _training(config: DemoConfig, data: str, output: str, rows: int) -> PretrainConfig:
    """The demo recipe on what was prepared; for the user's own images with flips, larger crops and 400 steps."""
    training = PRETRAIN["demo"]()
    places = {"data": storage.join(data, "train"), "validation": storage.join(data, "test")}
    runtime = replace(training.runtime, **places, output=storage.join(output, "pretrain"))
    training = replace(training, runtime=runtime)
    if config.data:
        augment = replace(training.augment, flip=True, area=(0.3, 1.0))
        batch = min(training.batch_size, 2 ** (rows.bit_length() - 1))
        training = replace(training, validation_resize=None, augment=augment, steps="400steps", batch_size=batch)
    return replace(training, steps=f"{config.steps}steps") if config.steps else training


def _default_output(data: str | None) -> str:
    """runs/demo, or a folder of its own for each source."""
    if data is None:
        return "runs/demo"
    name = re.sub(r"[^\w.-]+", "-", data.rstrip("/").rpartition("/")[2]) or "data"
    return f"runs/demo-{name}-{fingerprint(storage.normalise(data))[:6]}"


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    run_job(main)
