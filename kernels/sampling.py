"""One token from each row of logits: repetition penalty, temperature, top-k, top-p, draw.

    logits (B, V)            float32 or bfloat16
      | repetition penalty for the recent tokens
      v weights (B, V)       integers, floor(2^31 e^((logit - max) / temperature))
      | top-k, top-p: small weights become 0
      v draw                 the first token whose running sum of weights exceeds a random share of the total
    tokens (B,)

This is what conversations use. sample() runs the kernel in sampling.cu for logits on a GPU, if nvcc is there
to compile it, and otherwise reference(). Both give the same token, bit for bit. Read probabilities() first:
it is the same sampling in ordinary floating point.

B rows, V vocabulary, n recent tokens.
"""
import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.build import fields, launch, library


@dataclass(frozen=True)
class Sampling:
    """How to draw one token from logits. ValueError for parameters that mean nothing."""
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # the fewest, likeliest tokens with this probability, and ties with the last
    penalty: float = 1.0  # a recent token's logit is divided by it if positive, else multiplied

    def __post_init__(self):
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1
                and 0 < self.penalty < math.inf):
            raise ValueError(f"{self}: temperature and top-k must be 0 or more, top-p above 0 and at most 1, "
                             "penalty above 0")


def sample(logits, s: Sampling, seed, step, draw=0, recent=None):
    """logits (B, V) -> tokens (B,); -1 for a row with NaN or infinity, or with nothing above -infinity.

    seed, step: (B,) int64; draw: which draw of the step this is; recent (B, n): tokens to penalise, -1 for
    none."""
    if logits.is_cuda:
        return kernel(logits, seed, step, recent, draw, s.temperature, s.top_k, s.top_p, s.penalty)
    return reference(logits, s, seed, step, draw, recent)


# ------------------------------------------------------------------------------------------------------------
# Ordinary softmax sampling, in floating point. It explains and tests what follows; nothing else calls it.


def probabilities(logits, s: Sampling, recent=None):
    """(B, V), for a temperature above 0. probabilities(logits, s).multinomial(1) draws tokens (B, 1)."""
    x = penalise(logits.float(), s.penalty, recent) / s.temperature
    if 0 < s.top_k < x.shape[1]:  # all logits below the k-th largest are dropped
        x = x.masked_fill(x < x.topk(s.top_k).values[:, -1:], -math.inf)
    p = x.softmax(-1)
    if s.top_p < 1:  # the likeliest are kept, until they have probability top_p
        ranked = p.sort(descending=True).values
        last = (ranked.cumsum(-1) < s.top_p).sum(-1, keepdim=True)  # the last rank kept
        p = p * (p >= ranked.gather(1, last.clamp(max=x.shape[1] - 1)))
    return p / p.sum(-1, keepdim=True)


def penalise(x, penalty, recent):
    """x (B, V), with the repetition penalty on the tokens in recent (B, n); -1 is none."""
    if recent is None or penalty == 1:
        return x
    B, V = x.shape
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=x.device).scatter(1, recent + 1, True)[:, 1:]
    return torch.where(seen, torch.where(x > 0, x * (1 / penalty), x * penalty), x)


# ------------------------------------------------------------------------------------------------------------
# The same in integers, with PyTorch's operations.
#
# Why integers: a floating-point sum depends on the order of its terms, and a GPU adds in another order than a
# CPU. Then a token near an edge, of top-p or of the draw, differs from machine to machine. So whatever is
# summed or compared becomes an integer first, and integer sums are the same in any order. Little
# accuracy is lost: the error of a weight is less than 2^-22 of the likeliest token's weight.
#
# The random numbers are Philox's: a function of a seed, a step and the number of the draw within the step,
# with no state. So a conversation gets the same tokens alone as in a batch.


def reference(logits, s: Sampling, seed, step, draw=0, recent=None):
    """sample() without the kernel."""
    x = penalise(logits.float(), s.penalty, recent)
    top, best = x.max(-1, keepdim=True)  # of equals the first; NaN is the largest
    valid = top[:, 0].isfinite()
    if s.temperature == 0:
        return torch.where(valid, best[:, 0], -1)
    sums = kept_weights(x - top, s).cumsum(-1)
    total = sums[:, -1]
    target = (uniform(seed, step, draw) * total.double()).long().minimum(total - 1)
    return torch.where(valid, (sums <= target[:, None]).sum(-1), -1)


def kept_weights(x, s: Sampling):
    """x (B, V) <= 0, logits less their maximum -> integer weights (B, V), 0 for those that are dropped."""
    w = weights(x, s.temperature)
    if 0 < s.top_k < w.shape[1]:
        w = w * (w >= w.topk(s.top_k).values[:, -1:])
    if s.top_p < 1:
        ranked = w.sort(descending=True).values
        sums = ranked.cumsum(-1)
        mass = (sums[:, -1:].double() * s.top_p).ceil().long()
        last = (sums < mass).sum(-1, keepdim=True)  # the last rank kept
        w = w * (w >= ranked.gather(1, last))
    return w


# A polynomial for 2^f, f in [0, 1), within 1.7e-7 (least squares). Unlike exp2(), + and * are the
# same on every machine.
POWERS = (0.0018671308644115925, 0.009017028845846653, 0.05579991266131401, 0.24016444385051727,
          0.6931512951850891, 1.0)


def scale(temperature):
    """log2(e) / temperature, but finite, as 0 times it must be 0; 0 for temperature 0, which is greedy."""
    return min(math.log2(math.e) / temperature, 3e38) if temperature else 0.0


def weights(x, temperature):
    """x (...) <= 0 -> floor(2^31 e^(x / temperature)), int64. Each operation rounds once to float32."""
    y = (x * scale(temperature)).nan_to_num(-32.0).clamp(min=-32.0)  # 2^-32 gives 0
    n = y.floor()
    f, p = y - n, POWERS[0]
    for c in POWERS[1:]:
        p = p * f + c
    return (p * 2.0 ** 31).long() >> (-n).long()


def uniform(seed, step, draw):
    """(B,) float64 in [0, 1), of 53 random bits."""
    if seed.device.type == "cpu":  # Python's integers are some 40 times faster than small tensors
        bits = [random_bits(s, t, draw) for s, t in zip(seed.tolist(), step.tolist())]
        return torch.tensor(bits, dtype=torch.float64) * 2.0 ** -53
    return random_bits(seed, step, draw).double() * 2.0 ** -53


def random_bits(seed, step, draw, entry=0):
    """53 random bits; the arguments are integers or int64 tensors."""
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
        ac, bd = a * 0xD2511F53, c * 0xCD9E8D57  # 64-bit products; where int64 wraps, the bits are the same
        a, b, c, d = (bd >> 32 & MASK) ^ b ^ k, bd & MASK, (ac >> 32 & MASK) ^ d ^ l, ac & MASK
        k, l = k + 0x9E3779B9 & MASK, l + 0xBB67AE85 & MASK
    return a, b, c, d


# ------------------------------------------------------------------------------------------------------------
# The kernel

VERSION = 3  # of sampling.cu, for sample(); by reckoning v2 takes 0.1 ms more for 152,064 logits


class SampleArgs(ctypes.Structure):
    """Mirrors the struct of this name in sampling.cu."""
    _fields_ = fields(
        (ctypes.c_void_p, "logits seed step recent token scratch"),
        (ctypes.c_int64, "stride"),
        (ctypes.c_double, "top_p"),
        (ctypes.c_float, "scale penalty inverse_penalty"),
        (ctypes.c_uint, "draw"),
        (ctypes.c_int, "B V n_recent top_k is_bfloat16 blocks_per_row"))


@torch.library.custom_op("nanoflm::sample", mutates_args=())
def kernel(logits: Tensor, seed: Tensor, step: Tensor, recent: Tensor | None, draw: int, temperature: float,
           top_k: int, top_p: float, penalty: float, version: int = VERSION) -> Tensor:
    """sample() by sampling.cu: one launch on the current stream, without waiting for it. Without a compiler,
    reference(). RuntimeError if the launch fails."""
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
    token = torch.empty_like(seed)
    lib.scratch_bytes.restype = ctypes.c_int64
    scratch = logits.new_empty(lib.scratch_bytes(version, B, V), dtype=torch.uint8)
    tensors = (logits, seed, step, recent, token, scratch)
    args = SampleArgs(*(None if t is None else t.data_ptr() for t in tensors), logits.stride(0), top_p,
                      scale(temperature), penalty, 1 / penalty, draw, B, V,
                      0 if recent is None else recent.shape[1], top_k, logits.dtype == torch.bfloat16)
    launch(lib.sample, args, logits, version)
    return token


@kernel.register_fake
def kernel_fake(logits, seed, step, recent, draw, temperature, top_k, top_p, penalty, version=VERSION):
    """The shape and type of the result, for torch.compile."""
    return torch.empty_like(seed)
