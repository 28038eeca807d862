"""How fast training is: our step beside the same model in the plain style of the transformers library, and where our time goes.

    python tests/bench_train.py                         after `make demo`: `tiny` on its own data
    python tests/bench_train.py --device cuda           the same on a GPU, in bfloat16
    python tests/bench_train.py --config 7b --layers 8 --device cuda        how much of the machine a size uses, with as many
                                                        layers as fit: FLOPs as `--plan` counts them, over those of one large product

The plain model is transformers' Qwen2Model under the sum of 17 embeddings, and a depth transformer whose positions' MLPs are a
list of modules and which sees every frame. Same sizes, batches, loss weights, optimiser (AdamW) and precision; both in turn.
It needs the packages that `make slow` installs.
"""
import argparse
import dataclasses
import os
import random
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
from model import CONFIGS  # noqa: E402
from streams import K, ROWS, SPEAK, TEXT  # noqa: E402


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
        return x + torch.stack([self.down[k](F.silu(self.gate[k](y[:, k])) * self.up[k](y[:, k])) for k in range(K)], 1)


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
        x = self.temporal.embed_tokens(given[:, TEXT]) + sum(e(given[:, 1 + i]) for i, e in enumerate(self.audio))
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
            ce = F.cross_entropy(self.heads[k](x[:, k]).float(), codes[:, k], reduction="none", ignore_index=v.empty)
            loss = loss + (train.ALPHA_1 if k == 0 else train.ALPHA_2 / (K - 1)) * ce.sum() / (codes[:, k] != v.empty).sum().clamp(min=1)
        return loss


def run_of(config, stage, device, adamw=False):
    """(task, Run) in the middle of a stage, on the demo's data."""
    torch.manual_seed(1)
    task = train.ModelTask(config, "data/toy/encoded", device)
    task.from_nothing = not adamw
    with tempfile.TemporaryDirectory() as folder:
        run = train.Run(task, [stage], folder)
    run.at["step"] = stage.steps // 2
    return task, run


def seconds(step, device, n=5):
    begun = time.perf_counter()
    for i in range(n):
        step(i)
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / n


def middle(times):
    return sorted(times)[len(times) // 2]


def use(args):
    config, stage = CONFIGS[args.config], train.STAGES[args.config][-1]
    config = dataclasses.replace(config, layers=args.layers or config.layers)
    stage = dataclasses.replace(stage, batch=4 * stage.rows or stage.batch)
    task, run = run_of(config, stage, args.device, adamw=stage.rows > 0)
    bf16 = run.at["bf16"]
    n = 8192 if bf16 else 2048
    a = torch.randn(n, n, device=args.device, dtype=torch.bfloat16 if bf16 else torch.float32)
    product = middle([seconds(lambda _: a @ a, args.device) for _ in range(5)])
    took = middle([seconds(lambda _: run.step(), args.device, 2) for _ in range(args.rounds + 1)][1:])
    flops, frames = plan.plan(task.config, stage, 1, bf16).useful, stage.batch * stage.frames
    peak = 2 * n ** 3 / product
    print(f"{args.config}, {config.layers} layers, {sum(p.numel() for p in task.model.parameters()) / 1e6:.1f} M parameters, "
          f"{stage.batch} x {stage.frames} frames, {args.device}, {'bfloat16' if bf16 else 'float32'}: {1000 * took:.0f} ms a step, "
          f"{frames / took:.0f} frames/s, {ROWS * frames / took:.0f} tokens/s; {flops / took / 1e12:.3f} of {peak / 1e12:.3f} TFLOP/s, "
          f"that of a product of {n} x {n}: {flops / took / peak:.0%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=8, help="of five steps for each of the two")
    parser.add_argument("--config", choices=CONFIGS, help="how much of the machine this size uses, instead")
    parser.add_argument("--layers", type=int, help="of the temporal transformer, with --config")
    args = parser.parse_args()
    if args.config:
        return use(args)
    stage = train.STAGES["tiny"][-1]
    task, ours = run_of(CONFIGS["tiny"], stage, args.device, adamw=True)
    plain = Plain(task.config).to(args.device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, betas=(0.9, 0.98))
    size = lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    print(f"ours {size(task.model):.2f} M parameters, plain {size(plain):.2f} M; {stage.batch} x {stage.frames} frames; {args.device}, "
          f"{torch.get_num_threads()} threads, {'bfloat16' if ours.at['bf16'] else 'float32'}, torch {torch.__version__}")

    def plain_step(n):
        grid = task.batch(stage, 0.5, "train", random.Random(n)).to(args.device)
        with ours.autocast():
            loss = plain.loss(grid, task.vocab, stage)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()

    rows = [(seconds(plain_step, args.device), seconds(lambda n: ours.step(), args.device))
            for _ in range(args.rounds + 1)][1:]  # the first warms up
    frames = stage.batch * stage.frames
    for name, times in zip(("plain", "ours"), zip(*rows)):
        t = middle(times)
        print(f"{name:6} {1000 * t:7.0f} ms a step   {frames / t:7.0f} frames/s   {ROWS * frames / t:8.0f} tokens/s")
    ratios = sorted(a / b for a, b in rows)
    print(f"ours is {ratios[len(ratios) // 2]:.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds)\n")
    ours.at["slices"], ours.threads = 1, None  # a profile sees one thread
    with profile() as p:
        for _ in range(3):
            ours.step()
    times = {e.key: e.self_cpu_time_total + getattr(e, "self_device_time_total", 0) for e in p.key_averages()}
    total = sum(times.values())
    print("where our time goes, in one slice:")
    for name, t in sorted(times.items(), key=lambda kv: -kv[1])[:12]:
        print(f"  {name:44} {t / total:6.1%}")


if __name__ == "__main__":
    main()
