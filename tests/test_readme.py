"""What README.md and RESULTS.md show is what the code says."""
import ast
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import torch

import train
from chat import DuplexModel
from conftest import FLM, ROOT, run
from mimi import FRAME
from toy.world import LANGUAGES
from train import STAGES


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


README, RESULTS = read("README.md"), read("RESULTS.md")
BOTH = README + RESULTS


def stage_rows(config):
    """The table of a config's stages, as RESULTS.md prints it."""
    rows = ["| stage | layouts (share at the start -> at the end) | steps | rows x frames | learning rate "
            "| wait | frame dropout |", "|---|---|---|---|---|---|---|"]
    for s in STAGES[config]:
        layouts = ", ".join(f"{name} {a:g}" if a == b else f"{name} {a:g} -> {b:g}"
                            for name, (a, b) in s.layouts.items())
        rows.append(f"| {s.name} | {layouts} | {s.steps} | {s.batch} x {s.frames} | {s.lr:g} -> {s.lr_end:g} "
                    f"| {s.wait:g} | {s.frame_dropout:g} |")
    return "\n".join(rows)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 260


def test_the_table_of_stages_is_that_of_train_py():
    assert stage_rows("tiny") in RESULTS


def test_the_layout_shown_is_what_streams_py_prints():
    out = subprocess.run([sys.executable, "streams.py"], capture_output=True, text=True, cwd=ROOT).stdout
    shown = re.search(r"```\n(Response-TTS with free user input.*?)```", README, re.S)[1]
    assert shown in out


def test_the_toy_world_is_as_described():
    assert "Thirty words" in README
    assert len(LANGUAGES["en"].words) == 30 and len(LANGUAGES["en"].new_voices) == 2


def test_every_file_and_target_named_is_there():
    for name in re.findall(r"python ([\w/]+\.py)", BOTH):
        assert os.path.exists(os.path.join(ROOT, name)), name
    for module in re.findall(r"python -m ([\w.]+)", BOTH):
        path = os.path.join(ROOT, module.replace(".", "/") + ".py")
        assert module == "pytest" or os.path.exists(path), module
    makefile = read("Makefile")
    for target in re.findall(r"(?:^|`)make ([\w./]+)", BOTH, re.M):
        assert f"\n{target}:" in makefile, target


def test_every_relative_link_leads_somewhere():
    for text in (README, RESULTS):
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if "://" in link:
                continue
            name, _, heading = link.partition("#")
            assert os.path.exists(os.path.join(ROOT, name)), link
            if heading:
                headings = re.findall(r"^#+ (.*)$", read(name) if name else text, re.M)
                slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
                assert heading in slugs, link


def test_every_flag_shown_exists():
    scripts = r"python ((?:prepare|train|chat|eval|mimi)\.py)((?: [\w-]+| --[\w-]+| '[^']*'| [\w./]+)*)"
    shown = re.findall(scripts, BOTH)
    assert len(shown) > 15
    for script, flags in shown:
        command = flags.split()[:1] if script == "prepare.py" else []
        _, text, _ = run(script, *command, "--help")
        for flag in re.findall(r" (--[\w-]+)", flags):
            assert flag in text, (script, flag)


# ------------------------------------------------------------------------------------------------------------
# the two walks through the code


def walk(title):
    """The "file: function" steps of a list: [(file, function or Class.function), ...]."""
    steps = re.search(rf"\*\*{title}\*\*\n\n((?:\d+\. .*\n)+)", README)[1]
    assert 1 < len(steps.splitlines()) <= 10
    return re.findall(r"`([\w/]+\.py): ([\w.]+)`", steps)


def functions(name):
    """The names of a file's functions, those of methods as Class.method."""
    for node in ast.parse(read(name)).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef))


def calls(f):
    """The functions of this repository that f() calls in any thread, in the order of their first calls."""
    called = {}

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            called[os.path.relpath(frame.f_code.co_filename, ROOT), frame.f_code.co_name] = None

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        f()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(called)


def check_walk(title, f):
    """Every step exists, and f() takes them in this order."""
    steps = walk(title)
    for name, function in steps:
        assert function in functions(name), (name, function)
    called = calls(f)
    order = [called.index((name, function.split(".")[-1])) for name, function in steps]
    assert order == sorted(order), [steps[order.index(i)] for i in sorted(order)]


def test_one_frame_of_conversation_takes_the_steps_shown(world):
    duplex = DuplexModel.load(str(world / "flm"))
    state = duplex.init_state([1])
    check_walk("One frame of conversation", lambda: duplex.step(torch.zeros(1, 1, FRAME), state))


def test_one_training_batch_takes_the_steps_shown(world, tmp_path):
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    stage = train.Stage("once", 1, 2, 1e-3, 0, 48, {"response_tts": (1, 1)}, frame_dropout=0.5)
    check_walk("One training batch", lambda: train.train(task, [stage], str(tmp_path / "out")))


# ------------------------------------------------------------------------------------------------------------
# "Change one thing"


def test_the_changes_shown_can_be_made(world, tmp_path):
    """All diffs in a copy, whose new codec then encodes and whose model learns the new layout."""
    for name in glob.glob("*.py", root_dir=ROOT):
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    for name in glob.glob("*/__init__.py", root_dir=ROOT) + ["kernels/sampling.py"]:
        room = os.path.dirname(name)
        shutil.copytree(os.path.join(ROOT, room), tmp_path / room, dirs_exist_ok=True)
    for diff in re.findall(r"```diff\n(.*?)```", README, re.S):
        done = subprocess.run(["git", "apply", "--unidiff-zero", "-"], input=diff, text=True,
                              capture_output=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr + diff
    shutil.copytree(world / "toy", tmp_path / "world", ignore=shutil.ignore_patterns("encoded"))
    done = subprocess.run([sys.executable, "-c", """if True:
        import dataclasses, json, mimi, model, prepare, toy.codec, train
        codec = toy.codec.CodecTask(mimi.CONFIGS["tiny"], "world", "cpu")
        train.train(codec, [train.Stage("codec", 1, 1, 1e-3, 0)], "codec")
        prepare.encode("world", "codec/checkpoint.pt", "bpe", 300, 1, 0.0, False, 1, "cpu")
        task = train.ModelTask(model.CONFIGS["tiny"], "world/encoded", "cpu")
        stage = next(s for s in train.STAGES["tiny"] if s.name == "fine-tuning 1")
        train.train(task, [dataclasses.replace(stage, steps=3)], "tiny")
        print(json.dumps([*stage.layouts, train.ALPHA_1, len(task.model.blocks), len(task.model.listen),
                          codec.config.codebooks]))
        """], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["written_first", 100.0, 4, 4, 4]
