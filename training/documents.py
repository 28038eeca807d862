"""Rows packed of several samples that do not see each other (--documents true), as a conversation sees
nothing before its start.

    sample   0 0 0 1 1      key       0 1 2 3 4
                            query 2   x x x
                            query 3         x        the first column of a sample: as of a conversation
                            query 4         x x

Each sample has its own delays, so what its last acoustic codes would add to the first column of the next is
cut off, and that column, which nothing before it tells, carries no loss. A row of two samples then has the
losses of the two alone.
"""
from dataclasses import dataclass

import numpy as np
import torch

from streams import pack


def pack_apart(grids, T, v):
    """As streams.pack, and the number of the sample that each frame is of, (T,)."""
    parts = [pack([grid], grid.shape[1], v) for grid in grids]
    for _, loss in parts:
        loss[:, 0] = False
    grid, loss = (np.concatenate(x, 1)[:, :T] for x in zip(*parts))
    return grid, loss, np.repeat(np.arange(len(grids)), [g.shape[1] for g in grids])[:T]


def attention(documents):
    """documents (B, T): the sample of each frame -> what model.attend does with q, k, v: each query sees the
    keys of its own sample up to itself."""
    if documents.is_cuda:
        return Blocks.of(documents)
    may_look = (documents[:, :, None] == documents[:, None]).tril()[:, None]
    return Masked(torch.zeros(may_look.shape, device=may_look.device).masked_fill(~may_look, -torch.inf))


@dataclass
class Masked:
    """The plain formula of model.attend, with another bias."""
    bias: torch.Tensor  # (B, 1, T, T): zero where a query may look, else minus infinity

    def __call__(self, q, k, v):
        (B, H, T, E), G = q.shape, k.shape[1]
        stack = lambda x: x.reshape(B * G, -1, x.shape[-1])
        bias = stack(self.bias.to(q.dtype).expand(B, H, T, T))
        weights = torch.baddbmm(bias, stack(q), stack(k).mT, alpha=E ** -0.5).softmax(-1, dtype=q.dtype)
        return (weights @ stack(v)).view(B, H, T, E)


@dataclass
class Blocks:
    """FlexAttention: blocks of 128 x 128 that hold nothing to see are not computed. Its kernel is compiled
    with the block of the model that calls it."""
    mask: object  # a BlockMask

    @staticmethod
    def of(documents):
        from torch.nn.attention.flex_attention import create_block_mask

        def may_look(b, head, query, key):
            return (query >= key) & (documents[b, query] == documents[b, key])
        (B, T), device = documents.shape, documents.device.type
        return Blocks(create_block_mask(may_look, B, None, T, T, device=device))

    def __call__(self, q, k, v):
        from torch.nn.attention.flex_attention import flex_attention
        return flex_attention(q, k, v, block_mask=self.mask, enable_gqa=True)
