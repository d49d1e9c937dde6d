"""The splits against vectors computed by TensorFlow Datasets' own builders, and the table against the papers."""

import hashlib
from functools import cache

import pytest

from pipeline.errors import UserError
from pipeline.vtab import SPLITS, TASKS, get, split_keys
from pipeline.vtab.datasets.sun397 import sun397_splits
from pipeline.vtab.splits import tfds_order

EUROSAT_COUNTS = {
    "AnnualCrop": 3000, "Forest": 3000, "HerbaceousVegetation": 3000, "Highway": 2500, "Industrial": 2500,
    "Pasture": 2000, "PermanentCrop": 2500, "Residential": 3000, "River": 2500, "SeaLake": 3000,
}  # fmt: skip


@cache
def all_keys(task: str) -> dict[str, list]:
    if task == "eurosat":
        return {"train": [f"{c}_{c}_{i}.jpg" for c, n in EUROSAT_COUNTS.items() for i in range(1, n + 1)]}
    if task == "sun397":
        return dict(sun397_splits())
    if task.startswith("clevr"):
        return {"train": [f"CLEVR_train_{i:06d}.png" for i in range(70000)], "validation": list(range(15000))}
    if task == "patch_camelyon":
        counts = {"train": 262144, "valid": 32768, "test": 32768}
        names = {"train": "train", "valid": "validation", "test": "test"}
        return {names[p]: [f"{p}_{i}" for i in range(n)] for p, n in counts.items()}
    sizes = {
        "cifar100": {"train": 50000, "test": 10000},
        "svhn": {"train": 73257, "test": 26032},
        "dsprites_location": {"train": 737280},
        "smallnorb_azimuth": {"train": 24300, "test": 24300},
    }[task]
    return {split: list(range(n)) for split, n in sizes.items()}


VECTORS = {
    ("cifar100", "train800"): ([16399, 1680, 47917], 45288, "5b25ee0661c3bc4a"),
    ("cifar100", "val200"): ([13431, 9237, 17462], 1434, "93377e439662509b"),
    ("svhn", "train800"): ([16399, 1680, 47917], 39678, "901fe4f6d4f65bc8"),
    ("svhn", "val200"): ([21145, 64736, 23870], 61722, "36ae944d2e322a4f"),
    ("dsprites_location", "train800"): ([16399, 634903, 206287], 86528, "54130b46ffd22579"),
    ("dsprites_location", "val200"): ([220697, 85843, 84902], 245125, "86005e8c04783edc"),
    ("smallnorb_azimuth", "train800"): ([16399, 1680, 17307], 19374, "438b845e2bd4a468"),
    ("smallnorb_azimuth", "val200"): ([23018, 16932, 19084], 7409, "d9fca0e85af945f0"),
    ("clevr_count", "train800"): (
        ["CLEVR_train_043876.png", "CLEVR_train_033421.png", "CLEVR_train_062025.png"],
        "CLEVR_train_047592.png",
        "5dc1033102716488",
    ),
    ("clevr_count", "val200"): (
        ["CLEVR_train_035084.png", "CLEVR_train_029360.png", "CLEVR_train_004525.png"],
        "CLEVR_train_047496.png",
        "9a9150228251ccef",
    ),
    ("patch_camelyon", "train800"): (
        ["train_251464", "train_132287", "train_133786"],
        "train_109410",
        "c1122cb7e413b8b3",
    ),
    ("patch_camelyon", "val200"): (["valid_3270", "valid_10310", "valid_20603"], "valid_23465", "b3998b44bc8423a1"),
    ("sun397", "train800"): (["/r/rope_bridge/sun_biqflnsoednmhvce.jpg"], None, "bbfe318c912bf278"),
    ("sun397", "val200"): (["/b/boathouse/sun_armmkazxnlvxglwr.jpg"], None, "ed3f4079a4f342a7"),
    ("eurosat", "train800"): (["Forest_Forest_687.jpg"], None, "7dac90dec1b73063"),
    ("eurosat", "val200"): (["SeaLake_SeaLake_804.jpg"], None, "5c9a3ab3702faf20"),
}


@pytest.mark.parametrize(("task", "split"), VECTORS)
def test_check_vectors(task, split):
    first, last, digest = VECTORS[task, split]
    keys = split_keys(task, split, all_keys(task))
    assert len(keys) == {"train800": 800, "val200": 200}[split]
    assert keys[: len(first)] == first
    assert last is None or keys[-1] == last
    assert hashlib.sha256("\n".join(map(str, keys)).encode()).hexdigest()[:16] == digest


def test_the_order_published_for_cifar10():
    expected = [16399, 1680, 47917, 17307, 27051, 48736, 26263, 1456, 19135, 31598]
    assert tfds_order("train", range(50000))[:10] == expected


@pytest.mark.parametrize("task", ["cifar100", "eurosat", "smallnorb_azimuth", "sun397"])
def test_pools_have_the_official_sizes_and_do_not_overlap(task):
    keys = all_keys(task)
    pools = [split_keys(task, pool, keys) for pool in ("train", "val", "test")]
    assert tuple(map(len, pools)) == get(task).counts
    # integer keys of different TFDS splits may coincide: compare them with the split they are drawn from
    named = [
        {(getattr(get(task), p)[0], k) for k in pool} for p, pool in zip(("train", "val", "test"), pools, strict=True)
    ]
    assert len(set.union(*named)) == sum(map(len, pools))
    assert split_keys(task, "trainval", keys) == pools[0] + pools[1]
    assert split_keys(task, "train800val200", keys) == pools[0][:800] + pools[1][:200]


def test_a_plain_iterable_is_the_split_it_draws_from():
    assert split_keys("cifar100", "val200", range(50000)) == split_keys("cifar100", "val200", all_keys("cifar100"))
    halves = all_keys("smallnorb_azimuth")
    assert split_keys("smallnorb_elevation", "test", range(24300)) == split_keys("smallnorb_elevation", "test", halves)
    assert len(split_keys("cifar100", "train800val200", iter(range(50000)))) == 1000


def test_keys_may_be_bytes():
    assert tfds_order("train", [b"a", b"b", b"c"]) == [k.encode() for k in tfds_order("train", ["a", "b", "c"])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar10", "train800", []), 'did you mean "cifar100"'),
        (("cifar100", "train80", []), 'did you mean "train800"'),
        (("smallnorb_azimuth", "train800val200", range(10)), "train and test"),
        (("dtd", "val200", {"train": ["a"]}), "TFDS split validation"),
    ],
)
def test_wrong_requests_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        split_keys(*arguments)


def test_small_pools_never_overlap():
    """Miniature data sets have fewer than a thousand examples."""
    keys = range(20)
    train, val = split_keys("cifar100", "train800", keys), split_keys("cifar100", "val200", keys)
    assert (len(train), len(val)) == (18, 2)
    assert not set(train) & set(val)


def test_the_table():
    """Names in the order of ViT's Table 9; group sizes 7, 4 and 8; class counts and pools of task_adaptation."""
    assert TASKS == (
        "caltech101", "cifar100", "dtd", "flowers102", "pets", "sun397", "svhn", "patch_camelyon", "eurosat", "resisc45",
        "retinopathy", "clevr_count", "clevr_distance", "dmlab", "dsprites_location", "dsprites_orientation",
        "kitti_distance", "smallnorb_azimuth", "smallnorb_elevation",
    )  # fmt: skip
    groups = [get(name).group for name in TASKS]
    assert groups == ["natural"] * 7 + ["specialized"] * 4 + ["structured"] * 8
    for name in TASKS:
        assert len(set(get(name).classes)) == get(name).num_classes, name
    assert set(SPLITS) >= {"train800", "val200", "train800val200", "test"}
    assert [name for name in TASKS if not get(name).flip] == [
        "dsprites_location",
        "dsprites_orientation",
        "smallnorb_azimuth",
    ]
    assert {name for name in TASKS if not get(name).random_crop} == {
        "clevr_count", "clevr_distance", "dmlab", "kitti_distance", "dsprites_location",
    }  # fmt: skip


def test_sun397_lists():
    splits = sun397_splits()
    assert {split: len(keys) for split, keys in splits.items()} == {"train": 76128, "validation": 10875, "test": 21750}
    assert len(set().union(*splits.values())) == 108753
    assert "/t/track/outdoor/sun_aophkoiosslinihb.jpg" in splits["train"]
    assert {key.rpartition("/")[0] for key in splits["train"]} == set(get("sun397").classes)
