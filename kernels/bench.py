"""Every version of sampling.cu beside PyTorch's operations: the same tokens, then how long each takes. And
the head's product with the draw in one (v4) beside PyTorch's product and a draw.

    python kernels/bench.py

On a GPU, all as CUDA graphs, PyTorch's operations uncaptured too, and FlashInfer's sampler where it is
installed. Without a GPU only the tokens are compared, the kernel's threads taking turns on the CPU.
"""
import functools
import os
import random
import statistics
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from kernels.build import library  # noqa: E402
from kernels.sampling import Sampling, head_kernel, head_reference, kernel, reference  # noqa: E402

VERSIONS = (1, 2, 3)  # that begin with logits; v4 makes them


def problem(rng, B, V, device):
    """The arguments of reference() by chance: all parameters, ties, entries of -infinity, numbers of 64 bits,
    and now and then a row that has no token."""
    g = torch.Generator().manual_seed(rng.getrandbits(63))
    x = torch.randn(B, V + rng.choice((0, 3)), generator=g)[:, :V] * rng.choice((0, 0.1, 1, 4, 30))
    if rng.random() < 0.3:
        x = (x * 2).round() / 2
    if rng.random() < 0.3:
        x[torch.rand(B, V, generator=g) < rng.choice((0.1, 0.99))] = -torch.inf
    if rng.random() < 0.1:
        x[rng.randrange(B), rng.randrange(V):] = rng.choice((torch.nan, torch.inf, -torch.inf, -0.0))
    s = Sampling(rng.choice((0, 0.05, 0.8, 1, 3)), rng.choice((0, 0, 1, 7, 50, V - 1, V + 1)),
                 rng.choice((1, 1, 0.999, 0.9, 0.5, 0.01)), rng.choice((1, 1.3, 0.7)))
    seed, step = (torch.randint(-2 ** 63, 2 ** 63 - 1, (B,), generator=g) for _ in range(2))
    recent = None
    if rng.random() < 0.7:
        recent = torch.randint(-1, rng.choice((4, V)), (B, rng.choice((1, 32))), generator=g)
    to = lambda t: None if t is None else t.to(device)
    x = x.to(rng.choice((torch.float32, torch.bfloat16)))
    return to(x), s, to(seed), to(step), rng.randrange(9), to(recent)


def by_kernel(version, logits, s, seed, step, draw=0, recent=None):
    return kernel(logits, seed, step, recent, draw, s.temperature, s.top_k, s.top_p, s.penalty, version)


def head_problem(rng, B, V, device):
    """The arguments of head_reference() by chance. The numbers are eighths, so that their sums are exact in
    any order; there are ties, and now and then a row that has no token."""
    g = torch.Generator().manual_seed(rng.getrandbits(63))
    D, dtype = rng.choice((8, 64, 200, 512)), rng.choice((torch.float32, torch.bfloat16))
    x, weight = (torch.randint(-4, 5, (n, D), generator=g).div(8).to(dtype) for n in (B, V))
    if rng.random() < 0.1:
        x[rng.randrange(B), rng.randrange(D)] = rng.choice((torch.nan, torch.inf))
    seed, step = (torch.randint(-2 ** 63, 2 ** 63 - 1, (B,), generator=g) for _ in range(2))
    temperature = rng.choice((0, 0.05, 0.8, 1, 3))
    return x.to(device), weight.to(device), temperature, seed.to(device), step.to(device), rng.randrange(9)


def differing(version, rows, sizes, device, seed=0):
    """How many of so many random rows, of a few at a time, have another token than the reference gives them.
    v4 has a reference of its own, and is given up to nine rows, since four go together."""
    make, ours, right, most = problem, functools.partial(by_kernel, version), reference, 5
    if version == 4:
        make, ours, right, most = head_problem, head_kernel, head_reference, 9
    rng, wrong = random.Random(seed), 0
    while rows > 0:
        B = min(rows, rng.randint(1, most))
        p = make(rng, B, rng.choice(sizes), device)
        wrong += (ours(*p) != right(*p)).sum().item()
        rows -= B
    return wrong


def captured(f):
    """Up to 20 calls of f() as one CUDA graph, fewer if f is slow: a function that runs it and says the
    seconds of a call."""
    f()  # what is prepared at the first call is not timed
    n = max(1, min(20, int(0.01 / seconds(f))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(n):
            f()
    return lambda: seconds(graph.replay) / n


def seconds(f):
    """That f() takes on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def compare(functions, to, size):
    """How long each takes as a CUDA graph, the one named `to` also uncaptured, and how its time is beside
    that one's. size: bytes that must be read."""
    runs = {name: captured(f) for name, f in functions.items()}
    runs["uncaptured"] = lambda: seconds(functions[to])
    times = [{name: run() for name, run in runs.items()} for _ in range(11)][1:]  # the first is to warm up
    for name in runs:
        t = statistics.median(r[name] for r in times)
        ratios = sorted(r[to] / r[name] for r in times)
        print(f"  {name:<15}{t * 1e6:10.1f} us {size / t / 1e9:9.1f} GB/s   "
              f"{statistics.median(ratios):8.2f} times as fast as {to} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def candidates(logits, s):
    seed = step = torch.arange(len(logits), device=logits.device)
    out = {"PyTorch": lambda: reference(logits, s, seed, step)}
    out |= {f"v{v}": lambda v=v: by_kernel(v, logits, s, seed, step) for v in VERSIONS}
    try:
        from flashinfer.sampling import top_k_top_p_sampling_from_logits
        rng = torch.Generator(logits.device).manual_seed(0)  # not within a captured graph
        out["FlashInfer"] = lambda: top_k_top_p_sampling_from_logits(logits / s.temperature, s.top_k, s.top_p,
                                                                     generator=rng)
    except ImportError:
        pass
    return out


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert library("sampling", device), "the kernel could not be built"
    cases = [(100, (256, 2050))] + [(5, (12000, 152064))] * (device == "cuda")
    for v in (*VERSIONS, 4):
        for rows, sizes in cases:
            wrong, what = differing(v, rows, sizes, device), " or ".join(map(str, sizes))
            print(f"v{v}: {wrong} of {rows} random rows of {what} entries differ from the reference")
    if device == "cpu":
        print("No GPU here: that was the kernel's source on the CPU. How fast it is only a GPU can tell.")
        return
    s = Sampling(0.8, top_k=50, top_p=0.9)
    print(f"\n{torch.cuda.get_device_name()}, bfloat16 logits, {s}")
    print("medians of 10 rounds through all of them; GB/s: of logits")
    for V in (2050, 152064):
        for B in (1, 64):
            logits = torch.randn(B, V, device=device).mul(3).bfloat16()
            print(f"{B} x {V}")
            compare(candidates(logits, s), "PyTorch", logits.nbytes)

    print("\nThe head and the draw, bfloat16, temperature 0.8; GB/s: of its weights")
    for V, D in ((2050, 1024), (152064, 3584)):
        weight = torch.randn(V, D, device=device, dtype=torch.bfloat16) * 0.02
        for B in (1, 4, 64):
            x = torch.randn(B, D, device=device, dtype=torch.bfloat16)
            ids, s = torch.arange(B, device=device), Sampling(0.8)
            print(f"{B} x {D} x {V}")
            functions = {"product, v3": lambda: by_kernel(3, x @ weight.T, s, ids, ids),
                         "v4": lambda: head_kernel(x, weight, s.temperature, ids, ids)}
            compare(functions, "product, v3", weight.nbytes)


if __name__ == "__main__":
    main()
