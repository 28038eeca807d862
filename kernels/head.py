"""The laboratory: the head's matrix product and the draw in one kernel, head.cu. Conversations do not use it:
they compute the logits first, then call sample().

    x (B, D), weight (V, D) -> argmax of x weight^T / temperature + Gumbel noise -> tokens (B,)

The distribution is that of sample() with a temperature alone; the tokens are others.

B rows, V vocabulary, D width.
"""
import ctypes

import torch

from kernels.build import fields, launch, library
from kernels.sampling import random_bits, scale


def head_reference(x, weight, temperature, seed, step, draw=0):
    """x (B, D), weight (V, D) -> tokens (B,); -1 for a row whose largest logit is not finite.
    seed, step: (B,) int64."""
    scores = x.float() @ weight.float().T
    if temperature > 0:
        entries = torch.arange(len(weight), device=x.device)
        bits = random_bits(seed[:, None], step[:, None], draw, entries)
        u = ((bits >> 1).double() + 0.5) * 2.0 ** -52
        scores = scores * scale(temperature) + (-(-u.log2()).log2()).float()
    top, best = scores.max(-1)
    return torch.where(top.isfinite(), best, -1)


class HeadArgs(ctypes.Structure):
    """Mirrors the struct of this name in head.cu."""
    _fields_ = fields((ctypes.c_void_p, "x weight seed step token scratch"), (ctypes.c_float, "scale"),
                      (ctypes.c_uint, "draw"), (ctypes.c_int, "B V D is_bfloat16"))


def head_kernel(x, weight, temperature, seed, step, draw=0):
    """head_reference() by head.cu, for contiguous tensors of one type, float32 or bfloat16, D divisible by 8.
    The tokens are the same where float32 sums are exact; elsewhere two that almost tie may change places."""
    (B, D), V = x.shape, len(weight)
    lib = library("head", x.device.type)
    assert lib, "head.cu could not be built"
    assert x.dtype == weight.dtype and D % 8 == 0, (x.dtype, weight.dtype, D)
    assert seed.shape == step.shape == (B,), (seed.shape, step.shape)
    assert all(t.is_contiguous() for t in (x, weight, seed, step))
    token = torch.empty_like(seed)
    scratch = torch.empty(lib.scratch_bytes(), dtype=torch.uint8, device=x.device)
    tensors = (x, weight, seed, step, token, scratch)
    args = HeadArgs(*(t.data_ptr() for t in tensors), scale(temperature), draw, B, V, D,
                    x.dtype == torch.bfloat16)
    launch(lib.sample_head, args, x)
    return token
