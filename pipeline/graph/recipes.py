"""Pipelines as Python functions for `jobs/pipeline.py --recipe NAME`. Their parameters are flags."""

import contextlib
import re
from collections.abc import Callable

from pipeline import storage
from pipeline.config import fingerprint
from pipeline.errors import UserError
from pipeline.graph.file import Pipeline, Promotion, Stage

PREFERRED = ("test", "val", "validation")  # held-out splits


def demo(data: str | None = None, output: str | None = None, sample: int = 3000, steps: int | None = None) -> Pipeline:
    """All stages on small data, a few minutes on two cores: printed letters, or your own class folders.

    The transfer tasks use data that the pre-training does not see: handwritten digits, or two fifths of your classes.

    data: folder of class folders, local or s3://. output: default runs/demo, or one folder per value of data. sample:
    maximum number of your images. steps: number of pre-training steps.
    """
    root = storage.normalise(output or _default_output(data))
    train, test = "${data.output}/train", "${data.output}/test"
    stages: dict[str, Stage] = {}
    training: dict[str, object] = {}
    folder = "${data.output}"
    if data is None:
        for name, recipe in (("data", "demo"), ("digits", "demo_digits")):  # side by side on two CPUs
            stages[name] = Stage(job="prepare", recipe=recipe, fields={"output": f"{root}/{name}", "num_cpus": 1})
        folder = "${digits.output}"
    else:
        source = storage.normalise(data)
        fields = {"source": [source], "size": 40, "sample": sample}
        splits = _splits(source)
        seen, unseen = hold_out_classes(f"{splits[0]}/{splits[1]}" if splits else source) or ([], [])
        parts = {"data": seen, **({"unseen": unseen} if unseen else {})}
        if splits is None:
            for part, classes in parts.items():
                own: dict[str, object] = {"include": classes, "output": f"{root}/{part}"}
                stages[part] = Stage(job="prepare", recipe="demo", fields={**fields, **own})
            folder = f"${{{list(parts)[-1]}.output}}"
        else:
            folder = f"{root}/{list(parts)[-1]}"
            for part, classes in parts.items():
                for split, name, share in (("train", splits[1], 4 * sample // 5), ("test", splits[2], sample // 5)):
                    own = {"source": [f"{splits[0]}/{name}"], "sample": share, "splits": [], "include": classes}
                    stage = split if part == "data" else f"{part}_{split}"
                    own["output"] = f"{root}/{part}/{split}"
                    stages[stage] = Stage(job="prepare", recipe="demo", fields={**fields, **own})
            train, test = "${train.output}", "${test.output}"
        files = len(storage.list_files(source)) or sample  # the number of images in an archive is unknown
        rows = max(2, int(0.7 * min(sample, files)))
        training = {
            "validation_resize": None,
            "augment.flip": True,
            "augment.area": [0.3, 1.0],
            "steps": "400steps",
            "batch_size": min(64, 2 ** (rows.bit_length() - 1)),
        }
    if steps:
        training["steps"] = f"{steps}steps"
    places = {"data": train, "validation": test, "output": f"{root}/pretrain"}
    stages["pretrain"] = Stage(job="pretrain", recipe="demo", fields={**places, **training})
    tasks = {"checkpoint": "${pretrain.output}", "data": folder, "workers": 2, "output": f"{root}/transfer"}
    stages["transfer"] = Stage(job="transfer", recipe="demo", fields=tasks)
    return Pipeline(
        name="demo", output=root, stages=stages, promote=Promotion(over=["transfer"], no_worse_than="champion")
    )


def hold_out_classes(source: str) -> tuple[list[str], list[str]] | None:
    """Splits class folders into (classes for pre-training, two fifths for transfer), as globs for `--include`.

    None if the source has fewer than five class folders.
    """
    names = sorted(storage.list_folders(source))
    if len(names) < 5:
        return None
    globs = ["".join(f"[{c}]" if c in "*?[" else c for c in name) + "/*" for name in names]
    unseen = [glob for i, glob in enumerate(globs) if i % 5 in (2, 4)]
    return [glob for glob in globs if glob not in unseen], unseen


def _default_output(data: str | None) -> str:
    """runs/demo, or a separate folder for each source."""
    if data is None:
        return "runs/demo"
    name = re.sub(r"[^\w.-]+", "-", data.rstrip("/").rpartition("/")[2]) or "data"
    return f"runs/demo-{name}-{fingerprint(storage.normalise(data))[:6]}"


def _splits(source: str) -> tuple[str, str, str] | None:
    """(folder of the splits, training folder in it, labelled held-out folder in it); None if the folders of the source are
    classes. The splits may have other names, as in Training and Testing, and lie deeper, as in images/train."""
    from pipeline.data import sources  # late: --help does not need its libraries
    from pipeline.data.sources.layout import split_folders, split_of_folder, visible_folders
    from pipeline.data.sources.words import TRAIN

    folder, names = source, visible_folders(source)
    while not (found := split_folders(names)) and len(names) == 1:
        folder = f"{folder}/{names[0]}"
        names = visible_folders(folder)
    train = next((name for name, split in found.items() if split in TRAIN), None)
    held_out = [name for name, split in found.items() if split not in TRAIN]
    if train is None or not held_out:
        return None
    held_out.sort(key=lambda name: PREFERRED.index(found[name]) if found[name] in PREFERRED else len(PREFERRED))
    if len(held_out) > 1:
        with contextlib.suppress(UserError):
            [scanned] = sources.discover([source])
            rows = scanned.fragments.to_pylist()
            labelled = {split_of_folder(row["split"]) for row in rows if row["labels"] and row["split"]}
            held_out.sort(key=lambda name: found[name] not in labelled)  # unlabelled ones last, as of Tiny-ImageNet
    return folder, train, held_out[0]


RECIPES: dict[str, Callable[..., Pipeline]] = {"demo": demo}
