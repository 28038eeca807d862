"""The loop: batches are functions of the step, a killed run goes on to the same weights, nothing is
half-written."""
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

import files.checkpoint
import model
import prepare
import streams
import train
import toy.codec
import training.run
from conftest import CODEC, FLM, ROOT, encode, loss_of, run
from files.checkpoint import load_checkpoint
from published.release import load_release
from streams import LISTEN, SPEAK, TEXT, Utterance
from files.tokenizer import load_tokenizer
from train import STAGES, Stage
from training.muon import make_optimizer
from training.run import default_precision

TOY = {"wait": 0.3, "frame_dropout": 0.1, "depth": (0.5, 0.2)}
SHORT = [Stage("one", 14, 2, 1e-3, 1e-3, 48, {"tts": (1, 0), "asr": (0, 1)}, **TOY),
         Stage("two", 26, 2, 1e-3, 0, 48, {"asr_response_tts": (1, 1), "free_response_tts": (1, 1)}, **TOY)]

# a run of the model and of the codec, saving after every step
SCRIPT = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import conftest, test_train, toy.codec, torch, train
torch.set_num_threads(1); torch.manual_seed(1)
kind, data, out = sys.argv[1:]
if kind == "model":
    task, stages = train.ModelTask(conftest.FLM, data + "/encoded", "cpu"), test_train.SHORT
else:
    task, stages = toy.codec.CodecTask(conftest.CODEC, data, "cpu"), [train.Stage("codec", 25, 1, 1e-3, 0)]
train.train(task, stages, out, resume=True, save_every=0)
"""


def start(kind, data, out):
    script = SCRIPT.format(root=ROOT, tests=os.path.join(ROOT, "tests"))
    return subprocess.Popen([sys.executable, "-c", script, kind, str(data), str(out)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("kind", ["model", "codec"])
def test_a_killed_run_goes_on_to_the_same_weights(world, tmp_path, kind):
    whole = start(kind, world / "toy", tmp_path / "whole")
    path = tmp_path / "killed/checkpoint.pt"
    kills, seen = 0, None
    while True:
        process = start(kind, world / "toy", tmp_path / "killed")
        deadline = time.time() + 60
        if kills < 3:  # wait until it has moved on, then kill it with no warning
            while process.poll() is None and time.time() < deadline:
                now = path.stat().st_mtime_ns if path.exists() else None
                if now != seen:
                    break
                time.sleep(0.001)
            time.sleep(random.Random(kills).random() * 0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills, seen = kills + 1, path.stat().st_mtime_ns if path.exists() else None
        else:
            assert process.wait(120) == 0
            break
    assert whole.wait(120) == 0
    kind = {"model": "flm", "codec": "codec"}[kind]
    a, b = load_checkpoint(str(path), kind), load_checkpoint(str(tmp_path / "whole/checkpoint.pt"), kind)
    assert a["progress"] == b["progress"]
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_training_lowers_the_loss(world, tmp_path):
    torch.manual_seed(0)
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    stage = Stage("s", 150, 4, 3e-3, 0, 64, {"response_tts": (1, 1)}, wait=0.3)
    train.train(task, [stage], str(tmp_path / "o"))
    log = [json.loads(line) for line in open(tmp_path / "o/log.jsonl")]
    first, last = log[0], [e for e in log if "loss" in e][-1]
    assert last["loss"] < 0.6 * first["loss"]
    assert {"text_loss", "wait_loss", "semantic_loss", "acoustic_loss", "text_accuracy"} <= log[-1].keys()
    assert log[-1]["split"] == "held-out" and {"tokens_per_second", "seconds_left", "lr"} <= log[0].keys()


def new_run(world, out, stages=SHORT, precision="float32", **kwargs):
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu", precision=precision)
    return train.Run(task, stages, str(out), make_optimizer(task.modules, True), **kwargs)


def gradients(run_, batch):
    """Of Eq. 3 for a batch, unclipped, and its parts."""
    totals = run_.totals(batch)
    parts, _ = run_.backward(lambda micro: run_.task.loss(run_.stage, micro, totals), batch)
    return torch.cat([p.grad.flatten() for p in run_.params]), parts


def test_micro_batches_threads_and_precision_do_not_change_the_objective(world, tmp_path):
    """One, two and four micro-batches, in threads and in turn: the same gradient to rounding, in both
    precisions. The rows differ in how many monologue tokens they have."""
    stage = dataclasses.replace(SHORT[0], batch=4, layouts={"tts": (1, 1), "language": (1, 1)})
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 3e-2)):
        run_ = new_run(world, tmp_path / precision, [stage], precision)
        batch = next(run_.batches(stage))
        tokens = (batch[0][:, TEXT] != run_.task.vocab.wait).sum(1)
        assert tokens.min() < tokens.max()
        threads, found = run_.threads, []
        for run_.micro_batches in (1, 2, 4):
            for run_.threads in (threads, None):
                found.append(gradients(run_, batch))
        (whole, parts), *others = found
        for gradient, same in others:
            assert (gradient - whole).norm() < tolerance * whole.norm()
            for name in parts:
                assert torch.isclose(parts[name], same[name], rtol=tolerance, atol=1e-6), name


def test_a_batch_is_shared_row_by_row(world):
    """A row is the same when it is made alone and with the others."""
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    stage = dataclasses.replace(SHORT[1], batch=4)
    batch = lambda rows: task.batch(stage, 0.5, "train", random.Random(3), rows)
    whole, part = batch(range(4)), batch(range(1, 4, 2))
    assert all(torch.equal(a[1::2], b) for a, b in zip(whole, part))


def test_the_codecs_loss_does_not_depend_on_micro_batches(world, tmp_path):
    stage = Stage("codec", 5, 4, 1e-3, 0)
    task = toy.codec.CodecTask(CODEC, str(world / "toy"), "cpu", "float32")
    run_ = train.Run(task, [stage], str(tmp_path / "o"), make_optimizer(task.modules, True))
    batch, found = next(run_.batches(stage)), []
    for run_.micro_batches in (1, 2, 4):
        found.append(gradients(run_, batch))
    for gradient, parts in found[1:]:
        assert (gradient - found[0][0]).norm() < 1e-4 * found[0][0].norm()
        assert torch.isclose(parts["loss"], found[0][1]["loss"], rtol=1e-5)


def test_precision_is_chosen_by_what_the_machine_supports(monkeypatch, world, tmp_path):
    """Never by timing. The checkpoint records it, and a run does not go on in another precision."""
    for supported, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
        assert default_precision("cpu") == name
    assert default_precision("cuda") == "bfloat16"
    run_ = new_run(world, tmp_path / "o", precision="bfloat16")
    run_.save()
    with pytest.raises(ValueError, match="--precision bfloat16 goes on"):
        new_run(world, tmp_path / "o", precision="float32", resume=True)


def test_both_precisions_learn(world, tmp_path):
    for precision in ("float32", "bfloat16"):
        task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu", precision=precision)
        stage = Stage("s", 80, 4, 3e-3, 0, 64, {"tts": (1, 1)}, wait=0.3)
        train.train(task, [stage], str(tmp_path / precision))
        log = [e for e in map(json.loads, open(tmp_path / precision / "log.jsonl")) if "loss" in e]
        for name in ("text_loss", "semantic_loss", "acoustic_loss"):
            assert log[-1][name] < 0.9 * log[0][name], (precision, name)


@pytest.mark.parametrize("seconds", [2, 12, 40, lambda now: 3 if now < 150 else 9])
def test_a_time_budget_is_kept_on_any_machine(world, tmp_path, monkeypatch, seconds):
    """Five minutes of a clock that only batches and checkpoints move: the run ends within a step of them, and
    its stages have their shares, unless one step is longer. The last case: a machine that becomes slow."""
    now = [1000.0]
    monkeypatch.setattr(training.run, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    step = seconds if callable(seconds) else lambda _: seconds
    stages = [dataclasses.replace(s, batch=1, frames=16, layouts={"language": (1, 1)}) for s in SHORT]
    task, minutes = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu"), 5
    batch, counts = task.batch, {}

    def slow_batch(stage, progress, split, *rest):
        now[0] += step(now[0] - 1000) * (0.3 if split == "seen" else 1)
        counts[stage.name, split] = counts.get((stage.name, split), 0) + 1
        return batch(stage, progress, split, *rest)

    def slow_save(run_):
        run_.save_took = 3 * step(now[0] - 1000)
        now[0] += run_.save_took
        run_.saved_at = now[0]
    task.batch = slow_batch
    monkeypatch.setattr(train.Run, "save", slow_save)
    train.train(task, stages, str(tmp_path / "o"), minutes)
    took, each = now[0] - 1000, step(now[0] - 1000)
    assert took <= 60 * minutes + 6 * each, took
    if each < 20:
        assert took > 0.9 * 60 * minutes - 4 * each
    if each == 2:
        assert 1.5 * counts["one", "train"] < counts["two", "train"] < 2.5 * counts["one", "train"]


def test_a_stage_gets_as_many_batches_as_steps(world, tmp_path):
    run_ = new_run(world, tmp_path / "o")
    next(stages := run_.unfinished_stages())
    for n, batch in enumerate(run_.batches(SHORT[0]), 1):
        run_.progress["step"] += 1
    assert n == SHORT[0].steps
    stages.close()


def test_a_spoilt_batch_is_named(world, tmp_path):
    """The error names the clips that the step learned from."""
    run_ = new_run(world, tmp_path / "o")
    run_.task.data.used = []
    next(run_.batches(SHORT[0]))
    used, run_.task.data.used = sorted(set(run_.task.data.used)), None
    assert used and run_.task.clips_of(SHORT[0], run_.fraction(), run_.rng(0), run_.rows(SHORT[0])) == used


def test_every_batch_is_a_function_of_its_step(world):
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    a, b, c = (task.batch(SHORT[1], 0.5, "train", random.Random(s))[0] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_batches_hold_what_their_layout_says(world):
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    v = task.vocab
    stage = lambda layout: Stage("s", 1, 8, 0, 0, 96, {layout: (1, 1)})
    of = lambda layout: task.batch(stage(layout), 0, "train", random.Random(0))[0]
    assert (of("tts")[:, LISTEN] == v.empty).all() and (of("asr")[:, SPEAK] == v.empty).all()
    assert (of("asr_response_tts")[:, TEXT] == v.asr).any()
    assert not (of("response_tts")[:, TEXT] == v.asr).any()
    for layout in ("response_tts", "free_response_tts"):
        assert (of(layout)[..., 1:][:, 1:] < v.empty).all()  # real audio codes throughout


def test_the_variants_of_the_papers_questions(world, monkeypatch):
    """The same steps for each; word-aligned text stands where the words are spoken."""
    from questions import ask, paper
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    sizes = [(sum(s.steps for s in stages), *{(s.batch, s.frames, s.lr) for s in stages})
             for stages in (variant.stages for variant in paper.PAPER.values())]
    assert len({*sizes}) == 1
    for variant in (v for variants in ask.QUESTIONS.values() for v in variants.values()):
        for s in variant.stages:
            grid, *_ = task.batch(dataclasses.replace(s, batch=2), 0.5, "train", random.Random(0))
            assert grid.shape == (2, 17, s.frames)
    u = Utterance([7, 8], np.arange(6)[:, None].repeat(8, 1), 5, [0, 3])
    grid = paper.aligned_tts(u, task.vocab)
    assert [t for t in range(grid.shape[1]) if grid[TEXT, t] != task.vocab.wait] == [2, 5]
    assert grid[SPEAK][0, 2:].tolist() == [0, 1, 2, 3, 4, 5]


def test_interruptions_come_with_probability_0_7(world):
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    calls, original = [], streams.free_response_tts

    def record(turns, gaps, barge_in, *rest):
        calls.extend(barge_in[:-1])
        return original(turns, gaps, barge_in, *rest)
    streams.free_response_tts = record
    try:
        rng = random.Random(0)
        for _ in range(1500):
            task.data.grid("free_response_tts", STAGES["tiny"][-1], "train", rng)
    finally:
        streams.free_response_tts = original
    assert abs(sum(b is not None for b in calls) / len(calls) - 0.7) < 0.04


def test_a_noisy_room_changes_only_silence_between_what_is_heard(world, monkeypatch):
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    data, v, changed = task.data, task.vocab, 0
    long = dataclasses.replace(STAGES["tiny"][-1], frames=10_000)
    assert len(data.noise["train"]) and not {*data.noise["train"]} & {line for part in data.heard["train"]
                                                                      for line, _ in part.tolist()}
    for seed in range(20):
        grids = []
        for share in (0.0, 1.0):
            monkeypatch.setattr(train, "NOISE", share)
            rng = random.Random(seed)
            grids.append(data.grid("response_tts", long, "train", rng))
        quiet, noisy = grids
        different = (quiet != noisy).any(0)
        assert (quiet[:LISTEN.start] == noisy[:LISTEN.start]).all()
        assert (quiet[LISTEN][:, different] == np.reshape(v.silence[-1], (-1, 1))).all()
        changed += different.sum()
    assert changed > 50


def test_answers_leak_into_what_is_heard(world, tmp_path, monkeypatch):
    shutil.copytree(world / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns("encoded"))
    prepare.encode(str(tmp_path / "toy"), str(world / "codec.pt"), "bpe", 300, 2, 1.0, False, 1, "cpu")
    data = train.ModelTask(FLM, str(tmp_path / "toy/encoded"), "cpu").data
    for share in (0.0, 1.0):
        monkeypatch.setattr(train, "LEAKAGE", share)
        turns = data.dialogue(int(data.dialogues["train"][0]))
        user, model = (data.utterance(turn, random.Random(0)) for turn in turns[0])
        assert user.echo is None and (model.echo is not None) == bool(share)
    assert 0.1 * 12.5 <= len(model.echo) - len(model.codes) + 1 <= 0.6 * 12.5 + 1


def test_stories_and_backchannels_reach_the_batches(world):
    """What the model says while a user tells a story stands in the grids of fine-tuning 2 where the manifest
    says; in fine-tuning 1 there are no stories. Users' backchannels are only ever heard while the model
    speaks."""
    data = world / "toy/encoded"
    task = train.ModelTask(FLM, str(data), "cpu")
    v, rng, tokenizer = task.vocab, random.Random(0), load_tokenizer(str(data / "tokenizer.json"))
    dialogues = [task.data.dialogue(line) for line in task.data.free["train"]]
    stories = [turns for turns in dialogues if turns[0][0]["interjections"]]
    plain = [task.data.dialogue(line) for line in task.data.dialogues["train"]]
    assert stories and not any(a.get("interjections") for turns in plain for a, _ in turns)
    for ((user, reply),) in stories:
        heard, answer = task.data.utterance(user, rng), task.data.utterance(reply, rng)
        grid = streams.response_tts([(heard, answer)], [3], v)
        for (frame, said), told in zip(heard.interjections, user["interjections"], strict=True):
            assert abs(frame / 12.5 - told["at"]) < 0.25
            text = [t for t in grid[TEXT, 3 + frame - 2:][:len(said.tokens)].tolist()]
            assert tokenizer.decode(text) == " " + told["text"]
            n = min(said.speech, heard.speech - frame)  # at the latest, the reply takes its place
            assert n > 2 and (grid[SPEAK, 3 + frame:3 + frame + n] == said.codes[:n].T).all()
    backchannels = {*task.data.backchannels["train"].tolist()}
    heard = {line for part in task.data.heard["train"] for line, _ in part.tolist()}
    assert backchannels and not backchannels & heard


def test_the_paper_is_in_the_tables():
    """Table 3 and section 3.1."""
    rows = STAGES["7b"]
    assert [(s.lr, s.lr_end, s.batch, s.frames) for s in rows] == [
        (2e-4, 1e-5, 256, 8192), (1e-5, 8e-6, 256, 8192), (1e-5, 8e-6, 256, 8192), (8e-6, 7e-6, 256, 8192)]
    assert (train.ALPHA_1, train.ALPHA_2, train.BETA, rows[0].wait) == (1, 0.5, 1, 0.01)
    for config in ("tiny", "small", "0.5b", "7b"):
        with torch.device("meta"):
            model.FLM(model.CONFIGS[config])
        names = [s.name for s in STAGES[config]]
        assert names[-4:] == [s.name for s in rows]
        assert names[:-4] == ["language"] * (config in ("tiny", "small"))
        for stage in STAGES[config]:
            assert all(hasattr(streams, name) for name in stage.layouts)


def test_a_finished_run_is_not_repeated(world, tmp_path):
    path = world / "flm/checkpoint.pt"
    before = path.read_bytes()
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    stage = Stage("once", 2, 2, 1e-3, 0, 48, {"response_tts": (1, 1)})
    with pytest.raises(ValueError, match="--resume"):
        train.train(task, [stage], str(world / "flm"))
    train.train(task, [stage], str(world / "flm"), resume=True)
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_config_is_refused(world):
    task = train.ModelTask(dataclasses.replace(FLM, layers=2), str(world / "toy/encoded"), "cpu")
    with pytest.raises(ValueError, match="another config"):
        train.train(task, SHORT, str(world / "flm"), resume=True)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(world, tmp_path):
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    good, params = task.loss, [*task.modules.parameters()]
    bad = lambda: (math.nan * sum(p.sum() for p in params), {}, None)
    task.loss = lambda stage, *a: good(stage, *a) if stage.name == "one" else bad()
    with pytest.raises(ValueError, match="step 0 of two"):
        train.train(task, SHORT, str(tmp_path))
    progress = load_checkpoint(str(tmp_path / "checkpoint.pt"), "flm")["progress"]
    assert (progress["stage"], progress["step"]) == (1, 0)


@pytest.mark.parametrize("damage, message", [
    ("cut", "not a checkpoint"), ("text", "not a checkpoint"), ("codec", "is not a flm checkpoint"),
    ("key", "unknown or missing keys"), ("tensor", "tensors are not those"),
    ("missing", "no such checkpoint")])
def test_damaged_checkpoints_are_one_clear_error(world, tmp_path, damage, message):
    path = tmp_path / "checkpoint.pt"
    whole = (world / "flm/checkpoint.pt").read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:len(whole) // 2])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "codec":
        path.write_bytes((world / "codec.pt").read_bytes())
    elif damage in ("key", "tensor"):
        saved = load_checkpoint(str(world / "flm/checkpoint.pt"), "flm")
        if damage == "key":
            saved["config"]["colour"] = 1
        else:
            saved["model"]["norm.weight"] = torch.zeros(3)
        torch.save(saved, path)
    with pytest.raises((ValueError, OSError), match=message) as error:
        model.FLM.load(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage, message", [
    (lambda state: state[0].update(exp_avg=torch.zeros(3)), "states are not those of this model"),
    (lambda state: state[0].pop("exp_avg"), "states are not those of this model"),
    (lambda state: state[0].update(exp_avg=[1.0]), "its checkpoint is damaged"),
    (lambda state: state[0]["exp_avg"].fill_(math.nan), "optimiser's exp_avg holds NaN"),
    (lambda state: state.update({99: state[0]}), "its checkpoint is damaged"),
    (lambda state: state.update({0: 7}), "its checkpoint is damaged")])
def test_another_models_optimiser_is_one_clear_error(world, tmp_path, damage, message):
    run_ = new_run(world, tmp_path / "o")
    for p in run_.params:
        p.grad = torch.zeros_like(p)
    run_.optimizer.step()
    run_.save()
    assert new_run(world, tmp_path / "o", resume=True).optimizer.state
    saved = load_checkpoint(run_.path, "flm")
    damage(saved["optimizer"]["state"])
    torch.save(saved, run_.path)
    with pytest.raises(ValueError, match=message) as error:
        new_run(world, tmp_path / "o", resume=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_flipped_bit_of_a_large_checkpoint_is_noticed_when_all_of_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files.checkpoint, "CHECKED", 0)
    path = tmp_path / "checkpoint.pt"
    torch.save({"kind": "codec", "config": {}, "model": {"x": torch.full((5000,), 2.0)}}, path)
    load_checkpoint(str(path), "codec")
    whole = path.read_bytes()
    at = whole.index(b"\0\0\0\x40" * 100) + 40
    path.write_bytes(whole[:at] + b"\1" + whole[at + 1:])
    with pytest.raises(ValueError, match="data/0 is damaged"):
        load_checkpoint(str(path), "codec")
    path.write_bytes(whole[:-100])
    for mmap in (False, True):
        with pytest.raises(ValueError, match="cut off"):
            load_checkpoint(str(path), "codec", mmap)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"kind": "flm", "x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "evil.pkl"):
        with pytest.raises(ValueError):
            load_checkpoint(str(tmp_path / name), "flm")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_is_one_clear_error_and_keeps_the_old_checkpoint(world, tmp_path):
    """The system refuses files over 20 kB, as it refuses all on a full disk."""
    script = ("import sys, resource, signal; sys.path[:0] = [{root!r}, {tests!r}]\n"
              "import torch, files.checkpoint, conftest\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
              "try:\n    files.checkpoint.save_checkpoint(sys.argv[1], 'codec', conftest.CODEC,\n"
              "                                      x=torch.zeros(100_000))\n"
              "except (ValueError, OSError) as e:\n    sys.exit(f'error: {{e}}')\n").format(
        root=ROOT, tests=os.path.join(ROOT, "tests"))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == 1 and "checkpoint.pt" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("args, message", [
    (["--config", "huge"], "invalid choice: 'huge'"), (["--data", "nowhere"], "prepare.py encode"),
    (["--config", "codec", "--data", "nowhere"], "prepare.py toy"), (["--colour", "1"], "unrecognized"),
    (["--colour", "1"], "--layers"), (["--layers", "two"], "--layers two: is not of type int"),
    (["--frames", "512"], "need --context 512"), (["--width", "190"], "heads must divide"),
    (["--device", "mps"], "not supported")])
def test_wrong_flags_are_a_clear_error(tmp_path, args, message):
    code, _, err = run("train.py", *args, "--out", tmp_path / "x")
    assert code in (1, 2) and message in err.splitlines()[-1] and not (tmp_path / "x").exists()


@pytest.mark.parametrize("config", ["tiny", "7b"])
def test_flags_change_the_config_and_keep_the_stages_in_proportion(config):
    """--steps is for all stages together and --lr the highest rate."""
    flags = "--layers 6 --lr 1e-3 --steps 2000 --batch 4 --wait 0.1 --depth 0.5,0.2".split()
    changed, stages = train.resolve(*train.build_parser().parse_known_args(["--config", config, *flags]))
    assert changed == dataclasses.replace(model.CONFIGS[config], layers=6)
    steps, rate = sum(s.steps for s in STAGES[config]), max(s.lr for s in STAGES[config])
    for new, old in zip(stages, STAGES[config], strict=True):
        assert abs(new.steps - old.steps * 2000 / steps) <= 0.5
        assert new.lr == pytest.approx(old.lr * 1e-3 / rate)
        assert new.lr_end == pytest.approx(old.lr_end * 1e-3 / rate)
        assert new == dataclasses.replace(old, steps=new.steps, epochs=0, lr=new.lr, lr_end=new.lr_end,
                                          batch=4, wait=0.1, depth=(0.5, 0.2))


def use_clips(folder, world, splits):
    """A manifest in `folder` with a clip of the toy world for each of the splits."""
    lines = [json.loads(line) for line in open(world / "toy/manifest.jsonl")]
    turns = [t for d in lines if len(d["turns"]) == 2 for t in d["turns"]]
    parts = [{"audio": str(world / "toy" / t["audio"]), "text": t["text"], "split": split}
             for t, split in zip(turns, splits)]
    folder.mkdir()
    (folder / "manifest.jsonl").write_text("".join(json.dumps(part) + "\n" for part in parts))
    return folder


@pytest.mark.parametrize("held_out", [0, 2])
def test_the_codec_trains_with_few_clips(world, tmp_path, held_out):
    """Fewer than a batch of four to train on, and few or none held out."""
    data = use_clips(tmp_path / "data", world, ["train"] * 3 + ["seen"] * held_out)
    task = toy.codec.CodecTask(CODEC, str(data), "cpu")
    train.train(task, [Stage("codec", 2, 4, 1e-3, 0)], str(tmp_path / "o"))
    log = [json.loads(line) for line in open(tmp_path / "o/log.jsonl")]
    assert any(e.get("split") == "held-out" for e in log) == (held_out > 0)
    assert load_checkpoint(str(tmp_path / "o/checkpoint.pt"), "codec")["progress"]["stage"] == 1


def test_the_codec_needs_a_clip_to_train_on(world, tmp_path):
    data = use_clips(tmp_path / "data", world, ["seen"] * 3)
    code, _, err = run("train.py", "--config", "codec", "--data", data, "--out", tmp_path / "o",
                       "--device", "cpu")
    assert code == 1 and "holds no clip of at most six seconds to train on" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "o").exists()


def test_nothing_held_out_means_no_held_out_loss(world, tmp_path):
    data = use_clips(tmp_path / "data", world, ["train"] * 6)
    encode(data, world)
    task = train.ModelTask(FLM, str(data / "encoded"), "cpu")
    assert task.holds(SHORT[0], "train") and not task.holds(SHORT[0], "seen")
    train.train(task, [dataclasses.replace(SHORT[0], steps=4)], str(tmp_path / "o"))
    log = [json.loads(line) for line in open(tmp_path / "o/log.jsonl")]
    assert log and not any("split" in e for e in log)
    assert load_checkpoint(str(tmp_path / "o/checkpoint.pt"), "flm")["progress"]["stage"] == 1


@pytest.mark.parametrize("command, message", [
    ("bench_train", "data/toy/encoded: not there; needs what `make demo` leaves"),
    ("bench_train --config tiny --layers 1", "data/toy/encoded: not there; needs what `make demo` leaves"),
    ("questions.ask nothing", "no question nothing; there are paper, long"),
    ("bench_train --device mps", "not supported"), ("bench_memory --device gpu", "unknown; use cpu or cuda")])
def test_benchmarks_say_in_one_line_what_they_miss(tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*command.split())
    assert code == 1 and message in err and len(err.splitlines()) == 1 and not out
    assert not any(tmp_path.iterdir())


def test_a_benchmark_says_which_package_it_misses(tmp_path, monkeypatch):
    import bench_train
    (tmp_path / "data/toy/encoded").mkdir(parents=True)
    (tmp_path / "data/toy/encoded/meta.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_train.importlib.util, "find_spec", lambda name: None)
    code, _, err = run("bench_train")
    assert code == 1 and err == "error: needs the package transformers, which `make slow` installs\n"


def test_a_picture_of_a_run(world):
    pytest.importorskip("matplotlib")
    code, out, err = run("evals.plot", world / "flm")
    assert code == 0 and out == f"Wrote {world / 'flm'}/log.png\n", err
    assert (world / "flm/log.png").read_bytes()[:4] == b"\x89PNG"
    code, _, err = run("evals.plot", world / "nowhere")
    assert code == 1 and "no such log" in err


def test_training_may_start_from_a_language_model(world, tmp_path):
    from test_published import as_qwen
    start = model.FLM(dataclasses.replace(FLM, vocab_size=400))
    as_qwen(start, tmp_path, "model.", "qwen2")
    config = dataclasses.replace(FLM, layers=5, width=16)
    task = train.ModelTask(config, str(world / "toy/encoded"), "cpu", str(tmp_path))
    assert torch.equal(task.model.text.weight, start.text.weight) and task.config.layers == FLM.layers
    loss, _, _ = loss_of(task, SHORT[0])
    assert torch.isfinite(loss)
    small = model.FLM(dataclasses.replace(FLM, vocab_size=200))
    as_qwen(small, tmp_path, "model.", "qwen2")
    with pytest.raises(ValueError, match="has 200 words, fewer than"):
        train.ModelTask(FLM, str(world / "toy/encoded"), "cpu", str(tmp_path))


def test_a_trained_model_is_exported_as_the_release_is_laid_out(world, tmp_path):
    pytest.importorskip("safetensors")
    code, out, err = run("published.release", world / "flm", tmp_path / "x")
    assert code == 0 and f"Wrote {tmp_path}/x" in out, err
    ours, theirs = model.FLM.load(str(world / "flm/checkpoint.pt"))[0], load_release(str(tmp_path / "x"))[0]
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_eight_bits_need_the_extra(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    code, _, err = run("train.py", "--data", world / "toy/encoded", "--out", tmp_path / "o", "--eight-bit",
                       "--device", "cpu")
    assert code == 1 and "pip install '.[eightbit]'" in err


def test_what_has_eight_bits_is_adamw(monkeypatch):
    """So that a run that goes on finds both its moments."""
    fake = types.SimpleNamespace(AdamW8bit=lambda groups, **more: torch.optim.AdamW(groups, lr=0.0))
    for name in ("torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, fake)
    module = model.FLM(FLM)
    assert any(group["muon"] for group in make_optimizer(module, muon=True).param_groups)
    assert not any(group["muon"] for group in make_optimizer(module.bfloat16(), muon=True).param_groups)


def test_states_in_eight_bits_are_read_by_whoever_has_torchao(tmp_path):
    """By a process that has not imported it yet, as chat.py's."""
    pytest.importorskip("torchao")
    from torchao.optim.subclass_8bit import OptimState8bit
    state = OptimState8bit.zeros((16, 256))
    path = tmp_path / "checkpoint.pt"
    torch.save({"kind": "codec", "config": {}, "model": {}, "optimizer": {0: state}}, path)
    script = (f"import sys; sys.path.insert(0, {ROOT!r})\nfrom files.checkpoint import load_checkpoint\n"
              f"print(load_checkpoint({str(path)!r}, 'codec', True)['optimizer'][0].shape)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "torch.Size([16, 256])\n", done.stderr


@pytest.mark.slow
def test_eight_bits_learn_and_go_on(world, tmp_path):
    """bfloat16 weights and 8-bit states: the loss falls, and a run goes on from its checkpoint."""
    pytest.importorskip("torchao")
    stage = Stage("one", 30, 2, 3e-3, 3e-3, 48, {"tts": (1, 1)}, wait=0.3)
    task = lambda: train.ModelTask(FLM, str(world / "toy/encoded"), "cpu", eight_bit=True)
    train.train(task(), [stage], str(tmp_path / "o"))
    lines = [json.loads(line) for line in open(tmp_path / "o/log.jsonl")]
    first, *_, last = [e["loss"] for e in lines if e.get("split") is None]
    assert last < first - 0.3
    again = task()
    r = train.Run(again, [stage], str(tmp_path / "o"), make_optimizer(again.modules, True), resume=True)
    assert r.total_steps() == 30
    r.progress["stage"], r.progress["step"] = 0, 29  # the last one once more
    _, parts = gradients(r, next(r.batches(stage)))
    assert parts["loss"] < first - 0.3 and next(r.task.modules.parameters()).dtype == torch.bfloat16
