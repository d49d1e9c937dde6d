"""Mixtures: exact shares at every step, each image once per epoch of its data set, the same for any number of workers and
from any step."""

import dataclasses
from collections import Counter
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import address
from pipeline.data import Loader, open_dataset
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.data.loading.mixed_order import MixedOrder, turns
from pipeline.data.mixture import open_data
from pipeline.errors import UserError
from pipeline.training.plan import make_plan
from tests.datasets import first_batches
from tests.images import tinted
from tests.runs import pretrain_config

VIEW = Augment(size=16, randaug_layers=1, randaug_magnitude=10)


FROZEN = [
    [[1, 0, 4, 0], [4, 2, 2, 3]],
    [[1, 2, 1, 0], [1, 3, 1, 2]],
    [[1, 1, 1, 1], [0, 1, 1, 1]],
]  # row groups, rows, epochs


def fractions(weights):
    return [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]


@st.composite
def orders(draw):
    parts = draw(st.integers(2, 4))
    lanes = draw(st.sampled_from([1, 2, 4, 6]))
    rows = [np.array(draw(st.lists(st.integers(1, 12), min_size=6, max_size=9))) for _ in range(parts)]
    return {
        "rows": rows,
        "shares": fractions(draw(st.lists(st.integers(1, 1000), min_size=parts, max_size=parts))),
        "seed": draw(st.integers(0, 2**63)),
        "lanes": lanes,
        "batch_size": lanes * draw(st.integers(1, 4)),
        "shuffle_window": draw(st.integers(1, 60)),
        "whole_steps": draw(st.booleans()),
    }


def steps_of(arguments, epoch):
    order = MixedOrder(**arguments, epoch=epoch)
    return order, range(order.full_steps if arguments["whole_steps"] else order.steps)


# ---------------------------------------------------------------- shares


@given(
    st.lists(st.fractions(Fraction(1, 1000), 1), min_size=2, max_size=8),
    st.integers(1, 64),
    st.sampled_from([0, 10**6, 10**9]),
)
@settings(max_examples=60, deadline=None)
def test_every_slot_has_one_owner_and_no_count_leaves_its_share(weights, lanes, start):
    shares = fractions(weights)
    lane, slot = np.broadcast_arrays(np.arange(lanes)[:, None], start + np.arange(300))
    owners = np.zeros(lane.shape, int)
    for share, turn in zip(shares, turns(shares, lanes), strict=True):
        before = turn.before(lane, slot)
        mine = turn.before(lane, slot + 1) > before
        owners += mine
        assert np.array_equal(turn.slot(lane[mine], before[mine]), slot[mine])
        exact = np.array([float(share * int(s)) for s in slot[0]])
        bound = 0.0
        for p, q, _ in turn.levels:
            bound = 1 + bound * p / q
        assert np.abs(before - exact).max() < bound <= 4  # of each lane
        of_batches = np.abs(before.sum(axis=0) - lanes * exact).max()
        # of all lanes together; the shares are rounded, which shows after 10**9 batches
        assert of_batches <= (0.51 if len(shares) == 2 else 32)
    assert (owners == 1).all()


@given(orders())
@settings(max_examples=40, deadline=None)
def test_images_seen_are_the_images_of_the_batches(arguments):
    arguments |= {"whole_steps": True}
    counts = np.zeros(len(arguments["rows"]), int)
    done = 0
    for epoch in range(3):
        order, steps = steps_of(arguments, epoch)
        for step in steps:
            groups = order.picks(step, range(arguments["lanes"])).groups
            counts += np.bincount(
                np.searchsorted(order.first_groups, groups.ravel(), "right") - 1, minlength=len(counts)
            )
            done += 1
            assert order.images_seen(done) == counts.tolist()


# ---------------------------------------------------------------- order


@given(orders())
@settings(max_examples=60, deadline=None)
def test_each_image_comes_once_per_epoch_of_its_data_set(arguments):
    seen = Counter()
    for epoch in range(4):
        order, steps = steps_of(arguments, epoch)
        for step in steps:
            picks = order.picks(step, range(arguments["lanes"]))
            seen.update(zip(*(field.ravel().tolist() for field in picks), strict=True))
    assert set(seen.values()) <= {1}
    for part, rows in enumerate(arguments["rows"]):
        first, last = order.first_groups[part], order.first_groups[part + 1]
        per_epoch = Counter(epoch for group, _, epoch in seen if first <= group < last)
        for epoch in list(per_epoch)[:-1]:
            if epoch + 1 < max(per_epoch):  # lanes may be a sample apart where an epoch ends
                assert per_epoch[epoch] == rows.sum() // arguments["lanes"] * arguments["lanes"]


@given(orders(), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_step_needs_no_history_and_all_ranks_together_form_the_same_batch(arguments, epoch, step):
    order, steps = steps_of(arguments, epoch)
    if not steps:
        return
    step, lanes = step % len(steps), arguments["lanes"]
    for earlier in range(step):
        order.picks(earlier, range(lanes))
    whole = order.picks(step, range(lanes))
    for world_size in (w for w in (1, 2, 3, 4, 6) if lanes % w == 0):
        share = lanes // world_size
        parts = [
            MixedOrder(**arguments, epoch=epoch).picks(step, range(r * share, (r + 1) * share))
            for r in range(world_size)
        ]
        for field, *ranks in zip(whole, *parts, strict=True):
            assert np.array_equal(np.concatenate(ranks), field)


@given(orders(), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_reads_name_every_row_group_that_a_step_needs_in_time(arguments, epoch, begin):
    order, steps = steps_of(arguments, epoch)
    if not steps:
        return
    lanes = arguments["lanes"]
    for part in (range(lanes), range(lanes // 2, lanes)):
        reads = list(order.reads_from(begin % len(steps), part))
        assert [read.first for read in reads] == sorted(read.first for read in reads)
        for step in range(begin % len(steps), len(steps)):
            open_now = {read.group for read in reads if read.first <= step <= read.last}
            needed = set(order.picks(step, part).groups.ravel().tolist())
            for lane in part:  # a replacement is also read from an open row group
                needed |= {int(pick.groups[0]) for pick in order.substitutes(lane, step, 0)}
            assert needed <= open_now


@given(orders(), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_substitutes_are_of_the_same_data_set_and_epoch(arguments, step):
    order, steps = steps_of(arguments, 1)
    if not steps:
        return
    step %= len(steps)
    picks = order.picks(step, range(1))
    group, row, epoch = (int(field[0, 0]) for field in picks)
    part = np.searchsorted(order.first_groups, group, "right")
    found = [tuple(int(field[0]) for field in pick) for pick in order.substitutes(0, step, 0)]
    assert (group, row, epoch) not in found
    assert len(set(found)) == len(found)
    assert {np.searchsorted(order.first_groups, g, "right") for g, _, _ in found} <= {part}
    assert {e for _, _, e in found} <= {epoch}


def test_the_order_is_frozen():
    """Runs resume across releases, so these numbers may never change."""
    rows = [np.array([5, 3, 4]), np.array([6, 2])]
    order = MixedOrder(
        rows, fractions([7, 3]), seed=7, epoch=1, batch_size=8, lanes=2, shuffle_window=6, whole_steps=True
    )
    assert [field.tolist() for field in order.picks(1, range(2))] == FROZEN


def test_a_mixture_of_billions_plans_without_lists_of_its_length():
    """300 million images, and 1,000 that have half of the weight: 300,000 of their epochs in one of the mixture."""
    rows = [np.full(300_000, 1_000), np.full(10, 100)]
    order = MixedOrder(rows, fractions([1, 1]), seed=1, epoch=3, batch_size=4096, lanes=64, shuffle_window=16_384)
    picks = order.picks(50_000, range(64))
    assert picks.rows.shape == (64, 64)
    assert abs(int((picks.groups < 300_000).sum()) - 2048) <= 1
    reads = order.reads_from(50_000, range(64))
    assert [next(reads).first <= 50_000 for _ in range(64)] == [True] * 64


# ---------------------------------------------------------------- loader


def write(uri, count, classes, seed, side=24, bad=()):
    generator = np.random.default_rng(seed)

    def rows():
        for i in range(count):
            png = cv2.imencode(".png", tinted(generator, side, side, i % 3))[1].tobytes()
            yield f"k{i:03d}", bytes(len(png)) if i in bad else png, i % len(classes), side, side

    write_dataset(uri, rows(), classes=classes, row_group_bytes=15_000, shard_bytes=40_000)
    return uri


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Photos and paintings in 7 : 3, which share the class dog; the paintings are larger, and two do not decode."""
    root = tmp_path_factory.mktemp("mixture")
    photos = write(f"{root}/photos/train", 90, ["cat", "dog"], 1)
    paintings = write(f"{root}/paintings/train", 50, ["dog", "fox", "owl"], 2, side=32, bad={5, 30})
    return open_data(f"{photos}=0.7,{paintings}=0.3")


def take(dataset, steps=None, **options):
    options = {"batch_size": 20, "lanes": 4, "seed": 3, "augment": VIEW, "shuffle_window": 32, "threads": 2} | options
    return first_batches(dataset, steps, **options)


def test_classes_of_the_same_name_are_the_same_class(mixture):
    assert mixture.classes == ["cat", "dog", "fox", "owl"]
    assert mixture.manifest.class_counts == [45, 45 + 17, 17, 16]
    named = {
        row["key"]: part.classes[row["label"]] for part in mixture.parts for row in part.read(range(0, len(part), 7))
    }
    assert len(named) == 13  # keys of both data sets
    for part, name in zip(mixture.parts, mixture.names, strict=True):
        truth = {f"{name}/{row['key']}": part.classes[row["label"]] for row in part}
        for batch in take(mixture):
            for key, label in zip(batch["key"], batch["label"].tolist(), strict=True):
                assert key not in truth or truth[key] == mixture.classes[label]
    assert mixture[95]["key"] == "paintings/k005"
    assert mixture.table(["label"])["label"].to_pylist()[90:93] == [1, 2, 3]


def test_every_batch_has_its_share_and_every_image_comes_before_any_comes_again(mixture):
    batches = take(mixture) + take(mixture, epoch=1) + take(mixture, epoch=2)
    keys = [key for batch in batches for key in batch["key"]]
    photos = [key for key in keys if key.startswith("photos/")]
    for end in range(20, len(keys) + 1, 20):
        count = sum(key.startswith("photos/") for key in keys[:end])
        assert abs(count - 0.7 * end) <= 0.5
    first = Counter(photos[:80])
    assert max(first.values()) == 1
    assert len(set(photos)) == 90


@given(st.integers(0, 13), st.sampled_from([1, 2, 4]), st.integers(0, 2), st.sampled_from([0.0, 0.3]))
@settings(max_examples=12, deadline=None)
def test_resuming_anywhere_on_any_number_of_workers_changes_nothing(mixture, at, world_size, prefetch, mixup):
    options = {"augment": dataclasses.replace(VIEW, mixup=mixup), "drop_last": True, "prefetch": prefetch}
    whole = [batch for epoch in range(2) for batch in take(mixture, epoch=epoch, **options)]
    assert len(whole) == 14
    epoch, step = divmod(at, 7)
    ranks = [take(mixture, epoch=epoch, step=step, rank=r, world_size=world_size, **options) for r in range(world_size)]
    expected = whole[at : 7 * (epoch + 1)]
    assert all(len(batches) == len(expected) for batches in ranks)
    for i, batch in enumerate(expected):
        for name, value in batch.items():
            parts = [batches[i][name] for batches in ranks]
            if name == "key":
                assert [key for part in parts for key in part] == value
            else:
                assert torch.equal(torch.cat(parts), value)


def test_damaged_images_are_counted_once_for_each_data_set(mixture):
    with Loader(mixture, batch_size=20, lanes=4, augment=VIEW, shuffle_window=32) as loader:
        for _ in range(3):
            keys = [key for batch in loader for key in batch["key"]]
    assert set(loader.replaced) == {"paintings/k005", "paintings/k030"}
    assert not set(keys) & set(loader.replaced)


def test_the_loader_says_what_a_run_has_seen(mixture):
    with Loader(mixture, batch_size=20, lanes=4, augment=VIEW, drop_last=True) as loader:
        assert loader.images_seen(10) == {"photos": (140, 140 / 90), "paintings": (60, 60 / 50)}
    with Loader(mixture.parts[0], batch_size=20, lanes=4, augment=VIEW, drop_last=True) as loader:
        assert loader.images_seen(10) == {}


def test_evaluation_reads_every_row_of_a_mixture_once(tmp_path):
    a, b = write(f"{tmp_path}/a", 30, ["x"], 1), write(f"{tmp_path}/b", 20, ["y"], 2)
    data = open_data(f"{a}=1,{b}=3")
    keys = [key for batch in take(data, train=False, augment=Augment(size=16, crop="squash")) for key in batch["key"]]
    assert keys == [f"a/k{i:03d}" for i in range(30)] + [f"b/k{i:03d}" for i in range(20)]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=1,b=0", 'the weight of "b" must be a number above 0'),
        ("a=1,b=1e999", 'the weight of "b" must be a number above 0'),
        ("a=1,./a=2", r"\./a is named twice"),
        ("a=1,b=1e-9", "share of b is below one in 1,000,000"),
    ],
)
def test_invalid_weights(text, message):
    with pytest.raises(UserError, match=message):
        address.shares(text)


def test_addresses_with_equals_and_commas_are_not_mistaken_for_mixtures(tmp_path):
    for text in ("sets/year=2019", "s3://b/split=train/x", "my,data"):
        assert address.shares(text) == [(text, 1)]
    assert address.shares("x/year=2019=1,y=3") == [("x/year=2019", Fraction(1, 4)), ("y", Fraction(3, 4))]
    uri = write(f"{tmp_path}/my,data", 10, ["x"], 1)
    assert len(open_data(uri)) == 10


@pytest.mark.parametrize("text", ["a,b", "a=0.7,b", "a=1,b=-1", "a=1,b=nan", "a=1,,b=1"])
def test_the_error_for_a_missing_weight_shows_the_syntax(text):
    with pytest.raises(UserError, match=r"no dataset here.*a weight above 0 for each data set: sets/a=0.7"):
        open_data(text)


def test_paths_with_commas_in_a_mixture(tmp_path):
    a, b = write(f"{tmp_path}/x=1,y=2-3f/train", 10, ["x"], 1), write(f"{tmp_path}/b", 10, ["x"], 2)
    assert len(open_data(a)) == 10  # without a second item it is a path
    text = address.data_address([(a, Fraction(2, 3)), (b, Fraction(1, 3))])
    assert address.shares(text) == [(a, Fraction(2, 3)), (b, Fraction(1, 3))]
    assert address.shares(address.normalise(text)) == address.shares(text)
    assert len(open_data(text)) == 20


def test_data_sets_that_do_not_fit_are_named_with_the_remedy(tmp_path):
    jpeg = write(f"{tmp_path}/jpeg", 10, ["x"], 1)

    def other(name, encoding="jpeg", side=8, multilabel=False, classes=("x",)):
        image = {"height": side, "width": side, "patch_size": 4, "channels": 3} if encoding == "patches" else {}
        label = [0] if multilabel else 0 if classes else -1
        rows = [(f"{name}{i}", bytes(side * side * 3), label, side, side) for i in range(4)]
        options = {"encoding": encoding, "image": image, "multilabel": multilabel}
        write_dataset(f"{tmp_path}/{name}", rows, classes=list(classes), **options)
        return f"{tmp_path}/{name}"

    patches = other("patches", "patches")
    for a, b, message in (
        (jpeg, patches, "encodings are jpeg and patches; prepare both with one --encoding"),
        (patches, other("large", "patches", 16), "8x8x3 in patches of 4 and 16x16x3.*--size"),
        (jpeg, other("many", multilabel=True), "many has several labels per image, .*jpeg has one"),
        (jpeg, other("unlabelled", classes=()), "unlabelled has no classes; prepare it with labels"),
    ):
        with pytest.raises(UserError, match=message):
            open_data(f"{a}=1,{b}=1")
    open_dataset(jpeg)
    with pytest.raises(UserError, match="the same data; name it once"):
        open_data(f"{jpeg}=1,{write(f'{tmp_path}/copy', 10, ['x'], 1)}=1")
    third = write(f"{tmp_path}/third", 12, ["x"], 2)
    with pytest.raises(UserError, match=r"copy and .*jpeg.* the same data|jpeg and .*copy .* the same data"):
        open_data(f"{third}=1,{jpeg}=1,{tmp_path}/copy=1")


def test_names_of_data_sets_are_unique():
    assert address.names(["s3://b/photos/train", "paintings@2"]) == ["photos", "paintings"]
    assert address.names(["x/a", "y/a", "a-1", "z/a"]) == ["a-2", "a-3", "a-1", "a-4"]


def test_the_identity_of_a_run_has_contents_and_shares(mixture):
    a, b = (part.uri for part in mixture.parts)

    def identity(text):
        config = pretrain_config(data=text, batch_size=16, lanes=4, image_size=224)
        return make_plan(config, open_data(text), 1).identity

    base = identity(f"{a}=0.7,{b}=0.3")
    assert identity(f"{a}=7,{b}=3") == base
    assert identity(f"{a}=0.6,{b}=0.4") != base
    assert identity(f"{b}=0.3,{a}=0.7") != base
    assert base["mixture"] == {
        part.manifest.fingerprint: share for part, share in zip(mixture.parts, ["7/10", "3/10"], strict=True)
    }


def test_a_data_set_that_is_too_small_for_the_lanes_is_named(mixture):
    text = mixture.uri
    config = pretrain_config(data=text, batch_size=128, lanes=64, image_size=224)
    with pytest.raises(UserError, match=r"paintings/train: 50 samples cannot fill 64 lanes"):
        make_plan(config, open_data(text), 1)
    with pytest.raises(UserError, match=r"paintings/train: 50 samples cannot fill 64 lanes"):
        Loader(open_data(text), batch_size=128, lanes=64)
    assert make_plan(pretrain_config(data=text, batch_size=128, image_size=224), open_data(text), 1).lanes == 2
