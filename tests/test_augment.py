"""Throats, microphones, rooms and noise."""
import math
import random

import pytest
import torch

import prepare
from conftest import noise
from files.audio import SAMPLE_RATE
from files.augment import Microphone, Version, change_throat, draw_ratio, fast_length
from files.encoded import read_encoded
from mimi import FRAME
from toy.codec import heard


def tone(hertz, seconds=1.0, level=0.1):
    return level * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE)


def pitch(x):
    return torch.fft.rfft(x).abs().argmax().item() * SAMPLE_RATE / len(x)


def decibels(x, y):
    """Level of x beside that of y."""
    return 10 * math.log10(x.square().mean() / y.square().mean())


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.25])
def test_a_shorter_throat_is_higher_and_faster(ratio):
    x = tone(440, 1.37)
    y = change_throat(x, ratio)
    assert len(y) == pytest.approx(len(x) / ratio, rel=0.06)
    assert pitch(y) == pytest.approx(440 * len(x) / len(y), rel=0.005)
    assert abs(decibels(y[500:-500], x)) < 0.1


def test_lengths_are_quick_ones():
    assert [fast_length(n) for n in (2, 7, 1000, 60_001)] == [2, 8, 1000, 60_750]
    assert all(n <= fast_length(n) < 1.06 * n for n in range(1000, 200_000, 997))


def test_noise_is_as_loud_as_it_says():
    x = tone(440, 2.0)
    for level in (0, -10, -30):
        y = Microphone(noise=level, seed=3)(x)
        assert decibels(y - x, x) == pytest.approx(level, abs=0.3)
        assert torch.equal(y, Microphone(noise=level, seed=3)(x))
        assert not torch.equal(y, Microphone(noise=level, seed=4)(x))


def test_a_telephone_hears_no_low_and_no_high_tones():
    x = torch.cat([tone(100), tone(1000), tone(8000)])
    low, middle, high = Microphone(band=(300, 3400))(x).split(SAMPLE_RATE)
    assert decibels(low, middle) < -30 and decibels(high, middle) < -30


def test_a_room_goes_on_after_the_sound():
    x = torch.cat([tone(440), torch.zeros(SAMPLE_RATE)])
    near, far = (Microphone(reverberation=0.5, distance=d, seed=1)(x) for d in (-40, 0))
    after = slice(SAMPLE_RATE + 1200, SAMPLE_RATE + 6000)
    assert decibels(far[after], far) > decibels(near[after], near) + 20
    assert decibels(far[-2400:], far) < -45  # and then ends


def test_any_microphone_gives_samples():
    x = tone(300, 1.0)
    drawn = [Microphone.draw(random.Random(seed)) for seed in range(200)]
    assert {bool(m.reverberation) for m in drawn} == {m.noise > -math.inf for m in drawn} == {True, False}
    for m in drawn:
        y = m(x)
        assert len(y) == len(x) and torch.isfinite(y).all() and y.abs().max() <= 1
    ratios = [draw_ratio(random.Random(seed)) for seed in range(200)]
    assert 0.8 <= min(ratios) < 0.9 and 1.1 < max(ratios) <= 1.25 and 60 < ratios.count(1.0) < 140


def test_silence_stays_silence():
    assert Microphone(reverberation=0.3, noise=-10)(torch.zeros(5000)).abs().max() == 0


def test_the_codec_hears_some_clips_through_microphones():
    wav = tone(440, 1.2).repeat(3, 1)[:, None]
    y = heard(wav, [None, 7, 7])
    assert torch.equal(y[0], wav[0]) and torch.equal(y[1], y[2]) and not torch.equal(y[0], y[1])


def test_copies_are_heard_differently(world, tmp_path):
    """The first copy is as it was; the others have another length or other codes, the same each time. What
    the model says comes back as an echo, later than it was said."""
    noise(tmp_path / "data/a.wav", 0.9, SAMPLE_RATE), noise(tmp_path / "data/b.wav", 0.9, SAMPLE_RATE)
    lines = ('{"split": "train", "turns": [{"role": "user", "text": "a", "audio": "a.wav"},'
             '{"role": "model", "text": "b", "audio": "b.wav"}]}\n')
    (tmp_path / "data/manifest.jsonl").write_text(lines)

    def encode(augment):
        data = str(tmp_path / "data")
        prepare.encode(data, str(world / "codec.pt"), "bytes", 300, 6, augment, False, 1, "cpu")
        encoded = read_encoded(data + "/encoded")
        return encoded, encoded.line(0)["turns"]

    encoded, (user, model) = encode(1.0)
    assert len(user["copies"]) == 6 and len({c["speech"] for c in user["copies"]}) > 2
    assert len(model["copies"]) == len(model["echoes"]) == 1
    assert model["echoes"][0]["late"] >= 0.1 * SAMPLE_RATE
    first = [encoded.codes(c).tolist() for c in user["copies"]]
    encoded, (user, _) = encode(1.0)
    assert [encoded.codes(c).tolist() for c in user["copies"]] == first
    encoded, (user, model) = encode(0.0)
    assert {c["speech"] for c in user["copies"]} <= {12, 13} and model["echoes"] == []


def test_stories_keep_their_speed():
    drawn = [Version.draw(random.Random(seed), FRAME, True, same_speed=True) for seed in range(50)]
    assert {v.ratio for v in drawn} == {1.0} and all(v.microphone for v in drawn)
    x = tone(440)
    assert drawn[0].throat_of(x) is x
