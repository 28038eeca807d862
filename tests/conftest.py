"""What several tests share: a tiny world of audio, codes, a codec and a model, complete but untrained."""
import contextlib
import importlib.util
import io
import os
import random
import sys

import numpy as np
import pytest
import torch

MISSING = [name for name in ("soundfile", "tiktoken", "tqdm") if not importlib.util.find_spec(name)]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not MISSING:
    import soundfile

    import model
    import prepare
    import train
    from files.audio import SAMPLE_RATE
    from files.checkpoint import save_checkpoint
    from mimi import Mimi, MimiConfig
    from toy.script import make_toy
    from toy.voices import Espeak, Style

    CODEC = MimiConfig("spectral", 24, (240, 4), 1, dim=32, encoder_layers=0, decoder_layers=1, heads=4,
                       mlp=64, context=9, codebook_size=32, codebook_dim=16)
    FLM = model.FLMConfig(layers=1, width=32, heads=4, kv_heads=2, mlp=48, depth_layers=1, depth_width=16,
                          depth_heads=2, vocab_size=300, empty=32, context=128)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """On a bare machine a file that imports what is not there is skipped by name."""
    report = yield
    if report.failed and MISSING:
        report.outcome = "skipped"
        report.longrepr = str(collector.path), 0, f"Skipped: needs {', '.join(MISSING)}"
    return report


def run(script, *args):
    """Run a command of this project in this process: (exit code, standard output, standard error)."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = [script, *map(str, args)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            importlib.import_module(script.removesuffix(".py")).main()  # of the book, or of a room
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            err.write(e.code + "\n")
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def loss_of(task, stage):
    """What task.loss returns for the first batch of a stage: (loss, its parts, None)."""
    batch = task.batch(stage, 0.0, "train", random.Random(0))
    return task.loss(stage, batch, task.totals(batch))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with toy/ (24 + 8 + 8 dialogues, encoded), codec.pt and flm/, a folder for chat.py."""
    folder = tmp_path_factory.mktemp("world")
    data = str(folder / "toy")
    make_toy(data, "en", items=24, tests=8, sentences=40, voices=6, seed=1, tts=None)
    torch.manual_seed(0)
    codec = Mimi(CODEC)
    with torch.no_grad():
        for p in codec.parameters():
            p.mul_(1.5)
    save_checkpoint(str(folder / "codec.pt"), "codec", CODEC, model=codec.state_dict())
    prepare.encode(data, str(folder / "codec.pt"), "bpe", 300, 2, 0.0, False, 1, "cpu")
    task = train.ModelTask(FLM, os.path.join(data, "encoded"), "cpu")
    stage = train.Stage("once", 2, 2, 1e-3, 0, 48, {"response_tts": (1, 1)})
    train.train(task, [stage], str(folder / "flm"))
    return folder


def encode(folder, world, processes=1, name="bpe", **kwargs):
    prepare.encode(str(folder), str(world / "codec.pt"), name, 300, 1, 0.0, False, processes, "cpu", **kwargs)
    return {f.name: f.read_bytes() for f in (folder / "encoded").iterdir()}


def noise(path, seconds, rate, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).normal(size=(int(seconds * rate), channels)) * 0.1, rate)


def record(path, word, voice, rate=16_000, noise=0.001):
    """A word in a second of faint noise, as people record it."""
    x = Espeak().speak(word, voice, Style())[::SAMPLE_RATE // rate]
    wav = np.random.default_rng(0).normal(size=max(rate, len(x) + rate // 2)) * noise
    wav[rate // 4:rate // 4 + len(x)] += x
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(path, wav, rate)
