"""The stream: exact shares in every prefix, every epoch complete, and no state but the number asked for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from swiftkv_train.data import PackedSource, TrainingData
from swiftkv_train.data.mixture import Schedule


def stream(make_source, weights=(1.0, 2.0), seed=0, **options) -> TrainingData:
    sources = [make_source([8] * (5 + 3 * k), name=f"s{k}") for k in range(len(weights))]
    return TrainingData(sources, weights, options.get("length", 8), seed, options.get("pad", 0))


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [3.0, 1e-3], [1 / 3, 2 / 3], [5.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.1] * 7]
    + [np.random.default_rng(seed).uniform(0.01, 1, size=3 + seed).round(3).tolist() for seed in range(6)],
)
def test_every_prefix_holds_each_source_within_one_of_its_share(weights):
    schedule = Schedule(weights)
    shares = np.array(weights) / sum(weights)
    counts = np.zeros(len(weights))
    for n in range(4000):
        source, rank = schedule.turn(n)
        assert rank == counts[source]
        counts[source] += 1
        assert np.abs(counts - (n + 1) * shares).max() < 1


def test_the_schedule_far_out_continues_the_period():
    schedule = Schedule([0.7, 0.2, 0.1])
    assert schedule.period == 10
    for n in range(30):
        source, rank = Schedule([0.7, 0.2, 0.1]).turn(n)
        assert schedule.turn(10**9 + n) == (source, [7, 2, 1][source] * 10**8 + rank)


def test_a_batch_is_its_sequences_and_fresh_objects_agree(make_source):
    data = stream(make_source)
    batch = data.batch(10, 4)
    for row, i in enumerate(range(10, 14)):
        sequence = stream(make_source).sequence(i)
        assert batch.input_ids[row].tolist() == sequence.input_ids.tolist()
        assert batch.position_ids[row].tolist() == sequence.position_ids.tolist()
        assert batch.loss_mask[row].tolist() == sequence.loss_mask.tolist()
        assert batch.token_mask[row].tolist() == sequence.token_mask.tolist()
    assert (batch.input_ids.dtype, batch.position_ids.dtype) == (torch.int64, torch.int64)
    assert batch.loss_mask.dtype == torch.bool
    assert batch.source_ids.shape == (4,)


def test_shares_and_micro_batches_divide_a_batch_without_loss(make_source):
    batch = stream(make_source).batch(0, 7)
    shares = [batch.share(rank, 3) for rank in range(3)]
    assert [share.input_ids.tolist() for share in shares] == [batch.input_ids[rank::3].tolist() for rank in range(3)]
    parts = batch.to("cpu").split(3)
    assert [len(part.source_ids) for part in parts] == [3, 3, 1]
    for name in ("input_ids", "position_ids", "loss_mask", "token_mask", "source_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_an_epochs_order_is_made_once_when_read_in_order(make_source, monkeypatch):
    data = stream(make_source, (1.0, 2.0))
    made: list[tuple[str, int]] = []
    order = PackedSource.order
    monkeypatch.setattr(
        PackedSource, "order", lambda self, epoch: made.append((self.source.name, epoch)) or order(self, epoch)
    )
    data.batch(0, 90)
    assert sorted(made) == [("s0", epoch) for epoch in range(6)] + [("s1", epoch) for epoch in range(8)]
    assert len(data._orders) == 4  # this epoch and the one before, of both sources


def test_what_was_asked_before_changes_nothing(make_source):
    data = stream(make_source, (1.0, 0.6, 0.3))
    expected = [data.sequence(i).input_ids.tolist() for i in range(120)]
    asked = stream(make_source, (1.0, 0.6, 0.3))
    for i in np.random.default_rng(0).permutation(120):
        assert asked.sequence(int(i)).input_ids.tolist() == expected[i]


def test_two_ranks_see_together_what_one_sees(make_source):
    one, left, right = (stream(make_source) for _ in range(3))
    for step in range(6):
        whole = one.batch(step * 4, 4).input_ids
        assert torch.equal(
            whole, torch.cat([left.batch(step * 4, 2).input_ids, right.batch(step * 4 + 2, 2).input_ids])
        )


def test_each_source_goes_through_whole_epochs_in_new_orders(make_source):
    data = stream(make_source, (1.0, 2.0))
    batch = data.batch(0, 90)
    assert Counter(batch.source_ids.tolist()) == {0: 30, 1: 60}
    for source, sequences in ((0, 5), (1, 8)):
        first_tokens = batch.input_ids[batch.source_ids == source][:, 0].tolist()
        epochs = [first_tokens[at : at + sequences] for at in range(0, len(first_tokens), sequences)]
        whole = [epoch for epoch in epochs if len(epoch) == sequences]
        assert len(whole) >= 6
        assert all(sorted(epoch) == list(range(0, 8 * sequences, 8)) for epoch in whole)
        assert len(set(map(tuple, whole))) > 1


def test_the_seed_changes_the_order(make_source):
    first, second = stream(make_source, seed=0).batch(0, 30), stream(make_source, seed=1).batch(0, 30)
    assert not torch.equal(first.input_ids, second.input_ids)


def test_describe_counts(make_source):
    sources = [make_source([6, 2, 1, 9], name="a"), make_source([4, 4], [0, 1, 1, 0] * 2, name="b")]
    a, b = TrainingData(sources, [3.0, 1.0], 8, 0, 0).describe()
    # a: 6 + 2 and 8 fill two sequences; the 1-token document and the ninth token are dropped.
    assert a == {
        "name": "a",
        "documents": 4,
        "skipped_rows": 0,
        "tokens": 18,
        "target_tokens": 18,
        "sequences": 2,
        "loss_positions": 5 + 1 + 7,
        "dropped_tokens": 2,
        "packing_efficiency": 1.0,
        "share": 0.75,
    }
    assert (b["target_tokens"], b["loss_positions"], b["sequences"], b["share"]) == (4, 4, 1, 0.25)


def test_wrong_calls_are_refused(make_source):
    with pytest.raises(ValueError, match="weight above 0"):
        TrainingData([make_source([8])], [0.0], 8, 0, 0)
    with pytest.raises(ValueError, match="weight above 0"):
        TrainingData([make_source([8])], [1.0, 1.0], 8, 0, 0)
    with pytest.raises(IndexError, match="begins at 0"):
        stream(make_source).sequence(-1)
