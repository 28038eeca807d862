"""Estimates memory and time of a training before it starts: `python train.py --config 7b --plan --gpus 8`.

The forward and backward pass of one layer and of one piece of the losses run on PyTorch's meta device, where
tensors have shapes but no memory. The FLOPs of each operation are counted, and so are the bytes of the
activations saved for the backward pass.
"""
import dataclasses
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

import model
from streams import K
from training import lora

# peak FLOP/s in bfloat16 and bytes of memory, from the data sheets
BF16 = {"H200": (989e12, 141e9), "H100": (989e12, 80e9), "A100": (312e12, 80e9), "4090": (165e12, 24e9)}


@dataclass
class Plan:
    """Memory in bytes on one GPU; frames and FLOPs of one optimiser step on all GPUs together."""
    parameters: dict  # {part of the model: number of parameters}
    weights: float  # this GPU's shard, in float32; in bfloat16 with --eight-bit
    gathered: float  # gathered parameters: bfloat16 copies of the weights in use
    gradients: float
    optimiser: float
    activations: float
    frames: int
    flops: float  # including the recomputation of activation checkpointing
    useful: float  # without it

    @property
    def bytes(self):
        return self.weights + self.gathered + self.gradients + self.optimiser + self.activations


def parts_of(flm):
    """{part of the model: number of parameters}"""
    text, audio = "text embedding and head", "audio embeddings"
    temporal, depth = "temporal transformer", "depth transformer"
    adapters = "low-rank adapters"
    out = dict.fromkeys((text, audio, temporal, depth), 0)
    where = {"text": text, "head": text, "speak": audio, "listen": audio, "blocks": temporal,
             "norm": temporal, "depth": depth}
    for name, p in flm.named_parameters():
        part = adapters if name.endswith((".a", ".b")) else where[name.split(".")[0]]
        out[part] = out.get(part, 0) + p.numel()
    return out


@dataclass
class Cost:
    """Of one forward and one backward pass."""
    flops: float  # including the recomputation of activation checkpointing
    forward: float  # FLOPs of the forward pass alone
    saved: float  # bytes of the activations saved for the backward pass

    def __add__(self, other):
        return Cost(self.flops + other.flops, self.forward + other.forward, self.saved + other.saved)

    def __mul__(self, n):
        return Cost(self.flops * n, self.forward * n, self.saved * n)


def cost(f, device, bf16):
    """The Cost of f(), which returns a tensor."""
    saved, autocast = {}, torch.autocast("cpu" if device == "meta" else device, torch.bfloat16, enabled=bf16)

    def save(x):
        if not isinstance(x, torch.nn.Parameter):
            saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes(), x
        return x
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x), autocast:
            y = f()
        forward, size = counter.get_total_flops(), sum(n for n, _ in saved.values())
        y.sum().backward()
    return Cost(counter.get_total_flops(), forward, size)


def build(config, rank, bf16, device="meta"):
    """A model without memory; rank: of its adapters, or 0 for none."""
    with torch.device(device):
        flm = model.FLM(config)
    if rank:
        lora.add_adapters(lora.halve(flm) if bf16 else flm, rank)
    return flm


def measure(config, recompute, rows, T, share, bf16, device="meta", rank=0):
    """The Cost of `rows` rows of T frames; `share` of the frames enter the depth transformer. All layers cost
    the same, and so do all pieces of the losses, so the cost of one more gives the cost of all."""
    def temporal(layers):
        flm = build(dataclasses.replace(config, layers=layers), rank, bf16, device)
        flm.recompute = recompute
        grid = torch.zeros(rows, 1 + 2 * K, T, dtype=torch.long, device=device)
        return flm, cost(lambda: flm.hidden(grid), device, bf16)
    (flm, one), (_, two) = temporal(1), temporal(2)
    total = one + (two + one * -1) * (config.layers - 1)
    text = flm.text_losses, rows * T, model.pieces_of_text(config), ()
    codes = flm.depth, round(share * rows * T), model.pieces_of_codes(config), (K,)
    for losses, n, at_once, shape in (text, codes):
        some = n if n <= at_once else 2 * at_once
        h = torch.zeros(some, config.width, device=device, requires_grad=True)
        right = torch.zeros(some, *shape, dtype=torch.long, device=device)
        loss = cost(lambda: losses(h, right)[:, 0], device, bf16) * (n / some)
        total += loss if n <= at_once else dataclasses.replace(loss, saved=0)
    return total


def plan(config, stage, gpus, bf16=True, eight_bit=False, rank=0):
    """The Plan for one stage of training on a number of GPUs. eight_bit: see training/muon.py; rank: see
    training/lora.py."""
    flm = build(config, rank, bf16)
    rows = stage.micro_batch or stage.batch // gpus or 1
    share = 0.5 * (stage.depth[0] + stage.depth[1])  # about half of the frames are speech
    each = measure(config, stage.recompute, rows, stage.frames, share, bf16, rank=rank)
    P, size = sum(p.numel() for p in flm.parameters() if p.requires_grad), 2 if bf16 else 4
    frozen = sum(p.numel() * p.element_size() for p in flm.parameters() if not p.requires_grad)
    block = sum(p.numel() for p in flm.blocks[0].parameters() if p.requires_grad)
    rest = P - block * len(flm.blocks)
    # One block is computed while the next is gathered; embeddings, head and depth transformer stay gathered
    # for the whole step.
    gathered = size * (2 * block + rest) if gpus > 1 else size * (block + rest) * (bf16 and not eight_bit)
    held = 2 if eight_bit else 4
    losses = 3 * 4 * min(model.PIECE, rows * stage.frames * config.vocab_size)
    working = rows * stage.frames * (4 * config.mlp + 8 * config.width) * size + losses
    micro_batches = stage.batch / rows
    # a backward pass is twice a forward pass, less where frozen weights need no gradients
    useful = each.flops - each.forward * stage.recompute if rank else 3 * each.forward
    return Plan(parts_of(flm), weights=frozen + held * P / gpus, gathered=gathered, gradients=held * P / gpus,
                optimiser=2 * held * P / gpus * (0.5 if eight_bit else 1), activations=each.saved + working,
                frames=stage.batch * stage.frames, flops=each.flops * micro_batches,
                useful=useful * micro_batches)


def show(name, config, stages, gpus, card, utilisation, eight_bit, rank=0):
    peak, room = BF16[card]
    print(f"{name} on {gpus} x {card}: {peak / 1e12:.0f} TFLOP/s in bfloat16 and {room / 1e9:.0f} GB each "
          f"(data sheets), {utilisation:.0%} utilisation (assumed)\n")
    plans = {}
    for i, stage in enumerate(stages):
        same = dataclasses.replace(stage, name="", steps=0, epochs=0, lr=0, lr_end=0, layouts=None)
        p = plans[same] = plans.get(same) or plan(config, same, gpus, eight_bit=eight_bit, rank=rank)
        if i == 0:
            for part, n in p.parameters.items():
                print(f"  {part:26} {n / 1e6:10.1f} M parameters")
            print(f"  {'all':26} {sum(p.parameters.values()) / 1e6:10.1f} M\n\n  memory of each GPU, in GB")
            titles = {"gathered": "gathered parameters", "optimiser": "optimiser states"}
            for part in ("weights", "gathered", "gradients", "optimiser", "activations"):
                print(f"  {titles.get(part, part):26} {getattr(p, part) / 1e9:10.2f}")
            fits = "fits" if p.bytes < 0.92 * room else "does not fit"
            print(f"  {'all':26} {p.bytes / 1e9:10.2f}: {fits} in {room / 1e9:.0f}\n")
            print(f"  {'':26} {'FLOPs a step':>13} {'time':>10} {'frames/s':>10} {'days':>8}")
        seconds = p.useful / (gpus * peak * utilisation)
        days = seconds * stage.steps / 86400
        print(f"  {stage.name:26} {p.flops / 1e15:7.2f} PFLOP {seconds:8.2f} s {p.frames / seconds:10.0f} "
              f"{days:8.2f}")
    print(f"\n  {p.useful / p.frames / 1e9:.1f} GFLOP a frame (17 tokens), {p.flops / p.useful - 1:.0%} more "
          "for activation checkpointing")
