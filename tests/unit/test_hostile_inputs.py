"""Inputs made to do harm: every reader refuses them with an error that names the file, and nothing leaves its folder.

Two parts: a corpus of known attacks, and hypothesis, which damages files of every format that is read and looks for an
exception that is neither `UserError` nor a counted reject. `-m slow` looks a hundred times longer.
"""

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
from models.convert import load_model, load_weights, read_config, read_weights
from pipeline import config as configuration
from pipeline.data import images, prepare, sources, tfrecord
from pipeline.data.images import Refused
from pipeline.data.prepare import PrepareConfig
from pipeline.data.shards import Manifest, open_dataset, write_dataset
from pipeline.errors import UserError
from pipeline.training import checkpoint
from pipeline.training.recipes import PretrainConfig
from pipeline.vtab import readers
from pipeline.vtab.archives import Tree

LIMIT = 10_000_000
PNG = cv2.imencode(".png", np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))[1].tobytes()
JPEG = cv2.imencode(".jpg", np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))[1].tobytes()


def prepared(source: Path, output: Path, **options) -> tuple[int, dict[str, str]]:
    """(rows, {rejected key: reason}) of jobs/prepare.py over a source, in this process."""
    options = {"unlabelled": True, "max_reject_fraction": 1.0, "size": 16, **options}
    config = prepare.check(PrepareConfig(source=(str(source),), output=str(output), **options))
    plan = prepare.make_plan(config)
    for unit in range(len(plan.units)):
        prepare.process(unit, plan)
    receipts = prepare._receipts(plan)
    rejects = {key: reason for receipt in receipts for rows in receipt["rejects"].values() for key, _, reason, _ in rows}
    return sum(part["rows"] for receipt in receipts for part in receipt["splits"].values()), rejects


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """Ten pictures with one label each."""
    root = str(tmp_path_factory.mktemp("dataset") / "set")
    write_dataset(root, ((f"{i:02d}", PNG, i % 2, 12, 12) for i in range(10)), classes=["a", "b"])
    return root


# ---------------------------------------------------------------- bombs


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        png_header(60_000, 60_000),
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">II", 1 << 31, 1 << 31) + b"\x08\x02" + b"\0" * 7,
        b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", 65_500, 65_500) + b"\x03\x01\x11\0\x02\x11\0\x03\x11\0\xff\xd9",
        b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0" * 20,
        b"P6\n100000 100000\n255\n" + b"\0" * 100,
    ],
    ids=["png", "png-2^62", "jpeg", "gif", "ppm"],
)
def test_an_image_that_claims_a_giant_size_is_refused_before_it_is_decoded(data):
    with pytest.raises(Refused):
        images.decode(data, LIMIT)


def test_an_animation_costs_one_frame():
    sink = io.BytesIO()
    frames = [Image.new("P", (300, 300), i) for i in range(200)]
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    assert images.decode(sink.getvalue(), LIMIT).pixels.shape == (300, 300, 3)


def test_text_in_a_png_does_not_unfold():
    """zTXt and iTXt chunks are compressed text: Pillow stops at 1 MB of them."""
    text = zlib.compress(b"\0" * 50_000_000, 9)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = PNG[:33] + chunk(b"zTXt", b"Comment\0\0" + text) + PNG[33:]
    with contextlib.suppress(Refused):
        images.decode(bomb, LIMIT)


@pytest.fixture
def small_files(monkeypatch):
    """The limit on one file, at a size that tests can exceed."""
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 100_000)


@pytest.mark.parametrize("name", ["bomb.tar", "bomb.tar.gz"])
def test_a_member_that_unfolds_is_refused_and_the_rest_is_read(tmp_path, small_files, name):
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
        file.truncate(1 << 40)  # a terabyte that takes no room on disk
    rows, rejects = prepared(tmp_path / "in", tmp_path / "out")
    assert (rows, rejects) == (1, {"sparse.png": "too many bytes"})


def test_a_zip_that_unfolds_is_refused(tmp_path, monkeypatch):
    from pipeline.vtab import archives

    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 100_000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/bomb.png", b"\0" * 5_000_000)
    with pytest.raises(UserError, match=r"bomb.zip: images/bomb.png: more than 100,000 bytes"):
        list(Tree(str(tmp_path / "bomb.zip")).read(["images/bomb.png"]))


def test_weights_that_unfold_are_refused(tmp_path, monkeypatch):
    """An .npz of zeros grows a thousandfold; weights do not compress."""
    from models import convert

    monkeypatch.setattr(convert, "MAX_UNFOLDED_BYTES", 100_000)
    np.savez_compressed(tmp_path / "bomb.npz", embedding=np.zeros(1_000_000, np.float32))
    with pytest.raises(UserError, match=r"bomb.npz: .* that unfold to 4,000,"):
        read_weights(tmp_path / "bomb.npz")


def test_a_tfrecord_with_a_giant_record(tmp_path):
    head = struct.pack("<Q", 1 << 40)
    data = head + struct.pack("<I", tfrecord._masked(head)) + b"\0" * 100
    with pytest.raises(UserError, match="more than the limit"):
        list(tfrecord.read_records(io.BytesIO(data), "x.tfrecord"))


# ---------------------------------------------------------------- paths and links


@pytest.fixture
def secret(tmp_path) -> Path:
    """A picture beside the source, which nothing may take in."""
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
    before = {path for path in tmp_path.rglob("*")}
    rows, rejects = prepared(tmp_path / "evil.tar", tmp_path / "out")
    assert rows == 3  # the regular members, under their names, which are only names
    assert rejects == {}
    assert not os.path.lexists("/tmp/absolute-escape.png")
    written = {path for path in tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(tmp_path / "out") for path in written)


@pytest.mark.parametrize("name", ["../private/secret.png", "{tmp}/private/secret.png", "a/../../private/secret.png"])
def test_a_label_table_cannot_name_files_outside_the_source(tmp_path, secret, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(PNG)
    name = name.format(tmp=tmp_path)
    (tmp_path / "in" / "labels.csv").write_text(f"file,label\ngood.png,a\n{name},b\n")
    rows, rejects = prepared(tmp_path / "in", tmp_path / "out", unlabelled=False)
    assert (rows, rejects) == (1, {name: "missing file"})


def test_links_in_circles_end(tmp_path):
    """Links of a folder that the user names are followed, like everywhere; two that lead upwards would never end."""
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


@pytest.mark.parametrize("name", ["../private/secret.png", "/etc/passwd", "a/../../private/x.parquet", "part-0.parquet\0"])
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
    """Ten levels of ten references: a billion of lists when it is written out, ten when it is read."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UserError, match='unknown key "a0"'):
        configuration.from_yaml(PretrainConfig, "\n".join(lines))


@pytest.mark.parametrize("text", ["[" * 1_200, '{"a":' * 1_200, "[" * 1_200 + "]" * 1_200])
def test_deeply_nested_json_and_yaml(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
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
