"""The blocked CPU path against all scores at once in fp64."""

import contextlib
import importlib

import pytest
import torch
from torch.nn import functional

from swiftkv_kernels import causal_attention, causal_attention_backend, causal_attention_reference
from swiftkv_kernels.causal_attention import BLOCK, half_precision_products

# Relative to the largest value (or 1): fp64 and fp32 by their own sums; bf16 and fp16 round weights and outputs once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(batch, heads, groups, length, size, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, count, size) for count in (heads, groups, groups)]
    # As the projections leave them: [B, T, heads, C] seen as [B, heads, T, C], hence not contiguous.
    return [
        (scale * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype).transpose(1, 2) for s in shapes
    ]


def document_mask(lengths, batch):
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (number[:, None] == number[None, :]).expand(batch, 1, -1, -1)


def close(found, expected, dtype):
    scale = max(float(expected.detach().abs().max()), 1.0)  # what is added up on the way is of order 1
    assert float((found.double() - expected.double()).detach().abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 2, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 8), (9, 3, 64), (8, 1, 16)])
def test_output_and_gradients(dtype, length, heads, groups, size):
    tensors = [tensor.requires_grad_() for tensor in inputs(2, heads, groups, length, size, dtype)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output, expected = causal_attention(*tensors), causal_attention_reference(*exact)
    assert output.dtype == dtype
    close(output, expected, dtype)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(output, tensors, upstream.to(dtype))
    for gradient, right in zip(found, torch.autograd.grad(expected, exact, upstream), strict=True):
        close(gradient, right, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_documents_are_isolated(dtype):
    lengths = [3, 130, 1, 70]
    query, key, value = inputs(2, 6, 2, sum(lengths), 16, dtype)
    packed = causal_attention(query, key, value, allowed=document_mask(lengths, 2))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        apart = causal_attention_reference(query[:, :, part], key[:, :, part], value[:, :, part])
        close(packed[:, :, part], apart, dtype)
        start += length


@pytest.mark.parametrize("rows", [[[20, 130]], [[100, 300, 50], [260, 7, 183]], [[129, 321], [450]]])
def test_masked_gradients(rows):
    """Over several blocks, of which each row of the batch may skip other earlier documents."""
    tensors = [tensor.requires_grad_() for tensor in inputs(len(rows), 4, 2, sum(rows[0]), 8)]
    mask = torch.cat([document_mask(lengths, 1) for lengths in rows])
    expected = causal_attention_reference(*tensors, allowed=mask)
    output = causal_attention(*tensors, allowed=mask)
    close(output, expected, torch.float64)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(output, tensors, upstream)
    for gradient, right in zip(found, torch.autograd.grad(expected, tensors, upstream), strict=True):
        close(gradient, right, torch.float64)


def test_agrees_with_torch():
    query, key, value = inputs(2, 6, 3, 200, 32)
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.3)
    close(causal_attention(query, key, value, scaling=0.3), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_stay_finite(dtype):
    query, key, value = inputs(1, 2, 1, 140, 8, dtype, scale=60.0)
    output = causal_attention(query, key, value)
    assert output.isfinite().all()
    close(output, causal_attention_reference(query.double(), key.double(), value.double()), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_that_see_nothing_give_zero(dtype):
    query, key, value = inputs(1, 2, 1, 5, 8, dtype)
    allowed = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    allowed[..., 3, :] = False
    output = causal_attention(query, key, value, allowed=allowed)
    assert (output[:, :, 3] == 0).all()
    assert output.isfinite().all()


def test_nothing_of_all_scores_at_once_is_kept_for_backward():
    tensors = [tensor.requires_grad_() for tensor in inputs(1, 4, 2, 300, 8)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        causal_attention(*tensors)
    assert max(saved) == 4 * 300 * 8


def test_precision_setting_is_restored():
    before = torch.backends.mkldnn.matmul.fp32_precision
    causal_attention(*inputs(1, 2, 1, 9, 8, torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_shapes_that_do_not_fit():
    query, key, value = inputs(1, 4, 2, 6, 8)
    for wrong in (
        (query, key, value[:, :, :5]),
        (query[:, :3], key, value),
        (query[..., :4], key, value),
        (query[:, :, :5], key, value),
        (query[0], key, value),
    ):
        with pytest.raises(ValueError, match="must be"):
            causal_attention(*wrong)
    with pytest.raises(ValueError, match="allowed must be bool"):
        causal_attention(query, key, value, allowed=torch.ones(1, 1, 6, 6))


def test_backend():
    assert causal_attention_backend("cpu") == "cpu"
    assert causal_attention_backend("cuda:1") == "sdpa"


def test_on_other_devices_a_mask_hides_no_less(monkeypatch):
    """The path of GPUs, taken here: causal too where `allowed` would let the future be seen."""
    module = importlib.import_module("swiftkv_kernels.causal_attention")  # the package has a function of that name
    monkeypatch.setattr(module, "causal_attention_backend", lambda device: "sdpa")
    query, key, value = inputs(2, 6, 2, 40, 16)
    for allowed in (None, torch.ones(2, 1, 40, 40, dtype=torch.bool), document_mask([13, 27], 2)):
        found = causal_attention(query, key, value, allowed=allowed)
        close(found, causal_attention_reference(query, key, value, allowed=allowed), torch.float64)


def test_threads_leave_the_precision_of_products_as_it_was():
    """It is one setting of the process. They go in and come out in turns, the first before the second."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    first, second = half_precision_products(torch.bfloat16), half_precision_products(torch.bfloat16)
    with contextlib.ExitStack() as outer:
        outer.enter_context(first)
        second.__enter__()
        assert settings.fp32_precision == "bf16"
    assert settings.fp32_precision == "bf16"  # the second is still at it
    second.__exit__(None, None, None)
    assert settings.fp32_precision == before
