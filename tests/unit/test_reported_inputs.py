"""The inputs of public bug reports (VIT_REAL_DATA/reports), through the whole of `prepare`."""

import pytest

from pipeline import workqueue
from pipeline.data import open_dataset
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.errors import UserError

FROM_SOURCE = {"splits": ("from-source",)}
UNLABELLED = {"unlabelled": True}

# (folder, settings, {split: (images, classes)}, rejects by reason)
READ = [
    ("L01-hidden-class", {}, {"": (12, ["ant", "bee"])}, {}),
    ("L04-captions", {}, {"": (6, ["ant", "bee"])}, {}),
    ("L04-captions", UNLABELLED, {"": (6, [])}, {}),
    ("L05-float-labels", {}, {"": (23, [str(i) for i in range(12)])}, {"no label": 1}),
    ("L06-nan-parquet", {}, {"": (23, ["0", "1", "2"])}, {"no label": 1}),
    ("L06-nan-parquet", UNLABELLED, {"": (24, [])}, {}),
    ("L07-binary-labels", {}, {"": (24, ["ant", "bee"])}, {}),
    ("L08-dictionary", {}, {"": (24, ["ant", "bee"])}, {}),
    ("L10-hub", FROM_SOURCE, {"test": (8, ["zebra", "ant"]), "train": (16, ["zebra", "ant"])}, {}),
    ("L11-hive", {}, {"": (24, ["ant", "bee"])}, {}),
    ("L13-apart", {}, {"": (24, ["0", "1"])}, {}),
    ("L14-captions", UNLABELLED, {"": (24, [])}, {}),
    ("L15-xz", {}, {"": (12, ["ant", "bee"])}, {}),
    ("L15-zip", {}, {"": (12, ["ant", "bee"])}, {}),
    ("L16-backslash", {}, {"": (6, ["x", "y"])}, {}),
    ("L17-onehot", {}, {"": (6, ["BCC", "MEL", "NV"])}, {}),
    ("L18-kaggle", {}, {"": (6, ["n01440760", "n01440761"])}, {}),
    ("L23-tfrecord-gzip2", {}, {"": (12, ["0", "1", "2"])}, {}),
    ("L27-nested", {}, {"": (6, ["ant", "bee"])}, {}),
    ("L28-hf-splits", FROM_SOURCE, {"test": (3, ["x", "y"]), "train": (3, ["x", "y"])}, {}),
    ("M2-imagenet", {"label_map": "M2-synsets.txt"}, {"": (4, ["n01440764", "n01443537"])}, {}),
    ("M2-imagenet", {"label_map": "M2-index.json"}, {"": (4, ["n01440764", "n01443537"])}, {}),
    ("M3-save-to-disk", {}, {"": (6, ["0", "1"])}, {}),
    ("M8-split-column", FROM_SOURCE, {"test": (1, ["x", "y"]), "train": (3, ["x", "y"])}, {}),
    ("sliver-folder", {"encoding": "patches", "size": 448}, {"": (40, ["ant", "bee"])}, {"too narrow": 1}),
    ("exif", UNLABELLED, {"": (6, [])}, {}),
]
REFUSED = [
    ("L09-empty-alone", "its parquet files have no rows"),
    ("L10-hub", "has the splits test, train, which would become one dataset; --splits from-source"),
    ("L14-captions", "none of the fields caption, .* is a known label field.*--unlabelled"),
    ("L28-hf-splits", "has the splits test, train, which would become one dataset; --splits from-source"),
    ("M8-split-column", "has the splits test, train, which would become one dataset; --splits from-source"),
]


def prepared(reports, folder, output, **settings):
    if "label_map" in settings:
        settings["label_map"] = str(reports / settings["label_map"])
    config = PrepareConfig(source=(str(reports / folder),), output=str(output), max_reject_fraction=1, **settings)
    with workqueue.without_ray():
        return prepare(config)


@pytest.mark.parametrize(("folder", "settings", "expected", "rejects"), READ, ids=lambda value: str(value)[:24])
def test_what_can_be_read_is_read_right(real_data, tmp_path, folder, settings, expected, rejects):
    made = prepared(real_data / "reports", folder, tmp_path / "out", **settings)
    assert {split: (manifest.rows, manifest.classes) for split, manifest in made.items()} == expected
    assert {reason: n for manifest in made.values() for reason, n in manifest.rejects.items()} == rejects


@pytest.mark.parametrize(("folder", "message"), REFUSED)
def test_what_has_two_readings_is_asked_about(real_data, tmp_path, folder, message):
    with pytest.raises(UserError, match=message):
        prepared(real_data / "reports", folder, tmp_path / "out")


def test_labels_are_those_of_the_rows(real_data, tmp_path):
    prepared(real_data / "reports", "L13-apart", tmp_path / "apart")
    dataset = open_dataset(tmp_path / "apart")
    assert all(int(row["key"][:3]) % 2 == row["label"] for row in (dataset[i] for i in range(len(dataset))))
    prepared(real_data / "reports", "L07-binary-labels", tmp_path / "binary")
    keys = {row["key"] for row in open_dataset(tmp_path / "binary").read(range(24))}
    assert keys == {f"a.parquet/{i}.jpg" for i in range(24)}  # text, not b'0.jpg'
