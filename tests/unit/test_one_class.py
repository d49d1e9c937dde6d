"""Checks of classes in training: data with a single class, and a separately prepared validation set."""

import dataclasses

import pytest

from pipeline import workqueue
from pipeline.data import open_dataset, sources
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.errors import UserError
from pipeline.graph.recipes import demo
from pipeline.training.plan import check_data
from pipeline.training.recipes import RECIPES
from pipeline.training.validation import places_of_classes
from tests.images import jpeg


def prepared(root, *classes):
    for i, name in enumerate(classes):
        for k in range(4):
            (root / "in" / name).mkdir(parents=True, exist_ok=True)
            (root / "in" / name / f"{k}.jpg").write_bytes(jpeg(10 * i + k))
    with workqueue.without_ray():
        prepare(PrepareConfig(source=(str(root / "in"),), output=str(root / "out")))
    return open_dataset(root / "out")


def config(**runtime):
    plain = dataclasses.replace(RECIPES["demo"](), batch_size=4)
    return dataclasses.replace(plain, runtime=dataclasses.replace(plain.runtime, **runtime))


def test_one_class_is_a_warning_in_prepare_and_an_error_in_training(tmp_path, caplog):
    dataset = prepared(tmp_path, "ant")
    assert "one class (ant)" in caplog.text
    with pytest.raises(UserError, match=r"has one class \(ant\).*--one-class"):
        check_data(config(), dataset)
    check_data(config(one_class=True), dataset)


def test_an_image_size_that_is_no_multiple_of_the_patch_is_said(tmp_path, caplog):
    dataset = prepared(tmp_path, "ant", "bee")
    check_data(config(), dataset)
    assert "multiple of the patch size" not in caplog.text
    odd = dataclasses.replace(config(), image_size=20)
    check_data(dataclasses.replace(odd, augment=dataclasses.replace(odd.augment, size=20)), dataset)
    assert "--image-size 20 is not a multiple of the patch size" in caplog.text


@pytest.mark.parametrize(
    ("train", "test"), [("Training", "Testing"), ("images/train", "images/val"), ("TRAIN", "TEST"), ("train", "test1")]
)
def test_the_demo_takes_splits_of_other_names_and_places(tmp_path, train, test):
    for split in (train, test):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.jpg").write_bytes(jpeg())
    stages = demo(data=str(tmp_path)).stages
    assert stages["train"].fields["source"] == [f"{tmp_path}/{train}"]
    assert stages["test"].fields["source"] == [f"{tmp_path}/{test}"]


def test_an_empty_class_folder_is_mentioned(tmp_path, caplog):
    for name in ("ant", "bee", "cow", ".hidden"):
        (tmp_path / "in" / "photos" / name).mkdir(parents=True)
    for name in ("ant", "bee"):
        (tmp_path / "in" / "photos" / name / "0.jpg").write_bytes(jpeg())
    with workqueue.without_ray():
        sources.discover([str(tmp_path / "in")])
    assert "1 folder without files, such as photos/cow, is not among the classes" in caplog.text


def test_classes_of_a_validation_set_are_matched_by_name(tmp_path):
    validation = prepared(tmp_path, "bee", "cow")
    assert places_of_classes(validation, ("bee", "cow")) is None
    assert places_of_classes(validation, ("ant", "bee", "cow")).tolist() == [1, 2]
    with pytest.raises(UserError, match="cow is not among the run's 2 classes"):
        places_of_classes(validation, ("ant", "bee"))


def test_tiny_imagenet_in_one_command(tmp_path, caplog):
    """Two labelled splits get one class list; the unlabelled split is skipped with
    a warning, and the demo uses the others."""
    names = ("n00000001", "n00000002")
    paths = [f"train/{name}/images/{name}_{i}.JPEG" for name in names for i in range(2)]
    paths += ["val/images/val_0.JPEG", "test/images/test_0.JPEG"]
    for i, path in enumerate(paths):
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(jpeg(i))
    (tmp_path / "in/val/val_annotations.txt").write_text("val_0.JPEG\tn00000002\t0\t0\t9\t9\n")
    (tmp_path / "in/words.txt").write_text("n00000001\tdog\n")
    source = str(tmp_path / "in")
    with workqueue.without_ray():
        made = prepare(
            PrepareConfig(
                source=(source,), output=str(tmp_path / "out"), splits=("from-source",), max_reject_fraction=0.5
            )
        )
    assert {split: manifest.class_counts for split, manifest in made.items()} == {"train": [2, 2], "val": [0, 1]}
    assert made["train"].rejects == {"not an image": 1}
    assert "the split test (1 file) has no labels and is skipped" in caplog.text
    stages = demo(data=source).stages
    assert stages["test"].fields["source"] == [f"{source}/val"]


def test_classes_that_a_random_split_left_out_are_reported(tmp_path, caplog):
    for name in ("ant", "bee", "cat"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(8 if name == "ant" else 1):
            (tmp_path / "in" / name / f"{i}.jpg").write_bytes(jpeg(len(name) + i))
    config = PrepareConfig(
        source=(str(tmp_path / "in"),), output=str(tmp_path / "out"), splits=("train=0.5", "test=0.5")
    )
    with workqueue.without_ray():
        made = prepare(config)
    for split, manifest in made.items():
        lacking = sum(count == 0 for count in manifest.class_counts)
        warning = f"out/{split}: no images in {lacking} of 3 classes"
        assert (warning in caplog.text) == (lacking > 0)
    assert sum(manifest.class_counts.count(0) for manifest in made.values()) == 2  # bee and cat are in one split each
    assert "; a larger share of --splits would have more of each" in caplog.text


def test_a_class_that_lost_all_its_images_is_reported(tmp_path, caplog):
    (tmp_path / "in" / "empty").mkdir(parents=True)
    (tmp_path / "in" / "empty" / "0.jpg").write_bytes(b"no image")
    for name in ("ant", "bee"):
        (tmp_path / "in" / name).mkdir()
        (tmp_path / "in" / name / "0.jpg").write_bytes(jpeg(len(name)))
    with workqueue.without_ray():
        prepare(PrepareConfig(source=(str(tmp_path / "in"),), output=str(tmp_path / "out"), max_reject_fraction=1.0))
    assert "no images in 1 of 3 classes, such as empty" in caplog.text
