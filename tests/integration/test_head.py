"""The suite `head`: a checkpoint's own classifier has the scores of its training's validation, on the same images."""

import csv
import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models import create_model
from models.weights import to_huggingface
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.data.patches import patchify
from pipeline.errors import UserError
from pipeline.libraries import import_library
from pipeline.tracking import names, search
from pipeline.training.config import EngineConfig, ModelConfig, OptimizerConfig, PretrainConfig
from pipeline.training.engine import Worker
from pipeline.training.loop import train
from pipeline.transfer import TransferConfig, run_suite
from pipeline.transfer.backbones import build_model
from pipeline.transfer.imported import IMAGENET
from pipeline.transfer.run import open_suite
from pipeline.weights import save_checkpoint_weights
from tests.images import tinted
from tests.runs import changed, commit_checkpoint, lines_of_log, pretrain_config

CLASSES = tuple("abcdefgh")
SIDE = 16


def write(uri, count, classes=CLASSES, *, seed=0, label=None, patches=False, height=20, **options) -> str:
    """`count` pictures, whose tint tells little about their class. label: function of the index and the class."""
    generator = np.random.default_rng(seed)

    def rows():
        for i in range(count):
            k = i % len(classes)
            pixels = tinted(
                generator, SIDE if patches else height, SIDE if patches else 24, CLASSES.index(classes[k]) % 3
            )
            image = patchify(pixels, 8) if patches else cv2.imencode(".png", pixels)[1].tobytes()
            yield f"{seed}-{i:04d}", image, k if label is None else label(i, k), *pixels.shape[:2]

    if patches:
        options |= {"encoding": "patches", "image": {"height": SIDE, "width": SIDE, "patch_size": 8, "channels": 3}}
    write_dataset(str(uri), rows(), classes=list(classes), **options)
    return str(uri)


def trained(root: Path, data: str, validation: str, **fields) -> tuple[PretrainConfig, dict]:
    """A short run with a validation at its end, and its metrics."""
    base = pretrain_config(
        data=data,
        validation=validation,
        output=str(root / "run"),
        steps="6steps",
        batch_size=16,
        image_size=SIDE,
        model=ModelConfig(variant="mu/8", depth=1),
        augment=Augment(size=SIDE, crop="squash"),
        optimizer=OptimizerConfig(lr=1e-2),
        engine=EngineConfig(zero=1, precision="fp32", micro_batch=8),
    )
    config = changed(base, **fields)
    return config, train(config, Worker(rank=0, world=1, device=torch.device("cpu")))


def transfer_config(root: Path, data: str, **fields) -> TransferConfig:
    defaults = {
        "suite": "head",
        "checkpoint": str(root / "run"),
        "data": data,
        "output": str(root / "transfer"),
        "workers": 2,
        "tracking_uri": f"sqlite:///{root}/mlflow.db",
    }
    return TransferConfig(**{**defaults, **fields})


def several(i: int, k: int) -> list[int]:
    """No label for every fifth image, otherwise one or two."""
    return [] if i % 5 == 0 else [k] if i % 2 else [k, (k + 3) % len(CLASSES)]


BF16 = EngineConfig(zero=1, precision="bf16", micro_batch=16)
CASES = {
    "other resize, other classes, unlabelled images": (
        {},
        {"classes": ("c", "h", "a", "b"), "label": lambda i, k: -1 if i % 7 == 0 else k},
        {"engine": BF16, "validation_resize": 18},
    ),
    "several labels": (
        {"label": several, "multilabel": True},
        {"classes": CLASSES[::-1], "label": several, "multilabel": True},
        {"loss": "sigmoid", "model": ModelConfig(variant="mu/8", depth=1, pool="gap", head_bias=-2.0)},
    ),
    "hybrid": ({}, {}, {"model": ModelConfig(variant="R+mu/16", depth=1), "image_size": 64}),
    "patches": ({"patches": True}, {"patches": True}, {}),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case", [*list(CASES)[:2], *(pytest.param(case, marks=pytest.mark.slow) for case in list(CASES)[2:])]
)
def test_the_scores_are_those_of_the_validation(alone, ray_local, tmp_path, case):
    of_data, of_validation, fields = CASES[case]
    data = write(tmp_path / "sets" / "train", 64, **of_data)
    validation = write(tmp_path / "sets" / "val", 150, seed=1, **of_validation)
    if "image_size" in fields:
        fields = {**fields, "augment": Augment(size=fields["image_size"])}
    _, result = trained(tmp_path, data, validation, **fields)
    found = run_suite(transfer_config(tmp_path, str(tmp_path / "sets")))
    assert found.scores == {"sets": result[names.VAL_TOP1]}
    assert found.details["sets"]["loss"] == pytest.approx(result[names.VAL_LOSS], rel=1e-6)
    assert 0 < found.scores["sets"] < found.details["sets"]["top5"] <= 100
    assert ("top1_among" in found.details["sets"]) == (len(of_validation.get("classes", CLASSES)) < len(CLASSES))


# ---------------------------------------------------------------- classes


def checkpoint(root: Path, classes=CLASSES, num_classes: int | None = None, **options) -> str:
    """A committed checkpoint of a tiny model with a random head, without the configuration of a training."""
    torch.manual_seed(0)
    model = create_model("mu/8", len(classes) if num_classes is None else num_classes, SIDE, **options)
    if isinstance(model.head, torch.nn.Linear):
        torch.nn.init.normal_(model.head.weight)
    folder = root / "run" / "checkpoints" / "step-00000001"
    save_checkpoint_weights(model, {"classes": list(classes)}, str(folder))
    commit_checkpoint(folder, 1)
    return str(root / "run")


REFUSED = {
    "no head": ({"num_classes": 0}, {}, "has no classification head"),
    "masked": ({"num_classes": 0, "mpp": "mean"}, {}, "has no classification head"),
    "disjoint": (
        {"classes": ["x", "y"]},
        {},
        r"^none of the 8 classes \(a, b, c and 5 more\) of .*/val is a class of the head of .*, which has 2 \(x, y\)",
    ),
    "no names": (
        {"classes": [], "num_classes": 9},
        {},
        "has 8 classes .* has 9 without names; give the names with --class-names",
    ),
    "other number of names": ({"num_classes": 9}, {}, "has 9 classes, but 8 names"),
    "one name twice": ({"classes": [*CLASSES, "a"]}, {}, r"one name \(a\)"),
    "no labels": ({}, {"label": lambda i, k: -1}, "has no labelled images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_head_that_does_not_fit_the_images_is_refused_before_any_work(tmp_path, case):
    of_checkpoint, of_data, message = REFUSED[case]
    checkpoint(tmp_path, **of_checkpoint)
    write(tmp_path / "val", 16, **of_data)
    with pytest.raises(UserError, match=message):
        open_suite(transfer_config(tmp_path, str(tmp_path / "val")))
    assert not (tmp_path / "transfer").exists()


def test_names_come_from_a_file_or_a_dataset_and_equal_numbers_of_classes_need_none(tmp_path):
    checkpoint(tmp_path, classes=[], num_classes=8)
    data = write(tmp_path / "val", 16, classes=("c", "a"))
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    same = write(tmp_path / "all", 16)
    for given in (str(tmp_path / "names.txt"), same):
        suite = open_suite(transfer_config(tmp_path, data, class_names=given))
        assert suite.checkpoint.classes == CLASSES
    with lines_of_log() as lines:
        open_suite(transfer_config(tmp_path, same))
    assert any("has no class names: its 8 classes are taken to be those of" in line for line in lines)
    with pytest.raises(UserError, match="neither a text file nor a prepared dataset"):
        open_suite(transfer_config(tmp_path, data, class_names=str(tmp_path / "none.txt")))


@pytest.mark.parametrize(
    ("place", "name"), [("", "data"), ("val", "data"), ("test", "data"), ("one", "one"), ("one/val", "one")]
)
def test_data_is_a_dataset_a_folder_with_splits_or_a_folder_of_these(tmp_path, place, name):
    checkpoint(tmp_path)
    written = write((tmp_path / "data" / place), 16)
    (task,) = open_suite(transfer_config(tmp_path, str(tmp_path / "data"))).tasks
    assert (task.name, task.test.uri) == (name, written)


@pytest.mark.timeout(300)
def test_images_of_unknown_classes_are_left_out_and_counted(ray_local, tmp_path):
    """Six classes of the images are among the eight of the head, two are not; the head predicts others, too."""
    checkpoint(tmp_path, classes=("x", "y", *CLASSES[:6]))
    data = write(tmp_path / "val", 80)
    with lines_of_log() as lines:
        found = run_suite(transfer_config(tmp_path, data))
    assert any("20 of 80 labels of" in line and "the head of" in line and "has no g, h" in line for line in lines)
    output = tmp_path / "transfer"
    score = json.loads((output / "scores.json").read_text())["scores"]["val"]
    assert score["images"] == 60
    assert score["details"] == found.details["val"]
    assert score["details"]["left_out"] == 20
    assert score["details"]["top1_among"] >= score["mean"]
    rows = {row["class"]: row for row in csv.DictReader((output / "classes" / "val.csv").read_text().splitlines())}
    assert list(rows) == list(CLASSES[:6])
    assert sum(int(row["images"]) for row in rows.values()) == 60
    assert sum(int(row["correct"]) for row in rows.values()) == round(score["mean"] * 0.6)
    (result,) = (output / "results" / "val").glob("*.json")
    counts = np.array(json.loads(result.read_text())["confusion"])
    assert counts.sum() == 60
    assert np.diag(counts).sum() == round(score["mean"] * 0.6)
    report = (output / "report.md").read_text()
    header = "| task | top-1 % | standard error | top-5 % | top-1 % among its classes | loss | left out | images |"
    assert header in report
    runs = search.search_runs("transfer", uri=f"sqlite:///{tmp_path}/mlflow.db")
    (child,) = [run for run in runs if "final_top1" in run.metrics]
    assert child.metrics["final_top5"] == score["details"]["top5"]


def test_a_dry_run_checks_everything_and_writes_nothing(tmp_path, capsys, monkeypatch):
    checkpoint(tmp_path)
    data = write(tmp_path / "val", 16)
    monkeypatch.setattr(sys, "path", sys.path[:])  # the job puts the project first on the path
    main = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "transfer.py"))["main"]
    arguments = ["--suite", "head", "--checkpoint", str(tmp_path / "run"), "--data", data]
    arguments += ["--output", str(tmp_path / "transfer"), "--dry-run"]
    assert main(arguments) == 0
    assert "16 test images  Head(kind='head', resolution=16, resize=18" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == [{"task": "val", "images": 16, "finished": False}]
    assert not (tmp_path / "transfer").exists()
    with pytest.raises(UserError, match="no prepared dataset"):
        main([*arguments, "--data", str(tmp_path / "run")])


# ---------------------------------------------------------------- weights of other programs


def test_weights_of_torchvision_give_its_logits_for_its_normalisation(tmp_path):
    torchvision = import_library("torchvision")
    torch.manual_seed(0)
    shape = {"image_size": SIDE, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 128}
    theirs = torchvision.models.VisionTransformer(**shape, num_classes=8).eval()
    torch.nn.init.normal_(theirs.heads.head.weight)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    images = torch.randint(0, 256, (4, SIDE, SIDE, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    data = write(tmp_path / "val", 16)
    config = transfer_config(tmp_path, data, checkpoint=str(tmp_path / "weights.pth"), variant="mu/8")
    checkpoint = open_suite(config).checkpoint
    ours = build_model(checkpoint.config, checkpoint.arrays).eval()
    with torch.inference_mode():
        expected = theirs((images.permute(0, 3, 1, 2) / 255 - mean) / std)
        torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_of_hugging_face_has_class_names_and_a_normalisation(tmp_path, named):
    labels = {str(i): name if named else f"LABEL_{i}" for i, name in enumerate(CLASSES)}
    state, config, processor = to_huggingface(create_model("mu/8", 8, SIDE), ["x"] * 8)
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "id2label": labels}))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    data = write(tmp_path / "val", 16)
    suite = open_suite(transfer_config(tmp_path, data, checkpoint=str(folder), variant="mu/8"))
    assert suite.checkpoint.classes == (CLASSES if named else ())
    assert suite.tasks[0].protocol.resize == round(SIDE * 8 / 7)
