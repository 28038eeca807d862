"""Teaching a model a voice: prompts, recordings that cannot be used, the recipe, and the server's part."""
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch

from chat import DuplexModel
from conftest import ROOT, run
from files.audio import SAMPLE_RATE, read_audio
from live.microphone import record_from
from live.recordings import (find_recordings, level_of, make_prompts, problem_with, read_recordings,
                             save_recording, write_prompts)
from mimi import FRAME
from teaching import teach
from teaching.cut import cut, find_starts
from toy.voices import Espeak, Style, trim, trim_noisy
from toy.world import HELD_OUT_PAIRS, LANGUAGES, held_out_triple
from training.run import lock

SMALL = {"items": 12, "sentences": 8, "tests": 3, "voices": 4}


def noise(n, level=0.0005):
    return np.random.default_rng(0).normal(size=n).astype(np.float32) * level


def speak(text, voice="en-us+f1"):
    x = Espeak().speak(text, voice, Style())
    return np.concatenate([noise(SAMPLE_RATE // 2), x * 0.5 / np.abs(x).max(), noise(SAMPLE_RATE)])


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    """Sixteen of the prompts, recorded by a stranger, some as other files."""
    folder, prompts = tmp_path_factory.mktemp("voice"), make_prompts()
    for n in range(16):
        save_recording(str(folder), n, speak(prompts[n].text))
    x, rate = soundfile.read(folder / "03.wav")
    soundfile.write(folder / "03.ogg", np.stack([x, x], 1), rate)  # stereo
    (folder / "03.wav").unlink()
    write_prompts(str(folder), prompts)
    return folder


def test_prompts_cover_all_words_and_nothing_that_is_held_out():
    prompts, lang = make_prompts(), LANGUAGES["en"]
    assert len({p.text for p in prompts}) == 40 and prompts == make_prompts()
    words = Counter(w for p in prompts for w in p.text.split())
    assert all(words[w] >= 2 for w in lang.words)
    for p in prompts:
        asked = [w for w in p.text.split() if w in lang.words]
        if p.kind == "repeat":
            assert not held_out_triple(asked)
        if p.kind == "count":
            assert frozenset(map(lang.numbers.index, asked)) not in HELD_OUT_PAIRS


@pytest.mark.parametrize("name, message", [
    ("good", None), ("empty", "muted"), ("zeros", "muted"), ("soft", "too soft"), ("clipped", "clipped"),
    ("cut", "too short"), ("long", "too long"), ("nan", "not numbers"), ("noise", "no speech"),
    ("hum", "no speech")])
def test_a_recording_is_judged(name, message):
    prompt = next(p for p in make_prompts() if p.kind == "repeat")
    x = speak(prompt.text)
    x = {"good": x, "empty": x[:0], "zeros": x * 0, "soft": x * 0.003, "clipped": (x * 20).clip(-1, 1),
         "cut": x[SAMPLE_RATE // 2:SAMPLE_RATE], "long": np.tile(x, 6),
         "nan": np.where(np.arange(len(x)) == 9, np.nan, x).astype(np.float32),
         "noise": noise(len(x), 0.02), "hum": 0.1 * np.sin(np.arange(len(x)) * 2 * np.pi * 50 / SAMPLE_RATE),
         }[name]
    problem = problem_with(x, prompt)
    assert problem is None if message is None else message in problem


def test_the_level_is_that_of_the_speech():
    x = speak("repeat cat dog happy")
    assert level_of(x * 0.1) == pytest.approx(level_of(x) - 20, abs=0.1)
    assert level_of(np.concatenate([x, noise(10 * SAMPLE_RATE)])) == pytest.approx(level_of(x), abs=0.5)


def test_silence_is_trimmed_and_speech_is_not():
    x = speak("repeat cat dog happy")
    y = trim_noisy(x, margin=0.1)
    assert len(x) - len(y) > 1.2 * SAMPLE_RATE and np.abs(y).max() == np.abs(x).max()
    assert np.abs(y[:1000]).max() < 0.01 and len(trim_noisy(x * 0)) == 0


def test_recordings_are_found_whatever_their_format(voice):
    good, bad = read_recordings(str(voice), make_prompts())
    assert len(good) == 16 and not bad and sorted(find_recordings(str(voice))) == list(range(16))
    assert all(x.ndim == 1 and len(x) > SAMPLE_RATE // 2 for _, x in good)


@pytest.mark.parametrize("what, message", [
    ("no folder", "no such folder"), ("empty", "holds 0 recordings"), ("few", "holds 5 recordings"),
    ("silent", "muted"), ("zero samples", "zero samples"), ("truncated", "cut off"),
    ("garbage", "not an audio")])
def test_recordings_that_cannot_be_used_are_one_clear_error(voice, world, tmp_path, what, message):
    folder = tmp_path / "voice"
    if what != "no folder":
        folder.mkdir()
    for n in range({"few": 5, "no folder": 0, "empty": 0}.get(what, 9)):
        data = (voice / "01.wav").read_bytes()
        path = folder / f"{n + 1:02d}.wav"
        path.write_bytes(data)
        if what == "silent":
            soundfile.write(path, np.zeros(30_000), 24_000)
        elif what == "zero samples":
            soundfile.write(path, np.zeros(0), 24_000)
        elif what == "truncated":
            path.write_bytes(data[:len(data) // 2])
        elif what == "garbage":
            path.write_bytes(b"not audio")
    code, _, err = run("teaching.teach", "--checkpoint", world / "flm", "--recordings", folder, "--out",
                       tmp_path / "taught")
    assert code == 1 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "taught").exists() and not (tmp_path / "taught.partial").exists()


def test_the_prompts_are_written(tmp_path):
    code, out, _ = run("teaching.teach", "--recordings", tmp_path / "voice", "--show")
    lines = (tmp_path / "voice/prompts.txt").read_text().splitlines()
    assert code == 0 and len(lines) == 40 and lines[0].startswith("01  ") and "40 prompts, 0 recorded" in out


def test_the_recipe_from_recordings_to_a_model(voice, world, tmp_path, capsys):
    before = {f.name: f.read_bytes() for f in (world / "flm").iterdir() if f.is_file()}
    found = teach.teach(str(world / "flm"), str(voice), str(tmp_path / "taught"), steps=6, old=SMALL)
    for who, n in (("your voice", [2]), ("others", [1, 2, 3])):
        assert all(scores.n["exactly"] in n and scores.n["words"] >= 2 for scores in found[who])
    out = capsys.readouterr().out
    assert "Of 2 held-out requests in your voice, " in out
    assert "others, held-out requests, words: after" in out
    assert not (tmp_path / "taught.partial").exists()
    assert sorted(os.listdir(tmp_path / "taught")) == ["checkpoint.pt", "codec.pt", "lock", "log.jsonl",
                                                       "tokenizer.json"]
    assert before == {f.name: f.read_bytes() for f in (world / "flm").iterdir() if f.is_file()}
    old, new = (DuplexModel.load(str(folder)) for folder in (world / "flm", tmp_path / "taught"))
    assert torch.equal(old.codec.codebooks(), new.codec.codebooks())
    assert any(not torch.equal(a, b) for a, b in zip(old.model.parameters(), new.model.parameters()))


def test_half_of_the_lesson_is_the_new_voice(voice, world, tmp_path):
    recordings, _ = read_recordings(str(voice), make_prompts())
    teach.make_lesson(recordings, str(tmp_path / "new"), Espeak(), 1, 30, 80)
    lines = [json.loads(line) for line in open(tmp_path / "new/manifest.jsonl")]
    held_out = {t["text"] for d in lines for t in d["turns"] if t["voice"] == "user, held out"}
    assert held_out == {recordings[7][0].text, recordings[15][0].text}
    train = [d["turns"] for d in lines if d["split"] == "train"]
    assert len([t for t in train if len(t) == 2]) == 14 * teach.AGAIN + 30
    assert {t["voice"] for turns in train for t in turns if t["role"] == "user"} == {"user"}
    joined = {t["text"] for turns in train for t in turns if t["role"] == "user"}
    assert len(joined - {p.text for p, _ in recordings}) > 20, "most of it was never recorded as it is"
    assert all(read_audio(str(tmp_path / "new" / t["audio"])).any() for turns in train for t in turns)


def test_a_sentence_is_cut_at_its_words():
    """Within 80 ms of where each begins."""
    parts, voice = "repeat cat eleven house".split(), "en-gb-x-gbclan+f4"
    spoken = [trim(Espeak().speak(part, voice, Style(190))) for part in parts]
    begins = np.cumsum([0] + [len(x) for x in spoken[:-1]])
    found = find_starts(np.concatenate(spoken), parts, Espeak())
    assert np.abs(np.array(found) - begins).max() < 0.08 * SAMPLE_RATE
    pieces = cut(np.concatenate(spoken), parts, Espeak())
    assert [abs(len(a) - len(b)) < 0.2 * SAMPLE_RATE for a, b in zip(pieces, spoken)] == [True] * 4
    assert all(len(x) == 0 for x in cut(noise(2000, 0.01), ["one"] * 9, Espeak())[5:])  # no room for them


def test_ctrl_c_leaves_the_old_model_and_the_recordings(voice, world, tmp_path):
    script = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
              f"from teaching import teach; teach.OLD.update({SMALL}); teach.main()")
    process = subprocess.Popen(
        [sys.executable, "-c", script, "--checkpoint", str(world / "flm"),
         "--recordings", str(voice), "--out", str(tmp_path / "taught"), "--minutes", "5", "--device", "cpu"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "taught.partial/model/log.jsonl", time.time() + 120
    while time.time() < deadline and process.poll() is None and not log.exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "the model is as it was" in err.splitlines()[-1]
    assert not (tmp_path / "taught").exists() and not (tmp_path / "taught.partial").exists()
    assert len(find_recordings(str(voice))) == 16


def test_an_error_leaves_nothing_half_written(voice, world, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(teach, "train", full)
    for name, n in SMALL.items():
        monkeypatch.setitem(teach.OLD, name, n)
    code, _, err = run("teaching.teach", "--checkpoint", world / "flm", "--recordings", voice, "--out",
                       tmp_path / "taught", "--device", "cpu")
    assert code == 1 and "No space left on device" in err.splitlines()[-1] and not os.listdir(tmp_path)


def test_a_second_one_into_the_same_folder_is_refused_and_the_first_goes_on(voice, world, tmp_path):
    (tmp_path / "taught.partial/data").mkdir(parents=True)
    with lock(str(tmp_path / "taught.partial")):
        code, _, err = run("teaching.teach", "--checkpoint", world / "flm", "--recordings", voice, "--out",
                           tmp_path / "taught")
    assert code == 1 and "another training writes to it" in err.splitlines()[-1]
    assert (tmp_path / "taught.partial/data").exists()


def test_prompts_are_recorded_in_the_terminal_until_they_are_good(tmp_path, capsys):
    """The first attempt is too soft; one prompt is there already."""
    prompts = make_prompts()[:3]
    save_recording(str(tmp_path), 1, speak(prompts[1].text))
    said = iter([noise(14 * SAMPLE_RATE), speak(prompts[0].text), speak(prompts[2].text)])
    pending = np.zeros(0, np.float32)

    def hear():
        nonlocal pending
        while len(pending) < FRAME:
            pending = np.concatenate([pending, next(said, np.zeros(FRAME)).astype(np.float32)])
        frame, pending = pending[:FRAME], pending[FRAME:]
        return frame
    record_from(hear, str(tmp_path), prompts)
    out = capsys.readouterr().out
    assert out.count(f"1 / 3   {prompts[0].text}") == 2 and "2 / 3" not in out and "too soft" in out
    assert sorted(find_recordings(str(tmp_path))) == [0, 1, 2]
    good, bad = read_recordings(str(tmp_path), prompts, least=3)
    assert len(good) == 3 and not bad


# ------------------------------------------------------------------------------------------------------------
# the page's server


class Request:
    """Stands in for aiohttp's."""

    def __init__(self, what="status", body=b"", **query):
        self.match_info, self.query, self.content, self.body = {"what": what}, query, self, body

    async def iter_chunked(self, n):
        for i in range(0, len(self.body), n):
            yield self.body[i:i + n]


def pcm(x):
    return (x.clip(-1, 1) * 32767).astype("<i2").tobytes()


@pytest.fixture
def lessons(world, tmp_path):
    lessons_ = pytest.importorskip("live.lessons")
    used = []

    async def use(duplex):
        used.append(duplex)
    made = lessons_.Lessons(str(world / "flm"), DuplexModel.load(str(world / "flm")), use)
    made.used, made.Refused = used, lessons_.Refused
    made.checkpoint, made.folder = str(tmp_path / "flm"), str(tmp_path / "voice")
    os.symlink(world / "flm", tmp_path / "flm")
    return made


def test_recordings_come_from_the_page(lessons):
    async def go():
        status = await lessons.answer(Request())
        assert len(status["prompts"]) == 40 and status["recorded"] == [] and not status["learning"]
        answer = await lessons.answer(Request("recording", pcm(speak(status["prompts"][4])), number="4"))
        assert answer["problem"] is None and answer["recorded"] == [4] and -40 < answer["level"] < 0
        answer = await lessons.answer(Request("recording", pcm(noise(24_000)), number="5"))
        assert "too soft" in answer["problem"] and answer["recorded"] == [4] and answer["level"] is None
        for request, message in (
                (Request("recording", b"", number="40"), "no such prompt"),
                (Request("recording", b"", number="9" * 5000), "nothing like"),
                (Request("nonsense"), "nothing like"),
                (Request("recording", b"x", number="1"), "no such prompt"), (Request("teach"), "needs 8"),
                (Request("recording", b"0" * 10 ** 6, number="1"), "15 seconds"),
                (Request("model", which="new"), "no such model"), (Request("model"), "no such model"),
                (Request("recording", b"", number="../1"), "nothing like")):
            with pytest.raises(lessons.Refused, match=message):
                await lessons.answer(request)
        assert (await lessons.answer(Request("discard")))["recorded"] == []
    asyncio.run(go())


COPIES = ("import shutil, sys, time; time.sleep(1); shutil.copytree(sys.argv[1], sys.argv[2])\n"
          "print('7 of 8 were answered now.'); print('done')")


async def record_eight(lessons):
    prompts = (await lessons.answer(Request()))["prompts"]
    for n in range(8):
        await lessons.answer(Request("recording", pcm(speak(prompts[n])), number=str(n)))


@contextlib.contextmanager
def teaching_is(script):
    """`script` in place of teaching/teach.py; its arguments are the checkpoint and what is to be written."""
    real = asyncio.create_subprocess_exec
    value = lambda args, flag: args[args.index(flag) + 1]
    asyncio.create_subprocess_exec = lambda *args, **kw: real(
        sys.executable, "-c", script, value(args, "--checkpoint"), value(args, "--out"), **kw)
    try:
        yield
    finally:
        asyncio.create_subprocess_exec = real


def lesson(lessons, script):
    """Teach with `script` in place of the training: (what the page is told while, and after it)."""
    async def go():
        await record_eight(lessons)
        with teaching_is(script):
            while_, second = await asyncio.gather(*(lessons.answer(Request("teach")) for _ in range(2)),
                                                  return_exceptions=True)
            assert isinstance(second, lessons.Refused) and "learning already" in str(second)
            with pytest.raises(lessons.Refused, match="learning already"):
                await lessons.answer(Request("teach"))
            with pytest.raises(lessons.Refused, match="learning"):
                await lessons.answer(Request("recording", b"", number="1"))
        await asyncio.wait_for(lessons.waiting, 60)
        return while_, await lessons.answer(Request())
    return asyncio.run(go())


def test_the_new_model_takes_over_and_the_old_one_comes_back(lessons):
    during, after = lesson(lessons, COPIES)
    assert during["learning"] and during["left"] > 30
    assert after["which"] == "new" and after["has_new"] and not after["learning"]
    assert after["message"] == "It has learned your voice. 7 of 8 were answered now."
    assert len(lessons.used) == 1
    assert lessons.used[0] is not lessons.models["old"]
    asyncio.run(lessons.answer(Request("model", which="old")))
    assert lessons.used[1] is lessons.models["old"] and lessons.which == "old"


def test_a_server_that_is_started_later_has_both_models_and_the_recordings(lessons):
    lesson(lessons, COPIES)
    again = type(lessons)(lessons.checkpoint, lessons.models["old"], lessons.use)
    assert again.folder == lessons.folder and again.which == "old"
    status = again.status()
    assert status["has_new"] and len(status["recorded"]) == 8 and not status["learning"]
    asyncio.run(again.answer(Request("model", which="new")))
    assert again.which == "new" and lessons.used[-1] is again.models["new"] is not again.models["old"]
    lesson(lessons, COPIES)  # once more: another folder, and from the old model
    assert again.taught().endswith("-taught-2") and len(os.listdir(os.path.dirname(again.checkpoint))) == 4


def test_a_server_that_ends_ends_the_lesson_and_leaves_the_recordings(lessons):
    script = "import os, sys, time; os.makedirs(sys.argv[2] + '.partial/data'); time.sleep(60)"

    async def begin_and_stop():
        await record_eight(lessons)
        with teaching_is(script):
            await lessons.answer(Request("teach"))
        process = lessons.process
        while not os.path.exists(f"{lessons.checkpoint}-taught-1.partial/data"):
            await asyncio.sleep(0.05)
        await lessons.stop()
        return process.returncode
    assert asyncio.run(begin_and_stop()) == -signal.SIGTERM
    assert not os.path.exists(f"{lessons.checkpoint}-taught-1.partial")
    assert len(find_recordings(lessons.folder)) == 8 and not lessons.status()["has_new"]


def test_a_full_disk_is_told_and_the_recordings_stay(lessons):
    resource = pytest.importorskip("resource")

    async def go():
        await record_eight(lessons)
        before, limits = os.listdir(lessons.folder), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            with pytest.raises(OSError, match="is the disk full"):
                await lessons.answer(Request("recording", pcm(speak(lessons.prompts[9].text)), number="9"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(lessons.folder) == before
    asyncio.run(go())


@pytest.mark.parametrize("script, message", [
    ("import sys; sys.exit('error: no space left on the disk')", "no space left"),
    ("import os; os.kill(os.getpid(), 9)", "code -9"), ("print('done')", "no such")])
def test_a_lesson_that_fails_leaves_the_old_model(lessons, script, message):
    _, after = lesson(lessons, script)
    assert message in after["message"] and "old model is still there" in after["message"]
    assert after["which"] == "old" and not after["has_new"] and not lessons.used
    assert len(after["recorded"]) == 8
