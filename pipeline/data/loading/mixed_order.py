"""The order of samples of a mixture of data sets: a pure function of (seed, epoch, step), as for a single data set.

Every data set has an endless order of its own: the concatenation of its epochs (order.py), each of which is a permutation
of its samples. A lane of the batch consists of slots, and each slot belongs to one data set: the k-th slot of a lane that
belongs to data set d takes the k-th sample of the same lane of d's order. So

    (slot, lane)  ->  data set d and k  ->  (epoch of d, index in the lane)  ->  row of a row group

can be computed without the previous steps, and without a list as long as the run.

Slots are assigned with a Huffman tree of the shares. Each node divides its slots between its two sides like the digits of
a line in a grid: of the first i slots, `before(i) = floor((i * p + phase) / q)` belong to the side with the share p/q.
Integers make this exact for any length. The count of a lane deviates from its share by less than four images (one for two
data sets), because each node adds less than one, and two levels of a Huffman tree at least halve the deviation. The phases
of the lanes are evenly spaced, so that the deviations of the lanes cancel: for two data sets, the count in the whole batch
is the share rounded to the nearest image.

An epoch of the mixture has as many images as its data sets in total. It is only a unit of counting: data sets with a
larger weight than size start their next epoch before it ends, and others do not complete theirs.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from pipeline.data.loading.order import MIXTURE, Order, Picks, Read, bits, check_layout

LARGEST = 1 << 24  # maximum integer in a ratio; with 2^38 slots per lane, products are below 2^63
_KEPT = 3  # cached orders per data set; a batch may contain samples of two epochs


class Turns:
    """The slots of each lane that belong to one data set."""

    def __init__(self, levels: Sequence[tuple[int, int, np.ndarray]]) -> None:
        """levels: from the root of the tree to the data set, p, q and the phase of each lane, int64 (lanes,)."""
        self.levels = levels

    def before(self, lane: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """The number of the first `slot` slots of a lane that belong to the data set."""
        for p, q, phase in self.levels:
            slot = (slot * p + phase[lane]) // q
        return slot

    def slot(self, lane: np.ndarray, number: np.ndarray) -> np.ndarray:
        """The slot of a lane with sample `number` of the data set: the inverse of `before`."""
        for p, q, phase in reversed(self.levels):
            number = ((number + 1) * q - phase[lane] - 1) // p
        return number


def turns(shares: Sequence[Fraction], lanes: int) -> list[Turns]:
    """Assigns slots to data sets with these shares (above 0, sum 1)."""
    trees: list[tuple[Fraction, int, list[int]]] = [(share, i, [i]) for i, share in enumerate(shares)]
    paths: list[list[tuple[Fraction, bool]]] = [[] for _ in shares]  # from the leaf to the root: (ratio, side)
    heapq.heapify(trees)
    for number in itertools.count(len(shares)):
        if len(trees) == 1:
            break
        (small, _, right), (large, _, left) = heapq.heappop(trees), heapq.heappop(trees)
        whole = small + large
        ratio = (large / whole).limit_denominator(LARGEST)
        for side, ratio_of_side in ((left, ratio), (right, 1 - ratio)):
            for i in side:
                paths[i].append((ratio_of_side, side is left))
        heapq.heappush(trees, (whole, number, left + right))
    return [Turns([_level(*node, depth, lanes) for depth, node in enumerate(reversed(path))]) for path in paths]


def _level(ratio: Fraction, is_left: bool, depth: int, lanes: int) -> tuple[int, int, np.ndarray]:
    p, q = ratio.numerator, ratio.denominator
    # a different order of the lanes at each depth
    places = np.arange(lanes) * pow(_spread(lanes), depth, lanes) % lanes
    phase = (q * (2 * places + 1)) // (2 * lanes)
    return p, q, phase if is_left else q - 1 - phase


def _spread(lanes: int) -> int:
    """A number coprime to `lanes`, near its golden section, so that its multiples spread consecutive lanes evenly."""
    near = sorted(range(1, lanes + 1), key=lambda n: abs(n - lanes * 0.618))
    return next(n for n in near if math.gcd(n, lanes) == 1)


class MixedOrder:
    """One epoch of a mixture: the interface of `order.Order`, with the row groups of all data sets numbered one after
    another.

    rows: the rows of each data set's row groups. shares: of the images, sum 1. whole_steps: an epoch ends with its last
    full batch instead of a short one (the remaining images come in the next epoch)."""

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        shares: Sequence[Fraction],
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        lanes: int,
        shuffle_window: int,
        whole_steps: bool = False,
    ) -> None:
        check_layout(batch_size, lanes)
        self.rows, self.epoch, self.lanes, self.per_lane = rows, epoch, lanes, batch_size // lanes
        self.turns = turns(shares, lanes)
        self.first_groups = np.cumsum([0, *map(len, rows)])
        self.lane_sizes = [int(part.sum()) // lanes for part in rows]
        lane_size = sum(int(part.sum()) for part in rows) // lanes
        self.full_steps, self.steps = lane_size // self.per_lane, -(-lane_size // self.per_lane)
        self.slots = self.full_steps * self.per_lane if whole_steps else lane_size
        self.first_slot = epoch * self.slots
        self._options: dict[str, Any] = {"batch_size": batch_size, "lanes": lanes, "shuffle_window": shuffle_window}
        self._seeds = [int(bits(seed, MIXTURE, part)) for part in range(len(rows))]
        self._orders: list[dict[int, Order]] = [{} for _ in rows]

    def _order(self, part: int, epoch: int) -> Order:
        orders = self._orders[part]
        if epoch not in orders:
            while len(orders) >= _KEPT:
                del orders[next(iter(orders))]
            orders[epoch] = Order(self.rows[part], seed=self._seeds[part], epoch=epoch, **self._options)
        return orders[epoch]

    def picks(self, step: int, lanes: range) -> Picks:
        """The samples of `lanes` in a step: arrays (lanes, n)."""
        stop = min((step + 1) * self.per_lane, self.slots)
        slots = self.first_slot + np.arange(step * self.per_lane, stop)
        lane, slot = np.broadcast_arrays(np.arange(lanes.start, lanes.stop)[:, None], slots)
        found = Picks(*(np.empty(slot.shape, np.int64) for _ in range(3)))
        for part, turn in enumerate(self.turns):
            before = turn.before(lane, slot)
            mine = turn.before(lane, slot + 1) > before
            for field, values in zip(found, self._samples(part, lanes, lane[mine], before[mine]), strict=True):
                field[mine] = values
        return found

    def _samples(self, part: int, lanes: range, lane: np.ndarray, number: np.ndarray) -> Picks:
        """The samples with these numbers in the lanes of one data set's order: arrays of shape (n,)."""
        epochs, index = np.divmod(number, self.lane_sizes[part])
        groups, rows = np.empty_like(index), np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            at, order = epochs == epoch, self._order(part, epoch)
            groups[at], rows[at] = order.locate(order.positions(lanes, lane[at], index[at]))
        return Picks(groups + self.first_groups[part], rows, epochs)

    def substitutes(self, lane: int, step: int, offset: int) -> Iterator[Picks]:
        """Like `Order.substitutes`: other samples of the same shuffle window, data set and epoch."""
        slot = np.array([self.first_slot + step * self.per_lane + offset])
        at = np.array([lane])
        part = next(i for i, turn in enumerate(self.turns) if turn.before(at, slot + 1) > turn.before(at, slot))
        epoch, index = divmod(int(self.turns[part].before(at, slot)[0]), self.lane_sizes[part])
        order = Order(self.rows[part], seed=self._seeds[part], epoch=epoch, **self._options)  # called from many threads
        for position in order.replacements(lane, index):
            groups, rows = order.locate(np.array([position]))
            yield Picks(groups + self.first_groups[part], rows, np.array([epoch]))

    def reads_from(self, step: int, lanes: range) -> Iterator[Read]:
        """The reads for a step and the following ones, in order; steps before the start of the epoch are negative."""
        streams = (self._reads_of(part, step, lanes) for part in range(len(self.rows)))
        return heapq.merge(*streams, key=lambda read: read.first)

    def _reads_of(self, part: int, step: int, lanes: range) -> Iterator[Read]:
        """The reads of one data set over its epochs, computed lazily."""
        turn, size, every = self.turns[part], self.lane_sizes[part], np.arange(lanes.start, lanes.stop)

        def steps(lane: np.ndarray, number: np.ndarray) -> np.ndarray:
            return (turn.slot(lane, number) - self.first_slot) // self.per_lane

        reached = turn.before(every, np.full(len(every), self.first_slot + step * self.per_lane))
        epoch, waiting = int(reached.min()) // size, np.empty((0, 3), np.int64)
        while True:
            begins = int(steps(every, np.full(len(every), epoch * size)).min())
            # Lanes enter an epoch at different steps, so the reads of two epochs are merged in order.
            ready = waiting[:, 1] < begins
            yield from (Read(*read) for read in waiting[ready].tolist())
            if begins >= self.steps:
                return
            groups, lane, first, last = self._order(part, epoch).spans(lanes)
            first, last = steps(lane, first + epoch * size), steps(lane, last + epoch * size)
            reads = np.stack([groups + self.first_groups[part], first, last], axis=1)
            reads = np.concatenate([waiting[~ready], reads[reads[:, 2] >= step]])
            waiting, epoch = reads[np.argsort(reads[:, 1], kind="stable")], epoch + 1

    def images_seen(self, steps: int) -> list[int]:
        """The number of images of each data set in the first steps of a run (with whole_steps), from epoch 0."""
        every = np.arange(self.lanes)
        slots = np.full(self.lanes, steps * self.per_lane)
        return [int(turn.before(every, slots).sum()) for turn in self.turns]
