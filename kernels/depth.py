"""The laboratory: all codes of a frame in one launch, depth.cu. Conversations use Depth.generate of model.py
and sample(); no GPU has shown yet what this kernel saves.

    h (B, D) -> depth transformer, a draw from each head's logits -> codes (B, K)

B conversations, up to four, D width of the temporal and W of the depth transformer, L layers, M hidden units
of an MLP, K codes, A entries of an embedding, V of them that may be drawn.
"""
import ctypes

import torch

from kernels.build import fields, launch, library
from kernels.sampling import SampleArgs, reference, scale
from model import in_eights
from streams import K


def generate_reference(depth, h, V, sampling, seed, step, recent=None):
    """What a conversation does: h (B, D) -> codes (B, K), logits (B, K, V). sampling: K of Sampling; seed and
    step (B,); recent (B, K, n). A code is -1 where its logits are not numbers; the next sees code 0 then."""
    codes, all_logits = [], []

    def draw(logits, k):
        past = None if recent is None else recent[:, k]
        all_logits.append(logits[:, :V])
        codes.append(reference(logits[:, :V], sampling[k], seed, step, 1 + k, past))
        return codes[-1].clamp(min=0)

    depth.generate(h, draw)
    return torch.stack(codes, 1), torch.stack(all_logits, 1)


@torch.no_grad()
def pack(depth):
    """{name: tensor} of a Depth's weights as depth.cu reads them: a row for each output, in_eights, in
    bfloat16; positions and gains in float32."""
    blocks, stack = depth.blocks, lambda tensors: torch.stack([*tensors])
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    weights = {"from_h": depth.from_h.weight,  # (K W, D)
               "qkv": stack(block.qkv.weight for block in blocks),  # (L, 3 W, W)
               "out": stack(block.out.weight for block in blocks),  # (L, W, W)
               "gate_up": stack(in_eights(block.gate_up, 2).mT for block in blocks),  # (L, K, 2 M, W)
               "down": stack(in_eights(block.down.mT) for block in blocks),  # (L, K, W, M)
               "heads": depth.heads[..., :depth.config.audio_vocab_size].mT,  # (K, A, W)
               "embeddings": stack(e.weight for e in depth.codes)}  # (K, A, W)
    return {name: w.bfloat16().contiguous() for name, w in weights.items()} | {
        "positions": depth.positions.float(),  # (K, W)
        "gains": stack(norm.weight for norm in (*norms, depth.norm)).float()}  # (2 L + 1, W)


def cost(weights, V):
    """Of a frame: the bytes that it reads; those of the attention's weights that it reads again, if they do
    not stay in L2; and its grid syncs."""
    size = {name: w.nbytes for name, w in weights.items() if name != "embeddings"}
    size["heads"] = size["heads"] // weights["heads"].shape[1] * V
    again = (K - 1) * (size["qkv"] + size["out"])
    return sum(size.values()), again, K * (4 * len(weights["qkv"]) + 2)


class DepthArgs(ctypes.Structure):
    """Mirrors the struct of this name in depth.cu."""
    _fields_ = fields(
        (ctypes.c_void_p, "from_h qkv out gate_up down heads embeddings positions gains h "
                          "given past sum hidden logits token"),
        (ctypes.c_float, "eps"), (ctypes.c_int, "B D W H M L A V staged"), (SampleArgs * K, "draw"))


def generate(depth, weights, h, V, sampling, seed, step, recent=None):
    """generate_reference() by depth.cu: weights are pack(depth). The codes are those that sample() draws from
    these logits, which differ from a Depth's by rounding."""
    (B, D), (L, W, _), M = h.shape, weights["out"].shape, weights["down"].shape[-1]
    A = depth.config.audio_vocab_size
    lib = library("depth", h.device.type)
    assert lib, "depth.cu could not be built"
    H = depth.blocks[0].H
    assert B <= 4 and D % 8 == W % 8 == M % 8 == W // H % 2 == 0 and W // H <= 64 and K == 8, (B, D, W, M, H)
    assert seed.shape == step.shape == (B,), (seed.shape, step.shape)
    new = lambda *shape: torch.empty(shape, device=h.device)
    scratch = new(B, K * W), new(L, K, B, 3 * W), new(B, W), new(B, 2 * M)
    logits, token = new(K, B, V), seed.new_empty(K, B)
    h, seed, step = h.float().contiguous(), seed.contiguous(), step.contiguous()
    recent = None if recent is None else recent.transpose(0, 1).contiguous()
    draws = []
    for k, s in enumerate(sampling):
        past = None if recent is None or s.penalty == 1 else recent[k]
        tensors = logits[k], seed, step, past, token[k], None
        draws.append(SampleArgs(*(None if t is None else t.data_ptr() for t in tensors), V, s.top_p,
                                scale(s.temperature), s.penalty, 1 / s.penalty, 1 + k, B, V,
                                0 if past is None else past.shape[1], s.top_k))
    tensors = *weights.values(), h, *scratch, logits, token
    args = DepthArgs(*(t.data_ptr() for t in tensors), depth.norm.eps, B, D, W, H, M, L, A, V,
                     0, (SampleArgs * K)(*draws))
    launch(lib.generate, args, h)
    return token.T, logits.transpose(0, 1)
