"""A model, its codec and its tokeniser in one file."""
import json
import shutil

import pytest
import torch

from chat import DuplexModel
from conftest import run
from files.checkpoint import layouts_of, load_checkpoint

safetensors = pytest.importorskip("safetensors.torch", reason="the extra 'weights' is not installed")


@pytest.fixture(scope="module")
def packed(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "talk.safetensors"
    code, out, err = run("live.packed", world / "flm", path, "--note", "made by a test")
    assert code == 0, err
    assert f"Wrote {path}" in out
    return path


def test_a_folder_comes_back_to_half_precision(packed, world, tmp_path):
    code, out, err = run("live.packed", packed, tmp_path / "talk/")
    assert code == 0, err
    old, new = (load_checkpoint(str(folder / "checkpoint.pt"), "flm")
                for folder in (world / "flm", tmp_path / "talk"))
    assert new["config"] == old["config"] and "optimizer" not in new
    for name, x in old["model"].items():
        assert new["model"][name].dtype == torch.float32 and torch.equal(new["model"][name], x.half().float())
    before, after = (DuplexModel.load(str(folder)) for folder in (world / "flm", tmp_path / "talk"))
    assert torch.equal(before.codec.codebooks(), after.codec.codebooks())
    wav = torch.randn(1, 24_000) * 0.05
    assert after.converse(wav)[1].shape == wav.shape
    assert "next: python chat.py" in out


def test_what_is_in_it_and_how_large_it_is(packed, world):
    code, out, _ = run("live.packed", packed)
    assert code == 0 and "made by a test" in out
    assert packed.stat().st_size < 0.4 * sum((world / "flm" / name).stat().st_size
                                             for name in ("checkpoint.pt", "codec.pt"))


def test_it_says_what_the_model_was_trained_on(packed, world, tmp_path):
    before = layouts_of(str(world / "flm"))
    assert run("live.packed", packed, tmp_path / "talk")[0] == 0
    assert layouts_of(str(tmp_path / "talk")) == before
    saved = load_checkpoint(str(tmp_path / "talk/checkpoint.pt"), "flm")
    for parts in ({}, {"layouts": ["a:b", "c"]}, {"stages": [{"layouts": {"a:b": (1, 1), "c": (0, 1)}}]}):
        save_parts(tmp_path, saved, parts)
        assert layouts_of(str(tmp_path)) == ["a:b", "c"] * bool(parts)
    for parts in ({"layouts": 3}, {"layouts": [3]}, {"stages": [3]}, {"stages": [{}]}, {"stages": 1.5}):
        save_parts(tmp_path, saved, parts)
        with pytest.raises(ValueError, match="checkpoint.pt: its stages are not"):
            layouts_of(str(tmp_path))
    assert layouts_of(str(tmp_path / "talk/none")) == []


def save_parts(folder, saved, parts):
    kept = {k: saved[k] for k in ("kind", "config", "model", "vocab")}
    torch.save({**kept, **parts}, folder / "checkpoint.pt")


def test_fine_tuning_goes_on_from_it(packed, world, tmp_path):
    assert run("live.packed", packed, tmp_path / "talk")[0] == 0
    shutil.copytree(world / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns("encoded"))
    code, out, err = run("prepare.py", "encode", "--data", tmp_path / "toy", "--processes", 1, "--codec",
                         tmp_path / "talk/codec.pt", "--tokenizer", tmp_path / "talk")
    assert code == 0, err
    code, out, err = run("train.py", "--data", tmp_path / "toy/encoded", "--init", tmp_path / "talk", "--out",
                         tmp_path / "more", "--steps", 5, "--batch", 2, "--frames", 96, "--device", "cpu")
    assert code == 0, err
    assert "Wrote" in out and (tmp_path / "more/checkpoint.pt").exists()


@pytest.mark.parametrize("what, message", [
    ("foreign", "is not what `python -m live.packed` writes"), ("cut", "not a safetensors file, or cut off"),
    ("config", "FLMConfig has unknown or missing keys"), ("tokenizer", "tokenizer.json"),
    ("tensor", "belongs to neither"), ("there", "is there already"), ("missing", "no such file")])
def test_damaged_files_are_one_clear_error(packed, tmp_path, what, message):
    path, target = tmp_path / "talk.safetensors", tmp_path / "talk"
    with safetensors.safe_open(packed, "pt") as f:
        facts, tensors = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}
    if what == "foreign":
        facts = {}
    elif what == "config":
        facts["flm"] = json.dumps({"layers": 1})
    elif what == "tokenizer":
        facts["tokenizer"] = json.dumps("{}")
    elif what == "tensor":
        tensors["other.weight"] = torch.zeros(2)
    elif what == "there":
        target.mkdir()
    safetensors.save_file(tensors, path, facts)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "missing":
        path.unlink()
    code, _, err = run("live.packed", path, target)
    assert code == 1 and message in err and "Traceback" not in err
    assert not (target / "checkpoint.pt").exists()
