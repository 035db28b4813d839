"""kv_quantize against its error bounds, the nearest code found by search, and float8_e4m3fn decoded by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from swiftkv_kernels.kv_quantize import kv_dequantize, kv_quantize, kv_quantize_backend, kv_quantize_reference

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INT8, FP8 = torch.int8, torch.float8_e4m3fn
LIMIT = {INT8: 127.0, FP8: 448.0}
SMALLEST_NORMAL = 2.0**-126
# The quotient is rounded to fp32 before it is rounded to a step: half an ulp of at most 127 or 448, in steps.
SLACK = 2.0**-16

pytestmark = pytest.mark.usefixtures("one_thread")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
to_dtypes = pytest.mark.parametrize("dtype", [INT8, FP8], ids=["int8", "fp8"])


def randn(*shape, seed=0, device="cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(device)


def fp8_by_hand(code: int) -> float:
    """OCP 8-bit floating point, E4M3: bias 7, no infinity, NaN at S.1111.111."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def error_bound(states: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    step = scale.double().unsqueeze(-1)
    if dtype == INT8:
        return step * (0.5 + SLACK)
    return torch.maximum(2.0**-4 * states.double().abs(), 2.0**-10 * step) * (1 + SLACK)


@on_devices
@to_dtypes
@pytest.mark.parametrize("function", [kv_quantize, kv_quantize_reference])
@pytest.mark.parametrize("states_dtype", [FP64, FP32, BF16, FP16])
@pytest.mark.parametrize("shape", [(1,), (64,), (3, 128), (2, 3, 5, 80), (4, 1, 7, 3, 16), (0, 8)], ids=str)
def test_error_bounds(shape, states_dtype, function, dtype, device):
    """Over magnitudes from 2^-14 to 2^14, which fp16 has too."""
    magnitudes = 2.0 ** (14 * torch.linspace(-1, 1, math.prod(shape[:-1]), dtype=FP64)).view(*shape[:-1], 1)
    states = (randn(*shape) * magnitudes).clamp(-6e4, 6e4).to(device, states_dtype)
    quantised, scale = function(states, dtype)
    assert (quantised.dtype, scale.dtype) == (dtype, FP32)
    assert (quantised.shape, scale.shape) == (states.shape, states.shape[:-1])
    if math.prod(shape) == 0:
        return
    assert torch.equal(scale, (states.double().abs().amax(-1) / LIMIT[dtype]).float())
    assert (quantised.double().abs().amax(-1) == LIMIT[dtype]).all()  # the whole range is used
    found = kv_dequantize(quantised, scale, FP64)  # int8 or fp8 times fp32 is exact in fp64
    assert ((found - states.double()).abs() <= error_bound(states, scale, dtype)).all()


@to_dtypes
def test_every_number_becomes_its_nearest_code(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(INT8).double()[1:] if dtype == INT8 else torch.tensor([fp8_by_hand(int(c)) for c in codes])
    values = values.double()[values.abs() <= LIMIT[dtype]]
    states = randn(50, 64) * torch.logspace(-5, 0, 64, base=10, dtype=FP64)  # fp8: normal and subnormal steps
    quantised, scale = kv_quantize(states.float(), dtype)
    steps = states.float().double() / scale.double().unsqueeze(-1)
    nearest = (steps.unsqueeze(-1) - values).abs().amin(-1)
    assert ((steps - quantised.double()).abs() <= nearest + SLACK * steps.abs().clamp_min(2.0**-9)).all()


def test_ties_go_to_even():
    """A scale of exactly 1, so that the steps are the numbers themselves."""
    quantised, scale = kv_quantize(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 125.5]), INT8)
    assert scale == 1
    assert quantised.tolist() == [127, 0, 2, 2, 0, -2, 126]
    states = torch.tensor([448.0, 17, 19, -17, 1 + 1 / 16, 1 + 3 / 16, 2.0**-10, 3 * 2.0**-10, 2.0**-6 - 2.0**-10])
    quantised, scale = kv_quantize(states, FP8)
    assert scale == 1
    assert quantised.float().tolist() == [448, 16, 20, -16, 1, 1.25, 0, 2.0**-8, 2.0**-6]


@to_dtypes
@pytest.mark.parametrize("states_dtype", [FP64, FP32, BF16, FP16])
def test_zeros_come_back_as_zeros(states_dtype, dtype):
    states = torch.zeros(2, 3, 8, dtype=states_dtype)
    states[0, 0] = 1  # beside others
    quantised, scale = kv_quantize(states, dtype)
    assert scale.isfinite().all()
    for result_dtype in (FP64, FP32, BF16, FP16):
        result = kv_dequantize(quantised, scale, result_dtype)
        assert result.dtype == result_dtype
        assert (result.view(6, 8)[1:] == 0).all()
    assert (kv_dequantize(quantised, torch.zeros_like(scale), FP32) == 0).all()  # a cache nobody has written to


@to_dtypes
@pytest.mark.parametrize("outlier", [1e4, 3e38])
def test_outlier_costs_its_own_vector_only(outlier, dtype):
    states = randn(4, 64).float()
    alone, alone_scale = kv_quantize(states, dtype)
    states[2, 5] = -outlier
    quantised, scale = kv_quantize(states, dtype)
    found = kv_dequantize(quantised, scale, FP64)
    assert ((found - states.double()).abs() <= error_bound(states, scale, dtype)).all()
    assert found[2, 5] == pytest.approx(-outlier, rel=1e-6)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(quantised[others].view(torch.uint8), alone[others].view(torch.uint8))
    assert torch.equal(scale[others], alone_scale[others])


@to_dtypes
@pytest.mark.parametrize(
    ("states_dtype", "magnitude"), [(FP32, 1e-37), (FP32, 1e-42), (BF16, 1e-39), (FP16, 6e-8), (FP64, 1e-300)]
)
def test_smallest_numbers(states_dtype, magnitude, dtype):
    """Where amax / limit would be a subnormal scale, or none, steps of the smallest normal number remain."""
    states = (randn(3, 32) * magnitude).to(states_dtype)
    quantised, scale = kv_quantize(states, dtype)
    assert (scale >= SMALLEST_NORMAL).all()
    found = kv_dequantize(quantised, scale, FP64)
    assert ((found - states.double()).abs() <= error_bound(states, scale, dtype)).all()


@to_dtypes
@pytest.mark.parametrize("states_dtype", [FP64, FP32, BF16, FP16])
@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_broken_vectors_stay_visible(broken, states_dtype, dtype):
    states = randn(3, 16).to(states_dtype)
    states[1, 7] = broken
    quantised, scale = kv_quantize(states, dtype)
    result = kv_dequantize(quantised, scale, states_dtype)
    assert not scale[1].isfinite()
    assert not result[1].isfinite().any()
    assert result[0::2].isfinite().all()


def test_fp64_beyond_fp32_counts_as_infinite():
    quantised, scale = kv_quantize(torch.tensor([1e300, 1.0], dtype=FP64), INT8)
    assert scale == math.inf
    assert not kv_dequantize(quantised, scale, FP64).isfinite().any()


@on_devices
@to_dtypes
def test_strided_views(dtype, device):
    big = randn(6, 4, 40, device=device).float()
    views = [big[::2, :, ::2], big.transpose(0, 2), big[:, :1].expand(6, 5, 40)]
    for view in views:
        assert not view.is_contiguous()
        quantised, scale = kv_quantize(view, dtype)
        expected, expected_scale = kv_quantize(view.contiguous(), dtype)
        assert torch.equal(quantised.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scale, expected_scale)


@on_devices
def test_fp8_codes_decode_as_by_hand(device):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([fp8_by_hand(int(code)) for code in codes], dtype=FP64)
    finite = expected.isfinite()
    assert finite.sum() == 254
    codes = codes[finite].to(device)
    for dtype in (FP64, FP32, BF16, FP16):  # the product with a power of two is exact in all of them
        found = kv_dequantize(codes.view(FP8), torch.tensor(0.5, device=device), dtype)
        assert torch.equal(found.double().cpu(), expected[finite] / 2)
    every_second = codes[::2]
    assert torch.equal(
        kv_dequantize(every_second.view(FP8), torch.tensor(1.0, device=device), FP64).cpu(), expected[finite][::2]
    )


@to_dtypes
def test_result_is_rounded_once(dtype):
    quantised, scale = kv_quantize(randn(20, 64).float(), dtype)
    exact = quantised.double() * scale.double().unsqueeze(-1)
    assert torch.equal(kv_dequantize(quantised, scale, FP64), exact)
    assert torch.equal(kv_dequantize(quantised, scale, FP32), exact.float())
    assert torch.equal(kv_dequantize(quantised, scale, BF16), exact.float().to(BF16))


@to_dtypes
def test_quantising_twice_is_quantising_once(dtype):
    quantised, scale = kv_quantize(randn(20, 64), dtype)
    again, scale_again = kv_quantize(kv_dequantize(quantised, scale, FP64), dtype)
    assert torch.equal(again.view(torch.uint8), quantised.view(torch.uint8))
    assert torch.equal(scale_again, scale)


@to_dtypes
def test_no_gradient_and_no_autocast(dtype):
    states = randn(4, 16).float().requires_grad_()
    quantised, scale = kv_quantize(states, dtype)
    assert not scale.requires_grad
    with torch.autocast("cpu", BF16):
        autocast, autocast_scale = kv_quantize(states, dtype)
        assert torch.equal(kv_dequantize(autocast, autocast_scale, FP32), kv_dequantize(quantised, scale, FP32))
    assert torch.equal(autocast_scale, scale)


def test_bad_arguments_name_what_is_wrong():
    states = randn(3, 8).float()
    quantised, scale = kv_quantize(states, INT8)
    for arguments, message in [
        ((states, torch.uint8), r"dtype must be .*torch\.uint8"),
        ((states.int(), INT8), r"states must be .*torch\.int32"),
        ((quantised.float().to(FP8), INT8), r"states must be .*float8"),
        ((states[:, :0], INT8), r"states must be \[\.\.\., C\]"),
        ((states[0, 0], INT8), r"states must be \[\.\.\., C\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            kv_quantize(*arguments)
    for arguments, message in [
        ((states, scale, FP32), r"quantised must be .*float32"),
        ((quantised, scale[:2], FP32), r"scale must be \(3,\).*\(2,\)"),
        ((quantised, scale, INT8), r"dtype must be a floating dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            kv_dequantize(*arguments)


def test_backend_by_device():
    assert kv_quantize_backend("cpu") == "cpu"
    assert kv_quantize_backend(torch.device("cuda:1")) == "torch"
