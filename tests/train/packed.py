"""Batches of packed documents."""

from __future__ import annotations

import torch

from swiftkv_train.data import Batch
from tiny import random_ids

PAD = 0


def packed_batch(rows, length, seed, padding):
    """Two documents a row and `padding` positions of padding at its end."""
    real = length - padding
    positions = torch.cat([torch.arange(5), torch.arange(real - 5), torch.arange(padding)]).expand(rows, length)
    token_mask = (torch.arange(length) < real).expand(rows, length)
    ids = random_ids(rows, length, seed=seed).masked_fill(~token_mask, PAD)
    return Batch(ids, positions.contiguous(), token_mask.clone(), token_mask, torch.zeros(rows, dtype=torch.long))
