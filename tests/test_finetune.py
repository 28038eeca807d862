"""Training on from a model of ours, and on data that serves some of the stages only."""
import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
import torch

import model
import train
from conftest import FLM, encode, run
from files.checkpoint import load_checkpoint
from streams import TEXT
from test_train import SHORT
from training.muon import make_optimizer
from training.survey import survey


def test_a_model_of_ours_is_fine_tuned_on_other_data(world, tmp_path):
    """--init out/tiny: the weights are those of the checkpoint, and the data must have its codec and
    tokeniser."""
    flm = world / "flm"
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu", str(flm))
    start = load_checkpoint(str(flm / "checkpoint.pt"), "flm")["model"]
    assert all(torch.equal(p, start[name]) for name, p in task.model.named_parameters())
    assert not task.from_nothing and task.config.layers == FLM.layers
    train.train(task, [dataclasses.replace(SHORT[1], steps=2)], str(tmp_path / "o"))
    model.FLM.load(str(tmp_path / "o/checkpoint.pt"))
    other = tmp_path / "other"
    shutil.copytree(flm, other)
    (other / "codec.pt").write_bytes(b"another")
    with pytest.raises(ValueError, match="encoded with another codec; encode it with --codec"):
        train.ModelTask(FLM, str(world / "toy/encoded"), "cpu", str(other))


def test_stages_without_data_are_skipped_and_named(world, tmp_path):
    """Recordings alone serve post-training; not fine-tuning 2, of which they could serve the ASR share
    alone. What does not fit into a row with its transcript is counted."""
    folder = tmp_path / "libri"
    folder.mkdir()
    lines = [json.loads(line) for line in open(world / "toy/manifest.jsonl")]
    clips = [t for d in lines if len(d["turns"]) == 2 for t in d["turns"]][:8]
    with open(folder / "manifest.jsonl", "w") as f:
        for t in clips:
            f.write(json.dumps({"audio": str(world / "toy" / t["audio"]), "text": t["text"]}) + "\n")
    encode(folder, world)
    size = "--layers 1 --width 32 --heads 2 --mlp 32 --frames 40 --batch 2 --steps 6 --device cpu".split()
    code, out, err = run("train.py", "--data", folder / "encoded", "--out", tmp_path / "o", *size)
    assert code == 0, err
    saved = load_checkpoint(str(tmp_path / "o/checkpoint.pt"), "flm")
    assert [s["name"] for s in saved["stages"]] == ["post-training 1", "post-training 2"]
    for name in ("language", "fine-tuning 1", "fine-tuning 2"):
        assert f"\n{name}: skipped, as the data holds nothing for" in out
    assert "response_tts and free_response_tts and recorded; asr alone is under a quarter of it" in out
    data = train.Conversations(str(folder / "encoded"))
    frames = [max(c["frames"], c["speech"] + len(t["tokens"])) for t in
              (data.line(i)["turns"][0] for i in np.flatnonzero(data.encoded.index["split"] == b"train"))
              for c in t["copies"]]
    fit = sum(n + train.PAUSE <= 40 for n in frames)
    assert 0 < fit < len(frames) and f"asr: {len(frames) - fit} of {len(frames)} clips do not fit" in out
    assert f"left out; --frames {max(frames) + train.PAUSE} holds all" in out
    rows = data.batch(train.Stage("s", 1, 30, 0, 0, 40, {"asr": (1, 1)}), 0, "train", random.Random(0))[0]
    first = (rows[:, TEXT] != data.vocab.wait).int().argmax(1)  # each row's first clip has its transcript
    assert (first > 0).all()


def test_nothing_that_fits_is_one_clear_error(world):
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    stages = [train.Stage("short", 1, 1, 0, 0, 16, {"asr": (1, 1)}), train.Stage("long", 1, 1, 0, 0, 128,
                                                                                 {"asr": (1, 1)})]
    with pytest.raises(ValueError, match="for any stage: asr: [0-9]+ of [0-9]+ clips do not fit into rows"):
        survey(task, stages[:1])
    notes, kept = survey(task, stages)
    assert [s.name for s in kept] == ["long"] and notes[0].startswith("short: skipped")


def test_a_run_goes_on_as_it_was_begun_or_not_at_all(world, tmp_path):
    """Other steps, another seed, or no --minutes while the length of a stage is not known: one clear line."""
    new = lambda: train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    out, stage = str(tmp_path / "o"), dataclasses.replace(SHORT[0], steps=2)
    train.train(new(), [stage], out)
    longer = dataclasses.replace(stage, steps=3)
    for stages, flags, message in (([longer], {}, r"other stages \(one: steps\)"),
                                   ([stage, SHORT[1]], {}, r"other stages \(two: not in both\)"),
                                   ([stage], {"seed": 2}, "with --seed 1; give it again")):
        with pytest.raises(ValueError, match=message):
            train.train(new(), stages, out, resume=True, **flags)
    task = new()
    run_ = train.Run(task, [stage], str(tmp_path / "p"), make_optimizer(task.modules, True), minutes=1)
    run_.save()
    with pytest.raises(ValueError, match="begun with --minutes; give it again"):
        train.train(new(), [stage], str(tmp_path / "p"), resume=True)


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(world, tmp_path):
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    before = task.model.head.weight.detach().clone()
    task.model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match="the gradient is (nan|inf) at step 0 of one"):
        train.train(task, [SHORT[0]], str(tmp_path / "o"))
    assert torch.equal(task.model.head.weight, before)


def test_flags_set_fields_of_the_config_and_of_all_stages(world, tmp_path):
    """--steps is for all stages together and --lr the highest rate; the checkpoint has what was resolved."""
    flags = ("--layers 1 --width 32 --heads 2 --mlp 32 --context 64 --frames 32 --batch 2 --steps 9 "
             "--lr 3e-3 --wait 0.1 --depth 0.5,0.25 --device cpu").split()
    code, out, err = run("train.py", "--data", world / "toy/encoded", "--out", tmp_path / "o", *flags)
    assert code == 0 and "layers=1, width=32" in out and "depth=(0.5, 0.25)" in out, err
    saved = load_checkpoint(str(tmp_path / "o/checkpoint.pt"), "flm")
    table, stages = train.STAGES["tiny"], saved["stages"]
    assert saved["config"]["layers"] == 1 and saved["config"]["context"] == 64
    total = sum(s.steps for s in table)
    assert [s["steps"] for s in stages] == [max(1, round(s.steps * 9 / total)) for s in table]
    assert max(s["lr"] for s in stages) == pytest.approx(3e-3) and stages[-1]["lr_end"] == 0
    assert {(s["batch"], s["frames"], s["wait"], s["depth"]) for s in stages} == {(2, 32, 0.1, (0.5, 0.25))}


def test_the_codec_trains_on_a_few_clips(world, tmp_path):
    """Fewer than a batch, and none held out: no held-out loss, no error. Without any clip: one clear line."""
    for n, code in ((3, 0), (0, 1)):
        folder = tmp_path / str(n)
        folder.mkdir()
        lines = [json.loads(line) for line in open(world / "toy/manifest.jsonl")]
        clips = [t for d in lines for t in d["turns"]][:n]
        with open(folder / "manifest.jsonl", "w") as f:
            for t in clips:
                part = {"audio": str(world / "toy" / t["audio"]), "text": t["text"], "split": "train"}
                f.write(json.dumps(part) + "\n")
        flags = "--config codec --steps 2 --device cpu".split()
        found, _, err = run("train.py", *flags, "--data", folder, "--out", tmp_path / f"out{n}")
        assert found == code and (n or "holds no clip of at most six seconds" in err), err
