"""distillation_kl against fp64 log-softmax and autograd on the very same (rounded) inputs."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swiftkv_kernels import backends, distillation_kl, distillation_kl_backend, distillation_kl_reference

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ROUNDOFF = {FP64: 2.0**-53, FP32: 2.0**-24, BF16: 2.0**-9, FP16: 2.0**-12}

# (N, V, d): every N of 0, 1, 3, 17, 65; V of 1, 2, 7, 129, 1000, 4099; d of 8, 33, 64
SHAPES = [(0, 7, 8), (1, 1, 8), (17, 2, 33), (3, 2, 8), (3, 7, 64), (17, 1, 33), (17, 7, 33), (17, 129, 8)]
SHAPES += [(65, 129, 64), (65, 1000, 33), (1, 1000, 64), (3, 4099, 33), (17, 4099, 64), (65, 4099, 8)]
DTYPES = [  # student, teacher, head
    (FP32, FP32, FP32),
    (BF16, BF16, BF16),
    (FP16, FP16, FP16),
    (FP32, FP32, BF16),
    (BF16, FP32, BF16),
    (FP16, BF16, FP32),
]


def make(rows, vocabulary, hidden, dtypes=(FP32, FP32, FP32), step=0.5, device="cpu", seed=0) -> tuple[Tensor, ...]:
    """Student, teacher and head with logits of standard deviation near 3; the student a `step` away."""
    random = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows, hidden, generator=random)
    student = teacher + step * torch.randn(rows, hidden, generator=random)
    head = torch.randn(vocabulary, hidden, generator=random) * 3 / hidden**0.5
    inputs = zip((student, teacher, head), dtypes, strict=True)
    student, teacher, head = (tensor.to(device=device, dtype=dtype) for tensor, dtype in inputs)
    return student.requires_grad_(), teacher, head


def truth(student: Tensor, teacher: Tensor, head: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss and gradient in fp64 on the CPU, from torch's own kl_div."""
    student = student.detach().double().cpu().requires_grad_()
    teacher, head = teacher.detach().double().cpu(), head.detach().double().cpu()
    log_p = F.log_softmax(teacher @ head.T / temperature, dim=-1)
    log_q = F.log_softmax(student @ head.T / temperature, dim=-1)
    loss = temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def measured(student: Tensor, teacher: Tensor, head: Tensor, place=None, **options) -> tuple[Tensor, Tensor]:
    if place is not None:
        options["backend"] = place.backend
    loss = distillation_kl(student, teacher, head, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape
    return loss.detach().double().cpu(), gradient.double().cpu()


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def tolerance(student: Tensor, teacher: Tensor, head: Tensor, temperature: float = 1.0) -> float:
    """A product rounds a logit z by roundoff x |z|, which scales p by as much over T; 3 x covers the inputs' own casts
    to the head's dtype and the difference's rounding, 2e-6 the fp32 reductions, the last term the returned dtype."""
    largest = (teacher.double() @ head.double().T).abs().amax().item() if len(teacher) else 0.0
    return 3 * ROUNDOFF[head.dtype] * (1 + largest / temperature) + 2e-6 + ROUNDOFF[student.dtype]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("one_thread")
def test_loss_and_gradient_match_fp64(place, shape, dtypes, temperature):
    interpreted = place.backend == "triton" and place.device == "cpu"
    if interpreted and (shape[0] > 17 or shape[0] * shape[1] > 3 * 4099 or len(set(dtypes)) > 1):
        pytest.skip("the interpreter takes milliseconds a row")
    inputs = make(*shape, dtypes, device=place.device)
    loss, gradient = measured(*inputs, place, temperature=temperature)
    expected_loss, expected_gradient = truth(*inputs, temperature)
    limit = tolerance(*inputs, temperature)
    if shape[0] == 0 or shape[1] == 1:  # nothing to tell apart: zero, up to the fp32 rounding of one log-sum-exp
        assert abs(loss) < 1e-6
        assert gradient.abs().sum() < 1e-5
    else:
        assert loss == pytest.approx(expected_loss.item(), rel=limit)
        assert relative_error(gradient, expected_gradient) < limit


def test_strided_inputs(place):
    student, teacher, head = make(34, 129, 66, device=place.device)
    views = (student.detach()[::2, ::2].requires_grad_(), teacher[::2, ::2], head[:, ::2])
    transposed = (views[0].detach().T.contiguous().T.requires_grad_(), views[1], views[2].T.contiguous().T)
    for inputs in (views, transposed):
        assert not any(tensor.is_contiguous() for tensor in inputs)
        loss, gradient = measured(*inputs, place)
        expected_loss, expected_gradient = truth(*inputs)
        assert loss == pytest.approx(expected_loss.item(), rel=tolerance(*inputs))
        assert relative_error(gradient, expected_gradient) < tolerance(*inputs)


def test_rows_shared_by_expand(place):
    student, teacher, head = make(3, 129, 8, device=place.device)
    loss, gradient = measured(student, teacher[:1].expand(3, 8), head, place)
    expected_loss, expected_gradient = truth(student, teacher[:1].expand(3, 8), head)
    assert loss == pytest.approx(expected_loss.item(), rel=tolerance(student, teacher, head))
    assert relative_error(gradient, expected_gradient) < tolerance(student, teacher, head)


EXTREME = {  # logits (teacher, student); the head is the identity
    "opposite one-hots": ([500, 0, 0, -500], [-500, 0, 0, 500]),
    "same one-hot": ([300, 0, 0, 0], [900, 0, 0, 0]),
    "one-hot teacher, flat student": ([800, 0, 0, 0], [0, 0, 0, 0]),
    "flat teacher, one-hot student": ([0, 0, 0, 0], [0, 800, 0, 0]),
    "student's mass where the teacher underflows": ([0, -150, -300, 1], [0, -10, -250, 1]),
    "ratio beyond the threshold, probability negligible": ([0, -100, -1, -2], [0, -20, -1, -2]),
    "ratio just below the threshold": ([0, -70, -1, -2], [0, -12, -1, -2]),
    "large common shift": ([4000, 4002, 4001, 4000], [-4000, -3999, -3998, -4000]),
    "equal": ([7, -3, 2, 0], [7, -3, 2, 0]),
}


@pytest.mark.parametrize("head_dtype", [FP32, BF16])
@pytest.mark.parametrize("case", EXTREME)
def test_extreme_logits(place, case, head_dtype):
    """Every figure here is exact in bf16 but the common shift's. 1e-5: fp32 log-sum-exps of hundreds; 3e-7: of p."""
    if case == "large common shift" and head_dtype == BF16:
        pytest.skip("4002 has no bf16")
    teacher, student = (torch.tensor([row], dtype=FP32, device=place.device) for row in EXTREME[case])
    head = torch.eye(4, device=place.device).to(head_dtype)
    loss, gradient = measured(student.requires_grad_(), teacher, head, place)
    expected_loss, expected_gradient = truth(student, teacher, head)
    roundoff = 4 * ROUNDOFF[BF16] if head_dtype == BF16 else 1e-5
    assert loss == pytest.approx(expected_loss.item(), rel=roundoff, abs=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=roundoff, atol=3e-7)


def test_extreme_rows_leave_their_neighbours_alone(place):
    """A row that takes the far branch, amid rows that do not: each row as if it were alone (to fp32 rounding)."""
    student, teacher, head = make(9, 129, 16, device=place.device)
    far = student.detach().clone()
    far[4] = -60 * teacher[4]
    _, expected = measured(student, teacher, head, place)
    loss, gradient = measured(far.requires_grad_(), teacher, head, place)
    expected_loss, expected_far = truth(far, teacher, head)
    assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient[4], expected_far[4], rtol=1e-4, atol=1e-5)
    others = [row for row in range(9) if row != 4]
    torch.testing.assert_close(gradient[others], expected[others], rtol=1e-5, atol=1e-6)


def test_gradient_stays_right_as_the_student_converges(place):
    """The student within a few bf16 steps of the teacher, KL near 1e-3 a row: where the logits' own rounding drowns the
    difference for anyone who computes both in bf16. Ours keeps the teacher's rounding (2^-9 |z|, |z| to 14: 3%)."""
    student, teacher, head = make(64, 4099, 64, (BF16, BF16, BF16), step=0.01, device=place.device)
    expected_loss, expected = truth(student, teacher, head)
    assert 1e-4 < expected_loss / 64 < 1e-3
    loss, gradient = measured(student, teacher, head, place)
    assert loss == pytest.approx(expected_loss.item(), rel=2e-2)
    assert relative_error(gradient, expected) < 3e-2
    for dtype in (BF16, FP32):  # casting to fp32 after the bf16 product does not bring the precision back
        log_p = F.log_softmax((teacher @ head.T).to(dtype), dim=-1)
        log_q = F.log_softmax((student @ head.T).to(dtype), dim=-1)
        naive_loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        (naive,) = torch.autograd.grad(naive_loss, student)
        assert relative_error(naive.double().cpu(), expected) > 0.3


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6])
def test_fp32_is_accurate_at_any_distance(place, step):
    """1e-3 of KL and gradient down to a KL of 1e-12 a row, where a difference of two log-sum-exps (1e-6) is noise.
    The kernel's single pass for the student's log-sum-exp leaves 1e-6 in log(q / p), the gradient off by 1e-6 / step.
    """
    if place.backend == "triton" and step < 1e-4:
        pytest.skip("beyond the kernel's stated accuracy")
    student, teacher, head = make(17, 1000, 33, step=step, device=place.device)
    expected_loss, expected = truth(student, teacher, head)
    loss, gradient = measured(student, teacher, head, place)
    assert loss == pytest.approx(expected_loss.item(), rel=1e-3)
    assert relative_error(gradient, expected) < 1e-3 + (1e-6 / step if place.backend == "triton" else 0)


def test_fp16_head_neither_under_nor_overflows(place):
    """Probabilities near 1 / V and steps of 1e-4 lie below fp16's normal numbers; a row's scale keeps them. 1.5%:
    2^-12 |z| with |z| to 14, subnormals of the scaled rows, and the kernel's 1e-6 in log(q / p)."""
    student, teacher, head = make(8, 4099, 64, (FP32, FP32, FP16), step=1e-4, device=place.device)
    expected_loss, expected = truth(student, teacher, head)
    loss, gradient = measured(student, teacher, head, place)
    assert loss == pytest.approx(expected_loss.item(), rel=1e-2)
    assert relative_error(gradient, expected) < 1.5e-2


def test_two_tokens_in_closed_form(place):
    """V = 2 is a coin: KL and its derivative by hand, but for the rounding of a GPU's exponential."""
    teacher = torch.tensor([[math.log(3.0)]], device=place.device)  # logits (log 3, 0): p = 3/4
    student = torch.zeros(1, 1, device=place.device, requires_grad=True)  # q = 1/2
    loss, gradient = measured(student, teacher, torch.tensor([[1.0], [0.0]], device=place.device), place)
    assert loss == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=5e-6)
    assert gradient.item() == pytest.approx(0.5 - 0.75, rel=5e-6)


@pytest.mark.parametrize("chunk_bytes", [1, 5_000, 10_000_000])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_chunk_size_changes_nothing(place, chunk_bytes, dtype):
    """Only the order of a product's sums differs: fp32 logits near 10 to some 1e-6; in bf16 a few last bits."""
    inputs = make(17, 129, 33, (dtype, dtype, dtype), device=place.device)
    loss, gradient = measured(*inputs, place)
    chunked_loss, chunked_gradient = measured(*inputs, place, chunk_bytes=chunk_bytes)
    limit = {FP32: 4e-6, BF16: 2e-2}[dtype]
    assert chunked_loss == pytest.approx(loss.item(), rel=limit)
    assert relative_error(chunked_gradient, gradient) < limit


def test_several_tiles_in_a_chunk():
    inputs = make(700, 4099, 8)
    loss, gradient = measured(*inputs)
    expected_loss, expected_gradient = truth(*inputs)
    assert loss == pytest.approx(expected_loss.item(), rel=tolerance(*inputs))
    assert relative_error(gradient, expected_gradient) < tolerance(*inputs)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradcheck(temperature):
    student, teacher, head = make(3, 7, 5, (FP64, FP64, FP64))
    assert torch.autograd.gradcheck(
        lambda hidden: distillation_kl(hidden, teacher, head, temperature=temperature, chunk_bytes=120), (student,)
    )


def test_fp64_throughout():
    """1e-12: nothing on the way is fp32."""
    inputs = make(17, 129, 33, (FP64, FP64, FP64))
    loss, gradient = measured(*inputs, temperature=1.5)
    expected_loss, expected_gradient = truth(*inputs, 1.5)
    assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
    assert relative_error(gradient, expected_gradient) < 1e-12


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
def test_reference_matches_kl_div(dtype):
    """fp64 in, fp64 out; else fp32 arithmetic on the same inputs (1e-5: KL is a difference of logs near 10)."""
    inputs = make(17, 129, 33, (dtype, dtype, dtype))
    loss = distillation_kl_reference(*inputs, temperature=2.0)
    (gradient,) = torch.autograd.grad(loss, inputs[0])
    expected_loss, expected_gradient = truth(*inputs, 2.0)
    assert loss.dtype == (FP64 if dtype == FP64 else FP32)
    limit = 1e-12 if dtype == FP64 else 1e-5
    assert loss.item() == pytest.approx(expected_loss.item(), rel=limit)
    assert relative_error(gradient.double(), expected_gradient) < max(limit, ROUNDOFF[dtype])


def test_incoming_gradient_scales(place):
    """Gradients near 1e-6, where fp16 has a digit left, arrive whole under a loss scale of 2^14 (2e-3: fp16's roundoff
    and the kernel's 1e-6 in log(q / p) over differences of 1e-3)."""
    student, teacher, head = make(17, 129, 33, (FP16, FP16, FP32), device=place.device)
    head *= 1e-3
    _, expected = truth(student, teacher, head)
    assert expected.abs().max() < 2e-6
    loss = distillation_kl(student, teacher, head, backend=place.backend)
    (scaled,) = torch.autograd.grad(loss * 2**14, student)
    assert relative_error(scaled.double().cpu(), expected * 2**14) < 2e-3


def test_only_the_student_receives_a_gradient():
    student, teacher, head = make(3, 7, 8)
    teacher.requires_grad_()
    distillation_kl(student, teacher, head).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_trainable_head_is_refused():
    student, teacher, head = make(3, 7, 8)
    head.requires_grad_()
    with pytest.raises(ValueError, match="frozen"):
        distillation_kl(student, teacher, head)
    with torch.no_grad():  # evaluation of a model that nobody froze
        assert distillation_kl(student, teacher, head) > 0


def test_autocast_does_not_reach_inside():
    inputs = make(17, 129, 33)
    plain = measured(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = measured(*inputs)
    assert torch.equal(plain[0], autocast[0])
    assert torch.equal(plain[1], autocast[1])


class Watch(TorchDispatchMode):
    """Bytes of the largest tensor made, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket is torch.ops.aten.mm
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_tensor_grows_with_rows_times_vocabulary(dtype):
    vocabulary, budget = 2000, 2**19
    largest = {}
    for rows in (128, 1024):
        inputs = make(rows, vocabulary, 8, (dtype, dtype, dtype))
        with Watch() as watch:
            distillation_kl(*inputs, chunk_bytes=budget).backward()
        largest[rows] = watch.largest
    with Watch() as control:
        distillation_kl_reference(*inputs)
    assert control.largest == 1024 * vocabulary * 4  # the watch does see an [N, V] tensor
    assert largest[128] == largest[1024] <= 3 * budget  # fp32 working copies of a chunk: 3 x 4 bytes for its 2 x 2 to 8


def test_no_gradient_work_without_need():
    student, teacher, head = make(17, 129, 33)
    with Watch() as training:
        distillation_kl(student, teacher, head)
    with Watch() as evaluating, torch.no_grad():
        loss = distillation_kl(student, teacher, head)
    with Watch() as frozen:
        distillation_kl(student.detach(), teacher, head)
    assert not loss.requires_grad
    assert (training.products, evaluating.products, frozen.products) == (2, 1, 1)


def test_bad_arguments_name_what_is_wrong():
    student, teacher, head = make(3, 7, 8)
    for bad, message in [
        ((student, teacher[:2], head), r"student \(3, 8\), teacher \(2, 8\)"),
        ((student, teacher, head[:, :4]), r"head \(7, 4\)"),
        ((student[None], teacher[None], head), r"student \(1, 3, 8\)"),
        ((student, teacher, head[:0]), "vocabulary"),
        ((student, teacher.long(), head), "int64"),
        ((student, teacher.to("meta"), head), "one device"),
    ]:
        with pytest.raises(ValueError, match=message):
            distillation_kl(*bad)
    for temperature in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            distillation_kl(student, teacher, head, temperature=temperature)
    with pytest.raises(ValueError, match="chunk_bytes"):
        distillation_kl(student, teacher, head, chunk_bytes=0)


def test_backend_by_device(monkeypatch):
    assert distillation_kl_backend("cpu") == "cpu"
    monkeypatch.setattr(backends, "_can_compile", lambda: True)
    assert distillation_kl_backend("cuda:1") == "triton"
    monkeypatch.setattr(backends, "_can_compile", lambda: False)
    assert distillation_kl_backend(torch.device("cuda")) == "torch"
    assert distillation_kl_backend("mps") == "torch"


def test_forced_backend(monkeypatch):
    student, teacher, head = make(3, 7, 8)
    assert torch.equal(
        distillation_kl(student, teacher, head, backend="torch"), distillation_kl(student, teacher, head)
    )
    with pytest.raises(ValueError, match="'cuda'"):
        distillation_kl(student, teacher, head, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        distillation_kl(student, teacher, head, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="fp64"):
        distillation_kl(student, teacher, head.double(), backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"swiftkv-train\[triton\]"):
        distillation_kl(student, teacher, head, backend="triton")


def test_triton_kernel_in_a_child_process(run_interpreted):
    assert run_interpreted(__file__) > 100


@pytest.mark.parametrize("logits", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("write_difference", [False, True])
def test_kernel_compiles_for_gpus(compile_for_gpu, logits, write_difference):
    types = dict.fromkeys(["logits", "delta", "difference"], f"*{logits}")
    types |= dict.fromkeys(["step_norm", "kl", "norm"], "*fp32") | {"inverse_temperature": "fp32"}
    own = sys.modules["swiftkv_kernels.distillation_kl"]  # under that name the package has the function
    constants = {"WRITE_DIFFERENCE": write_difference, "UNIT": own._UNIT, "BLOCK": 4096}
    compile_for_gpu(own._row_kernel(), types, constants)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_native_kernel_at_full_size(dtype):
    """Llama-3's vocabulary, several chunks; memory stays near the budget, a tenth of one [N, V] fp32 tensor."""
    rows, vocabulary, budget = 2048, 128_256, 100 << 20
    student, teacher, head = make(rows, vocabulary, 64, (dtype, dtype, dtype), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, gradient = measured(student, teacher, head, chunk_bytes=budget, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 1.5 * budget
    expected_loss, expected_gradient = truth(student[:64], teacher[:64], head)
    first_loss, first_gradient = measured(student.detach()[:64].requires_grad_(), teacher[:64], head, backend="triton")
    limit = tolerance(student[:64], teacher[:64], head)
    assert first_loss == pytest.approx(expected_loss.item(), rel=limit)
    assert relative_error(first_gradient, expected_gradient) < limit
    assert relative_error(gradient[:64], first_gradient) < limit
    assert loss > first_loss
