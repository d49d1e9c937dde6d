"""Malicious inputs: every reader refuses them with an error that names the file, and no path escapes its folder.

The file has known attacks, and a fuzzer: hypothesis damages files of every supported format and looks for exceptions
other than `UserError` or a counted reject. `-m slow` runs fifty times longer."""

import contextlib
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import cv2
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from models import create_model
from pipeline import config as configuration
from pipeline import workqueue
from pipeline.data import codecs
from pipeline.data.codecs import Refused
from pipeline.data.format import Manifest, open_dataset, write_dataset
from pipeline.data.prepare.checks import check_config
from pipeline.data.prepare.config import PrepareConfig
from pipeline.data.prepare.finish import receipt_names
from pipeline.data.prepare.plan import claim_output, make_plan
from pipeline.data.prepare.run import prepare_slices
from pipeline.data.sources import items, tfrecord
from pipeline.data.sources.tables import read_label_table
from pipeline.errors import UserError
from pipeline.training import checkpoint
from pipeline.training.config import PretrainConfig
from pipeline.vtab.containers import Tree
from pipeline.vtab.datasets import dsprites, patch_camelyon, smallnorb, svhn_cropped
from pipeline.vtab.datasets.base import ArchiveFile
from pipeline.vtab.examples import read_images
from pipeline.weights import checkpoints, load_model, load_weights, read_config, read_weights

LIMIT = 10_000_000
PNG = cv2.imencode(".png", np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))[1].tobytes()
JPEG = cv2.imencode(".jpg", np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))[1].tobytes()


def prepared(source: Path, output: Path, **options) -> tuple[int, dict[str, str]]:
    """(rows, {rejected key: reason}) of jobs/prepare.py over a source, in this process."""
    options = {"unlabelled": True, "max_reject_fraction": 1.0, "size": 16, **options}
    config = check_config(PrepareConfig(source=(str(source),), output=str(output), **options))
    with workqueue.without_ray():
        plan = claim_output(make_plan(config))
        prepare_slices(plan)
    receipts = plan.receipts.read(receipt_names(plan))
    rejects = {
        key: reason for receipt in receipts for rows in receipt["rejects"].values() for key, _, reason, _ in rows
    }
    return sum(part["rows"] for receipt in receipts for part in receipt["splits"].values()), rejects


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """Ten images with one label each."""
    root = str(tmp_path_factory.mktemp("dataset") / "set")
    write_dataset(root, ((f"{i:02d}", PNG, i % 2, 12, 12) for i in range(10)), classes=["a", "b"])
    return root


# ---------------------------------------------------------------- bombs


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "data",
    [
        png_header(60_000, 60_000),
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + struct.pack(">II", 1 << 31, 1 << 31)
        + b"\x08\x02"
        + b"\0" * 7,
        b"\xff\xd8\xff\xc0\x00\x11\x08"
        + struct.pack(">HH", 65_500, 65_500)
        + b"\x03\x01\x11\0\x02\x11\0\x03\x11\0\xff\xd9",
        b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0" * 20,
        b"P6\n100000 100000\n255\n" + b"\0" * 100,
    ],
    ids=["png", "png-2^62", "jpeg", "gif", "ppm"],
)
def test_an_image_that_claims_a_giant_size_is_refused_before_it_is_decoded(data):
    with pytest.raises(Refused):
        codecs.decode(data, LIMIT)


def test_an_animation_costs_one_frame():
    sink = io.BytesIO()
    frames = [Image.new("P", (300, 300), i) for i in range(200)]
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    assert codecs.decode(sink.getvalue(), LIMIT).pixels.shape == (300, 300, 3)


def test_compressed_text_in_a_png_is_not_expanded():
    """zTXt and iTXt chunks are compressed text: Pillow stops at 1 MB of them."""
    text = zlib.compress(b"\0" * 50_000_000, 9)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = PNG[:33] + chunk(b"zTXt", b"Comment\0\0" + text) + PNG[33:]
    with contextlib.suppress(Refused):
        codecs.decode(bomb, LIMIT)


@pytest.fixture
def small_files(monkeypatch):
    """Reduces the file size limit so that tests can exceed it."""
    monkeypatch.setattr(items, "MAX_FILE_BYTES", 100_000)


@pytest.mark.parametrize("name", ["bomb.tar", "bomb.tar.gz"])
def test_a_member_that_expands_is_refused_and_the_rest_is_read(tmp_path, small_files, name):
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as archive:
        for member, data in (("a/one.png", PNG), ("a/bomb.png", b"\0" * 5_000_000), ("a/two.png", PNG)):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    rows, rejects = prepared(tmp_path / name, tmp_path / "out")
    assert rows == 2
    assert rejects == {"a/bomb.png": "too many bytes"}


def test_a_file_that_is_too_large_is_refused_unread(tmp_path, small_files):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(PNG)
    with open(tmp_path / "in" / "sparse.png", "wb") as file:
        file.truncate(1 << 40)  # a sparse file of one terabyte
    rows, rejects = prepared(tmp_path / "in", tmp_path / "out")
    assert (rows, rejects) == (1, {"sparse.png": "too many bytes"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [(zipfile.ZIP_DEFLATED, "unpacks from .* to 5,000,000 bytes"), (zipfile.ZIP_STORED, "more than 100,")],
)
def test_a_zip_that_expands_is_refused(tmp_path, monkeypatch, kind, message):
    from pipeline.vtab import containers

    monkeypatch.setattr(containers, "MAX_MEMBER_BYTES", 100_000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", kind) as archive:
        archive.writestr("images/bomb.png", b"\0" * 5_000_000)
    with pytest.raises(UserError, match=rf"bomb.zip: images/bomb.png:? {message}"):
        list(Tree(str(tmp_path / "bomb.zip")).read(["images/bomb.png"]))


def test_weights_that_expand_are_refused(tmp_path, monkeypatch):
    """An .npz of zeros expands a thousandfold; real weights hardly compress."""
    from pipeline.weights import files

    monkeypatch.setattr(files, "MAX_UNFOLDED_BYTES", 100_000)
    np.savez_compressed(tmp_path / "bomb.npz", embedding=np.zeros(1_000_000, np.float32))
    with pytest.raises(UserError, match=r"bomb.npz: .* that unpack to 4,000,"):
        read_weights(tmp_path / "bomb.npz")


def test_a_tfrecord_with_a_giant_record(tmp_path):
    head = struct.pack("<Q", 1 << 40)
    data = head + struct.pack("<I", tfrecord.masked_checksum(head)) + b"\0" * 100
    with pytest.raises(UserError, match="more than the limit"):
        list(tfrecord.read_records(io.BytesIO(data), "x.tfrecord"))


# ---------------------------------------------------------------- paths and links


@pytest.fixture
def secret(tmp_path) -> Path:
    """An image next to the source, which must not be read."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.png").write_bytes(PNG)
    return tmp_path / "private" / "secret.png"


def test_a_tar_is_never_unpacked(tmp_path, secret, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = {
        "../../escape.png": tarfile.REGTYPE,
        "/tmp/absolute-escape.png": tarfile.REGTYPE,
        "a/symbolic.png": tarfile.SYMTYPE,
        "a/hard.png": tarfile.LNKTYPE,
        "a/device.png": tarfile.CHRTYPE,
        "a/pipe.png": tarfile.FIFOTYPE,
        "a/ok.png": tarfile.REGTYPE,
    }
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            info.size = len(PNG) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(PNG))
    before = set(tmp_path.rglob("*"))
    rows, rejects = prepared(tmp_path / "evil.tar", tmp_path / "out")
    assert rows == 3  # the regular members, under their names, which are only names
    assert rejects == {"a/symbolic.png": "link", "a/hard.png": "link"}
    assert not os.path.lexists("/tmp/absolute-escape.png")
    written = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "out") for path in written)


@pytest.mark.parametrize("name", ["../private/secret.png", "{tmp}/private/secret.png", "a/../../private/secret.png"])
def test_a_label_table_cannot_name_files_outside_the_source(tmp_path, secret, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(PNG)
    name = name.format(tmp=tmp_path)
    (tmp_path / "in" / "labels.csv").write_text(f"file,label\ngood.png,a\n{name},b\n")
    rows, rejects = prepared(tmp_path / "in", tmp_path / "out", unlabelled=False)
    assert (rows, rejects) == (1, {name: "missing file"})


def test_cycles_of_links_are_not_followed(tmp_path):
    """Links in the user's folders are followed, but links to a parent folder would be an endless loop."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "one.png").write_bytes(PNG)
    for name in ("up", "again", "once-more"):
        (tmp_path / "in" / "a" / name).symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    rows, rejects = prepared(tmp_path / "in", tmp_path / "out")
    assert (rows, rejects) == (1, {"a/gone.png": "missing file"})


def test_pipes_and_devices_are_not_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.png").write_bytes(PNG)
    os.mkfifo(tmp_path / "in" / "pipe.png")
    (tmp_path / "in" / "zero.png").symlink_to("/dev/zero")
    rows, rejects = prepared(tmp_path / "in", tmp_path / "out")
    assert (rows, rejects) == (1, {"pipe.png": "unreadable", "zero.png": "unreadable"})


@pytest.mark.parametrize(
    "name", ["../private/secret.png", "/etc/passwd", "a/../../private/x.parquet", "part-0.parquet\0"]
)
def test_a_manifest_cannot_name_files_outside_its_dataset(tmp_path, dataset, name):
    text = Path(dataset, "manifest.json").read_text()
    hostile = json.loads(text)
    hostile["shards"][0]["name"] = name
    with pytest.raises(UserError, match="not a dataset manifest"):
        Manifest.from_json(json.dumps(hostile), "x/manifest.json")
    assert Manifest.from_json(text).shards


def test_an_annotation_cannot_name_files_outside_an_unpacked_archive(tmp_path, secret):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.png").write_bytes(PNG)
    tree = Tree(str(tmp_path / "in"))
    found = dict(tree.read(["one.png", "../private/secret.png", str(secret)]))
    assert list(found) == ["one.png"]


# ---------------------------------------------------------------- code in data


class Harm:
    def __reduce__(self):
        return os.system, ("touch /tmp/harm-was-done",)


@pytest.fixture
def unharmed():
    Path("/tmp/harm-was-done").unlink(missing_ok=True)
    yield
    assert not Path("/tmp/harm-was-done").exists()


def test_weights_never_run_code(tmp_path, unharmed):
    torch.save({"weight": Harm()}, tmp_path / "model.pt")
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Harm()))
    np.savez(tmp_path / "model.npz", weight=np.array([Harm()], dtype=object), allow_pickle=True)
    for name in ("model.pt", "model.bin", "model.npz"):
        with pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)


def test_yaml_and_archives_never_run_code(tmp_path, unharmed):
    with pytest.raises(UserError, match="not valid YAML"):
        configuration.from_yaml(PretrainConfig, "data: !!python/object/apply:os.system ['touch /tmp/harm-was-done']")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        data = pickle.dumps({"data": Harm(), "labels": [1]})
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    rows, rejects = prepared(tmp_path / "cifar-10-python.tar.gz", tmp_path / "out")
    assert (rows, list(rejects.values())) == (0, ["corrupt"])


def test_yaml_that_multiplies_itself(tmp_path):
    """Ten levels of ten aliases: ten lists in memory, but billions when written out."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UserError, match='unknown key "a0"'):
        configuration.from_yaml(PretrainConfig, "\n".join(lines))


@pytest.mark.parametrize("text", ["[" * 1_200, '{"a":' * 1_200, "[" * 1_200 + "]" * 1_200])
def test_deeply_nested_json_and_yaml(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)
    with pytest.raises(UserError):
        Manifest.from_json(text)
    with pytest.raises(UserError):
        configuration.from_yaml(PretrainConfig, text)


@pytest.mark.parametrize(
    "model",
    [
        {"depth": 10**9},
        {"num_classes": -1},
        {"num_classes": "many"},
        {"image_size": 10**9},
        {"variant": "../../B/16"},
        {"no_such_option": 1},
        {"variant": ["B/16"]},
        {"variant": None},
    ],
)
def test_a_config_that_describes_no_model(tmp_path, model):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"variant": "mu/8", "num_classes": 2, **model}}))
    (tmp_path / "model.safetensors").write_bytes(save({"weight": torch.zeros(2)}))
    with pytest.raises(UserError):
        load_model(tmp_path)


# ---------------------------------------------------------------- fuzz: every format, damaged at random

# Kinds of damage: bytes replaced, removed or inserted, or the end truncated.
DAMAGE = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)


def damaged(data: bytes, damage) -> bytes:
    for kind, place, new in damage:
        at = int(place * len(data))
        if kind == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "cut":
            data = data[:at] + data[at + len(new) :]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        else:
            data = data[:at]
    return data


def saved(image_format: str, **options) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)).save(sink, image_format, **options)
    return sink.getvalue()


def tar(name: str) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz" if name.endswith("gz") else "w") as archive:
        for member, data in (
            ("a/0.png", PNG),
            ("a/0.cls", b"1"),
            ("a/1.jpg", JPEG),
            ("a/1.json", b'{"label": [1, 2]}'),
        ):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def parquet() -> bytes:
    sink = io.BytesIO()
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": PNG, "path": "x.png"}] * 3
    pq.write_table(pa.table({"image": pa.array(rows, struct_type), "label": [0, 1, 2]}), sink)
    return sink.getvalue()


def records() -> bytes:
    sink = io.BytesIO()
    for label in range(3):
        example = tfrecord.encode_example({"image/encoded": PNG, "image/class/label": label, "image/class/text": "a"})
        tfrecord.write_record(sink, example)
    return sink.getvalue()


def cifar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        table = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
        for name, data in (
            ("x/data_batch_1", pickle.dumps(table, 2)),
            ("x/batches.meta", pickle.dumps({b"label_names": [b"a", b"b"]}, 2)),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


SOURCES = {
    "in/a/0.png": PNG,
    "in/a/0.jpg": JPEG,
    **{f"in/a/0.{kind}": saved(kind) for kind in ("bmp", "gif", "tiff", "webp", "ppm", "tga", "ico", "pcx")},
    "in/a/exif.jpg": saved("JPEG", exif=Image.Exif()),
    "in/x.tar": tar("x.tar"),
    "in/x.tar.gz": tar("x.tar.gz"),
    "in/x.parquet": parquet(),
    "in/x.tfrecord": records(),
    "in/cifar-10-python.tar": cifar(),
    "in/labels.csv": b"file,label\n0.png,1\n1.png,2\n",
    "in/labels.jsonl": b'{"file": "0.png", "label": [1, 2]}\n{"file": "1.png", "label": [2]}\n',
}


def inputs(examples: int):
    return settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
    )


def attack_prepare(tmp_path_factory, name: str, damage) -> None:
    """Damaged sources become rows, rejects or a UserError."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged(SOURCES[name], damage))
    if "labels" in name:
        (folder / "in" / "0.png").write_bytes(PNG)
    with contextlib.suppress(UserError):
        prepared(folder / "in", folder / "out", unlabelled="labels" not in name, size=8, max_pixels=LIMIT)
    assert {path.name for path in folder.iterdir()} <= {"in", "out"}


@pytest.mark.parametrize("name", SOURCES)
def test_prepare_survives_damage(tmp_path_factory, name):
    @inputs(3)
    @given(DAMAGE)
    def survives(damage):
        attack_prepare(tmp_path_factory, name, damage)

    survives()


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_prepare_survives_much_damage(tmp_path_factory, name):
    @inputs(150)
    @given(DAMAGE)
    def survives(damage):
        attack_prepare(tmp_path_factory, name, damage)

    survives()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """One good file for each reader below."""
    folder = tmp_path_factory.mktemp("files")
    state = create_model("mu/8", num_classes=2, image_size=16).state_dict()
    torch.save(state, folder / "model.pt")
    np.savez(folder / "model.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    scipy.io.savemat(
        folder / "train_32x32.mat", {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((2, 1), np.uint8)}
    )
    with h5py.File(folder / "x.h5", "w") as file:
        file["y"] = np.zeros((4, 1, 1, 1), np.uint8)
        file.create_dataset("x", data=np.zeros((4, 8, 8, 3), np.uint8), compression="gzip")
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", PNG)
        archive.writestr("a/1.png", PNG)
    synsets = np.array([(1, "n02119789"), (2, "n01440764")], [("ILSVRC2012_ID", "O"), ("WNID", "O")])
    scipy.io.savemat(folder / "meta.mat", {"synsets": synsets[:, None]})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_bytes(b"2\n1\n")
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar", "w") as archive:
        for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"):
            archive.add(folder / name, f"ILSVRC2012_devkit_t12/data/{name}")
    norb = struct.pack("<IIIII", 0x1E3D4C55, 4, 2, 2, 8) + struct.pack("<I", 8) + bytes(2 * 2 * 64)
    (folder / "norb.mat.gz").write_bytes(gzip.compress(norb))
    np.savez_compressed(
        folder / "sprites.npz", imgs=np.zeros((4, 8, 8), np.uint8), latents_classes=np.zeros((4, 6), np.int64)
    )
    write_dataset(
        str(folder / "set"),
        ((f"{i:02d}", PNG, [i % 2], 12, 12) for i in range(10)),
        classes=["a", "b"],
        multilabel=True,
    )
    return {
        "model.pt": (folder / "model.pt").read_bytes(),
        "model.npz": (folder / "model.npz").read_bytes(),
        "model.safetensors": save(state),
        "train_32x32.mat": (folder / "train_32x32.mat").read_bytes(),
        "ILSVRC2012_devkit_t12.tar": (folder / "ILSVRC2012_devkit_t12.tar").read_bytes(),
        "x.h5": (folder / "x.h5").read_bytes(),
        "x.h5.gz": gzip.compress((folder / "x.h5").read_bytes()),
        "images.zip": (folder / "images.zip").read_bytes(),
        "images.tar": tar("images.tar"),
        "images.tar.gz": tar("images.tar.gz"),
        "norb.mat.gz": (folder / "norb.mat.gz").read_bytes(),
        "sprites.npz": (folder / "sprites.npz").read_bytes(),
        "dmlab-train.tfrecord.tar": tar("x.tar"),
        "config.yaml": configuration.to_yaml(PretrainConfig()).encode(),
        "manifest.json": (folder / "set" / "manifest.json").read_bytes(),
        "part-00000-0000.parquet": next((folder / "set").glob("*.parquet")).read_bytes(),
        "COMMIT.json": json.dumps(
            {"files": {"model.safetensors": {"bytes": 4, "sha256": "x"}}, "step": 3, "format": checkpoints.FORMAT}
        ).encode(),
        "_set": str(folder / "set").encode(),
    }


def read_dataset(path: Path, files) -> None:
    """A damaged manifest with good shards, or a good manifest with damaged shards."""
    good = Path(files["_set"].decode())
    for file in good.iterdir():
        target = path.parent / file.name
        if not target.exists():
            target.write_bytes(file.read_bytes())
    shard = next(good.glob("*.parquet")).name
    if path.suffix == ".parquet" and path.name != shard:
        path.replace(path.parent / shard)
    opened = open_dataset(path.parent)
    with contextlib.suppress(IndexError):  # a manifest that counts more rows than its shards
        opened.read(range(min(len(opened), 20)))


def read_two(path: Path, read) -> list:
    return list(read_images(ArchiveFile(uri=str(path), read=read), [0, 1]))


READERS = {
    "model.pt": lambda path, files: load_weights(create_model("mu/8", num_classes=2, image_size=16), path),
    "model.npz": lambda path, files: load_weights(create_model("mu/8", num_classes=2, image_size=16), path),
    "model.safetensors": lambda path, files: load_weights(create_model("mu/8", num_classes=2, image_size=16), path),
    "train_32x32.mat": lambda path, files: read_two(path, svhn_cropped.read),
    "ILSVRC2012_devkit_t12.tar": lambda path, files: read_label_table(str(path)),
    "x.h5": lambda path, files: read_two(path, patch_camelyon.read),
    "x.h5.gz": lambda path, files: read_two(path, patch_camelyon.read),
    "images.zip": lambda path, files: list(Tree(str(path)).read(Tree(str(path)).names())),
    "images.tar": lambda path, files: list(Tree(str(path)).read(["a/0.png", "a/1.jpg"])),
    "images.tar.gz": lambda path, files: list(Tree(str(path)).read(["a/0.png", "a/1.jpg"])),
    "norb.mat.gz": lambda path, files: read_two(path, smallnorb.read),
    "sprites.npz": lambda path, files: read_two(path, dsprites.read),
    "config.yaml": lambda path, files: configuration.from_yaml(
        PretrainConfig, path.read_bytes().decode("utf-8", "replace")
    ),
    "manifest.json": read_dataset,
    "part-00000-0000.parquet": read_dataset,
    "COMMIT.json": lambda path, files: checkpoint.survey(str(path.parent)),
}


def attack(tmp_path_factory, files, name: str, damage) -> None:
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(damaged(files[name], damage))
    with contextlib.suppress(UserError):
        READERS[name](path, files)


@pytest.mark.parametrize("name", READERS)
def test_readers_survive_damage(tmp_path_factory, files, name):
    @inputs(6)
    @given(DAMAGE)
    def survives(damage):
        attack(tmp_path_factory, files, name, damage)

    survives()


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_readers_survive_much_damage(tmp_path_factory, files, name):
    @inputs(100 if name in ("train_32x32.mat", "ILSVRC2012_devkit_t12.tar") else 400)  # a process for each file
    @given(DAMAGE)
    def survives(damage):
        attack(tmp_path_factory, files, name, damage)

    survives()


def test_a_member_without_a_name_is_skipped(tmp_path):
    """zipfile ends names at a NUL; the name of this member begins with one."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.png", PNG)
        archive.writestr("a/1.png", PNG)
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(b"x.png", b"\0.png"))
    assert Tree(str(tmp_path / "a.zip")).names() == ["a/1.png"]
