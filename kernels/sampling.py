"""One token from each row of logits: repetition penalty, temperature, top-k, top-p, draw.

    logits (B, V)            float32 or bfloat16
      | penalty for the tokens written lately
      v weights (B, V)       integers, 2^31 * e^((x - max) / temperature), rounded down
      | top-k, top-p: the small ones become 0
      v draw                 the first token at which the running sum exceeds a random share of the whole sum
    tokens (B,)

A graphics card adds in another order than this file does, and sums of fractions depend on the order. So
whatever is summed or compared is made an integer first: then sampling.cu and this file give the same
token, bit for bit, on every machine. What is left out by rounding, at most 2^-31 of the likeliest token's
probability for each other token, is less than bfloat16 logits can tell apart. sample() takes the kernel
for logits on a GPU, if there is nvcc to compile it, and reference() for all others.

The random numbers are Philox's: a function of a seed, a step and the number of the draw within the step,
with no state to keep. So a conversation gets the same tokens alone as among others.

B rows, V vocabulary, n tokens looked back on.
"""
import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.build import library


@dataclass(frozen=True)
class Sampling:
    """How to draw one token from logits. temperature 0 is greedy. ValueError for what means nothing."""
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # keep the likeliest tokens that have this probability together, and ties
    penalty: float = 1.0  # of repetition: recent tokens' logits are divided by it, or multiplied if negative

    def __post_init__(self):
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1
                and 0 < self.penalty < math.inf):
            raise ValueError(f"{self}: temperature and top-k must be 0 or more, top-p above 0 and at most 1, "
                             "penalty above 0")


def sample(logits, s: Sampling, seed, step, draw=0, recent=None):
    """logits (B, V) -> tokens (B,); -1 for a row that holds NaN or infinity, or nothing above -infinity.

    seed, step: (B,) int64; draw: which draw of the step this is. recent (B, n): the tokens that the
    penalty is for; -1 is none.
"""
    if logits.is_cuda:
        return kernel(logits, seed, step, recent, draw, s.temperature, s.top_k, s.top_p, s.penalty)
    return reference(logits, s, seed, step, draw, recent)


# ------------------------------------------------------------------------------------------------------------
# in PyTorch


def plain_sample(logits, s: Sampling, generator=None, recent=None):
    """What sample() does, as it is usually written: (B, V) -> (B,). The distribution is the same, the tokens
    are not: these depend on the order in which a device adds fractions."""
    if recent is not None:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, recent, True)
        logits = torch.where(seen, torch.where(logits > 0, logits / s.penalty, logits * s.penalty), logits)
    if s.temperature == 0:
        return logits.argmax(-1)
    p = (logits / s.temperature).softmax(-1)
    if s.top_k:
        p = p.masked_fill(p < p.topk(min(s.top_k, p.shape[1])).values[:, -1:], 0)
    ranked, entries = p.sort(descending=True)
    before = ranked.cumsum(-1) - ranked
    kept = before < s.top_p * ranked.sum(-1, keepdim=True)  # until there is enough
    return entries.gather(1, torch.multinomial(ranked * kept, 1, generator=generator))[:, 0]


def reference(logits, s: Sampling, seed, step, draw=0, recent=None):
    """sample() in PyTorch's operations, by integers: see the top of this file for why."""
    x = logits.float()
    if recent is not None and s.penalty != 1:
        known = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.bool, device=x.device)
        known = known.scatter(1, recent + 1, True)[:, 1:]
        x = torch.where(known, torch.where(x > 0, x * (1 / s.penalty), x * s.penalty), x)
    top, best = x.max(-1, keepdim=True)  # of equals the first; NaN is above all
    valid = top[:, 0].isfinite()
    if s.temperature == 0:
        return torch.where(valid, best[:, 0], -1)
    w = weights(x - top, s.temperature)
    if 0 < s.top_k < w.shape[1]:
        w = w * (w >= w.topk(s.top_k).values[:, -1:])
    if s.top_p < 1:
        ranked = w.sort(descending=True).values
        sums = ranked.cumsum(-1)
        enough = (sums[:, -1:].double() * s.top_p).ceil().long()
        last = (sums < enough).sum(-1, keepdim=True)  # the place of the last that stays
        w = w * (w >= ranked.gather(1, last))
    sums = w.cumsum(-1)
    whole = sums[:, -1]
    mark = (uniform(seed, step, draw) * whole.double()).long().minimum(whole - 1)
    return torch.where(valid, (sums <= mark[:, None]).sum(-1), -1)


# 2^f for f in [0, 1) within 1.7e-7; a least-squares fit, so that it is the same wherever + and * are IEEE
# 754's
POWERS = (0.0018671308644115925, 0.009017028845846653, 0.05579991266131401, 0.24016444385051727,
          0.6931512951850891, 1.0)


def scale(temperature):
    """log2(e) / temperature, but finite: 0 times it must be 0. For temperature 0, which the kernels take for
    greedy, 0."""
    return min(math.log2(math.e) / temperature, 3e38) if temperature else 0.0


def weights(x, temperature):
    """x (...) <= 0 -> floor(2^31 e^(x / temperature)), int64. Each step is one rounding of float32, in this
    order."""
    y = (x * scale(temperature)).nan_to_num(-32.0).clamp(min=-32.0)  # 2^-32 gives 0
    n = y.floor()
    f, p = y - n, POWERS[0]
    for c in POWERS[1:]:
        p = p * f + c
    return (p * 2.0 ** 31).long() >> (-n).long()


def uniform(seed, step, draw):
    """(B,) float64 in [0, 1), of 53 bits."""
    if seed.device.type == "cpu":  # few numbers: Python's own take a fortieth of the time
        bits = [bits_of(s, t, draw) for s, t in zip(seed.tolist(), step.tolist())]
        return torch.tensor(bits, dtype=torch.float64) * 2.0 ** -53
    return bits_of(seed, step, draw).double() * 2.0 ** -53


def bits_of(seed, step, draw, entry=0):
    """53 random bits, of integers or of int64 tensors."""
    counter = (step & MASK, step >> 32 & MASK, step * 0 + draw, step * 0 + entry)
    a, b, _, _ = philox(counter, (seed & MASK, seed >> 32 & MASK))
    return a << 21 | b >> 11


MASK = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit numbers from a counter (4 integers or int64 tensors)
    and a key (2)."""
    a, b, c, d = counter
    k, l = key
    for _ in range(10):
        ac, bd = a * 0xD2511F53, c * 0xCD9E8D57  # 64 bits; where int64 wraps, the bits are the same
        a, b, c, d = (bd >> 32 & MASK) ^ b ^ k, bd & MASK, (ac >> 32 & MASK) ^ d ^ l, ac & MASK
        k, l = k + 0x9E3779B9 & MASK, l + 0xBB67AE85 & MASK
    return a, b, c, d


# ------------------------------------------------------------------------------------------------------------
# the kernel


def fields(*kinds):
    """A structure's: (type, "names"), ..."""
    return [(name, kind) for kind, names in kinds for name in names.split()]


class SampleArgs(ctypes.Structure):
    """sampling.cu's struct of this name."""
    _fields_ = fields(
        (ctypes.c_void_p, "logits seed step recent token scratch"), (ctypes.c_int64, "stride"),
        (ctypes.c_double, "top_p"), (ctypes.c_float, "scale penalty inverse"), (ctypes.c_uint, "draw"),
        (ctypes.c_int, "rows V n top_k bfloat16 blocks"))


@torch.library.custom_op("nanoflm::sample", mutates_args=())
def kernel(logits: Tensor, seed: Tensor, step: Tensor, recent: Tensor | None, draw: int, temperature: float,
           top_k: int, top_p: float, penalty: float, version: int = 3) -> Tensor:
    """sample() by sampling.cu, in one launch on the current stream and without waiting for it, or by
    reference() if there is no nvcc. RuntimeError if the launch fails."""
    B, V = logits.shape
    lib = library("sampling", logits.device.type)
    if lib is None:
        return reference(logits, Sampling(temperature, top_k, top_p, penalty), seed, step, draw, recent)
    assert seed.shape == step.shape == (B,), (seed.shape, step.shape)
    assert seed.dtype == step.dtype == torch.int64, (seed.dtype, step.dtype)
    if logits.dtype != torch.bfloat16:
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    seed, step = seed.contiguous(), step.contiguous()
    recent = None if recent is None or penalty == 1 else recent.contiguous()
    token = kernel_fake(logits, seed, step, recent, draw, temperature, top_k, top_p, penalty)
    words = {1: 0, 2: V // 2 + 1}.get(version, lib.scratch_size())  # of scratch for a row
    scratch = logits.new_empty((B, words), dtype=torch.int64)
    address = lambda x: None if x is None else x.data_ptr()
    n = 0 if recent is None else recent.shape[1]
    args = SampleArgs(*map(address, (logits, seed, step, recent, token, scratch)), logits.stride(0), top_p,
                      scale(temperature), penalty, 1 / penalty, draw, B, V, n, top_k,
                      logits.dtype == torch.bfloat16)
    launch(lib.sample, args, logits, version)
    return token


def launch(function, args, tensor, *more):
    """On the current stream of the device that holds the tensor."""
    with torch.cuda.device_of(tensor):
        stream = torch.cuda.current_stream().cuda_stream if tensor.is_cuda else None
        error = function(ctypes.byref(args), *more, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"sampling.cu: CUDA's error {error}")


@kernel.register_fake
def kernel_fake(logits, seed, step, recent, draw, temperature, top_k, top_p, penalty, version=3):
    return logits.new_empty(len(logits), dtype=torch.int64)


# ------------------------------------------------------------------------------------------------------------
# the head's product and the draw in one: for the laboratory, the engine keeps them apart


def head_reference(x, weight, temperature, seed, step, draw=0):
    """x (B, D), weight (V, D) -> tokens (B,) from the softmax of x weight^T / temperature: the largest of it
    plus Gumbel noise. The distribution is that of sample(), the tokens are others. -1 for a row whose
    largest is not a number."""
    scores = x.float() @ weight.float().T
    if temperature > 0:
        entries = torch.arange(len(weight), device=x.device)
        u = ((bits_of(seed[:, None], step[:, None], draw, entries) >> 1).double() + 0.5) * 2.0 ** -52
        scores = scores * scale(temperature) + (-(-u.log2()).log2()).float()
    top, best = scores.max(-1)
    return torch.where(top.isfinite(), best, -1)


class HeadArgs(ctypes.Structure):
    """sampling.cu's struct of this name."""
    _fields_ = fields((ctypes.c_void_p, "x weight seed step token scratch"), (ctypes.c_float, "scale"),
                      (ctypes.c_uint, "draw"),
                      (ctypes.c_int, "rows V D bfloat16"))


def head_kernel(x, weight, temperature, seed, step, draw=0):
    """The same by v4 of sampling.cu, of contiguous tensors of one type, float32 or bfloat16, D a multiple of
    8. Where sums are exact in float32 the tokens are the same; elsewhere two that all but tie may change
    places."""
    (B, D), V = x.shape, len(weight)
    lib = library("sampling", x.device.type)
    assert x.dtype == weight.dtype and D % 8 == 0, (x.shape, x.dtype, weight.dtype)
    assert seed.shape == step.shape == (B,), (seed.shape, step.shape)
    assert all(t.is_contiguous() for t in (x, weight, seed, step))
    token, scratch = (torch.empty(n, dtype=torch.int64, device=x.device) for n in (B, lib.scratch_size()))
    pointers = (t.data_ptr() for t in (x, weight, seed, step, token, scratch))
    args = HeadArgs(*pointers, scale(temperature), draw, B, V, D, x.dtype == torch.bfloat16)
    launch(lib.sample_head, args, x)
    return token
