"""Muon: what it does to a matrix, and that everything else is AdamW's."""
import pytest
import torch

from mimi import CONFIGS as CODECS
from mimi import Mimi
from model import CONFIGS, FLM
from training.muon import Muon, in_bfloat16, is_matrix, orthogonal
from train import make_optimizer


@pytest.mark.parametrize("shape", [(48, 48), (48, 192), (192, 48), (3, 48, 96)])
def test_all_directions_become_about_equally_strong(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = torch.logspace(0, -1.5, s.shape[-1]).expand_as(s)
    strengths = torch.diagonal(u.mT @ orthogonal(7 * (u * s[..., None, :]) @ v) @ v.mT, dim1=-2, dim2=-1)
    assert 0.6 < strengths.min() and strengths.max() < 1.3


def test_it_is_newton_schulz():
    torch.manual_seed(0)
    x = torch.randn(40, 64, dtype=torch.float64)
    y = x / x.norm()
    for _ in range(5):
        y = 3.4445 * y - 4.7750 * y @ y.mT @ y + 2.0315 * y @ y.mT @ y @ y.mT @ y
    assert torch.allclose(orthogonal(x), y, atol=1e-6)


@pytest.mark.parametrize("shape", [(48, 48), (48, 192), (3, 48, 96)])
def test_the_rounds_in_bfloat16_of_a_gpu(shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.logspace(0, -1.5, s.shape[-1]).expand_as(s)
    x = u * s[..., None, :] @ v
    y = in_bfloat16(x / x.norm(dim=(-2, -1), keepdim=True), 5)
    assert y.dtype == torch.bfloat16
    strengths = torch.diagonal(u.mT @ y.float() @ v.mT, dim1=-2, dim2=-1)
    assert 0.55 < strengths.min() and strengths.max() < 1.35


def test_no_gradient_no_step():
    assert orthogonal(torch.zeros(4, 8)).abs().max() == 0


def test_steps_are_as_large_as_those_of_adamw_and_matrices_take_turns():
    matrices = [torch.nn.Parameter(torch.zeros(64, 256)) for _ in range(2)]
    optimizer = Muon([{"params": matrices, "muon": True, "weight_decay": 0.0}], lr=0.01)
    sizes = lambda: [p.square().mean().sqrt().item() for p in matrices]
    torch.manual_seed(0)
    for p in matrices:
        p.grad = torch.randn(64, 256)
    optimizer.step()
    assert all(p.grad is not None for p in matrices)
    assert sizes() == [pytest.approx(2 * 0.01 * 0.2, rel=0.15), 0]
    optimizer.step()
    assert sizes() == pytest.approx([2 * 0.01 * 0.2] * 2, rel=0.15)


def test_the_rest_is_adamw():
    torch.manual_seed(0)
    one, other = (torch.nn.Linear(8, 8) for _ in range(2))
    other.load_state_dict(one.state_dict())
    ours = Muon([{"params": list(one.parameters()), "muon": False}], lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        x = torch.randn(4, 8)
        for m, optimizer in ((one, ours), (other, theirs)):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_it_takes_the_matrices_inside_the_layers():
    for modules in (FLM(CONFIGS["tiny"]), Mimi(CODECS["tiny"])):
        taken = {name for name, p in modules.named_parameters() if is_matrix(name, p)}
        others = ("text", "speak", "listen", "codes", "head", "norm", "bias")
        assert taken and not any(word in name for name in taken for word in others)
        optimizer = make_optimizer(modules, True)
        assert sum(len(g["params"]) for g in optimizer.param_groups if g["muon"]) == len(taken)
        learned = sum(p.requires_grad for p in modules.parameters())
        assert sum(len(g["params"]) for g in optimizer.param_groups) == learned
        assert not any(g["muon"] for g in make_optimizer(modules, False).param_groups)
