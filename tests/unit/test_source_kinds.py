"""Kinds of corpora: archives with every compression, scattered samples, splits, columns named by flags, tables."""

import dataclasses
import gzip
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import sources
from pipeline.data.prepare.checks import resolve_splits
from pipeline.data.prepare.config import PrepareConfig
from pipeline.data.sources import FRAGMENTS, Columns, Source, tfrecord
from pipeline.errors import UserError
from tests.images import jpeg

JPEG = jpeg()


def write(root, *paths, data=JPEG):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(root)


def tar(path, *names, mode="w", **contents):
    """A tar of JPEGs called `names`; names in `contents` have other contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name in names:
            data = contents.get(name, JPEG)
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def rows(uri, **options):
    """{key: (label names, split)} of a source, without refused inputs."""
    [source] = sources.discover([str(uri)], **options)
    items = sources.read(source, source.fragments)
    return {item.key: (item.labels and list(item.labels), item.split) for item in items if not item.refused}


def labels(uri, **options):
    return {key: found for key, (found, _) in rows(uri, **options).items()}


def refused(uri, **options):
    [source] = sources.discover([str(uri)], **options)
    return {item.key: item.refused.reason for item in sources.read(source, source.fragments) if item.refused}


ANT_BEE = {"ant/0.jpg": ["ant"], "bee/1.jpg": ["bee"]}

# ---------------------------------------------------------------- folders


@pytest.mark.parametrize(
    "form",
    [
        "{}_images/{}/0.jpg",
        "{}2017/{}/0.jpg",
        "imagenet-{}/{}/0.jpg",
        "seg_{0}/seg_{0}/{1}/0.jpg",
        "split={}/label={}/0.jpg",
    ],
)
def test_split_folders_with_longer_names(tmp_path, form):
    paths = {form.format(split, name): ([name], split) for split in ("train", "test") for name in ("ant", "bee")}
    assert rows(write(tmp_path, *paths)) == paths


def test_splits_in_the_names_of_files(tmp_path):
    write(tmp_path, "ant/train_0.jpg", "bee/train_1.jpg", "ant/test_2.jpg")
    assert rows(tmp_path)["ant/test_2.jpg"] == (["ant"], "test")


def test_a_split_with_one_of_the_classes_has_the_classes_of_the_others(tmp_path):
    write(tmp_path, "train/ant/0.jpg", "train/bee/1.jpg", "val/ant/2.jpg")
    assert rows(tmp_path)["val/ant/2.jpg"] == (["ant"], "val")


def test_half_a_split_is_asked_about(tmp_path):
    root = write(tmp_path, "train/ant/0.jpg", "train/bee/1.jpg", "extra/ant/2.jpg")
    with pytest.raises(UserError, match=r"the folder train/ may be a split, .* --include 'train/\*' reads it alone"):
        rows(root)
    assert labels(root, class_level=2) == {
        "train/ant/0.jpg": ["ant"],
        "train/bee/1.jpg": ["bee"],
        "extra/ant/2.jpg": ["ant"],
    }


def test_folds_and_years_are_not_classes(tmp_path, caplog):
    write(tmp_path, *(f"fold_{i}/{name}/0.jpg" for i in range(3) for name in ("ant", "bee")))
    assert {name for found in labels(tmp_path).values() for name in found} == {"ant", "bee"}
    assert "--class-level 1 makes those the classes" in caplog.text


def test_a_source_inside_a_hidden_folder_and_one_that_is_all_hidden(tmp_path):
    write(tmp_path / ".data" / "photos", *ANT_BEE)
    assert labels(tmp_path / ".data" / "photos") == ANT_BEE
    with pytest.raises(UserError, match=r"only 2 hidden or system files, such as \.data/photos"):
        labels(tmp_path)


def test_other_files_next_to_images_are_not_inputs(tmp_path):
    write(tmp_path, *ANT_BEE)
    write(tmp_path, "ant/0.json", "ant/0.txt", data="{}")
    assert labels(tmp_path) == ANT_BEE
    assert refused(tmp_path) == {}


def test_a_folder_of_documents_is_not_a_class(tmp_path):
    write(tmp_path, *ANT_BEE)
    write(tmp_path, "meta/classes.txt", data="ant")
    [source] = sources.discover([str(tmp_path)])
    assert source.names == {"ant", "bee"}
    assert refused(tmp_path) == {"meta/classes.txt": "not an image"}


def test_folders_of_img2dataset_are_shards_and_not_classes(tmp_path):
    write(tmp_path, "00000/000000000.jpg", "00001/000010000.jpg")
    write(tmp_path, "00000/000000000.json", "00001/000010000.json", data='{"caption": "a dog"}')
    with pytest.raises(UserError, match="img2dataset, whose captions are not classes; --unlabelled"):
        labels(tmp_path)
    assert len(labels(tmp_path, unlabelled=True)) == 2


# ---------------------------------------------------------------- archives


@pytest.mark.parametrize("folder", ["{}", "photos/images/{}", "{}/images", "{}/sub"])
def test_the_level_of_the_classes_in_a_tar(tmp_path, folder):
    names = [f"{folder.format(name)}/0.jpg" for name in ("ant", "bee")]
    assert list(labels(tar(tmp_path / "a.tar", *names)).values()) == [["ant"], ["bee"]]


def test_splits_in_a_tar_and_in_a_zip(tmp_path):
    paths = {f"{split}/{name}/0.jpg": ([name], split) for split in ("test", "train") for name in ("ant", "bee")}
    assert rows(tar(tmp_path / "a.tar", *paths)) == paths
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in paths:
            archive.writestr(path, JPEG)
    assert rows(tmp_path / "a.zip") == paths
    assert set(rows(tmp_path / "a.zip", include=("train/*",))) >= {"train/ant/0.jpg"}


@pytest.mark.parametrize("packing", ["", "gz", "bz2", "xz", "zst"])
def test_joined_tars_are_read_to_the_end(tmp_path, packing):
    def packed(*names):
        data = tar(tmp_path / "part.tar", *names).read_bytes()
        if packing == "zst":
            return pa.compress(data, "zstd", asbytes=True)
        module = {"": None, "gz": "gzip", "bz2": "bz2", "xz": "lzma"}[packing]
        return __import__(module).compress(data) if module else data

    path = tmp_path / "in" / f"a.tar{'.' if packing else ''}{packing}"
    path.parent.mkdir()
    path.write_bytes(packed("ant/0.jpg") + packed("bee/1.jpg"))
    assert labels(path) == ANT_BEE


def test_a_damaged_header_is_not_mistaken_for_the_end_of_the_archive(tmp_path):
    path = tar(tmp_path / "a.tar", "ant/0.jpg", "bee/1.jpg", "bee/2.jpg")
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[1].offset
    data = bytearray(path.read_bytes())
    data[offset + 150] ^= 0xFF
    path.write_bytes(bytes(data))
    assert refused(path) == {"a.tar@0": "unreadable"}


@pytest.mark.parametrize("end", ["cls", "json"])
@pytest.mark.parametrize("images_first", [True, False])
def test_samples_whose_members_are_not_adjacent(tmp_path, end, images_first):
    pictures = [f"{i}.jpg" for i in range(3)]
    beside = {f"{i}.{end}": json.dumps({"label": i}) if end == "json" else str(i) for i in range(3)}
    names = [*pictures, *beside] if images_first else [*beside, *pictures]
    path = tar(tmp_path / "a.tar", *names, **beside)
    assert labels(path) == {f"{i}.jpg": [str(i)] for i in range(3)}
    assert refused(path) == {}


def test_the_same_member_in_the_archives_of_two_splits(tmp_path):
    tar(tmp_path / "train" / "a.tar", "ant/0.jpg")
    tar(tmp_path / "val" / "a.tar", "ant/0.jpg", "bee/0.jpg")
    assert set(rows(tmp_path)) == {"train/a/ant/0.jpg", "val/a/ant/0.jpg", "val/a/bee/0.jpg"}


def test_tables_in_archives_and_next_to_them(tmp_path):
    table = "file,label\n0.jpg,x\n1.jpg,y\n"
    inside = tar(tmp_path / "in" / "a.tar", "p/labels.csv", "p/0.jpg", "p/1.jpg", **{"p/labels.csv": table})
    assert labels(inside) == {"p/0.jpg": ["x"], "p/1.jpg": ["y"]}
    tar(tmp_path / "by" / "a.tar", "0.jpg", "1.jpg")
    write(tmp_path / "by", "labels.csv", data=table)
    assert labels(tmp_path / "by") == {"0.jpg": ["x"], "1.jpg": ["y"]}


def test_captions_in_text_members_are_not_classes(tmp_path):
    captions = {f"{i}.txt": f"a photo of dog number {i}" for i in range(4)}
    path = tar(tmp_path / "a.tar", *(name for i in range(4) for name in (f"{i}.jpg", f"{i}.txt")), **captions)
    with pytest.raises(UserError, match="look like captions"):
        labels(path)
    assert labels(path, columns=Columns(label="txt"))["0.jpg"] == ["a photo of dog number 0"]


def test_archives_named_after_classes_are_asked_about(tmp_path):
    for name in ("ant", "bee"):
        tar(tmp_path / f"{name}.tar", "0.jpg")
    with pytest.raises(UserError, match=r"--class-level 1 uses their names as classes \(ant, bee\)"):
        labels(tmp_path)
    assert labels(tmp_path, class_level=1) == {"ant/0.jpg": ["ant"], "bee/0.jpg": ["bee"]}


def test_zips_of_other_systems(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("ant\\0.jpg", "bee\\1.jpg", "__MACOSX/ant/._0.jpg", "bee/"):
            archive.writestr(name, b"" if name.endswith("/") else JPEG)
    assert labels(tmp_path / "a.zip") == ANT_BEE
    write(tmp_path / "bad", "b.zip", data=b"PK\3\4")
    with pytest.raises(UserError, match="not a zip archive"):
        labels(tmp_path / "bad")


def test_an_archive_of_another_format_in_the_folder_is_reported(tmp_path, caplog):
    tar(tmp_path / "a.tar", *ANT_BEE)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("cow/0.jpg", JPEG)
    assert labels(tmp_path) == ANT_BEE
    assert "ignored 1 file of format zip, such as b.zip" in caplog.text


# ---------------------------------------------------------------- columnar files, TFRecord, CIFAR


def arrow(path, table, names=None):
    if names:
        feature = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def test_saved_hugging_face_data_sets(tmp_path):
    image = [{"bytes": JPEG, "path": "0.jpg"}] * 2
    for split, numbers in {"train": [0, 1], "test": [-1, -1]}.items():
        arrow(
            tmp_path / split / "data-00000-of-00001.arrow",
            pa.table({"image": image, "label": numbers}),
            ["zebra", "ant"],
        )
        write(tmp_path, f"{split}/state.json", data="{}")
    [source] = sources.discover([str(tmp_path)])
    assert (source.kind, source.ordered_names, source.splits) == ("arrow", ("zebra", "ant"), ("test", "train"))
    found = sources.make_labels([source])
    assert found.encode(["1"]) == 1
    with pytest.raises(Exception, match="no label"):
        found.encode(["-1"])


def test_partitions_of_other_columns_are_labels(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / f"species={name}").mkdir()
        pq.write_table(pa.table({"image": [JPEG]}), tmp_path / f"species={name}" / "p.parquet")
    assert list(labels(tmp_path).values()) == [["ant"], ["bee"]]
    assert list(labels(tmp_path, columns=Columns(label="species")).values()) == [["ant"], ["bee"]]


@pytest.mark.parametrize("kind", ["parquet", "tfrecord", "tar"])
def test_columns_are_named_by_flags_everywhere(tmp_path, kind):
    values = [("a", "old"), ("b", "new")]
    if kind == "parquet":
        pq.write_table(
            pa.table({"image": [JPEG] * 2, "breed": ["a", "b"], "age": ["old", "new"]}), tmp_path / "x.parquet"
        )
    elif kind == "tfrecord":
        with open(tmp_path / "x.tfrecord", "wb") as file:
            for breed, age in values:
                tfrecord.write_record(file, tfrecord.encode_example({"image": JPEG, "breed": breed, "age": age}))
    else:
        beside = {f"{i}.json": json.dumps({"breed": breed, "age": age}) for i, (breed, age) in enumerate(values)}
        tar(tmp_path / "x.tar", "0.jpg", "0.json", "1.jpg", "1.json", **beside)
    with pytest.raises(UserError, match="--label-column"):
        sources.make_labels(sources.discover([str(tmp_path)]))
    with pytest.raises(UserError, match='did you mean "breed"'):
        sources.discover([str(tmp_path)], columns=Columns(label="bread"))
    found = rows(tmp_path, columns=Columns(label="breed", split="age"))
    assert sorted(found.values()) == [(["a"], "old"), (["b"], "new")]


def test_one_hot_columns_of_a_parquet_file(tmp_path):
    pq.write_table(pa.table({"image": [JPEG] * 2, "a": [1, 0], "b": [0, 1]}), tmp_path / "x.parquet")
    assert list(labels(tmp_path, columns=Columns(label="a,b")).values()) == [["a"], ["b"]]


def test_split_columns_under_other_names(tmp_path):
    table = {"image": [JPEG] * 2, "label": ["a", "b"]}
    pq.write_table(pa.table({**table, "Usage": ["Training", "PublicTest"]}), tmp_path / "x.parquet")
    assert [split for _, split in rows(tmp_path).values()] == ["Training", "PublicTest"]
    pq.write_table(pa.table({**table, "set": ["red", "blue"]}), tmp_path / "x.parquet")  # not names of splits
    assert [split for _, split in rows(tmp_path).values()] == [None, None]


def test_names_of_splits_are_names_of_folders():
    with pytest.raises(UserError, match=r"'\.\./x' is not a valid folder name"):
        resolve_splits(PrepareConfig(source=("x",), splits=("from-source",)), ["../x", "train"])


@pytest.mark.parametrize("form", ["binary", "python"])
def test_unpacked_cifar_with_its_splits(tmp_path, form):
    records = np.zeros((2, 3073), np.uint8)
    records[:, 0] = [0, 1]
    for part in ("data_batch_1", "test_batch"):
        if form == "binary":
            write(tmp_path, f"cifar-10-batches-bin/{part}.bin", data=records.tobytes())
        else:
            batch = pickle.dumps({b"data": records[:, 1:], b"labels": [0, 1]}, 2)
            write(tmp_path, f"cifar-10-batches-py/{part}", data=batch)
    [source] = sources.discover([str(tmp_path)])
    assert (source.kind, source.splits) == ("cifar", ("test", "train"))
    assert [split for _, split in rows(tmp_path).values()] == ["train", "train", "test", "test"]


def test_gzipped_tfrecords_with_splits(tmp_path):
    for split in ("train", "validation"):
        with gzip.open(tmp_path / f"{split}-00000-of-00001.tfrecord.gz", "wb") as file:
            tfrecord.write_record(file, tfrecord.encode_example({"image/encoded": JPEG, "image/class/label": 3}))
    assert [split for _, split in rows(tmp_path).values()] == ["train", "validation"]


# ---------------------------------------------------------------- tables


def table_labels(tmp_path, name, text, files=("0.jpg", "1.jpg"), **columns):
    write(tmp_path / "photos", *files)
    (tmp_path / name).write_text(text)
    found = labels(tmp_path / "photos", labels=str(tmp_path / name), columns=Columns(**columns))
    return [found.get(file) for file in files]


A_B = [["a"], ["b"]]
COCO = {
    "images": [{"id": 1, "file_name": "0.jpg"}, {"id": 2, "file_name": "1.jpg"}],
    "annotations": [{"image_id": 1, "category_id": 7}, {"image_id": 2, "category_id": 9}],
    "categories": [{"id": 7, "name": "a"}, {"id": 9, "name": "b"}],
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.lst", "0\ta\t0.jpg\n1\tb\t1.jpg\n"),  # MXNet: a running number first
        ("t.txt", "a 0.jpg\nb 1.jpg\n"),
        ("t.csv", "img;class\n0.jpg;a\n1.jpg;b\n"),
        ("t.csv", "Image Name,Class Name\n0.jpg,a\n1.jpg,b\n"),
        ("t.json", json.dumps(COCO)),
        ("t.json", '{"a": ["0.jpg"], "b": ["1.jpg"]}'),
        ("t.json", '{"data": [{"file": "0.jpg", "label": "a"}, {"file": "1.jpg", "label": "b"}]}'),
        ("t.json", '{"file": {"0": "0.jpg", "1": "1.jpg"}, "label": {"0": "a", "1": "b"}}'),
        ("t.json", '{"0.jpg": {"label": "a"}, "1.jpg": {"label": "b"}}'),
        ("t.json", '{"file": "0.jpg", "label": "a"}\n{"file": "1.jpg", "label": "b"}\n'),
        ("t.csv", "file,label\n0.png,a\n1.png,b\n"),  # another extension
        ("t.csv", "file,label\nmy%20photos/0.jpg,a\nmy%20photos/1.jpg,b\n"),
        ("t.csv", "id,a,b\n0,True,False\n1,False,True\n"),
    ],
)  # fmt: skip
def test_forms_of_tables(tmp_path, name, text):
    assert table_labels(tmp_path, name, text) == A_B


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("Finding Labels", ("x|y", "x"), [["x", "y"], ["x"]]),
        ("Target", ("16 0", "16"), [["16", "0"], ["16"]]),
        ("tags", ('"x,y"', "x"), [["x", "y"], ["x"]]),
        ("label", ('"tench, Tinca tinca"', "goldfish"), [["tench, Tinca tinca"], ["goldfish"]]),
        ("labels", ("\"('x', 'y')\"", "['x']"), [["x", "y"], ["x"]]),
    ],
)
def test_several_labels_in_a_cell(tmp_path, column, values, expected):
    text = f"file,{column}\n0.jpg,{values[0]}\n1.jpg,{values[1]}\n"
    assert table_labels(tmp_path, "t.csv", text, label=column) == expected


def test_a_table_of_another_encoding(tmp_path):
    write(tmp_path / "photos", "0.jpg")
    (tmp_path / "t.csv").write_text("file,label\n0.jpg,käfer\n", encoding="utf-16")
    assert labels(tmp_path / "photos", labels=str(tmp_path / "t.csv")) == {"0.jpg": ["käfer"]}
    (tmp_path / "t.csv").write_text("file,label\n0.jpg,käfer\n", encoding="latin-1")
    with pytest.raises(UserError, match="save it as UTF-8"):
        labels(tmp_path / "photos", labels=str(tmp_path / "t.csv"))


def test_a_table_for_each_split_next_to_the_folders(tmp_path):
    write(tmp_path, "train/0.jpg", "train/1.jpg", "test/0.jpg")
    write(tmp_path, "train.csv", data="id,label\n0,a\n1,b\n")
    write(tmp_path, "test.csv", data="id,label\n0,b\n")
    assert rows(tmp_path) == {
        "train/0.jpg": (["a"], "train"),
        "train/1.jpg": (["b"], "train"),
        "test/0.jpg": (["b"], "test"),
    }


def test_a_table_of_splits_leaves_the_labels_to_the_folders(tmp_path):
    write(tmp_path, *ANT_BEE)
    write(tmp_path, "metadata.csv", data="file_name,split\nant/0.jpg,train\nbee/1.jpg,test\n")
    assert rows(tmp_path) == {"ant/0.jpg": (["ant"], "train"), "bee/1.jpg": (["bee"], "test")}


def test_rows_without_a_file_are_counted_in_split_folders(tmp_path, caplog):
    for split in ("train", "test"):
        write(tmp_path, f"{split}/0.jpg")
        write(tmp_path, f"{split}/metadata.csv", data="file_name,label\n0.jpg,a\n1.jpg,b\n")
    assert refused(tmp_path) == {"test/1.jpg": "missing file", "train/1.jpg": "missing file"}
    assert "1 of 2 rows of" in caplog.text


def test_a_row_that_fits_two_files_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"the row 0.jpg matches several files, ant/0.jpg and bee/0.jpg"):
        table_labels(tmp_path, "t.csv", "file,label\n0.jpg,a\n", ("ant/0.jpg", "bee/0.jpg"))


def test_minus_one_among_indices_means_no_label(tmp_path, caplog):
    pq.write_table(pa.table({"image": [JPEG] * 3, "label": [0, 1, -1]}), tmp_path / "x.parquet")
    found = sources.make_labels(sources.discover([str(tmp_path)]))
    assert found.classes == ("0", "1")
    assert "the label -1 means no label" in caplog.text
    with pytest.raises(Exception, match="no label"):
        found.encode(["-1"])
    pq.write_table(pa.table({"image": [JPEG] * 2, "label": [1, -1]}), tmp_path / "x.parquet")
    assert sources.make_labels(sources.discover([str(tmp_path)])).classes == ("-1", "1")


def test_a_label_map_written_as_python(tmp_path):
    write(tmp_path, "map.txt", data="{0: 'tench', 1: 'goldfish'}\n")
    assert sources.read_label_map(str(tmp_path / "map.txt")) == ["tench", "goldfish"]
    write(tmp_path, "map.txt", data="{'n1': 'tench',\n 'n2': 'tench'}\n")
    assert sources.read_label_map(str(tmp_path / "map.txt")) == {"n1": "tench", "n2": "tench"}


def test_a_label_map_of_other_names_is_an_error(tmp_path):
    write(tmp_path / "photos", *ANT_BEE)
    (tmp_path / "map.txt").write_text("tench\ngoldfish\n")
    label_map = sources.read_label_map(str(tmp_path / "map.txt"))
    with pytest.raises(UserError, match=r"none of the labels .* such as 'ant'"):
        sources.make_labels(sources.discover([str(tmp_path / "photos")]), label_map)


@pytest.mark.timeout(60)  # comparing every pair of names would take minutes
def test_class_lists_of_100_000_names(tmp_path):
    names = [f"class {i}" for i in range(100_000)]
    (tmp_path / "map.txt").write_text("\n".join(names))
    label_map = sources.read_label_map(str(tmp_path / "map.txt"))
    source = Source(uri="photos", kind="folder", fragments=FRAGMENTS.empty_table(), names=frozenset(names))
    assert sources.make_labels([source], label_map).encode(["class 99999"]) == 99_999
    other = dataclasses.replace(source, names=frozenset(f"other {i}" for i in range(100_000)))
    with pytest.raises(
        UserError, match="none of the labels in photos, such as 'other 0', is among its 100,000 classes"
    ):
        sources.make_labels([other], label_map)
    (tmp_path / "map.txt").write_text("\n".join([*names, *names]))
    with pytest.raises(UserError, match="repeats 'class 0'"):
        sources.read_label_map(str(tmp_path / "map.txt"))
