"""The training step against an independent one, and what must not change its result."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import swiftkv_train.distill as distill_module
from swiftkv_models import rewrite
from swiftkv_train.data import Batch
from swiftkv_train.distill import Distillation, distill, learning_rate
from swiftkv_train.distillation_module import DistillationModule
from swiftkv_train.errors import UserError
from swiftkv_train.quality import token_measures
from swiftkv_train.recipe import LossSection, TrainingSection
from swiftkv_train.student import trainable_parameters
from tiny import random_ids, randomise_tail, tiny_llama

LENGTH = 24


@pytest.fixture
def packed():
    """Rows of two documents; the loss is on some positions only, of unequal number per row."""
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(LENGTH - n)]) for n in (7, 16, 23)])
    mask = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(3)) < torch.tensor([[0.2], [0.5], [0.9]])
    return random_ids(3, LENGTH), positions, mask


def independent_loss(teacher, student, ids, positions, mask, loss):
    """Two full forwards, whole logits, autograd: (sum of KL x T^2, sum of the MSE between the last layer's inputs)."""
    arguments = {"position_ids": positions, "use_cache": False, "output_hidden_states": True}
    with torch.no_grad():
        base = teacher(ids, **arguments)
    ours = student(ids, **arguments)
    temperature = loss.temperature
    log_p = functional.log_softmax(base.logits[mask] / temperature, dim=-1)
    log_q = functional.log_softmax(ours.logits[mask] / temperature, dim=-1)
    kl = functional.kl_div(log_q, log_p, log_target=True, reduction="sum") * temperature**2
    mse = (ours.hidden_states[-2] - base.hidden_states[-2])[mask].square().mean(-1).sum()
    return kl, mse


# fp64 both; the MSE is taken in fp32 (1e-7), and the KL's own rounding in fp64 is far below.
@pytest.mark.parametrize(("hidden_mse", "tolerance"), [(0.0, 1e-10), (0.7, 1e-6)])
@pytest.mark.parametrize(("family", "group"), [("smollm2", 1), ("bias", 2), ("llama3.1", 4)])
def test_loss_and_gradients_equal_two_full_forwards(packed, family, group, hidden_mse, tolerance):
    ids, positions, mask = packed
    base = tiny_llama(family)
    teacher = copy.deepcopy(base)
    model = randomise_tail(rewrite(base, num_key_value_layers=2, key_value_group_size=group)).requires_grad_(False)
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loss = LossSection(temperature=1.7, hidden_mse=hidden_mse)

    kl, mse = independent_loss(teacher, model, ids, positions, mask, loss)
    expected = kl + hidden_mse * mse
    gradients = torch.autograd.grad(expected, list(parameters.values()))

    total, reported = DistillationModule(model, loss)(ids, positions, mask)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=tolerance)
    assert reported.item() == pytest.approx(kl.item(), rel=tolerance)
    assert kl.item() > 1
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert parameter.grad is not None
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad, gradient, atol=10 * tolerance * scale, rtol=0, msg=name)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in parameters)


def test_the_measures_of_a_batch_are_those_of_whole_logits(packed):
    ids, positions, mask = packed
    mask[:, -1] = False
    base = tiny_llama("smollm2")
    teacher = copy.deepcopy(base)
    model = randomise_tail(rewrite(base, num_key_value_layers=2))
    batch = Batch(ids, positions, mask, torch.ones_like(mask), torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        student, teacher_logits = (m(ids, position_ids=positions, use_cache=False).logits for m in (model, teacher))
    rows, columns = mask.nonzero(as_tuple=True)
    expected = token_measures(student[mask], teacher_logits[mask], ids[rows, columns + 1])
    found = DistillationModule(model, LossSection()).compare(*batch.model_inputs())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("schedule", "step", "rate"),
    [
        ("cosine", 0, 1e-3 / 5),  # the first of five warm-up steps
        ("cosine", 4, 1e-3),  # the last of them
        ("cosine", 5, 1e-3),  # the cosine starts at the peak
        ("cosine", 52, 1e-3 * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 47 / 95)))),
        ("cosine", 100, 1e-3 * 0.2),  # and ends at the floor
        ("wsd", 0, 1e-3 / 5),
        ("wsd", 5, 1e-3),
        ("wsd", 59, 1e-3),
        ("wsd", 60, 1e-3 * (0.2 + 0.8 * 40 / 41)),  # the first of the last 40 steps
        ("wsd", 99, 1e-3 * (0.2 + 0.8 * 1 / 41)),
        ("wsd", 100, 1e-3 * 0.2),
    ],
)
def test_the_learning_rate_rises_and_falls_as_stated(schedule, step, rate):
    training = TrainingSection(
        output_dir="x",
        steps=100,
        batch_size=1,
        learning_rate=1e-3,
        warmup=0.05,
        schedule=schedule,
        decay=0.4 if schedule == "wsd" else None,
        final_learning_rate=0.2,
    )
    assert learning_rate(training, step) == pytest.approx(rate, rel=1e-12)


def test_a_fall_longer_than_what_is_left_after_the_warm_up_begins_at_the_peak():
    training = TrainingSection(output_dir="x", steps=100, batch_size=1, learning_rate=1.0, warmup=0.5, decay=1.0)
    rates = [learning_rate(training, step) for step in range(101)]
    assert rates[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert all(0 < before - after < 1 / 49 for before, after in itertools.pairwise(rates[49:]))  # no jump
    assert rates[100] == training.final_learning_rate


def test_without_warm_up_the_first_step_has_the_peak():
    training = TrainingSection(output_dir="x", steps=1, batch_size=1, learning_rate=1e-3, warmup=0.0)
    assert learning_rate(training, 0) == 1e-3


def trained(recipe, steps):
    distillation = Distillation(recipe, quiet=True)
    distillation.prepare()
    start = {name: tensor.clone() for name, tensor in distillation.strategy.module.state_dict().items()}
    rows = [distillation.train_step() for _ in range(steps)]
    return start, dict(distillation.strategy.module.state_dict()), rows, distillation


def test_training_changes_the_rewrite_and_nothing_else(make_recipe):
    before, after, rows, _ = trained(make_recipe(loss__hidden_mse=0.5), 2)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_swiftkv" in name}
    assert rows[0]["loss"] > rows[0]["kl"] > 0


@pytest.mark.parametrize("hidden_mse", [0.0, 0.5])
def test_the_size_of_micro_batches_does_not_change_the_result(make_recipe, hidden_mse):
    found = {}
    for size in (8, 1, 3):
        recipe = make_recipe(
            training__micro_batch_size=size, training__output_dir=f"run-{size}", loss__hidden_mse=hidden_mse
        )
        found[size] = trained(recipe, 3)
    _, whole, whole_rows, distillation = found[8]
    counts = distillation.data.batch(0, 8).loss_mask.sum(1)
    assert counts.max() > 1.5 * counts.min()  # a mean of means would be another number
    start = found[8][0]
    moved = max(float((whole[name] - start[name]).abs().max()) for name in whole)
    for size in (1, 3):
        _, weights, rows, _ = found[size]
        for row, expected in zip(rows, whole_rows, strict=True):
            for key in ("loss", "kl", "grad_norm"):
                assert row[key] == pytest.approx(expected[key], rel=1e-5)
            assert row["loss_tokens"] == expected["loss_tokens"]
        # Sums in another order differ by 1e-7 of the gradients; AdamW divides by their size, which magnifies it where
        # an element's gradient is next to nothing.
        difference = max(float((weights[name] - whole[name]).abs().max()) for name in whole)
        assert difference < 1e-2 * moved


def test_the_loss_is_divided_by_the_loss_tokens_of_the_step(make_recipe):
    recipe = make_recipe(rewrite__init="copy", training__micro_batch_size=3)
    distillation = Distillation(recipe, quiet=True)
    distillation.prepare()
    batch = distillation.data.batch(0, 8)
    teacher = AutoModelForCausalLM.from_pretrained(recipe.model.base, dtype=torch.float32)
    model = distillation.strategy.module.model
    with torch.no_grad():
        kl, _ = independent_loss(teacher, model, batch.input_ids, batch.position_ids, batch.loss_mask, recipe.loss)
    row = distillation.train_step()
    assert row["loss"] == pytest.approx(float(kl) / int(batch.loss_mask.sum()), rel=1e-4)


def test_attention_is_chosen_by_where_training_runs(make_recipe, monkeypatch):
    devices = []
    monkeypatch.setattr(distill_module, "use_training_attention", lambda model, device=None: devices.append(device))
    distillation = Distillation(make_recipe(rewrite__init="copy"), quiet=True)
    distillation.prepare()
    assert devices == [distillation.accelerator.device]


def test_a_token_of_nan_is_not_taken_for_the_padding_of_several_processes(make_recipe):
    distillation = Distillation(make_recipe(training__evaluate_tokens=64), quiet=True)
    distillation.prepare()
    padding = torch.full((1, 4), -1.0)
    distillation.accelerator = SimpleNamespace(
        num_processes=2,
        process_index=0,
        device=torch.device("cpu"),
        pad_across_processes=lambda measures, pad_index: measures,
        gather=lambda tensor: torch.cat([tensor, padding]) if tensor.ndim == 2 else tensor,
    )
    of_a_batch = torch.tensor([[0.1, 1.0, 2.0, 2.0], [math.nan] * 4])
    distillation.strategy.unwrapped = lambda *inputs, compare: of_a_batch
    for quality in distillation.evaluate().values():
        assert quality.tokens == 2
        assert math.isnan(quality.kl)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rewrite__num_key_value_layers": 6}, "num_key_value_layers"),
        ({"data__sequence_length": 5000}, "data.sequence_length"),
    ],
)
def test_a_recipe_that_cannot_work_on_this_model_is_refused(make_recipe, changes, says):
    with pytest.raises(UserError, match=says):
        distill(make_recipe(**changes), quiet=True)
