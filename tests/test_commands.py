"""The commands that the README shows and no other test runs: shorter, on the untrained world."""
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from test_readme import README

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """What `make demo` leaves behind, where it leaves it."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(world / "toy", folder / "data/toy")
    shutil.copytree(world / "flm", folder / "out/tiny")
    (folder / "out/codec").mkdir()
    shutil.copy(world / "codec.pt", folder / "out/codec/checkpoint.pt")
    return folder


@pytest.mark.parametrize("command, shown", [
    ("tests/bench_talk.py hour --minutes 1", "last [0-9]+ requests"),
    ("tests/bench_talk.py sessions --ticks 10", "too slow"),
    ("tests/bench_talk.py echo --items 2", "gain 0.5"),
    ("tests/bench_talk.py step --ticks 10", "times the least"),
    ("tests/bench_talk.py step --ticks 10 --config small", "199.8 M parameters"),
    ("tests/bench_talk.py lmgen --rounds 1", "greedy"),
    ("tests/bench_train.py --rounds 1", "times as fast"),
    ("tests/bench_train.py --rounds 1 --config tiny --layers 1", "TFLOP/s"),
    ("tests/bench_memory.py", "in pieces"),
    ("tests/bench_mimi.py --rounds 2", "the same codes in the first two seconds: 100.00%"),
    ("tests/soak_web.py --minutes 0.2 --every 5", "all gone"),
    ("kernels/bench.py", "v3: 0 of"),
])
def test_a_benchmark(folder, command, shown):
    script, *flags = command.split()
    needs = {"lmgen": "moshi", "bench_mimi": "moshi", "bench_train.py --rounds 1$": "transformers",
             "soak": "aiohttp"}
    for word, package in needs.items():
        if re.search(word, command):
            pytest.importorskip(package)
    if script == "kernels/bench.py" and not shutil.which("g++"):
        pytest.skip("needs g++")
    command = [sys.executable, os.path.join(ROOT, script), *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(shown, done.stdout), done.stdout


def test_your_own_words(folder):
    """The recipe as it stands, but for the half hour of training and the talk at its end."""
    recipe = re.search(r"\*\*Your own words\.\*\*.*?```sh\n(.*?)```", README, re.S)[1]
    *lines, last = recipe.strip().replace("--minutes 30", "--minutes 0.05").splitlines()
    assert last.endswith("chat.py --checkpoint out/words --web")
    commands = "\n".join(lines).replace(".venv/bin/python ", f"{sys.executable} {ROOT}/")
    done = subprocess.run(["bash", "-ec", commands], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "Wrote out/words/checkpoint.pt" in done.stdout, done.stderr[-3000:]
    talk = [sys.executable, os.path.join(ROOT, "chat.py"), "--checkpoint", "out/words", "--input",
            "data/words/turns/000001-0.flac"]
    done = subprocess.run(talk, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "Wrote reply.wav" in done.stdout, done.stderr[-3000:]
