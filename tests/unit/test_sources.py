"""All input formats and their possible errors, without Ray: units run in this process."""

import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import workqueue
from pipeline.data import sources
from pipeline.data.codecs import decode
from pipeline.data.format import open_dataset
from pipeline.data.format.describe import describe_dataset
from pipeline.data.format.verify import verify_dataset
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.prepare.checks import check_config
from pipeline.data.prepare.plan import claim_output, make_plan
from pipeline.data.sources import listing, tfrecord
from pipeline.errors import UserError
from tests.images import encoded, jpeg, picture

LIMIT = 10_000_000


def run(tmp_path, **options):
    """The whole job in this process."""
    options.setdefault("max_reject_fraction", 1.0)
    config = PrepareConfig(output=str(tmp_path / "out"), **options)
    with workqueue.without_ray():
        split = next(iter(prepare(config)))
    return open_dataset(tmp_path / "out" / split)


def contents(dataset):
    """{key: (class name or names, decoded pixels)}"""
    rows = {}
    for row in dataset.read(range(len(dataset))):
        label = row["label"]
        name = [dataset.classes[k] for k in label] if isinstance(label, list) else dataset.classes[label]
        rows[row["key"]] = name
    return rows


def refusals(dataset):
    return {row["key"]: row["reason"] for row in pq.read_table(f"{dataset.uri}/rejects.parquet").to_pylist()}


# ---------------------------------------------------------------- sources


def test_class_folders(image_folder, tmp_path):
    (image_folder / "ant" / "notes.txt").write_text("not an image")
    (image_folder / "bee" / "empty.jpg").touch()
    (image_folder / "stray.jpg").write_bytes(jpeg())
    (image_folder / "cat" / "deep" / "er").mkdir(parents=True)
    (image_folder / "cat" / "deep" / "er" / "x.jpg").write_bytes(jpeg(3))
    dataset = run(tmp_path, source=(str(image_folder),))
    assert dataset.classes == ["ant", "bee", "cat"]
    assert len(dataset) == 31
    rows = contents(dataset)
    assert all(key.startswith(name) for key, name in rows.items())
    assert "cat/deep/er/x.jpg" in rows
    assert refusals(dataset) == {"ant/notes.txt": "not an image", "bee/empty.jpg": "empty", "stray.jpg": "no label"}
    assert dataset.manifest.inputs == 34
    first = dataset.read(range(31))
    assert [row["key"] for row in first] != sorted(rows)  # listed files are mixed
    original = image_folder / first[0]["key"]
    assert first[0]["image"] == original.read_bytes()  # no larger than 256: stored unchanged


def test_label_tables(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    (folder / "labels.csv").write_text("file,label\n0.jpg,dog\n1,cat\n2.jpg,dog\nghost.jpg,cat\n")
    dataset = run(tmp_path / "a", source=(str(folder),))
    assert contents(dataset) == {"0.jpg": "dog", "1.jpg": "cat", "2.jpg": "dog"}
    assert refusals(dataset) == {"3.jpg": "no row", "ghost.jpg": "missing file"}

    many = tmp_path / "many.jsonl"
    many.write_text(
        "\n".join(
            json.dumps({"file_name": f"{i}.jpg", "labels": labels})
            for i, labels in enumerate([["a", "b"], [], ["b"], ["a"]])
        )
    )
    dataset = run(tmp_path / "b", source=(str(folder),), labels=str(many), include=("*.jpg",))
    assert dataset.multilabel
    assert contents(dataset) == {"0.jpg": ["a", "b"], "1.jpg": [], "2.jpg": ["b"], "3.jpg": ["a"]}

    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"path": ["0.jpg", "1.jpg", "2.jpg", "3.jpg"], "labels": ["a;b", "b", "", "a|b"]}), table)
    dataset = run(tmp_path / "c", source=(str(folder),), labels=str(table), include=("*.jpg",))
    assert contents(dataset) == {"0.jpg": ["a", "b"], "1.jpg": ["b"], "2.jpg": [], "3.jpg": ["a", "b"]}

    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"no column of file names among: a, b"):
        run(tmp_path / "d", source=(str(folder),), labels=str(tmp_path / "bad.csv"))


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("mode", ["tar", "tar.gz"])
def test_webdataset(tmp_path, mode):
    (tmp_path / "wds").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "wds" / f"{shard:03d}.{mode}", "w:gz" if mode.endswith("gz") else "w") as archive:
            for i in range(3):
                key = f"{shard}{i}"
                add(archive, f"{key}.cls", str(i).encode())
                add(archive, f"{key}.jpg", jpeg(shard * 3 + i))
            add(archive, f"{shard}9.jpg", b"")
            add(archive, f"{shard}9.cls", b"0")
    dataset = run(tmp_path, source=(str(tmp_path / "wds"),))
    assert dataset.classes == ["0", "1", "2"]
    assert contents(dataset) == {f"{s}{i}.jpg": str(i) for s in range(2) for i in range(3)}
    assert refusals(dataset) == {"09.jpg": "empty", "19.jpg": "empty"}


@pytest.mark.parametrize("layout", ["wds", "gz", "nested"])
def test_archives_that_number_their_samples_separately(tmp_path, layout):
    """Each archive has another image named 000.jpg, which is not a duplicate key."""
    (tmp_path / "wds").mkdir()
    packed = {}
    for number, name in enumerate("ab"):
        packed[name] = io.BytesIO()
        with tarfile.open(fileobj=packed[name], mode="w:gz" if layout == "gz" else "w") as archive:
            for i in range(5):
                add(archive, f"{i:03d}.jpg", jpeg(5 * number + i))
                if layout != "nested":
                    add(archive, f"{i:03d}.cls", name.encode())
    if layout == "nested":  # the inner archive is the class
        with tarfile.open(tmp_path / "wds" / "whole.tar", "w") as outer:
            for name, data in packed.items():
                add(outer, f"{name}.tar", data.getvalue())
    else:
        for name, data in packed.items():
            (tmp_path / "wds" / f"{name}.tar{'.gz' if layout == 'gz' else ''}").write_bytes(data.getvalue())
    dataset = run(tmp_path, source=(str(tmp_path / "wds"),))
    assert contents(dataset) == {f"{name}/{i:03d}.jpg": name for name in "ab" for i in range(5)}
    unlabelled = run(tmp_path / "u", source=(str(tmp_path / "wds"),), unlabelled=True)
    assert len(unlabelled) == 10
    assert refusals(unlabelled) == {}


def test_json_and_text_labels_in_a_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "x/1.png", encoded(Image.fromarray(picture()), "PNG"))
        add(archive, "x/1.json", b'{"label": "owl", "other": 1}')
        add(archive, "x/2.jpg", jpeg())
        add(archive, "x/2.txt", b"finch\n")
        add(archive, "y/3.jpg", jpeg())  # no sidecar: the folder
    dataset = run(tmp_path, source=(str(tmp_path / "a.tar"),))
    assert contents(dataset) == {"x/1.png": "owl", "x/2.jpg": "finch", "y/3.jpg": "y"}


def test_imagenet_tar_of_tars(tmp_path):
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for wordnet in ("n01440764", "n01443537"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for i in range(3):
                    add(archive, f"{wordnet}_{i}.JPEG", jpeg(i))
            add(outer, f"{wordnet}.tar", inner.getvalue())
    source = sources.discover([str(tmp_path / "ILSVRC2012_img_train.tar")])[0]
    assert source.fragments.num_rows == 2  # each class can be read on its own
    dataset = run(tmp_path, source=(source.uri,))
    assert contents(dataset) == {f"{w}_{i}.JPEG": w for w in ("n01440764", "n01443537") for i in range(3)}


def test_a_large_tar_is_cut_between_samples(tmp_path, monkeypatch):
    path = tmp_path / "big.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(40):
            add(archive, f"{i:03d}.jpg", jpeg(i))
            add(archive, f"{i:03d}.cls", b"1")
    source = sources.discover([str(path)], unit_bytes=10_000)[0]
    assert source.fragments.num_rows > 3
    keys = [
        item.key
        for i in range(source.fragments.num_rows)
        for item in sources.read(source, source.fragments.slice(i, 1))
    ]
    assert keys == [f"{i:03d}.jpg" for i in range(40)]


def test_a_truncated_tar(tmp_path):
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(4):
            add(archive, f"c/{i}.jpg", jpeg(i))
    path.write_bytes(path.read_bytes()[:-12_000])
    dataset = run(tmp_path, source=(str(path),))
    assert 0 < len(dataset) < 4
    assert set(refusals(dataset).values()) == {"unreadable"}


def test_parquet(tmp_path):
    names = {"info": {"features": {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}}}
    images_column = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(5)] + [{"bytes": None, "path": "none.jpg"}]
    table = pa.table({"image": images_column, "label": [0, 1, 0, 1, 0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, tmp_path / "hf.parquet", row_group_size=2)
    dataset = run(tmp_path / "a", source=(str(tmp_path / "hf.parquet"),))
    assert dataset.classes == ["zebra", "ant"]
    assert contents(dataset) == {f"hf.parquet#{i}/{i}.jpg": ["zebra", "ant"][i % 2] for i in range(5)}
    assert refusals(dataset) == {"hf.parquet#5/none.jpg": "path without bytes"}

    plain = pa.table({"id": ["a", "b"], "img": [jpeg(0), b"junk"], "labels": [["x", "y"], ["y"]]})
    (tmp_path / "plain").mkdir()
    pq.write_table(plain, tmp_path / "plain" / "0.parquet")
    dataset = run(tmp_path / "b", source=(str(tmp_path / "plain"),))
    assert contents(dataset) == {"0.parquet/a": ["x", "y"]}
    assert refusals(dataset) == {"0.parquet/b": "not an image"}

    pq.write_table(pa.table({"a": [1]}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="no column of image bytes"):
        run(tmp_path / "c", source=(str(tmp_path / "none.parquet"),))


def field(number, payload):
    assert len(payload) < 1 << 21
    size = len(payload)
    encoded = b""
    while size >= 128:
        encoded += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + encoded + bytes([size]) + payload


def example(image, *labels):
    features = {b"image/encoded": field(1, field(1, image)), b"image/class/label": field(3, field(1, bytes(labels)))}
    entries = b"".join(field(1, field(1, name) + field(2, value)) for name, value in features.items())
    return field(1, entries)


def test_tfrecord(tmp_path):
    path = tmp_path / "train-00000-of-00001"
    with open(path, "wb") as file:
        for i in range(3):
            tfrecord.write_record(file, example(jpeg(i), i % 2))
    dataset = run(tmp_path, source=(str(path),))
    assert list(contents(dataset).values()) == ["0", "1", "0"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    dataset = run(tmp_path / "cut", source=(str(path),))
    assert len(dataset) == 2
    assert list(refusals(dataset).values()) == ["unreadable"]


def test_cifar(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (6, 3073), dtype=np.uint8)
    records[:, 0] = [0, 1, 2, 0, 1, 9]
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "cifar-10-batches-bin/batches.meta.txt", "\n".join("abcdefghij").encode())
        add(archive, "cifar-10-batches-bin/data_batch_1.bin", records.tobytes())
        add(archive, "cifar-10-batches-bin/test_batch.bin", records[:1].tobytes() + b"half a record")
    dataset = run(tmp_path, source=(str(path),), splits=("merge",))
    assert dataset.classes == list("abcdefghij")
    rows = dataset.read(range(len(dataset)))
    assert [row["label"] for row in rows] == [0, 1, 2, 0, 1, 9, 0]
    stored = decode(rows[2]["image"], LIMIT).pixels
    assert np.array_equal(stored, records[2, 1:].reshape(3, 32, 32).transpose(1, 2, 0))  # losslessly
    assert list(refusals(dataset).values()) == ["truncated"]


def pickled(entries):
    """A pickle as written by the authors with Python 2: protocol 2, text as bytes, an array of bytes."""

    class Numpy1(pickle._Pickler):  # the array's constructor under its former name
        def save_global(self, obj, name=None):
            if getattr(obj, "__name__", "") == "_reconstruct":
                self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
                self.memoize(obj)
            else:
                super().save_global(obj, name)

    sink = io.BytesIO()
    Numpy1(sink, 2).dump(entries)
    return sink.getvalue()


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_for_python_is_cifar_in_binary(tmp_path, hundred):
    """Both versions give the same keys, labels and pixels."""
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
    labels = [3, 0, 9, 3]
    parts = ("train", "test") if hundred else ("data_batch_1", "test_batch")
    names = [f"class{i}" for i in range(100 if hundred else 10)]
    stem = "cifar-100" if hundred else "cifar-10"
    prefix = [np.full((4, 1), 19, np.uint8)] if hundred else []  # the coarse label
    with tarfile.open(tmp_path / f"{stem}-python.tar.gz", "w:gz") as archive:
        key = b"fine_labels" if hundred else b"labels"
        meta = {b"fine_label_names" if hundred else b"label_names": [name.encode() for name in names]}
        add(archive, f"{stem}-python/{'meta' if hundred else 'batches.meta'}", pickled(meta))
        for part in parts:
            add(
                archive, f"{stem}-python/{part}", pickled({b"data": pixels, key: labels, b"batch_label": b"one of two"})
            )
    with tarfile.open(tmp_path / f"{stem}-binary.tar.gz", "w:gz") as archive:
        text = "fine_label_names.txt" if hundred else "batches.meta.txt"
        add(archive, f"{stem}-binary/{text}", "\n".join(names).encode())
        records = np.concatenate([*prefix, np.array(labels, np.uint8)[:, None], pixels], axis=1)
        for part in parts:
            add(archive, f"{stem}-binary/{part}.bin", records.tobytes())
    datasets = [
        run(tmp_path / form, source=(str(tmp_path / f"{stem}-{form}.tar.gz"),), splits=("merge",))
        for form in ("python", "binary")
    ]
    assert datasets[0].classes == datasets[1].classes == names
    rows = [dataset.read(range(len(dataset))) for dataset in datasets]
    assert rows[0] == rows[1]
    assert [row["key"] for row in rows[0]] == [f"{part}/{i:05d}" for part in parts for i in range(4)]
    assert [row["label"] for row in rows[0]] == labels * 2


def test_a_pickle_that_is_a_program_does_not_run(tmp_path):
    class Program:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "c/data_batch_1", pickle.dumps(Program(), 2))
        add(archive, "c/data_batch_2", b"\x80\x02}q\x00(broken")
        add(archive, "c/data_batch_3", pickled({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}))
        add(archive, "c/data_batch_4", pickled({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}))
        add(archive, "c/test_batch", pickled({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}))
    dataset = run(tmp_path, source=(str(path),), splits=("merge",))
    assert not (tmp_path / "ran").exists()
    assert len(dataset) == 2
    assert refusals(dataset) == {f"data_batch_{i}": "corrupt" for i in range(1, 5)}


def test_imagenet_validation_with_the_devkit(tmp_path):
    """The validation tar is flat; the devkit's ids have a separate order, which its table resolves."""
    import scipy.io

    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(1, "n02119789", "fox"), (2, "n01440764", "tench"), (3, "n99999999", "inner")], kinds)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets[:, None]})
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"2\n1\n2\n")
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as archive:
        for i in (1, 2, 3):
            add(archive, f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(i))
    devkit = str(tmp_path / "ILSVRC2012_devkit_t12.tar.gz")
    dataset = run(tmp_path, source=(str(tmp_path / "ILSVRC2012_img_val.tar"),), labels=devkit)
    assert dataset.classes == ["n01440764", "n02119789"]
    names = ["n01440764", "n02119789", "n01440764"]
    assert contents(dataset) == {f"ILSVRC2012_val_{i:08d}.JPEG": name for i, name in enumerate(names, 1)}


def test_imagenet_21k(tmp_path):
    """A gzipped tar of tars (winter 2021), a tar of class folders (the resized one), a folder of class tars."""

    def class_tar(wordnet):
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as archive:
            for i in range(2):
                add(archive, f"{wordnet}_{i}.JPEG", jpeg(i))
        return inner.getvalue()

    wordnet = ("n00004475", "n00005787")
    with tarfile.open(tmp_path / "winter21_whole.tar.gz", "w:gz") as outer:
        for w in wordnet:
            add(outer, f"winter21_whole/{w}.tar", class_tar(w))
    with tarfile.open(tmp_path / "imagenet21k_resized.tar.gz", "w:gz") as archive:
        for w in wordnet:
            for i in range(2):
                add(archive, f"imagenet21k_resized/imagenet21k_train/{w}/{w}_{i}.JPEG", jpeg(i))
    (tmp_path / "tars").mkdir()
    for w in wordnet:
        (tmp_path / "tars" / f"{w}.tar").write_bytes(class_tar(w))
    for source in ("winter21_whole.tar.gz", "imagenet21k_resized.tar.gz", "tars"):
        dataset = run(tmp_path / f"of-{source}", source=(str(tmp_path / source),), shuffle_archives="never")
        assert dataset.classes == list(wordnet)
        found = {key.rpartition("/")[2]: name for key, name in contents(dataset).items()}
        assert found == {f"{w}_{i}.JPEG": w for w in wordnet for i in range(2)}


def test_several_labels_in_archives(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, labels in enumerate((["x", "y"], ["y"], [])):
            add(archive, f"{i}.jpg", jpeg(i))
            add(archive, f"{i}.json", json.dumps({"labels": labels}).encode())
    expected = {"0.jpg": ["x", "y"], "1.jpg": ["y"], "2.jpg": []}
    assert contents(run(tmp_path / "a", source=(str(tmp_path / "a.tar"),))) == expected
    (tmp_path / "order.txt").write_text("y\nx\n")
    ordered = run(tmp_path / "b", source=(str(tmp_path / "a.tar"),), label_map=str(tmp_path / "order.txt"))
    assert contents(ordered) == expected | {"0.jpg": ["y", "x"]}  # by index

    with open(tmp_path / "m.tfrecord", "wb") as file:
        tfrecord.write_record(file, example(jpeg(0), 1, 3))
        tfrecord.write_record(file, example(jpeg(1), 2))
    assert list(contents(run(tmp_path / "c", source=(str(tmp_path / "m.tfrecord"),))).values()) == [["1", "3"], ["2"]]

    feature = {"feature": {"names": ["zebra", "ant"], "_type": "ClassLabel"}, "_type": "List"}
    table = pa.table({"image": [{"bytes": jpeg(0), "path": None}], "labels": [[1, 0]]})
    names = json.dumps({"info": {"features": {"labels": feature}}})
    pq.write_table(table.replace_schema_metadata({"huggingface": names}), tmp_path / "hf.parquet")
    dataset = run(tmp_path / "d", source=(str(tmp_path / "hf.parquet"),))
    assert (dataset.classes, contents(dataset)) == (["zebra", "ant"], {"hf.parquet#0": ["zebra", "ant"]})


def test_a_file_on_several_lines_has_all_their_labels(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    (folder / "labels.csv").write_text(
        "ImageID,LabelName\n0,dog\n1,cat\n0,leash\n0,dog\n".replace("ImageID", "image_id")
    )
    assert contents(run(tmp_path, source=(str(folder),))) == {"0.jpg": ["dog", "leash"], "1.jpg": ["cat"]}


@pytest.mark.parametrize("mix", ["auto", "never", "always"])
@pytest.mark.parametrize("by_class", [True, False])
def test_archives_sorted_by_class_are_mixed(tmp_path, ray_local, mix, by_class):
    labels = np.repeat(np.arange(6), 40)
    if not by_class:
        np.random.default_rng(0).shuffle(labels)
    (tmp_path / "wds").mkdir()
    for shard in range(6):
        with tarfile.open(tmp_path / "wds" / f"{shard}.tar", "w") as archive:
            for i in range(40):
                add(archive, f"{shard}-{i:02d}.jpg", jpeg(i % 5))
                add(archive, f"{shard}-{i:02d}.cls", str(labels[40 * shard + i]).encode())
    splits = {"a": 0.9, "b": 0.1} if by_class else {}
    fractions = tuple(f"{name}={part}" for name, part in splits.items())
    run(tmp_path, source=(str(tmp_path / "wds"),), shuffle_archives=mix, unit_bytes=50_000, splits=fractions)
    found = [open_dataset(tmp_path / "out" / split) for split in splits or [""]]
    tables = [dataset.table(("key", "label")).to_pydict() for dataset in found]
    keys = [key for table in tables for key in table["key"]]
    assert sorted(keys) == [f"{shard}-{i:02d}.jpg" for shard in range(6) for i in range(40)]
    for dataset, table in zip(found, tables, strict=True):
        assert [labels[40 * int(key[0]) + int(key[2:4])] for key in table["key"]] == table["label"]
        assert dataset.read([3])[0]["image"] == jpeg(int(table["key"][3][2:4]) % 5)
        assert dataset.manifest.mean is not None
    mixed = mix == "always" or (mix == "auto" and by_class)
    assert all((table["key"] == sorted(table["key"])) != mixed for table in tables)
    if mixed:
        assert np.mean(np.diff(tables[0]["label"]) == 0) < 0.3
    parts = {shard.name for dataset in found for shard in dataset.manifest.shards}
    assert {path.name for path in (tmp_path / "out").rglob("*.parquet")} == parts | {"rejects.parquet"}
    assert not (tmp_path / "out" / "_work").exists()


def test_label_maps(image_folder, tmp_path):
    order = tmp_path / "classes.txt"
    order.write_text("cat\nbee\ndog\n")
    dataset = run(tmp_path / "a", source=(str(image_folder),), label_map=str(order))
    assert dataset.classes == ["cat", "bee", "dog"]
    assert dataset.manifest.class_counts == [10, 10, 0]
    assert set(refusals(dataset).values()) == {"unknown label"}
    rename = tmp_path / "rename.json"
    rename.write_text('{"ant": "insect", "bee": "insect", "cat": "mammal"}')
    dataset = run(tmp_path / "b", source=(str(image_folder),), label_map=str(rename))
    assert (dataset.classes, dataset.manifest.class_counts) == (["insect", "mammal"], [20, 10])


def test_several_sources_splits_sample(image_folder, tmp_path):
    dataset = run(tmp_path / "a", source=(str(image_folder), str(image_folder)), sample=31)
    assert len(dataset) == 31
    assert {key.partition("/")[0] for key in contents(dataset)} == {"images-0", "images-1"}

    run(tmp_path / "b", source=(str(image_folder),), splits=("train=0.7", "val=0.3"))
    parts = [contents(open_dataset(tmp_path / "b" / "out" / name)) for name in ("train", "val")]
    assert sum(map(len, parts)) == 30
    assert not set(parts[0]) & set(parts[1])
    (image_folder / "ant" / "new.jpg").write_bytes(jpeg())
    run(tmp_path / "c", source=(str(image_folder),), splits=("train=0.7", "val=0.3"))
    again = contents(open_dataset(tmp_path / "c" / "out" / "train"))
    assert set(parts[0]) == set(again) - {"ant/new.jpg"}  # a new image does not change the split of another


def test_unlabelled(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg())
    with pytest.raises(UserError, match="zero classes"):
        run(tmp_path, source=(str(folder),))
    dataset = run(tmp_path, source=(str(folder),), unlabelled=True)
    assert (dataset.classes, [row["label"] for row in dataset.read([0])]) == ([], [-1])


def test_duplicate_keys_in_an_archive(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for seed in (1, 2):
            add(archive, "c/same.jpg", jpeg(seed))
    dataset = run(tmp_path, source=(str(tmp_path / "a.tar"),))
    assert refusals(dataset) == {"c/same.jpg": "duplicate key"}


def test_an_output_that_cannot_be_written_is_one_error(image_folder, tmp_path):
    """A file with the name of the split's folder appears before shards are written."""
    config = PrepareConfig(source=(str(image_folder),), output=str(tmp_path / "out"), splits=("a=0.5", "b=0.5"))
    claim_output(make_plan(check_config(config)))
    (tmp_path / "out" / "a").touch()
    with (
        workqueue.without_ray(),
        pytest.raises(UserError, match=r"/out: cannot be written \(.*File exists.*\); free some space"),
    ):
        prepare(config)


def test_a_missing_source_names_the_folder_beside_it_and_an_empty_one_does_not_name_itself(tmp_path):
    for name in ("photos", "void"):
        (tmp_path / name).mkdir()
    for source, meant in [("photo", r' \(did you mean "photos"\?\)$'), ("void", "nothing in it$")]:
        with pytest.raises(UserError, match=f"no such file or folder, or .*{meant}"):
            prepare(PrepareConfig(source=(str(tmp_path / source),), output=str(tmp_path / "out")))


def test_refused_before_anything_starts(image_folder, tmp_path):
    out = str(tmp_path / "out")
    for options, message in [
        ({}, "no --source"),
        ({"source": (str(image_folder),)}, "no --output"),
        ({"source": (str(tmp_path / "none"),), "output": out}, "no such file or folder"),
        ({"source": (str(image_folder),), "output": str(image_folder / "x")}, "is inside --source"),
        ({"source": (str(image_folder),), "output": out, "encoding": "patches", "size": 30}, "does not divide"),
        ({"source": (str(image_folder),), "output": out, "splits": ("a=0.5", "b=0.6")}, "add up to 1"),
        ({"source": (str(image_folder),), "output": out, "splits": ("a",)}, "name=fraction"),
        ({"source": (str(image_folder),), "output": out, "splits": ("a=nan", "b=1")}, "a fraction above 0"),
        ({"source": (str(image_folder),), "output": out, "encoding": "patches", "patch_size": 0}, "at least 1"),
        ({"source": (str(image_folder),), "output": out, "row_group_bytes": 4 << 30}, "at most"),
        ({"source": ("ftp://host/x",), "output": out}, "ftp:// is not supported"),
        ({"source": (str(image_folder.parent),), "output": str(tmp_path.parent / "elsewhere")}, "no such|splits|zero"),
    ][:-1]:
        with pytest.raises(UserError, match=message):
            prepare(PrepareConfig(**options))
    assert not (tmp_path / "out").exists()
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"already contains other files \(thesis.tex\)"):
        prepare(PrepareConfig(source=(str(image_folder),), output=str(occupied)))
    assert [path.name for path in occupied.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match=r"thesis.tex is not a folder; choose another --output"):
        prepare(PrepareConfig(source=(str(image_folder),), output=str(occupied / "thesis.tex")))


def test_folders_of_splits_are_not_classes(image_folder, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    shutil.copytree(image_folder, root / "val")
    image_folder.rename(root / "train")
    with pytest.raises(UserError, match=r"has the splits train, val.*--splits from-source.*--splits merge.*--include"):
        run(tmp_path, source=(str(root),))
    assert len(run(tmp_path / "merged", source=(str(root),), splits=("merge",))) == 60
    train = run(tmp_path / "apart", source=(str(root),), splits=("from-source",))
    val = open_dataset(tmp_path / "apart" / "out" / "val")
    for split, dataset in (("train", train), ("val", val)):
        assert dataset.classes == ["ant", "bee", "cat"]
        assert {key.split("/")[0] for key in contents(dataset)} == {split}
        assert all(key.split("/")[1] == name for key, name in contents(dataset).items())


def test_too_many_rejects(image_folder, tmp_path):
    for i in range(5):
        (image_folder / "ant" / f"bad{i}.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match=r"5 of 35 inputs were rejected.*5 not an image"):
        run(tmp_path, source=(str(image_folder),), max_reject_fraction=0.05)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len(pq.read_table(tmp_path / "out" / "rejects.parquet")) == 5
    assert len(run(tmp_path, source=(str(image_folder),), max_reject_fraction=0.2)) == 30


def test_read_ahead_passes_errors_on_and_stops():
    def items():
        yield from range(3)
        raise UserError("storage broke")

    ahead = sources.prefetched(items())
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="storage broke"):
        next(ahead)
    endless = sources.prefetched(iter(range(10**9)), depth=2)
    assert next(endless) == 0
    endless.close()


# ---------------------------------------------------------------- what strangers pack


def test_tars_packed_in_unusual_ways(tmp_path):
    """Dots in names, captions next to labels, links, macOS metadata, and a .tar.gz named .tar."""
    png = encoded(Image.fromarray(picture()), "PNG")
    with tarfile.open(tmp_path / "odd.tar", "w:gz") as archive:
        for name in ("./cat/a.1.jpg", "./cat/a.2.jpg", "./cat/b.jpg", "./._cat", "./cat/._b.jpg", "./cat/.DS_Store"):
            add(archive, name, jpeg(len(name)))
        add(archive, "./cat/b.png", png)
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo(f"./cat/link{kind.decode()}.jpg")
            info.type, info.linkname = kind, "./cat/b.jpg"
            archive.addfile(info)
    dataset = run(tmp_path / "a", source=(str(tmp_path / "odd.tar"),))
    assert contents(dataset) == dict.fromkeys(["cat/a.1.jpg", "cat/a.2.jpg", "cat/b.jpg", "cat/b.png"], "cat")
    assert refusals(dataset) == {"cat/link1.jpg": "link", "cat/link2.jpg": "link"}

    with tarfile.open(tmp_path / "captions.tar", "w") as archive:
        for i, label in enumerate((b"owl", b"finch")):
            add(archive, f"folder/{i}.jpg", jpeg(i))
            add(archive, f"folder/{i}.seg.png", png)
            add(archive, f"folder/{i}.txt", b"a photo of a bird")
            add(archive, f"folder/{i}.cls", label)
    dataset = run(tmp_path / "b", source=(str(tmp_path / "captions.tar"),))
    assert dataset.classes == ["finch", "owl"]
    assert contents(dataset) == {"folder/0.jpg": "owl", "folder/1.jpg": "finch"}

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        add(archive, "1.jpg", jpeg(1))
    with tarfile.open(tmp_path / "both.tar", "w") as archive:
        add(archive, "cat.tar", inner.getvalue())
        add(archive, "dog/2.jpg", jpeg(2))
    assert contents(run(tmp_path / "c", source=(str(tmp_path / "both.tar"),))) == {"1.jpg": "cat", "dog/2.jpg": "dog"}


def test_parquet_files_of_other_programs(tmp_path):
    def written(**columns):
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        return run(tmp_path / str(len(list(tmp_path.iterdir()))), source=(str(tmp_path / "x.parquet"),))

    data, names = [jpeg(i) for i in range(3)], ["a", "b", "c"]
    same = written(
        image=[{"bytes": d, "path": "1.jpg"} for d in data], label=[0, 1, 2]
    )  # Hugging Face keeps no folders
    assert contents(same) == {f"x.parquet#{i}/1.jpg": str(i) for i in range(3)}
    assert len(written(image=data, name=["cat", "cat", "dog"], label=[0, 0, 1])) == 3
    lists = pa.array([["x"], ["y", "z"], []], pa.large_list(pa.large_string()))
    large = written(image=pa.array(data, pa.large_binary()), file_name=pa.array(names, pa.large_string()), labels=lists)
    assert contents(large) == {"x.parquet/a": ["x"], "x.parquet/b": ["y", "z"], "x.parquet/c": []}
    views = written(
        image=pa.array(data, pa.binary_view()),
        file_name=pa.array(names).dictionary_encode(),
        label=pa.array(["x", "y", "y"], pa.string_view()),
    )
    assert contents(views) == {"x.parquet/a": "x", "x.parquet/b": "y", "x.parquet/c": "y"}
    assert written(image=data, label=[10**12, 10, 9]).classes == ["9", "10", str(10**12)]  # names, in order of size
    assert written(image=data, label=[1, -1, 0]).classes == ["0", "1"]


def test_label_tables_in_unusual_forms(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    labels = tmp_path / "table"
    for number, (end, text, classes) in enumerate(
        [
            ("csv", "\ufefffile_name;label\r\n0.jpg;cat\r\n./1.jpg;dog\r\n2;cat\r\n", ["cat", "dog"]),
            ("csv", "file_name, label\n0.jpg, 10\n1.jpg, 2\n2.jpg, 0\n", [str(i) for i in range(11)]),
            ("csv", 'file_name\tlabel\n0.jpg\t"a\nb"\n1.jpg\tc\n2.jpg\tc\n', ["a\nb", "c"]),
            ("jsonl", '{"file_name": "0.jpg"}\n{"file_name": "1.jpg", "label": "b"}\n', ["b"]),
        ]
    ):
        path = labels.with_suffix(f".{end}")
        path.write_text(text, newline="")
        dataset = run(tmp_path / str(number), source=(str(folder),), labels=str(path))
        assert dataset.classes == classes
        assert len(dataset) == (1 if end == "jsonl" else 3)
    for text, message in (("3", "no rows"), ("[1]", "row 1 of the label table"), ('[{"label": 1}]', "no column")):
        labels.with_suffix(".json").write_text(text)
        with pytest.raises(UserError, match=message):
            run(tmp_path / "bad", source=(str(folder),), labels=str(labels.with_suffix(".json")))


def test_one_bad_example_of_a_tfrecord_is_one_reject(tmp_path):
    with open(tmp_path / "a.tfrecord", "wb") as file:
        for record in (b"\xff\xff\xff", example(jpeg(1), 1), example(jpeg(2), 0)):
            tfrecord.write_record(file, record)
    dataset = run(tmp_path, source=(str(tmp_path / "a.tfrecord"),))
    assert (len(dataset), refusals(dataset)) == (2, {"a.tfrecord#0": "corrupt"})
    (tmp_path / "b.tfrecord").write_bytes(b"junk" * 9)
    with pytest.raises(UserError, match=r"b.tfrecord.*wrong checksum of the length"):
        run(tmp_path / "b", source=(str(tmp_path / "b.tfrecord"),))


def test_names_that_are_formulas_or_have_no_glyph_are_drawn(image_folder, tmp_path, recwarn):
    for old, new in (("ant", r"$\bad{$"), ("bee", "日本 [1]*?#%20\n")):
        (image_folder / old).rename(image_folder / new)
    dataset = run(tmp_path, source=(str(image_folder),))
    assert verify_dataset(dataset.uri) == []
    describe_dataset(dataset.uri, str(tmp_path / "pictures"))
    assert not recwarn.list


def test_a_listing_on_disk_is_the_listing_in_memory(image_folder, tmp_path, monkeypatch):
    options = {"source": (str(image_folder),), "output": str(tmp_path / "out"), "shuffle": False}
    config = check_config(PrepareConfig(**options))
    whole = make_plan(config)
    monkeypatch.setattr(listing, "SPILL_ROWS", 7)
    parts = make_plan(config)
    assert parts.sources[0].fragments.equals(whole.sources[0].fragments)
    assert parts.labels == whole.labels
    assert parts.slices == whole.slices


@pytest.mark.parametrize("rows", [1, 64, 65, 1000, 40_000])
def test_large_listings_are_sorted_and_shuffled_in_parts(rows, monkeypatch):
    """Uses buckets on disk and divides the largest one again; the order of a shuffle depends only on the seed."""
    monkeypatch.setattr(listing, "SPILL_ROWS", 64)
    places = np.random.default_rng(0).permutation(rows)
    paths = [f"{'é' if place % 3 else 'z'}/{place:05d}" for place in places]
    files = listing.listing([(path, len(path)) for path in paths])
    assert listing.sort_by_path(files)["path"].to_pylist() == sorted(paths)
    orders = [sources.shuffled(files, np.random.default_rng(seed))["path"].to_pylist() for seed in (1, 1, 2)]
    assert all(sorted(order) == sorted(paths) for order in orders)
    assert orders[0] == orders[1]
    assert rows == 1 or orders[0] != orders[2] != paths


def test_a_shuffle_in_parts_is_uniform(monkeypatch):
    """Every row is in every quarter of the order equally often."""
    monkeypatch.setattr(listing, "SPILL_ROWS", 8)
    files = listing.listing([(str(i), 1) for i in range(40)])
    rng, counts = np.random.default_rng(0), np.zeros((40, 4))
    for _ in range(400):
        order = np.array(sources.shuffled(files, rng)["path"].to_pylist(), np.int64)
        counts[order, np.arange(40) // 10] += 1
    chi2 = ((counts - 100) ** 2 / 100).sum()
    assert chi2 < 160  # 39 x 3 degrees of freedom: uniform shuffles come to 120, and half a percent of them above 160


@pytest.mark.parametrize("inside", [True, False], ids=["in the archive", "given by flag"])
@pytest.mark.parametrize("images", [2, 4], ids=["fewer images than rows", "as many images as rows"])
def test_rows_of_a_table_without_an_image_in_the_archive_are_rejects(tmp_path, inside, images):
    """Rows 2 and 3 have no image; images 7 and 8, if there are, have no row."""
    table = b"file,label\n0.jpg,x\n1.jpg,y\n2.jpg,x\n3.jpg,y\n"
    members = {f"{i}.jpg": jpeg(i) for i in (0, 1, 7, 8)[:images]} | ({"labels.csv": table} if inside else {})
    (tmp_path / "labels.csv").write_bytes(table)
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as archive:
        for name, data in members.items():
            add(archive, name, data)
    options = {} if inside else {"labels": str(tmp_path / "labels.csv")}
    dataset = run(tmp_path, source=(str(tmp_path / "in"),), **options)
    assert len(dataset) == 2
    assert dataset.manifest.rejects == {"missing file": 2} | ({"no label": 2} if images == 4 else {})
    assert dataset.manifest.inputs == images + 2
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert {row["key"] for row in rejects if row["reason"] == "missing file"} == {"2.jpg", "3.jpg"}
    with pytest.raises(UserError, match="2 missing file"):
        run(tmp_path / "again", source=(str(tmp_path / "in"),), max_reject_fraction=0.05, **options)


def test_a_row_of_a_table_for_several_sources_has_its_image_in_one(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{i}.jpg,{'xy'[i % 2]}\n" for i in range(5)))
    (tmp_path / "folder").mkdir()
    for i in (2, 3):
        (tmp_path / "folder" / f"{i}.jpg").write_bytes(jpeg(i))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in (0, 1):
            add(archive, f"{i}.jpg", jpeg(i))
    source = (str(tmp_path / "a.tar"), str(tmp_path / "folder"))
    dataset = run(tmp_path, source=source, labels=str(tmp_path / "labels.csv"))
    assert len(dataset) == 4
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    from_archives = [row["key"] for row in rejects if row["detail"] == "no such image in the archives"]
    assert from_archives == []  # the folder has 2 and 3, and lists 4 as missing


def test_a_table_in_an_archive_that_lists_something_else_is_ignored(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as archive:
        for name, data in {"ant/0.jpg": jpeg(0), "bee/1.jpg": jpeg(1), "train.txt": b"what I trained\n"}.items():
            add(archive, name, data)
    dataset = run(tmp_path, source=(str(tmp_path / "in"),))
    assert dataset.classes == ["ant", "bee"]
    assert len(dataset) == 2
    assert "train.txt names none of the images; the table is ignored" in caplog.text


def test_an_output_with_many_other_files_is_refused_without_listing_them(tmp_path, image_folder, monkeypatch):
    """Such as /, for which the listing takes minutes."""
    for i in range(30):
        (tmp_path / "home" / f"user{i}").mkdir(parents=True)
        (tmp_path / "home" / f"user{i}" / "thesis.tex").touch()
    looked, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder=".": (looked.append(folder), real(folder))[1])
    for splits in ((), ("from-source",), ("a=0.5", "b=0.5")):
        looked.clear()
        with pytest.raises(UserError, match=r"home: already contains other files \(user\d+/thesis.tex, ...\)"):
            prepare(PrepareConfig(source=(str(image_folder),), output=str(tmp_path / "home"), splits=splits))
        assert len(looked) < 10
