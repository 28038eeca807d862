"""How much memory the losses of one long row take, with all logits at once and in pieces: 8192 frames, the
vocabulary and codes of `7b`.

    python tests/bench_memory.py                    CPU: the first needs 20 GB; narrow, so it takes seconds
    python tests/bench_memory.py --device cuda

Each is measured in a process of its own: the rise of its peak memory over what it held before.
"""
import argparse
import dataclasses
import os
import subprocess
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model  # noqa: E402
from files.device import check_device  # noqa: E402
from streams import K  # noqa: E402

T = 8192


def rise(device):
    """The peak memory in GB of a forward and a backward pass of both losses, besides the model and h."""
    c = dataclasses.replace(model.CONFIGS["7b"], layers=1, width=128, heads=2, kv_heads=1, mlp=128,
                            depth_layers=1, depth_width=128, depth_heads=2)
    flm = model.FLM(c).to(device)
    h = torch.randn(T, c.width, device=device, requires_grad=True)
    text = torch.randint(0, c.vocab_size, (T,), device=device)
    codes = torch.randint(0, c.empty, (T, K), device=device)
    for p in flm.parameters():
        p.grad = torch.zeros_like(p)
    if device == "cpu":
        import resource  # not on Windows
        held = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        held = torch.cuda.max_memory_allocated
    before = held()
    (flm.text_losses(h, text)[:, 0].sum() + flm.depth(h, codes).sum()).backward()
    return (held() - before) / 1e9


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--piece", type=int, help=argparse.SUPPRESS)  # the process that measures
    args = parser.parse_args()
    if args.piece:
        model.PIECE = args.piece
        return print(f"{rise(args.device):.2f}")
    try:
        check_device(args.device)
    except ValueError as e:
        sys.exit(f"error: {e}")
    for name, piece in (("at once", 1 << 60), ("in pieces", model.PIECE)):
        command = [sys.executable, __file__, "--device", args.device, "--piece", str(piece)]
        done = subprocess.run(command, capture_output=True, text=True)
        reason = (done.stderr.strip().splitlines() or ["killed; out of memory?"])[-1]
        print(f"{name:10} {reason if done.returncode else done.stdout.strip() + ' GB'}", flush=True)


if __name__ == "__main__":
    main()
