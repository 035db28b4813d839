"""Which path segment_attention takes, what that path computes and holds, and what it refuses."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch
from naive_segments import BF16, FP8, FP16, FP32, FP64, INT8, Case, assert_close, make, naive_segment_attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swiftkv_kernels import attention_partials, backends
from swiftkv_kernels import segment_attention_torch as torch_path
from swiftkv_kernels import segment_attention_triton as triton_path
from swiftkv_kernels.segment_attention import segment_attention, segment_attention_backend

pytestmark = pytest.mark.usefixtures("one_thread")
FLASH = attention_partials.FLASH


@pytest.fixture(autouse=True)
def flash_is_tried_already():
    """So that it is not counted among what is called."""
    attention_partials._tried.cache_clear()
    for dtype in (FP64, FP32, BF16, FP16):
        assert attention_partials.has_flash(dtype)
    yield
    attention_partials._tried.cache_clear()


class Watch(TorchDispatchMode):
    """Operators called, the shapes that attention's queries had, and the numbers of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.queries: list[tuple[int, ...]] = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append(function.overloadpacket.__name__)
        if self.calls[-1] == FLASH:
            self.queries.append(tuple(args[0].shape))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16])
@pytest.mark.parametrize("how", ["missing", "other arguments", "refuses", "wrong", "works"])
def test_cpu_without_the_private_operator(monkeypatch, dtype, how):
    called = []

    def refuse(*args, **kwargs):
        called.append(args)
        raise RuntimeError("not for these tensors")

    def wrong(*args, **kwargs):
        output, log_sum_exp = plain(*args, **kwargs)
        return output, log_sum_exp + 1

    plain = getattr(torch.ops.aten, FLASH)

    if how == "missing":
        monkeypatch.setattr(attention_partials, "FLASH", "_no_such_operator")
    elif how == "other arguments":
        monkeypatch.setattr(
            attention_partials, "FLASH", "_softmax"
        )  # which takes other ones, and says so as torch does
    elif how in ("refuses", "wrong"):
        monkeypatch.setattr(torch.ops.aten, FLASH, refuse if how == "refuses" else wrong)
        attention_partials._tried.cache_clear()
    for shape in ((3, 1, 20, 15), (2, 30, 9, 40)):
        case = make(*shape, pinned=4, dtype=dtype)
        with Watch() as watch:
            found = case(segment_attention)
        assert_close(found, case(naive_segment_attention), case, "cpu")
        assert watch.queries[1:] if how == "works" else not watch.queries[how == "wrong" :]  # the one that was tried
    assert len(called) == (how == "refuses")


@pytest.mark.parametrize("feature", ["amx_tile", None])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_are_filled_up_where_the_cpu_has_amx(monkeypatch, feature, dtype):
    """A few bf16 ones over a long prefix."""
    for module in (torch_path, attention_partials):
        monkeypatch.setattr(module, "cpu_supports", lambda asked: asked == feature)
    case = make(11, 1, 9, 1100, prefixes=1, ratio=4, dtype=dtype)
    case.options["prefix"].groups.zero_()
    case.options["prefix"].lengths.fill_(1100)
    held, asked = case.tensors[3:]
    held[held >= 0] += 1100  # all behind the prefix
    asked += 1100
    with Watch() as watch:
        found = case(segment_attention)
    assert_close(found, case(naive_segment_attention), case, "cpu")
    filled = dtype == BF16 and feature is not None
    assert watch.queries[1:] == [(1, 2, 64 if filled else 44, case.tensors[0].shape[3])]


@pytest.mark.parametrize("operator", [FLASH, "_no_such_operator"])
@pytest.mark.parametrize("shape", [(2, 9, 1, 1, 64), (3, 1, 17, 3, 64), (11, 70, 1100, 4, 64), (33, 20, 300, 8, 128)])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16])
def test_one_prefix_that_all_rows_see(monkeypatch, dtype, shape, operator):
    """As a cache asks on CPU, and by way of segment_attention, which finds out; another rotation for the prefix."""
    monkeypatch.setattr(attention_partials, "FLASH", operator)
    rows, slots, length, ratio, size = shape
    case = make(rows, 1, slots, length, ratio=ratio, size=size, dtype=dtype)
    (query, key, value, held, asked), options = case
    prefix = options["prefix"]
    prefix.groups.fill_(1)  # of two, the one that is full
    asked.fill_(length + slots)
    held.copy_(length + torch.arange(slots))
    case = case.change(window=slots + 1)
    expected = case(naive_segment_attention)
    blind = Case((query, key, value, None, asked), case.options)
    assert_close(blind(segment_attention), expected, case, "cpu")
    strided = query.new_full((*query.shape, 2), float("nan"))[..., 1].copy_(query)
    turned, keys = options["pinned_query"], (key, value, prefix.key[1:], prefix.value[1:])
    assert_close(torch_path.attend_shared(strided, turned, *keys, size**-0.5), expected, case, "cpu")
    same = case.change(pinned_query=query)(naive_segment_attention)
    with Watch() as watch:
        found = torch_path.attend_shared(query, None, *keys, size**-0.5)
    assert_close(found, same, case, "cpu")
    assert operator != FLASH or len(watch.calls) <= 32, watch.calls  # views and all
    # Log-sum-exps over 100 apart; scores of hundreds, whose rounding shows. A wrong merge would be off by 1 or so.
    far = case.change(prefix=prefix._replace(key=prefix.key * 60), pinned_query=None)
    error = Case(blind.tensors, far.options)(segment_attention) - far(naive_segment_attention)
    assert error.abs().max() < 0.05
    for change in ({"groups": prefix.groups.clone()}, {"lengths": prefix.lengths.clone()}):
        (part,) = change.values()
        part[-1] = 0  # a row has the other prefix; no row sees the last token, which is beyond its end
        other = case.change(prefix=prefix._replace(**change))
        expected = other(naive_segment_attention)
        assert_close(Case(blind.tensors, other.options)(segment_attention), expected, case, "cpu")


@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
@pytest.mark.parametrize("feature", ["amx_tile", None])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16])
def test_query_heads_together_or_one_by_one(monkeypatch, dtype, feature, ratio):
    """With a padding mask too, as transformers' caches ask."""
    for module in (torch_path, attention_partials):
        monkeypatch.setattr(module, "cpu_supports", lambda asked: asked == feature)
    case = make(3, 1, 40, ratio=ratio, prefixes=0, dtype=dtype)
    (query, key, value, held, asked), _ = case
    asked.fill_(40)
    for visible in (None, torch.arange(40) >= torch.tensor([0, 7, 33])[:, None]):
        held.copy_(torch.arange(40) if visible is None else torch.where(visible, torch.arange(40), -1))
        expected = case.change(window=41, pinned_query=None)(naive_segment_attention)
        mask = None if visible is None else visible[:, None, None]
        with Watch() as watch:
            found = torch_path.attend_all(query, key, value, None, mask)
        assert_close(found, expected, case, "cpu")
        one_by_one = 1 < ratio <= 3 and dtype == BF16 and feature is not None
        assert watch.queries[0][1:3] == ((2 * ratio, 1) if one_by_one else (2, ratio))


# Tiles of a slot of a head of a row; of all slots; of all heads; of more rows.
@pytest.mark.parametrize("work", [1, 300, 2500, 9000])
@pytest.mark.parametrize("options", [{}, {"pinned": 4}, {"pinned": 4, "prefixes": 0}], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_products_in_tiles(monkeypatch, work, options, dtype):
    for module in (torch_path, attention_partials):
        monkeypatch.setattr(module, "WORK", work)
    monkeypatch.setattr(attention_partials, "_flash", attention_partials._products)
    for shape in ((3, 1, 20, 15), (2, 5, 9, 40)):
        case = make(*shape, **options, dtype=dtype)
        assert_close(case(segment_attention), case(naive_segment_attention), case, "cpu")


def test_a_prefix_is_read_once_for_all_rows_of_its_group():
    case = make(6, 1, 9, 50, prefixes=3, ratio=4)
    case.options["prefix"].groups.copy_(torch.tensor([2, 0, 2, -1, 2, 0]))
    case.options["prefix"].lengths.copy_(torch.tensor([50, 50, 50]))
    with Watch() as watch:
        case(segment_attention)
    size = case.tensors[0].shape[3]
    own, *shared = watch.queries
    assert own == (6, 2, 4, size)
    assert sorted(shared) == [(1, 2, 2 * 4, size), (1, 2, 3 * 4, size)]  # groups 0 and 2: rows x query heads


@pytest.mark.parametrize(("options", "limit"), [({}, 24), ({"pinned": 4}, 42)])
def test_a_decoding_step_is_few_operations(options, limit):
    case = make(1, 1, 50, prefixes=0, **options)
    with Watch() as watch:
        case(segment_attention)
    assert len(watch.calls) <= limit, watch.calls
    assert watch.calls.count(FLASH) == 1


@pytest.mark.parametrize(("dtype", "storage"), [(FP32, None), (BF16, None), (BF16, INT8), (BF16, FP8)])
def test_no_tensor_of_all_scores(monkeypatch, dtype, storage):
    """A long prompt: one block's at most, beside copies of inputs. And a large batch does not unpack all its slots."""
    work = 1 << 15
    for module in (torch_path, attention_partials):
        monkeypatch.setattr(module, "WORK", work)
    case = make(2, 512, 700, 100, pinned=4, ratio=2, size=16, dtype=dtype, storage=storage)
    with Watch() as watch:
        found = case(segment_attention)
    scores = 2 * 2 * 512 * 700  # of a row
    inputs = max(tensor.numel() for tensor in case.tensors)
    # 16 queries at a time, whatever the number of keys, and every block's output.
    assert watch.largest <= max(2 * inputs, 2 * 2 * 16 * 700) < scores / 10
    assert_close(found, case(naive_segment_attention), case, "cpu")
    if storage is not None:
        decode = make(16, 1, 120, pinned=4, size=64, prefixes=0, dtype=dtype, storage=storage)
        with Watch() as watch:
            decode(segment_attention)
        assert watch.largest <= work < decode.tensors[1].numel()


def test_no_backward_pass():
    case = make(2, 1, 5, pinned=1, prefixes=0)
    query, *rest = case.tensors
    with pytest.raises(ValueError, match="no_grad"):
        segment_attention(query.clone().requires_grad_(), *rest, window=5)
    with_prefix = make(2, 1, 5, 4)
    with_prefix.options["prefix"].value.requires_grad_()
    with pytest.raises(ValueError, match="no_grad"):
        with_prefix(segment_attention)
    with torch.no_grad():
        segment_attention(query.clone().requires_grad_(), *rest, window=5)
    assert not case(segment_attention).requires_grad


def test_bad_arguments_name_what_is_wrong():
    case = make(3, 2, 6, 5, pinned=2, dtype=BF16)
    (query, key, value, held, asked), options = case
    prefix = options["prefix"]
    packed = key.float().to(INT8)
    scale = torch.ones(3, 2, 6)
    for tensors, changes, message in [
        ((query[0], key, value, held, asked), {}, "query must be floating"),
        ((query.int(), key, value, held, asked), {}, "query must be floating"),
        ((query[:, :5], key, value, held, asked), {}, "key must be .* H a multiple of G"),
        ((query[..., :8], key, value, held, asked), {}, "key must be"),
        ((query[:2], key, value, held, asked), {}, "batch of query, 2, not 3"),
        ((query, key, value[:, :, :5], held, asked), {}, "value must be like key"),
        ((query, key, value.float(), held, asked), {}, "value must be like key"),
        ((query, key.float(), value.float(), held, asked), {}, r"key must be torch\.bfloat16"),
        ((query, key.mT.contiguous().mT, value, held, asked), {}, "contiguous in their last dimension"),
        ((query, key.to("meta"), value, held, asked), {}, "on cpu"),
        ((query, key, value, held.long(), asked), {}, r"key_positions must be torch\.int32 \(3, 6\)"),
        ((query, key, value, held[:, :5], asked), {}, "key_positions"),
        ((query, key, value, held, asked[:, :1]), {}, "query_positions"),
        ((query, key, value, None, asked), {}, "key_positions may be None for one query, not for 2"),
        ((query, packed, packed, held, asked), {}, "needs key_scale"),
        ((query, packed, packed, held, asked), {"key_scale": scale}, "needs value_scale"),
        ((query, packed, packed, held, asked), {"key_scale": scale[:2], "value_scale": scale}, "key_scale must be"),
        ((query, key, value, held, asked), {"key_scale": scale, "value_scale": scale}, "not for torch.bfloat16"),
        (case.tensors, {"window": 0}, "window"),
        (case.tensors, {"window": 2**31}, "window"),
        (case.tensors, {"pinned": 7}, "pinned must be between 0 and the 6 slots"),
        (case.tensors, {"pinned": -1}, "pinned"),
        (case.tensors, {"pinned_query": query.float()}, "pinned_query"),
        (case.tensors, {"pinned_query": query[:, :, :1]}, "pinned_query"),
        (case.tensors, {"prefix": prefix._replace(lengths=prefix.lengths[:1])}, r"prefix\.lengths"),
        (case.tensors, {"prefix": prefix._replace(groups=prefix.groups.long())}, r"prefix\.groups"),
        (
            case.tensors,
            {"prefix": prefix._replace(value=prefix.key[:, :, :2])},
            r"prefix\.value must be like prefix\.key",
        ),
        (case.tensors, {"prefix": prefix._replace(key_scale=scale)}, r"prefix\.key_scale"),
        (
            case.tensors,
            {"prefix": prefix._replace(key=prefix.key[:, :1], value=prefix.value[:, :1])},
            r"prefix\.key must have the K/V heads of key",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            segment_attention(*tensors, **{**options, **changes})


def test_nothing_asked():
    no_queries = make(2, 0, 5, 3)
    assert no_queries(segment_attention).shape == no_queries.tensors[0].shape
    no_rows = [tensor[:0] for tensor in make(2, 1, 5, prefixes=0).tensors]
    assert segment_attention(*no_rows, window=5).shape == no_rows[0].shape


def test_backend_by_device(monkeypatch):
    assert segment_attention_backend("cpu") == "cpu"
    monkeypatch.setattr(backends, "_can_compile", lambda: True)
    assert segment_attention_backend("cuda:1") == "triton"
    monkeypatch.setattr(backends, "_can_compile", lambda: False)
    assert segment_attention_backend(torch.device("cuda")) == "torch"
    assert segment_attention_backend("mps") == "torch"


def test_forced_backend(monkeypatch):
    case = make(2, 1, 5, 5, pinned=1)
    assert torch.equal(case(segment_attention, backend="torch"), case(segment_attention))
    with pytest.raises(ValueError, match="'cuda'"):
        case(segment_attention, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        case(segment_attention, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="fp64"):
        make(2, 1, 5, 5, dtype=FP64)(segment_attention, backend="triton")
    monkeypatch.setattr(triton_path, "_kernels", triton_path._kernels.__wrapped__)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"swiftkv-train\[triton\]"):
        case(segment_attention, backend="triton")


def test_triton_kernels_in_a_child_process(run_interpreted):
    assert run_interpreted(os.path.join(os.path.dirname(__file__), "test_segment_attention.py")) > 50


@pytest.mark.slow
def test_triton_kernels_at_every_shape(run_interpreted, monkeypatch):
    monkeypatch.setenv("EVERY_SHAPE", "1")
    assert run_interpreted(os.path.join(os.path.dirname(__file__), "test_segment_attention.py")) > 200


@pytest.mark.parametrize(
    ("queries", "stored", "size", "rows", "slots"),
    [
        ("bf16", "bf16", 64, 16, 64),
        ("bf16", "u8", 64, 16, 64),
        pytest.param("bf16", "i8", 128, 64, 64, marks=pytest.mark.slow),
        pytest.param("fp16", "fp16", 128, 64, 64, marks=pytest.mark.slow),
        pytest.param("fp32", "fp32", 128, 32, 32, marks=pytest.mark.slow),
        pytest.param("bf16", "bf16", 256, 64, 32, marks=pytest.mark.slow),
        pytest.param("fp32", "i8", 256, 16, 16, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_a_gpu(compile_for_gpu, queries, stored, size, rows, slots):
    """Sizes of 1 are constants there."""
    own_slots, prefixes = triton_path._kernels()
    pointers = {"key": stored, "value": stored, "key_scale": "fp32", "value_scale": "fp32", "output": queries}
    pointers |= {"query": queries, "pinned_query": queries, "partials": "fp32", "log_sum_exps": "fp32"}
    pointers |= dict.fromkeys(("positions", "query_positions", "lengths", "group_of_row", "ended"), "i32")
    tile = {"R": 3, "C": size, "BLOCK_M": rows, "BLOCK_N": slots, "BLOCK_C": size, "UPCAST": False}
    own = {"G": 3, "SPLIT": True, "BLOCK_PARTS": max(1, triton_path._MERGED_AT_ONCE // (rows * size)), **tile}
    prefix = {"BLOCK_GROUPS": 16, "BLOCK_B": 16, **tile}
    types = {**{name: f"*{kind}" for name, kind in pointers.items()}, "scaling": "fp32"}
    ones = dict.fromkeys(("batch", "length", "count", "prefix_count", "scale_n", "positions_n"), 1)
    for constants in (prefix, {**prefix, **ones}):
        compile_for_gpu(prefixes, types, constants)
    for constants in (own, {**own, **ones}, {**own, "C": size - 16, "BLOCK_PARTS": 1}):
        code = compile_for_gpu(own_slots, types, constants).asm["ptx"]
        assert code.count("atom.") == 1
    unsplit = compile_for_gpu(own_slots, types, {**own, "SPLIT": False})
    assert "atom." not in unsplit.asm["ptx"]


@pytest.mark.parametrize("size", [64, 128])
def test_the_last_program_of_a_block_sees_what_the_others_wrote(compile_for_gpu, size):
    """As far as the compiled code tells: stores, a barrier, a count that releases and acquires, a barrier, loads."""
    own_slots, _ = triton_path._kernels()
    names = ("query", "pinned_query", "key", "value", "output")
    types = {**dict.fromkeys(names, "*bf16"), "scaling": "fp32"}
    types |= dict.fromkeys(("key_scale", "value_scale", "partials", "log_sum_exps"), "*fp32")
    types |= dict.fromkeys(("positions", "query_positions", "group_of_row", "ended"), "*i32")
    constants = {"G": 3, "R": 3, "C": size, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_C": size, "UPCAST": False}
    constants |= {"SPLIT": True, "BLOCK_PARTS": 8192 // 16 // size}
    code = compile_for_gpu(own_slots, types, constants).asm["ptx"]
    before, count, after = re.split(r"^(.*\batom\..*)$", code, flags=re.MULTILINE)
    assert "atom.global.gpu.acq_rel.add.u32" in count
    assert before.rindex("st.global") < before.rindex("bar.sync")
    assert after.index("bar.sync") < after.index("ld.global")
    assert ".nc." not in code  # loads that other programs' stores need not reach


def test_a_window_that_fills_does_not_recompile():
    """The numbers of parts grow with it: they must be arguments like any, whatever their value."""
    pytest.importorskip("triton")
    for kernel in triton_path._kernels():
        of_parts = [parameter for parameter in kernel.params if parameter.name.endswith("_parts")]
        assert of_parts
        assert all(parameter.do_not_specialize and not parameter.is_constexpr for parameter in of_parts)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [None, INT8])
def test_a_captured_graph_follows_positions_lengths_and_groups(storage):
    options = {"pinned": 4, "ratio": 4, "prefixes": 3, "dtype": BF16, "storage": storage, "device": "cuda"}
    case = make(9, 1, 300, 600, **options)
    case(segment_attention)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case(segment_attention)
    for seed in range(1, 4):
        other = make(9, 1, 300, 600, **options, seed=seed)
        for tensor, new in zip(case.tensors, other.tensors, strict=True):
            tensor.copy_(new)
        case.options["pinned_query"].copy_(other.options["pinned_query"])
        pairs = [(case.options[name], other.options[name]) for name in ("key_scale", "value_scale")]
        pairs += list(zip(case.options["prefix"], other.options["prefix"], strict=True))
        for tensor, new in pairs:
            if tensor is not None:
                tensor.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(found, other(naive_segment_attention), other, "triton")


@pytest.mark.gpu
def test_nothing_is_read_back_from_the_gpu():
    case = make(9, 1, 300, 600, pinned=4, dtype=BF16, device="cuda")
    case(segment_attention)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case(segment_attention)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "slots", "prefix"), [(1, 16384, 32768), (2048, 6144, 4096)])
def test_native_kernels_at_full_size(length, slots, prefix):
    """Llama-3-8B's heads; the torch path on the same GPU is the other side (bf16: 2 x 3 roundings of V near 5)."""
    case = make(4, length, slots, prefix, pinned=4, kv_heads=8, ratio=4, size=128, dtype=BF16, device="cuda")
    found, expected = (case(segment_attention, backend=backend) for backend in ("triton", "torch"))
    assert (found.float() - expected.float()).abs().max() < 6 * 2**-9 * 6
