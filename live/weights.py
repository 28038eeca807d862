"""How a model's weights lie in memory while it talks. A step reads them all, and that is most of its time.

    by_columns     float32 on a CPU: the same numbers, in the order in which its product of one row is fastest
    int8           on a CPU: a matrix (N, K) becomes integers from -127 to 127 and a scale for each row, an
                   output channel; a quarter of the bytes
    float8         on a GPU: the same with e4m3, numbers up to 448 of three bits after the point; half of
                   bfloat16's bytes

Embeddings (a step reads one row of each), norms and heads (whose logits decide) stay as they are. A model in
eight bits cannot be trained, and is not for a checkpoint.

N outputs, K inputs of a matrix (in DepthBlock K is the number of codes), B rows.
"""
import torch
import torch.nn.functional as F
from torch import nn

from model import DepthBlock, SwiGLU

E4M3 = torch.float8_e4m3fn


def by_columns(model):
    """A CPU's product of one row reads a matrix with more outputs than inputs twice as fast by columns."""
    for m in model.modules():
        if type(m) is nn.Linear and m.weight.dtype == torch.float32 and m.out_features > m.in_features:
            m.weight.data = m.weight.data.T.contiguous().T


def quantise(model, kind):
    """The model's matrices in eight bits, in place. kind: int8 or float8. ValueError if this device is not
    made for it."""
    device = model.head.weight.device
    if kind == "int8" and device.type != "cpu":
        raise ValueError("--weights int8: is for CPUs; a GPU needs --weights float8")
    if kind == "float8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ValueError("--weights float8: needs a GPU that multiplies such numbers (Ada, Hopper or newer); "
                         "CPUs have --weights int8")
    replace_matrices(model, {"int8": Int8Linear, "float8": Float8Linear}[kind])


@torch.no_grad()
def replace_matrices(model, linear):
    """On a GPU not the depth transformer's: they are 6% of a frame's bytes."""
    for block in model.blocks:
        for holder, name in (block, "qkv"), (block, "out"), (block.mlp, "gate_up"), (block.mlp, "down"):
            m = getattr(holder, name)
            setattr(holder, name, linear(m.weight, m.bias))
    if linear is Int8Linear:
        model.depth.from_h = linear(model.depth.from_h.weight)
        model.depth.blocks = nn.ModuleList(Int8DepthBlock(block) for block in model.depth.blocks)
    model._register_state_dict_hook(refuse)


def refuse(*_):
    raise RuntimeError("a model whose weights have eight bits is not to be saved")


class Int8Linear(nn.Module):
    """In place of nn.Linear on a CPU. PyTorch's kernel needs AVX2 or AVX-512, but no bfloat16 instructions,
    although the inputs become bfloat16."""

    def __init__(self, weight, bias=None):
        super().__init__()
        weight = F.pad(weight.float(), (0, -weight.shape[1] % 16))  # the kernel reads 16 at a time
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.weight = nn.Buffer((weight / scale[:, None]).round().to(torch.int8).contiguous())
        self.scale, self.bias = nn.Buffer(scale.bfloat16()), bias

    def forward(self, x):
        rows = x.to(torch.bfloat16).flatten(0, -2)
        if rows.shape[1] < self.weight.shape[1]:
            rows = F.pad(rows, (0, self.weight.shape[1] - rows.shape[1]))
        y = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale).to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class Int8DepthBlock(DepthBlock):
    """For one position at a time, in a conversation."""

    def __init__(self, block):
        nn.Module.__init__(self)
        self.H, self.norm1, self.norm2 = block.H, block.norm1, block.norm2
        self.qkv, self.out = Int8Linear(block.qkv.weight), Int8Linear(block.out.weight)
        self.mlps = nn.ModuleList(SwiGLU(1, 1) for _ in block.down)
        for mlp, gate_up, down in zip(self.mlps, block.gate_up, block.down):
            mlp.gate_up, mlp.down = Int8Linear(gate_up.T), Int8Linear(down.T)

    def mlp(self, x, k0, weights=None):
        assert x.shape[1] == 1, x.shape
        return self.mlps[k0](x)


class Float8Linear(nn.Module):
    """In place of nn.Linear on a GPU."""

    def __init__(self, weight, bias=None):
        super().__init__()
        q, scale = in_float8(weight)
        self.weight, self.scale, self.bias = nn.Buffer(q), nn.Buffer(scale[:, 0]), bias

    def forward(self, x):
        if x.numel() == x.shape[-1] and torch.compiler.is_compiling():
            # torch.compile makes one kernel of it that reads each weight once, as eight bits.
            y = (self.weight.float() * x.flatten().float()).sum(1) * self.scale
        else:  # tensor cores multiply eight bits; each row gets a scale, too
            q, scale = in_float8(x.flatten(0, -2))
            y = torch._scaled_mm(q, self.weight.T, scale, self.scale[None], out_dtype=torch.bfloat16)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def in_float8(x):
    """x (N, K) -> numbers in float8 and their scales (N, 1)."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(E4M3).max
    return (x / scale).to(E4M3), scale
