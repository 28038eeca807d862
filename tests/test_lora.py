"""Low-rank adapters: they start as nothing, learn alone, and are merged; a killed run goes on exactly."""
import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import conftest
import model
import train
from chat import DuplexModel
from conftest import FLM, ROOT, run
from files.checkpoint import load_checkpoint
from published.release import export_release
from streams import Vocab
from test_published import as_qwen
from test_train import SHORT
from training import lora, plan
from training.muon import make_optimizer

C = dataclasses.replace(FLM, layers=2)
SECOND = dataclasses.replace(SHORT[1], steps=12)

# a run that saves after every step and, if told to, dies in the middle of the sixth
SCRIPT = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import conftest, os, test_lora, torch, train
torch.set_num_threads(1)
data, init, out, dies = sys.argv[1:]
task = train.ModelTask(conftest.FLM, data, "cpu", init, precision="bfloat16", rank=4)
loss, steps = task.loss, []
task.loss = lambda *a: (steps.append(1), os._exit(9) if dies == "yes" and len(steps) == 6 else loss(*a))[1]
train.train(task, [test_lora.SECOND], out, resume=True, save_every=0)
"""


def task_of(world, precision="float32", init=None, rank=4):
    return train.ModelTask(FLM, str(world / "toy/encoded"), "cpu", str(init or world / "flm"),
                           precision=precision, rank=rank)


def grid_of(config, frames=20):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, config.vocab_size, (2, 1, frames), generator=generator)
    return torch.cat([text, torch.randint(0, config.empty, (2, 16, frames), generator=generator)], 1)


def outputs(flm):
    """Everything that it computes, for training and step by step."""
    grid = grid_of(flm.config)
    with torch.no_grad():
        text, _, codes = flm(grid, torch.ones(2, 19, dtype=torch.bool))
        cache, steps = flm.init_cache(2), []
        for t in range(5):
            steps.append(flm.text_logits(flm.hidden_step(grid[..., t], cache)).flatten())
    return torch.cat([text.flatten(), codes.flatten(), *steps])


def loss_of(task, stage):
    """As a run computes it: (loss, its parts)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "bfloat16"):
        return conftest.loss_of(task, stage)[:2]


def train_a_bit(flm):
    """Adapters that do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for x in lora.adapters(flm).values():
            x.add_(torch.randn_like(x) * 0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_new_adapters_change_nothing_and_merged_ones_are_the_model(tied):
    flm = model.FLM(dataclasses.replace(C, tied=tied))
    plain, names = outputs(flm), dict(flm.named_parameters()).keys()
    lora.add_adapters(flm, 4)
    assert torch.equal(outputs(flm), plain)
    train_a_bit(flm)
    changed = outputs(flm)
    assert (changed - plain).abs().max() > 0.05
    again = model.FLM(flm.config)
    weights = lora.merged(flm)
    assert weights.keys() - names <= {"head.weight"}
    again.load_state_dict(weights)
    assert torch.allclose(outputs(again), changed, atol=2e-5)


def test_only_adapters_and_the_audio_parts_get_gradients(world):
    """Every adapter gets one; a frozen weight none, nor a place in the optimiser."""
    task = task_of(world)
    train_a_bit(task.model)
    loss, _ = loss_of(task, SECOND)
    loss.backward()
    for name, p in task.model.named_parameters():
        adapter, audio = name.endswith((".a", ".b")), name.split(".")[0] in ("speak", "listen", "depth")
        assert (p.grad is not None) == (adapter or audio) == p.requires_grad, name
        assert not adapter or p.grad.abs().sum() > 0, name
    held = {id(p) for group in make_optimizer(task.modules, False).param_groups for p in group["params"]}
    assert held == {id(p) for p in task.model.parameters() if p.requires_grad}
    names = {name.rsplit(".", 1)[0] for name in lora.adapters(task.model)}
    assert names == {"text", "head", *(f"blocks.0.{x}" for x in ("qkv", "out", "mlp.gate_up", "mlp.down"))}


def test_what_is_frozen_is_in_bfloat16_and_what_learns_is_not(world):
    task = task_of(world, "bfloat16")
    for name, p in task.model.named_parameters():
        matrix = not p.requires_grad and "norm" not in name
        assert p.dtype == (torch.bfloat16 if matrix else torch.float32), name
    assert {p.dtype for p in task_of(world, "float32").model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_is_a_model_that_chat_loads(world, tmp_path, precision):
    """The frozen weights are those of --init plus what the adapters say; the loss falls."""
    task = task_of(world, precision)
    stage = dataclasses.replace(SHORT[0], steps=60, batch=4, lr=1e-2, layouts={"tts": (1, 1)})
    before = sum(loss_of(task, stage)[1].values()).item()
    train.train(task, [stage], str(tmp_path))
    assert sum(loss_of(task, stage)[1].values()).item() < before - 0.3
    saved = load_checkpoint(str(tmp_path / "checkpoint.pt"), "flm")
    start = load_checkpoint(str(world / "flm/checkpoint.pt"), "flm")["model"]
    name, dtype = "blocks.0.out.weight", getattr(torch, precision)
    a, b = (saved["lora"][f"blocks.0.out.{x}"] for x in "ab")
    merged = (start[name].to(dtype).float() + lora.SCALE * (b @ a)).to(dtype)
    assert saved["model"][name].dtype == dtype and b.abs().max() > 0
    assert torch.equal(merged, saved["model"][name])
    duplex = DuplexModel.load(str(tmp_path))
    assert saved["model"].keys() == start.keys() and duplex.model.config == task.config
    texts, said = duplex.converse(torch.zeros(1, 1920 * 5))
    assert texts.shape == (1, 5) and torch.isfinite(said).all()
    again = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu", str(tmp_path))  # and as an --init
    assert torch.equal(again.model.blocks[0].out.weight, merged.float())


def test_a_killed_run_goes_on_to_the_same_weights(world, tmp_path):
    def start(out, dies):
        script = SCRIPT.format(root=ROOT, tests=os.path.join(ROOT, "tests"))
        command = [sys.executable, "-c", script, world / "toy/encoded", world / "flm", out, dies]
        return subprocess.run([*map(str, command)], capture_output=True).returncode
    path, whole = tmp_path / "killed/checkpoint.pt", tmp_path / "whole/checkpoint.pt"
    assert start(path.parent, "yes") == 9
    assert 1 <= load_checkpoint(str(path), "flm")["progress"]["step"] <= 5
    assert start(path.parent, "no") == start(whole.parent, "no") == 0
    a, b = load_checkpoint(str(path), "flm"), load_checkpoint(str(whole), "flm")
    for part in ("model", "lora"):
        assert a[part].keys() == b[part].keys() and a[part]
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), part


def test_a_run_goes_on_with_its_own_adapters_only(world, tmp_path):
    """Another rank, none, or another --init: one line."""
    out, other = str(tmp_path / "o"), tmp_path / "other"
    train.train(task_of(world), [dataclasses.replace(SECOND, steps=2)], out)
    go_on = lambda task: train.train(task, [dataclasses.replace(SECOND, steps=2)], out, resume=True)
    with pytest.raises(ValueError, match="was trained with --lora 4; give the same"):
        go_on(task_of(world, rank=8))
    with pytest.raises(ValueError, match="was trained with --lora 4; give the same"):
        go_on(task_of(world, rank=0))
    train.train(task_of(world, rank=0), [dataclasses.replace(SECOND, steps=2)], str(other))
    with pytest.raises(ValueError, match="was trained from another --init"):
        go_on(task_of(world, init=other))
    with pytest.raises(ValueError, match="was trained without --lora"):
        train.train(task_of(world), [dataclasses.replace(SECOND, steps=2)], str(other), resume=True)


def test_a_run_goes_on_in_the_precision_of_its_frozen_weights(world, tmp_path, monkeypatch):
    """Even if another one is the default of this machine."""
    stage = dataclasses.replace(SECOND, steps=2)
    train.train(task_of(world), [stage], str(tmp_path))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    with pytest.raises(ValueError, match="was trained in float32; --precision float32 goes on with it"):
        train.train(task_of(world, None), [stage], str(tmp_path), resume=True)
    train.train(task_of(world), [stage], str(tmp_path), resume=True)


def test_it_starts_from_a_language_model(world, tmp_path):
    flm = model.FLM(dataclasses.replace(C, vocab_size=400, tied=True))
    as_qwen(flm, tmp_path, "model.", "qwen2")
    task = task_of(world, "bfloat16", tmp_path)
    assert torch.equal(task.model.text.weight, flm.text.weight.bfloat16())
    assert task.model.head.b is task.model.text.b and torch.isfinite(loss_of(task, SECOND)[0])


def test_it_starts_from_the_release(world, tmp_path):
    """Whose id of "empty" is kept, and whose <wait> becomes that of the data's tokeniser. It knows audio:
    nothing of that is new."""
    pytest.importorskip("safetensors")
    theirs = model.FLM(dataclasses.replace(C, vocab_size=400, empty=33, input_scale=2.0))
    export_release(theirs, Vocab(400, 7, -1, -1, 32, 33, ()), str(tmp_path))
    for rank in (0, 4):
        task = task_of(world, "float32", tmp_path, rank)
        v, p = task.vocab, dict(task.model.named_parameters())
        assert (v.empty, task.data.vocab.empty, task.config.input_scale) == (33, 33, 2.0)
        for name, w in theirs.named_parameters():
            if name in ("text.weight", "head.weight"):
                assert torch.equal(p[name][v.wait], w[7]) and torch.equal(p[name][:7], w[:7])
            else:
                assert torch.equal(p[name], w), name
        train.train(task, [dataclasses.replace(SECOND, steps=2)], str(tmp_path / f"o{rank}"))
        texts, _ = DuplexModel.load(str(tmp_path / f"o{rank}")).converse(torch.zeros(1, 1920 * 3))
        assert texts.shape == (1, 3)
        on = task_of(world, "float32", tmp_path / f"o{rank}", 0)  # goes on from that
        assert on.vocab.empty == 33 and torch.isfinite(loss_of(on, SECOND)[0])
    export_release(theirs, Vocab(400, 7, -1, -1, 30, 33, ()), str(tmp_path))
    with pytest.raises(ValueError, match="speaks the 30 codes of its codec, the data has 32"):
        task_of(world, init=tmp_path)


def test_the_command(world, tmp_path):
    size = "--frames 48 --batch 2 --steps 5 --lora 2 --device cpu".split()
    flags = ["train.py", "--data", world / "toy/encoded", "--out", tmp_path / "o", *size]
    code, out, err = run(*flags, "--init", world / "flm")
    assert code == 0 and "Wrote" in out, err
    assert len(load_checkpoint(str(tmp_path / "o/checkpoint.pt"), "flm")["lora"]) == 12
    for more, says in (([], "--lora needs a model to start from"),
                       (["--init", world / "flm", "--eight-bit"], "and --lora do not go together"),
                       (["--init", world / "flm", "--lora", -1], "is at least 1")):
        code, _, err = run(*flags, "--out", tmp_path / "p", *more)
        assert code == 1 and says in err.splitlines()[-1]


def test_the_plan_of_7b():
    """On one card with adapters; in full on eight."""
    code, out, err = run("train.py", "--config", "7b", "--plan", "--lora", 16)
    assert code == 0 and "low-rank adapters" in out and "fits in 80" in out, err
    code, out, err = run("train.py", "--config", "7b", "--plan", "--gpus", 8)
    assert code == 0 and "low-rank adapters" not in out and "fits in 80" in out, err
    assert "does not fit" in run("train.py", "--config", "7b", "--plan")[1]
    assert run("train.py", "--config", "7b", "--plan", "--lora", 16, "--gpus", 2)[0] == 1


def test_the_plan_counts_what_is_held(world):
    """Weights, gradients and states of the optimiser, to the byte."""
    task = task_of(world, "bfloat16")
    p = plan.plan(task.config, dataclasses.replace(SECOND, layouts=None), 1, rank=4)
    optimizer = make_optimizer(task.modules, False)
    loss_of(task, SECOND)[0].backward()
    optimizer.step()
    held = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)
    assert p.weights == held(task.model.parameters())
    learns = [q for q in task.model.parameters() if q.requires_grad]
    assert p.gradients == held(q.grad for q in learns) == 4 * sum(q.numel() for q in learns)
    states = [x for s in optimizer.state.values() for name, x in s.items() if name != "step"]
    assert p.optimiser == held(states)
    full = plan.plan(task.config, dataclasses.replace(SECOND, layouts=None), 1)
    assert p.useful < full.useful and sum(p.parameters.values()) > sum(full.parameters.values())
