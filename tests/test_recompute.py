"""What a layer keeps for its gradients, or computes again, which changes none; and products in float8."""
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model
import train
from conftest import FLM, run
from files.checkpoint import load_checkpoint
from test_train import SHORT
from training import float8, plan
from training.recompute import CHOICES, selective

CONFIG = dataclasses.replace(FLM, layers=2)


def gradients(how, backend=None):
    torch.manual_seed(0)
    flm = model.FLM(CONFIG)
    flm.recompute = how == "all"
    if how == "selective":
        selective(flm)
    for block in flm.blocks if backend else ():
        block.compile(backend=backend)
    flm.hidden(torch.zeros(2, 17, 60, dtype=torch.long)).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in flm.parameters() if p.grad is not None])


def test_gradients_are_the_same_and_the_products_are_not_computed_again():
    flops, found = {}, {}
    for how in CHOICES:
        with FlopCounterMode(display=False) as counter:
            found[how] = gradients(how)
        flops[how] = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert all(torch.equal(found[how], found["nothing"]) for how in CHOICES)
    products = {how: flops[how]["aten.mm"] + flops[how]["aten.addmm"] for how in CHOICES}
    assert products["selective"] == products["nothing"] < products["all"]
    assert flops["nothing"]["aten.bmm"] < flops["selective"]["aten.bmm"]  # attention's scores are


def test_a_selective_layer_compiles_as_one():
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    torch.testing.assert_close(gradients("selective", counter), gradients("nothing"), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1  # for both layers
    torch._dynamo.reset()


def test_training_does_not_depend_on_what_is_kept(world, tmp_path):
    weights = []
    for how in (None, "selective", "all"):
        task = train.ModelTask(CONFIG, str(world / "toy/encoded"), "cpu", recompute=how)
        path = train.train(task, [dataclasses.replace(s, steps=2) for s in SHORT], str(tmp_path / str(how)))
        weights.append(load_checkpoint(path, "flm")["model"])
    for others in weights[1:]:
        assert all(torch.equal(others[name], x) for name, x in weights[0].items())


def test_the_plan_knows_what_is_kept():
    stage = dataclasses.replace(train.STAGES["0.5b"][0], frames=2048)
    nothing, some, everything = (plan.plan(model.CONFIGS["0.5b"], stage, 1, how=how) for how in CHOICES)
    assert nothing.activations > some.activations > everything.activations
    assert nothing.flops < some.flops < everything.flops and nothing.useful == some.useful
    c, frames = model.CONFIGS["0.5b"], stage.frames
    each = c.width * (1 + 2 * c.kv_heads / c.heads + 2) + 2 * c.mlp  # qkv, out, down, gate_up
    kept = (some.activations - everything.activations) / (2 * c.layers * frames)
    assert kept == pytest.approx(each, rel=0.01)
    seconds = plan.seconds_of(some, 1, "H100", False)
    assert 0.3 < some.useful / sum(seconds.values()) / plan.BF16["H100"][0] < 0.7
    code, out, err = run("train.py", "--config", "7b", "--plan", "--gpus", 8, "--recompute", "selective")
    assert code == 0 and "reckoned from the seconds of a step" in out, err
    code, out, err = run("train.py", "--config", "7b", "--plan", "--utilisation", 0.5)
    assert code == 0 and "utilisation 50% (given)" in out, err


@pytest.mark.parametrize("flags, message", [
    (["--float8", "--device", "cpu"], "--float8 needs a GPU that multiplies it"),
    (["--float8", "--eight-bit"], "--eight-bit and --float8 do not go together"),
    (["--config", "codec", "--recompute", "all"], "the codec and --recompute do not go together")])
def test_what_cannot_be_is_one_clear_error(world, tmp_path, flags, message):
    code, _, err = run("train.py", "--data", world / "toy/encoded", "--out", tmp_path / "o", *flags)
    assert code == 1 and message in err and len(err.splitlines()) == 1 and not (tmp_path / "o").exists()


def test_float8_needs_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    with pytest.raises(ValueError, match=r"pip install '.\[eightbit\]'"):
        float8.convert(model.FLM(CONFIG), "cpu", emulate=True)


def test_float8_rounds_the_products_of_the_layers_alone():
    pytest.importorskip("torchao")
    config = dataclasses.replace(CONFIG, width=64)
    with torch.device("meta"):
        rounded = float8.convert(model.FLM(config), "cpu", emulate=True)
    rounded, plain = rounded.to_empty(device="cpu"), model.FLM(config)
    rounded.init_weights()
    assert rounded.state_dict().keys() == plain.state_dict().keys()
    grid, outs = torch.randint(0, 32, (2, 17, 32)), []
    for flm in (rounded, plain):
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(flm.hidden(grid))
        outs[-1].square().sum().backward()
    far = lambda a, b: ((a - b).norm() / b.norm()).item()
    assert 1e-4 < far(*outs) < 0.05
    assert far(*(flm.blocks[0].qkv.weight.grad for flm in (rounded, plain))) < 0.2
    assert type(rounded.head) is torch.nn.Linear
