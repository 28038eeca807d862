"""For the laboratory: checks every version of the kernels against its reference, then times it on a GPU.

    python kernels/bench.py

Everything is timed as a CUDA graph: PyTorch's operations (without a graph too), v1 to v3, FlashInfer's
sampler if it is installed, the head's product with a draw against v4, and the codes of a frame against
depth.cu. Without a GPU only the tokens are compared, with the kernels' source on the CPU.
"""
import argparse
import functools
import os
import random
import statistics
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # needs no installation

from kernels import depth as depth_kernel  # noqa: E402
from kernels.build import library  # noqa: E402
from kernels.head import head_kernel, head_reference  # noqa: E402
from kernels.sampling import VERSION, Sampling, kernel, reference, sample  # noqa: E402
from model import CONFIGS, Depth  # noqa: E402
from streams import K  # noqa: E402

VERSIONS = (1, 2, 3)  # of sampling.cu; v4, in head.cu, takes other arguments
TEXT, AUDIO = 152064, 2050  # logits of a text token and of an audio token of 7b
FRAME = {TEXT: 1, AUDIO: 8}  # draws of one frame of a conversation


def random_problem(rng, B, V, device):
    """Random arguments for reference(): all parameters, ties, entries of -infinity, 64-bit seeds, and
    sometimes a row without a token."""
    g = torch.Generator().manual_seed(rng.getrandbits(63))
    x = torch.randn(B, V + rng.choice((0, 3)), generator=g)[:, :V] * rng.choice((0, 0.1, 1, 4, 30))
    if rng.random() < 0.3:
        x = (x * 2).round() / 2
    if rng.random() < 0.3:
        x[torch.rand(B, V, generator=g) < rng.choice((0.1, 0.99))] = -torch.inf
    if rng.random() < 0.1:
        x[rng.randrange(B), rng.randrange(V):] = rng.choice((torch.nan, torch.inf, -torch.inf, -0.0))
    s = Sampling(temperature=rng.choice((0, 0.05, 0.8, 1, 3)),
                 top_k=rng.choice((0, 0, 1, 7, 50, V - 1, V + 1)),
                 top_p=rng.choice((1, 1, 0.999, 0.9, 0.5, 0.01)),
                 penalty=rng.choice((1, 1.3, 0.7)))
    seed, step = (torch.randint(-2 ** 63, 2 ** 63 - 1, (B,), generator=g) for _ in range(2))
    recent = None
    if rng.random() < 0.7:
        recent = torch.randint(-1, rng.choice((4, V)), (B, rng.choice((1, 32))), generator=g).to(device)
    x = x.to(device, rng.choice((torch.float32, torch.bfloat16)))
    return x, s, seed.to(device), step.to(device), rng.randrange(9), recent


def by_kernel(version, logits, s, seed, step, draw=0, recent=None):
    """reference() by a version of the kernel."""
    return kernel(logits, seed, step, recent, draw, s.temperature, s.top_k, s.top_p, s.penalty, version)


def random_head(rng, B, V, device):
    """Random arguments for head_reference(). The numbers are eighths, so that sums are exact in any order.
    There are ties, and sometimes a row without a token."""
    g = torch.Generator().manual_seed(rng.getrandbits(63))
    D, dtype = rng.choice((8, 64, 200, 512)), rng.choice((torch.float32, torch.bfloat16))
    x, weight = (torch.randint(-4, 5, (n, D), generator=g).div(8).to(dtype) for n in (B, V))
    if rng.random() < 0.1:
        x[rng.randrange(B), rng.randrange(D)] = rng.choice((torch.nan, torch.inf))
    seed, step = (torch.randint(-2 ** 63, 2 ** 63 - 1, (B,), generator=g) for _ in range(2))
    temperature = rng.choice((0, 0.05, 0.8, 1, 3))
    return x.to(device), weight.to(device), temperature, seed.to(device), step.to(device), rng.randrange(9)


def differing(version, rows, sizes, device, seed=0):
    """How many of `rows` random rows get another token than from the reference. They come in small batches:
    up to five rows, or nine for v4, which computes four at a time."""
    make, ours, expected, most = random_problem, functools.partial(by_kernel, version), reference, 5
    if version == 4:
        make, ours, expected, most = random_head, head_kernel, head_reference, 9
    rng, wrong = random.Random(seed), 0
    while rows > 0:
        B = min(rows, rng.randint(1, most))
        problem = make(rng, B, rng.choice(sizes), device)
        wrong += (ours(*problem) != expected(*problem)).sum().item()
        rows -= B
    return wrong


def random_depth(config, device, seed=0):
    """A Depth in float32 with random weights that bfloat16 can hold, and logits of a size that matters."""
    with torch.device("meta"):
        depth = Depth(config).eval().requires_grad_(False)
    g = torch.Generator(device).manual_seed(seed)
    for name, p in depth.to_empty(device=device).named_parameters():
        inputs = p.shape[-2] if p.ndim == 3 else p.shape[-1]  # of a product
        p.normal_(generator=g).mul_(inputs ** -0.5 if p.ndim > 1 else 0.1).add_(p.ndim == 1)
        p.copy_(p.bfloat16())
    return depth


def random_frame(config, B, device, seed=0):
    """Random arguments for generate_reference(), but for the Depth: each code is drawn in another way."""
    g, V = torch.Generator().manual_seed(seed), config.empty
    h = torch.randn(B, config.width, generator=g).to(device)
    sampling = [Sampling(), Sampling(penalty=1.3), Sampling(0.8), Sampling(0.8, 50), Sampling(1, 0, 0.9),
                Sampling(0.8, V // 2, 0.9, 1.2), Sampling(3), Sampling(0.8, 0, 0.5, 0.7)]
    ids = torch.randint(-2 ** 63, 2 ** 63 - 1, (2, B), generator=g).to(device)
    return h, V, sampling, *ids, torch.randint(-1, V, (B, K, 32), generator=g).to(device)


def differing_depth(config, B, device, seed=0):
    """How many of the codes of depth.cu sample() would not draw from its logits, and how far these are from
    those of a Depth that is given the codes, in standard deviations."""
    depth = random_depth(config, device)
    h, V, sampling, *ids, recent = random_frame(config, B, device, seed)
    codes, logits = depth_kernel.generate(depth, depth_kernel.pack(depth), h, V, sampling, *ids, recent)
    drawn = [reference(logits[:, k], s, *ids, 1 + k, recent[:, k]) for k, s in enumerate(sampling)]
    right = depth.logits(h, codes)[..., :V]
    return (codes != torch.stack(drawn, 1)).sum().item(), ((logits - right).abs().max() / right.std()).item()


def seconds(f):
    """GPU time of f()."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def captured(f):
    """A CUDA graph of up to 20 calls of f(), fewer if f is slow: a function that returns seconds per call."""
    f()  # compiles and allocates
    n = max(1, min(20, int(0.01 / seconds(f))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(n):
            f()
    return lambda: seconds(graph.replay) / n


def compare(functions, base, size):
    """Times each function as a CUDA graph, the one named `base` also without, and prints its speed relative
    to that one. size: bytes that must be read. Returns {name: median seconds}."""
    runs = {name: captured(f) for name, f in functions.items()}
    runs["not captured"] = lambda: seconds(functions[base])
    times = [{name: run() for name, run in runs.items()} for _ in range(11)][1:]  # the first is a warm-up
    medians = {name: statistics.median(r[name] for r in times) for name in runs}
    for name, t in medians.items():
        ratios = sorted(r[base] / r[name] for r in times)
        print(f"  {name:<15}{t * 1e6:10.1f} us {size / t / 1e9:9.1f} GB/s   "
              f"{statistics.median(ratios):8.2f} x {base} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return medians


def candidates(logits, s):
    seed = step = torch.arange(len(logits), device=logits.device)
    out = {"PyTorch": lambda: reference(logits, s, seed, step)}
    out |= {f"v{v}": lambda v=v: by_kernel(v, logits, s, seed, step) for v in VERSIONS}
    try:
        from flashinfer.sampling import top_k_top_p_sampling_from_logits as flashinfer
        # a seed of our own, as a capture may not read the state of PyTorch's generator
        out["FlashInfer"] = lambda: flashinfer(logits / s.temperature, s.top_k, s.top_p, seed=0, offset=0)
    except ImportError:
        pass
    return out


def check(device, rows):
    cases = [(rows, (256, AUDIO))] + [(5, (12000, TEXT))] * (device == "cuda")
    for v in (*VERSIONS, 4):
        for rows, sizes in cases:
            wrong, what = differing(v, rows, sizes, device), " or ".join(map(str, sizes))
            print(f"v{v}: {wrong} of {rows} random rows of {what} entries differ from the reference")


def check_depth(config, device):
    for B in (1, 3):
        wrong, off = differing_depth(config, B, device)
        print(f"depth.cu: {wrong} of {B * K} codes differ from the reference, the logits by {off:.1e}")


def count_depth(config):
    with torch.device("meta"):
        read, again, syncs = depth_kernel.cost(depth_kernel.pack(Depth(config)), config.empty)
    floors = ", ".join(f"{read / speed / 1e9:.2f} to {(read + again) / speed / 1e9:.2f} ms on an {card}"
                       for card, speed in (("H100", 3.35), ("H200", 4.8)))  # TB/s, data sheets
    print(f"\nThe depth transformer of 7b: {read / 1e6:.0f} MB a frame, {again / 1e6:.0f} more if L2 does "
          f"not keep attention's; at least {floors}. depth.cu: 1 launch, {syncs} grid syncs")
    return read


def time_sampling(device):
    s = Sampling(0.8, top_k=50, top_p=0.9)
    print(f"\n{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, bfloat16 logits, {s}")
    print("medians of 10 rounds through all of them; GB/s: of logits")
    for B in (1, 64):
        frame = {}
        for V, draws in FRAME.items():
            logits = torch.randn(B, V, device=device).mul(3).bfloat16()
            print(f"{B} x {V}")
            for name, t in compare(candidates(logits, s), "PyTorch", logits.nbytes).items():
                frame[name] = frame.get(name, 0) + draws * t
        print(f"the nine draws of a frame, {B} rows (sample() uses v{VERSION}): "
              + ", ".join(f"{name} {t * 1e6:.0f} us" for name, t in frame.items()))


def time_head(device):
    s = Sampling(0.8)
    print("\nThe head and the draw, bfloat16, temperature 0.8; GB/s: of its weights")
    for V, D in ((AUDIO, 1024), (TEXT, 3584)):
        weight = torch.randn(V, D, device=device, dtype=torch.bfloat16) * 0.02
        for B in (1, 4, 64):
            x, ids = torch.randn(B, D, device=device, dtype=torch.bfloat16), torch.arange(B, device=device)
            print(f"{B} x {D} x {V}")
            compare({"product, v3": lambda: by_kernel(3, x @ weight.T, s, ids, ids),
                     "v4": lambda: head_kernel(x, weight, s.temperature, ids, ids)},
                    "product, v3", weight.nbytes)


def time_depth(config, device, size):
    print("bfloat16, temperature 0.8, top-k 250; GB/s: of weights that are read once")
    depth, how, V = random_depth(config, device), [Sampling(0.8, 250)] * K, config.empty
    weights = depth_kernel.pack(depth)
    depth.bfloat16().align()
    for B in (1, 4):
        h, ids = torch.randn(B, config.width, device=device).bfloat16(), torch.arange(B, device=device)
        print(f"{B} conversations")
        compare({"PyTorch": lambda: depth.generate(h, lambda x, k: sample(x[:, :V], how[k], ids, ids, 1 + k)),
                 "depth.cu": lambda: depth_kernel.generate(depth, weights, h, V, how, ids, ids)},
                "PyTorch", size)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", type=int, default=100, help="random rows that each version is checked with")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not all(library(name, device) for name in ("sampling", "head", "depth")):
        sys.exit("the kernels could not be built")
    check(device, args.rows)
    check_depth(CONFIGS["tiny" if device == "cpu" else "7b"], device)
    size = count_depth(CONFIGS["7b"])
    if device == "cpu":
        print("No GPU here: that was the kernel's source on the CPU. Only a GPU can tell how fast it is.")
        return
    time_sampling(device)
    time_head(device)
    time_depth(CONFIGS["7b"], device, size)


if __name__ == "__main__":
    main()
