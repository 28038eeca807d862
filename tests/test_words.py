"""Recordings of single words -> sentences and requests."""
import json
import shutil

import numpy as np
import pytest
import soundfile

import corpora.words
from conftest import record, run
from corpora.words import People, find_words, read_word
from files.audio import SAMPLE_RATE, read_audio
from files.manifest import read_manifest
from toy.voices import Espeak, Style
from toy.world import LANGUAGES

DIGITS = LANGUAGES["en"].numbers[:10]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Speech Commands' layout: anna and bert say eight words, carl one; and words that the toy world does not
    know."""
    folder = tmp_path_factory.mktemp("people")
    for word in ("cat", "dog", "three", "five", "up", "down", "happy", "house", "marvin"):
        record(str(folder / word / "0aa1_nohash_0.wav"), word, "en-us+f4")
        record(str(folder / word / "0bb2_nohash_0.wav"), word, "gmw/en+m2")
    record(str(folder / "cat/0aa1_nohash_1.wav"), "cat", "en-us+f4")
    record(str(folder / "cat/0cc3_nohash_0.wav"), "cat", "en-us+m1")
    (folder / "_background_noise_").mkdir()
    soundfile.write(folder / "_background_noise_/hiss.wav", np.zeros(16_000), 16_000)
    return folder


def test_both_layouts_are_found(people, tmp_path):
    found = find_words(str(people), LANGUAGES["en"])
    assert set(found) == {"0aa1", "0bb2", "0cc3"} and len(found["0aa1"]["cat"]) == 2
    assert "marvin" not in found["0aa1"] and set(found["0cc3"]) == {"cat"}
    for i, word in enumerate(DIGITS):
        record(str(tmp_path / f"fsdd/recordings/{i}_theo_0.wav"), word, "en-us+m1", 8000)
    assert sorted(find_words(str(tmp_path / "fsdd"), LANGUAGES["en"])["theo"]) == sorted(DIGITS)


def test_words_become_requests_of_one_voice(people, tmp_path):
    out = tmp_path / "data"
    code, text, err = run("prepare.py", "words", people, "--out", out, "--items", 30, "--sentences", 30,
                          "--tests", 6, "--hold-out", "0bb2")
    assert code == 0, err
    assert "1 speakers to train on, 1 held out; 1 left out" in text and f"to {out}/manifest.jsonl" in text
    lines = list(read_manifest(str(out / "manifest.jsonl")))
    users = [(d["split"], t["voice"]) for d in lines for t in d["turns"] if t["role"] == "user"]
    voices = {split: {voice for s, voice in users if s == split} for split in ("train", "seen", "new")}
    assert voices == {"train": {"0aa1"}, "seen": {"0aa1"}, "new": {"0bb2"}}
    repeats = [d["turns"][1]["text"].split() for d in lines if d["kind"] == "repeat"]
    known = set(find_words(str(people), LANGUAGES["en"])["0aa1"])
    assert repeats and all(set(words) <= known for words in repeats)
    for d in lines:
        for t in d["turns"]:
            assert 0.1 < len(read_audio(t["path"])) / SAMPLE_RATE < 40


def test_a_recorded_word_is_the_recording(people):
    """And not the carrier's; another style chooses another recording."""
    said = []

    class Carrier:
        def speak(self, text, voice, style):
            said.append((text, voice))
            return Espeak().speak(text, "en-us", style)

    found = find_words(str(people), LANGUAGES["en"])
    speaker = People(found, ["en-us+m5"], Carrier())
    x = [speaker.speak("repeat cat the dog up", "0aa1", Style(speed)) for speed in range(140, 160)]
    assert set(said) == {("repeat", "en-us+m5"), ("the", "en-us+m5")}
    assert np.array_equal(x[0], speaker.speak("repeat cat the dog up", "0aa1", Style(140)))
    assert len({len(y) for y in x}) > 10


def test_silence_around_a_word_is_cut_off(people):
    x = read_word(str(people / "cat/0aa1_nohash_0.wav"))
    assert len(x) / SAMPLE_RATE < 0.75 and x[0] == 0 and abs(x[-1]) < 1e-6


@pytest.mark.parametrize("what, message", [
    ("empty", "holds no recording of a word"), ("silent", "is silent"), ("zero", "zero samples"),
    ("one word", "has recorded three words"), ("unknown", "nobody called eve")])
def test_bad_recordings_are_one_clear_error(people, tmp_path, what, message):
    source, hold_out = tmp_path / "source", ""
    source.mkdir()
    if what == "one word":
        shutil.copytree(people / "cat", source / "cat")
    elif what != "empty":
        shutil.copytree(people, source, dirs_exist_ok=True)
    if what in ("silent", "zero"):
        for path in source.glob("*/0aa1_nohash_*.wav"):
            soundfile.write(path, np.zeros(4000 if what == "silent" else 0), 16_000)
    if what == "unknown":
        hold_out = "eve"
    code, _, err = run("prepare.py", "words", source, "--out", tmp_path / "data", "--items", 20,
                       "--sentences", 20, "--tests", 2, "--hold-out", hold_out)
    assert code == 1 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "data").exists()


def test_requests_go_through_encode_and_training(people, world, tmp_path):
    """With the toy world's tokeniser, beside it."""
    import train
    from conftest import FLM
    out = tmp_path / "data"
    code, _, err = run("prepare.py", "words", people, "--out", out, "--items", 8, "--sentences", 8,
                       "--tests", 2)
    assert code == 0, err
    code, _, err = run("prepare.py", "encode", "--data", out, "--codec", world / "codec.pt", "--tokenizer",
                       world / "toy/encoded", "--copies", 3, "--augment", 1.0, "--processes", 1)
    assert code == 0, err
    task = train.ModelTask(FLM, f"{world}/toy/encoded,{out}/encoded", "cpu")
    stage = train.Stage("once", 2, 2, 1e-3, 0, 48, {"response_tts": (1, 1), "asr": (1, 1)})
    train.train(task, [stage], str(tmp_path / "flm"))
    names = {json.loads(line)["turns"][0]["voice"] for line in open(out / "manifest.jsonl")
             if "user" in line}
    assert "0aa1" in names and corpora.words.LAYOUTS
