"""Layouts of published data sets, and of exports of annotation tools: where the classes and the splits are."""

import io
import json
import logging
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import workqueue
from pipeline.data import sources
from pipeline.data.sources import Columns
from pipeline.data.sources.tables import read_label_table
from pipeline.errors import UserError
from tests.images import jpeg

JPEG = jpeg()


def write(root, files):
    """Writes files, {path: text}; an empty text stands for an image."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text.encode() if text else JPEG)
    return str(root)


def pack(path, files):
    """The same as a tar or zip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text or JPEG)
        return str(path)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, text in files.items():
            data = text.encode() if text else JPEG
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def rows(uri, **options):
    """{key: (label names, split)} of a source, without refused inputs."""
    with workqueue.without_ray():
        [source] = sources.discover([uri], **options)
        items = sources.read(source, source.fragments)
    return {item.key: (item.labels and list(item.labels), item.split) for item in items if not item.refused}


FOOD = {f"images/{path}.jpg": "" for path in ("pie/1", "soup/2", "pie/3", "soup/4")} | {
    "meta/train.txt": "pie/1\nsoup/2\n",
    "meta/test.txt": "pie/3\nsoup/4\n",
    "meta/train.json": json.dumps({"pie": ["pie/1"], "soup": ["soup/2"]}),
    "meta/test.json": json.dumps({"pie": ["pie/3"], "soup": ["soup/4"]}),
    "meta/classes.txt": "pie\nsoup\n",
}
FOOD_ROWS = {
    "images/pie/1.jpg": (["pie"], "train"),
    "images/soup/2.jpg": (["soup"], "train"),
    "images/pie/3.jpg": (["pie"], "test"),
    "images/soup/4.jpg": (["soup"], "test"),
}


@pytest.mark.parametrize("end", ["", ".zip", ".tar", ".tar.gz"])
def test_lists_of_splits_in_a_folder_of_their_own(tmp_path, end):
    """Food-101."""
    uri = pack(tmp_path / f"food{end}", FOOD) if end else write(tmp_path, FOOD)
    assert rows(uri) == FOOD_ROWS


def test_the_list_of_two_splits_together_is_no_third_split(tmp_path):
    """Pascal VOC has train.txt, val.txt and trainval.txt."""
    files = {f"JPEGImages/{name}/{name}_1.jpg": "" for name in ("cat", "dog")}
    sets = {"train": "cat_1\n", "val": "dog_1\n", "trainval": "cat_1\ndog_1\n"}
    files |= {f"ImageSets/Main/{split}.txt": text for split, text in sets.items()}
    found = rows(write(tmp_path, files))
    assert found == {"JPEGImages/cat/cat_1.jpg": (["cat"], "train"), "JPEGImages/dog/dog_1.jpg": (["dog"], "val")}


IMAGENET = {
    "Data/CLS-LOC/train/n00000001/n00000001_1.JPEG": "",
    "Data/CLS-LOC/train/n00000002/n00000002_1.JPEG": "",
    "Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG": "",
    "Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG": "",
    "LOC_val_solution.csv": "ImageId,PredictionString\nILSVRC2012_val_00000001,n00000002 1 2 3 4\n",
    "LOC_synset_mapping.txt": "n00000001 tench\nn00000002 goldfish\n",
}


@pytest.mark.parametrize("end", ["", ".zip", ".tar"])
def test_a_table_of_one_split_leaves_the_folders_of_the_others(tmp_path, end):
    """Kaggle's ImageNet: class folders in train, a table for val, no labels in test."""
    uri = pack(tmp_path / f"imagenet{end}", IMAGENET) if end else write(tmp_path, IMAGENET)
    found = {path.partition("CLS-LOC/")[2]: row for path, row in rows(uri).items()}
    assert found == {
        "train/n00000001/n00000001_1.JPEG": (["n00000001"], "train"),
        "train/n00000002/n00000002_1.JPEG": (["n00000002"], "train"),
        "val/ILSVRC2012_val_00000001.JPEG": (["n00000002"], "val"),
        "test/ILSVRC2012_test_00000001.JPEG": (None, "test"),
    }


def test_a_table_of_one_split_without_class_folders_is_the_table_of_all(tmp_path):
    files = {"train/a.jpg": "", "train/b.jpg": "", "test/all/c.jpg": "", "train.csv": "id,label\na,x\nb,y\n"}
    assert rows(write(tmp_path, files)) == {"train/a.jpg": (["x"], "train"), "train/b.jpg": (["y"], "train")}
    assert rows(str(tmp_path), unlabelled=True)["test/all/c.jpg"] == (None, "test")


def test_the_tables_of_roboflow(tmp_path):
    files = {"train/0.jpg": "", "train/1.jpg": "", "valid/2.jpg": "", "README.roboflow.txt": "exported"}
    files["train/_classes.csv"] = "filename, cat, dog\n0.jpg, 1, 0\n1.jpg, 0, 1\n"
    files["valid/_classes.csv"] = "filename, cat, dog\n2.jpg, 1, 0\n"
    assert rows(write(tmp_path, files)) == {
        "train/0.jpg": (["cat"], "train"),
        "train/1.jpg": (["dog"], "train"),
        "valid/2.jpg": (["cat"], "valid"),
    }


def test_numbered_split_folders(tmp_path):
    """Kaggle's cats and dogs has train and test1."""
    files = {"train/cat/0.jpg": "", "train/dog/1.jpg": "", "test1/2.jpg": "", "test2/3.jpg": ""}
    found = rows(write(tmp_path, files))
    assert {path: row for path, row in found.items() if path.startswith("train")} == {
        "train/cat/0.jpg": (["cat"], "train"),
        "train/dog/1.jpg": (["dog"], "train"),
    }
    assert (found["test1/2.jpg"][1], found["test2/3.jpg"][1]) == ("test1", "test2")


@pytest.mark.parametrize("other", ["masks", "SegmentationClass", "labels", "depth", "ground_truth"])
def test_folders_of_masks_are_no_classes(tmp_path, other):
    files = {f"{folder}/{i}.png": "" for folder in ("images", other) for i in range(2)}
    with pytest.raises(
        UserError, match=rf"images and {other} look like images and their masks.*--include '\*images/\*'"
    ):
        rows(write(tmp_path, files))
    assert set(rows(str(tmp_path), class_level=1)[f"{other}/0.png"][0]) == {other}


@pytest.mark.parametrize(
    "names", [("original", "masks"), ("images", "sprites"), ("small", "large"), ("labels", "boxes")]
)
def test_folders_with_similar_names_are_classes(tmp_path, names):
    found = rows(
        write(tmp_path, {f"{name}/0.jpg": "" for name in names}), class_level=None if "masks" not in names else 1
    )
    assert {row[0][0] for row in found.values()} == set(names)


def test_a_folder_called_images_is_no_class(tmp_path):
    """Oxford-IIIT Pet: all images in one folder, and a table with columns of numbers."""
    files = {f"images/{name}.jpg": "" for name in ("Abyssinian_1", "beagle_2", "beagle_3")}
    text = "#Image CLASS-ID SPECIES BREED ID\nAbyssinian_1 1 1 1\nbeagle_2 2 2 1\nbeagle_3 2 2 1\n"
    root = write(tmp_path, files | {"annotations/list.txt": text})
    [source] = sources.discover([root])
    with pytest.raises(
        UserError, match=r"zero classes \(annotations/list.txt may be a label table; pass it with --labels"
    ):
        sources.make_labels([source])
    table = f"{root}/annotations/list.txt"
    with pytest.raises(UserError, match="no label column among: column 2, column 3, column 4; name it, perhaps with"):
        sources.discover([f"{root}/images"], labels=table)
    found = rows(f"{root}/images", labels=table, columns=Columns(label="column 2"))
    assert [row[0] for _, row in sorted(found.items())] == [["1"], ["2"], ["2"]]


def test_archives_by_class_and_split(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            pack(tmp_path / split / f"{name}.tar", {"0.jpg": ""})
    with pytest.raises(UserError, match=r"--class-level 2 uses their names as classes \(cat, dog\)"):
        rows(str(tmp_path))
    assert rows(str(tmp_path), class_level=2) == {
        f"{split}/{name}/0.jpg": ([name], split) for split in ("train", "test") for name in ("cat", "dog")
    }


# ---------------------------------------------------------------- what is no input, and what is not read


def test_a_table_given_by_its_name_is_no_input(tmp_path):
    """Nor are the tables beside it that would otherwise be read."""
    table = "img/1.jpg 3\nimg/2.jpg 10\n"
    other = "file,label\nimg/1.jpg,a\nimg/2.jpg,b\n"
    uri = write(tmp_path / "photos", {"img/1.jpg": "", "img/2.jpg": "", "list.txt": table, "labels.csv": other})
    with workqueue.without_ray():
        [source] = sources.discover([uri], labels=f"{uri}/list.txt")
        found = {item.key: item.labels for item in sources.read(source, source.fragments)}
    assert found == {"img/1.jpg": ["3"], "img/2.jpg": ["10"]}


LEFT_BEHIND = (
    "@SynoResource/0.jpg Recycle.Bin/0.jpg _thumbs/0.jpg ant/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg .@__thumb/default0.jpg "
    "ant/0.jpg@SynoEAStream ant/0.jpg.filepart ant/0.jpg.aria2 ant/0.jpg.!ut .dvc/cache/0.jpg .zfs/0.jpg .svn/0.jpg"
)


@pytest.mark.parametrize("end", ["", ".zip", ".tar"])
def test_what_sharing_and_storage_leave_behind_is_no_input(tmp_path, end):
    files = dict.fromkeys(["ant/0.jpg", "bee/1.jpg", "RECYCLE BIN/0.jpg", *LEFT_BEHIND.split()], "")
    uri = pack(tmp_path / f"a{end}", files) if end else write(tmp_path, files)
    assert set(rows(uri)) == {"ant/0.jpg", "bee/1.jpg"}


@pytest.mark.parametrize(
    "name",
    [
        "a.tar.lz4",
        "a.tar.Z",
        "a.zip.001",
        "a.tar.gz.partaa",
        "train-images-idx3-ubyte.gz",
        "a.beton",
        "shard.00000.mds",
    ],
)
def test_files_that_no_format_reads_are_named(tmp_path, name):
    write(tmp_path, {name: "x", name.replace("a", "b"): "y"})
    with pytest.raises(
        UserError, match=f"{name} has an unsupported format; unpack it, or pack the images as .tar or .zip"
    ):
        rows(str(tmp_path))
    with pytest.raises(UserError, match=f"{name} has an unsupported format"):
        rows(str(tmp_path / name))


def test_images_without_extensions_beside_something_else_are_read(tmp_path):
    write(tmp_path, {"ant/scan.001": "", "bee/scan.002": "", "notes.gz": "x"})
    assert set(rows(str(tmp_path))) == {"ant/scan.001", "bee/scan.002"}


@pytest.mark.parametrize(("outer", "inner"), [("a.zip", "train.zip"), ("a.zip", "train.tar"), ("a.tar", "ant.tar.gz")])
def test_archives_in_an_archive_are_named(tmp_path, outer, inner):
    with pytest.raises(UserError, match=f"has archives instead of images in it, such as {inner}; unpack it"):
        rows(pack(tmp_path / outer, {inner: "x", "readme.txt": "y"}))


def test_archives_under_the_name_of_another_kind_are_named(tmp_path):
    zipped, tarred = (pack(tmp_path / name, {"ant/0.jpg": ""}) for name in ("a.zip", "a.tar"))
    (tmp_path / "tar").mkdir()
    (tmp_path / "zip").mkdir()
    (tmp_path / "tar" / "b.tar.gz").write_bytes((tmp_path / "a.zip").read_bytes())
    (tmp_path / "zip" / "b.zip").write_bytes((tmp_path / "a.tar").read_bytes())
    with pytest.raises(UserError, match=r"a zip archive with the name of a tar archive; rename it to .zip"):
        rows(str(tmp_path / "tar"))
    with pytest.raises(UserError, match=r"a tar archive with the name of a zip archive; rename it to .tar"):
        rows(str(tmp_path / "zip"))
    assert rows(zipped).keys() == rows(tarred).keys()


def test_labels_that_differ_in_zeros_or_case_alone_are_said(tmp_path, caplog):
    logging.getLogger("pipeline").propagate = True
    for names, what in ((("007", "7"), "leading zeros"), (("Cat", "cat"), "case")):
        caplog.clear()
        root = write(tmp_path / names[0], {f"{name}/{i}.jpg": "" for i, name in enumerate((*names, "other"))})
        sources.make_labels(sources.discover([root]))
        assert f"differ in {what} alone; --label-map" in caplog.text
    caplog.clear()
    root = write(tmp_path / "letters", {"a/0.jpg": "", "A/1.jpg": ""})  # on purpose
    sources.make_labels(sources.discover([root]))
    assert not caplog.text


@pytest.mark.parametrize("name", ["?", "-", "None", "none", "Null", "NA", "Nan", "missing"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_labels_that_look_like_missing_ones_are_said(tmp_path, caplog, name, kind):
    logging.getLogger("pipeline").propagate = True
    labels = ["cat", name, "dog"]
    if kind == "csv":
        table = "file_name,label\n" + "".join(f"{i}.jpg,{label}\n" for i, label in enumerate(labels))
        root = write(tmp_path, {**{f"{i}.jpg": "" for i in range(3)}, "labels.csv": table})
    else:
        root = str(tmp_path)
        pq.write_table(pa.table({"image": [JPEG] * 3, "label": labels}), tmp_path / "a.parquet")
    found = sources.discover([root])
    assert sources.make_labels(found).classes == tuple(sorted(labels))
    assert f"{root}: the label {name!r} is a class, though such a text often stands for a missing label" in caplog.text
    caplog.clear()
    assert sources.make_labels(found, ["cat", "dog"]).classes == ("cat", "dog")  # the remedy
    assert not caplog.text


def test_folders_with_names_of_missing_labels_are_classes_without_a_warning(tmp_path, caplog):
    logging.getLogger("pipeline").propagate = True
    root = write(tmp_path, {"None/0.jpg": "", "-/1.jpg": "", "crack/2.jpg": ""})
    assert sources.make_labels(sources.discover([root])).classes == ("-", "None", "crack")
    assert not caplog.text


@pytest.mark.parametrize("text", ["", "nan", "NaN", "null", "N/A"])
def test_a_missing_label_of_a_table_is_no_class(tmp_path, text):
    table = f"file_name,label\n0.jpg,cat\n1.jpg,{text}\n2.jpg,dog\n"
    root = write(tmp_path, {**{f"{i}.jpg": "" for i in range(3)}, "labels.csv": table})
    assert sources.make_labels(sources.discover([root])).classes == ("cat", "dog")


@pytest.mark.parametrize("label_map", ['{"007": "bond", "010": "ten"}', "007\n010\n"])
def test_numbers_match_a_label_map_with_leading_zeros(tmp_path, label_map):
    """A CSV reader has turned 007 into 7. In the list, 7 is the class 007 and not the one at index 7."""
    root = write(tmp_path / "photos", {f"{i}.jpg": "" for i in range(3)})
    (tmp_path / "t.csv").write_text("file,label\n0.jpg,7\n1.jpg,10\n2.jpg,007\n")
    (tmp_path / "map.txt").write_text(label_map)
    found = sources.discover([root], labels=str(tmp_path / "t.csv"))
    labels = sources.make_labels(found, sources.read_label_map(str(tmp_path / "map.txt")))
    assert [labels.classes[labels.encode([name])] for name in ("7", "10", "007")] in (
        ["bond", "ten", "bond"],
        ["007", "010", "007"],
    )


def test_objects_as_labels_have_their_names(tmp_path):
    objects = [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]
    pq.write_table(pa.table({"image": [JPEG] * 2, "label": objects}), tmp_path / "a.parquet")
    assert [row[0] for row in rows(str(tmp_path / "a.parquet")).values()] == [["cat"], ["dog"]]
    members = {
        f"{i}.{end}": text for i in range(2) for end, text in (("jpg", ""), ("json", json.dumps({"label": objects[i]})))
    }
    assert [row[0] for row in rows(pack(tmp_path / "a.tar", members)).values()] == [["cat"], ["dog"]]
    pq.write_table(pa.table({"image": [JPEG] * 2, "label": [{"id": 3}, {"id": 4}]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="the column label has objects without a name"):
        rows(str(tmp_path / "b.parquet"))


def test_rows_of_columnar_files_are_named_once(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        table = pa.table({"image": [JPEG], "label": ["a"]})
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert set(rows(str(tmp_path))) == {f"data/{split}-00000-of-00001.parquet#0" for split in ("train", "test")}


@pytest.mark.parametrize(
    ("table", "text", "labels"),
    [
        ("labels.json", '{"label": ["shoes/boots", "bags/totes"], "file": ["0.jpg", "1.jpg"]}', ["shoes/boots", "bags/totes"]),
        ("labels.csv", "file,label\n0.jpg,Null\n1.jpg,nat\n", ["Null", "nat"]),
        ("labels.csv", "file,label\n0.jpg,NaT\n1.jpg,cat\n", [None, "cat"]),
        ("labels.txt", "2\n0.jpg cat\n1.jpg dog\n", ["cat", "dog"]),
        ("labels.txt", "image label\n0.jpg cat\n1.jpg dog\n", ["cat", "dog"]),
    ],
)  # fmt: skip
def test_cells_that_look_like_something_else(table, text, labels):
    read = read_label_table(table, data=text.encode())
    assert [(read.labels.get(name) or [None])[0] for name in ("0.jpg", "1.jpg")] == labels
    assert set(read.keys) == {"0.jpg", "1.jpg"}


def test_a_list_may_begin_with_a_word_that_names_a_column():
    assert read_label_table("labels.txt", data=b"image cat\na dog\n").labels == {"image": ["cat"], "a": ["dog"]}


def test_numbers_match_only_where_a_reader_of_csv_has_changed_them(tmp_path):
    images = dict.fromkeys(("1.jpg", "clips/0001.jpg", "v/1.0.png"), "")
    write(tmp_path / "exact", images | {"labels.csv": "file,label\n1.jpg,a\n"})
    assert {key for key, (names, _) in rows(str(tmp_path / "exact")).items() if names} == {"1.jpg"}
    pack(tmp_path / "packed" / "a.zip", images | {"labels.csv": "file,label\n1.jpg,a\n"})
    found = rows(str(tmp_path / "packed"))
    assert {key for key, (names, _) in found.items() if names} == {"1.jpg"}
    write(tmp_path / "changed", {"0001.jpg": "", "0002.jpg": "", "labels.csv": "id,label\n1,a\n2.0,b\n"})
    assert [names for names, _ in rows(str(tmp_path / "changed")).values()] == [["a"], ["b"]]
