"""What the README shows is what the code says."""
import os
import re
import subprocess
import sys

from conftest import ROOT, run
from toy import LANGUAGES
from train import STAGES

README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()


def stage_rows(config):
    """The table of a config's stages, as the README prints it."""
    rows = ["| stage | layouts (share at the start -> at the end) | steps | rows x frames | learning rate | wait | heard, blotted out |",
            "|---|---|---|---|---|---|---|"]
    for s in STAGES[config]:
        layouts = ", ".join(f"{name} {a:g}" if a == b else f"{name} {a:g} -> {b:g}" for name, (a, b) in s.layouts.items())
        rows.append(f"| {s.name} | {layouts} | {s.steps} | {s.batch} x {s.frames} | {s.lr:g} -> {s.lr_end:g} | {s.wait:g} | {s.blot:g} |")
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
