"""Time for an 80 ms frame, frame by frame: Kyutai's `moshi` package and ours in turn, full size, the same
weights. Each runs as in its own chat: the package under no_grad, ours in inference mode.

    python tests/bench_mimi.py                                  CPU, 2 threads, one stream
    python tests/bench_mimi.py --device cuda --batch 64         GPU: both as CUDA graphs

Needs the packages that `make slow` installs.
"""
import argparse
import importlib.util
import sys
import tempfile
import time

import torch

from test_mimi_reference import FULL, audio, kyutai, make_healthy, save
from live.graph import capture
from mimi import FRAME, Mimi


def seconds(f, inputs, device):
    """Seconds for each call of f, and the last result."""
    times = []
    for x in inputs:
        begun = time.perf_counter()
        y = f(x)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return times, y


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10, help="of 25 frames for each of them")
    args = parser.parse_args()
    for package in ("moshi", "safetensors"):
        if not importlib.util.find_spec(package):
            sys.exit(f"error: needs the package {package}; `make slow` installs it")
    torch.set_num_threads(args.threads)
    B, device = args.batch, args.device
    reference = m, *_ = kyutai(FULL)
    make_healthy(reference, audio(25))
    with tempfile.TemporaryDirectory() as folder:
        ours = Mimi.from_pretrained(save(m, folder), 8, device=device)
    m.to(device).set_num_codebooks(8)
    frames = audio(25 * args.rounds, B).to(device).split(FRAME, -1)
    encode, decode = steps(ours, frames[0], device)
    with m.streaming(B):
        agree, rows = measure(m, encode, decode, frames, device)
    for name, times in rows.items():
        median = sorted(times)[len(times) // 2]
        print(f"{name:16} {1000 * median:7.2f} ms   ({1000 * min(times):.2f} to {1000 * max(times):.2f})")
    ratios = sorted([(c + d) / (a + b) for a, b, c, d in zip(*rows.values())][1:])  # the first round warms up
    print(f"ours / package: {ratios[len(ratios) // 2]:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f} "
          f"over {len(ratios)} rounds), batch {B}, {device}, {args.threads} threads; "
          f"the same codes in the first two seconds: {agree:.2%}")


def steps(codec, frame, device):
    """encode_step and decode_step of a new state; on a GPU as CUDA graphs."""
    B = len(frame)
    state = codec.init_state(B)
    encode, decode = (torch.inference_mode()(lambda x, step=step: step(x, state))
                      for step in (codec.encode_step, codec.decode_step))
    if device == "cpu":
        return encode, decode
    codes = torch.zeros(B, 8, 1, dtype=torch.long, device=device)
    return capture(encode, frame.clone(), state), capture(decode, codes, state)


def measure(m, encode, decode, frames, device):
    """The share of equal codes in the first round, and the median seconds for a frame in each round."""
    agree = []
    rows = {name: [] for name in ("package, encode", "package, decode", "ours, encode", "ours, decode")}
    for some in (frames[i:i + 25] for i in range(0, len(frames), 25)):
        codes = []
        for f, name in ((m.encode, "package, encode"), (encode, "ours, encode")):
            kept = []
            times, _ = seconds(lambda x: kept.append(f(x).clone()), some, device)
            rows[name].append(sorted(times)[len(times) // 2])
            codes.append(kept)
        agree.append((torch.cat(codes[0], -1) == torch.cat(codes[1], -1)).float().mean().item())
        for f, name in ((m.decode, "package, decode"), (decode, "ours, decode")):
            rows[name].append(sorted(seconds(f, codes[0], device)[0])[12])
    return agree[0], rows


if __name__ == "__main__":
    main()
