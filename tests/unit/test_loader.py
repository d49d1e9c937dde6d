"""The loader: the same samples and crops for any number of workers, exact resume, errors, no leaks."""

import gc
import logging
import tarfile
import threading
import time

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import Loader, open_dataset
from pipeline.data.codecs import decode_stored
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.data.loading.order import AUGMENT, Order, kept_tokens, uniform
from pipeline.data.loading.transform import augment_image
from pipeline.data.patches import patchify
from pipeline.errors import UserError
from tests.datasets import first_batches

CLASSES = list("abcdefg")
SMALL = Augment(size=16, randaug_layers=1, randaug_magnitude=10)
BAD = {5, 6, 90, 151}


def picture(i, height=24, width=30):
    coarse = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height))


def jpeg_rows(n=203, bad=()):
    for i in range(n):
        data = simplejpeg.encode_jpeg(picture(i))
        yield f"k{i:03d}", bytes(len(data)) if i in bad else data, i % 7, 30, 24


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """name -> dataset: 203 JPEGs in 14 row groups of 5 shards, the same with damaged rows, patches, and multi-label."""
    root = tmp_path_factory.mktemp("datasets")
    sizes = {"row_group_bytes": 12_000, "shard_bytes": 40_000}
    write_dataset(f"{root}/jpeg", jpeg_rows(), classes=CLASSES, **sizes)
    write_dataset(f"{root}/bad", jpeg_rows(bad=BAD), classes=CLASSES, **sizes)
    patches = ((f"k{i:03d}", patchify(picture(i, 24, 32), 8), i % 7, 32, 24) for i in range(100))
    image = {"height": 24, "width": 32, "patch_size": 8, "channels": 3}
    write_dataset(f"{root}/patches", patches, classes=CLASSES, encoding="patches", image=image, row_group_bytes=40_000)
    many = (
        (key, data, [[], [0], [1, 3], [6, 2, 5]][i % 4], w, h) for i, (key, data, _, w, h) in enumerate(jpeg_rows(60))
    )
    write_dataset(f"{root}/many", many, classes=CLASSES, multilabel=True, row_group_bytes=12_000)
    return {name: open_dataset(f"{root}/{name}") for name in ("jpeg", "bad", "patches", "many")}


def take(dataset, steps=None, **options):
    options = {"batch_size": 16, "lanes": 8, "seed": 3, "augment": SMALL, "shuffle_window": 64, "threads": 2} | options
    return first_batches(dataset, steps, **options)


def joined(ranks):
    """Concatenates the batches of several ranks."""
    return [
        {k: torch.cat([p[k] for p in parts]) if k != "key" else [key for p in parts for key in p[k]] for k in parts[0]}
        for parts in zip(*ranks, strict=True)
    ]


def assert_same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            if name == "key":
                assert left[name] == right[name]
            else:
                assert torch.equal(left[name], right[name]), name


# ---------------------------------------------------------------- order


def test_batches_are_what_order_and_augment_say(datasets):
    """Compares with a simple loop without threads and read-ahead."""
    dataset = datasets["jpeg"]
    order = Order(dataset.row_groups["rows"], seed=3, epoch=2, batch_size=16, lanes=8, shuffle_window=64)
    for step, batch in enumerate(take(dataset, epoch=2)):
        groups, rows = order.locate(order.batch(step, range(8)).ravel())
        samples = dataset.starts[groups] + rows
        draws = uniform(3, AUGMENT, 2, samples[:, None], np.arange(SMALL.draws)).tolist()
        expected = np.empty((len(samples), 16, 16, 3), np.uint8)
        for out, row, u in zip(expected, dataset.read(samples), draws, strict=True):
            augment_image(SMALL, decode_stored(row["image"]), u, out)
        assert np.array_equal(batch["image"].numpy(), expected)
        assert batch["label"].tolist() == [int(i) % 7 for i in samples]
        assert batch["key"] == [f"k{i:03d}" for i in samples]


@pytest.mark.parametrize("name", ["jpeg", "bad", "patches"])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_all_ranks_together_form_the_batches_of_one_worker(datasets, name, world_size):
    options = {"augment": Augment(size=16, mixup=0.3)}
    whole = take(datasets[name], **options)
    assert_same(
        joined([take(datasets[name], rank=r, world_size=world_size, **options) for r in range(world_size)]), whole
    )


def test_every_sample_once_an_epoch(datasets):
    keys = [key for batch in take(datasets["jpeg"]) for key in batch["key"]]
    assert len(keys) == len(set(keys)) == 200  # 203 over 8 lanes
    assert keys != sorted(keys)
    again = [key for batch in take(datasets["jpeg"], epoch=1) for key in batch["key"]]
    assert again != keys
    assert [len(batch["key"]) for batch in take(datasets["jpeg"])] == [16] * 12 + [8]
    assert [len(batch["key"]) for batch in take(datasets["jpeg"], drop_last=True)] == [16] * 12


@given(st.integers(0, 13), st.sampled_from([1, 2, 4]), st.integers(0, 3), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_resuming_anywhere_on_any_number_of_workers_changes_nothing(datasets, step, world_size, prefetch, threads):
    options = {"epoch": 1, "augment": Augment(size=16, randaug_layers=1, randaug_magnitude=10, mixup=0.2)}
    whole = take(datasets["bad"], **options)
    options |= {"prefetch": prefetch, "threads": threads, "step": step}
    rest = [take(datasets["bad"], rank=r, world_size=world_size, **options) for r in range(world_size)]
    assert_same(joined(rest), whole[step:])


def test_state_is_the_position_after_the_last_batch(datasets):
    options = {"batch_size": 16, "lanes": 8, "augment": SMALL}
    with Loader(datasets["jpeg"], **options) as loader:
        assert loader.state() == {"epoch": 0, "step": 0}
        assert loader.steps_per_epoch == len(loader) == 13
        for step, _ in enumerate(loader):
            if step == 4:
                break
        assert loader.state() == {"epoch": 0, "step": 5}
        rest = [batch["key"] for batch in loader]  # after a break: the rest of the epoch
        assert loader.state() == {"epoch": 1, "step": 0}
        following = [batch["key"] for batch in loader]  # then the next epoch
        assert loader.state() == {"epoch": 2, "step": 0}
    assert rest == [batch["key"] for batch in take(datasets["jpeg"], step=5, seed=0, shuffle_window=16_384)]
    assert following == [batch["key"] for batch in take(datasets["jpeg"], epoch=1, seed=0, shuffle_window=16_384)]
    assert take(datasets["jpeg"], step=13) == []


def test_state_at_the_last_batch_is_the_next_epoch(datasets):
    with Loader(datasets["jpeg"], batch_size=16, lanes=8, augment=SMALL, epoch=4, step=12) as loader:
        assert [loader.state() for _ in loader] == [{"epoch": 5, "step": 0}]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_reads_every_sample_once_in_order(datasets, world_size):
    recipe = {"train": False, "batch_size": 30, "augment": Augment(size=16, crop="squash"), "lanes": None}
    ranks = [take(datasets["jpeg"], rank=r, world_size=world_size, **recipe) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    keys = [key for batches in ranks for batch in batches for key in batch["key"]]
    assert keys == [f"k{i:03d}" for i in range(203)]
    rows = torch.cat([batch["image"] for batches in ranks for batch in batches])
    expected = cv2.resize(decode_stored(datasets["jpeg"].read([77])[0]["image"]), (16, 16))
    assert np.array_equal(rows[77].numpy(), expected)


def test_more_workers_than_images_to_evaluate(tmp_path):
    write_dataset(f"{tmp_path}/d", jpeg_rows(3), classes=CLASSES)
    recipe = {
        "train": False,
        "batch_size": 10,
        "augment": Augment(size=16, crop="squash"),
        "lanes": None,
        "world_size": 5,
    }
    ranks = [take(open_dataset(f"{tmp_path}/d"), rank=r, **recipe) for r in range(5)]
    assert [len(batches) for batches in ranks] == [1] * 5
    assert [key for batches in ranks for key in batches[0]["key"]] == ["k000", "k001", "k002"]
    assert all(batches[0]["image"].shape[1:] == (16, 16, 3) for batches in ranks)


def test_patches_of_another_size_than_stored_are_refused(datasets):
    with pytest.raises(UserError, match="holds patches of 8 pixels, but patch_size is 4"):
        Loader(datasets["patches"], batch_size=16, patch_size=4)


def test_evaluation_again_is_the_same_again(datasets):
    with Loader(datasets["jpeg"], batch_size=50, train=False, augment=Augment(size=16, crop="center")) as loader:
        first, second = ([batch["image"].clone() for batch in loader] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------- contents


def test_patches_pass_through_untouched(datasets):
    dataset = datasets["patches"]
    for batch in take(dataset, augment=None):
        assert batch["patches"].shape[1:] == (12, 192)
        for key, patches in zip(batch["key"], batch["patches"], strict=True):
            assert np.array_equal(patches.numpy(), patchify(picture(int(key[1:]), 24, 32), 8))


def test_dropped_tokens_carry_their_positions(datasets):
    whole = take(datasets["patches"], augment=None)
    for kept, full in zip(take(datasets["patches"], augment=None, patch_keep_rate=0.5), whole, strict=True):
        assert kept["patches"].shape[1:] == (6, 192)
        assert kept["positions"].dtype == torch.int64
        expected = full["patches"].gather(1, kept["positions"][:, :, None].expand(-1, -1, 192))
        assert torch.equal(kept["patches"], expected)
        samples = np.array([int(key[1:]) for key in kept["key"]])
        assert np.array_equal(kept["positions"].numpy(), kept_tokens(3, 0, samples, 12, 0.5))


def test_images_become_patches_on_demand(datasets):
    images, patches = take(datasets["jpeg"], 2), take(datasets["jpeg"], 2, patch_size=4)
    for a, b in zip(images, patches, strict=True):
        assert np.array_equal(patchify(a["image"].numpy(), 4), b["patches"].numpy())
    kept = take(datasets["jpeg"], 1, patch_size=4, patch_keep_rate=0.25)[0]
    expected = patches[0]["patches"].gather(1, kept["positions"][:, :, None].expand(-1, -1, 48))
    assert torch.equal(kept["patches"], expected)


def test_patches_can_be_augmented(datasets):
    batch = take(datasets["patches"], 1, augment=Augment(size=24, crop="center", flip=True))[0]
    for key, patches in zip(batch["key"], batch["patches"], strict=True):
        image = picture(int(key[1:]), 24, 32)[:, 4:28]
        assert any(np.array_equal(patches.numpy(), patchify(view, 8)) for view in (image, image[:, ::-1]))


def test_mixup_blends_pairs_of_a_lane(datasets):
    plain = take(datasets["jpeg"], augment=Augment(size=16))
    mixed = take(datasets["jpeg"], augment=Augment(size=16, mixup=0.5))
    assert len({float(batch["lam"][0]) for batch in mixed}) == len(mixed)
    for a, b in zip(plain, mixed, strict=True):
        lam = b["lam"][0].double()
        assert 0.5 <= lam <= 1
        partner = torch.arange(len(a["key"])).reshape(8, -1).roll(-1, 1).ravel()
        expected = lam * a["image"] + (1 - lam) * a["image"][partner]
        assert (b["image"] - expected).abs().max() <= 0.51
        assert torch.equal(b["label_b"], a["label"][partner])
        assert torch.equal(b["label"], a["label"])
        assert b["lam"].dtype == torch.float32


def test_multilabel_rows_are_padded(datasets):
    truth = {f"k{i:03d}": [[], [0], [1, 3], [6, 2, 5]][i % 4] for i in range(60)}
    for batch in take(datasets["many"], batch_size=8, lanes=4):
        assert batch["label"].dtype == torch.int64
        for key, row in zip(batch["key"], batch["label"].tolist(), strict=True):
            assert [k for k in row if k >= 0] == truth[key]


# ---------------------------------------------------------------- failures


def test_rows_that_do_not_decode_are_replaced_the_same_way_everywhere(datasets, caplog):
    with caplog.at_level(logging.WARNING, "pipeline.data.loading.loader"):
        with Loader(datasets["bad"], batch_size=16, lanes=8, seed=3, augment=SMALL, shuffle_window=64) as loader:
            keys = [key for batch in loader for key in batch["key"]]
            assert set(loader.replaced) <= {f"k{i:03d}" for i in BAD}
            assert loader.counters["replaced"] == len(loader.replaced) >= 3
    assert len(keys) == 200
    assert not set(keys) & {f"k{i:03d}" for i in BAD}
    assert "k090 cannot be decoded" in caplog.text
    good = [key for batch in take(datasets["jpeg"]) for key in batch["key"]]
    assert sum(a != b for a, b in zip(keys, good, strict=True)) == len(loader.replaced)


def test_more_replaced_images_than_allowed_stop_the_loader(datasets):
    take(datasets["bad"], max_replaced=len(BAD))
    with pytest.raises(UserError, match=r"2 images cannot be decoded, more than max_replaced 1.*k\d\d\d"):
        take(datasets["bad"], max_replaced=1)


def test_evaluation_refuses_rows_that_do_not_decode(datasets):
    with pytest.raises(UserError, match=r"k005.*evaluation needs every image"):
        take(datasets["bad"], train=False, augment=Augment(size=16, crop="squash"))


def test_a_dataset_without_a_good_image_is_an_error(tmp_path):
    write_dataset(f"{tmp_path}/d", ((f"k{i}", b"nonsense", 0, 1, 1) for i in range(64)), classes=["a"])
    with pytest.raises(UserError, match="nor can any other image"):
        take(open_dataset(f"{tmp_path}/d"))


def test_an_exception_in_a_thread_names_its_key(datasets, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("as if a bug")

    monkeypatch.setattr("pipeline.data.loading.loader.augment_image", fail)
    with Loader(datasets["jpeg"], batch_size=16, lanes=8, augment=SMALL) as loader:
        with pytest.raises(RuntimeError, match=r"jpeg: k\d\d\d: as if a bug"):
            next(iter(loader))


def test_missing_truncated_and_damaged_shards_are_named(tmp_path):
    def fresh(name):
        write_dataset(f"{tmp_path}/{name}", jpeg_rows(), classes=CLASSES, row_group_bytes=12_000, shard_bytes=40_000)
        dataset = open_dataset(f"{tmp_path}/{name}")
        return dataset, dataset.shard_uri(2)

    dataset, shard = fresh("missing")
    (tmp_path / "missing" / shard.rsplit("/")[-1]).unlink()
    with pytest.raises(UserError, match=shard.rsplit("/")[-1]):
        take(dataset)
    dataset, shard = fresh("truncated")
    path = tmp_path / "truncated" / shard.rsplit("/")[-1]
    path.write_bytes(path.read_bytes()[:9_000])
    with pytest.raises(UserError, match=shard.rsplit("/")[-1]):
        take(dataset)
    dataset, shard = fresh("damaged")
    path = tmp_path / "damaged" / shard.rsplit("/")[-1]
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=f"{shard.rsplit('/')[-1]}.*damaged"):
        take(dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, "3 workers cannot share batches of 16 in 8 lanes.*--batch-size 15 --lanes 3"),
        ({"lanes": 5}, "batch_size 16 is not divisible by lanes 5.*--lanes 8"),
        ({"rank": 2, "world_size": 2}, "rank 2 is outside a world of 2"),
        ({"step": 14}, "13 steps of 16; step 14 is not one of them"),
        ({"batch_size": 512, "lanes": 256}, "203 samples cannot fill 256 lanes"),
        ({"batch_size": 512, "lanes": 64, "drop_last": True}, "0 steps of 512.*drop_last"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"lanes": 0}, "lanes 0 .*at least 1"),
        ({"lanes": 16, "augment": Augment(mixup=0.2)}, "mixup pairs samples of one lane.*lanes to 8 or fewer"),
        ({"patch_keep_rate": 0.5}, "set patch_size"),
        ({"patch_keep_rate": 0.5, "patch_size": 4, "augment": Augment(size=16, mixup=0.2)}, "mixup blends whole images"),
        ({"patch_size": 5}, "patch_size 5 does not divide the image size 16"),
        ({"patch_keep_rate": 0.0}, "patch_keep_rate"),
        ({"train": False}, "crop 'inception' is random"),
        ({"train": False, "world_size": 3, "augment": Augment(crop="squash")}, "batch_size 16 is not divisible by world_size 3"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_say_what_to_do(datasets, options, message):
    with pytest.raises(UserError, match=message):
        Loader(datasets["jpeg"], **{"batch_size": 16, "lanes": 8, "augment": SMALL} | options)


# ---------------------------------------------------------------- memory and threads


def test_a_batch_does_not_change_while_any_part_of_it_is_in_use(datasets):
    expected = take(datasets["jpeg"])
    with Loader(datasets["jpeg"], batch_size=16, lanes=8, seed=3, augment=SMALL, shuffle_window=64) as loader:
        held = [batch["image"][3:5] if i % 2 else batch["image"].numpy()[:, 2:] for i, batch in enumerate(loader)]
    for i, (part, batch) in enumerate(zip(held, expected, strict=True)):
        whole = batch["image"][3:5] if i % 2 else batch["image"][:, 2:]
        assert torch.equal(torch.as_tensor(part), whole)


def test_memory_is_reused_after_a_batch_is_dropped(datasets):
    with Loader(datasets["jpeg"], batch_size=16, lanes=8, augment=SMALL, prefetch=2) as loader:
        addresses = []
        for _ in range(3):
            for batch in loader:
                addresses.append(batch["image"].data_ptr())
                del batch
    assert len(addresses) == 39
    assert len(set(addresses)) <= 5


def test_row_groups_in_memory_are_bounded_and_read_once(datasets):
    dataset = datasets["jpeg"]
    with Loader(dataset, batch_size=4, lanes=2, augment=SMALL, shuffle_window=8, train=True) as loader:
        most = max(loader.row_groups_in_memory for _ in loader)
        assert most <= 2 * 2 + 8  # a lane straddles at most two, and eight are read ahead
    reads = loader.counters["reads"]
    assert reads <= len(dataset.row_groups) + 1 + 2 + 8  # a lane's border splits one; the next epoch has begun


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith(("read", "decode"))}


def test_no_thread_outlives_the_loader(datasets):
    before = threads()
    with Loader(datasets["jpeg"], batch_size=16, lanes=8, augment=SMALL) as loader:
        next(iter(loader))
        assert threads() - before
    assert not threads() - before
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader))

    loader = Loader(datasets["jpeg"], batch_size=16, lanes=8, augment=SMALL)  # never closed, only dereferenced
    next(iter(loader))
    del loader
    gc.collect()
    for _ in range(100):
        if not threads() - before:
            return
        time.sleep(0.05)
    pytest.fail(f"threads left: {threads() - before}")


def test_default_augmentation_and_lanes(datasets):
    with Loader(datasets["jpeg"], batch_size=32) as loader:
        assert next(iter(loader))["image"].shape == (32, 224, 224, 3)
        assert loader.lanes == 8
    with Loader(datasets["jpeg"], batch_size=32, train=False) as loader:
        assert next(iter(loader))["image"].shape == (32, 224, 224, 3)


def test_real_photos_all_decode(real_data, tmp_path):
    """300 photographs of all sizes, a few in greyscale or CMYK, can be used for training and evaluation."""
    with tarfile.open(real_data / "imagenet-sample-300.tar") as archive:
        files = {
            m.name: archive.extractfile(m).read() for m in archive if m.isfile() and m.name.lower().endswith("jpeg")
        }
    write_dataset(f"{tmp_path}/d", ((name, data, 0, 1, 1) for name, data in files.items()), classes=["a"])
    dataset = open_dataset(f"{tmp_path}/d")
    assert len(dataset) >= 290
    for options in ({"train": True}, {"train": False, "augment": Augment(size=64, crop="center", resize=72)}):
        with Loader(dataset, batch_size=50, **options) as loader:
            keys = [key for batch in loader for key in batch["key"] if batch["image"].float().std() > 1]
        assert len(set(keys)) >= len(dataset) - loader.lanes
        assert not loader.replaced
