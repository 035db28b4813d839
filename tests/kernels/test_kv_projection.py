"""kv_projection against fp64: one linear layer per layer, RoPE as a complex product, one write per token."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from swiftkv_kernels import backends, kv_projection_triton
from swiftkv_kernels.kv_projection import kv_projection, kv_projection_backend, kv_projection_reference
from swiftkv_kernels.kv_quantize import kv_dequantize, kv_quantize_reference

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INT8, FP8 = torch.int8, torch.float8_e4m3fn
LIMIT = {INT8: 127.0, FP8: 448.0}
ROUNDOFF = {FP64: 2.0**-53, FP32: 2.0**-24, BF16: 2.0**-8, FP16: 2.0**-11}  # relative, to nearest
MODULE = importlib.import_module("swiftkv_kernels.kv_projection")  # the package has a function of that name
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

pytestmark = pytest.mark.usefixtures("one_thread")


class Shape(NamedTuple):
    layers: int
    batch: int
    tokens: int
    hidden: int
    heads: int
    size: int
    slots: int


SHAPES = [
    Shape(1, 1, 1, 8, 1, 16, 4),
    Shape(2, 3, 1, 24, 3, 64, 9),  # decoding
    Shape(4, 2, 5, 32, 2, 16, 7),
    Shape(3, 2, 2, 40, 8, 128, 5),
    Shape(1, 2, 33, 16, 1, 128, 40),
    Shape(2, 1, 4, 17, 3, 24, 6),  # no powers of two
    Shape(1, 1, 2, 9, 20, 128, 3),  # two blocks of heads in the kernel
]
DTYPES = [(FP64, FP64), (FP32, FP32), (BF16, BF16), (FP16, FP16)]  # hidden, cache
DTYPES += [(FP32, INT8), (BF16, INT8), (FP16, INT8), (FP32, FP8), (BF16, FP8), (FP16, FP8), (FP64, INT8)]


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    angles: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    stores: list[Tensor]  # K's and V's cache, then their scales if there are any
    storages: list[Tensor]  # what those are views of

    def project(self, backend=None, function=kv_projection, **changes) -> None:
        options = {"bias": self.bias, "backend": backend}
        options |= dict(zip(("key_scale", "value_scale"), self.stores[2:], strict=False)) | changes
        if function is kv_projection_reference:
            del options["backend"]
        function(self.hidden, self.weight, self.cos, self.sin, *self.stores[:2], self.slots, **options)


def make(
    shape: Shape, dtypes=(FP32, FP32), *, drop=False, bias=False, shared_angles=False, device="cpu", seed=0
) -> Case:
    layers, batch, tokens, hidden_size, heads, size, slots_of_cache = shape
    dtype, cache_dtype = dtypes
    random = torch.Generator().manual_seed(seed)
    width = layers * 2 * heads * size
    hidden = torch.randn(batch, tokens, hidden_size, generator=random, dtype=FP64)
    weight = torch.randn(width, hidden_size, generator=random, dtype=FP64) / hidden_size**0.5
    bias_numbers = torch.randn(width, generator=random, dtype=FP64)
    angles = 100 * torch.randn(1 if shared_angles else batch, tokens, size // 2, generator=random, dtype=FP64)
    cos, sin = (torch.cat([table, table], dim=-1).to(device, FP32) for table in (angles.cos(), angles.sin()))
    slots = torch.rand(batch, slots_of_cache, generator=random).argsort(dim=1)[:, :tokens]
    if drop:  # some tokens of every row and, of several rows, one whole row; padding may be anything
        slots[:, 1::2] = -1
        slots[batch - 1 if batch > 1 else batch :] = -9
        hidden[slots < 0] = math.nan
    # Slots before heads, as in a paged layout, amid something larger.
    storages = [filled((layers, batch, slots_of_cache, heads + 1, size + 2), cache_dtype, random) for _ in "kv"]
    if cache_dtype in LIMIT:
        storages += [filled((layers, heads, batch, slots_of_cache, 2), FP32, random) for _ in "kv"]
    storages = [storage.to(device) for storage in storages]
    stores = [storage[:, :, :, 1:, :size].transpose(2, 3) for storage in storages[:2]]
    stores += [storage[..., 1].transpose(1, 2) for storage in storages[2:]]
    hidden, weight, bias_numbers = (tensor.to(device, dtype) for tensor in (hidden, weight, bias_numbers))
    return Case(hidden, weight, bias_numbers if bias else None, angles, cos, sin, slots.to(device), stores, storages)


def filled(shape, dtype, random: torch.Generator) -> Tensor:
    """Random bytes, among them NaN's: what is wrongly written is not by chance what was there."""
    integers = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=random)
    return integers.view(dtype)


def exact(case: Case) -> list[tuple[Tensor, Tensor]]:
    """K and V [L, B, T, G, C] in fp64, each with a bound of how far rounding may take what is stored before its last.

    A product's sum of D terms is good to D roundoffs of its accumulator (fp32) times the sum of their sizes, and is
    rounded to hidden's dtype; a rotation turns a pair's errors with the pair; cos and sin are rounded to fp32.
    """
    layers, _, heads, _, size = case.stores[0].shape
    hidden, weight = case.hidden.double().cpu(), case.weight.double().cpu()
    batch, tokens, terms = hidden.shape
    sums = (terms + 1) * ROUNDOFF[FP64 if case.hidden.dtype == FP64 else FP32]
    rows = weight.split(heads * size)
    biases = torch.zeros(len(weight), dtype=FP64) if case.bias is None else case.bias.double().cpu()
    biases = biases.split(heads * size)
    turn = torch.polar(torch.ones_like(case.angles), case.angles)[:, :, None]
    results = []
    for index in range(2 * layers):
        states = (hidden @ rows[index].T + biases[index]).view(batch, tokens, heads, size)
        sizes = (hidden.abs() @ rows[index].T.abs() + biases[index].abs()).view(batch, tokens, heads, size)
        bound = ROUNDOFF[case.hidden.dtype] * states.abs() + sums * sizes
        if index % 2 == 0:
            turned = torch.complex(*states.chunk(2, dim=-1)) * turn
            states = torch.cat([turned.real, turned.imag], dim=-1)
            bound = torch.complex(*bound.chunk(2, dim=-1)).abs() + 4 * ROUNDOFF[FP32] * turned.abs()
            bound = torch.cat([bound, bound], dim=-1)
        results.append((states, bound))
    return [tuple(torch.stack(tensors) for tensors in zip(*results[part::2], strict=True)) for part in (0, 1)]


def check(case: Case, run, *, truncates=False) -> None:
    """Calls `run()` and compares every kept slot with fp64, and every other bit with what it was.

    On top of `exact`s bound comes the last rounding: of K to the cache's dtype (by up to twice as much where the place
    `truncates`), or of both to a step of half the scale, or of half a last place of fp8.
    """
    before = [storage.clone() for storage in case.storages]
    run()
    cache_dtype = case.stores[0].dtype
    kept = torch.zeros(case.stores[0].shape[:4], dtype=torch.bool)
    expected_states = exact(case)
    for row, time in (case.slots >= 0).nonzero().tolist():
        slot = int(case.slots[row, time])
        kept[:, row, :, slot] = True
        for part, (states, bounds) in enumerate(expected_states):
            expected, bound = states[:, row, time], bounds[:, row, time]
            found = case.stores[part][:, row, :, slot].cpu().double()
            if cache_dtype in LIMIT:
                scale = case.stores[2 + part][:, row, :, slot].cpu().double().unsqueeze(-1)
                largest, moved = expected.abs().amax(-1, keepdim=True), bound.amax(-1, keepdim=True)
                assert ((scale * LIMIT[cache_dtype] - largest).abs() <= moved + 4 * ROUNDOFF[FP32] * largest).all()
                found = found * scale
                last_place = scale if cache_dtype == INT8 else torch.maximum(expected.abs() + bound, scale / 64) / 8
                bound = bound + last_place / 2 * (1 + 2.0**-15)  # the quotient is rounded to fp32 first
            elif part == 0:
                bound = bound + (2 if truncates else 1) * ROUNDOFF[cache_dtype] * (expected.abs() + bound)
            assert ((found - expected).abs() <= bound).all()
    for store, storage, storage_before in zip(case.stores, case.storages, before, strict=True):
        store_before = storage_before.as_strided(store.shape, store.stride(), store.storage_offset())
        bits(store)[kept.to(store.device)] = bits(store_before)[kept.to(store.device)]
        assert torch.equal(bits(storage), bits(storage_before))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.dtype.itemsize])


def is_interpreted(place) -> bool:
    """There, bf16 is truncated and a program takes milliseconds."""
    return place.backend == "triton" and place.device == "cpu"


@pytest.mark.parametrize("drop", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_caches_match_fp64(place, shape, dtypes, drop):
    if place.backend == "triton" and dtypes[0] == FP64:
        pytest.skip("computes in fp32")
    if is_interpreted(place) and (FP16 in dtypes if shape.tokens < 5 else dtypes not in {(FP32, FP32), (BF16, FP8)}):
        pytest.skip("the interpreter takes milliseconds a program")
    case = make(shape, dtypes, drop=drop, bias=shape.layers % 2 == 0, shared_angles=drop, device=place.device)
    check(case, lambda: case.project(place.backend), truncates=is_interpreted(place))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_path_without_host_on_cpu(shape, dtypes):
    """The 'torch' backend's way with dropped tokens, where no GPU is."""
    case = make(shape, dtypes, drop=True, bias=True)
    check(case, lambda: case.project("torch"))


@pytest.mark.parametrize("drop", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=lambda shape: "-".join(map(str, shape)))
def test_reference_matches_fp64(shape, dtypes, drop):
    case = make(shape, dtypes, drop=drop, bias=True, shared_angles=True)
    check(case, lambda: case.project(function=kv_projection_reference))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cache_dtype", [INT8, FP8], ids=["int8", "fp8"])
def test_codes_are_those_of_kv_quantize(place, cache_dtype, dtype):
    """Unit matrices and no rotation hand numbers through exactly: ties, subnormals, signs, zeros, a broken vector."""
    limit, smallest = LIMIT[cache_dtype], 2.0**-9
    states = torch.zeros(1, 7, 32)
    states[0, 0, :9] = torch.tensor([limit, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 100.5, -limit])  # a scale of 1
    states[0, 1, :9] = torch.tensor([limit, 17, 19, -17, -19, 1 + 1 / 16, 1 + 3 / 16, 2.0**-6, -(2.0**-6)])
    states[0, 2, :18] = torch.arange(18) * smallest / 2
    states[0, 2, 20] = -limit
    states[0, 3] = torch.linspace(-3, 7, 32)
    states[0, 5, 3], states[0, 6, 20] = math.nan, math.inf  # and 4 are zeros
    states = states.to(place.device, dtype)
    unit = torch.eye(32, dtype=dtype, device=place.device)
    ones = torch.ones(1, 7, 32, device=place.device)
    caches = [torch.zeros(1, 1, 1, 7, 32, device=place.device).to(cache_dtype) for _ in "kv"]
    scales = [torch.zeros(1, 1, 1, 7, device=place.device) for _ in "kv"]
    slots = torch.arange(7, device=place.device).unsqueeze(0)
    broken = torch.zeros(7, dtype=torch.bool)
    broken[5:] = True
    inputs = states.masked_fill(broken[:, None].to(place.device), 0), torch.cat([unit, unit]), ones, 0 * ones
    options = {"key_scale": scales[0], "value_scale": scales[1], "backend": place.backend}
    kv_projection(*inputs, *caches, slots, **options)
    expected, expected_scale = kv_quantize_reference(inputs[0], cache_dtype)
    for cache, scale in zip(caches, scales, strict=True):
        assert torch.equal(bits(cache)[0, 0, 0], bits(expected)[0])
        assert torch.equal(scale[0, 0, 0], expected_scale[0])
    kv_projection(states, *inputs[1:], *caches, slots, **options)
    for cache, scale in zip(caches, scales, strict=True):
        assert torch.equal(scale[0, 0, 0].isfinite().cpu(), ~broken)
        found = kv_dequantize(cache, scale, FP32)[0, 0, 0].cpu()
        assert not found[broken].isfinite().any()
        assert found[~broken].isfinite().all()


@pytest.mark.parametrize("budget", [1, 6_000, 40_000])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, INT8)], ids=["fp32", "int8"])
@pytest.mark.parametrize("drop", [False, True], ids=["all", "some"])
def test_any_workspace_gives_the_same(place, monkeypatch, budget, dtypes, drop):
    """One token at a time, one or two times of all rows, several times."""
    case = make(Shape(2, 3, 5, 24, 2, 16, 9), dtypes, drop=drop, bias=True, device=place.device)
    for name in ("_WORKSPACE_BYTES", "_TILE_BYTES", "_CPU_TILE_BYTES"):
        monkeypatch.setattr(MODULE, name, budget)
    for backend in ("cpu", "torch") if place.backend == "cpu" else (place.backend,):
        check(case, functools.partial(case.project, backend), truncates=is_interpreted(place))


def test_strided_inputs(place):
    case = make(Shape(2, 2, 4, 24, 3, 16, 6), device=place.device, bias=True)
    spread = [torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0] for tensor in case[:2]]
    tables = [torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0] for tensor in (case.cos, case.sin)]
    strided = case._replace(
        hidden=spread[0].transpose(0, 1).contiguous().transpose(0, 1),
        weight=spread[1],
        bias=torch.stack([case.bias, case.bias], dim=1)[:, 0],
        cos=tables[0],
        sin=tables[1],
        slots=case.slots.T.contiguous().T,
    )
    assert not any(t.is_contiguous() for t in (strided.hidden, strided.weight, *tables, strided.slots, strided.bias))
    check(strided, lambda: strided.project(place.backend))


def test_positions_compose(place):
    """RoPE's identity: scores of keys turned by m with queries turned by n depend on n - m alone."""
    case = make(Shape(1, 1, 2, 16, 1, 8, 2), device=place.device)
    case.slots.copy_(torch.arange(2))
    same = case.hidden[:, :1].expand(1, 2, 16).contiguous()
    scores = []
    for start in (0.0, 3.0):
        angles = (start + torch.tensor([0.0, 5.0]))[None, :, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        cos, sin = (torch.cat([t, t], -1).to(place.device) for t in (angles.cos(), angles.sin()))
        moved = case._replace(hidden=same, cos=cos, sin=sin)
        moved.project(place.backend)
        keys = moved.stores[0][0, 0, 0].double()
        scores.append(float(keys[0] @ keys[1]))
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_nothing_to_write(place):
    for shape in (Shape(2, 0, 3, 8, 1, 16, 4), Shape(2, 2, 0, 8, 1, 16, 4), Shape(2, 2, 3, 8, 1, 16, 4)):
        for dtypes in ((FP32, FP32), (FP32, FP8)):
            case = make(shape, dtypes, device=place.device)
            case.slots.fill_(-1)
            check(case, functools.partial(case.project, place.backend))


def test_slot_past_the_end(place):
    case = make(Shape(1, 2, 3, 8, 1, 16, 4), device=place.device)
    case.slots[1, 2] = 4
    if place.backend == "triton":  # memory that is not the cache's stays untouched
        case.slots[0, 0] = 1 << 40
        dropped = case._replace(slots=torch.where(case.slots < 4, case.slots, -1))
        check(dropped, lambda: case.project(place.backend))
    elif place.backend == "cpu":
        before = [storage.clone() for storage in case.storages]
        with pytest.raises(ValueError, match="slots must be below the 4 of the cache, not 4"):
            case.project(place.backend)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, case.storages, strict=True))


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP16, FP16), (FP32, INT8)], ids=["fp32", "fp16", "int8"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_autocast_does_not_reach_inside(place, dtypes, bias):
    """A bf16 product would be 8 and 2^16 times past the bounds."""
    case = make(Shape(2, 2, 3, 24, 2, 16, 5), dtypes, bias=bias, drop=bias, device=place.device)

    def run() -> None:
        with torch.autocast(place.device, BF16):
            case.project(place.backend)

    check(case, run)


def test_no_gradient():
    case = make(Shape(1, 1, 2, 8, 1, 16, 4))
    learning = case._replace(hidden=case.hidden.requires_grad_(), weight=case.weight.requires_grad_())
    learning.project()
    assert not any(store.requires_grad for store in learning.stores)


class Watch(TorchDispatchMode):
    """Operations that compute something, the matrix products among them, and bytes of the largest tensor made."""

    COMPUTE_NOTHING = frozenset(
        ["alias", "detach", "expand", "permute", "promote_types", "slice", "split", "t", "unbind", "unsqueeze", "view"]
    )

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in self.COMPUTE_NOTHING:
            self.operations.append(name)
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor) and not any(tensor is given for given in args):
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("dtypes", "most"), [((FP32, FP32), 15), ((BF16, BF16), 16), ((FP32, INT8), 31)], ids=str)
def test_decoding_takes_few_operations(dtypes, most):
    """However many layers there are: layer by layer, two products and two writes each alone would be 64."""
    for layers in (1, 16):
        case = make(Shape(layers, 4, 1, 16, 2, 16, 8), dtypes)
        with Watch() as watch:
            case.project("cpu")
        assert watch.operations.count("mm") == 1
        assert len(watch.operations) <= most, watch.operations


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, INT8)], ids=str)
def test_many_tokens_stay_within_the_workspace(monkeypatch, backend, dtypes):
    for name, bytes_ in (("_WORKSPACE_BYTES", 1 << 18), ("_TILE_BYTES", 1 << 16), ("_CPU_TILE_BYTES", 1 << 16)):
        monkeypatch.setattr(MODULE, name, bytes_)
    many_tokens, many_rows = Shape(2, 2, 2500, 16, 2, 16, 2500), Shape(2, 5000, 1, 16, 2, 16, 2)
    for shape, drop in itertools.product((many_tokens, many_rows), (False, True)):
        case = make(shape, dtypes, drop=drop)
        with Watch() as watch:
            case.project(backend)
        assert watch.operations.count("mm") >= 3
        assert 1 << 17 < watch.largest <= 1 << 18


def test_torch_backend_takes_nothing_to_the_host():
    """Fake tensors hold no data: whoever asks for some fails."""
    for shape in (SHAPES[1], SHAPES[2]):
        for dtypes in ((FP32, FP32), (BF16, INT8), (BF16, FP8)):
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                real = make(shape, dtypes)
                fake = real._replace(
                    **{
                        name: mode.from_tensor(getattr(real, name))
                        for name in ("hidden", "weight", "cos", "sin", "slots")
                    },
                    stores=[mode.from_tensor(store) for store in real.stores],
                )
                fake.project("torch")
                with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                    fake.project("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gpu_backends_take_nothing_to_the_host(backend):
    case = make(SHAPES[2], (BF16, BF16), drop=True, device="cuda")
    case.project(backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.project(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bad_arguments_name_what_is_wrong():
    case = make(Shape(2, 3, 4, 8, 2, 16, 6))
    names = ("hidden", "weight", "cos", "sin", "key_cache", "value_cache", "slots")
    given = dict(zip(names, (case.hidden, case.weight, case.cos, case.sin, *case.stores, case.slots), strict=True))
    scale = torch.zeros(2, 3, 2, 6)
    int8 = {name: torch.zeros(2, 3, 2, 6, 16, dtype=INT8) for name in ("key_cache", "value_cache")}
    cache = given["key_cache"]
    for changes, message in [
        ({"hidden": case.hidden[0]}, r"hidden must be \[B, T, D\].*\(4, 8\)"),
        ({"hidden": case.hidden.int()}, r"hidden must be .*int32"),
        ({"weight": case.weight[1:]}, r"weight must be \(128, 8\).*\(127, 8\)"),
        ({"weight": case.weight.double()}, r"weight must be torch\.float32, not torch\.float64"),
        ({"bias": torch.zeros(127)}, r"bias must be \(128,\)"),
        ({"bias": torch.zeros(128, dtype=BF16)}, r"bias must be torch\.float32"),
        ({"cos": case.cos[:2]}, r"cos must be \(3, 4, 16\).*\(2, 4, 16\)"),
        ({"sin": case.sin[..., :8]}, r"sin must be \(3, 4, 16\).*\(3, 4, 8\)"),
        ({"sin": case.sin.to(BF16)}, r"sin must be torch\.float32 or torch\.float64, not torch\.bfloat16"),
        ({"slots": case.slots.int()}, r"slots must be torch\.int64"),
        ({"slots": case.slots[:, :3]}, r"slots must be \(3, 4\)"),
        ({"slots": case.slots.to("meta")}, r"slots must be .* on cpu, not .* on meta"),
        ({"key_cache": cache[0]}, r"key_cache must be \[L, B = 3, G, R, C\]"),
        ({"key_cache": cache[:, :2]}, r"key_cache must be \[L, B = 3, G, R, C\]"),
        ({"key_cache": cache[..., :15]}, r"key_cache must be .* C even"),
        ({"key_cache": cache.double()}, r"key_cache must be .*, not torch\.float64"),
        ({"value_cache": cache[:1]}, r"value_cache must be \(2, 3, 2, 6, 16\)"),
        ({"value_cache": cache.to(INT8)}, r"value_cache must be torch\.float32, not torch\.int8"),
        ({"value_cache": cache.transpose(3, 4).contiguous().transpose(3, 4)}, "contiguous in their last dimension"),
        ({"key_scale": scale}, "torch.float32 caches need no scales"),
        ({**int8, "key_scale": scale}, r"torch\.int8 caches need key_scale and value_scale"),
        ({**int8, "key_scale": scale, "value_scale": scale[0]}, r"value_scale must be \(2, 3, 2, 6\)"),
        ({**int8, "key_scale": scale.double(), "value_scale": scale}, r"key_scale must be torch\.float32"),
        ({"backend": "cuda"}, "backend must be .*'cuda'"),
    ]:
        with pytest.raises(ValueError, match=message):
            kv_projection(**{**given, **changes})


def test_backend_by_device(monkeypatch):
    assert kv_projection_backend("cpu") == "cpu"
    monkeypatch.setattr(backends, "_can_compile", lambda: True)
    assert kv_projection_backend("cuda:1") == "triton"
    monkeypatch.setattr(backends, "_can_compile", lambda: False)
    assert kv_projection_backend(torch.device("cuda")) == "torch"
    assert kv_projection_backend("mps") == "torch"


def test_forced_backend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        make(SHAPES[0]).project("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="fp64"):
        make(SHAPES[0], (FP64, FP64)).project("triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"swiftkv-train\[triton\]"):
        kv_projection_triton._kernel.__wrapped__()


def test_triton_kernel_in_a_child_process(run_interpreted):
    assert run_interpreted(__file__) > 80


@pytest.mark.parametrize("cache", ["bf16", "fp32", "i8", "u8"])
def test_kernel_compiles_for_gpus(compile_for_gpu, cache):
    """Whole heads move 8 or 16 bytes at a time."""
    kernel = kv_projection_triton._kernel()
    constants = dict.fromkeys(["cos_c", "sin_c", "slots_t", "key_scale_r", "value_scale_r"], 1)
    constants |= {"HEADS": 8, "HALF": 64, "SMALLEST_SCALE": 2.0**-126, "HEAD_BLOCK": 8, "HALF_BLOCK": 64}
    pointers = {"cos": "*fp32", "sin": "*fp32", "slots": "*i64", "product": "*fp32" if cache == "fp32" else "*bf16"}
    pointers |= dict.fromkeys(["key_cache", "value_cache"], f"*{cache}")
    pointers |= dict.fromkeys(["key_scale", "value_scale"], "*fp32" if cache in {"i8", "u8"} else f"*{cache}")
    arguments = enumerate(kernel.arg_names)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in arguments if name not in {*constants, "length"}}
    code = compile_for_gpu(kernel, pointers, constants, aligned).asm["ptx"]
    width = {"bf16": "v2.b32", "fp32": "v4.b32", "i8": "b32", "u8": "b32"}[cache]
    assert f"st.global.{width}" in code
    assert "ld.global.v4.b32" in code
    assert not any(f"st.global.{narrow}" in code for narrow in ("b8", "b16"))


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [BF16, INT8, FP8], ids=["bf16", "int8", "fp8"])
def test_native_kernel_at_full_size(cache_dtype):
    """Llama-3.1-8B's heads, more tokens than the workspace holds: as torch's operators do, in bounded memory."""
    case = make(Shape(4, 2, 2500, 1024, 8, 128, 2600), (BF16, cache_dtype), drop=True, device="cuda")
    case.project("torch")
    expected = [store.clone() for store in case.stores]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.project("triton")
    assert torch.cuda.max_memory_allocated() - before < 70 << 20
    kept = (case.slots >= 0).nonzero(as_tuple=True)
    at = kept[0], case.slots[kept]
    for part in (0, 1):
        found, right = (stores[part].permute(1, 3, 0, 2, 4)[at].double() for stores in (case.stores, expected))
        if cache_dtype == BF16:  # fused multiply-adds round differently before the last place
            torch.testing.assert_close(found, right, rtol=2.0**-7, atol=1e-5)
        else:
            scales = [
                stores[2 + part].permute(1, 3, 0, 2)[at].double().unsqueeze(-1) for stores in (case.stores, expected)
            ]
            torch.testing.assert_close(*scales, rtol=1e-5, atol=0)
            step = 1 if cache_dtype == INT8 else right.abs().clamp_min(2.0**-6) / 8
            assert ((found - right).abs() <= step).all()
            assert (found == right).double().mean() > 0.99
