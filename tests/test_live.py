"""Late and lost frames do no harm; a conversation in the terminal equals the file's; echo is heard."""
import concurrent.futures
import json
import random
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from conftest import ROOT, run
from chat import DuplexModel
from live.jitter import CAPACITY, JitterBuffer
from live import microphone
from live.engine import QUEUE, Engine
from live.microphone import GONE, SoundCard, converse_live, talk_to_microphone
from mimi import FRAME


def link(frames, loss=0.02, burst=0.2, seed=1):
    """When each frame, sent every 80 ms, arrives over a bad link: [(seconds, number), ...] in order of
    time. About every two seconds nothing passes for `burst` seconds, then all at once; a share `loss` never
    arrives."""
    rng, arrivals, shut = random.Random(seed), [], -1.0
    for n in range(frames):
        now = 0.08 * n + 0.02 + 0.02 * rng.random()
        if rng.random() < 0.04:
            shut = max(shut, now + burst)
        if rng.random() >= loss:
            arrivals.append((max(now, shut), n))
    return sorted(arrivals)


def frame_of(n, loud=0.1):
    return (loud * np.sin(0.01 * np.arange(n * FRAME, (n + 1) * FRAME))).astype(np.float32)


def play(arrivals, pops, frame=frame_of):
    """What a JitterBuffer plays every 80 ms: (numbers or None, frames that wait, audio of each)."""
    jitter, arrivals, numbers, lengths, played = JitterBuffer(), list(arrivals), [], [], []
    for t in range(pops):
        while arrivals and arrivals[0][0] <= 0.08 * t:
            n = arrivals.pop(0)[1]
            jitter.put(n, frame(n))
        audio, n = jitter.pop()
        numbers.append(n)
        lengths.append(jitter.waiting)
        played.append(audio)
    return numbers, lengths, played


def test_a_good_link_is_played_whole_and_at_once():
    numbers, lengths, audio = play([(0.08 * n + 0.01, n) for n in range(200)], 200)
    assert numbers[1:] == list(range(199)) and max(lengths) == 0
    # the first one fades in
    assert all(np.array_equal(s, frame_of(n)) or n == 0 for s, n in zip(audio[1:], numbers[1:]))


@pytest.mark.parametrize("seed", range(3))
def test_bursts_of_200_ms_and_a_loss_of_2_percent_leave_the_conversation_intact(seed):
    frames = 7500  # ten minutes
    arrivals = link(frames, seed=seed)
    numbers, lengths, _ = play(arrivals, frames)
    played = [n for n in numbers if n is not None]
    assert played == sorted(set(played)), "in order, none twice"
    assert len(played) > 0.97 * frames and len(played) > 0.99 * len(arrivals), "what arrived was played"
    assert max(lengths) <= 6 and max(lengths[-750:]) <= 6, "and not ever later"


def test_the_delay_shrinks_in_pauses_only():
    late = [(max(0.08 * n, 4.0), n) for n in range(20, 80)]
    arrivals = sorted([(0.08 * n + 0.01, n) for n in [*range(20), *range(80, 1000)]] + late)
    delay = lambda numbers: [t - n for t, n in enumerate(numbers) if n is not None]
    loud, quiet = (delay(play(arrivals, 1000, lambda n: frame_of(n, level))[0]) for level in (0.1, 0.001))
    assert max(loud) <= CAPACITY + 1 and loud[-1] > 5, "speech is never cut"
    assert quiet[-1] <= 2


def test_what_waits_never_grows():
    jitter = JitterBuffer()
    for n in [*range(1000), 10 ** 9, 2 ** 32 - 1]:
        jitter.put(n, frame_of(0))
        assert len(jitter.frames) <= CAPACITY and jitter.waiting <= CAPACITY
    assert jitter.put(5, frame_of(0)) is False and jitter.pop()[1] is None


def test_nothing_jumps_where_a_frame_is_concealed():
    arrivals = [(0.08 * n + 0.01, n) for n in range(60) if n % 7]
    _, _, audio = play(arrivals, 60)
    step = np.abs(np.diff(np.concatenate(audio)))
    assert step.max() < 0.005  # 0.001 in the tone itself; a jump would be up to 0.2


def page(part):
    text = open(f"{ROOT}/live/web.html", encoding="utf-8").read()
    return re.search(rf'<script id="{part}"[^>]*>(.*?)</script>', text, re.S)[1]


def node(script):
    """What a script prints as JSON, with the page's script `audio` before it."""
    if not shutil.which("node"):
        pytest.skip("needs node, which runs the page's JavaScript without a browser")
    out = subprocess.run(["node", "-"], input=page("audio") + script, capture_output=True, text=True,
                         timeout=60)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


def test_the_page_plays_as_python_does():
    events, rng = [], random.Random(3)  # numbers put, -1: pop
    arrivals = link(900, loss=0.05, burst=0.5, seed=3)
    for t in range(900):
        while arrivals and arrivals[0][0] <= 0.08 * t:
            events.append(arrivals.pop(0)[1])
        events.append(-1)
        if rng.random() < 0.01:
            events.append(max(0, t - 30))  # far too late
    loud = lambda n: 0.1 if n % 100 < 60 else 0.001
    jitter, numbers, sums = JitterBuffer(), [], []
    for n in events:
        if n >= 0:
            jitter.put(n, frame_of(n, loud(n)))
        else:
            audio, n = jitter.pop()
            numbers.append(n)
            sums.append(float(np.abs(audio).sum()))
    theirs = node(f"""
        const loud = n => n % 100 < 60 ? 0.1 : 0.001
        const frame = n => Float32Array.from({{ length: FRAME }},
          (_, i) => loud(n) * Math.sin(0.01 * (n * FRAME + i)))
        const jitter = new JitterBuffer(), numbers = [], sums = []
        for (const event of {json.dumps(events)}) {{
          if (event >= 0) {{ jitter.put(event, frame(event)); continue }}
          const [audio, n] = jitter.pop()
          numbers.push(n)
          sums.push(audio.reduce((a, x) => a + Math.abs(x), 0))
        }}
        console.log(JSON.stringify([numbers, sums]))""")
    assert theirs[0] == numbers and numbers.count(None) > 20
    assert np.allclose(theirs[1], sums, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000, 96_000])
def test_the_page_resamples_any_rate_without_seams(rate):
    """A tone through both of the worklet's resamplers, in its blocks of 128, and one above what 24 kHz can
    hold."""
    down, up, above = node(f"""
        const through = (hertz, from, to) => {{
          const resampler = new Resampler(from, to), out = []
          for (let i = 0; i < from; i += 128)
            out.push(...resampler.push(Float32Array.from({{ length: 128 }},
              (_, k) => Math.sin(2 * Math.PI * hertz * (i + k) / from))))
          return out
        }}
        console.log(JSON.stringify(
          [through(1000, {rate}, RATE), through(1000, RATE, {rate}), through(15000, {rate}, RATE)]))""")
    for x, to in ((down, 24_000), (up, rate)):
        assert abs(len(x) - to) < 0.01 * to
        x, t = np.array(x[to // 10:]), np.arange(len(x) - to // 10) / to
        basis = np.stack([np.sin(2000 * np.pi * t), np.cos(2000 * np.pi * t)], 1)
        weights = np.linalg.lstsq(basis, x, rcond=None)[0]
        assert 0.98 < np.linalg.norm(weights) < 1.02 and np.abs(x - basis @ weights).max() < 0.005
    if rate > 40_000:
        assert np.abs(above[2400:]).max() < 0.01


# ------------------------------------------------------------------------------------------------------------
# the terminal


def converse_in_a_room(world, heard, gain=0.0, delay=0.1):
    """converse_live over a table: what is said comes back after `delay` seconds, `gain` times as loud.
    (heard, said), (N,) each."""
    room, said, later = torch.zeros(len(heard) + FRAME), [], round(delay * 24_000)
    room[:len(heard)] = heard
    frames = iter(range(len(heard) // FRAME))

    def hear():
        t = next(frames, None)
        return None if t is None else room[t * FRAME:(t + 1) * FRAME].clone()

    def say(t, audio):
        said.append(torch.as_tensor(audio))
        at = (t + 1) * FRAME + later  # it is played in the next frame
        part = room[at:at + FRAME]
        part += gain * said[-1][:len(part)]
    converse_live(Engine(DuplexModel.load(str(world / "flm")), 1), 1, hear, say)
    return room[:len(heard)], torch.cat(said)


def test_the_terminal_says_what_the_file_would(world, capsys):
    heard = 0.1 * torch.randn(20 * FRAME, generator=torch.Generator().manual_seed(0))
    room, said = converse_in_a_room(world, heard)
    assert torch.equal(room, heard) and capsys.readouterr().out.count(" s ") >= 1
    expected = DuplexModel.load(str(world / "flm")).converse(heard[None])[1][0]
    assert torch.equal(said[:-FRAME], expected[FRAME:])


@pytest.mark.parametrize("gain, delay", [(0.2, 0.1), (0.1, 0.5)])
def test_echo_is_heard_later_and_softer(world, gain, delay):
    heard, later = torch.zeros(20 * FRAME), round(delay * 24_000)
    room, said = converse_in_a_room(world, heard, gain, delay)
    begin = FRAME + later
    assert torch.equal(room[:begin], heard[:begin])
    assert torch.allclose(room[begin:], gain * said[:len(room) - begin]) and room.abs().max() > 0


def test_no_extra_no_library_and_no_device_are_one_line(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    code, _, err = run("chat.py", "--checkpoint", world / "flm", "--mic")
    assert code == 1 and err.strip() == "error: --mic needs the extra 'mic': pip install '.[mic]'"

    class PortAudioError(Exception):
        pass

    def stream(*args, **kwargs):
        raise PortAudioError("Error querying device -1")
    monkeypatch.setitem(sys.modules, "sounddevice",
                        types.SimpleNamespace(Stream=stream, PortAudioError=PortAudioError))
    code, _, err = run("chat.py", "--checkpoint", world / "flm", "--mic")
    assert code == 1 and len(err.strip().splitlines()) == 1 and "querying device -1" in err


def test_a_microphone_is_heard_and_answered_until_ctrl_c(world, monkeypatch, capsys):
    """A sound card that calls back 20 times, then Ctrl-C."""
    played = []

    class Stream:
        def __init__(self, rate, size, channels, dtype, callback, finished_callback):
            assert (rate, size, channels, dtype) == (24_000, FRAME, 1, "float32")
            self.callback = callback

        def __enter__(self):
            for _ in range(5):
                self.callback(np.full((FRAME, 1), 0.01, np.float32), np.zeros((FRAME, 1), np.float32), FRAME,
                              None, None)

        def __exit__(self, *error):
            pass
    monkeypatch.setitem(sys.modules, "sounddevice",
                        types.SimpleNamespace(Stream=Stream, PortAudioError=OSError))
    put = JitterBuffer.put

    def put_and_stop(self, n, frame):
        played.append(frame)
        if n == 4:
            raise KeyboardInterrupt
        return put(self, n, frame)
    monkeypatch.setattr(JitterBuffer, "put", put_and_stop)
    talk_to_microphone(DuplexModel.load(str(world / "flm")), 1)
    assert len(played) == 5 and "Ctrl-C" in capsys.readouterr().out


def fake_sounddevice(monkeypatch, run, close=lambda error: None):
    """run(stream) is what the sound card does once the stream is open; close() may raise PortAudioError."""
    class PortAudioError(Exception):
        pass

    class Stream:
        def __init__(self, *args, callback, finished_callback, **kwargs):
            self.callback, self.finished = callback, finished_callback

        def call(self, level=0.01):
            out = np.zeros((FRAME, 1), np.float32)
            self.callback(np.full((FRAME, 1), level, np.float32), out, FRAME, None, None)

        def __enter__(self):
            run(self)

        def __exit__(self, *error):
            close(PortAudioError)
    fake = types.SimpleNamespace(Stream=Stream, PortAudioError=PortAudioError)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)


def unplugged(error):
    raise error("Device unavailable")


@pytest.mark.parametrize("close", [lambda error: None, unplugged])
def test_a_device_that_goes_away_is_one_line(world, monkeypatch, close):
    def run(stream):
        for _ in range(3):
            stream.call()
        stream.finished()
    fake_sounddevice(monkeypatch, run, close)
    with pytest.raises(ValueError, match=GONE):
        talk_to_microphone(DuplexModel.load(str(world / "flm")), 1)


def test_a_sound_card_that_falls_silent_is_one_line(world, monkeypatch):
    monkeypatch.setattr(microphone, "SILENT", 0.01)
    fake_sounddevice(monkeypatch, lambda stream: stream.call())
    with pytest.raises(ValueError, match=GONE):
        talk_to_microphone(DuplexModel.load(str(world / "flm")), 1)


def test_a_slow_model_hears_the_newest_frames():
    card = SoundCard()
    for n in range(QUEUE + 10):
        card.callback(np.full((FRAME, 1), n, np.float32), np.zeros((FRAME, 1), np.float32), FRAME, None, None)
    assert [card.hear()[0] for _ in range(QUEUE)] == list(range(10, QUEUE + 10)) and not card.heard


def test_the_playout_buffer_is_used_under_the_lock(monkeypatch):
    card, held = SoundCard(), []
    for name in ("put", "pop"):
        method = getattr(JitterBuffer, name)
        monkeypatch.setattr(JitterBuffer, name, lambda self, *args, method=method: (
            held.append(not can_acquire(card.changed)), method(self, *args))[1])
    card.say(0, frame_of(0))
    card.callback(np.zeros((FRAME, 1), np.float32), np.zeros((FRAME, 1), np.float32), FRAME, None, None)
    assert held == [True, True]


def can_acquire(lock):
    """Whether another thread could take the lock now."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: lock.acquire(blocking=False) and (lock.release() or True)).result()
