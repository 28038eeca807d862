"""chat.py's step with all that it reads and writes as inputs and outputs, so that it can become a graph.

    wav (1, 1, 1920), uniforms (1, 1 + K), state... -> text (1,), said (1, 1, 1920), state...

It is the same code but for four places: the temporal transformer reads its whole rings, Fourier transforms
are matrix products, rotations are written without complex numbers, and the sampler's integers are kept in
float64, which holds those below 2^53 exactly. Its random numbers, uniforms (float64, in [0, 1)), come from
outside: they are a function of seed, step and draw (kernels/sampling.py).

E channels of a head, K codebooks, T steps, V vocabulary.
"""
import copy
import dataclasses
import math
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import mimi
from chat import DuplexModel
from files.spectrogram import WINDOW, InverseFourier, LogMel
from kernels.sampling import POWERS, penalise, scale
from model import rotary


class ExportedStep(nn.Module):
    """A step of one conversation. `start` is the state at its beginning, {name: tensor}."""

    def __init__(self, duplex: DuplexModel):
        super().__init__()
        self.duplex = StatelessModel(duplex)
        self.flm, self.codec = self.duplex.model, self.duplex.codec
        self.template = self.duplex.init_state([0])
        self.start = dict(leaves(self.template))

    @torch.no_grad()
    def forward(self, wav, uniforms, state):
        """state: a list of tensors, in the order of `start`. Returns (text, said, the next state)."""
        values = dict(zip(self.start, state, strict=True))
        now = filled(self.template, values)
        self.duplex.uniforms = uniforms
        with mock.patch.multiple(mimi, rotary=codec_rotary, rotate=codec_rotate):
            text, said = DuplexModel.step.__wrapped__(self.duplex, wav, now)
        return text, said, list(dict(leaves(now)).values())


class StatelessModel(DuplexModel):
    """A DuplexModel on the CPU whose step can be traced."""

    def __init__(self, duplex):
        vars(self).update(vars(duplex))
        self.model, self.codec = copy.deepcopy(duplex.model).float(), copy.deepcopy(duplex.codec).float()
        self.model.hidden_step = self.hidden_step
        for parent in list(self.codec.modules()):
            for name, layer in parent.named_children():
                if type(layer) in MATRICES:
                    setattr(parent, name, MATRICES[type(layer)](layer))

    def hidden_step(self, column, cache):
        """FLM.hidden_step with shapes that do not depend on the position."""
        model, position, C = self.model, cache.position, self.model.config.context
        cos, sin = (y[:, None, None] for y in rotary(position, model.blocks[0].E, model.config.rope_base))
        mask = (torch.arange(C) <= position[:, None])[:, None, None]
        x = model.embed(column[..., None])
        for block, layer in zip(model.blocks, cache.layers):
            x = block(x, cos, sin, layer, position % C, mask)
        cache.position += 1
        return model.norm(x[:, 0])

    def draw(self, logits, how, row, recent, state):
        """DuplexModel.draw with random numbers from outside."""
        return draw(logits, how, self.uniforms[:, row], recent)


# ------------------------------------------------------------------------------------------------------------
# the state as a flat list


def leaves(state, name="state"):
    """(name, tensor) of all tensors of a nested state that are not empty."""
    if isinstance(state, torch.Tensor):
        if state.numel():
            yield name, state
    elif dataclasses.is_dataclass(state):
        yield from leaves(vars(state), name)
    elif state is not None:
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{name}.{key}")


def filled(state, values, name="state"):
    """A state of the same form with copies of the tensors in values {name: tensor}."""
    if isinstance(state, torch.Tensor):
        return values[name].clone() if name in values else state
    if dataclasses.is_dataclass(state):
        return dataclasses.replace(state, **filled(vars(state), values, name))
    if isinstance(state, dict):
        return {key: filled(value, values, f"{name}.{key}") for key, value in state.items()}
    return state and [filled(value, values, f"{name}.{i}") for i, value in enumerate(state)]


# ------------------------------------------------------------------------------------------------------------
# the sampler


def draw(logits, s, uniform, recent):
    """kernels/sampling.py: reference(), with the integers in float64: logits (B, V), uniform (B,) -> (B,)."""
    x = penalise(logits.float(), s.penalty, recent)
    top, best = x.max(-1, keepdim=True)
    valid = top[:, 0].abs() < math.inf
    if s.temperature == 0:
        return torch.where(valid, best[:, 0], -1)
    w = weights(x - top, s.temperature)
    if 0 < s.top_k < w.shape[1]:
        w = w * (w >= w.topk(s.top_k).values[:, -1:])
    if s.top_p < 1:
        ranked = w.topk(w.shape[1]).values
        sums = ranked.cumsum(-1)
        last = (sums < (sums[:, -1:] * s.top_p).ceil()).sum(-1, keepdim=True)
        w = w * (w >= ranked.gather(1, last))
    sums = w.cumsum(-1)
    total = sums[:, -1]
    target = (uniform * total).floor().minimum(total - 1)
    return torch.where(valid, (sums <= target[:, None]).sum(-1), -1)


def weights(x, temperature):
    """kernels/sampling.py: weights(), in float64; a shift is a division by a power of two, rounded down."""
    y = x * scale(temperature)
    y = torch.where(y >= -32.0, y, -32.0)  # NaN too
    n = y.floor()
    f, p = y - n, POWERS[0]
    for c in POWERS[1:]:
        p = p * f + c
    powers = torch.tensor([2.0 ** -i for i in range(33)], dtype=torch.float64)
    return ((p * 2.0 ** 31).double() * powers[(-n).long()]).floor()


# ------------------------------------------------------------------------------------------------------------
# the codec's layers


def codec_rotary(position, D):
    """mimi.py: rotary(), as (cos, sin), (B, 1, T, D/2, 1) each."""
    rate = 10000 ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle = (position[..., None].double() * rate)[:, None, ..., None]
    return angle.cos().float(), angle.sin().float()


def codec_rotate(x, rotation):
    """mimi.py: rotate(). x (..., B, H, T, D)"""
    cos, sin = rotation
    a, b = x.unflatten(-1, (-1, 2)).split(1, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def fourier():
    """cos and sin of 2 pi k n / WINDOW, (WINDOW, bins) each. Looked up in one period, whose few numbers are
    all that the graph's file has to hold; the large matrices appear when it is loaded."""
    period = torch.arange(WINDOW, dtype=torch.float64) * (2 * math.pi / WINDOW)
    index = torch.arange(WINDOW)[:, None] * torch.arange(WINDOW // 2 + 1) % WINDOW
    return period.cos().float()[index], period.sin().float()[index]


class MatrixLogMel(nn.Module):
    """LogMel by a product with the matrix of the Fourier transform."""

    def __init__(self, layer):
        super().__init__()
        self.hop, self.window, self.mel = layer.hop, layer.window, layer.mel
        self.init_state = layer.init_state

    def forward(self, x, state):
        x = torch.cat([state["past"], x[:, 0]], -1)
        state["past"].copy_(x[:, self.hop - WINDOW:])
        n = WINDOW // self.hop
        steps = x.unflatten(-1, (-1, self.hop))  # n of them in a row are a window
        T = steps.shape[1] - n + 1
        x = torch.cat([steps[:, i:i + T] for i in range(n)], -1) * self.window
        cos, sin = fourier()
        power = (x @ cos).square() + (x @ sin).square()
        return 0.3 * torch.log(power @ self.mel.T + 1e-3).mT


class MatrixInverseFourier(nn.Module):
    """InverseFourier by a product with the matrix of the transform."""

    def __init__(self, layer):
        super().__init__()
        self.hop, self.norm, self.head, self.window = layer.hop, layer.norm, layer.head, layer.window
        self.init_state = layer.init_state

    def forward(self, x, state):
        magnitude, phase = self.head(self.norm(x.mT)).chunk(2, dim=-1)
        magnitude = magnitude.clamp(max=6).exp()
        cos, sin = fourier()
        twice = torch.tensor([1.0] + [2.0] * (WINDOW // 2 - 1) + [1.0]) / WINDOW  # inner bins stand for two
        x = (magnitude * phase.cos() * twice) @ cos.T - (magnitude * phase.sin() * twice) @ sin.T
        (B, T, _), n = x.shape, WINDOW // self.hop
        windows = (x * self.window / (0.375 * n)).unflatten(-1, (n, self.hop))  # as in overlap_add
        y = sum(F.pad(windows[:, :, i], (0, 0, i, n - 1 - i)) for i in range(n)).flatten(1)
        y = torch.cat([y[:, :WINDOW - self.hop] + state["overlap"], y[:, WINDOW - self.hop:]], -1)
        state["overlap"].copy_(y[:, T * self.hop:])
        return y[:, None, :T * self.hop]


MATRICES = {LogMel: MatrixLogMel, InverseFourier: MatrixInverseFourier}
