"""Estimates memory and time of a training before it starts: `python train.py --config 7b --plan --gpus 8`.

The forward and backward pass of one layer and of one piece of the losses run on PyTorch's meta device, where
tensors have shapes but no memory. The FLOPs of each operation are counted, and so are the bytes of the
activations saved for the backward pass. How long they take is reckoned from data sheets and from the shares
of them that are usual (REACHED), unless --utilisation is given; `make gpu` measures it.
"""
import dataclasses
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model
from streams import K
from training import lora, recompute

# peak FLOP/s in bfloat16 and bytes of memory, from the data sheets
BF16 = {"H200": (989e12, 141e9), "H100": (989e12, 80e9), "A100": (312e12, 80e9), "4090": (165e12, 24e9)}
# bytes a second of the memory, and to the other cards
SPEED = {"H200": (4.8e12, 450e9), "H100": (3.35e12, 450e9), "A100": (2.0e12, 300e9), "4090": (1.0e12, 25e9)}
REACHED = {"temporal": 0.7,  # of the peak, by products of thousands of rows; a card slows down when it is hot
           "float8": 1.0,  # twice as fast, less the scaling of both factors
           "depth": 0.45,  # a product for each of the eight positions, of some thousand rows
           "memory": 0.8, "links": 0.6}


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
    depth: float  # of the FLOPs, those of the depth transformer
    traffic: float  # bytes that a GPU reads and writes between its products, and by the optimiser
    exchanged: float  # bytes that a GPU gets from the others

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


class Kept(TorchDispatchMode):
    """Counts the numbers that selective recomputation keeps."""
    numbers = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.numbers += out.numel() if op in recompute.KEPT and torch.is_tensor(out) else 0
        return out


def cost(f, device, bf16, selective=False):
    """The Cost of f(), which returns a tensor."""
    saved, autocast = {}, torch.autocast("cpu" if device == "meta" else device, torch.bfloat16, enabled=bf16)

    def save(x):
        if not isinstance(x, torch.nn.Parameter):
            saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes(), x
        return x
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x), autocast, Kept() as kept:
            y = f()
        forward, size = counter.get_total_flops(), sum(n for n, _ in saved.values())
        size += kept.numbers * (2 if bf16 else 4) * selective
        y.sum().backward()
    return Cost(counter.get_total_flops(), forward, size)


def build(config, rank, bf16, device="meta"):
    """A model without memory; rank: of its adapters, or 0 for none."""
    with torch.device(device):
        flm = model.FLM(config)
    if rank:
        lora.add_adapters(lora.halve(flm) if bf16 else flm, rank)
    return flm


def measure(config, how, rows, T, share, bf16, device="meta", rank=0):
    """The Costs of `rows` rows of T frames: (all but the depth transformer, the depth transformer), which
    `share` of the frames enter. how: of recompute.CHOICES. All layers cost the same, and so do all pieces of
    the losses, so the cost of one more gives the cost of all."""
    def temporal(layers):
        flm = build(dataclasses.replace(config, layers=layers), rank, bf16, device)
        flm.recompute = how == "all"
        flm = recompute.selective(flm) if how == "selective" else flm
        grid = torch.zeros(rows, 1 + 2 * K, T, dtype=torch.long, device=device)
        return flm, cost(lambda: flm.hidden(grid), device, bf16, how == "selective")
    (flm, one), (_, two) = temporal(1), temporal(2)
    costs = [one + (two + one * -1) * (config.layers - 1), Cost(0, 0, 0)]
    text = flm.text_losses, rows * T, model.pieces_of_text(config), ()
    codes = flm.depth, round(share * rows * T), model.pieces_of_codes(config), (K,)
    for part, (losses, n, at_once, shape) in enumerate((text, codes)):
        some = n if n <= at_once else 2 * at_once
        h = torch.zeros(some, config.width, device=device, requires_grad=True)
        right = torch.zeros(some, *shape, dtype=torch.long, device=device)
        loss = cost(lambda: losses(h, right)[:, 0], device, bf16) * (n / some)
        costs[part] += loss if n <= at_once else dataclasses.replace(loss, saved=0)
    return costs


def plan(config, stage, gpus, bf16=True, eight_bit=False, rank=0, how=None):
    """The Plan for one stage of training on a number of GPUs. eight_bit: see training/muon.py; rank: see
    training/lora.py; how: of recompute.CHOICES."""
    how = how or ("all" if stage.recompute else "nothing")
    flm = build(config, rank, bf16)
    rows = stage.micro_batch or stage.batch // gpus or 1
    share = 0.5 * (stage.depth[0] + stage.depth[1])  # about half of the frames are speech
    others, depth = measure(config, how, rows, stage.frames, share, bf16, rank=rank)
    each = others + depth
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
    useful = 3 * each.forward
    if rank:
        others, depth = measure(config, "all", rows, stage.frames, share, bf16, rank=rank)
        useful = (others + depth).flops - each.forward
    # The norms, rotations and activations of a layer, forward and backward, compiled: some 20 numbers of its
    # width and 5 of its MLP's. The optimiser reads and writes weight, gradient and two states.
    between = 3 * rows * stage.frames * config.layers * (20 * config.width + 5 * config.mlp) * size
    between *= 1 if how == "nothing" else 4 / 3
    return Plan(parts_of(flm), weights=frozen + held * P / gpus, gathered=gathered, gradients=held * P / gpus,
                optimiser=2 * held * P / gpus * (0.5 if eight_bit else 1), activations=each.saved + working,
                frames=stage.batch * stage.frames, flops=each.flops * micro_batches,
                useful=useful * micro_batches, depth=depth.flops * micro_batches,
                traffic=between * micro_batches / gpus + 7 * held * P / gpus,
                exchanged=(2 * size + 4) * P * (1 - 1 / gpus) * micro_batches / gpus)


def seconds_of(p, gpus, card, in_float8):
    """{what: seconds of a step that it takes, at the shares of the data sheet that are usual}"""
    (peak, _), (memory, link) = BF16[card], SPEED[card]
    temporal = REACHED["float8" if in_float8 else "temporal"]
    out = {f"temporal transformer and text head, at {temporal:.0%} of the peak":
           (p.flops - p.depth) / (gpus * peak * temporal),
           f"depth transformer, at {REACHED['depth']:.0%}": p.depth / (gpus * peak * REACHED["depth"]),
           "norms, activations, optimiser: memory": p.traffic / (memory * REACHED["memory"])}
    waits = p.exchanged / (link * REACHED["links"]) - sum(out.values())  # it goes on beside the computing
    return out | ({"waiting for the other GPUs": waits} if waits > 0 else {})


def show(args, config, stages):
    gpus, card, (peak, room) = args.gpus, args.card, BF16[args.card]
    print(f"{args.config} on {gpus} x {card}: {peak / 1e12:.0f} TFLOP/s in bfloat16 and {room / 1e9:.0f} GB "
          "each (data sheets)\n")
    plans = {}
    for i, stage in enumerate(stages):
        same = dataclasses.replace(stage, name="", steps=0, epochs=0, lr=0, lr_end=0, layouts=None)
        p = plans[same] = plans.get(same) or plan(config, same, gpus, True, args.eight_bit, args.lora,
                                                  args.recompute)
        expected = seconds_of(p, gpus, card, args.float8)
        reckoned = p.useful / (gpus * peak * sum(expected.values()))
        utilisation = args.utilisation or reckoned
        if i == 0:
            for part, n in p.parameters.items():
                print(f"  {part:26} {n / 1e6:10.1f} M parameters")
            print(f"  {'all':26} {sum(p.parameters.values()) / 1e6:10.1f} M\n\n  memory of each GPU, in GB")
            titles = {"gathered": "gathered parameters", "optimiser": "optimiser states"}
            for part in ("weights", "gathered", "gradients", "optimiser", "activations"):
                print(f"  {titles.get(part, part):26} {getattr(p, part) / 1e9:10.2f}")
            fits = "fits" if p.bytes < 0.92 * room else "does not fit"
            print(f"  {'all':26} {p.bytes / 1e9:10.2f}: {fits} in {room / 1e9:.0f}\n")
            print(f"  utilisation {utilisation:.0%}" + (" (given)\n" if args.utilisation else
                                                       ", reckoned from the seconds of a step:"))
            for what, seconds in {} if args.utilisation else expected.items():
                print(f"  {seconds:12.3f}  {what}")
            print(f"\n  {'':26} {'FLOPs a step':>13} {'time':>10} {'frames/s':>10} {'days':>8}")
        seconds = p.useful / (gpus * peak * utilisation)
        days = seconds * stage.steps / 86400
        print(f"  {stage.name:26} {p.flops / 1e15:7.2f} PFLOP {seconds:8.2f} s {p.frames / seconds:10.0f} "
              f"{days:8.2f}")
    print(f"\n  {p.useful / p.frames / 1e9:.1f} GFLOP a frame (17 tokens), {p.flops / p.useful - 1:.0%} more "
          "for activation checkpointing")
