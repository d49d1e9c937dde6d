"""Splits that a source hides: columns of other names, flags, and splits that only some images have."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import workqueue
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.sources import Columns, large_tables, read_label_table, table_chunks
from pipeline.errors import UserError
from tests.images import jpeg

JPEG = jpeg()
IMAGES = [f"{i:02d}.jpg" for i in range(8)]


def write(root, files):
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def packed(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data if isinstance(data, bytes) else data.encode()))
    return out.getvalue()


def parquet(**columns):
    out = io.BytesIO()
    pq.write_table(pa.table({"image": [JPEG] * 8, "label": [0, 1] * 4, **columns}), out)
    return out.getvalue()


def table(column, values):
    rows = (f"{name},{'ab'[i % 2]},{values[i // 2 % len(values)]}" for i, name in enumerate(IMAGES))
    return "\n".join([f"file,label,{column}", *rows])


def prepared(source, **options):
    """{split: rows} of the prepared datasets, without rejects."""
    with workqueue.without_ray():
        found = prepare(PrepareConfig(source=(str(source),), output=f"{source}-out", size=32, **options))
    assert not any(manifest.rejects for manifest in found.values())
    return {split: manifest.rows for split, manifest in found.items()}


HIDDEN = [
    ("is_valid", ["True", "False"], {"train": 4, "val": 4}),
    ("is_test", ["1", "0"], {"train": 4, "test": 4}),
    ("isTrain", ["true", "false"], {"train": 4, "test": 4}),
    ("valid", ["0", "1"], {"train": 4, "val": 4}),
    ("Data Split", ["train", "test"], {"train": 4, "test": 4}),
    ("train_test", ["train", "test"], {"train": 4, "test": 4}),
    ("tvt", ["train", "val", "test", "train"], {"train": 4, "val": 2, "test": 2}),
    ("image_set", ["train", "test"], {"train": 4, "test": 4}),
    ("anything", ["Train", "Test"], {"Train": 4, "Test": 4}),
]


@pytest.mark.parametrize(("column", "values", "splits"), HIDDEN, ids=[case[0] for case in HIDDEN])
def test_split_columns_of_other_names(tmp_path, monkeypatch, column, values, splits):
    """They are never merged in silence: in tables read at once and in chunks, in Parquet files and in sidecars."""
    root = write(tmp_path / "table", {**dict.fromkeys(IMAGES, JPEG), "labels.csv": table(column, values)})
    with pytest.raises(UserError, match=r"has the splits .* --splits from-source"):
        prepared(root)
    assert prepared(root, splits=("from-source",)) == splits
    whole = read_label_table(str(root / "labels.csv"))
    monkeypatch.setattr(table_chunks, "LARGE_BYTES", 1)
    with workqueue.without_ray():
        large = large_tables.open_label_table(str(root / "labels.csv"), Columns())
    assert not large.in_memory
    assert set(large.split_names.values()) == set(whole.splits.values())
    cells = [values[i // 2 % len(values)] for i in range(8)]
    write(tmp_path / "rows", {"a.parquet": parquet(**{column: cells})})
    assert prepared(tmp_path / "rows", splits=("from-source",)) == splits
    if column != "anything":  # of a sample, only the name of its field says so
        fields = [json.dumps({"label": i % 2, column: cell}) for i, cell in enumerate(cells)]
        samples = {f"{i}.{end}": data for i, text in enumerate(fields) for end, data in (("jpg", JPEG), ("json", text))}
        write(tmp_path / "samples", {"a.tar": packed(samples)})
        assert prepared(tmp_path / "samples", splits=("from-source",)) == splits


def test_a_flag_that_the_user_names_is_read_as_splits(tmp_path):
    text = table("is_valid", ["True", "False"])
    root = write(tmp_path / "in", {**dict.fromkeys(IMAGES, JPEG), "labels.csv": text})
    assert prepared(root, split_column="is_valid", splits=("from-source",)) == {"train": 4, "val": 4}


def test_images_that_are_mostly_valid_are_no_validation_split(tmp_path, caplog):
    root = write(
        tmp_path / "in", {**dict.fromkeys(IMAGES, JPEG), "labels.csv": table("is_valid", ["1", "1", "1", "0"])}
    )
    assert set(prepared(root)) == {""}  # no split
    assert "is_valid is 1 for most of the images" in caplog.text


def test_flags_that_may_be_classes_or_several_splits_are_asked_about(tmp_path):
    rows = [f"{name},{i % 2},{i % 3 // 2},1,{i % 5 // 4}" for i, name in enumerate(IMAGES)]
    voc = "\n".join(["file,bus,train,dog,car", *rows])
    root = write(tmp_path / "voc", {**dict.fromkeys(IMAGES, JPEG), "labels.csv": voc})
    with pytest.raises(UserError, match=r"train may be a split or one of the classes bus, dog, car"):
        prepared(root)
    assert prepared(root, label_column="bus,train,dog,car") == {"": 8}
    three = "\n".join(["file,label,is_train,is_val", *(f"{name},a,1,1" for name in IMAGES)])
    write(root, {"labels.csv": three})
    with pytest.raises(UserError, match="the columns is_train, is_val each say"):
        prepared(root)


FLAGS = [
    (("is_train", "is_test"), [(1, 0), (0, 1)], {"train": 4, "test": 4}),
    (("is_train", "is_val"), [(1, 0), (0, 1)], {"train": 4, "val": 4}),
    (
        ("is_train", "is_val", "is_test"),
        [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)],
        {"train": 4, "val": 2, "test": 2},
    ),
    (("is_val", "is_test"), [(0, 0), (1, 0), (0, 1), (0, 0)], {"train": 4, "val": 2, "test": 2}),
]


@pytest.mark.parametrize(("columns", "values", "splits"), FLAGS, ids=[",".join(case[0]) for case in FLAGS])
def test_a_flag_for_each_split(tmp_path, columns, values, splits):
    cells = [values[i // 2 % len(values)] for i in range(8)]
    rows = [f"{name},{'ab'[i % 2]},{','.join(map(str, cells[i]))}" for i, name in enumerate(IMAGES)]
    text = "\n".join([f"file,label,{','.join(columns)}", *rows])
    root = write(tmp_path / "table", {**dict.fromkeys(IMAGES, JPEG), "labels.csv": text})
    with pytest.raises(UserError, match=r"has the splits .* --splits from-source"):
        prepared(root)
    assert prepared(root, splits=("from-source",)) == splits
    fields = [json.dumps({"label": i % 2, **dict(zip(columns, cell, strict=True))}) for i, cell in enumerate(cells)]
    samples = {f"{i}.{end}": data for i, text in enumerate(fields) for end, data in (("jpg", JPEG), ("json", text))}
    write(tmp_path / "samples", {"a.tar": packed(samples)})
    assert prepared(tmp_path / "samples", splits=("from-source",)) == splits


@pytest.mark.parametrize("cells", ["1,1", "0,0", "1,"], ids=["both", "neither", "one is missing"])
def test_flags_that_contradict_one_another_are_refused(tmp_path, cells):
    rows = [f"{name},{'ab'[i % 2]},1,0" for i, name in enumerate(IMAGES[1:])]
    text = "\n".join(["file,label,is_train,is_test", f"00.jpg,a,{cells}", *rows])
    root = write(tmp_path / "table", {**dict.fromkeys(IMAGES, JPEG), "labels.csv": text})
    if cells == "1,":
        assert prepared(root) == {"": 8}  # all are train
        return
    with pytest.raises(UserError, match="the columns is_train, is_test each say"):
        prepared(root)


CLASSES = {f"{name}/{i}.jpg": JPEG for name in ("ant", "bee") for i in range(4)}
HELD_OUT = "ant/0.jpg\nbee/0.jpg\n"
PARTLY = {
    "a list of test files": {**CLASSES, "test.txt": HELD_OUT},
    "a column with blanks": {**dict.fromkeys(IMAGES, JPEG), "labels.csv": table("split", ["test", "", "", ""])},
    "a list in an archive": {"a.tar": packed({**CLASSES, "test.txt": HELD_OUT})},
    "rows without a split": {"a.parquet": parquet(split=["test", "test", *[None] * 6])},
    "an archive of its own": {"test.tar": packed(dict(list(CLASSES.items())[::4])), "b.tar": packed(CLASSES)},
}


@pytest.mark.parametrize("kind", PARTLY)
def test_a_split_of_some_images_is_not_merged_with_the_others(tmp_path, kind):
    root = write(tmp_path / "in", PARTLY[kind])
    with pytest.raises(UserError, match=r"some images belong to the split test, the others to none"):
        prepared(root)
    merged = prepared(root, splits=("merge",), max_reject_fraction=1.0) if "archive" not in kind else {"": 8}
    assert sum(merged.values()) == 8


def test_the_others_are_training_images_if_the_source_decides(tmp_path):
    for kind in ("a list of test files", "a column with blanks", "rows without a split"):
        root = write(tmp_path / kind.replace(" ", "-"), PARTLY[kind])
        assert prepared(root, splits=("from-source",)) == {"train": 6, "test": 2}


def test_one_name_without_a_split_among_many_with_one(tmp_path):
    files = {f"{c}/{split}_{i}.jpg": JPEG for c in ("ant", "bee") for split in ("train", "test") for i in range(4)}
    root = write(tmp_path / "in", {**files, "bee/cover.jpg": JPEG})
    with pytest.raises(UserError, match="has the splits test, train"):
        prepared(root)
