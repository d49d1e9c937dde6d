"""The order of samples: a pure function of (seed, epoch, step), the same for any number of workers.

An epoch is a permutation of row groups, concatenated and divided into L equal *lanes*. Every global batch takes batch/L
samples from each lane; inside a lane, consecutive windows of samples are permuted. So

    (epoch, step, lane)  ->  rows of row groups

needs the permutation of one window and no earlier state: resuming in the middle of an epoch replays nothing. A rank
owns consecutive lanes, and the parts of all ranks form the same global batch for any world size.

Random numbers are SplitMix64 (Steele et al. 2014) used as a counter-based generator: `bits(seed, purpose, epoch, i)`
hashes its words, and each word can be an array. There is no state to save, and the numbers do not depend on a library.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.errors import UserError, plural

# The second word of every draw, so that different purposes have different random numbers.
ROW_GROUPS, WINDOWS, AUGMENT, MIXUP, TOKENS, DROPOUT, MIXTURE = range(7)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)


def bits(seed: int, *words: int | np.ndarray) -> np.ndarray:
    """64 random bits for each element of the broadcast words (integers >= 0): uint64 of the broadcast shape.

    If the last word is 0, 1, 2, ..., the result is the SplitMix64 stream that starts from the hash of the other words.
    """
    state: np.ndarray | np.uint64 = np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64, which NumPy reports for scalars
        for word in words:
            state = state + (np.asarray(word).astype(np.uint64) + np.uint64(1)) * _GOLDEN
            state = (state ^ (state >> _30)) * _MIX_1
            state = (state ^ (state >> _27)) * _MIX_2
            state = state ^ (state >> _31)
    return np.asarray(state)


def uniform(seed: int, *words: int | np.ndarray) -> np.ndarray:
    """Like `bits`, as float64 in [0, 1)."""
    return (bits(seed, *words) >> _11) * 2.0**-53


def default_lanes(batch_size: int, num_samples: int) -> int:
    """The largest divisor of the batch that is at most 64, half the batch and a sixteenth of the samples.

    With 64 lanes every batch has samples of 64 row groups, and 1, 2, 4, ... 64 workers are possible. Half the batch,
    because mixup pairs two samples of a lane. A sixteenth of the samples, because an epoch omits a remainder of fewer
    samples than lanes. The number of workers has no influence: it must not change the order.
    """
    limit = max(1, min(64, batch_size // 2, num_samples // 16))
    return max(lanes for lanes in range(1, limit + 1) if batch_size % lanes == 0)


def check_layout(batch_size: int, lanes: int, workers: int = 1) -> None:
    """Raises UserError, with suitable numbers, unless lanes divide the batch and workers divide the lanes."""
    if batch_size < 1 or lanes < 1 or workers < 1:
        raise UserError(f"batch_size {batch_size}, lanes {lanes} and workers {workers} must each be at least 1")
    if batch_size % lanes:
        raise UserError(
            f"batch_size {batch_size} is not divisible by lanes {lanes}: every batch takes the same number of samples "
            f"from each lane; use a divisor of the batch, such as --lanes {default_lanes(batch_size, 2**62)}"
        )
    if lanes % workers:
        fitting = sorted((n for n in range(1, lanes + 1) if lanes % n == 0), key=lambda n: abs(n - workers))[:4]
        raise UserError(
            f"{plural(workers, 'worker')} cannot share batches of {batch_size} in {plural(lanes, 'lane')} (sample streams, each "
            f"read by one worker); use --workers {' or '.join(map(str, sorted(fitting)))}, or {_other_layout(batch_size, lanes, workers)}"
        )


def _other_layout(batch_size: int, lanes: int, workers: int) -> str:
    """Flags for the same number of workers, with the closest batch that they can share."""
    size = max(1, round(batch_size / workers)) * workers
    usual = default_lanes(size, 2**62)
    fitting = [n for n in range(workers, max(lanes, workers) + 1, workers) if size % n == 0]
    batch = [f"--batch-size {size}"] if size != batch_size else []
    is_usual = lanes == default_lanes(batch_size, 2**62) and usual % workers == 0
    return " ".join(batch + ([] if batch and is_usual else [f"--lanes {max(fitting)}"]))


class Picks(NamedTuple):
    """Samples of a batch: row group (index in storage order), row inside it, and epoch of the data set; int64, all of
    one shape."""

    groups: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray


class Read(NamedTuple):
    """A row group that is needed from one step to another, both included."""

    group: int
    first: int
    last: int


class Order:
    """The order of one epoch. rows: number of samples in each row group, int64 (R,), in storage order.

    A position, 0 <= position < sum(rows), is an index in the sequence of the epoch; `locate` converts positions to rows
    of row groups. With shuffle=False the sequence is the storage order. [start, stop) restricts it to a part (default:
    everything).
    """

    def __init__(
        self,
        rows: np.ndarray,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        lanes: int,
        shuffle_window: int,
        shuffle: bool = True,
        start: int = 0,
        stop: int | None = None,
    ):
        check_layout(batch_size, lanes)
        rows = np.asarray(rows, dtype=np.int64)
        self.seed, self.epoch, self.shuffle = seed, epoch, shuffle
        self.permutation = np.arange(len(rows))
        if shuffle:
            self.permutation = np.argsort(bits(seed, ROW_GROUPS, epoch, self.permutation), kind="stable")
        self.ends = np.cumsum(rows[self.permutation])  # where each row group ends in the epoch's sequence
        self.starts = self.ends - rows[self.permutation]
        total = int(self.ends[-1]) if len(rows) else 0
        stop = total if stop is None else stop

        self.lanes = lanes
        self.lane_size = (stop - start) // lanes
        self.lane_starts = start + self.lane_size * np.arange(lanes)
        self.per_lane = batch_size // lanes
        self.window = max(1, shuffle_window // lanes)
        self._windows: dict[tuple[int, range], np.ndarray] = {}

    @property
    def full_steps(self) -> int:
        return self.lane_size // self.per_lane

    @property
    def steps(self) -> int:
        """The number of steps in the epoch, including a last short one if the batch does not divide the samples."""
        return -(-self.lane_size // self.per_lane)

    def _permute(self, window: int, lanes: range) -> np.ndarray:
        """The permutation of one window in every lane of `lanes`: offsets in the window, int64 (lanes, window size)."""
        offsets = np.arange(min(self.window, self.lane_size - window * self.window))
        numbers = np.arange(lanes.start, lanes.stop)
        draws = bits(self.seed, WINDOWS, self.epoch, numbers[:, None], window, offsets)
        return np.argsort(draws, axis=1, kind="stable")

    def _window(self, window: int, lanes: range) -> np.ndarray:
        """`_permute`, cached for the following steps."""
        if (window, lanes) not in self._windows:
            while len(self._windows) > 2:  # a batch that straddles two windows needs both
                del self._windows[next(iter(self._windows))]
            self._windows[window, lanes] = self._permute(window, lanes)
        return self._windows[window, lanes]

    def batch(self, step: int, lanes: range) -> np.ndarray:
        """Positions of the samples of `lanes` in a step: int64 (lanes, n), n = batch/L,
        or fewer at the end of the epoch."""
        index = np.arange(step * self.per_lane, min((step + 1) * self.per_lane, self.lane_size))
        lane, index = np.broadcast_arrays(np.arange(lanes.start, lanes.stop)[:, None], index)
        return self.positions(lanes, lane, index)

    def positions(self, lanes: range, lane: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Positions of the index-th samples of lanes among `lanes`: int64, of the shape that lane and index share."""
        if not self.shuffle:
            return self.lane_starts[lane] + index
        windows, offsets = np.divmod(index, self.window)
        found = self.lane_starts[lane] + windows * self.window
        for window in np.unique(windows).tolist():
            at = windows == window
            found[at] += self._window(window, lanes)[lane[at] - lanes.start, offsets[at]]
        return found

    def picks(self, step: int, lanes: range) -> Picks:
        """The samples that `lanes` give to a step: arrays (lanes, n)."""
        groups, rows = self.locate(self.batch(step, lanes))
        return Picks(groups, rows, np.full(groups.shape, self.epoch))

    def substitutes(self, lane: int, step: int, offset: int) -> Iterator[Picks]:
        """What to use, in turn, for the offset-th sample of a lane in a step when it cannot be decoded: one sample
        each, arrays (1,)."""
        for position in self.replacements(lane, step * self.per_lane + offset):
            groups, rows = self.locate(np.array([position]))
            yield Picks(groups, rows, np.array([self.epoch]))

    def replacements(self, lane: int, index: int) -> Iterator[int]:
        """Positions to try if the index-th sample of a lane cannot be decoded: the rest of its window, in order."""
        window, offset = divmod(index, self.window)
        order = self._permute(window, range(lane, lane + 1))[0]
        for step in range(1, len(order)):
            yield int(self.lane_starts[lane]) + window * self.window + int(order[(offset + step) % len(order)])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row group in storage order, row in the row group) of each position."""
        slots = np.searchsorted(self.ends, positions, side="right")
        return self.permutation[slots], positions - self.starts[slots]

    def reads(self, lanes: range) -> np.ndarray:
        """The row groups that `lanes` need, in order of first use: int64 (reads, 3) of
        (row group, first step, last step)."""
        groups, _, first, last = self.spans(lanes)
        reads = np.stack([groups, first // self.per_lane, last // self.per_lane], axis=1)
        return reads[np.argsort(reads[:, 1], kind="stable")]

    def reads_from(self, step: int, lanes: range) -> Iterator[Read]:
        """The reads that a step and those after it need, in order."""
        reads = self.reads(lanes)
        for read in reads[reads[:, 2] >= step]:
            yield Read(*read.tolist())

    def spans(self, lanes: range) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where the row groups that `lanes` need are used: row group, lane, first and last index in the lane, int64
        (reads,) each. A row group counts as used throughout the shuffle windows that it touches."""
        if not self.lane_size or not len(lanes):
            return (np.empty(0, dtype=np.int64),) * 4
        lane_starts = self.lane_starts[lanes.start : lanes.stop]
        low, high = lane_starts[0], lane_starts[-1] + self.lane_size
        inside = self.starts[(self.starts > low) & (self.starts < high)]
        cuts = np.unique(np.concatenate([lane_starts, inside, [high]]))
        begins, ends = cuts[:-1], cuts[1:]
        groups, _ = self.locate(begins)
        lane = lanes.start + (begins - low) // self.lane_size
        begins, ends = begins - self.lane_starts[lane], ends - self.lane_starts[lane]
        window = self.window if self.shuffle else 1
        first = begins // window * window
        last = np.minimum(-(-ends // window) * window, self.lane_size) - 1
        return groups, lane, first, last


def kept_tokens(seed: int, epoch: int | np.ndarray, samples: np.ndarray, num_tokens: int, keep: float) -> np.ndarray:
    """The indices of the patches that each sample keeps: int64 (B, n), ascending, n = round(keep * N), at least 1.

    The result depends only on (seed, epoch, sample index) and is uniform over all subsets of n patches. epoch: one
    number, or that of each sample.
    """
    n = max(1, round(keep * num_tokens))
    epochs = np.broadcast_to(epoch, np.shape(samples))[:, None]
    draws = bits(seed, TOKENS, epochs, np.asarray(samples)[:, None], np.arange(num_tokens))
    return np.sort(np.argsort(draws, axis=1, kind="stable")[:, :n], axis=1).astype(np.int64)
