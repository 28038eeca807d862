"""Several processes (gloo, on the CPU) train as one does, survive being killed, and read each other's checkpoints."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import model
import test_train
import train
from conftest import FLM, ROOT
from files.checkpoint import load_checkpoint
from training.muon import make_optimizer

SCRIPT = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import conftest, model, test_train, torch, train; from training import parallel
torch.set_num_threads(1)
data, out, save_every, precision, piece = sys.argv[1:]
model.PIECE = int(piece) or model.PIECE
device = parallel.begin("cpu")
task = train.ModelTask(conftest.FLM, data, device, precision=precision)
train.train(task, test_train.SHORT, out, resume=True, save_every=float(save_every))
parallel.end()
"""


def start(processes, data, out, save_every=0, precision="float32", piece=0):
    """processes: 0 for none of torchrun's. piece: model.PIECE."""
    script = os.path.join(str(out) + ".py")
    with open(script, "w") as f:
        f.write(SCRIPT.format(root=ROOT, tests=os.path.join(ROOT, "tests")))
    with_torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    return subprocess.Popen([sys.executable, *with_torchrun, script, str(data), str(out), str(save_every), precision, str(piece)],
                            stdout=subprocess.DEVNULL, stderr=open(str(out) + ".log", "a"), start_new_session=True)


def wait(process, out):
    assert process.wait(240) == 0, open(str(out) + ".log").read()[-3000:]


def wait_until(happened, process):
    """Two minutes at most, and no longer than the process lives."""
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None and not happened():
        time.sleep(0.01)


def losses(out):
    """The last word on each step."""
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    return {(e["stage"], e["step"], e.get("split")): {k: e[k] for k in ("loss", "text_loss", "semantic_loss") if k in e} for e in lines}


def same(a, b, tolerance):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=tolerance, abs=1.1e-4), key  # the log has four digits


def weights(out):
    return load_checkpoint(str(out / "checkpoint.pt"), "flm")["model"]


def test_two_processes_follow_one(world, tmp_path):
    data = world / "toy/encoded"
    one, two = start(0, data, tmp_path / "one", 999), start(2, data, tmp_path / "two", 999)
    wait(one, tmp_path / "one"), wait(two, tmp_path / "two")
    same(losses(tmp_path / "one"), losses(tmp_path / "two"), 1e-5)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-5)
    model.FLM.load(str(tmp_path / "two/checkpoint.pt"))  # what chat.py reads


def test_two_processes_with_losses_in_pieces_follow_one(world, tmp_path):
    """Each has its own number of speech frames, so its own number of pieces; the sharded depth transformer is still called
    once by each. In bfloat16, where the two kinds of mixed precision round differently."""
    one = start(0, world / "toy/encoded", tmp_path / "one", 999, "bfloat16")
    two = start(2, world / "toy/encoded", tmp_path / "two", 999, "bfloat16", piece=3 * 300)
    wait(one, tmp_path / "one"), wait(two, tmp_path / "two")
    same(losses(tmp_path / "one"), losses(tmp_path / "two"), 0.05)


@pytest.mark.slow
def test_processes_that_are_killed_go_on_to_the_same_weights(world, tmp_path):
    """Five times without warning: both of them, or one, at any moment."""
    data, out = world / "toy/encoded", tmp_path / "killed"
    whole = start(2, data, tmp_path / "whole", 999)
    wait(whole, tmp_path / "whole")
    rng = random.Random(3)
    for kill in range(5):
        files = lambda: sorted(os.listdir(out)) if out.exists() else []
        before, process = files(), start(2, data, out)
        wait_until(lambda: files() != before, process)
        time.sleep(rng.random() * 0.5)
        workers = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "killed.py"], capture_output=True, text=True).stdout.split()
        workers = [int(w) for w in workers if int(w) != process.pid]
        if kill % 2 and workers:
            os.kill(rng.choice(workers), signal.SIGKILL)  # torchrun stops the other
            process.wait(120)
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    wait(start(2, data, out), out)
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_two_one_two(world, tmp_path):
    """A checkpoint of two processes goes on in one, and that one's in two."""
    data, out = world / "toy/encoded", tmp_path / "some"
    wait(start(2, data, tmp_path / "whole", 999), tmp_path / "whole")
    for processes in (2, 1, 2):
        process = start(processes, data, out)
        at = len(losses(out)) if (out / "log.jsonl").exists() else 0
        wait_until(lambda: (out / "log.jsonl").exists() and len(losses(out)) > at, process)
        os.killpg(process.pid, signal.SIGTERM)  # saves and stops
        process.wait(120)
    wait(start(1, data, out), out)
    same(losses(tmp_path / "whole"), losses(out), 1e-5)


def test_the_codec_trains_alone(world, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "train.py", "--config",
                           "codec", "--data", str(world / "toy"), "--out", str(tmp_path / "x"), "--device", "cpu"],
                          capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode and "the codec trains in one process" in done.stderr


def test_sigterm_saves(world, tmp_path):
    process = start(0, world / "toy/encoded", tmp_path / "o", 999)
    wait_until((tmp_path / "o/log.jsonl").exists, process)
    process.terminate()
    process.wait(60)
    assert "stopped and saved" in open(str(tmp_path / "o") + ".log").read()
    assert load_checkpoint(str(tmp_path / "o/checkpoint.pt"), "flm")["progress"]["step"] >= 1


def test_a_loss_that_is_no_number_names_what_it_learned_from(world, tmp_path):
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    r = train.Run(task, test_train.SHORT, str(tmp_path / "o"), make_optimizer(task.modules, True))
    r.save()
    before = (tmp_path / "o/checkpoint.pt").read_bytes()
    with torch.no_grad():
        task.model.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the loss is nan at step 0 of one; .*/00000.npy from frame \d+"):
        test_train.gradients(r, next(r.batches(r.stage)))
    assert (tmp_path / "o/checkpoint.pt").read_bytes() == before


def test_a_damaged_shard_names_itself(world, tmp_path):
    shutil.copytree(world / "toy/encoded", tmp_path / "encoded")
    codes = np.load(tmp_path / "encoded/00000.npy")
    codes[:] = 99
    np.save(tmp_path / "encoded/00000.npy", codes)
    task = train.ModelTask(FLM, str(tmp_path / "encoded"), "cpu")
    with pytest.raises(ValueError, match=r"00000.npy from frame \d+: damaged"):
        task.batch(test_train.SHORT[0], 0.5, "train", random.Random(0))
