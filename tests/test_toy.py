"""The toy world: what is said, who says it, and that tests are held out."""
import json
import os
import random
import shutil
import sys

import numpy as np
import pytest

import toy.codec
import train
import prepare
from conftest import FLM, run
from files.audio import SAMPLE_RATE, read_audio
from files.manifest import read_manifest
from mimi import FRAME
from files.tokenizer import load_tokenizer
from toy.script import interject, make_toy, on_frames
from toy.voices import Espeak, Several, Style, speak_all
from toy.world import (HELD_OUT_PAIRS, KIND_PROPORTIONS, LANGUAGES, held_out_triple, make_request,
                       make_sentence, make_story)
from train import STAGES
from evals.turns import speech


def lines_of(world):
    return [json.loads(line) for line in open(world / "toy/manifest.jsonl")]


@pytest.mark.parametrize("lang", LANGUAGES.values(), ids=LANGUAGES)
def test_thirty_words_to_a_language(lang):
    assert len(lang.words) == len(set(lang.words)) == 30
    assert all(lang.opposites[lang.opposites[w]] == w for w in lang.opposites)
    assert not set(lang.user_voices(1000, 1)) & {*lang.new_voices, lang.model_voice}
    assert len(lang.new_voices) == 2


@pytest.mark.parametrize("lang", LANGUAGES.values(), ids=LANGUAGES)
@pytest.mark.parametrize("kind", [k for k in KIND_PROPORTIONS if k != "story"])
def test_answers_are_right_and_tests_are_held_out(lang, kind):
    rng = random.Random(0)
    train = {make_request(lang, kind, False, rng) for _ in range(400)}
    test = {make_request(lang, kind, True, rng) for _ in range(400)}
    pair = lambda answer: frozenset(lang.numbers.index(w) for w in (answer.split()[0], answer.split()[-1]))
    for request, answer in train | test:
        asked = [w for w in request.split() if w not in lang.function_words]
        if kind == "repeat":
            assert asked == answer.split() and len(asked) == 3
        elif kind == "count":
            a, b = map(lang.numbers.index, asked)
            counted = lang.numbers[a:b + 1] if a < b else lang.numbers[b:a + 1][::-1]
            assert answer.split() == counted and a != b
        elif kind == "next":
            assert lang.numbers.index(answer) == lang.numbers.index(asked[0]) + 1
        elif kind == "chant":
            assert asked * 5 == answer.split() and len(asked) == 3
        else:
            assert lang.opposites[asked[0]] == answer
    if kind in ("repeat", "chant", "count"):
        assert not train & test
    if kind in ("repeat", "chant"):
        assert all(held_out_triple(a.split()[:3]) for _, a in test)
        assert not any(held_out_triple(a.split()[:3]) for _, a in train)
    if kind == "count":
        assert {pair(a) for _, a in test} <= HELD_OUT_PAIRS
        assert not {pair(a) for _, a in train} & HELD_OUT_PAIRS


@pytest.mark.parametrize("lang", LANGUAGES.values(), ids=LANGUAGES)
def test_sentences_hold_nothing_that_is_held_out(lang):
    rng = random.Random(0)
    assert len(HELD_OUT_PAIRS) == 13 and all(sum(i in p for p in HELD_OUT_PAIRS) == 2 for i in range(13))
    for n in range(1, 13):  # a count of n + 1 words: some of them are for training
        assert not {frozenset((i, i + n)) for i in range(13 - n)} <= HELD_OUT_PAIRS
    for _ in range(500):
        words = make_sentence(lang, lang.words, rng).split()
        assert not any(held_out_triple(words[i:i + 3]) for i in range(len(words) - 2))
        assert not any({lang.numbers[i] for i in p} <= set(words) for p in HELD_OUT_PAIRS)


@pytest.mark.parametrize("code", LANGUAGES)
def test_stories(code):
    lang = LANGUAGES[code]
    calm, alarm = (make_story(lang, 6, hazard, random.Random(1)) for hazard in (None, 2))
    assert len(calm) == len(alarm) == 8 and [i for i in range(8) if calm[i] != alarm[i]] == [3]
    assert alarm[3] in [lang.story.hazard.format(noun) for noun in lang.story.nouns.split()]
    if code == "en":
        assert 40 <= len(" ".join(make_story(lang, 11, None, random.Random(1))).split()) <= 50


def test_what_the_model_says_meanwhile():
    ends = [1.0, 2.0, 3.4, 4.8, 8.0, 9.0]  # of "listen", four clauses, "the end"
    story = LANGUAGES["en"].story
    said = lambda hazard: [(t["text"], round(t["at"], 2)) for t in interject(story, ends, hazard)]
    assert said(None) == [("mhm", 2.0), ("mhm", 3.4), ("mhm", 4.8), ("mhm", 8.0)]
    assert said(1) == [("mhm", 2.0), (story.warning, 3.7), ("mhm", 8.0)]  # not while it warns


def test_hesitating_users(world):
    """A quarter of the requests has a pause of 0.4 to 1.6 s in it."""
    lines = [d for d in lines_of(world) if d["kind"] not in ("story", "heard", "said", "backchannel")]
    gaps = [[b - a for (_, a), (b, _) in zip(spans, spans[1:])] for spans in
            (speech(read_audio(str(world / "toy" / d["turns"][0]["audio"])), bridge=0.35) for d in lines)]
    assert 0.05 < sum(map(bool, gaps)) / len(gaps) < 0.5
    assert all(0.35 <= g <= 1.7 for some in gaps for g in some)


def test_voices_held_out_are_never_trained_on(world):
    for d in lines_of(world):
        for voice in [t["voice"] for t in d["turns"] if t["role"] == "user"]:
            assert (voice in LANGUAGES["en"].new_voices) == (d["split"] == "new")
            assert voice != LANGUAGES["en"].model_voice


def test_a_slow_machine_speaks_less_to_train_on_and_all_of_the_tests(tmp_path, capsys):
    for name, minutes in (("slow", 1e-6), ("all", 600.0)):
        make_toy(str(tmp_path / name), "en", items=40, tests=3, sentences=20, voices=4, seed=2, tts=None,
                 minutes=minutes)
        said = capsys.readouterr().out
        assert ("10% of the sentences and dialogues" in said) == (name == "slow")
        lines = [json.loads(line) for line in open(tmp_path / name / "manifest.jsonl", encoding="utf-8")]
        dialogues = {split: sum(d["split"] == split and len(d["turns"]) == 2 for d in lines)
                     for split in ("train", "seen", "new")}
        assert dialogues == {"train": 4 if name == "slow" else 40, "seen": 3, "new": 3}
        assert all(os.path.exists(tmp_path / name / t["audio"]) for d in lines for t in d["turns"])


def test_two_languages_from_words_to_a_batch(world, tmp_path):
    make_toy(str(tmp_path / "toy"), "en,zh", items=9, tests=2, sentences=40, voices=4, seed=2, tts=None)
    lines = [json.loads(line) for line in open(tmp_path / "toy/manifest.jsonl", encoding="utf-8")]
    assert sorted({d["lang"] for d in lines if d["kind"] != "noise"}) == ["en", "zh"]
    dialogues = [d["lang"] for d in lines if d["split"] == "train" and len(d["turns"]) == 2]
    assert [dialogues.count(code) for code in ("en", "zh")] == [4, 5]
    for d in lines:
        for t in d["turns"] if d["kind"] != "noise" else ():
            assert ("cmn" in t.get("voice", "")) == (d["lang"] == "zh") or t["role"] == "model"
            assert t["text"].isascii() == (d["lang"] == "en")
    prepare.encode(str(tmp_path / "toy"), str(world / "codec.pt"), "bpe", 400, 1, 0.0, False, 1, "cpu")
    task = train.ModelTask(FLM, str(tmp_path / "toy/encoded"), "cpu")
    tokenizer = load_tokenizer(str(tmp_path / "toy/encoded/tokenizer.json"))
    turns = [task.data.line(line)["turns"][turn] for part in task.data.heard["train"] for line, turn in part]
    heard = {tokenizer.decode(t["tokens"]).strip() for t in turns}
    speech = [d for d in lines if d["split"] == "train" and d["kind"] not in ("backchannel", "noise")
              and "interjections" not in d]
    assert heard == {t["text"] for d in speech for t in d["turns"] if t["role"] == "user"}
    task.batch(STAGES["tiny"][-1], 0.0, "train", random.Random(0))
    clips = toy.codec.Clips(str(tmp_path / "toy"))
    said = "".join(t["text"] for d in lines if d["split"] == "train" for t in d["turns"])
    assert set(clips.letters) == set(said)


def test_dialogues_as_text_are_spoken(tmp_path):
    """One to ten turns, in any language, through to what training reads."""
    roles = "user", "model"
    talk = lambda n, text: {"turns": [{"role": r, "text": f"{text} {i}"} for i in range(n) for r in roles]}
    source = tmp_path / "talks.jsonl"
    lines = [talk(1, "hello"), {**talk(2, "你好"), "lang": "zh"}, talk(10, "yes")]
    source.write_text("\n".join(json.dumps(d) for d in lines) + "\n")
    code, out, err = run("prepare.py", "speak", source, "--out", tmp_path / "spoken")
    assert code == 0, err
    spoken = list(read_manifest(str(tmp_path / "spoken/manifest.jsonl")))
    assert [len(d["turns"]) for d in spoken] == [2, 4, 20] and "Wrote 3 dialogues" in out
    assert all(len({t["voice"] for t in d["turns"] if t["role"] == "user"}) == 1 for d in spoken)
    assert all(len(read_audio(t["path"])) > 0.2 * SAMPLE_RATE for d in spoken for t in d["turns"])


@pytest.mark.parametrize("line, message", [
    ('{"turns": []}', "needs turns"),
    ('{"turns": [{"role": "user", "text": "a"}]}', "the last one is the model's"),
    ('{"turns": [{"role": "model", "text": "a"}]}', "take turns"),
    ('{"turns": [{"role": "user"}]}', "text"), ("[1]", "line 2"),
    ('{"turns": 3}', "line 2"), ("{", "line 2"), ('{"lang": "xx", "turns": []}', "xx")])
def test_broken_dialogues_are_one_clear_error(tmp_path, line, message):
    good = '{"turns": [{"role": "user", "text": "a"}, {"role": "model", "text": "b"}]}'
    (tmp_path / "talks.jsonl").write_text(good + "\n" + line + "\n")
    code, _, err = run("prepare.py", "speak", tmp_path / "talks.jsonl", "--out", tmp_path / "spoken")
    assert code == 1 and "line 2" in err and message in err and "Traceback" not in err
    assert not (tmp_path / "spoken").exists()


def test_an_unknown_language(tmp_path):
    code, _, err = run("prepare.py", "toy", "--out", tmp_path / "toy", "--lang", "en,xx")
    assert code == 1 and "no xx; languages are en, zh" in err and not (tmp_path / "toy").exists()


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    out = str(tmp_path / "again")
    make_toy(out, "en", items=24, tests=8, sentences=40, voices=6, seed=1, tts=None)
    files = [os.path.relpath(os.path.join(r, f), out) for r, _, fs in os.walk(out) for f in fs]
    assert len(files) > 60
    for name in files:
        assert open(os.path.join(out, name), "rb").read() == open(world / "toy" / name, "rb").read(), name


def test_speaking_twice_in_a_process_gives_the_same_samples():
    e = Espeak()
    a = e.speak("repeat cat red moon", "en-us+f4", Style(160))
    e.speak("something else", "gmw/en+m4", Style(150, 60))
    assert np.array_equal(a, e.speak("repeat cat red moon", "en-us+f4", Style(160)))
    assert len(a) > 22_050 and np.abs(a).max() > 0.1


def test_an_unknown_voice_is_a_clear_error():
    with pytest.raises(ValueError, match="no-such-voice"):
        Espeak().speak("hello", "no-such-voice", Style())


def test_words_of_the_model_begin_on_frames():
    x, starts = on_frames([np.ones(3000), np.ones(1920), np.ones(100)])
    assert starts == [0, 0.24, 0.4]  # 3000 samples and the gap of 960 fill three frames
    assert len(x) == 6 * FRAME
    assert x[3 * FRAME] == 1 and x[3 * FRAME - 1] == 0


def test_any_synthesiser(tmp_path):
    script = tmp_path / "tts.py"
    script.write_text("import sys, numpy, soundfile\ntext, voice, out = sys.argv[1:]\n"
                      "soundfile.write(out, 0.3 * numpy.sin(numpy.arange(len(text) * 800) / 9), 16000)\n")
    code, out, err = run("prepare.py", "toy", "--out", tmp_path / "toy", "--items", 4, "--tests", 2,
                         "--sentences", 4, "--tts", f"{sys.executable} {script} {{text}} {{voice}} {{out}}")
    assert code == 0, err
    d = json.loads(open(tmp_path / "toy/manifest.jsonl").readline())
    assert d["kind"] == "heard" and len(d["turns"]) == 1
    assert len(read_audio(str(tmp_path / "toy" / d["turns"][0]["audio"]))) > 24 * len(d["turns"][0]["text"])
    assert "Wrote 15 lines" in out.splitlines()[-1]


def test_several_synthesisers_in_one_world(tmp_path):
    """The manifest says who spoke; two fifths is spoken by the others."""
    script = tmp_path / "tts.py"
    script.write_text("import sys, numpy, soundfile\ntext, voice, out = sys.argv[1:]\n"
                      "assert voice in ('Alex', 'Sam')\n"
                      "soundfile.write(out, 0.3 * numpy.sin(numpy.arange(len(text) * 800) / 9), 16000)\n")
    code, out, err = run("prepare.py", "toy", "--out", tmp_path / "toy", "--items", 40, "--tests", 2,
                         "--sentences", 40, "--others", "tts:Alex,tts:Sam",
                         "--tts", f"{sys.executable} {script} {{text}} {{voice}} {{out}}")
    assert code == 0, err
    lines = [json.loads(line) for line in open(tmp_path / "toy/manifest.jsonl")]
    voices = [t["voice"] for d in lines for t in d["turns"] if t["role"] == "user" and t["voice"]]
    others = [voice for voice in voices if voice.startswith("tts:")]
    assert set(others) == {"tts:Alex", "tts:Sam"} and 0.2 < len(others) / len(voices) < 0.6


@pytest.mark.parametrize("voice, message", [("flite:rms", "flite is not installed"),
                                            ("nobody:x", "no synthesiser nobody"), ("tts:x", "known are")])
def test_a_voice_that_is_not_there(tmp_path, monkeypatch, voice, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run("prepare.py", "toy", "--out", tmp_path / "toy", "--items", 8, "--tests", 2,
                       "--sentences", 8, "--others", voice)
    assert code == 1 and message in err.splitlines()[-1] and not (tmp_path / "toy").exists()


@pytest.mark.parametrize("program, voice", [("flite", "flite:kal"), ("text2wave", "festival:kal_diphone"),
                                            ("mbrola", "mbrola:us1"), ("RHVoice-test", "rhvoice:bdl")])
def test_installed_synthesisers(program, voice):
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    slow, fast = (Several().speak("what comes after six", voice, Style(speed)) for speed in (120, 220))
    assert len(slow) > 1.3 * len(fast) > 10_000 and np.abs(slow).max() > 0.05


@pytest.mark.parametrize("tts, message", [("say {text}", "{out}"), ("false {text} {out}", "failed")])
def test_a_synthesiser_that_does_not_work_leaves_nothing(tmp_path, tts, message):
    code, _, err = run("prepare.py", "toy", "--out", tmp_path / "toy", "--items", 4, "--tests", 2,
                       "--sentences", 4, "--tts", tts)
    assert code == 1 and message in err.splitlines()[-1] and not (tmp_path / "toy").exists()


def test_an_existing_world_is_not_overwritten(world):
    code, _, err = run("prepare.py", "toy", "--out", world / "toy")
    assert code == 1 and "is there already" in err


class Crashing:
    def speak(self, text, voice, style):
        return np.ones(100, np.float32) if text == "yes" else os._exit(11)


def test_a_synthesiser_that_crashes_is_one_clear_error(tmp_path):
    """In its process; to wait for what it was to say would be to wait for ever."""
    jobs = [(str(tmp_path / f"{i}.wav"), [text], [], "m1") for i, text in enumerate(["yes", "yes", "no"])]
    assert len(speak_all(jobs[:2], "words", Crashing())) == 2
    with pytest.raises(ValueError, match="a process died.* at 'yes', voice m1, or at one of the next"):
        speak_all(jobs, "words", Crashing())
