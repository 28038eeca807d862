"""Training on from a model of ours, and on data that serves some of the stages only."""
import dataclasses
import json
import shutil

import pytest
import torch

import model
import train
from conftest import FLM, encode, run
from files.checkpoint import load_checkpoint
from test_train import SHORT


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
    """Recordings alone serve post-training, and the ASR share of fine-tuning 2."""
    folder = tmp_path / "libri"
    folder.mkdir()
    lines = [json.loads(line) for line in open(world / "toy/manifest.jsonl")]
    clips = [t for d in lines if len(d["turns"]) == 2 for t in d["turns"]][:8]
    with open(folder / "manifest.jsonl", "w") as f:
        for t in clips:
            f.write(json.dumps({"audio": str(world / "toy" / t["audio"]), "text": t["text"]}) + "\n")
    encode(folder, world)
    size = "--layers 1 --width 32 --heads 2 --mlp 32 --frames 32 --batch 2 --steps 6 --device cpu".split()
    code, out, err = run("train.py", "--data", folder / "encoded", "--out", tmp_path / "o", *size)
    assert code == 0, err
    assert "Skipped, as the data holds nothing for them: language, fine-tuning 1\n" in out
    saved = load_checkpoint(str(tmp_path / "o/checkpoint.pt"), "flm")
    assert [s["name"] for s in saved["stages"]] == ["post-training 1", "post-training 2", "fine-tuning 2"]
