"""segment_attention's numbers: against fp64 one query and head at a time, and against identities."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from naive_segments import BF16, FP8, FP16, FP32, FP64, INT8, Case, assert_close, make, naive_segment_attention
from torch import Tensor

from swiftkv_kernels import attention_partials
from swiftkv_kernels import segment_attention_torch as torch_path
from swiftkv_kernels.segment_attention import PrefixSegment, segment_attention, segment_attention_reference

pytestmark = pytest.mark.usefixtures("one_thread")

# B, T, own slots, P, pinned, H / G, C: every B of 1, 2, 3, 7, 8, 16, 33 and of 70, of which groups are counted in two
# goes; P of 0, 1, 15, 16, 17, 255, 256, 4096; ratio of 1, 3, 4, 8, each with C of 64 and 128 (all with all: below). The
# first are small enough for the interpreter.
SHAPES = [
    (1, 1, 0, 0, 0, 3, 64),
    (1, 1, 1, 1, 0, 1, 64),
    (3, 1, 70, 15, 4, 3, 64),
    (2, 5, 13, 17, 4, 4, 16),
    (7, 1, 5, 16, 1, 8, 24),
    (1, 1, 600, 300, 4, 1, 16),
    (2, 40, 9, 70, 9, 1, 20),
    (70, 1, 1, 5, 1, 1, 16),
    (2, 1, 5, 16, 0, 8, 128),
    (2, 130, 300, 17, 4, 3, 64),
    (3, 3, 1, 256, 1, 1, 128),
    (8, 1, 33, 255, 4, 4, 128),
    (16, 1, 90, 4096, 4, 3, 64),
    (33, 1, 17, 256, 4, 3, 64),
    (33, 2, 0, 1, 0, 1, 80),
    (3, 1, 0, 256, 0, 4, 64),
    (2, 1, 15, 17, 4, 8, 64),
    (2, 2, 11, 16, 4, 3, 128),
    (1, 300, 517, 256, 4, 3, 64),
]
FEW = SHAPES[2:5]  # for what does not depend on shape
DTYPES = [(FP64, None), (FP32, None), (BF16, None), (FP16, None), (FP32, INT8), (BF16, INT8), (FP16, INT8)]
DTYPES += [(BF16, FP8), (FP32, FP8), (FP16, FP8)]


def from_shape(shape, **options) -> Case:
    batch, length, slots, prefix, pinned, ratio, size = shape
    return make(batch, length, slots, prefix, pinned=pinned, ratio=ratio, size=size, **options)


def check(case: Case, place) -> Tensor:
    found = case(segment_attention, backend=place.backend)
    assert_close(found, case(naive_segment_attention), case, place.backend)
    return found


def skip_if_interpreted(place, *, when: bool = True) -> None:
    if when and place.backend == "triton" and place.device == "cpu":
        pytest.skip("the interpreter takes milliseconds a tile")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "storage"), DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_matches_fp64(place, shape, dtype, storage):
    if place.backend == "triton" and dtype == FP64:
        pytest.skip("the kernel computes in fp32")
    small = SHAPES.index(shape) < 9 if (dtype, storage) in [(FP32, None), (BF16, INT8)] else shape in FEW[:2]
    skip_if_interpreted(place, when=not small and "EVERY_SHAPE" not in os.environ)
    prefixes = 5 if shape[0] > 8 else 2
    check(from_shape(shape, dtype=dtype, storage=storage, device=place.device, prefixes=prefixes), place)


@pytest.mark.parametrize("prefix", [0, 1, 15, 16, 17, 255, 256, 4096])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 16, 33])
def test_every_combination(place, batch, prefix):
    """Of these, of no, one and many slots, of head ratios and head sizes: a step of decoding in fp32."""
    skip_if_interpreted(place)
    for slots, ratio, size in itertools.product((0, 1, 33), (1, 3, 4, 8), (64, 128)):
        check(make(batch, 1, slots, prefix, pinned=4, ratio=ratio, size=size, kv_heads=1, device=place.device), place)


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_without_second_query_or_prefix(place, shape):
    case = from_shape(shape, device=place.device)
    check(case.change(pinned_query=None), place)
    check(case.change(prefix=None), place)
    check(case.change(prefix=None, pinned=0, pinned_query=None, scaling=0.3), place)


@pytest.mark.parametrize(("dtype", "storage"), [(FP32, None), (BF16, None), (FP32, INT8), (FP16, FP8)])
@pytest.mark.parametrize("shape", [(3, 50, 70, 40, 4, 3, 16), (2, 33, 0, 40, 0, 1, 16), (2, 20, 7, 0, 7, 2, 16)])
def test_blocks_and_slices(monkeypatch, shape, dtype, storage):
    """CPU: as long prompts and large batches go, at a hundredth of their size."""
    for module in (torch_path, attention_partials):
        monkeypatch.setattr(module, "WORK", 64)
    monkeypatch.setattr(torch_path, "BLOCK", 16)
    for length in (shape[1], 1):
        case = from_shape((shape[0], length, *shape[2:]), dtype=dtype, storage=storage)
        assert_close(case(segment_attention), case(naive_segment_attention), case, "cpu")


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_prefix_in_another_storage_than_the_slots(place, dtype):
    case = from_shape(FEW[0], dtype=dtype, device=place.device)
    quantised = from_shape(FEW[0], dtype=dtype, storage=INT8, device=place.device)
    check(case.change(prefix=quantised.options["prefix"]), place)
    check(quantised.change(prefix=case.options["prefix"]), place)


@pytest.mark.parametrize(("dtype", "storage"), [(FP32, None), (BF16, INT8)])
def test_without_positions_a_query_sees_all_slots(place, dtype, storage):
    case = make(3, 1, 70, 15, pinned=4, dtype=dtype, storage=storage, device=place.device)
    (query, key, value, held, asked), options = case
    asked.fill_(100)
    held.copy_(torch.arange(70))
    options["window"] = 101
    blind = Case((query, key, value, None, asked), {**options, "window": 1})
    assert_close(blind(segment_attention, backend=place.backend), case(naive_segment_attention), case, place.backend)
    plain = blind.change(pinned_query=None, prefix=None)
    expected = case.change(pinned_query=None, prefix=None)(naive_segment_attention)
    assert_close(plain(segment_attention, backend=place.backend), expected, case, place.backend)
    assert (plain(segment_attention_reference).double().cpu() - expected).abs().max() < 4e-5


@pytest.mark.parametrize("length", [1, 3])
def test_keys_in_many_shares(place, length):
    """All visible, sinks too, which are one share's only; as the kernel splits slots and prefix."""
    case = make(2, length, 700, 600, pinned=4, ratio=1, size=16, kv_heads=1, device=place.device)
    case.tensors[4].fill_(3000)
    case.options["prefix"].groups.copy_(torch.tensor([1, -1]))
    check(case.change(window=4000), place)
    check(case.change(window=4000, prefix=None), place)


@pytest.mark.parametrize("chunk", [1, 17])
def test_stream_through_a_ring(place, chunk):
    """Tokens in order through sinks and ring as a cache writes them, against one mask over the whole sequence."""
    skip_if_interpreted(place, when=chunk == 1)
    sinks, window, total, heads, kv_heads, size = 3, 20, 90, 4, 2, 16
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, count, total, size, generator=random).to(place.device) for count in (heads, kv_heads, kv_heads)
    )
    slots = sinks + window
    ring_key, ring_value = (torch.zeros(1, kv_heads, slots, size, device=place.device) for _ in range(2))
    held = torch.full((1, slots), -1, dtype=torch.int32, device=place.device)
    outputs = []
    for start in range(0, total, chunk):
        now = torch.arange(start, min(start + chunk, total), dtype=torch.int32, device=place.device)
        output = segment_attention(
            query[:, :, now],
            torch.cat([ring_key, key[:, :, now]], dim=2),
            torch.cat([ring_value, value[:, :, now]], dim=2),
            torch.cat([held, now[None]], dim=1),
            now[None],
            window=window,
            pinned=sinks,
            backend=place.backend,
        )
        outputs.append(output.double().cpu())
        for token in now.tolist():
            slot = token if token < sinks else sinks + (token - sinks) % window
            ring_key[:, :, slot], ring_value[:, :, slot], held[0, slot] = key[:, :, token], value[:, :, token], token
    age = torch.arange(total)[:, None] - torch.arange(total)
    visible = (age >= 0) & ((torch.arange(total) < sinks) | (age < window))
    exact = (tensor.cpu().double() for tensor in (query, key, value))
    expected = F.scaled_dot_product_attention(*exact, attn_mask=visible, enable_gqa=True)
    assert (torch.cat(outputs, dim=2) - expected).abs().max() < 1e-5


def rotate(states: Tensor, positions: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    angles = positions.double()[..., None] * 10000.0 ** -(torch.arange(half).double() / half)
    first, second = states[..., :half], states[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def test_two_rotations_are_positions_in_the_cache():
    """StreamingLLM rotates every key anew, at its place in the cache; here keys stay and the query is turned."""
    sinks, window, now, size = 4, 9, 100_000, 16
    random = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(n, size, generator=random, dtype=FP64) for n in (1, sinks + window, sinks + window)
    )
    absolute = torch.cat([torch.arange(sinks), torch.arange(now - window + 1, now + 1)])
    in_cache = torch.arange(sinks + window)
    weights = torch.softmax(rotate(query, in_cache[-1:]) @ rotate(keys, in_cache).T / size**0.5, dim=-1)
    scrambled = torch.cat([torch.arange(sinks), sinks + torch.randperm(window, generator=random)])
    found = segment_attention(
        rotate(query, torch.tensor([now]))[None, None],
        rotate(keys, absolute)[scrambled][None, None],
        values[scrambled][None, None],
        absolute[scrambled][None].int(),
        torch.tensor([[now]], dtype=torch.int32),
        window=window,
        pinned=sinks,
        pinned_query=rotate(query, in_cache[-1:])[None, None],
    )
    torch.testing.assert_close(found[0, 0], weights @ values, atol=1e-10, rtol=0)  # fp64 angles near 1e5


def test_one_softmax_over_both_segments(place):
    """Where all is visible: torch's attention over prefix and slots side by side."""
    query, key, value, _, _ = make(3, 2, 40, device=place.device, prefixes=0).tensors
    prefix = make(3, 1, 50, device=place.device, prefixes=0, seed=1).tensors
    found = segment_attention(
        query,
        key,
        value,
        torch.arange(50, 90, dtype=torch.int32, device=place.device).expand(3, -1),
        torch.full((3, 2), 90, dtype=torch.int32, device=place.device),
        window=100,
        prefix=PrefixSegment(
            prefix[1],
            prefix[2],
            torch.full((3,), 50, dtype=torch.int32, device=place.device),
            torch.tensor([2, 0, 1], dtype=torch.int32, device=place.device),
        ),
        backend=place.backend,
    )
    own_prefix = [tensor[[2, 0, 1]] for tensor in prefix[1:3]]
    keys, values = (torch.cat(pair, dim=2).double() for pair in zip(own_prefix, (key, value), strict=True))
    expected = F.scaled_dot_product_attention(query.double(), keys, values, enable_gqa=True)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_order_of_slots_and_rows_does_not_matter(place):
    case = make(7, 1, 70, 40, pinned=4, prefixes=3, device=place.device)
    (query, key, value, held, asked), options = case
    order = torch.cat([torch.arange(4), 4 + torch.randperm(66, generator=torch.Generator().manual_seed(1))])
    rows = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    order, rows = order.to(place.device), rows.to(place.device)
    prefix, pinned_query = options["prefix"], options["pinned_query"]
    permuted = Case(
        (query[rows], key[rows][:, :, order], value[rows][:, :, order], held[rows][:, order], asked[rows]),
        {**options, "pinned_query": pinned_query[rows], "prefix": prefix._replace(groups=prefix.groups[rows])},
    )
    found, expected = (each(segment_attention, backend=place.backend) for each in (permuted, case))
    torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("gap", [-300.0, -101.0, 101.0, 300.0])
def test_one_segment_far_above_the_other(place, dtype, gap):
    """The prefix's scores are `gap` above the slots', which are near 0; scores are exact in bf16."""
    query = torch.ones(2, 4, 1, 16, dtype=dtype, device=place.device)
    key, prefix_key = (torch.zeros(2, 2, 20, 16, dtype=dtype, device=place.device) for _ in range(2))
    prefix_key[..., 0] = gap
    value, prefix_value = torch.ones_like(key), torch.full_like(key, 3.0)
    positions = torch.arange(20, 40, dtype=torch.int32, device=place.device).expand(2, -1)
    lengths, groups = (torch.tensor(pair, dtype=torch.int32, device=place.device) for pair in ([20, 20], [1, -1]))
    found = segment_attention(
        query,
        key,
        value,
        positions,
        positions[:, -1:],
        window=64,
        prefix=PrefixSegment(prefix_key, prefix_value, lengths, groups),
        scaling=1.0,
        backend=place.backend,
    )
    # exp(-101) is 1e-44: one segment is all there is. Without prefix, the slots are. But for twenty roundings of sums.
    expected = torch.tensor([3.0 if gap > 0 else 1.0, 1.0], dtype=dtype, device=place.device).view(2, 1, 1, 1)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=20 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_extreme_scores_stay_finite(place, dtype):
    case = from_shape(FEW[0], dtype=dtype, device=place.device)
    (query, *rest), options = case
    pinned_query = (options["pinned_query"] * 200).to(dtype)
    case = Case(((query * 200).to(dtype), *rest), {**options, "pinned_query": pinned_query})
    found, expected = case(segment_attention, backend=place.backend), case(naive_segment_attention)
    # Scores near 1000 carry an fp32 rounding of 1e-4, and nearly all weights are 0 or 1.
    assert_close(found, expected, case, place.backend) if dtype == BF16 else None
    assert (found.double().cpu() - expected).abs().max() < (0.05 if dtype == BF16 else 2e-3)


@pytest.mark.parametrize(("slots", "prefix"), [(0, 0), (0, 9), (9, 0), (9, 9)])
@pytest.mark.parametrize("length", [1, 3])
def test_queries_that_see_nothing_give_zero(place, slots, prefix, length):
    case = make(4, length, slots, prefix, pinned=2, device=place.device, prefixes=3)
    (query, key, value, held, asked), options = case
    blind = Case((query, key, value, torch.full_like(held, -1), asked), options)  # all slots empty
    groups = options["prefix"].groups
    groups.copy_(torch.tensor([0, -1, 2, 1]))
    options["prefix"].lengths.copy_(torch.tensor([prefix, prefix, 0]))
    asked.copy_(torch.tensor([prefix, prefix, prefix, -1])[:, None])
    found = check(blind, place)
    assert (found[1:] == 0).all()  # no prefix; an empty one; before the first token
    assert (found[0] != 0).all() == (prefix > 0)
    check(case, place)
    none = blind.change(prefix=None)(segment_attention, backend=place.backend)
    assert (none == 0).all()


def test_strided_views(place):
    case = make(3, 2, 21, 30, pinned=4, device=place.device)
    (query, key, value, held, asked), options = case
    prefix = options["prefix"]

    def within(tensor: Tensor, dim: int) -> Tensor:
        """The same numbers as a part of a larger tensor, beside NaN."""
        shape = list(tensor.shape)
        shape[dim] += 5
        larger = torch.full(shape, math.nan if tensor.is_floating_point() else -7, device=place.device).to(tensor.dtype)
        return larger.narrow(dim, 3, tensor.shape[dim]).copy_(tensor)

    def by_token(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    strided = Case(
        (by_token(query), within(key, 2), by_token(value), within(held, 1), within(asked, 1)),
        {
            **options,
            "pinned_query": query.new_empty(*query.shape, 2)[..., 1].copy_(options["pinned_query"]),
            "prefix": PrefixSegment(
                within(by_token(prefix.key), 1), within(prefix.value, 3), within(prefix.lengths, 0), prefix.groups
            ),
        },
    )
    assert not any(tensor.is_contiguous() for tensor in strided.tensors)
    expected = case(naive_segment_attention)
    assert_close(strided(segment_attention, backend=place.backend), expected, case, place.backend)
    # One query for both, and not contiguous in its last dimension.
    last = Case((strided.options["pinned_query"], *strided.tensors[1:]), {**strided.options, "pinned_query": None})
    same = Case((options["pinned_query"], *case.tensors[1:]), {**options, "pinned_query": None})
    assert_close(last(segment_attention, backend=place.backend), same(naive_segment_attention), case, place.backend)


def test_strided_quantised_views(place):
    case = make(3, 2, 21, 30, pinned=4, dtype=BF16, storage=FP8, device=place.device)
    (query, key, value, held, asked), options = case
    larger_key = key.view(torch.int8).repeat(1, 1, 2, 1).view(FP8)
    larger_scale = options["key_scale"].repeat(1, 1, 2)
    strided = Case(
        (query, larger_key[:, :, :21], value, held, asked), {**options, "key_scale": larger_scale[:, :, :21]}
    )
    assert_close(strided(segment_attention, backend=place.backend), case(naive_segment_attention), case, place.backend)


@pytest.mark.parametrize(("dtype", "storage"), [(FP64, None), (FP32, None), (BF16, INT8)])
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_reference(shape, dtype, storage):
    """fp64 in, fp64 out; else fp32 arithmetic (1e-5 of scores near 10 and V near 4)."""
    case = from_shape(shape, dtype=dtype, storage=storage)
    found, expected = case(segment_attention_reference), case(naive_segment_attention)
    assert found.dtype == (FP64 if dtype == FP64 else FP32)
    assert (found.double() - expected).abs().max() < (1e-12 if dtype == FP64 else 4e-5)
    plain = case.change(prefix=None, pinned_query=None, scaling=0.2)
    assert (plain(segment_attention_reference).double() - plain(naive_segment_attention)).abs().max() < 4e-5


def test_fp64_throughout():
    case = from_shape(SHAPES[9], dtype=FP64)
    assert (case(segment_attention) - case(naive_segment_attention)).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [FP64, FP32])
def test_merged_partials_are_the_whole(dtype):
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, 40, generator=random, dtype=FP64) * 3
    values = torch.randn(3, 40, 8, generator=random, dtype=FP64)
    scores[0, :, :10] += 150  # one part above the others by more than fp32's exp can tell
    scores[1, :, 10:25] = -math.inf  # a part that shows nothing
    scores[2, 1:4] = -math.inf  # queries that see nothing at all
    outputs, log_sum_exps = [], []
    for part in (slice(0, 10), slice(10, 25), slice(25, 40)):
        log_sum_exp = torch.logsumexp(scores[..., part], dim=-1)
        outputs.append((torch.softmax(scores[..., part], dim=-1).nan_to_num(0.0) @ values[:, part]).to(dtype))
        # As the CPU operator returns them: not contiguous.
        log_sum_exps.append(log_sum_exp.to(dtype).T.contiguous().T)
    output, log_sum_exp = attention_partials.merge_partials(outputs, log_sum_exps)
    expected = torch.softmax(scores, dim=-1).nan_to_num(0.0) @ values
    limit = 1e-12 if dtype == FP64 else 1e-5
    torch.testing.assert_close(output.double(), expected, atol=limit, rtol=0)
    torch.testing.assert_close(log_sum_exp.double(), torch.logsumexp(scores, dim=-1), atol=10 * limit, rtol=0)
    assert (output[2, 1:4] == 0).all()
    assert (log_sum_exp[2, 1:4] == -math.inf).all()
    alone = attention_partials.merge_partials(outputs[:1], log_sum_exps[:1])
    assert torch.equal(alone[0], outputs[0])
    assert torch.equal(alone[1], log_sum_exps[0])
