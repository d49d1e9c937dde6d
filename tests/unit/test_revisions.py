"""Growing corpora: appended sources, deleted keys, named revisions, and stopped commands."""

import contextlib
import dataclasses
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import lease, revision_names, storage, workqueue
from pipeline.data import Loader, open_dataset
from pipeline.data.format import write_dataset
from pipeline.data.format.deleted import write_deleted
from pipeline.data.format.revisions import publish, successor
from pipeline.data.format.verify import verify_dataset
from pipeline.data.loading.augment import Augment
from pipeline.data.mixture import open_data
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.prepare.change import lock_datasets
from pipeline.data.prepare.delete import delete_keys, purge
from pipeline.errors import InUse, UserError
from tests.images import photo, tinted
from tests.prepared import content

pytestmark = pytest.mark.usefixtures("without_ray")
SPLITS = ("train=0.8", "test=0.2")


def write_images(folder: Path, classes: dict[str, int], seed: int) -> str:
    """PNG files CLASS/sNN-NNN.png, no two alike."""
    generator = np.random.default_rng(seed)
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = tinted(generator, 40, 48, label % 3, noise=200, tint=40)
            cv2.imwrite(str(folder / name / f"s{seed:02d}-{i:03d}.png"), picture)
    return str(folder)


def config(tmp_path: Path, *sources: str, **options) -> PrepareConfig:
    fields = {"size": 32, "row_group_bytes": 12_000, "shard_bytes": 30_000, **options}
    return PrepareConfig(source=sources, output=str(tmp_path / "set"), **fields)


def keys_of(uri) -> list[str]:
    return open_dataset(uri).table(["key"])["key"].to_pylist()


def labels_of(uri) -> dict[str, str]:
    dataset = open_dataset(uri)
    return {row["key"]: dataset.classes[row["label"]] for row in dataset}


@pytest.fixture
def grown(tmp_path) -> Path:
    """60 images of three classes in two splits, and a second revision with 30 more, ten of them of a new class."""
    first = write_images(tmp_path / "first", {"ant": 20, "bee": 20, "cat": 20}, 1)
    second = write_images(tmp_path / "second", {"ape": 10, "bee": 20}, 2)
    prepare(config(tmp_path, first, splits=SPLITS))
    prepare(config(tmp_path, second, splits=SPLITS), append=True)
    return tmp_path / "set"


# ---------------------------------------------------------------- append


def test_appended_images_are_a_revision_beside_the_old_one(grown, tmp_path):
    assert [verify_dataset(f"{grown}/{name}") for name in ("train", "test", "train@1", "train@2", "test@1")] == [[]] * 5
    old, new = open_dataset(f"{grown}/train@1"), open_dataset(f"{grown}/train")
    assert (old.manifest.revision, new.manifest.revision) == (1, 2)
    assert (old.classes, new.classes) == (["ant", "bee", "cat"], ["ant", "bee", "cat", "ape"])
    assert new.manifest.shards[: len(old.manifest.shards)] == old.manifest.shards
    assert keys_of(f"{grown}/train@2")[: len(old)] == keys_of(f"{grown}/train@1")
    rows = [open_dataset(f"{grown}/{name}") for name in ("train", "test")]
    assert sum(map(len, rows)) == sum(dataset.manifest.inputs for dataset in rows) == 90
    for name in ("train", "test"):
        assert all(f"{label}/s" in key for key, label in labels_of(f"{grown}/{name}").items())
    entry = new.manifest.history[-1]
    assert (entry["revision"], entry["kind"], entry["source"]) == (2, "append", [str(tmp_path / "second")])
    assert entry["rows"] == len(new) - len(old)
    assert not (grown / "_work").exists()


def test_a_finished_append_is_not_repeated(grown, tmp_path):
    before = content(grown)
    prepare(config(tmp_path, str(tmp_path / "second"), splits=SPLITS), append=True)
    prepare(config(tmp_path, str(tmp_path / "first"), splits=SPLITS))  # the first command: finished, too
    prepare(
        config(tmp_path, str(tmp_path / "first"), str(tmp_path / "second"), splits=SPLITS), append=True
    )  # all there
    assert content(grown) == before


def test_appending_a_folder_that_has_grown_adds_only_the_new_images(tmp_path):
    folder = tmp_path / "first"
    prepare(config(tmp_path, write_images(folder, {"ant": 10, "bee": 10}, 1)))
    write_images(folder, {"ant": 5, "bee": 0, "cow": 3}, 2)
    manifest = prepare(config(tmp_path, str(folder)), append=True)[""]
    assert (manifest.rows, manifest.inputs, manifest.rejects) == (28, 28, {})
    assert (manifest.history[-1]["rows"], manifest.history[-1]["skipped"]) == (8, 20)
    assert manifest.classes == ["ant", "bee", "cow"]
    assert verify_dataset(str(tmp_path / "set")) == []


def test_repeated_images_are_found_in_the_dataset_and_the_reports_add_up(tmp_path):
    """With other names, in other formats: equal pixels are removed by exact, a resized copy by near."""
    first = tmp_path / "first" / "x"
    first.mkdir(parents=True)
    for i in range(8):
        cv2.imwrite(str(first / f"{i}.png"), photo(200, 240, i))
    shutil.copy(first / "0.png", first / "0-again.png")
    second = tmp_path / "second" / "x"
    second.mkdir(parents=True)
    cv2.imwrite(str(second / "same.bmp"), cv2.imread(str(first / "3.png")))
    cv2.imwrite(str(second / "small.jpg"), cv2.resize(cv2.imread(str(first / "5.png")), (200, 168)))
    cv2.imwrite(str(second / "new.png"), photo(200, 240, 99))
    for mode, rows, found in (
        ("exact", 10, {"exact in the corpus": 2}),
        ("near", 9, {"exact in the corpus": 2, "near in the corpus": 1}),
    ):
        shared = config(tmp_path, str(tmp_path / "first"), deduplicate=mode, size=128)
        shared = dataclasses.replace(shared, output=str(tmp_path / mode))
        prepare(shared)
        manifest = prepare(dataclasses.replace(shared, source=(str(tmp_path / "second"),)), append=True)[""]
        assert (manifest.rows, manifest.inputs) == (rows, 12), mode
        assert manifest.duplicates_by_reason == found
        report = pq.read_table(f"{tmp_path}/{mode}/duplicates@2.parquet").to_pylist()
        assert len(report) == manifest.duplicates
        assert {"second/x/same.bmp": "x/3.png"}.items() <= {row["key"]: row["match"] for row in report}.items()
        assert verify_dataset(f"{tmp_path}/{mode}") == verify_dataset(f"{tmp_path}/{mode}@1") == []


def test_files_of_the_same_name_in_another_source_are_other_images(tmp_path):
    """cat/0001.jpg of every month: nothing is skipped, and keys stay unique."""
    months = [write_images(tmp_path / name / "images", {"ant": 4, "bee": 4}, 1) for name in ("may", "june", "july")]
    for i, month in enumerate(months):
        for path in Path(month).rglob("*.png"):
            cv2.imwrite(str(path), cv2.imread(str(path)) ^ np.uint8(i))
        manifest = prepare(config(tmp_path, month), append=bool(i))[""]
        assert manifest.rows == 8 * (i + 1)
    assert {key.split("ant/")[0] for key in keys_of(tmp_path / "set") if "ant/" in key} == {"", "images/", "images-2/"}
    prepare(config(tmp_path, *months), append=True)  # each keeps its keys
    assert len(open_dataset(tmp_path / "set")) == 24
    assert verify_dataset(str(tmp_path / "set")) == []


def test_rejects_of_both_revisions_are_listed_and_the_limit_is_for_the_new_ones(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_images(first, {"ant": 10, "bee": 10}, 1)
    (first / "ant" / "bad.png").write_bytes(b"no image")
    prepare(config(tmp_path, str(first), max_reject_fraction=0.1))
    write_images(second, {"ant": 2}, 2)
    (second / "ant" / "worse.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of 3 inputs were rejected.*rejects@2.parquet"):
        prepare(config(tmp_path, str(second)), append=True)
    assert verify_dataset(str(tmp_path / "set")) == []  # revision 1, which the stopped append has not touched
    manifest = prepare(config(tmp_path, str(second), max_reject_fraction=0.5), append=True)[""]
    assert (manifest.rows, manifest.inputs, sum(manifest.rejects.values())) == (22, 24, 2)
    assert verify_dataset(str(tmp_path / "set")) == verify_dataset(f"{tmp_path}/set@1") == []


def test_an_input_that_was_left_out_and_is_read_again_is_listed_once(tmp_path, caplog):
    """A reject and a duplicate of revision 1 that are still in the folder, and a reject that was repaired."""
    folder = tmp_path / "first"
    write_images(folder, {"ant": 30, "bee": 30}, 1)
    for name in ("ant/bad.png", "ant/repaired.png"):
        (folder / name).write_bytes(b"no image")
    cv2.imwrite(str(folder / "ant" / "alone.png"), photo(64, 64, 1))
    shutil.copy(folder / "ant" / "alone.png", folder / "bee" / "same.png")
    first = prepare(config(tmp_path, str(folder), deduplicate="exact"))[""]
    cv2.imwrite(str(folder / "ant" / "repaired.png"), photo(64, 64, 2))
    last = prepare(config(tmp_path, str(folder), deduplicate="exact"), append=True)[""]
    assert [(m.rows, m.inputs, sum(m.rejects.values()), m.duplicates_by_reason) for m in (first, last)] == [
        (61, 64, 2, {"exact in the corpus": 1}),
        (62, 64, 1, {"exact in the corpus": 1}),
    ]
    reports = [pq.read_table(tmp_path / "set" / f"{name}@2.parquet").to_pylist() for name in ("rejects", "duplicates")]
    assert [row["key"] for row in reports[0]] == ["ant/bad.png"]
    assert len(reports[1]) == 1
    assert {reports[1][0]["key"], reports[1][0]["match"]} == {"ant/alone.png", "bee/same.png"}
    (folder / "ant" / "worse.png").write_bytes(b"no image")
    before = content(tmp_path / "set")
    with caplog.at_level("INFO"):
        prepare(config(tmp_path, str(folder), deduplicate="exact"), append=True)
    assert "already has all of these images; there is no new revision" in caplog.text
    assert "2 inputs could not be used (2 not an image, such as ant/" in caplog.text
    assert content(tmp_path / "set") == before
    assert verify_dataset(str(tmp_path / "set")) == verify_dataset(f"{tmp_path}/set@1") == []


def test_an_append_without_a_usable_image_is_not_a_success(tmp_path):
    prepare(config(tmp_path, write_images(tmp_path / "first", {"ant": 10, "bee": 10}, 1)))
    before, bad = content(tmp_path / "set"), tmp_path / "second" / "ant" / "bad.png"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no image was added.*1 input could not be used \(1 not an image, such as"):
        prepare(config(tmp_path, str(tmp_path / "second"), max_reject_fraction=1.0), append=True)
    other = write_images(tmp_path / "third", {"ant": 4}, 3)
    with pytest.raises(UserError, match=r"unfinished append of another .*, or remove .*/set/_work to abandon it"):
        prepare(config(tmp_path, other), append=True)
    shutil.rmtree(tmp_path / "set" / "_work")  # the remedy that the errors name
    assert content(tmp_path / "set") == before


def test_an_append_stopped_anywhere_ends_in_the_same_bytes(tmp_path, monkeypatch):
    """Every write to storage fails once, from the first to the last: the same command continues."""
    first = write_images(tmp_path / "first", {"ant": 12, "bee": 12}, 1)
    second = write_images(tmp_path / "second", {"bee": 8, "cow": 8}, 2)
    original = config(tmp_path, first, splits=SPLITS)
    prepare(original)
    shutil.copytree(tmp_path / "set", tmp_path / "start")
    more = config(tmp_path, second, splits=SPLITS)
    prepare(more, append=True)
    whole = content(tmp_path / "set")
    at = 0
    while True:
        shutil.rmtree(tmp_path / "set")
        shutil.copytree(tmp_path / "start", tmp_path / "set")
        with stopped_at_write(at, monkeypatch, tmp_path) as stop:
            with contextlib.suppress(Stopped):
                prepare(more, append=True)
        if not stop.happened:
            break
        for name in ("train", "test"):
            assert verify_dataset(f"{tmp_path}/set/{name}") == []
            assert verify_dataset(f"{tmp_path}/set/{name}@1") == []
        prepare(more, append=True)
        assert content(tmp_path / "set") == whole, f"stopped at write {at}"
        at += 1
    assert at > 8


class Stopped(BaseException):
    """Stands for a kill."""


class stopped_at_write:
    """Within the block, the write of that number to storage does not happen, nor anything after it. Afterwards the locks
    below `root` are those of a process that has ended."""

    def __init__(self, at, monkeypatch, root):
        self.left, self.monkeypatch, self.happened, self.root = at, monkeypatch, False, root
        monkeypatch.setattr(lease, "SETTLE", 0.01)

    def __enter__(self):
        from pipeline import storage

        self.context = self.monkeypatch.context()
        patch = self.context.__enter__()
        for name in ("write_bytes", "remove"):
            patch.setattr(storage, name, self.wrapped(getattr(storage, name)))
        return self

    def wrapped(self, function):
        def call(*arguments, **options):
            if self.left == 0 or self.happened:
                self.happened = True
                raise Stopped
            self.left -= 1
            return function(*arguments, **options)

        return call

    def __exit__(self, *exception):
        self.context.__exit__(None, None, None)
        for lock in self.root.rglob(lease.LAUNCH):
            lock.write_text(json.dumps({**json.loads(lock.read_text()), "started": 1.0}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 48}, r"prepared with --size 32 \(now 48\); give the same settings"),
        ({"splits": ()}, "set has no finished dataset; prepare it first without --append, with the same --splits"),
        ({"deduplicate": "exact"}, r"prepared with --deduplicate off \(now exact\)"),
    ],
)
def test_an_append_with_other_settings_is_refused_before_any_work(grown, tmp_path, change, message):
    before = content(grown)
    with pytest.raises(UserError, match=message):
        prepare(config(tmp_path, str(tmp_path / "second"), **{"splits": SPLITS, **change}), append=True)
    assert content(grown) == before


def test_an_append_is_decontaminated_like_the_dataset(tmp_path):
    sets = write_images(tmp_path / "eval", {"x": 3}, 7)
    shutil.copytree(f"{sets}/x", tmp_path / "second" / "ant")
    first = write_images(tmp_path / "first", {"ant": 10, "bee": 10}, 1)
    second = write_images(tmp_path / "second", {"ant": 5}, 2)
    prepare(config(tmp_path, first, decontaminate=(sets,)))
    with pytest.raises(UserError, match=r"has no images of .*eval; add --decontaminate"):
        prepare(config(tmp_path, second), append=True)
    manifest = prepare(config(tmp_path, second, decontaminate=(sets,)), append=True)[""]
    assert (manifest.rows, manifest.duplicates_by_reason) == (25, {f"exact {sets}": 3})


def test_nothing_to_append_to(tmp_path):
    source = write_images(tmp_path / "first", {"ant": 3, "bee": 3}, 1)
    with pytest.raises(UserError, match="has no finished dataset; prepare it first without --append"):
        prepare(config(tmp_path, source), append=True)
    write_dataset(f"{tmp_path}/set", [("a", b"x", 0, 1, 1)], classes=["x"])
    with pytest.raises(UserError, match=r"was not prepared by `jobs/prepare.py --source`"):
        prepare(config(tmp_path, source), append=True)


# ---------------------------------------------------------------- names


def test_revisions_are_opened_by_name_everywhere(grown):
    with Loader(open_dataset(f"{grown}/train@1"), batch_size=8, augment=Augment(size=16)) as loader:
        assert {key for batch in loader for key in batch["key"]} <= set(keys_of(f"{grown}/train@1"))
    mixed = open_data(f"{grown}/train@1=1,{grown}/test@2=1")
    assert mixed.names == ["set-1", "set-2"]
    with pytest.raises(UserError, match=r"train@3: .*train has no revision 3; it has @1, @2"):
        open_dataset(f"{grown}/train@3")
    with pytest.raises(UserError, match=r"none@1: no dataset here"):
        open_dataset(f"{grown}/none@1")


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path):
    write_dataset(f"{tmp_path}/photos@2", [("a", b"x", 0, 1, 1)], classes=["x"])
    assert open_dataset(f"{tmp_path}/photos@2").manifest.revision == 1
    assert len(open_dataset(f"{tmp_path}/photos@2@1")) == 1


# ---------------------------------------------------------------- delete


def chosen(grown) -> list[str]:
    """Keys of rows of both revisions, in two of the shards of train."""
    dataset = open_dataset(f"{grown}/train")
    last = len(dataset) - 1
    return [row["key"] for row in dataset.read([0, 1, last])]


def write_keys(path: Path, keys) -> str:
    path.write_text("\n".join(keys) + "\n")
    return str(path)


def test_deleted_rows_are_gone_and_all_other_shards_are_unchanged(grown, tmp_path):
    before, keys = open_dataset(f"{grown}/train"), chosen(grown)
    images = [row["image"] for row in before.read([0, 1, len(before) - 1])]
    results = delete_keys(str(grown), write_keys(tmp_path / "keys.txt", keys))
    assert [(one.uri, one.deleted, one.older_revisions) for one in results] == [
        (f"{grown}/test", 0, []),
        (f"{grown}/train", 3, [1, 2]),
    ]
    after = open_dataset(f"{grown}/train")
    assert keys_of(f"{grown}/train") == [key for key in keys_of(f"{grown}/train@2") if key not in keys]
    shared = {shard.name for shard in before.manifest.shards} & {shard.name for shard in after.manifest.shards}
    assert len(shared) == len(before.manifest.shards) - 2
    bytes_now = [Path(after.shard_uri(i)).read_bytes() for i in range(len(after.manifest.shards))]
    assert not any(image in data for image in images for data in bytes_now)
    counts = dict(zip(after.classes, after.manifest.class_counts, strict=True))
    assert counts == {name: sum(label == name for label in labels_of(f"{grown}/train").values()) for name in counts}
    assert (after.manifest.deleted, after.manifest.revision) == (3, 3)
    assert [verify_dataset(f"{grown}/{name}") for name in ("train", "train@1", "train@2", "test")] == [[]] * 4


def test_deleted_images_stay_out_of_every_later_append(grown, tmp_path, caplog):
    """After a purge, a second deletion and an append of other images, too."""
    first, third = tmp_path / "first", write_images(tmp_path / "third", {"ant": 4, "bee": 4}, 3)
    keys = [key for key in chosen(grown) if not key.startswith("second/")]
    keys.append(next(key for key in keys_of(f"{grown}/test") if not key.startswith("second/")))
    delete_keys(str(grown), write_keys(tmp_path / "keys.txt", keys[:1]))
    purge(str(grown))
    prepare(config(tmp_path, third, splits=SPLITS), append=True)
    delete_keys(str(grown), write_keys(tmp_path / "keys.txt", keys[1:]))
    purge(str(grown))
    with caplog.at_level("INFO"):
        prepare(config(tmp_path, str(first), splits=SPLITS), append=True)
    assert f"already has all of these images, except {len(keys)} that were deleted and stay out" in caplog.text
    write_images(first, {"ant": 3, "bee": 0, "cow": 3}, 4)
    with caplog.at_level("INFO"):
        manifests = prepare(config(tmp_path, str(first), splits=SPLITS), append=True)
    assert not set(keys) & {*keys_of(f"{grown}/train"), *keys_of(f"{grown}/test")}
    entries = [manifest.history[-1] for manifest in manifests.values()]
    assert [sum(entry[name] for entry in entries) for name in ("rows", "skipped", "skipped_deleted")] == [
        6,
        60 - len(keys),
        len(keys),
    ]
    assert "1 deleted before and kept out" in caplog.text
    assert [verify_dataset(f"{grown}/{name}") for name in ("train", "test")] == [[], []]
    assert not any(key.encode() in path.read_bytes() for key in keys for path in grown.rglob("deleted*"))


def test_a_dataset_without_the_hashes_of_its_deleted_keys(grown, tmp_path):
    delete_keys(f"{grown}/train", write_keys(tmp_path / "keys.txt", chosen(grown)))
    assert verify_dataset(f"{grown}/train") == []
    write_deleted(f"{grown}/train", 3, np.array([1], np.uint64))  # a file of another dataset, or a part
    (problem,) = verify_dataset(f"{grown}/train")
    assert problem.startswith("deleted@3.parquet: not the hashes that the manifest was written with")
    with pytest.raises(UserError, match="copy it again from where the dataset came from"):
        prepare(config(tmp_path, str(tmp_path / "first"), splits=SPLITS), append=True)
    (grown / "train" / "deleted@3.parquet").unlink()
    (problem,) = verify_dataset(f"{grown}/train")
    assert problem.startswith("deleted@3.parquet: missing; it has the hashes of the deleted keys")
    with pytest.raises(UserError, match="without which deleted images may come back"):
        prepare(config(tmp_path, str(tmp_path / "first"), splits=SPLITS), append=True)
    assert verify_dataset(f"{grown}/train@2") == []


@pytest.mark.parametrize("busy", ["", "train"])
def test_a_dataset_that_another_process_changes_is_left_alone(grown, tmp_path, busy):
    """A change of the whole dataset and a change of one of its splits exclude each other."""
    keys, third = chosen(grown), write_images(tmp_path / "third", {"ant": 4, "bee": 4}, 3)
    path, before = write_keys(tmp_path / "keys.txt", keys), content(grown)
    works = [
        lambda: delete_keys(str(grown), path),
        lambda: purge(str(grown)),
        lambda: prepare(config(tmp_path, third, splits=SPLITS), append=True),
    ]
    if not busy:
        works += [lambda: delete_keys(f"{grown}/train", path), lambda: purge(f"{grown}/train")]
    root = str(grown / busy) if busy else str(grown)
    with lock_datasets(root, [root] if busy else [f"{grown}/train", f"{grown}/test"]):
        for work in works:
            with pytest.raises(InUse, match="is being written by prepare, process"):
                work()
    assert content(grown) == before
    assert not list(grown.rglob("_work"))
    for work in works[:3]:
        work()
    assert open_dataset(f"{grown}/train").manifest.revision == 4


def is_deleted(root: str, path: str) -> bool:
    """Deletes in a separate process. Returns whether the deletion was made and not refused."""
    try:
        with workqueue.without_ray():
            delete_keys(root, path)
    except InUse:
        return False
    return True


def test_concurrent_deletions_are_each_made_or_refused(grown, tmp_path):
    keys = [keys_of(f"{grown}/{name}")[i] for name, i in (("train", 0), ("train", 1), ("test", 0))]
    paths = [write_keys(tmp_path / f"{i}.txt", [key]) for i, key in enumerate(keys)]
    roots = [str(grown), f"{grown}/train", f"{grown}/test"]
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = list(pool.map(is_deleted, roots, paths))
    left = {*keys_of(f"{grown}/train"), *keys_of(f"{grown}/test")}
    assert any(made)
    assert [key not in left for key in keys] == made
    assert [verify_dataset(f"{grown}/{name}") for name in ("train", "test")] == [[], []]


def test_a_revision_is_published_only_on_top_of_the_one_it_began_from(grown, tmp_path):
    folder = f"{grown}/train"
    base = open_dataset(folder).manifest
    late = [successor(base, number, {"kind": "delete", "rows": 1, "keys": "x"}, deleted=1) for number in (3, 4)]
    delete_keys(folder, write_keys(tmp_path / "keys.txt", chosen(grown)))
    before = content(grown)
    for manifest in late:
        with pytest.raises(UserError, match=r"another command made revision 3 while this one made revision [34] from"):
            publish(folder, manifest)
    assert content(grown) == before
    publish(folder, open_dataset(folder).manifest)  # the same one again, after a stop
    assert content(grown) == before


def test_a_deletion_reports_its_own_rows(grown, tmp_path):
    counts = []
    for name in ("train", "test", "test"):
        path = write_keys(tmp_path / "keys.txt", [f"{keys_of(f'{grown}/{name}')[0]}"])
        counts.append([one.deleted for one in delete_keys(str(grown), path)])
    again = delete_keys(str(grown), path)
    assert counts == [[0, 1], [1, 0], [1, 0]]
    assert [(one.deleted, one.revision) for one in again] == [(0, 5), (0, 3)]


def test_row_groups_without_a_deleted_row_keep_their_checksums(grown, tmp_path):
    before = open_dataset(f"{grown}/train")
    delete_keys(str(grown / "train"), write_keys(tmp_path / "keys.txt", chosen(grown)[:1]))
    old, new = (set(dataset.row_groups["checksum"].tolist()) for dataset in (before, open_dataset(f"{grown}/train")))
    assert len(old - new) == 1


def test_purge_leaves_no_copy_and_only_what_other_revisions_need(grown, tmp_path):
    dataset = open_dataset(f"{grown}/train")
    last = dataset[len(dataset) - 1]  # of the second revision: the first one does not have it
    (result,) = delete_keys(f"{grown}/train", write_keys(tmp_path / "keys.txt", [last["key"]]))
    assert result.older_revisions == [2]
    assert any(last["image"] in path.read_bytes() for path in grown.rglob("*.parquet"))
    assert purge(f"{grown}/train") == {f"{grown}/train": [2]}
    assert not any(last["image"] in path.read_bytes() for path in grown.rglob("*") if path.is_file())
    assert verify_dataset(f"{grown}/train") == verify_dataset(f"{grown}/train@1") == []
    with pytest.raises(UserError, match="has no revision 2; it has @1, @3"):
        open_dataset(f"{grown}/train@2")
    assert purge(f"{grown}/train") == {f"{grown}/train": []}


def test_a_deletion_and_a_purge_stopped_anywhere_end_in_the_same_bytes(grown, tmp_path, monkeypatch):
    shutil.copytree(grown, tmp_path / "start")
    keys = write_keys(tmp_path / "keys.txt", chosen(grown))

    def work():
        delete_keys(str(grown), keys)
        purge(str(grown))

    work()
    whole = content(grown)
    at = 0
    while True:
        shutil.rmtree(grown)
        shutil.copytree(tmp_path / "start", grown)
        with stopped_at_write(at, monkeypatch, tmp_path) as stop:
            with contextlib.suppress(Stopped):
                work()
        if not stop.happened:
            break
        assert verify_dataset(f"{grown}/test") == []
        assert [line for line in verify_dataset(f"{grown}/train") if "not in the manifest" not in line] == []
        work()
        assert content(grown) == whole, f"stopped at write {at}"
        at += 1
    assert at > 8


def test_an_unfinished_change_is_finished_before_another_begins(grown, tmp_path, monkeypatch):
    keys, third = chosen(grown), write_images(tmp_path / "third", {"ant": 4, "bee": 4}, 3)
    with stopped_at_write(6, monkeypatch, tmp_path), pytest.raises(Stopped):  # 3 locks, the plan, fragments
        prepare(config(tmp_path, third, splits=SPLITS), append=True)
    with pytest.raises(UserError, match="unfinished append, deletion or download"):
        delete_keys(str(grown), write_keys(tmp_path / "keys.txt", keys))
    with pytest.raises(UserError, match="unfinished work; repeat the command that was stopped there"):
        delete_keys(f"{grown}/train", str(tmp_path / "keys.txt"))
    prepare(config(tmp_path, str(tmp_path / "first"), splits=SPLITS))  # finished; does not change the stopped append
    prepare(config(tmp_path, third, splits=SPLITS), append=True)
    with stopped_at_write(5, monkeypatch, tmp_path), pytest.raises(Stopped):
        delete_keys(str(grown), str(tmp_path / "keys.txt"))
    with pytest.raises(UserError, match="an unfinished deletion; repeat the command that was stopped"):
        prepare(
            config(tmp_path, write_images(tmp_path / "fourth", {"ant": 4, "bee": 4}, 4), splits=SPLITS), append=True
        )
    delete_keys(str(grown), str(tmp_path / "keys.txt"))
    assert open_dataset(f"{grown}/train").manifest.revision == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "nobody/1.png\n",
            r"none of its 1 key, such as 'nobody/1.png', is in .*test, .*train, whose keys are like '\w+/s",
        ),
        ("\n\n", "has no keys; write one per line"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (None, "there is no such file"),
    ],
)
def test_keys_that_cannot_be_deleted(grown, tmp_path, text, message):
    before, path = content(grown), tmp_path / "keys.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        delete_keys(str(grown), str(path))
    assert content(grown) == before


def test_other_deletions_that_are_refused(grown, tmp_path):
    keys = write_keys(tmp_path / "keys.txt", keys_of(f"{grown}/train"))
    before = content(grown)
    with pytest.raises(UserError, match="all of its images would be deleted; remove the folder"):
        delete_keys(f"{grown}/train", keys)
    with pytest.raises(UserError, match="starts from the newest revision; name the folder"):
        delete_keys(f"{grown}/train@1", keys)
    with pytest.raises(UserError, match="no dataset here"):
        delete_keys(str(tmp_path), keys)
    assert content(grown) == before


def test_several_labels_and_patches(tmp_path):
    image = {"height": 8, "width": 8, "patch_size": 4, "channels": 3}
    generator = np.random.default_rng(0)
    rows = [(f"k{i}", generator.integers(0, 256, (4, 48), np.uint8), [i % 3, 3][: 1 + i % 2], 8, 8) for i in range(20)]
    options = {"encoding": "patches", "image": image, "multilabel": True, "row_group_bytes": 1000}
    write_dataset(f"{tmp_path}/set", rows, classes=list("abcd"), **options)
    delete_keys(f"{tmp_path}/set", write_keys(tmp_path / "keys.txt", ["k1", "k7", "k19"]))
    assert verify_dataset(f"{tmp_path}/set") == []
    for row, (key, pixels, labels, *_) in zip(
        open_dataset(f"{tmp_path}/set"), [row for row in rows if row[0] not in ("k1", "k7", "k19")], strict=True
    ):
        assert (row["key"], row["label"]) == (key, labels)
        assert np.array_equal(row["image"], pixels)


def test_the_names_of_revisions_of_files():
    assert revision_names.report_name("rejects.parquet", 1) == "rejects.parquet"
    assert revision_names.report_name("rejects.parquet", 12) == "rejects@12.parquet"
    assert revision_names.is_report("duplicates@3.png")
    assert not revision_names.is_report("part-00000-0000.parquet")
    assert revision_names.is_of_later_revision("part-r0004-00001-0000.parquet", 3)
    assert not revision_names.is_of_later_revision("part-r0003-00001-0000.parquet", 3)
    assert json.dumps(revision_names.split_address("s3")) == '["s3", null]'
    assert workqueue.uses_ray() is False


def test_revisions_on_a_store(s3, tmp_path):
    def options(source):
        return dataclasses.replace(config(tmp_path, source), output=f"{s3}/set")

    prepare(options(write_images(tmp_path / "first", {"ant": 10, "bee": 10}, 1)))
    prepare(options(write_images(tmp_path / "second", {"ant": 5, "cow": 5}, 2)), append=True)
    last = open_dataset(f"{s3}/set@2")[29]
    storage.write_bytes(f"{s3}/keys.txt", last["key"].encode())
    (result,) = delete_keys(f"{s3}/set", f"{s3}/keys.txt")
    assert (result.deleted, result.older_revisions) == (1, [2])
    assert purge(f"{s3}/set") == {f"{s3}/set": [2]}
    assert verify_dataset(f"{s3}/set") == verify_dataset(f"{s3}/set@1") == []
    assert not any(last["image"] in storage.read_bytes(file.uri) for file in storage.list_files(f"{s3}/set"))
    assert last["key"] not in keys_of(f"{s3}/set")
