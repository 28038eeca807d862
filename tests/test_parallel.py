"""Several processes (gloo, on the CPU) train as one does, survive being killed, and read each other's
checkpoints."""
import dataclasses
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
from training import parallel, plan, run
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

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def start(processes, data, out, save_every=0, precision="float32", piece=0, script=None, args=None):
    """processes: 0 runs without torchrun. piece: model.PIECE."""
    text, script = script or SCRIPT.format(root=ROOT, tests=os.path.join(ROOT, "tests")), str(out) + ".py"
    args = (save_every, precision, piece) if args is None else args
    with open(script, "w") as f:
        f.write(text)
    with_torchrun = [*TORCHRUN, str(processes)] if processes else []
    return subprocess.Popen([sys.executable, *with_torchrun, script, str(data), str(out), *map(str, args)],
                            stdout=subprocess.DEVNULL, stderr=open(str(out) + ".log", "a"),
                            start_new_session=True)


def wait(process, out):
    assert process.wait(240) == 0, open(str(out) + ".log").read()[-3000:]


def wait_until(happened, process):
    """Two minutes at most, and no longer than the process lives."""
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None and not happened():
        time.sleep(0.01)


def losses(out):
    """The last line logged for each step."""
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    names = ("loss", "text_loss", "semantic_loss")
    return {(e["stage"], e["step"], e.get("split")): {k: e[k] for k in names if k in e} for e in lines}


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
    """Each has its own number of speech frames, so its own number of pieces; the sharded depth transformer is
    still called once by each. In bfloat16, where the two kinds of mixed precision round differently."""
    one = start(0, world / "toy/encoded", tmp_path / "one", 999, "bfloat16")
    two = start(2, world / "toy/encoded", tmp_path / "two", 999, "bfloat16", piece=3 * 300)
    wait(one, tmp_path / "one"), wait(two, tmp_path / "two")
    same(losses(tmp_path / "one"), losses(tmp_path / "two"), 0.05)


@pytest.mark.slow
def test_processes_that_are_killed_go_on_to_the_same_weights(world, tmp_path):
    """Five times without warning, at random moments: both processes, or only one."""
    data, out = world / "toy/encoded", tmp_path / "killed"
    whole = start(2, data, tmp_path / "whole", 999)
    wait(whole, tmp_path / "whole")
    rng = random.Random(3)
    for kill in range(5):
        files = lambda: sorted(os.listdir(out)) if out.exists() else []
        before, process = files(), start(2, data, out)
        wait_until(lambda: files() != before, process)
        time.sleep(rng.random() * 0.5)
        command = ["pgrep", "-g", str(process.pid), "-f", "killed.py"]
        workers = subprocess.run(command, capture_output=True, text=True).stdout.split()
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
    """A run goes on with one process where two stopped, and with two where one stopped."""
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
    flags = f"--config codec --data {world}/toy --out {tmp_path}/x --device cpu"
    done = subprocess.run([sys.executable, *TORCHRUN, "1", "train.py", *flags.split()], capture_output=True,
                          text=True, cwd=ROOT, timeout=120)
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


HELD = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import dataclasses, json, conftest, test_train, torch, train
from training import parallel
from training.muon import make_optimizer
data, out = sys.argv[1:]
device = parallel.begin("cpu")
task = train.ModelTask(conftest.FLM, data, device, precision="bfloat16")
task.from_nothing = False  # AdamW, as a pretrained model
stage = dataclasses.replace(test_train.SHORT[0], batch=4, micro_batch=1)
optimizer = make_optimizer(task.modules, False)
run = train.Run(task, [stage], out, optimizer)
tables, rows = [], []
def look(block, args):
    tables.append(args[1]), rows.append(len(args[0]))
task.model.blocks[0].register_forward_pre_hook(look)
batch = next(run.batches(stage))
totals = run.totals(batch)
run.backward(lambda micro: task.loss(stage, micro, totals), batch)
optimizer.step()
bytes_of = lambda tensors: sum(parallel.local(x).nbytes for x in tensors)
states = [x for s in optimizer.state.values() for k, x in s.items() if k != "step"]
parallel.reshard(task.model)
held = dict(weights=bytes_of(run.params), gradients=bytes_of(p.grad for p in run.params),
            optimiser=bytes_of(states))
run.held_out(stage)
right = train.model.rotary(torch.arange(stage.frames - 1), 8, conftest.FLM.rope_base)[0]
table = all(t.dtype == torch.float32 and torch.equal(t, right) for t in tables)
if parallel.rank() == 0:
    held |= dict(table=table, rows=max(rows), world=parallel.world_size())
    json.dump(held, open(out + "/held.json", "w"))
parallel.end()
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_what_a_process_holds_is_what_the_plan_says(world, tmp_path, processes):
    """Weights, gradients after several micro-batches, and the optimiser's state, in bytes. Rotary tables are
    float32 and equal, and held-out losses are computed in micro-batches too."""
    out = tmp_path / "held"
    out.mkdir()
    script = HELD.format(root=ROOT, tests=os.path.join(ROOT, "tests"))
    process = start(processes, world / "toy/encoded", out, script=script, args=())
    wait(process, out)
    held = json.loads((out / "held.json").read_text())
    stage = dataclasses.replace(test_train.SHORT[0], batch=4, micro_batch=1)
    planned = plan.plan(FLM, stage, max(1, processes))
    assert held["weights"] == pytest.approx(planned.weights, rel=0.02)  # rows are shared in whole numbers
    assert held["gradients"] == pytest.approx(planned.gradients, rel=0.02)
    assert held["optimiser"] == pytest.approx(planned.optimiser, rel=0.02)
    assert held["table"] and held["rows"] == 1 and held["world"] == max(1, processes)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_so_in_one_line(world, tmp_path, number, code):
    out = tmp_path / "o"
    script = ("import signal, train\n"
              "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
              "train.main()")
    flags = ["--data", str(world / "toy/encoded"), "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", script, *flags], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_until((out / "log.jsonl").exists, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "stopped and saved at step" in err.splitlines()[-1] and "Traceback" not in err
    assert load_checkpoint(str(out / "checkpoint.pt"), "flm")["progress"]["step"] >= 1


def test_one_of_several_processes_says_what_was_written(world, tmp_path):
    flags = ("--config tiny --steps 5 --batch 2 --layers 1 --width 32 --heads 2 --mlp 32 --frames 32 "
             f"--device cpu --data {world}/toy/encoded --out {tmp_path}/x")
    done = subprocess.run([sys.executable, *TORCHRUN, "2", "train.py", *flags.split()], capture_output=True,
                          text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Wrote ") == 1
    assert "layers=1, width=32" in done.stdout


def test_a_second_training_in_the_same_folder_is_refused(world, tmp_path):
    stage = [dataclasses.replace(test_train.SHORT[0], steps=1)]
    with run.lock(str(tmp_path)), pytest.raises(ValueError, match="another training writes to it"):
        train.train(train.ModelTask(FLM, str(world / "toy/encoded"), "cpu"), stage, str(tmp_path))
    train.train(train.ModelTask(FLM, str(world / "toy/encoded"), "cpu"), stage, str(tmp_path))


def tensors_of(number):
    return {"model a": torch.full((7, 3), float(number)), "step a": torch.tensor(float(number))}


def test_a_flipped_bit_of_a_shard_is_noticed(tmp_path):
    parallel.save(str(tmp_path), 1, tensors_of(2), {"n": 1})
    parallel.check(folder := parallel.newest(str(tmp_path)))
    path = os.path.join(folder, "0-of-1.pt")
    with open(path, "rb") as f:
        whole = f.read()
    at = whole.index(b"\0\0\0\x40" * 20) + 40
    with open(path, "wb") as f:
        f.write(whole[:at] + b"\1" + whole[at + 1:])
    with pytest.raises(ValueError, match="0-of-1.pt: its part .* is damaged"):
        parallel.check(folder)


def test_sigterm_ends_all_processes_with_one_checkpoint(world, tmp_path):
    """As at the time limit of a batch system: each writes its part once, and says so."""
    out = tmp_path / "o"
    script = SCRIPT.format(root=ROOT, tests=os.path.join(ROOT, "tests")).replace(
        "device =", "save = parallel.save\n"
                    "def counted(*args):\n    save(*args)\n    sys.stderr.write('saved\\n')  # in one write\n"
                    "parallel.save = counted\ndevice =")
    process = start(2, world / "toy/encoded", out, script=script, args=(999, "float32", 0))
    wait_until((out / "log.jsonl").exists, process)
    os.killpg(process.pid, signal.SIGTERM)  # torchrun passes it on, so the others may get it twice
    assert process.wait(60) != 0
    said = open(str(out) + ".log").read()
    assert said.count("saved\n") == 2 and said.count("stopped and saved at step") >= 2, said[-3000:]
    (folder,) = [name for name in os.listdir(out) if name.startswith("shards-")]
    assert sorted(os.listdir(out / folder)) == ["0-of-2.pt", "1-of-2.pt"]
    facts, _ = parallel.read(str(out / folder))
    assert facts["progress"]["step"] >= 1


def test_a_sharded_checkpoint_survives_what_an_earlier_save_left(tmp_path):
    """A leftover .partial with foreign files stays out of the new checkpoint, and the old one goes last."""
    parallel.save(str(tmp_path), 1, tensors_of(1), {"n": 1})
    partial = tmp_path / "shards-00000002.partial"
    partial.mkdir()
    (partial / "1-of-2.pt").write_bytes(b"of another world")
    (tmp_path / "shards-00000001/notes.txt").write_text("not ours")
    parallel.save(str(tmp_path), 2, tensors_of(2), {"n": 2})
    assert os.listdir(tmp_path) == ["shards-00000002"]
    facts, (saved,) = parallel.read(parallel.newest(str(tmp_path)))
    assert facts == {"n": 2} and torch.equal(saved["model a"], tensors_of(2)["model a"])
    parallel.save(str(tmp_path), 2, tensors_of(3), {"n": 3})  # the same step again
    assert parallel.read(parallel.newest(str(tmp_path)))[0] == {"n": 3}
    (tmp_path / "shards-00000002/0-of-1.pt").unlink()
    with pytest.raises(ValueError, match="some of its files are missing"):
        parallel.read(parallel.newest(str(tmp_path)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_hundred_kills_inside_a_save_never_cost_the_checkpoint(tmp_path):
    begun = time.perf_counter()
    parallel.save(str(tmp_path), 0, tensors_of(0), {"n": 0})
    rng, last, took = random.Random(0), 0, time.perf_counter() - begun
    for kill in range(100):
        saved, done = os.pipe()
        child = os.fork()
        if child == 0:
            for n in range(last + 1, last + 1000):
                parallel.save(str(tmp_path), n, tensors_of(n), {"n": n})
                os.write(done, b".")
            os._exit(0)
        os.read(saved, 1)  # wait for the first
        time.sleep(rng.random() * 2 * took)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        facts, (tensors,) = parallel.read(parallel.newest(str(tmp_path)))
        assert facts["n"] >= last and (tensors["model a"] == facts["n"]).all()
        last = facts["n"]
        os.close(saved)
        os.close(done)
    assert last >= 100


def test_saving_takes_a_twentieth_of_the_time_at_most(world, tmp_path):
    r = test_train.new_run(world, tmp_path / "o", save_every=0)
    next(stages := r.unfinished_stages())
    saves = []
    r.save = lambda: saves.append(r.step)
    batch = next(r.batches(r.stage))
    for r.save_took, expected in ((0.0, 1), (100.0, 0)):
        saves.clear()
        r.end_step(batch, {"loss": torch.tensor(1.0)}, 1e-3)
        assert len(saves) == expected
    stages.close()
