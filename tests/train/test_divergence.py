"""What counts as a step gone wrong, and what is kept of it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from swiftkv_train.data import Batch
from swiftkv_train.divergence import FEWEST, MOST_OVERFLOWS, WINDOW, Divergence, save_failed_batch


def after(losses, max_loss_ratio=10.0):
    divergence = Divergence(max_loss_ratio)
    divergence.restore({"losses": losses, "overflows": 0})
    return divergence


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_problem_whatever_the_ratio(value):
    divergence = Divergence(0.0)
    assert divergence.loss_problem(value) == f"the loss is {value}"
    assert divergence.gradient_problem(value) == f"the gradient norm is {value}"
    assert divergence.gradient_problem(1e30) is None  # clipping sees to it


def test_a_loss_is_held_against_the_median_of_those_before():
    losses = [0.1, 0.2, 5.0] * FEWEST
    assert after(losses).loss_problem(1.99) is None
    found = after(losses).loss_problem(2.4)
    assert found == "the loss is 2.4, 12 times its running median (training.max_loss_ratio is 10),"
    assert after(losses, 0.0).loss_problem(1e9) is None


def test_the_first_losses_have_nothing_to_be_held_against():
    divergence = after([0.1] * (FEWEST - 2))
    assert divergence.loss_problem(50.0) is None
    assert divergence.loss_problem(50.0) is None
    assert divergence.loss_problem(50.0) is not None


def test_only_the_last_losses_count():
    divergence = after([100.0] * WINDOW)
    for _ in range(WINDOW // 2 + 1):
        assert divergence.loss_problem(1.0) is None
    assert divergence.loss_problem(11.0) is not None


def test_one_that_is_restored_judges_as_the_one_before():
    before = Divergence(10.0, loss_scaling=True)
    for _ in range(FEWEST):
        before.loss_problem(1.0)
    before.gradient_problem(math.inf)
    restored = Divergence(10.0, loss_scaling=True)
    restored.restore(json.loads(json.dumps(before.state())))
    assert restored.state() == before.state() == {"losses": [1.0] * FEWEST, "overflows": 1}
    assert restored.loss_problem(11.0) == before.loss_problem(11.0) is not None


def test_under_loss_scaling_only_many_overflows_in_a_row_are_a_problem():
    divergence = Divergence(10.0, loss_scaling=True)
    for _ in range(2):
        assert [divergence.gradient_problem(math.inf) for _ in range(MOST_OVERFLOWS)] == [None] * MOST_OVERFLOWS
        assert divergence.gradient_problem(1.0) is None
    for _ in range(MOST_OVERFLOWS):
        divergence.gradient_problem(math.nan)
    assert divergence.gradient_problem(math.inf) == "the gradient norm is inf in 21 steps in a row"
    assert divergence.loss_problem(math.nan) is not None


@pytest.fixture
def batch():
    ids = torch.arange(12).reshape(2, 6)
    return Batch(ids, ids % 3, ids % 2 == 0, ids >= 0, torch.tensor([1, 0]))


def test_the_batch_is_kept_with_its_facts(batch, tmp_path):
    kept = save_failed_batch(tmp_path, 7, batch, ["b", "a"], {"loss": math.nan, "grad_norm": None, "rate": 0.5})
    file = tmp_path / "failed-batch-000007.safetensors"
    assert kept == f"is in {file}"
    tensors = load_file(file)
    assert set(tensors) == {"input_ids", "position_ids", "loss_mask"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, getattr(batch, name))
        assert tensor.dtype == getattr(batch, name).dtype

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    facts = json.loads(file.with_suffix(".json").read_text(), parse_constant=refuse)
    assert facts == {"step": 7, "loss": "nan", "grad_norm": None, "rate": 0.5, "sources": ["b", "a"]}


def test_a_disk_that_refuses_does_not_hide_the_problem(batch, tmp_path):
    kept = save_failed_batch(tmp_path / "absent", 7, batch, ["b", "a"], {"loss": 1.0})
    assert kept.startswith("cannot be saved (")
    assert "No such file" in kept
