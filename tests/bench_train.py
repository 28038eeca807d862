"""How fast training is: a step of ours beside one of the same model in the plain style of the transformers
library, and where the time of ours goes.

    python tests/bench_train.py                         after `make demo`: `tiny` on its own data
    python tests/bench_train.py --device cuda           the same on a GPU, in bfloat16
    python tests/bench_train.py --config 7b --layers 8 --device cuda
    ... --config 7b --layers 8 --device cuda --recompute selective --float8 --documents

The last commands measure the utilisation of a size with as many layers as fit: its FLOP/s, counted as
`--plan` counts them, over those of one large matrix product.

The plain model is transformers' Qwen2Model under the sum of 17 embeddings, and a depth transformer whose
positions' MLPs are a list of modules, computed for every frame. Same sizes, batches, loss weights,
optimiser (AdamW) and precision; rounds of the two alternate. It needs the packages that `make slow` installs.
"""
import argparse
import dataclasses
import importlib.util
import os
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from training import plan  # noqa: E402
import train  # noqa: E402
from files.device import check_device  # noqa: E402
from model import CONFIGS  # noqa: E402
from streams import K, ROWS, SPEAK, TEXT  # noqa: E402
from training.muon import make_optimizer  # noqa: E402
from training.recompute import CHOICES  # noqa: E402


class PlainDepthLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        W, hidden = c.depth_width, int(8 * c.depth_width / 3)
        self.norm1, self.norm2 = nn.RMSNorm(W), nn.RMSNorm(W)
        self.attention = nn.MultiheadAttention(W, c.depth_heads, bias=False, batch_first=True)
        self.gate = nn.ModuleList(nn.Linear(W, hidden, bias=False) for _ in range(K))
        self.up = nn.ModuleList(nn.Linear(W, hidden, bias=False) for _ in range(K))
        self.down = nn.ModuleList(nn.Linear(hidden, W, bias=False) for _ in range(K))

    def forward(self, x, mask):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = self.norm2(x)
        mlp = lambda k, y: self.down[k](F.silu(self.gate[k](y)) * self.up[k](y))
        return x + torch.stack([mlp(k, y[:, k]) for k in range(K)], 1)


class Plain(nn.Module):
    def __init__(self, c):
        super().__init__()
        import transformers
        self.temporal = transformers.Qwen2Model(transformers.Qwen2Config(
            vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads))
        A, W = c.empty + 1, c.depth_width
        self.audio = nn.ModuleList(nn.Embedding(A, c.width) for _ in range(2 * K))
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        self.from_h = nn.ModuleList(nn.Linear(c.width, W, bias=False) for _ in range(K))
        self.codes = nn.ModuleList(nn.Embedding(A, W) for _ in range(K))
        self.layers = nn.ModuleList(PlainDepthLayer(c) for _ in range(c.depth_layers))
        self.norm = nn.RMSNorm(W)
        self.heads = nn.ModuleList(nn.Linear(W, A, bias=False) for _ in range(K))
        self.register_buffer("mask", torch.ones(K, K).triu(1).bool(), persistent=False)

    def loss(self, grid, v, stage):
        given, target = grid[..., :-1], grid[..., 1:]
        x = self.temporal.embed_tokens(given[:, TEXT])
        x = x + sum(e(given[:, 1 + i]) for i, e in enumerate(self.audio))
        h = self.temporal(inputs_embeds=x, use_cache=False).last_hidden_state
        text = target[:, TEXT].flatten()
        weight = torch.where(text == v.wait, stage.wait, 1.0)
        ce = F.cross_entropy(self.head(h).flatten(0, 1).float(), text, reduction="none")
        loss = (ce * weight).sum() / (text != v.wait).sum().clamp(min=1)
        codes = target[:, SPEAK].transpose(1, 2).flatten(0, 1)  # (N, K)
        seen = torch.cat([torch.full_like(codes[:, :1], v.empty), codes[:, :-1]], 1)
        x = torch.stack([self.from_h[k](h.flatten(0, 1)) + self.codes[k](seen[:, k]) for k in range(K)], 1)
        for layer in self.layers:
            x = layer(x, self.mask)
        x = self.norm(x)
        for k in range(K):
            logits, weight = self.heads[k](x[:, k]).float(), train.ALPHA_2 / (K - 1) if k else train.ALPHA_1
            ce = F.cross_entropy(logits, codes[:, k], reduction="none", ignore_index=v.empty)
            loss = loss + weight * ce.sum() / (codes[:, k] != v.empty).sum().clamp(min=1)
        return loss


def run_of(config, stage, args, adamw=False):
    """A Run in the middle of a stage, on args.data, and its step: batch, loss, backward, clip, step. The step
    returns the seconds that it waited for its batch."""
    device = args.device
    torch.manual_seed(1)
    task = train.ModelTask(config, args.data, device, recompute=args.recompute, in_float8=args.float8)
    task.from_nothing = not adamw
    optimizer = make_optimizer(task.modules, task.from_nothing)
    with tempfile.TemporaryDirectory() as folder:
        run = train.Run(task, [stage], folder, optimizer)
    run.progress["step"] = stage.steps // 2
    batches = run.batches(stage)

    def step():
        begun = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begun
        totals = run.totals(batch)
        run.backward(lambda micro: task.loss(stage, micro, totals), batch)
        nn.utils.clip_grad_norm_(run.params, 1.0)
        optimizer.step()
        run.progress["step"] += 1
        return waited
    return run, step


def seconds(step, device, n=5):
    begun = time.perf_counter()
    for _ in range(n):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / n


def median(times):
    return sorted(times)[len(times) // 2]


def utilisation(args):
    """The FLOP/s of a step over those of a large matrix product."""
    config, stage = CONFIGS[args.config], train.STAGES[args.config][-1]
    config = dataclasses.replace(config, layers=args.layers or config.layers)
    stage = dataclasses.replace(stage, batch=4 * stage.micro_batch or stage.batch, documents=args.documents)
    run, step = run_of(config, stage, args, adamw=args.layers is not None)
    bf16 = run.precision == "bfloat16"
    n = 8192 if args.device != "cpu" else 512
    a = torch.randn(n, n, device=args.device, dtype=torch.bfloat16 if bf16 else torch.float32)
    product = median([seconds(lambda: a @ a, args.device) for _ in range(5)])
    took = median([seconds(step, args.device, 2) for _ in range(args.rounds + 1)][1:])
    waited = sum(step() for _ in range(4)) / 4 / took
    p, frames = plan.plan(run.task.config, stage, 1, bf16, how=args.recompute), stage.batch * stage.frames
    flops = p.useful
    peak, size = 2 * n ** 3 / product, sum(p.numel() for p in run.params)
    print(f"{args.config}, {config.layers} layers, {size / 1e6:.1f} M parameters, {args.device}, "
          f"{run.precision}, {stage.batch} x {stage.frames} frames: {1000 * took:.0f} ms a step, "
          f"{frames / took:.0f} frames/s, "
          f"{ROWS * frames / took:.0f} tokens/s; {flops / took / 1e12:.3f} of {peak / 1e12:.3f} TFLOP/s, "
          f"those of a product of {n} x {n}: {flops / took / peak:.0%}; it waits for batches "
          f"{waited:.1%} of the time")
    name = torch.cuda.get_device_name() if args.device != "cpu" else ""
    for card in (card for card in plan.BF16 if card in name):
        expected = plan.seconds_of(p, 1, card, args.float8)
        print(f"of the data sheet's {plan.BF16[card][0] / 1e12:.0f} TFLOP/s: "
              f"{flops / took / plan.BF16[card][0]:.0%}; --plan reckons "
              f"{flops / sum(expected.values()) / plan.BF16[card][0]:.0%}: "
              + ", ".join(f"{1000 * t:.0f} ms {what}" for what, t in expected.items()))


def compare(args):
    stage = train.STAGES["tiny"][-1]
    ours, our_step = run_of(CONFIGS["tiny"], stage, args, adamw=True)
    plain = Plain(ours.task.config).to(args.device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, betas=(0.9, 0.98))
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (ours.task.model, plain)]
    print(f"ours {sizes[0]:.2f} M parameters, plain {sizes[1]:.2f} M; {stage.batch} x {stage.frames} frames; "
          f"{args.device}, {torch.get_num_threads()} threads, {ours.precision}, torch {torch.__version__}")
    batches = ours.batches(stage)

    def plain_step():
        grid = next(batches)[0].to(args.device)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=ours.uses_autocast()):
            loss = plain.loss(grid, ours.task.vocab, stage)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()

    rows = [(seconds(plain_step, args.device), seconds(our_step, args.device))
            for _ in range(args.rounds + 1)][1:]  # the first warms up
    frames = stage.batch * stage.frames
    for name, times in zip(("plain", "ours"), zip(*rows)):
        t = median(times)
        print(f"{name:6} {1000 * t:7.0f} ms a step   {frames / t:7.0f} frames/s   "
              f"{ROWS * frames / t:8.0f} tokens/s")
    ratios = sorted(a / b for a, b in rows)
    print(f"ours is {median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f} "
          f"over {len(ratios)} rounds)\n")
    show_profile(ours, our_step)


def show_profile(run, step):
    """The operations that take the most time, on one thread, because a profile sees only one."""
    run.micro_batches, run.threads = 1, None
    with profile() as p:
        for _ in range(3):
            step()
    times = {e.key: e.self_cpu_time_total + getattr(e, "self_device_time_total", 0) for e in p.key_averages()}
    total = sum(times.values())
    print("where our time goes, in one micro-batch:")
    for name, t in sorted(times.items(), key=lambda kv: -kv[1])[:12]:
        print(f"  {name:44} {t / total:6.1%}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="data/toy/encoded")
    parser.add_argument("--rounds", type=int, default=8, help="of five steps of each of the two")
    parser.add_argument("--config", choices=CONFIGS, help="instead: the utilisation of this size")
    parser.add_argument("--layers", type=int, help="of the temporal transformer, with --config")
    parser.add_argument("--recompute", choices=CHOICES, help="with --config, as the next two: see train.py")
    parser.add_argument("--float8", action="store_true")
    parser.add_argument("--documents", action="store_true")
    args = parser.parse_args()
    try:
        check_device(args.device)
        if not os.path.exists(os.path.join(args.data, "meta.json")):
            raise ValueError(f"{args.data}: not there; needs what `make demo` leaves")
        if not args.config and not importlib.util.find_spec("transformers"):
            raise ValueError("needs the package transformers, which `make slow` installs")
        utilisation(args) if args.config else compare(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
