"""The FLOPs of a step against torch's own counter of the products that run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swiftkv_models import rewrite
from swiftkv_train.distillation_module import DistillationModule
from swiftkv_train.flops import causal_pairs, distillation_flops, peak_flops
from swiftkv_train.recipe import LoraSection, LossSection
from swiftkv_train.student import add_adapters, trainable_parameters
from tiny import random_ids, tiny_llama


@pytest.mark.parametrize("lora_rank", [0, 3])
@pytest.mark.parametrize(
    ("family", "first", "group"), [("llama2", 3, 1), ("smollm2", 1, 2), ("llama3.2", 5, 1), ("wide-heads", 2, 4)]
)
def test_the_count_is_what_torch_counts_in_a_step(family, first, group, lora_rank):
    model = rewrite(
        tiny_llama(family, dtype=torch.float32, attn_implementation="eager"),
        num_key_value_layers=first,
        key_value_group_size=group,
    )
    model.requires_grad_(False)
    if lora_rank:
        pytest.importorskip("peft")
        add_adapters(model, LoraSection(rank=lora_rank))
    for parameter in trainable_parameters(model).values():
        parameter.requires_grad_(True)
    batch, length = 3, 20
    ids = random_ids(batch, length)
    positions = torch.arange(length).expand(batch, length)
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) < 0.6
    with FlopCounterMode(display=False) as counter:
        total, _ = DistillationModule(model, LossSection())(ids, positions, mask)
        total.backward()
    # Eager attention multiplies every query with every key, the masked ones too.
    expected = distillation_flops(
        model.config,
        tokens=ids.numel(),
        pairs=batch * length**2,
        loss_tokens=int(mask.sum()),
        lora_rank=lora_rank,
    )
    assert expected == counter.get_total_flops()


def test_the_pairs_of_a_document_are_its_lower_triangle():
    assert causal_pairs(7) == int(torch.ones(7, 7).tril().sum())


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        # Other chips, or a part of one, under a name that begins alike.
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_peak_is_known_by_the_whole_name(name, peak):
    assert peak_flops(name) == peak
