"""Packing: documents into sequences of one length, each document isolated from its neighbours.

Shapes: T = sequence_length. A *piece* is a run of at most T tokens of one document. Isolation is by `position_ids` that
restart at 0 in every piece; the model must get no attention mask and no cache with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from swiftkv_train.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from swiftkv_train.data.cache import TokenizedSource


class Sequence(NamedTuple):
    """One packed sequence. `loss_mask[t]` is already shifted: the loss at t is that of predicting token t + 1."""

    input_ids: NDArray[np.int64]  # [T]
    position_ids: NDArray[np.int64]  # [T]; padding is one more document at the end
    loss_mask: NDArray[np.bool_]  # [T]; never True on padding or on the last token of a piece
    token_mask: NDArray[np.bool_]  # [T]; False on padding


class PackedSource:
    """A source packed by best-fit decreasing; the same for the same (source, T, seed).

    Args:
        seed: one or more numbers that fix the packing and the orders.

    Raises:
        UserError: no sequence has a token to learn from.
    """

    def __init__(self, source: TokenizedSource, sequence_length: int, pad_token_id: int, seed: tuple[int, ...]) -> None:
        self.source = source
        self.sequence_length = sequence_length
        self.seed = seed
        self.pad_token_id = pad_token_id
        starts, lengths = cut_documents(source.offsets, sequence_length)
        # Shuffled first, so that chance decides which of the pieces of one length share a sequence.
        shuffled = random_generator(*seed, 0).permutation(len(starts))
        starts, lengths = starts[shuffled], lengths[shuffled]
        bins = best_fit_decreasing(lengths, sequence_length)
        losses = np.bincount(bins, weights=count_loss_positions(source.targets, starts, lengths)).astype(np.int64)
        keep = losses[bins] > 0
        by_bin = np.flatnonzero(keep)[np.argsort(bins[keep], kind="stable")]
        self._starts, self._lengths = starts[by_bin], lengths[by_bin]
        counts = np.bincount(bins[by_bin], minlength=len(losses))
        self._bounds = np.concatenate([[0], np.cumsum(counts[counts > 0])])  # sequence s holds pieces bounds[s:s+2]
        self.num_sequences = len(self._bounds) - 1
        self.num_tokens = int(self._lengths.sum())
        self.num_loss_positions = int(losses.sum())
        self.num_dropped_tokens = source.num_tokens - self.num_tokens
        if self.num_sequences == 0:
            raise UserError(
                f"source {source.name!r} has no token to learn from in sequences of {sequence_length}; "
                "give it longer documents, or set data.sequence_length higher"
            )

    @property
    def efficiency(self) -> float:
        """Share of tokens that are not padding."""
        return self.num_tokens / (self.num_sequences * self.sequence_length)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The order [num_sequences] in which an epoch visits the sequences."""
        return random_generator(*self.seed, epoch + 1).permutation(self.num_sequences)

    def sequence(self, index: int) -> Sequence:
        """Packed sequence `index`, before any shuffling."""
        pieces = slice(self._bounds[index], self._bounds[index + 1])
        return fill_sequence(
            self.source, self._starts[pieces], self._lengths[pieces], self.sequence_length, self.pad_token_id
        )


def cut_documents(offsets: NDArray[np.int64], sequence_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut documents into pieces of `sequence_length` plus a remainder, in document order.

    Pieces of one token are left out: there is nothing in them to predict.

    Returns:
        Where each piece starts [pieces] and how long it is [pieces].
    """
    lengths = np.diff(offsets)
    pieces = -(-lengths // sequence_length)
    first = np.repeat(np.asarray(offsets[:-1]), pieces)
    number = np.arange(len(first)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = first + number * sequence_length
    piece_lengths = np.minimum(sequence_length, np.repeat(offsets[1:], pieces) - starts)
    keep = piece_lengths >= 2
    return starts[keep], piece_lengths[keep]


def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Bin of each piece [pieces]: longest first, each into the fullest bin that still has room.

    Pieces of one length are placed together and bins of one free space are kept together, so the work is by distinct
    lengths and free spaces: O(n log n) for the sort, then few steps per distinct length.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    free: list[list[int]] = [[] for _ in range(capacity + 1)]  # free space -> bins with that much
    occupied = np.zeros(capacity + 1, dtype=bool)  # which of these lists are not empty
    num_bins = position = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            room = size + int(occupied[size:].argmax())
            if not occupied[room]:
                room = capacity
                per_bin = room // size
                new = -(-count // per_bin)
                chosen = list(range(num_bins, num_bins + new))
                num_bins += new
            else:
                per_bin = room // size
                bins_needed = -(-count // per_bin)
                chosen = free[room][-bins_needed:]
                del free[room][-bins_needed:]
                occupied[room] = bool(free[room])
            placed = min(count, len(chosen) * per_bin)
            bins[order[position : position + placed]] = np.repeat(chosen, per_bin)[:placed]
            position += placed
            count -= placed
            # All chosen bins are filled alike, but for the last, which may have got fewer.
            last = placed - (len(chosen) - 1) * per_bin
            for group, filled in ((chosen[:-1], per_bin), (chosen[-1:], last)):
                left = room - filled * size
                free[left] += group
                occupied[left] = bool(free[left])
    return bins


def count_loss_positions(
    targets: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Per piece, how many of its tokens but the first are targets: the first has nothing before it that predicts it."""
    if not len(starts):
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(starts)  # reduceat wants rising bounds; it reads the memory map once, front to back.
    bounds = np.stack([starts[order] + 1, (starts + lengths)[order]], axis=1).reshape(-1)
    if bounds[-1] == len(targets):
        bounds = bounds[:-1]
    counts = np.empty(len(starts), dtype=np.int64)
    counts[order] = np.add.reduceat(targets, bounds, dtype=np.int64)[::2]
    return counts


def fill_sequence(
    source: TokenizedSource,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    sequence_length: int,
    pad_token_id: int,
) -> Sequence:
    """Lay pieces end to end and pad: see `Sequence`."""
    input_ids = np.full(sequence_length, pad_token_id, dtype=np.int64)
    position_ids = np.empty(sequence_length, dtype=np.int64)
    loss_mask = np.zeros(sequence_length, dtype=bool)
    at = 0
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        input_ids[at : at + length] = source.tokens[start : start + length]
        position_ids[at : at + length] = np.arange(length)
        loss_mask[at : at + length - 1] = source.targets[start + 1 : start + length]
        at += length
    position_ids[at:] = np.arange(sequence_length - at)
    return Sequence(input_ids, position_ids, loss_mask, np.arange(sequence_length) < at)


def random_generator(*key: int) -> np.random.Generator:
    """A generator that depends on `key` only; negative numbers are allowed."""
    return np.random.default_rng([number % 2**64 for number in key])
