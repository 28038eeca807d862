"""bench_card.py, which a GPU is measured with, runs as a whole on a CPU and survives what goes wrong."""
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bench_card
import bench_talk
from bench_card import STAND_INS, Step
from conftest import ROOT


def test_the_dry_run(tmp_path, monkeypatch):
    """With stand-ins for all packages that a bare machine may lack."""
    monkeypatch.setattr(bench_card.importlib.util, "find_spec", lambda name: None)
    bench_card.stand_ins(tmp_path)
    monkeypatch.undo()
    report = tmp_path / "GPU.md"
    done = subprocess.run([sys.executable, "tests/bench_card.py", "--dry", "--report", report], cwd=ROOT,
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr + report.read_text()
    text, steps = report.read_text(), bench_card.steps(True, "work")
    for step in steps:
        assert f"| {step.name} | " in text and f"## {step.name}: " in text
    assert text.count(" | ok | ") >= len(steps) - 4  # three need nvcc's tools or pytest, one g++
    for figure in ("ms at least", "sessions:", "differ from the reference", "the tokens are the same",
                   "to encode a frame", "resumed and done", "waits for batches", "Wrote "):
        assert figure in text, figure
    assert done.stdout.splitlines()[-1].startswith(f"Wrote {report}: ")


@pytest.mark.parametrize("code, seconds, verdict", [
    ("print(7)", 60, "ok"), ("import sys; print(7, flush=True); sys.exit(3)", 60, "FAILED (3)"),
    ("import time; print(7, flush=True); time.sleep(600)", 3, "FAILED: not done in 3 s"),
    ("print(7)", 0, "skipped: the time is over")])
def test_verdicts(code, seconds, verdict):
    got, took, printed = bench_card.run(Step("a step", 60, ["python", "-c", code]), seconds, os.environ)
    assert got == verdict and took < 30 and printed == ("7\n" if seconds else "")


def test_a_step_whose_package_is_missing_is_skipped_by_name():
    step = Step("a step", 60, ["python", "-c", "print(7)"], "no_such_package")
    assert bench_card.run(step, 60, os.environ) == ("skipped: no no_such_package here", 0.0, "")


def test_a_file_of_tests_whose_packages_are_missing_is_skipped_by_name():
    code = "import sys, pytest; sys.modules['soundfile'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "-q", "-rs", "-p", "no:cacheprovider", "-k", "philox",
                           "tests/test_sampling.py", "tests/test_words.py"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "1 skipped" in done.stdout
    assert "test_words.py:0: needs soundfile" in done.stdout


def test_a_failure_stops_no_other_step(tmp_path, monkeypatch, capsys):
    three = [Step(name, 60, ["python", "-c", code]) for name, code in
             (("first", "print('one')"), ("second", "1 / 0"), ("third", "print('three')"))]
    monkeypatch.setattr(bench_card, "steps", lambda dry, work: three)
    monkeypatch.setattr(sys, "argv", ["bench_card.py", "--dry", "--report", str(tmp_path / "GPU.md")])
    with pytest.raises(SystemExit) as e:
        bench_card.main()
    text = (tmp_path / "GPU.md").read_text()
    assert e.value.code and "2 ok, 1 failed, 0 skipped" in capsys.readouterr().out
    assert "\none\n" in text and "ZeroDivisionError" in text and "\nthree\n" in text


def test_stand_ins_do_what_the_steps_need(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_card.importlib.util, "find_spec", lambda name: None)
    assert bench_card.stand_ins(tmp_path) == [*STAND_INS]
    for name in STAND_INS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.undo()
    code = "from tqdm import tqdm; import soundfile, tiktoken, sys\n" \
           "with tqdm(total=3, desc='x') as bar: bar.update(); bar.set_postfix({}, refresh=False)\n" \
           "assert [*tqdm([1, 2])] == [1, 2] and '__file__' in vars(soundfile)\n" \
           "encoding = tiktoken.Encoding('x', pat_str='.', mergeable_ranks={b'a': 0}, special_tokens={})\n" \
           "assert encoding.n_vocab == 1 and encoding.encode_ordinary('a') == [97]\n" \
           "assert all(m.__file__.startswith(sys.argv[1]) for m in (soundfile, tiktoken))"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True,
                   env={**os.environ, "PYTHONPATH": str(tmp_path)})


POWERS = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("limit, most, tried", [(2, 64, [1, 2, 4, 3]), (0, 64, [1]), (64, 64, POWERS),
                                                (50, 64, [*POWERS, 48, 56, 52, 50])])
def test_out_of_memory_is_a_result(limit, most, tried, monkeypatch, capsys):
    def engine(duplex, size):
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return SimpleNamespace(join=lambda seed: SimpleNamespace(hear=lambda audio: True), tick=lambda: {})
    monkeypatch.setattr(bench_talk, "Engine", engine)
    monkeypatch.setattr(bench_talk, "duplex_of", lambda args: None)
    bench_talk.sessions(SimpleNamespace(ticks=3, most=most))
    *lines, last = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines] == tried
    assert last == f"{min(limit, most)} sessions keep up"
    assert [line.endswith("out of memory") for line in lines] == [n > limit for n in tried]


def test_what_a_frame_reads_and_launches_is_counted(capsys):
    args = SimpleNamespace(config="tiny", codec="tiny", device="meta", weights=None)
    duplex = bench_talk.duplex_of(args)
    lines, weights, each = bench_talk.reckon(duplex)
    read, launches = {name: n for name, n, _ in lines}, {name: n for name, _, n in lines}
    m, bytes_of = duplex.model, bench_talk.bytes_of
    rings = bytes_of(bench_talk.tensors(duplex.init_state([1]).cache.layers))
    norms = bytes_of([*m.norm.parameters()])
    assert read["temporal transformer"] == bytes_of(m.blocks.parameters()) + rings + norms + 8  # a position
    assert read["text head"] == bytes_of(m.head.parameters()) and 0 < launches["text head"] <= 2
    depth = bytes_of(m.depth.parameters()) - bytes_of(m.depth.codes.parameters())
    assert read["depth transformer, 8 codes"] == depth
    assert 9 <= launches["nine draws"] < 50 and sum(read.values()) < weights + each
    bench_talk.show_reckoned(lines, weights, each)
    assert "conversations fit in 92% of 80 GB" in capsys.readouterr().out
