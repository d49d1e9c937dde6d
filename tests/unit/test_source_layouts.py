"""Common layouts of corpora: ignored files, levels of classes and splits, and label tables."""

import gzip
import io
import json
import logging
import tarfile
import unicodedata
import zipfile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import workqueue
from pipeline.data import sources
from pipeline.data.sources import Columns, table_chunks, tfrecord
from pipeline.data.sources.large_tables import open_label_table
from pipeline.errors import UserError

JPEG = cv2.imencode(".jpg", np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))[1].tobytes()


def write(root, *paths, data=JPEG):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return str(root)


def labels(uri, **options):
    """{key: label names} of a source."""
    return {key: found for key, (found, _) in rows(uri, **options).items()}


def rows(uri, **options):
    """{key: (label names, split)} of a source, without refused inputs."""
    [source] = sources.discover([uri], **options)
    items = sources.read(source, source.fragments)
    return {item.key: (item.labels and list(item.labels), item.split) for item in items if not item.refused}


JUNK = (
    ".git/a.jpg .ipynb_checkpoints/a.jpg .Trash-1000/a.jpg ant/.hidden.jpg ant/@eaDir/a.jpg #recycle/a.jpg $RECYCLE.BIN/a.jpg "
    "lost+found/a.jpg __MACOSX/ant/a.jpg CVS/Entries ant/CVS/Root RECYCLER/a.jpg recycled/Dc1.jpg __pycache__/a.jpg "
    "ant/Thumbs.db ant/._a.jpg"
)


def test_files_of_operating_systems_are_not_inputs(tmp_path):
    root = write(tmp_path, "ant/a.jpg", "bee/b.jpg", "bee/..c.jpg", *JUNK.split(), "System Volume Information/a.jpg")
    assert labels(root) == {"ant/a.jpg": ["ant"], "bee/b.jpg": ["bee"]}


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_classes_that_are_called_like_system_folders(tmp_path, caplog, kind):
    """Folders of recycled things and of a chain of shops are classes. Ignored members of archives are counted."""
    names = ["recycled/0.jpg", "CVS/1.jpg", "glass/2.jpg", "CVS/Entries", "recycled/INFO2", "glass/._2.jpg"]
    if kind == "folder":
        write(tmp_path, *names)
    elif kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(JPEG)
                archive.addfile(member, io.BytesIO(JPEG))
    else:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name in names:
                archive.writestr(name, JPEG)
    logging.getLogger("pipeline").propagate = True
    with caplog.at_level(logging.INFO, "pipeline"):
        assert sorted(labels(str(tmp_path)).values()) == [["CVS"], ["glass"], ["recycled"]]
    assert "ignored 3 hidden or system files" in caplog.text


def test_a_file_that_is_not_an_image_is_counted_as_such(tmp_path):
    write(tmp_path, "ant/a.jpg", "bee/b.jpg")
    write(tmp_path, "readme.md", data=b"# photos")
    [source] = sources.discover([str(tmp_path)])
    refused = {item.key: item.refused.reason for item in sources.read(source, source.fragments) if item.refused}
    assert refused == {"readme.md": "not an image"}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ("photos/images/ant/1.jpg photos/images/bee/1.jpg", ["ant", "bee"]),
        ("ant/images/1.jpg bee/images/1.jpg", ["ant", "bee"]),
        ("ant/2019/1.jpg ant/2020/1.jpg bee/2019/1.jpg", ["ant", "ant", "bee"]),
        ("ant/1.jpg", ["ant"]),
        ("train/ant/1.jpg train/bee/1.jpg", ["ant", "bee"]),
        ("n01440764/1.jpg train/1.jpg", ["n01440764", "train"]),  # not all folders are splits
    ],
)
def test_the_level_of_the_classes_is_found(tmp_path, paths, expected):
    assert list(labels(write(tmp_path, *paths.split())).values()) == [[name] for name in expected]


def test_the_level_of_the_classes_can_be_named(tmp_path):
    root = write(tmp_path, "dogs/pug/1.jpg", "cats/tabby/1.jpg")
    with pytest.raises(
        UserError, match=r"--class-level 1 \(2 classes: cats, dogs\); --class-level 2 \(2 classes: pug, tabby"
    ):
        labels(root)
    assert labels(root, class_level=1) == {"dogs/pug/1.jpg": ["dogs"], "cats/tabby/1.jpg": ["cats"]}
    assert labels(root, class_level=2) == {"dogs/pug/1.jpg": ["pug"], "cats/tabby/1.jpg": ["tabby"]}


@pytest.mark.parametrize("form", ["{split}/{name}/1.jpg", "data/{split}/{name}/1.jpg", "{name}/{split}/1.jpg"])
def test_split_folders_above_and_below_the_classes(tmp_path, form):
    paths = {form.format(split=split, name=name): ([name], split) for split in ("test", "train") for name in ("a", "b")}
    assert rows(write(tmp_path, *paths)) == paths


def test_tiny_imagenet(tmp_path):
    """Classes are the folders in train, a table without a header in val; test has no labels."""
    write(tmp_path, "train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG", "val/images/val_0.JPEG")
    write(tmp_path, "test/images/test_0.JPEG")
    write(tmp_path, "val/val_annotations.txt", data=b"val_0.JPEG\tn02\t0\t0\t9\t9\n")
    assert rows(str(tmp_path)) == {
        "test/images/test_0.JPEG": (None, "test"),
        "train/n01/images/n01_0.JPEG": (["n01"], "train"),
        "train/n02/images/n02_0.JPEG": (["n02"], "train"),
        "val/images/val_0.JPEG": (["n02"], "val"),
    }


def test_a_table_in_every_split_folder(tmp_path):
    for split in ("train", "test"):
        write(tmp_path, f"{split}/0.jpg")
        write(tmp_path, f"{split}/metadata.csv", data=b"file_name,label\n0.jpg," + split[:2].encode())
    assert rows(str(tmp_path)) == {"test/0.jpg": (["te"], "test"), "train/0.jpg": (["tr"], "train")}


def test_splits_of_files_and_columns(tmp_path):
    (tmp_path / "files").mkdir()
    for split in ("train", "validation"):
        pq.write_table(
            pa.table({"image": [JPEG], "label": [split]}), tmp_path / f"files/{split}-00000-of-00001.parquet"
        )
    assert sorted(rows(str(tmp_path / "files")).values()) == [(["train"], "train"), (["validation"], "validation")]
    pq.write_table(pa.table({"image": [JPEG] * 2, "label": [1, 2], "split": ["a", "b"]}), tmp_path / "x.parquet")
    [source] = sources.discover([str(tmp_path / "x.parquet")])
    assert source.splits == ("a", "b")
    assert list(rows(str(tmp_path / "x.parquet")).values()) == [(["1"], "a"), (["2"], "b")]
    write(tmp_path / "table", "0.jpg", "1.jpg")
    write(tmp_path / "table", "labels.csv", data=b"file,split,label\n0.jpg,train,x\n1.jpg,test,y\n")
    assert rows(str(tmp_path / "table")) == {"0.jpg": (["x"], "train"), "1.jpg": (["y"], "test")}


def test_hive_partitions_are_labels(tmp_path):
    for name in ("ant", "honey%20bee"):
        (tmp_path / f"label={name}").mkdir()
        pq.write_table(pa.table({"image": [JPEG]}), tmp_path / f"label={name}" / "part-0.parquet")
    assert list(labels(str(tmp_path)).values()) == [["ant"], ["honey bee"]]


# ---------------------------------------------------------------- tables


def table_labels(tmp_path, name, text, files=("0.jpg", "1.jpg"), **columns):
    write(tmp_path / "photos", *files)
    (tmp_path / name).write_text(text)
    found = labels(str(tmp_path / "photos"), labels=str(tmp_path / name), columns=Columns(**columns))
    return [found[file] for file in files]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("t.csv", "file,label\n0.jpg,10.0\n1.jpg,2.0\n", [["10"], ["2"]]),
        ("t.csv", "file,label\n0.jpg,1.5\n1.jpg,2.0\n", [["1.5"], ["2.0"]]),  # not whole numbers: names
        ("t.csv", "file,label\n0.jpg,nan\n1.jpg,a\n", [None, ["a"]]),
        ("t.csv", "file,labels\n0.jpg,\"['a', 'b']\"\n1.jpg,\"['a']\"\n", [["a", "b"], ["a"]]),
        ("t.csv", "image,ant,bee\n0,1.0,0.0\n1,0,1\n", [["ant"], ["bee"]]),
        ("t.csv", "image,ant,bee\n0,1,1\n1,0,0\n", [["ant", "bee"], []]),
        ("t.txt", "0.jpg 3\n1.jpg 0\n", [["3"], ["0"]]),
        ("t.csv", "0.jpg,ant\n1.jpg,bee\n", [["ant"], ["bee"]]),
        ("t.csv", "ImageId,PredictionString\n0,n00000001 1 2 3 4 n00000001 5 6 7 8\n1,n00000002 1 2 3 4\n", [["n00000001"], ["n00000002"]]),
        ("t.json", '{"labels": [["0.jpg", 1], ["1.jpg", 2]]}', [["1"], ["2"]]),
    ],
)  # fmt: skip
def test_labels_in_tables(tmp_path, name, text, expected):
    assert table_labels(tmp_path, name, text) == expected


@pytest.mark.parametrize("root", ["", "./", "/data/photos/", "C:\\\\photos\\\\"])
@pytest.mark.parametrize("change", [str, str.upper, lambda path: path.replace("/", "\\"), lambda path: f" {path} "])
def test_paths_of_other_systems_are_matched(tmp_path, root, change):
    files = ("ant/0.jpg", "bee/0.jpg")
    text = "file,label\n" + "".join(f'"{change(root + file)}",{i}\n' for i, file in enumerate(files))
    assert table_labels(tmp_path, "t.csv", text, files) == [["0"], ["1"]]


def test_names_in_decomposed_letters_are_matched(tmp_path):
    files = [unicodedata.normalize(form, f"caf\u00e9-{form}.jpg") for form in ("NFC", "NFD")]
    swapped = [unicodedata.normalize(form, name) for form, name in zip(("NFD", "NFC"), files, strict=True)]
    text = "file,label\n" + "".join(f"{name},{i}\n" for i, name in enumerate(swapped))
    assert table_labels(tmp_path, "t.csv", text, tuple(files)) == [["0"], ["1"]]


def test_columns_are_named_by_flags_and_guessed_in_errors(tmp_path):
    text = "url,photo,breed\nu0,0.jpg,pug\nu1,1.jpg,pug\nu2,2.jpg,tabby\n"
    assert table_labels(tmp_path, "t.csv", text, file="photo", label="breed") == [["pug"], ["pug"]]
    with pytest.raises(UserError, match="--file-column"):
        table_labels(tmp_path, "t.csv", text)
    with pytest.raises(UserError, match=r"--label-column breed"):
        table_labels(tmp_path, "t.csv", text, file="photo")
    with pytest.raises(UserError, match=r'no such column \(did you mean "breed"'):
        table_labels(tmp_path, "t.csv", text, file="photo", label="bread")
    with pytest.raises(UserError, match=r"the label table .*t.csv names none of the files; the table has 'zero.jpg'"):
        table_labels(tmp_path, "t.csv", "file,label\nzero.jpg,a\n")


def test_captions_are_not_labels(tmp_path):
    write(tmp_path, "ant/0.jpg", "bee/0.jpg")
    lines = [json.dumps({"file_name": f"{name}/0.jpg", "text": f"a photo of {name}"}) for name in ("ant", "bee")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert labels(str(tmp_path)) == {"ant/0.jpg": ["ant"], "bee/0.jpg": ["bee"]}


@pytest.mark.parametrize(
    "columns",
    [
        {"image": pa.array([JPEG] * 2).dictionary_encode(), "label": ["a", None]},
        {"image": pa.array([list(JPEG)] * 2, pa.list_(pa.uint8())), "label": ["a", "nan"]},
        {"image": [JPEG] * 2, "label": [b"a", b""]},
    ],
)
def test_columns_of_parquet_files(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    [source] = sources.discover([str(tmp_path / "x.parquet")])
    items = list(sources.read(source, source.fragments))
    assert [(item.image, item.labels) for item in items] == [(JPEG, ["a"]), (JPEG, None)]
    assert source.names == {"a"}


@pytest.mark.parametrize(
    "text",
    [
        "n00000001 tench, Tinca tinca\nn00000002 goldfish\n",
        '{"0": ["n00000001", "tench"], "1": ["n00000002", "goldfish"]}',
        '{"1": "n00000002", "0": "n00000001"}',
        '{"n00000002": 1, "n00000001": 0}',
        '["n00000001", "n00000002"]',
    ],
)
def test_published_forms_of_class_lists(tmp_path, text):
    (tmp_path / "map.txt").write_text(text)
    assert sources.read_label_map(str(tmp_path / "map.txt")) == ["n00000001", "n00000002"]


# ---------------------------------------------------------------- archives and images


def tar(path, mode, **members):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("__", "/").replace("_", "."))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize("end", ["bz2", "xz", "gz"])
def test_compressed_tars(tmp_path, end):
    uri = tar(tmp_path / f"a.tar.{end}", f"w:{end}", ant__0_jpg=JPEG, bee__0_jpg=JPEG)
    assert labels(uri) == {"ant/0.jpg": ["ant"], "bee/0.jpg": ["bee"]}


def test_captions_in_archives_are_not_labels(tmp_path):
    caption = json.dumps({"caption": "a bird", "key": "0"}).encode()
    uri = tar(tmp_path / "a.tar", "w", **{"0_jpg": JPEG, "0_json": caption, "0_txt": b"a bird"})
    [source] = sources.discover([uri])
    assert (labels(uri), source.names) == ({"0.jpg": None}, frozenset())


def test_an_archive_that_is_not_read_is_named(tmp_path):
    write(tmp_path, "photos.7z", data=b"7z")
    with pytest.raises(UserError, match=r"photos.7z has an unsupported format; unpack it"):
        sources.discover([str(tmp_path)])


def test_gzipped_tfrecords(tmp_path):
    with gzip.open(tmp_path / "a.tfrecord.gz", "wb") as file:
        tfrecord.write_record(file, tfrecord.encode_example({"image/encoded": JPEG, "image/class/label": 3}))
    assert list(labels(str(tmp_path)).values()) == [["3"]]


def test_a_parquet_file_without_rows_is_one_error(tmp_path):
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), tmp_path / "x.parquet"
    )
    with pytest.raises(UserError, match="no rows"):
        sources.discover([str(tmp_path)])


@pytest.mark.parametrize("large", [False, True], ids=["read at once", "in chunks"])
@pytest.mark.parametrize(("name", "rows"), [("labels.tsv", "{:02d}.jpg\t{}"), ("labels.csv", "{:02d},{}")])
def test_a_label_that_begins_with_a_quotation_mark_swallows_no_rows(tmp_path, monkeypatch, large, name, rows):
    """The rows up to the next quotation mark would be part of the label. Texts of several lines stay as they are."""
    if large:
        monkeypatch.setattr(table_chunks, "LARGE_BYTES", 1)
    separator = rows[-3]
    things = ["nut", '"3/4 bolt', "saw", '"3/4 bolt', "nut"]
    head = [f"file{separator}label"]
    (tmp_path / name).write_text("\n".join(head + [rows.format(i, thing) for i, thing in enumerate(things)]))
    with workqueue.without_ray(), pytest.raises(UserError, match="has an opening quotation mark"):
        open_label_table(str(tmp_path / name))
    texts = ['"3/4"" bolt"', "saw", '"a nut, of\nsteel"', f'"1{separator}mix.\n2{separator}stir"']
    (tmp_path / name).write_text("\n".join(head + [rows.format(i, thing) for i, thing in enumerate(texts)]))
    with workqueue.without_ray():
        assert open_label_table(str(tmp_path / name)).has_labels


def test_rows_in_other_case_match_files_in_folders(tmp_path):
    """0.JPG in a table is images/0.jpg unless several rows or files could be meant; errors name the nearest file."""
    root = write(tmp_path, "images/0.jpg", "images/1.jpg")
    write(tmp_path, "labels.csv", data=b"file,label\n0.JPG,ant\n1.Jpg,bee\n")
    assert labels(root) == {"images/0.jpg": ["ant"], "images/1.jpg": ["bee"]}
    write(tmp_path, "labels.csv", data=b"file,label\n0.JPG,ant\n0.Jpg,bee\n")
    with pytest.raises(UserError, match=r"names none of the files; the table has '0.JPG' \(did you mean"):
        labels(root)


def test_a_column_for_each_class_is_advised_as_such(tmp_path):
    root = write(tmp_path, "0.jpg", "1.jpg")
    write(tmp_path, "labels.csv", data=b"file,age,cat,dog\n0.jpg,3,0,1\n1.jpg,5,1,0\n")
    with pytest.raises(UserError, match="perhaps with --label-column cat,dog"):
        labels(root)
    assert list(labels(root, columns=Columns(label="cat,dog")).values()) == [["dog"], ["cat"]]


def test_partitions_of_any_column_are_classes(tmp_path):
    root = write(tmp_path, "species=cat/0.jpg", "species=big%20dog/1.jpg")
    assert labels(root) == {"species=cat/0.jpg": ["cat"], "species=big%20dog/1.jpg": ["big dog"]}
    assert list(labels(write(tmp_path / "other", "a=1/0.jpg", "b=1/1.jpg")).values()) == [["a=1"], ["b=1"]]
