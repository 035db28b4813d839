"""packed_linear against products in fp64, and what cannot be packed."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from swiftkv_kernels import packed_linear as packed_linear_of_package
from swiftkv_kernels.packed_linear import (
    PackedWeight,
    packed_linear,
    packed_linear_backend,
    packed_linear_reference,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROUNDOFF = {FP32: 2.0**-24, BF16: 2.0**-8, FP16: 2.0**-11}  # relative, to nearest
SHAPES = [(), (0,), (1,), (3,), (1, 1), (2, 5), (1, 70)]
SIZES = [(1, 1), (7, 5), (64, 64), (100, 77), (33, 257)]  # O, I

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[FP32, BF16, FP16], ids=str)
def dtype(request):
    if packed_linear_backend("cpu", request.param) != "onednn":
        pytest.skip("this processor and torch do not pack it")
    return request.param


def drawn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bound(hidden, weight, exact):
    """Products and sums in fp32, each off by at most its roundoff of the sum of absolute products; one to dtype."""
    absolute = hidden.double().abs() @ weight.double().abs().T + 1
    return 2 * weight.shape[1] * ROUNDOFF[FP32] * absolute + ROUNDOFF[hidden.dtype] * exact.abs() * 1.01


@pytest.mark.parametrize("leading", SHAPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_exact_product_rounded(dtype, size, leading, with_bias):
    weight, hidden = drawn(*size, dtype=dtype), drawn(*leading, size[1], dtype=dtype, seed=1)
    bias = drawn(size[0], dtype=dtype, seed=2) if with_bias else None
    exact = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = packed_linear(hidden, PackedWeight(weight), bias)
    assert found.dtype == dtype
    assert found.shape == (*leading, size[0])
    assert ((found.double() - exact).abs() <= bound(hidden, weight, exact)).all()
    reference = packed_linear_reference(hidden, weight, bias)
    assert ((reference.double() - exact).abs() <= bound(hidden, weight, exact)).all()


def test_the_weight_comes_back_bit_by_bit(dtype):
    weight = drawn(33, 257, dtype=dtype)
    packed = PackedWeight(weight.t().contiguous().t())  # as a view lies
    assert torch.equal(packed.dense(), weight)
    assert packed.dense().dtype == dtype
    assert (packed.shape, len(packed), packed.dtype) == (weight.shape, 33, dtype)
    assert torch.equal(copy.deepcopy(packed).dense(), weight)


def test_it_is_a_copy(dtype):
    weight = drawn(4, 3, dtype=dtype)
    packed, before = PackedWeight(weight), weight.clone()
    weight.zero_()
    assert torch.equal(packed.dense(), before)


def test_hidden_states_may_be_strided(dtype):
    weight, wide = PackedWeight(drawn(5, 6, dtype=dtype)), drawn(8, 12, dtype=dtype, seed=1)
    assert torch.equal(packed_linear(wide[::2, ::2], weight), packed_linear(wide[::2, ::2].contiguous(), weight))


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_pass_through_it(dtype, with_bias):
    weight = drawn(33, 20, dtype=dtype)
    hidden = drawn(2, 3, 20, dtype=dtype, seed=1).requires_grad_()
    bias = drawn(33, dtype=dtype, seed=2).requires_grad_() if with_bias else None
    gradient = drawn(2, 3, 33, dtype=dtype, seed=3)
    packed_linear(hidden, PackedWeight(weight), bias).backward(gradient)
    exact = gradient.double() @ weight.double()
    assert ((hidden.grad.double() - exact).abs() <= bound(gradient, weight.t(), exact)).all()
    if bias is not None:  # six numbers are added; each partial sum may be rounded
        sums = gradient.double().flatten(0, 1)
        assert ((bias.grad.double() - sums.sum(0)).abs() <= 6 * ROUNDOFF[dtype] * sums.abs().sum(0)).all()


def test_without_gradients_nothing_is_recorded(dtype):
    weight, hidden = PackedWeight(drawn(3, 2, dtype=dtype)), drawn(1, 2, dtype=dtype).requires_grad_()
    with torch.no_grad():
        assert not packed_linear(hidden, weight).requires_grad
    assert not packed_linear(hidden.detach(), weight).requires_grad


def test_misfits_are_named(dtype):
    weight = PackedWeight(drawn(3, 4, dtype=dtype))
    with pytest.raises(ValueError, match=r"hidden must be \[\.\.\., 4\] of .* not \(2, 5\)"):
        packed_linear(drawn(2, 5, dtype=dtype), weight)
    with pytest.raises(ValueError, match="float64"):
        packed_linear(drawn(2, 4, dtype=torch.float64), weight)


@pytest.mark.parametrize(
    ("device", "of"), [("cpu", torch.float64), ("cpu", torch.int8), ("cuda", BF16), ("meta", FP32)]
)
def test_what_cannot_be_packed_says_so(device, of):
    assert packed_linear_backend(device, of) == "torch"
    with pytest.raises(ValueError, match="cannot be packed"), FakeTensorMode():
        PackedWeight(torch.empty(2, 2, dtype=of, device=device))


def test_a_vector_is_no_weight():
    with pytest.raises(ValueError, match=r"weight \(3,\)"):
        PackedWeight(torch.ones(3))


def test_operators_that_fail_or_are_wrong_are_not_used(monkeypatch):
    import importlib

    module = importlib.import_module("swiftkv_kernels.packed_linear")  # the package has a function of that name
    assert packed_linear_of_package is packed_linear
    right = module._product

    def missing(*arguments):
        raise AttributeError("no such operator")

    for operator in (missing, lambda *arguments: right(*arguments) + 1):
        module._works.cache_clear()
        monkeypatch.setattr(module, "_product", operator)
        assert packed_linear_backend("cpu", FP32) == "torch"
    module._works.cache_clear()
