"""`train.py --plan` against what a real step of `tiny` on the CPU does."""
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model
from training import plan
from conftest import run
from train import STAGES


@pytest.mark.parametrize("recompute, piece", [(False, 1 << 26), (True, 1 << 16)])
def test_the_plan_agrees_with_a_step_on_the_cpu(recompute, piece, monkeypatch):
    monkeypatch.setattr(model, "PIECE", piece)
    config = model.CONFIGS["tiny"]
    stage = dataclasses.replace(STAGES["tiny"][0], batch=2, frames=96, depth=(1.0, 1.0))
    planned = plan.plan(config, stage, 1, bf16=False)
    others, depth = plan.measure(config, "all" if recompute else "nothing", 2, 96, 1.0, False)
    counted = others + depth
    flm = model.FLM(config)
    flm.recompute = recompute
    with FlopCounterMode(display=False) as counter:  # a whole step, as it is
        h = flm.hidden(torch.zeros(2, 17, 96, dtype=torch.long)).flatten(0, 1)
        text, codes = torch.zeros(192, dtype=torch.long), torch.zeros(192, 8, dtype=torch.long)
        (flm.text_losses(h, text)[:, 0].sum() + flm.depth(h, codes).sum()).backward()
    assert counted.flops == pytest.approx(counter.get_total_flops(), rel=0.03)
    if not recompute:
        assert planned.flops == counted.flops and planned.useful == pytest.approx(counted.flops, rel=0.03)
    assert sum(planned.parameters.values()) == sum(p.numel() for p in flm.parameters())
    optimizer = torch.optim.AdamW(flm.parameters(), lr=1e-3)
    optimizer.step()
    held = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)
    assert planned.weights == held(flm.parameters())
    assert planned.gradients == held(p.grad for p in flm.parameters())
    states = [x for s in optimizer.state.values() for k, x in s.items() if k != "step"]
    assert planned.optimiser == pytest.approx(held(states), rel=0.1)


def test_the_flops_are_six_a_parameter_and_frame():
    """The rule of thumb, for rows so short that attention hardly counts; embeddings are looked up, not
    multiplied."""
    config = model.CONFIGS["small"]
    stage = dataclasses.replace(STAGES["small"][0], batch=8, frames=32, depth=(1.0, 1.0))
    p = plan.plan(config, stage, 1)
    flm = model.FLM(config)
    matrices = [(name, q.numel()) for name, q in flm.named_parameters() if q.ndim > 1]
    of = lambda *names: sum(n for name, n in matrices if name.startswith(names))
    # shared by the 8 positions of a frame
    shared = of(*(f"depth.blocks.{i}.{x}" for i in range(config.depth_layers) for x in ("qkv", "out")))
    multiplied = of("blocks", "head", "depth.blocks", "depth.from_h", "depth.heads") + 7 * shared
    assert p.useful == pytest.approx(6 * multiplied * p.frames, rel=0.12)


def test_several_gpus_share_and_recomputing_costs():
    stage = dataclasses.replace(STAGES["0.5b"][0], frames=2048)
    one, eight = (plan.plan(model.CONFIGS["0.5b"], stage, n) for n in (1, 8))
    assert eight.optimiser == one.optimiser / 8 and eight.useful == one.useful
    assert 1.2 < one.flops / one.useful < 1.34  # a second forward pass


def test_the_command():
    code, out, err = run("train.py", "--config", "small", "--plan", "--gpus", 2, "--card", "4090")
    assert code == 0, err
    assert "fits in 24" in out and "fine-tuning 2" in out and "GFLOP a frame" in out
    code, _, err = run("train.py", "--config", "codec", "--plan")
    assert code == 1 and "--plan is for a model" in err


def test_eight_bits_let_7b_fit_on_one_card():
    for extra, fits in ((["--card", "H100"], False), (["--card", "H100", "--eight-bit"], True)):
        code, out, err = run("train.py", "--config", "7b", "--plan", *extra)
        assert code == 0 and ("does not fit" not in out) == fits, out + err
    code, out, err = run("train.py", "--config", "0.5b", "--plan", "--card", "4090")
    assert code == 0 and "fits in 24" in out
