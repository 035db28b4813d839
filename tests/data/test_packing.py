"""Packing: nothing lost, nothing leaks between documents, masks shifted inside documents only."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swiftkv_train.data import PackedSource, TrainingData, held_out_batches
from swiftkv_train.data.packing import best_fit_decreasing, count_loss_positions, cut_documents
from swiftkv_train.errors import UserError

PAD = 10**6  # no token of the made sources


def pack(source, length=8, seed=0) -> PackedSource:
    return PackedSource(source, length, PAD, (seed,))


def pieces_of(sequence) -> list[tuple[list[int], list[bool]]]:
    """The documents in a sequence, told apart by their positions alone; padding left out."""
    starts = [*np.flatnonzero(sequence.position_ids == 0), len(sequence.position_ids)]
    found = []
    for start, end in pairwise(starts):
        assert sequence.position_ids[start:end].tolist() == list(range(end - start))
        found.append((sequence.input_ids[start:end].tolist(), sequence.loss_mask[start:end].tolist()))
    return [(ids, mask) for ids, mask in found if ids[0] != PAD]


def test_cutting():
    starts, lengths = cut_documents(np.array([0, 3, 12, 13, 29, 31]), 8)
    # 3 | 9 = 8 + 1 (dropped) | 1 (dropped) | 16 = 8 + 8 | 2
    assert starts.tolist() == [0, 3, 13, 21, 29]
    assert lengths.tolist() == [3, 8, 8, 8, 2]


@pytest.mark.parametrize("seed", range(20))
def test_every_token_appears_exactly_once_with_its_document_whole(seed, make_source):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(8, 40))
    source = make_source(rng.integers(1, 100, size=int(rng.integers(1, 80))).tolist())
    packed = pack(source, length, seed)
    documents = [list(range(a, b)) for a, b in pairwise(source.offsets)]
    expected = [doc[at : at + length] for doc in documents for at in range(0, len(doc), length)]
    expected = [piece for piece in expected if len(piece) >= 2]
    found = [piece for s in range(packed.num_sequences) for piece, _ in pieces_of(packed.sequence(s))]
    assert sorted(found) == sorted(expected)
    assert packed.num_tokens == sum(map(len, expected))
    assert packed.num_dropped_tokens == source.num_tokens - packed.num_tokens
    padding = sum(int((packed.sequence(s).input_ids == PAD).sum()) for s in range(packed.num_sequences))
    assert packed.efficiency == pytest.approx(1 - padding / (packed.num_sequences * length))


@pytest.mark.parametrize("seed", range(10))
def test_the_mask_is_the_shifted_target_inside_the_piece(seed, make_source):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 30, size=40).tolist()
    targets = rng.integers(0, 2, size=sum(lengths))
    packed = pack(make_source(lengths, targets), 16, seed)
    total = 0
    for s in range(packed.num_sequences):
        sequence = packed.sequence(s)
        assert sequence.loss_mask.any()
        assert not sequence.loss_mask[sequence.input_ids == PAD].any()
        assert (sequence.token_mask == (sequence.input_ids != PAD)).all()
        for ids, mask in pieces_of(sequence):
            assert mask == [bool(targets[token]) for token in ids[1:]] + [False]
        total += int(sequence.loss_mask.sum())
    assert total == packed.num_loss_positions


def test_best_fit_decreasing_matches_the_plain_algorithm():
    def plain(lengths, capacity):
        free: list[int] = []
        for size in sorted(lengths, reverse=True):
            fitting = [b for b, room in enumerate(free) if room >= size]
            if fitting:
                free[min(fitting, key=lambda b: free[b])] -= size
            else:
                free.append(capacity - size)
        return free

    for seed in range(60):
        rng = np.random.default_rng(seed)
        capacity = int(rng.integers(2, 64))
        lengths = rng.integers(1, capacity + 1, size=int(rng.integers(1, 200)))
        bins = best_fit_decreasing(lengths, capacity)
        free = capacity - np.bincount(bins, weights=lengths).astype(int)
        assert sorted(free.tolist()) == sorted(plain(lengths.tolist(), capacity))


def test_loss_positions_are_counted_for_pieces_in_any_order():
    targets = np.array([1, 1, 0, 1, 0, 1, 1], np.uint8)
    assert count_loss_positions(targets, np.array([4, 0]), np.array([3, 4])).tolist() == [2, 2]


def test_sequences_without_a_loss_position_are_dropped(make_source):
    # Documents of the sequence's length, so each is a sequence; the second's only target is its first token.
    packed = pack(make_source([4, 4, 4], [0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]), 4)
    assert packed.num_sequences == 2
    assert sorted(packed.sequence(s).input_ids[0] for s in range(2)) == [0, 8]
    assert packed.num_dropped_tokens == 4


def test_a_source_with_nothing_to_learn_is_the_users_error(make_source):
    with pytest.raises(UserError, match="source 'made' has no token to learn from in sequences of 8"):
        pack(make_source([1, 1, 1]))
    with pytest.raises(UserError, match="has no token to learn from"):
        pack(make_source([5, 5], [1, 0, 0, 0, 0] * 2))


def test_a_seed_decides_packing_and_orders(make_source):
    source = make_source([3, 5, 2, 4] * 20)

    def content(seed):
        packed = pack(source, 8, seed)
        return [packed.sequence(s).input_ids.tolist() for s in range(packed.num_sequences)]

    assert content(1) == content(1)
    assert content(1) != content(2)
    packed = pack(source, 8, -7)
    orders = [packed.order(epoch).tolist() for epoch in range(3)]
    assert orders == [pack(source, 8, -7).order(epoch).tolist() for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(packed.num_sequences)) for order in orders)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["training", "held out"])
def test_packed_logits_are_those_of_the_documents_alone(how, attention, make_source):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    source = make_source([5, 9, 3, 30, 2, 7, 16, 4, 11])
    if how == "training":
        data = TrainingData([source], [1.0], 16, 0, pad_token_id=0)
        batch = data.batch(0, data.packed[0].num_sequences)
    else:
        (batch,) = held_out_batches(source, 16, 10**6, 100, pad_token_id=0)
    checked = 0
    with torch.no_grad():
        packed = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        for row in range(len(packed)):
            starts = [*torch.where(batch.position_ids[row] == 0)[0].tolist(), 16]
            for start, end in pairwise(starts):
                alone = model(batch.input_ids[row : row + 1, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-5, atol=1e-5)
                checked += end - start
    assert checked == packed.shape[0] * 16


def test_held_out_batches_keep_the_documents_order_and_the_token_limit(make_source):
    source = make_source([5, 9, 3, 30, 2, 7, 1, 16, 4], name="h")
    batches = held_out_batches(source, 16, 10**6, 2, PAD)
    ids = torch.cat([batch.input_ids for batch in batches]).flatten()
    expected = [token for token in range(source.num_tokens) if token != 5 + 9 + 3 + 30 + 2 + 7]  # the 1-token document
    assert ids[ids != PAD].tolist() == expected
    assert [len(batch.input_ids) for batch in batches[:-1]] == [2] * (len(batches) - 1)

    def tokens(limit):
        found = held_out_batches(source, 16, limit, 2, PAD)
        return sum(int((batch.input_ids != PAD).sum()) for batch in found)

    assert tokens(1) == 16  # at least one sequence
    assert all(tokens(limit) <= limit for limit in range(16, 80))


def test_held_out_batches_are_spread_over_the_source(make_source):
    source = make_source([8] * 100)
    for number in (1, 3, 10, 99):
        batches = held_out_batches(source, 8, 8 * number, 7, PAD)
        documents = torch.cat([batch.input_ids[:, 0] for batch in batches]).div(8).long()
        assert len(documents) == number
        gaps = documents.diff(prepend=torch.tensor([-1]), append=torch.tensor([100]))
        assert gaps.max() <= 100 / number + 1


def test_held_out_batches_leave_out_sequences_without_loss(make_source):
    source = make_source([8, 8, 8], [0] * 8 + [1] * 8 + [0] * 8)
    (batch,) = held_out_batches(source, 8, 10**6, 4, PAD)
    assert batch.input_ids.tolist() == [list(range(8, 16))]
