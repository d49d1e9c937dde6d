"""Link cycles, pipes, devices and kernel files: one line or a counted reject, and never an endless read."""

import os
import tarfile

import pyarrow as pa
import pytest

from pipeline import storage, workqueue
from pipeline.data import sources
from pipeline.data.format import open_dataset, write_dataset
from pipeline.data.sources import folder, items, listing, tar
from pipeline.data.sources.items import ScanOptions
from pipeline.errors import UserError
from pipeline.transfer import open_backbone
from pipeline.vtab.containers import Tree
from pipeline.weights import read_weights


@pytest.fixture(params=["pipe", "device", "link to a device", "kernel log"])
def endless(request, tmp_path):
    """A file that could be read endlessly."""
    path = tmp_path / "in" / "endless.png"
    path.parent.mkdir()
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        return "/dev/zero"
    else:
        path.symlink_to("/dev/zero" if "device" in request.param else "/proc/kmsg")
    return str(path)


def test_endless_files_are_refused(endless):
    with pytest.raises(UserError, match=r"endless\.png: a |/dev/zero: a "):
        storage.read_bytes(endless)
    with pytest.raises(UserError, match=r": a "), storage.open_file(endless):
        pass
    parent, _, name = endless.rpartition("/")
    files = pa.table({"path": [name], "size": [0]}, schema=items.LISTING)
    source = folder.scan(parent, files, ScanOptions(need_names=False))
    (item,) = folder.read(source, source.fragments)
    assert item.refused
    assert item.refused.reason == "unreadable"


def test_an_endless_archive_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    files = pa.table({"path": ["a.tar"], "size": [0]}, schema=items.LISTING)
    with pytest.raises(UserError, match=r"a\.tar: a pipe"):
        tar.scan(str(tmp_path), files, ScanOptions())
    with pytest.raises(UserError, match=r"a\.tar: a pipe"):
        Tree(str(tmp_path / "a.tar")).names()


def test_a_link_that_leads_to_itself_is_a_reject(tmp_path):
    source = tmp_path / "in"
    (source / "a").mkdir(parents=True)
    (source / "a" / "one.png").write_bytes(b"picture")
    (source / "a" / "self.png").symlink_to(source / "a" / "self.png")
    (source / "a" / "ping").symlink_to(source / "a" / "pong")
    (source / "a" / "pong").symlink_to(source / "a" / "ping")
    found = listing.list_source(str(source))
    assert found["path"].to_pylist() == ["a/one.png", "a/ping", "a/pong", "a/self.png"]
    fragments = folder.scan(str(source), found, ScanOptions()).fragments
    refused = {i.key: bool(i.refused) for i in folder.read(folder.scan(str(source), found, ScanOptions()), fragments)}
    assert refused == {"a/one.png": False, "a/ping": True, "a/pong": True, "a/self.png": True}
    assert Tree(str(source)).names() == ["a/one.png"]
    with pytest.raises(UserError, match=r"self\.png"):
        listing.list_source(str(source / "a" / "self.png"))


def made(folder, *links) -> None:
    """A folder with one image, and links {name: target}."""
    folder.mkdir(parents=True)
    (folder / "one.png").write_bytes(b"picture")
    for name, target in links:
        (folder / name).symlink_to(target, target_is_directory=True)


def listed(source) -> list[str]:
    """The files of a source, as both listings have them."""
    found = [file.path for file in storage.list_files(str(source))]
    assert listing.list_source(str(source))["path"].to_pylist() == found
    return found


def test_folders_that_link_to_one_another_are_listed_once(tmp_path, caplog):
    names = [f"class-{i:02d}" for i in range(12)]
    for name in names:
        made(tmp_path / "in" / name, *((f"to-{other}", tmp_path / "in" / other) for other in names))
    assert listed(tmp_path / "in") == [f"{name}/one.png" for name in names]
    assert "the link is not followed, because it leads to" in caplog.text


def test_folders_elsewhere_that_link_to_one_another_end(tmp_path):
    names = [f"class-{i}" for i in range(9)]
    for name in names:
        made(tmp_path / "elsewhere" / name, *((other, tmp_path / "elsewhere" / other) for other in names))
    made(tmp_path / "in", ("class-0", tmp_path / "elsewhere" / "class-0"))
    found = listed(tmp_path / "in")
    assert {"class-0/one.png", "class-0/class-1/one.png"} < set(found)
    assert len(found) == 1 + 1 + 8 + 8 * 7


def test_links_to_folders_elsewhere_are_followed(tmp_path):
    made(tmp_path / "disk" / "ants")
    made(tmp_path / "disk" / "all", ("ants", tmp_path / "disk" / "ants"))
    made(tmp_path / "in" / ".cache" / "bees", ("loop", tmp_path / "in" / ".cache"))
    made(tmp_path / "in" / "train", ("all", tmp_path / "disk" / "all"), ("bees", "../.cache/bees"), ("up", tmp_path))
    (tmp_path / "source").symlink_to(tmp_path / "in")
    for source in ("in", "source"):
        found = listed_visible(tmp_path / source)
        assert found == ["train/all/ants/one.png", "train/all/one.png", "train/bees/one.png", "train/one.png"]


def listed_visible(source) -> list[str]:
    """The files of a source, without hidden ones."""
    found = listing.list_source(str(source))["path"].to_pylist()
    assert [file.path for file in storage.list_files(str(source)) if not file.path.startswith(".")] == found
    return found


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.arrow", "a.tfrecord", "a.tar.gz", "a.zip", "cifar-10.tar", "list.csv"]
)
def test_a_pipe_with_the_name_of_an_input_is_named(tmp_path, name):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / name)
    for source in (tmp_path / "in", tmp_path / "in" / name):
        with workqueue.without_ray(), pytest.raises(UserError, match=rf"{name}: a pipe"):
            sources.discover([str(source)], unlabelled=True)


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.pt", "w.pth", "w.ckpt", "w.tar"])
def test_weights_that_are_a_pipe_are_named(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{name}: a pipe|no weights|no file"):
            read_weights(place)
    with pytest.raises(UserError, match=rf"{name}: a pipe"):
        open_backbone(f"timm:vit_tiny_patch16_224@{tmp_path / name}")


def test_folders_of_libraries_with_pipes_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    os.mkfifo(tmp_path / "model.safetensors")
    for name in (f"hf:{tmp_path}", f"timm:local-dir:{tmp_path}"):
        with pytest.raises(UserError, match=r"model\.safetensors: a pipe"):
            open_backbone(name)


def test_a_shard_that_is_a_pipe_is_named(tmp_path):
    write_dataset(str(tmp_path / "set"), [("a", b"x", 0, 1, 1)], classes=["a"])
    (shard,) = (tmp_path / "set").glob("part-*.parquet")
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match=rf"{shard.name}: a pipe"):
        open_dataset(tmp_path / "set")[0]


def test_a_tar_without_members_is_not_read_endlessly(tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    files = pa.table({"path": [""], "size": [10240]}, schema=items.LISTING)
    source = tar.scan(str(tmp_path / "empty.tar"), files, ScanOptions())
    assert not list(tar.read(source, source.fragments))
