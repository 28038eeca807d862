"""Low-rank adapters (LoRA; Hu et al., 2021): a large model learns something new on one GPU.

    y = W x + 2 B A x        W (out, in) is frozen, in bfloat16; A (r, in) and B (out, r) learn, B from zero

Adapters are on every matrix of the temporal transformer, and on the text embedding and the text head: the
monologue's tokens <wait>, <asr> and <answer> are new to a language model. What hears and speaks, the audio
embeddings and the depth transformer, learns whole: a language model has neither, and in the 7B model they are
only a fourteenth of the parameters. Biases and norms stay as they are.

A checkpoint holds the merged weights W + 2 B A, so it is read like any other, and beside them A and B. A run
goes on from those and from the W of --init, to the same weights as one that was not stopped.
"""
import torch
import torch.nn.functional as F
from torch import nn

from files.checkpoint import load_weights
from model import rng_for

SCALE = 2.0
ADAPTED = ("text", "blocks", "head")  # the parts of an FLM that are frozen and get adapters


class LowRankLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.a), self.b) * SCALE


class LowRankEmbedding(nn.Embedding):
    def forward(self, x):
        return super().forward(x) + F.linear(F.embedding(x, self.b), self.a.T) * SCALE


KINDS = {nn.Linear: LowRankLinear, nn.Embedding: LowRankEmbedding}


def matrices(flm):
    """[(name, module)] of what gets adapters."""
    return [(name, module) for name, module in flm.named_modules()
            if name.split(".")[0] in ADAPTED and isinstance(module, tuple(KINDS))]


def halve(flm):
    """The matrices that will be frozen, in bfloat16: half the memory."""
    for _, module in matrices(flm):
        module.bfloat16()
    return flm


@torch.no_grad()
def add_adapters(flm, rank, seed=0):
    """Freeze the model but for its audio parts, and add adapters, which change nothing yet. A tied text head
    shares those of the text embedding."""
    if rank < 1:
        raise ValueError(f"--lora {rank}: the rank of the adapters is at least 1")
    for name, p in flm.named_parameters():
        p.requires_grad_(name.split(".")[0] not in (*ADAPTED, "norm"))
    for name, module in matrices(flm):
        rows, columns = module.weight.shape
        a = torch.empty(rank, columns, device=module.weight.device)
        if not a.is_meta:
            a.normal_(0.0, columns ** -0.5, generator=rng_for(name, seed, a.device))
        module.__class__ = KINDS[type(module)]  # the same layer with another forward
        module.a, module.b = nn.Parameter(a), nn.Parameter(torch.zeros(rows, rank, device=a.device))
    if flm.config.tied:
        flm.head.a, flm.head.b = flm.text.a, flm.text.b
    return flm


def adapters(flm):
    """{name: A or B}; empty for a model without adapters."""
    return {f"{name}.{x}": getattr(module, x) for name, module in matrices(flm) if hasattr(module, "a")
            for x in "ab"}


@torch.no_grad()
def merged(flm):
    """The weights of the same model without adapters: {name: tensor}, the merged ones in main memory."""
    weights = {name: w for name, w in flm.state_dict().items() if name not in adapters(flm)}
    for name, module in matrices(flm):
        if hasattr(module, "a"):
            whole = module.weight.float() + SCALE * (module.b @ module.a)
            weights[name + ".weight"] = whole.to(module.weight.dtype).cpu()
    if flm.config.tied:
        weights["head.weight"] = weights["text.weight"]
    return weights


def state(flm):
    """What a checkpoint holds of a model, with adapters or without."""
    found = adapters(flm)
    return {"model": merged(flm), "lora": found} if found else {"model": flm.state_dict()}


@torch.no_grad()
def load(flm, saved, where):
    """Set a model, with adapters or without, from what `state` returned. Raises ValueError if it was of a
    model with other adapters, or with another W."""
    ours, theirs = adapters(flm), saved.get("lora", {})
    if {name: x.shape for name, x in ours.items()} != {name: x.shape for name, x in theirs.items()}:
        rank = len(next(iter(theirs.values()))) if theirs else 0
        raise ValueError(f"{where}: was trained with --lora {rank}; give the same" if theirs else
                         f"{where}: was trained without --lora")
    if not ours:
        return load_weights(flm, saved["model"], where)
    for name, p in flm.named_parameters():
        if p.requires_grad:
            p.copy_(theirs[name] if name in theirs else saved["model"][name])
    for name, w in merged(flm).items():
        found = saved["model"][name]
        if found.dtype != w.dtype:
            precision = "bfloat16" if found.dtype == torch.bfloat16 else "float32"
            raise ValueError(f"{where}: was trained in {precision}; --precision {precision} goes on with it")
        rounding = 0.01 if found.dtype == torch.bfloat16 else 1e-4  # of another device
        if not torch.allclose(w.cpu().float(), found.float(), rtol=rounding, atol=1e-6):
            raise ValueError(f"{where}: was trained from another --init ({name} differs)")
