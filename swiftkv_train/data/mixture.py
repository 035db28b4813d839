"""The training stream: sources interleaved by weight, endless, each sequence a pure function of (seed, its number).

Nothing is remembered between calls but caches, so a run that resumes at sequence i, on any number of processes, sees
exactly what the run that never stopped saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Collection
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from swiftkv_train.data.packing import PackedSource, Sequence, count_loss_positions, cut_documents, fill_sequence
from swiftkv_train.errors import UserError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from swiftkv_train.data.cache import TokenizedSource

STREAM_VERSION = 1  # Raise it when packing or order changes: a run must not resume into another stream.


@dataclass(frozen=True, eq=False)
class Batch:
    """B packed sequences of T tokens. See packing.Sequence for what the arrays mean."""

    input_ids: torch.Tensor  # [B, T] int64
    position_ids: torch.Tensor  # [B, T] int64
    loss_mask: torch.Tensor  # [B, T] bool, already shifted
    token_mask: torch.Tensor  # [B, T] bool, False on padding
    source_ids: torch.Tensor  # [B] int64, position of each sequence's source in the list of sources

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda tensor: tensor.to(device))

    def share(self, rank: int, ranks: int) -> Batch:
        """Every `ranks`-th sequence, from `rank` on: what one process of several works on."""
        return self._map(lambda tensor: tensor[rank::ranks])

    def model_inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """input_ids, position_ids and loss_mask."""
        return self.input_ids, self.position_ids, self.loss_mask

    def without_loss(self) -> Batch:
        """The same with no loss position."""
        return replace(self, loss_mask=self.loss_mask & False)

    def split(self, sequences: int) -> list[Batch]:
        """Micro-batches of at most `sequences` sequences."""
        return [
            self._map(lambda tensor, at=at: tensor[at : at + sequences])  # type: ignore[misc]
            for at in range(0, len(self.input_ids), sequences)
        ]

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


class Schedule:
    """Which source the n-th sequence comes from, such that every prefix holds each source within 1 of its share.

    Each source's j-th turn (from 1) may come once n*p > j - 1 and must have come by n = ceil(j/p); the turn that is due
    first goes first. Such windows always have a schedule and this rule finds it (earliest deadline first on unit tasks:
    Baruah et al., Proportionate Progress, Algorithmica 1996). Weights are exact fractions, so it repeats.
    """

    def __init__(self, weights: Collection[float]) -> None:
        # Fraction(str(0.1)) is the tenth that was written in the recipe, not the nearest binary number.
        fractions = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(fraction.denominator for fraction in fractions))
        numbers = [int(fraction * scale) for fraction in fractions]
        divisor = math.gcd(*numbers)
        self.turns = [number // divisor for number in numbers]  # of each source in one period
        self.period = sum(self.turns)
        self._sources: list[int] = []
        self._ranks: list[int] = []  # how often the source has had its turn before
        self._had = [0] * len(self.turns)

    def turn(self, n: int) -> tuple[int, int]:
        """Source of sequence n (from 0), and how many of that source came before it."""
        rounds, within = divmod(n, self.period)
        while len(self._sources) <= within:
            self._extend()
        source = self._sources[within]
        return source, rounds * self.turns[source] + self._ranks[within]

    def _extend(self) -> None:
        n = len(self._sources) + 1
        candidates = [
            (-(-(had + 1) * self.period // turns), source)
            for source, (had, turns) in enumerate(zip(self._had, self.turns, strict=True))
            if n * turns > had * self.period
        ]
        _, source = min(candidates)
        self._sources.append(source)
        self._ranks.append(self._had[source])
        self._had[source] += 1


class TrainingData:
    """Tokenised sources as an endless stream of packed sequences.

    Args:
        weights: share of the sequences of each source, relative to the others.
        sequence_length: T.

    Raises:
        UserError: a source has no sequence with a token to learn from.
    """

    def __init__(
        self,
        sources: Collection[TokenizedSource],
        weights: Collection[float],
        sequence_length: int,
        seed: int,
        pad_token_id: int,
    ) -> None:
        if not sources or len(sources) != len(weights) or min(weights) <= 0:
            raise ValueError("every source needs a weight above 0")
        self.sequence_length = sequence_length
        self.weights = list(weights)
        self.packed = [
            PackedSource(source, sequence_length, pad_token_id, (seed, k)) for k, source in enumerate(sources)
        ]
        self._schedule = Schedule(self.weights)
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    def sequence(self, i: int) -> Sequence:
        """Sequence i >= 0 of the stream, arrays of [T]."""
        return self._sequence_and_source(i)[0]

    def batch(self, start: int, count: int) -> Batch:
        """Sequences start .. start + count - 1 as tensors [count, T]."""
        return self.batch_of(range(start, start + count))

    def batch_of(self, numbers: Iterable[int]) -> Batch:
        """The sequences of these numbers as tensors [count, T]."""
        return _stack([self._sequence_and_source(i) for i in numbers])

    def describe(self) -> list[dict[str, Any]]:
        """One row per source: what it holds, how it packs, and its share of the stream."""
        return [
            {
                **packed.source.describe(),
                "sequences": packed.num_sequences,
                "loss_positions": packed.num_loss_positions,
                "dropped_tokens": packed.num_dropped_tokens,
                "packing_efficiency": packed.efficiency,
                "share": turns / self._schedule.period,
            }
            for packed, turns in zip(self.packed, self._schedule.turns, strict=True)
        ]

    def _sequence_and_source(self, i: int) -> tuple[Sequence, int]:
        if i < 0:
            raise IndexError(f"the stream begins at 0, not at {i}")
        source, rank = self._schedule.turn(i)
        epoch, position = divmod(rank, self.packed[source].num_sequences)
        return self.packed[source].sequence(int(self._order(source, epoch)[position])), source

    def _order(self, source: int, epoch: int) -> NDArray[np.int64]:
        key = (source, epoch)
        if key not in self._orders:
            # The epoch before is kept too: neighbouring batches may fall on both sides of the border.
            self._orders = {k: v for k, v in self._orders.items() if k[0] != source or k[1] == epoch - 1}
            self._orders[key] = self.packed[source].order(epoch)
        return self._orders[key]


def held_out_batches(
    source: TokenizedSource,
    sequence_length: int,
    max_tokens: int,
    batch_size: int,
    pad_token_id: int,
) -> list[Batch]:
    """Sequences of a source, its documents in their order, as batches of at most `batch_size` sequences.

    Sequences without a loss position are left out. Where the rest hold more than `max_tokens` tokens that are not
    padding, sequences evenly spaced over the source are taken: as many as stay within it, but at least one.

    Raises:
        UserError: the source has no token to predict.
    """
    starts, lengths = cut_documents(source.offsets, sequence_length)
    bounds = _bounds_in_document_order(lengths, sequence_length)
    losses = np.append(0, count_loss_positions(source.targets, starts, lengths).cumsum())[bounds]
    tokens = np.append(0, lengths.cumsum())[bounds]
    useful = np.flatnonzero(np.diff(losses))
    if not len(useful):
        raise UserError(f"source {source.name!r} has no token to predict in sequences of {sequence_length}")
    counts = np.diff(tokens)
    chosen = useful
    while len(chosen) > 1 and (found := int(counts[chosen].sum())) > max_tokens:
        number = max(1, min(len(chosen) - 1, len(chosen) * max_tokens // found))
        chosen = useful[(2 * np.arange(number) + 1) * len(useful) // (2 * number)]
    pieces = [slice(*bounds[index : index + 2]) for index in chosen]
    sequences = [
        (fill_sequence(source, starts[piece], lengths[piece], sequence_length, pad_token_id), 0) for piece in pieces
    ]
    return [_stack(sequences[at : at + batch_size]) for at in range(0, len(sequences), batch_size)]


def _bounds_in_document_order(lengths: NDArray[np.int64], sequence_length: int) -> list[int]:
    """Sequence s holds pieces bounds[s:s+2] when it is closed as soon as the next piece does not fit."""
    bounds, used = [0], 0
    for piece, length in enumerate(lengths.tolist()):
        if used + length > sequence_length:
            bounds.append(piece)
            used = 0
        used += length
    return [*bounds, len(lengths)] if used else bounds


def _stack(sequences: list[tuple[Sequence, int]]) -> Batch:
    import torch

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(sequence, name) for sequence, _ in sequences]))

    return Batch(
        input_ids=tensor("input_ids"),
        position_ids=tensor("position_ids"),
        loss_mask=tensor("loss_mask"),
        token_mask=tensor("token_mask"),
        source_ids=torch.tensor([source for _, source in sequences], dtype=torch.int64),
    )
