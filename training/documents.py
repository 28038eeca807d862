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
import torch.nn.functional as F

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
    return Masked((documents[:, :, None] == documents[:, None]).tril()[:, None])


@dataclass
class Masked:
    mask: torch.Tensor  # (B, 1, T, T): True where a query may look

    def __call__(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)


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
