"""What the README shows is what the code says."""
import glob
import json
import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT, run
from toy.world import LANGUAGES
from train import STAGES

README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()


def stage_rows(config):
    """The table of a config's stages, as the README prints it."""
    rows = ["| stage | layouts (share at the start -> at the end) | steps | rows x frames | learning rate | wait | heard, blotted out |",
            "|---|---|---|---|---|---|---|"]
    for s in STAGES[config]:
        layouts = ", ".join(f"{name} {a:g}" if a == b else f"{name} {a:g} -> {b:g}" for name, (a, b) in s.layouts.items())
        rows.append(f"| {s.name} | {layouts} | {s.steps} | {s.batch} x {s.frames} | {s.lr:g} -> {s.lr_end:g} | {s.wait:g} | {s.frame_dropout:g} |")
    return "\n".join(rows)


def test_the_table_of_stages_is_that_of_train_py():
    assert stage_rows("tiny") in README


def test_the_layout_shown_is_what_streams_py_prints():
    out = subprocess.run([sys.executable, "streams.py"], capture_output=True, text=True, cwd=ROOT).stdout
    shown = re.search(r"```\n(Response-TTS with free user input.*?)```", README, re.S)[1]
    assert shown in out


def test_the_toy_world_is_as_described():
    assert "Thirty words" in README and len(LANGUAGES["en"].words) == 30 and len(LANGUAGES["en"].new_voices) == 2


def test_every_file_and_target_named_is_there():
    for name in re.findall(r"\]\(([\w.]+)\)", README) + re.findall(r"python ([\w/]+\.py)", README):
        assert os.path.exists(os.path.join(ROOT, name)), name
    makefile = open(os.path.join(ROOT, "Makefile")).read()
    for target in re.findall(r"make (\w+)", README):
        assert f"\n{target}:" in makefile, target


def test_every_flag_shown_exists():
    for script, flags in re.findall(r"python ((?:prepare|train|chat|eval)\.py)((?: [\w-]+| --[\w-]+| '[^']*'| [\w./]+)*)", README):
        command = [a for a in flags.split() if a in ("toy", "encode")]
        _, text, _ = run(script, *command, "--help")
        for flag in re.findall(r" (--[\w-]+)", flags):
            assert flag in text, (script, flag)


def test_the_changes_shown_can_be_made(world, tmp_path):
    """All diffs of "Change one thing" in a copy, whose new codec then encodes and whose model learns the new layout."""
    for name in glob.glob(os.path.join(ROOT, "*.py")) + [os.path.join(ROOT, "kernels")]:
        (shutil.copytree if os.path.isdir(name) else shutil.copy)(name, tmp_path / os.path.basename(name))
    for diff in re.findall(r"```diff\n(.*?)```", README, re.S):
        done = subprocess.run(["git", "apply", "--unidiff-zero", "-"], input=diff, text=True, capture_output=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr + diff
    shutil.copytree(world / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns("encoded"))
    done = subprocess.run([sys.executable, "-c", """if True:
        import dataclasses, json, torch, mimi, model, prepare, toy.codec, train
        codec = toy.codec.CodecTask(mimi.CONFIGS["tiny"], "toy", "cpu")
        train.train(codec, [train.Stage("codec", 1, 1, 1e-3, 0)], "codec")
        prepare.encode("toy", "codec/checkpoint.pt", "bpe", 300, 1, False, 1, "cpu")
        job = train.ModelTask(model.CONFIGS["tiny"], "toy/encoded", "cpu")
        stage = next(s for s in train.STAGES["tiny"] if s.name == "fine-tuning 1")
        train.train(job, [dataclasses.replace(stage, steps=3)], "tiny")
        print(json.dumps([*stage.layouts, train.ALPHA_1, len(job.model.blocks), len(job.model.listen), codec.config.codebooks]))
        """], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["written_first", 100.0, 6, 4, 4]
