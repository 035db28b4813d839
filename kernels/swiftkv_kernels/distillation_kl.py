"""Distillation loss between two final hidden states through one frozen head, its gradient formed in the forward pass.

    p = softmax(W h_t / T),  q = softmax(W h_s / T)
    loss = T^2 sum_n KL(p_n || q_n),   d loss / d h_s = T (q - p) W          (T^2: Hinton et al. 2015, arXiv 1503.02531)

    N rows (valid tokens)   d hidden size   V vocabulary   M rows of a chunk
    student_hidden h_s [N, d]   teacher_hidden h_t [N, d]   head_weight W [V, d]

Head and loss run over chunks of M rows: nothing of size [N, V] exists and only [N, d] grows with N. The backward pass
scales the stored gradient (the idea of Liger-Kernel's fused linear losses, arXiv 2410.10989).

What keeps it accurate as the student converges: the head multiplies the hidden *difference*, u = W (h_s - h_t) / T, and
the student's logits are the teacher's plus u. Whatever a bf16 product rounds off the teacher's logits is shared by both
sides and cancels; u carries a relative error only. With r = log(q / p) = u - log sum_v p_v exp(u_v):

    q - p = p expm1(r),        KL = sum_v p (expm1(r) - r)                    (no difference of nearly equal numbers)
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swiftkv_kernels.backends import device_backend, import_triton, made_once, resolve_backend

tl: Any = None  # triton.language, set by _row_kernel(): a kernel looks its language up in its module

# Bytes of logits at a time: 256 rows of a 49k vocabulary on CPU (twice that saves a few per cent of the time), 400 of
# 128k on CUDA.
_CPU_CHUNK_BYTES, _DEVICE_CHUNK_BYTES = 48 << 20, 512 << 20
_CPU_TILE_BYTES = 24 << 20  # working set of the element-wise passes on CPU: stays in a last-level cache
_FAR = 60.0  # log-ratio below which p expm1(u) neither overflows fp32 nor hides probability in an underflowed p
_UNIT = 1024.0  # L1 norm that rows get before a product: fp16 then neither underflows nor overflows
_TINY = 1e-12


def distillation_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head_weight: Tensor,
    *,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sum over N rows of T^2 KL(softmax(W h_t / T) || softmax(W h_s / T)): a scalar, fp32 (fp64 if the head is fp64).

    student_hidden [N, d] alone receives a gradient; teacher_hidden [N, d] counts as a constant, head_weight [V, d] must
    be frozen. Any floating dtypes; the products run in the head's. chunk_bytes bounds the logits held at a time;
    backend 'cpu', 'torch' or 'triton' overrules `distillation_kl_backend`. Raises ValueError on misfits.
    """
    _check(student_hidden, teacher_hidden, head_weight, temperature, chunk_bytes)
    chosen = resolve_backend(backend, head_weight)
    settings = (teacher_hidden, head_weight, float(temperature), chunk_bytes, chosen)
    if torch.is_grad_enabled() and student_hidden.requires_grad:
        return _DistillationKL.apply(student_hidden, *settings)
    with torch.no_grad():
        return _chunked_kl(student_hidden, *settings, wants_gradient=False)[0]


def distillation_kl_reference(
    student_hidden: Tensor, teacher_hidden: Tensor, head_weight: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """The same sum from whole [N, V] logits in fp32 (fp64 if any input is), differentiable by autograd."""
    dtype = torch.float32
    for tensor in (student_hidden, teacher_hidden, head_weight):
        dtype = torch.promote_types(dtype, tensor.dtype)
    weight = head_weight.to(dtype)
    log_p = torch.log_softmax(teacher_hidden.to(dtype) @ weight.T / temperature, dim=-1)
    log_q = torch.log_softmax(student_hidden.to(dtype) @ weight.T / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


def distillation_kl_backend(device: torch.device | str) -> str:
    """The path a device takes: 'cpu'; 'triton' on CUDA; 'torch' (the CPU path's code) without triton and elsewhere.

    An fp64 head takes 'torch' in place of 'triton'.
    """
    return device_backend(device)


def distillation_kl_bytes(rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, device_type: str) -> int:
    """Most bytes that a call for N = rows holds at a time beside its inputs, the gradient it keeps among them.

    dtype is the head's; device_type 'cpu' or 'cuda' (with triton), which need not be present.
    """
    on_cpu = device_type == "cpu"
    reduced = _reduced_dtype(dtype)
    product = reduced if not on_cpu and dtype.itemsize == 2 else dtype  # as `_product_dtype` finds there
    chunk, tile = _chunk_and_tile(rows, vocabulary, dtype, product, device_type, "cpu" if on_cpu else "triton", None)
    products = chunk * vocabulary * (2 * product.itemsize + (dtype.itemsize if product != dtype else 0))
    work = 3 * tile * vocabulary * reduced.itemsize if on_cpu else 0
    states = chunk * hidden_size * (reduced.itemsize + 2 * dtype.itemsize)  # the step; both sides' rows
    return products + work + states + rows * hidden_size * reduced.itemsize


class _DistillationKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, *settings):
        loss, gradient = _chunked_kl(student_hidden, *settings, wants_gradient=True)
        ctx.save_for_backward(gradient)
        ctx.student_dtype = student_hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        # Kept in fp32 until here: the loss scale that saves fp16 gradients from underflow arrives with grad_output.
        return (ctx.saved_tensors[0] * grad_output).to(ctx.student_dtype), None, None, None, None, None


def _chunked_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head_weight: Tensor,
    temperature: float,
    chunk_bytes: int | None,
    backend: str,
    *,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss and, if wanted, its gradient [N, d], in the dtype of the reductions (fp32; fp64 if the head is fp64)."""
    (rows, hidden_size), vocabulary = student_hidden.shape, head_weight.shape[0]
    device, dtype = head_weight.device, head_weight.dtype
    reduced, product = _reduced_dtype(dtype), _product_dtype(dtype, device)
    chunk, tile = _chunk_and_tile(rows, vocabulary, dtype, product, device.type, backend, chunk_bytes)

    # Allocated once for all chunks: on CPU, fresh pages would cost as much as the arithmetic on them.
    products = torch.empty(2 * chunk, vocabulary, dtype=product, device=device)
    recast = torch.empty(chunk, vocabulary, dtype=dtype, device=device) if wants_gradient and product != dtype else None
    work = None if backend == "triton" else torch.empty(3, tile, vocabulary, dtype=reduced, device=device)
    kl = torch.zeros(rows, dtype=reduced, device=device)
    gradient = torch.zeros(rows, hidden_size, dtype=reduced, device=device) if wants_gradient else None

    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        count = part.stop - start
        teacher = teacher_hidden[part]
        step = student_hidden[part].to(reduced) - teacher.to(reduced)
        # A power of two, which rounds nothing: between close bf16 numbers the step itself is a bf16 number.
        exponent = torch.frexp(step.abs().sum(1, keepdim=True).clamp_min(_TINY) / _UNIT).exponent
        step_norm = torch.ldexp(torch.ones_like(step[:, :1]), exponent)
        _matmul(torch.cat([teacher.to(dtype), (step / step_norm).to(dtype)]), head_weight.T, products[: 2 * count])
        logits, delta = products[:count], products[count : 2 * count]
        difference = delta if recast is None else recast[:count]
        norm = torch.empty_like(step_norm) if wants_gradient else None
        if work is None:
            _rows_triton(logits, delta, step_norm, temperature, kl[part], difference, norm)
        else:
            _rows_torch(logits, delta, step_norm, temperature, kl[part], difference, norm, work)
        if gradient is not None and norm is not None:
            row_gradient = torch.empty(count, hidden_size, dtype=product, device=device)
            _matmul(difference, head_weight, row_gradient)
            torch.mul(row_gradient.to(reduced), norm * temperature, out=gradient[part])
    return temperature**2 * kl.sum(), gradient


def _rows_torch(logits, delta, step_norm, temperature, kl, difference, norm: Tensor | None, work) -> None:
    """From teacher logits and delta = W (h_s - h_t) / step_norm, both [M, V]: fills kl [M].

    With norm [M, 1], fills it and difference [M, V] = (q - p) / norm too; that may be delta's own storage.
    Every pass stays inside a tile of work [3, rows, V].
    """
    for start in range(0, len(logits), work.shape[1]):
        part = slice(start, min(start + work.shape[1], len(logits)))
        u, p, product = work[:, : part.stop - start]
        u.copy_(logits[part])
        if temperature != 1.0:
            u.mul_(1 / temperature)
        torch.softmax(u, dim=1, out=p)
        u.copy_(delta[part]).mul_(step_norm[part] / temperature)
        u.sub_(torch.mul(p, u, out=product).sum(1, keepdim=True))  # mean 0 under p, so sum p exp(u) >= 1
        far = (u.amax(1) > _FAR).nonzero()[:, 0]
        far_kl, far_difference = _far_rows(logits[part][far].to(u.dtype) / temperature, u[far])

        # With excess = sum p expm1(u): KL = log(1 + excess) - mean and q - p = p (expm1(u) - excess) / (1 + excess).
        mean = torch.mul(p, u, out=product).sum(1, keepdim=True)  # what rounding left of it: counts when KL is small
        torch.expm1(u, out=u)
        excess = torch.mul(p, u, out=product).sum(1, keepdim=True)
        kl[part] = (torch.log1p(excess) - mean)[:, 0].index_copy(0, far, far_kl)
        if norm is not None:
            # sum_v |q - p| is at most 2 and at most sqrt(2 KL) (Pinsker)
            norm[part] = (2 * kl[part, None]).clamp(_TINY, 4).sqrt() / _UNIT
            factor = 1 / (norm[part] * (1 + excess))
            torch.addcmul(-excess * factor, u, factor, out=product).mul_(p)
            difference[part] = product.index_copy_(0, far, far_difference / norm[part][far])


def _far_rows(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """KL [m] and q - p [m, V] of rows where p may underflow and q does not: both by way of their logarithms."""
    log_p = torch.log_softmax(logits, dim=1)
    log_ratio = u - torch.logsumexp(log_p + u, dim=1, keepdim=True)
    p = log_p.exp()
    difference = torch.where(log_ratio < 1, p * torch.expm1(log_ratio), (log_p + log_ratio).exp() - p)
    return (difference - p * log_ratio).sum(1), difference


def _rows_triton(logits, delta, step_norm, temperature, kl, difference, norm: Tensor | None) -> None:
    """What `_rows_torch` does, one program per row."""
    count, vocabulary = logits.shape
    block = min(4096, max(16, 1 << (vocabulary - 1).bit_length()))
    scratch = step_norm if norm is None else norm
    arguments = (logits, delta, step_norm, kl, difference, scratch, vocabulary, 1 / temperature)
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        _row_kernel()[(count,)](*arguments, WRITE_DIFFERENCE=norm is not None, UNIT=_UNIT, BLOCK=block, num_warps=8)


def _distillation_kl_rows(
    logits,
    delta,
    step_norm,
    kl,
    difference,
    norm,
    vocabulary,
    inverse_temperature,
    WRITE_DIFFERENCE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    first = row.to(tl.int64) * vocabulary
    logits += first
    delta += first
    difference += first
    u_scale = tl.load(step_norm + row) * inverse_temperature
    columns = tl.arange(0, BLOCK)

    # One online pass: log-sum-exp of teacher (t) and student (s), and the mean of u under p.
    max_t = float("-inf")
    max_s = float("-inf")
    sum_t = 0.0
    sum_s = 0.0
    sum_u = 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        z_t = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        u = tl.load(delta + start + columns, mask=inside, other=0.0).to(tl.float32) * u_scale
        z_s = z_t + u
        new_t = tl.maximum(max_t, tl.max(z_t, axis=0))
        new_s = tl.maximum(max_s, tl.max(z_s, axis=0))
        shrink_t = tl.exp(max_t - new_t)
        exp_t = tl.exp(z_t - new_t)
        sum_u = sum_u * shrink_t + tl.sum(exp_t * u, axis=0)
        sum_t = sum_t * shrink_t + tl.sum(exp_t, axis=0)
        sum_s = sum_s * tl.exp(max_s - new_s) + tl.sum(tl.exp(z_s - new_s), axis=0)
        max_t = new_t
        max_s = new_s
    max_step = max_s - max_t
    log_ratio = tl.log(sum_s / sum_t)

    # |q - p|_1 <= sqrt(2 KL), from a KL good to some 1e-6: enough for a norm.
    bound = tl.sqrt(tl.minimum(tl.maximum(2 * (max_step + log_ratio - sum_u / sum_t), 1e-6), 4.0)) / UNIT

    # KL = sum p (expm1(r) - r): what rounding adds to r enters only squared.
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        z_t = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        u = tl.load(delta + start + columns, mask=inside, other=0.0).to(tl.float32) * u_scale
        r = u - max_step - log_ratio
        p = tl.exp(z_t - max_t) / sum_t
        q = tl.exp(z_t - max_t + r) / sum_t
        small = tl.abs(r) < 0.25  # there, the Taylor series of expm1(r) - r is exact to fp32
        series = r * r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040))))))
        total += tl.sum(tl.where(small, p * series, q - p - p * r), axis=0)
        if WRITE_DIFFERENCE:
            rows = tl.where(small, p * (r + series), q - p) / bound
            tl.store(difference + start + columns, rows.to(difference.dtype.element_ty), mask=inside)
    tl.store(kl + row, total)
    if WRITE_DIFFERENCE:
        tl.store(norm + row, bound)


@made_once
def _row_kernel() -> Any:
    """The kernel above, made on first use: importing this module does not import triton."""
    global tl
    triton = import_triton()
    tl = triton.language
    return triton.jit(_distillation_kl_rows)


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Into `out`, always: such calls are what autocast leaves alone."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


@functools.cache
def _product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """fp32 where half-precision matrices can be multiplied into it (CUDA, torch >= 2.8), else the matrices' own."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        probe = torch.ones(16, 16, dtype=dtype, device=device)
        with contextlib.suppress(TypeError, RuntimeError):
            _matmul(probe, probe, probe.float())
            return torch.float32
    return dtype


def _reduced_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_and_tile(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    product: torch.dtype,
    device_type: str,
    backend: str,
    chunk_bytes: int | None,
) -> tuple[int, int]:
    """Rows of a chunk, and of a tile of its element-wise passes."""
    on_cpu = device_type == "cpu"
    # Two products per row, and q - p again where the next product needs another dtype than the last one gave.
    row_bytes = vocabulary * (2 * product.itemsize + (dtype.itemsize if product != dtype else 0))
    work_bytes = 3 * vocabulary * _reduced_dtype(dtype).itemsize
    if backend != "triton" and not on_cpu:  # no cache to stay in: a tile is the whole chunk
        row_bytes += work_bytes
    chunk = _even_chunk(rows, (chunk_bytes or (_CPU_CHUNK_BYTES if on_cpu else _DEVICE_CHUNK_BYTES)) // row_bytes)
    return chunk, _even_chunk(chunk, _CPU_TILE_BYTES // work_bytes) if on_cpu else chunk


def _even_chunk(rows: int, limit: int) -> int:
    """Rows per chunk, between 1 and limit: chunks of like size, multiples of 32 (faster products) if limit allows."""
    step = 32 if limit >= 32 else 1
    limit = max(1, limit // step * step)
    even = math.ceil(rows / max(1, math.ceil(rows / limit)))
    return max(1, min(rows, limit, math.ceil(even / step) * step))


def _check(student: Tensor, teacher: Tensor, head: Tensor, temperature: float, chunk_bytes: int | None) -> None:
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}, head {tuple(head.shape)}"
    if student.ndim != 2 or head.ndim != 2 or student.shape != teacher.shape or student.shape[1] != head.shape[1]:
        raise ValueError(f"student and teacher must be [N, d] and the head [V, d], not {shapes}")
    if 0 in head.shape:
        raise ValueError(f"vocabulary and hidden size must be at least 1, not {shapes}")
    if not student.device == teacher.device == head.device:
        raise ValueError(f"one device needed, not {student.device}, {teacher.device} and {head.device}")
    if not all(tensor.is_floating_point() for tensor in (student, teacher, head)):
        raise ValueError(f"floating dtypes needed, not {student.dtype}, {teacher.dtype} and {head.dtype}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and above 0, not {temperature}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, not {chunk_bytes}")
    if head.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "the head is frozen in distillation and gets no gradient: set head_weight.requires_grad_(False)"
        )
