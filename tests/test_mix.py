"""What a microphone hears: decibels as promised, conversations with free user input."""
import json
import random

import numpy as np
import pytest
import soundfile
import torch

from corpora import mix
import train
from conftest import FLM, encode, loss_of, noise, run
from files.audio import SAMPLE_RATE
from mimi import FRAME


def test_decibels():
    assert mix.decibels(torch.ones(10)) == pytest.approx(0, abs=1e-4)
    assert mix.decibels(torch.full((10,), 0.1)) == pytest.approx(-20, abs=1e-3)
    assert mix.decibels(torch.zeros(10)) == pytest.approx(-120)


def test_gain_is_what_it_promises():
    rng, x = random.Random(0), torch.randn(4800, generator=torch.Generator().manual_seed(0))
    loud = [mix.decibels(mix.change_gain(x * 0.5, rng)) - mix.decibels(x * 0.5) for _ in range(300)]
    assert -24.1 < min(loud) < -22 and 18 < max(loud) < 20.1
    soft = [mix.decibels(mix.change_gain(x * 0.02, rng)) for _ in range(300)]  # from -34 dB
    assert min(soft) == pytest.approx(-40, abs=0.01) and sum(s < -39.9 for s in soft) > 60


@pytest.mark.parametrize("files", [False, True])
def test_noise_is_what_it_promises(files, tmp_path):
    rng = random.Random(0)
    noise(tmp_path / "a.wav", 4, 16_000)
    x = mix.make_noise(60 * SAMPLE_RATE, [str(tmp_path / "a.wav")] if files else [], rng)
    level = torch.tensor([mix.decibels(w) for w in x.split(2400)])  # of each 0.1 s
    assert 0.15 < (level < -119).float().mean() < 0.45  # silence
    heard = level[level > -119]
    # short windows scatter around their segment
    assert heard.max() < -34 and heard.min() > -85 and heard.std() > 4
    whole = [mix.decibels(mix.make_noise(SAMPLE_RATE // 2, [], random.Random(i))) for i in range(100)]
    assert all(-72 < w < -38 for w in whole if w > -119)  # half a second, of segments up to three


def test_leakage_is_what_it_promises():
    said, gains, delays = torch.zeros(SAMPLE_RATE), [], []
    said[100] = 1.0
    for i in range(200):
        echo = mix.leak(torch.zeros(SAMPLE_RATE), said, random.Random(i))
        delays.append((echo.argmax().item() - 100) / SAMPLE_RATE)
        gains.append(echo.max().item())
    assert 0 <= min(gains) < 0.01 and 0.19 < max(gains) <= 0.2
    assert 0.1 <= min(delays) < 0.11 and 0.49 < max(delays) <= 0.5


def test_a_hesitation_is_put_where_it_is_soft():
    x = torch.full((SAMPLE_RATE,), 0.1)
    x[12_000:12_960] = 0.001
    y = mix.hesitate(x, random.Random(0))
    assert 0.4 * SAMPLE_RATE <= len(y) - len(x) <= 0.9 * SAMPLE_RATE
    assert torch.equal(torch.cat([y[:12_000], y[len(y) - 11_040:]]), torch.cat([x[:12_000], x[12_960:]]))
    assert y[12_480:12_000 + len(y) - len(x)].abs().max() <= 0.001


def test_conversations_with_free_user_input(tmp_path):
    """The audio of the user and of the model is a constant each, so the mix tells who speaks when."""
    for name, level, seconds in (("user", 0.1, 1.0), ("model", 0.3, 2.0), ("mhm", 0.01, 0.3)):
        x = np.full(int(seconds * SAMPLE_RATE), level)
        soundfile.write(tmp_path / f"{name}.wav", x, SAMPLE_RATE, subtype="FLOAT")
    part = lambda name: {"path": str(tmp_path / f"{name}.wav"), "text": "a b c"}
    broken = 0
    for seed in range(40):
        rng = random.Random(seed)
        said, heard, sentences = mix.converse([(part("user"), part("model"))] * 3, [part("mhm")], [], rng)
        assert len(said) == len(heard) and len(said) % FRAME == 0
        assert len(sentences) == 3 and "cut" not in sentences[-1]
        for s in sentences:
            a, b = round(s["start"] * SAMPLE_RATE), round(s["end"] * SAMPLE_RATE)
            assert a % FRAME == 0 and (said[a:b] > 0.29).all()
            assert said[a - 1] == 0 and (b == len(said) or said[b] == 0)
            if "cut" in s:
                broken += 1
                assert s["end"] <= s["cut"] and 0 < s["cut"] - s["start"] <= 2.5
            else:
                assert b - a == 2 * SAMPLE_RATE
    assert 0.55 < broken / 80 < 0.85  # of the answers that another turn follows


def test_mixing_a_world(world, tmp_path):
    out = tmp_path / "mixed"
    code, said, err = run("prepare.py", "mix", "--data", world / "toy", "--out", out, "--conversations", 4)
    assert code == 0 and "Wrote 4 conversations" in said, err
    encoded = [json.loads(line) for line in encode(out, world)["00000.jsonl"].splitlines()]
    assert [d["split"] for d in encoded] == ["seen", "train", "train", "train"]
    task = train.ModelTask(FLM, str(out / "encoded"), "cpu")
    loss, _, _ = loss_of(task, train.Stage("one", 1, 2, 1e-3, 0, 48, {"recorded": (1, 1)}))
    assert torch.isfinite(loss)
    again = tmp_path / "again"
    mix.mix(str(world / "toy"), str(again), 4, None, 1)
    assert (again / "manifest.jsonl").read_bytes() == (out / "manifest.jsonl").read_bytes()
    for i in range(4):
        assert (again / f"talks/00000{i}.flac").read_bytes() == (out / f"talks/00000{i}.flac").read_bytes()
    code, _, err = run("prepare.py", "mix", "--data", world / "toy", "--out", tmp_path / "x",
                       "--noise", tmp_path / "nowhere")
    assert code == 1 and "holds no file of noise" in err and not (tmp_path / "x").exists()
