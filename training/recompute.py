"""What a layer keeps for its backward pass (activation checkpointing): everything; only its input, so that
the rest is computed again, a third more work; or, selectively, also the results of its matrix products. Those
take nearly all of the time to compute, and the norms, rotations and activations between them, nearly all of
the memory besides, take nearly none.

    --recompute nothing | selective | all       by default all for rows longer than 1024 frames, else nothing
"""
import functools

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model import Block

CHOICES = ("nothing", "selective", "all")
aten = torch.ops.aten
KEPT = {aten.mm.default, aten.addmm.default, aten._scaled_mm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default}


def policy(context, op, *args, **kwargs):
    # The plain attention of a CPU is not among those kept: its scores grow with the square of a row.
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class SelectiveBlock(Block):
    """The checkpoint is inside of the layer, so that torch.compile sees both."""

    def forward(self, x, *given):
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x, *given)
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(super().forward, x, *given, use_reentrant=False, context_fn=contexts)


def selective(flm):
    """Before a model is sharded and compiled."""
    for block in flm.blocks:
        block.__class__ = SelectiveBlock
    return flm
