"""The toy world, the manifest, and sound -> codes."""
import json
import os
import random
import shutil
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch

import prepare
import train
from chat import speech
from conftest import FLM, run
from mimi import FRAME, SAMPLE_RATE, Mimi, read_audio
from prepare import (HELD_OUT_PAIRS, LANGUAGES, Espeak, held_out_triple, interject, make_request, make_sentence, make_story,
                     on_frames, read_manifest, train_bpe)
from streams import load_tokenizer, make_tokenizer
from train import STAGES


def manifest(world):
    return [json.loads(line) for line in open(world / "toy/manifest.jsonl")]


@pytest.mark.parametrize("lang", LANGUAGES.values(), ids=LANGUAGES)
def test_thirty_words_to_a_language(lang):
    assert len(lang.words) == len(set(lang.words)) == 30
    assert all(lang.opposites[lang.opposites[w]] == w for w in lang.opposites)
    assert not set(lang.user_voices(1000, 1)) & {*lang.new_voices, lang.model_voice} and len(lang.new_voices) == 2


@pytest.mark.parametrize("lang", LANGUAGES.values(), ids=LANGUAGES)
@pytest.mark.parametrize("kind", [k for k in prepare.SHARES if k != "story"])
def test_answers_are_right_and_tests_are_held_out(lang, kind):
    rng = random.Random(0)
    train = {make_request(lang, kind, False, rng) for _ in range(400)}
    test = {make_request(lang, kind, True, rng) for _ in range(400)}
    pair = lambda answer: frozenset(lang.numbers.index(w) for w in (answer.split()[0], answer.split()[-1]))
    for request, answer in train | test:
        asked = [w for w in request.split() if w not in lang.little]
        if kind == "repeat":
            assert asked == answer.split() and len(asked) == 3
        elif kind == "count":
            a, b = map(lang.numbers.index, asked)
            assert answer.split() == (lang.numbers[a:b + 1] if a < b else lang.numbers[b:a + 1][::-1]) and a != b
        elif kind == "next":
            assert lang.numbers.index(answer) == lang.numbers.index(asked[0]) + 1
        elif kind == "chant":
            assert asked * 5 == answer.split() and len(asked) == 3
        else:
            assert lang.opposites[asked[0]] == answer
    if kind in ("repeat", "chant", "count"):
        assert not train & test
    if kind in ("repeat", "chant"):
        assert all(held_out_triple(a.split()[:3]) for _, a in test) and not any(held_out_triple(a.split()[:3]) for _, a in train)
    if kind == "count":
        assert {pair(a) for _, a in test} <= HELD_OUT_PAIRS and not {pair(a) for _, a in train} & HELD_OUT_PAIRS


@pytest.mark.parametrize("lang", LANGUAGES.values(), ids=LANGUAGES)
def test_sentences_hold_nothing_that_is_held_out(lang):
    rng = random.Random(0)
    assert len(HELD_OUT_PAIRS) == 12 and all(sum(i in p for p in HELD_OUT_PAIRS) == 2 for i in range(12))
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
    assert said(None) == [("mhm", 2.08), ("mhm", 3.48), ("mhm", 4.88), ("mhm", 8.08)]
    assert said(1) == [("mhm", 2.08), (story.warning, 3.7), ("mhm", 8.08)]  # not while it warns


def test_hesitating_users(world):
    """A quarter of the requests has a pause of 0.4 to 1.6 s in it."""
    lines = [d for d in manifest(world) if d["kind"] not in ("story", "heard", "said", "backchannel")]
    gaps = [[b - a for (_, a), (b, _) in zip(spans, spans[1:])] for spans in
            (speech(read_audio(str(world / "toy" / d["turns"][0]["audio"])), bridge=0.35) for d in lines)]
    assert 0.05 < sum(map(bool, gaps)) / len(gaps) < 0.5 and all(0.35 <= g <= 1.7 for some in gaps for g in some)


def test_voices_held_out_are_never_trained_on(world):
    for d in manifest(world):
        for voice in [t["voice"] for t in d["turns"] if t["role"] == "user"]:
            assert (voice in LANGUAGES["en"].new_voices) == (d["split"] == "new") and voice != LANGUAGES["en"].model_voice


def test_two_languages_from_words_to_a_batch(world, tmp_path):
    prepare.make_toy(str(tmp_path / "toy"), "en,zh", items=9, tests=2, sentences=40, voices=4, seed=1, tts=None)
    lines = [json.loads(line) for line in open(tmp_path / "toy/manifest.jsonl", encoding="utf-8")]
    assert sorted({d["lang"] for d in lines}) == ["en", "zh"]
    assert [sum(d["lang"] == c and d["split"] == "train" and len(d["turns"]) == 2 for d in lines) for c in ("en", "zh")] == [4, 5]
    for d in lines:
        for t in d["turns"]:
            assert ("cmn" in t.get("voice", "")) == (d["lang"] == "zh") or t["role"] == "model"
            assert t["text"].isascii() == (d["lang"] == "en")
    prepare.encode(str(tmp_path / "toy"), str(world / "codec.pt"), "bpe", 400, 1, False, 1, "cpu")
    job = train.ModelJob(FLM, str(tmp_path / "toy/encoded"), "cpu")
    tokenizer = load_tokenizer(str(tmp_path / "toy/encoded/tokenizer.json"))
    heard = {tokenizer.decode(t["tokens"]).strip() for part in job.heard["train"] for t in part}
    assert heard == {t["text"] for d in lines for t in d["turns"] if d["split"] == "train" and t["role"] == "user" and d["kind"] != "backchannel"}
    job.batch(STAGES["tiny"][-1], 0.0, "train", random.Random(0))
    clips = train.Clips(str(tmp_path / "toy"))
    assert set("三猫cat ") <= set(clips.letters)


def test_dialogues_as_text_are_spoken(tmp_path):
    """One to ten turns, in any language, through to what training reads."""
    talk = lambda n, text: {"turns": [{"role": r, "text": f"{text} {i}"} for i in range(n) for r in ("user", "model")]}
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
    ('{"turns": []}', "needs turns"), ('{"turns": [{"role": "user", "text": "a"}]}', "the last one is the model's"),
    ('{"turns": [{"role": "model", "text": "a"}]}', "take turns"), ('{"turns": [{"role": "user"}]}', "text"), ("[1]", "line 2"),
    ('{"turns": 3}', "line 2"), ("{", "line 2"), ('{"lang": "xx", "turns": []}', "xx")])
def test_broken_dialogues_are_one_clear_error(tmp_path, line, message):
    good = '{"turns": [{"role": "user", "text": "a"}, {"role": "model", "text": "b"}]}'
    (tmp_path / "talks.jsonl").write_text(good + "\n" + line + "\n")
    code, _, err = run("prepare.py", "speak", tmp_path / "talks.jsonl", "--out", tmp_path / "spoken")
    assert code == 1 and "line 2" in err and message in err and "Traceback" not in err and not (tmp_path / "spoken").exists()


def test_an_unknown_language(tmp_path):
    code, _, err = run("prepare.py", "toy", "--out", tmp_path / "toy", "--lang", "en,xx")
    assert code == 1 and "no xx; languages are en, zh" in err and not (tmp_path / "toy").exists()


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    out = str(tmp_path / "again")
    prepare.make_toy(out, "en", items=24, tests=8, sentences=40, voices=6, seed=1, tts=None)
    files = [os.path.relpath(os.path.join(r, f), out) for r, _, fs in os.walk(out) for f in fs]
    assert len(files) > 60
    for name in files:
        assert open(os.path.join(out, name), "rb").read() == open(world / "toy" / name, "rb").read(), name


def test_speaking_twice_in_a_process_gives_the_same_samples():
    e = Espeak()
    a = e.speak("repeat cat red moon", "en-us+f4", 160, 50)
    e.speak("something else", "gmw/en+m4", 150, 60)
    assert np.array_equal(a, e.speak("repeat cat red moon", "en-us+f4", 160, 50))
    assert len(a) > 22_050 and np.abs(a).max() > 0.1


def test_an_unknown_voice_is_a_clear_error():
    with pytest.raises(ValueError, match="no-such-voice"):
        Espeak().speak("hello", "no-such-voice", 160, 50)


def test_words_of_the_model_begin_on_frames():
    x, starts = on_frames([np.ones(3000), np.ones(1920), np.ones(100)])
    assert starts == [0, 0.24, 0.4] and len(x) == 6 * FRAME  # 3000 samples and the gap of 960 fill three frames
    assert x[3 * FRAME] == 1 and x[3 * FRAME - 1] == 0


def test_any_synthesiser(tmp_path):
    script = tmp_path / "tts.py"
    script.write_text("import sys, numpy, soundfile\ntext, voice, out = sys.argv[1:]\n"
                      "soundfile.write(out, 0.3 * numpy.sin(numpy.arange(len(text) * 800) / 9), 16000)\n")
    code, out, err = run("prepare.py", "toy", "--out", tmp_path / "toy", "--items", 4, "--tests", 2, "--sentences", 4,
                         "--tts", f"{sys.executable} {script} {{text}} {{voice}} {{out}}")
    assert code == 0, err
    d = json.loads(open(tmp_path / "toy/manifest.jsonl").readline())
    assert d["kind"] == "heard" and len(d["turns"]) == 1
    assert len(read_audio(str(tmp_path / "toy" / d["turns"][0]["audio"]))) > 24 * len(d["turns"][0]["text"])
    assert "Wrote 14 lines" in out.splitlines()[-1]


@pytest.mark.parametrize("tts, message", [("say {text}", "{out}"), ("false {text} {out}", "failed")])
def test_a_synthesiser_that_does_not_work_leaves_nothing(tmp_path, tts, message):
    code, _, err = run("prepare.py", "toy", "--out", tmp_path / "toy", "--items", 4, "--tests", 2, "--sentences", 4, "--tts", tts)
    assert code == 1 and message in err.splitlines()[-1] and not (tmp_path / "toy").exists()


def test_an_existing_world_is_not_overwritten(world):
    code, _, err = run("prepare.py", "toy", "--out", world / "toy")
    assert code == 1 and "is there already" in err


def test_bpe_makes_words_whole_and_text_round_trips():
    ranks = train_bpe(Counter({" repeat": 3, " cat": 3, " red": 4, " moon": 3, " opposite": 1, " of": 1}), 400)
    t = make_tokenizer(ranks, prepare.PATTERN)
    assert len(t.encode_ordinary(" repeat cat red")) == 3
    for text in (" repeat cat", "Grüße, 世界!\n\t two  spaces", ""):
        assert t.decode(t.encode_ordinary(text)) == text


TEXTS = ["repeat cat", "Grüße, 世界! 你好吗？", "don't 12 3\n\t two  spaces", "# the 你好你好", "cafe\u0301", "𝄞 \u200b"]


def publish(folder, kind):
    """A small byte-level BPE in the files of Qwen2.5: merges for ' the', '你' and '# '."""
    letters = {b: c for c, b in prepare.BYTES.items()}
    word = lambda data: "".join(letters[b] for b in data)
    merges = [(b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b"\xe4", b"\xbd"), (b"\xe4\xbd", b"\xa0"), (b"#", b" ")]
    merges = [(word(a), word(b)) for a, b in merges]
    vocab = {t: i for i, t in enumerate([letters[b] for b in sorted(letters, key=letters.get)] + [a + b for a, b in merges])}
    added = [(len(vocab) + i, name) for i, name in enumerate(["<|endoftext|>", "<|im_start|>"])]
    if kind == "tokenizer.json":
        split = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": prepare.QWEN_PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]}
        (folder / kind).write_text(json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"}, "pre_tokenizer": split,
            "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": vocab, "merges": [" ".join(m) for m in merges]},
            "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True} for i, name in added]}))
    else:
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {i: {"content": c} for i, c in added}}))
    return str(folder)


@pytest.mark.parametrize("name", ["bytes", "bpe", "tokenizer.json", "vocab.json"])
def test_every_tokeniser_gives_back_every_text(name, tmp_path):
    saved = prepare.get_tokenizer(name if "." not in name else publish(tmp_path, name), Counter(" ".join(TEXTS[:2]).split()), 300)
    t = make_tokenizer(**saved)
    for text in TEXTS:
        assert t.decode(t.encode_ordinary(text)) == text
        assert t.decode(prepare.tokens_of({"text": text}, t)["tokens"]).split() == unicodedata.normalize("NFC", text).split()
    if "." in name:
        assert t.encode_ordinary("the the") == [saved["ranks"][b"t"], saved["ranks"][b"he"], 258]
        assert t.encode_ordinary("你") == [260] and saved["ranks"][b"# "] == 261
        assert t.encode("<|im_start|><wait>", allowed_special="all") == [263, 264]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_the_same_tokens_as_the_tokenizers_library(name, tmp_path):
    (tmp_path / "theirs").mkdir()
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(publish(tmp_path / "theirs", "tokenizer.json") + "/tokenizer.json")
    ours = make_tokenizer(**prepare.get_tokenizer(publish(tmp_path, name), {}, 0))
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice(["the", " the", " ", "你", "好", "#", "e\u0301", "'s", "7", "\n", "t", "h"]) for _ in range(12))
        assert ours.encode_ordinary(unicodedata.normalize("NFC", text)) == theirs.encode(text).ids


@pytest.mark.parametrize("change, says", [
    (lambda f: (f / "vocab.json").unlink(), "holds neither"),
    (lambda f: (f / "vocab.json").write_text("[]"), "vocab.json: not a byte-level BPE"),
    (lambda f: (f / "vocab.json").write_text('{"a": 0}'), "vocab.json: not a byte-level BPE"),
    (lambda f: (f / "merges.txt").write_text("h e\nĠ t\n"), "merge 0 does not give token 256"),
    (lambda f: (f / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"900": {"content": "x"}}}'), "do not follow"),
])
def test_a_damaged_vocabulary_is_one_clear_error(change, says, tmp_path):
    publish(tmp_path, "vocab.json")
    change(tmp_path)
    with pytest.raises((ValueError, OSError), match=says):
        prepare.get_tokenizer(str(tmp_path), {}, 0)


def test_codes_are_those_of_a_live_stream(world):
    """A turn's stored codes are what the codec gives when the sound comes after silence, frame by frame."""
    codec = Mimi.load(str(world / "codec.pt"))
    codes = np.load(world / "toy/encoded/00000.npy")
    for line in list(open(world / "toy/encoded/00000.jsonl"))[-6:]:
        turn = json.loads(line)["turns"][1]  # the model's: begins on a frame
        copy = turn["copies"][0]
        x = read_audio(str(world / "toy/model" / (turn["text"].replace(" ", "-") + ".flac")))
        state, heard = codec.init_state(1), []
        x = torch.nn.functional.pad(x, (20 * FRAME, 10 * FRAME - len(x) % FRAME))
        for w in x[None, None].split(FRAME, -1):
            heard.append(codec.encode_step(w, state)[0, :, 0])
        heard = torch.stack(heard)[20:20 + copy["frames"]].numpy()
        assert (heard == codes[copy["offset"]:copy["offset"] + copy["frames"]]).mean() > 0.999
        assert copy["speech"] == -(-(len(x) - 30 * FRAME + 1) // FRAME) or copy["frames"] == copy["speech"] + prepare.TAIL


def test_tokens_know_their_frames(world):
    for line in open(world / "toy/encoded/00000.jsonl"):
        model = json.loads(line)["turns"][-1]
        if model["role"] == "user":
            continue
        assert len(model["starts"]) == len(model["tokens"]) and model["starts"][0] == 0
        assert model["starts"] == sorted(model["starts"]) and model["starts"][-1] < model["copies"][0]["speech"]


def test_a_word_that_begins_on_a_frame_belongs_to_it():
    t = make_tokenizer(train_bpe({" a": 1}, 400), prepare.PATTERN)
    turn = {"text": " ".join("a" * 400), "starts": [round(i * 0.08, 4) for i in range(400)]}
    assert prepare.tokens_of(turn, t)["starts"] == list(range(400))


def broken(world, tmp_path, what):
    folder = tmp_path / "toy"
    folder.mkdir()
    lines = [{**json.loads(line), "id": i} for i, line in enumerate(list(open(world / "toy/manifest.jsonl"))[-3:])]
    for d in lines:
        d["split"] = "train"
    for d in lines:
        for t in d["turns"]:
            t["audio"] = str(world / "toy" / t["audio"])
    text = [json.dumps(d) for d in lines]
    if what == "not json":
        text[1] = "{" + text[1]
    elif what == "no turns":
        text[1] = '{"id": 1}'
    elif what == "odd role":
        text[1] = text[1].replace('"user"', '"waiter"')
    elif what == "no sound":
        text[1] = text[1].replace("/user/", "/nowhere/")
    (folder / "manifest.jsonl").write_text("\n".join(text) + "\n")
    return folder


@pytest.mark.parametrize("what", ["not json", "no turns", "odd role", "no sound"])
def test_a_broken_line_is_named_and_may_be_skipped(world, tmp_path, what, capsys):
    folder = broken(world, tmp_path, what)
    with pytest.raises(ValueError, match="line 2"):
        list(read_manifest(str(folder / "manifest.jsonl")))
    assert [d["id"] for d in read_manifest(str(folder / "manifest.jsonl"), skip_broken=True)] == [0, 2]
    assert "line 2" in capsys.readouterr().err
    code, out, err = run("prepare.py", "encode", "--data", folder, "--codec", world / "codec.pt")
    assert code == 1 and "line 2" in err.splitlines()[-1] and not (folder / "encoded").exists()
    code, out, err = run("prepare.py", "encode", "--data", folder, "--codec", world / "codec.pt", "--skip-broken")
    assert code == 0 and "of 2 lines" in out


def test_a_sound_file_that_is_cut_off_stops_the_encoding_and_names_it(world, tmp_path):
    folder = broken(world, tmp_path, "")
    d = [json.loads(line) for line in open(folder / "manifest.jsonl")]
    bad = tmp_path / "bad.wav"
    soundfile.write(bad, np.zeros(24000), 24000)
    bad.write_bytes(bad.read_bytes()[:9999])
    d[2]["turns"][0]["audio"] = str(bad)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(x) + "\n" for x in d))
    code, _, err = run("prepare.py", "encode", "--data", folder, "--codec", world / "codec.pt")
    assert code == 1 and "bad.wav: cut off" in err.splitlines()[-1] and not (folder / "encoded").exists()


def encode(folder, world, processes=1, name="bpe", **kwargs):
    prepare.encode(str(folder), str(world / "codec.pt"), name, 300, 1, False, processes, "cpu", **kwargs)
    return {f.name: f.read_bytes() for f in (folder / "encoded").iterdir()}


def small_world(world, tmp_path, n=10):
    """Some lines of the toy world in another folder."""
    (tmp_path / "toy").mkdir()
    lines = [json.loads(line) for line in list(open(world / "toy/manifest.jsonl"))[-n:]]
    for t in (t for d in lines for t in d["turns"]):
        t["audio"] = str(world / "toy" / t["audio"])
    (tmp_path / "toy/manifest.jsonl").write_text("".join(json.dumps(d | {"split": "train"}) + "\n" for d in lines))
    return tmp_path / "toy"


def test_a_killed_encoding_is_continued(world, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD", 4)
    folder = small_world(world, tmp_path)
    whole = encode(folder, world)
    assert sorted(whole) == ["00000.jsonl", "00000.npy", "00001.jsonl", "00001.npy", "00002.jsonl", "00002.npy", "meta.json",
                             "tokenizer.json"]
    done, real = [], prepare.encode_shard

    def dies(job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        real(job)
    monkeypatch.setattr(prepare, "encode_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, world)
    assert {f.name: f.read_bytes() for f in (folder / "encoded").iterdir()} == whole  # the old one is intact
    (folder / "encoded.partial/00001.jsonl").unlink()  # as if killed between the two files of a shard
    monkeypatch.setattr(prepare, "encode_shard", lambda job: (done.append(job), real(job)))
    done.clear()
    assert encode(folder, world) == whole and [job[0] for job in done] == [1, 2]
    done.clear()
    encode(folder, world, name="bytes")  # other settings: nothing can be kept
    assert len(done) == 3 and not (folder / "encoded.partial").exists()


def test_two_processes_write_what_one_writes(world, tmp_path):
    lines = (small_world(world, tmp_path, 1) / "manifest.jsonl").read_text() * (prepare.SHARD + 5)
    (tmp_path / "toy/manifest.jsonl").write_text(lines)
    one = encode(tmp_path / "toy", world)
    assert len(one) == 6 and encode(tmp_path / "toy", world, processes=2) == one


def test_the_tokeniser_of_another_encoding(world, tmp_path):
    folder = small_world(world, tmp_path)
    assert encode(folder, world, name=str(world / "toy/encoded"))["tokenizer.json"] == (world / "toy/encoded/tokenizer.json").read_bytes()
    assert len(train.read_encoded(f"{world}/toy/encoded,{folder}/encoded")[1]) > 10


def noise(path, seconds, rate, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).normal(size=(int(seconds * rate), channels)) * 0.1, rate)


def corpus(folder, kind):
    """A small one, laid out as it is downloaded; and what to give to prepare.py."""
    if kind == "librispeech":
        for i, words in enumerate(["HELLO THERE", "IT'S LATE"]):
            noise(folder / f"dev-clean/84/121/84-121-000{i}.flac", 0.7, 16_000)
        (folder / "dev-clean/84/121/84-121.trans.txt").write_text("84-121-0000 HELLO THERE\n84-121-0001 IT'S LATE\n")
        return folder
    if kind == "ljspeech":
        noise(folder / "wavs/LJ001-0001.wav", 0.8, 22_050)
        noise(folder / "wavs/LJ001-0002.wav", 0.6, 22_050)
        (folder / "metadata.csv").write_text("LJ001-0001|In 1455.|In fourteen fifty-five.\nLJ001-0002|Being|Being\n")
        return folder
    words = [["Hi", [0.5, 0.8], "SPEAKER_MAIN"], ["you.", [0.8, 1.0], "SPEAKER_MAIN"], ["Oh", [1.2, 1.4], "SPEAKER_OTHER"],
             ["Well", [1.1, 1.3], "SPEAKER_MAIN"], ["then", [1.3, 1.5], "SPEAKER_MAIN"], ["bye", [2.4, 2.8], "SPEAKER_MAIN"]]
    for name in "ab":
        noise(folder / f"stereo/{name}.wav", 3.0, 24_000, 2)
        (folder / f"stereo/{name}.json").write_text(json.dumps({"alignments": words}))
    (folder / "data.jsonl").write_text("".join(f'{{"path": "stereo/{name}.wav", "duration": 3.0}}\n' for name in "ab"))
    return folder / "data.jsonl"


@pytest.mark.parametrize("kind", prepare.CORPORA)
def test_a_corpus_as_it_is_downloaded(kind, world, tmp_path):
    """From its files to a step of training."""
    out = tmp_path / "data"
    code, said, err = run("prepare.py", kind, corpus(tmp_path / "download", kind), "--out", out)
    assert code == 0 and said.startswith("Wrote 2 lines"), err
    encoded = encode(out, world)
    lines = [json.loads(line) for line in encoded["00000.jsonl"].splitlines()]
    t = load_tokenizer(out / "encoded/tokenizer.json")
    texts = {"librispeech": [" hello there", " it's late"], "ljspeech": [" In fourteen fifty-five.", " Being"],
             "conversations": [" Hi you.", " Well then", " bye"]}[kind]
    parts = lines[0]["sentences"] if kind == "conversations" else [d["turns"][0] for d in lines]
    assert [t.decode(p["tokens"]) for p in parts] == texts
    if kind == "conversations":
        assert [p["frame"] for p in parts] == [6, 13, 30] and lines[0]["speak"]["frames"] == lines[0]["listen"]["frames"] == 38
    job = train.ModelJob(FLM, str(out / "encoded"), "cpu")
    layout = {"recorded": (1, 1)} if kind == "conversations" else {"tts": (1, 1), "asr": (1, 1)}
    loss, parts, _ = job.loss(train.Stage("one", 1, 2, 1e-3, 0, 48, layout), 0.0, "train", random.Random(0))
    loss.backward()
    assert torch.isfinite(loss) and parts["mono"] > 0
    with pytest.raises(ValueError, match="the data holds nothing for response_tts"):
        job.loss(train.Stage("one", 1, 2, 1e-3, 0, 48, {"response_tts": (1, 1)}), 0.0, "train", random.Random(0))


def test_a_recording_may_be_a_part_of_a_file(world, tmp_path):
    noise(tmp_path / "long.wav", 5.0, 16_000)
    (tmp_path / "manifest.jsonl").write_text(
        '{"audio": "long.wav", "start": 1.0, "end": 2.2, "text": "eins", "lang": "de", "annotated": false, "split": "train"}\n'
        '{"audio": "long.wav", "start": 2.2, "end": 3.0, "text": "zwei", "lang": "de", "split": "train"}\n')
    lines = [json.loads(line) for line in encode(tmp_path, world)["00000.jsonl"].splitlines()]
    assert [d["turns"][0]["copies"][0]["speech"] for d in lines] == [15, 10]
    assert [(d["annotated"], d["lang"]) for d in lines] == [(False, "de"), (True, "de")]
    job = train.ModelJob(FLM, str(tmp_path / "encoded"), "cpu")
    assert [len(s) for s in job.heard["train"]] == [len(s) for s in job.said["train"]] == [1, 1]


def test_annotated_recordings_are_used_more_in_post_training_2():
    a, b = STAGES["7b"][:2]
    assert a.sources == (1, 1) and b.sources == (0.5, 5)


@pytest.mark.parametrize("line, says", [
    ('{"audio": "x.wav", "text": "a", "start": 2, "end": 1}', "not a stretch of time"),
    ('{"audio": "x.wav"}', "needs the field 'text'"),
    ('{"audio": "x.wav", "sentences": [{"role": "model", "text": "a"}]}', "needs the field 'start'"),
    ('{"turns": [{"role": "model", "text": "a", "audio": "x.wav"}, {"role": "user", "text": "a", "audio": "x.wav"}]}', "take turns"),
    ('[]', "not an object"),
])
def test_lines_that_cannot_be_used(line, says, tmp_path):
    noise(tmp_path / "x.wav", 0.1, 8000)
    with pytest.raises(ValueError, match=says):
        prepare.check_line(line, 1, str(tmp_path))


def test_a_corpus_that_is_not_one(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"path": "gone.wav"}\n')
    for kind, source, says in (("librispeech", "empty", "nothing of librispeech"), ("ljspeech", "empty", "metadata.csv"),
                               ("conversations", "bad.jsonl", "bad.jsonl, line 1")):
        code, _, err = run("prepare.py", kind, tmp_path / source, "--out", tmp_path / "out")
        assert code == 1 and says in err.splitlines()[-1] and not (tmp_path / "out/manifest.jsonl").exists()


def test_training_refuses_codes_of_another_codec_or_tokeniser(world, tmp_path):
    codec = tmp_path / "codec.pt"
    shutil.copy(world / "codec.pt", codec)
    folder = small_world(world, tmp_path)
    prepare.encode(str(folder), str(codec), "bpe", 300, 1, False, 1, "cpu")
    where = str(folder / "encoded")
    assert len(train.read_encoded(where + "," + where)[1]) == 20
    with pytest.raises(ValueError, match="another tokenizer than .*toy/encoded"):
        train.read_encoded(str(world / "toy/encoded") + "," + where)
    codec.write_bytes(codec.read_bytes() + b" ")
    with pytest.raises(ValueError, match="another codec than .*codec.pt now is"):
        train.read_encoded(where)
    meta = json.loads((folder / "encoded/meta.json").read_text())
    for changed, says in (({**meta, "version": 1}, "is of version 1"), ({"version": prepare.VERSION}, "KeyError"), ([], "is not what")):
        (folder / "encoded/meta.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=says):
            train.read_encoded(where)


# ---------------------------------------------------------------------------------------------------------------------
# what a microphone hears


def test_decibels():
    assert prepare.decibels(torch.ones(10)) == pytest.approx(0, abs=1e-4)
    assert prepare.decibels(torch.full((10,), 0.1)) == pytest.approx(-20, abs=1e-3)
    assert prepare.decibels(torch.zeros(10)) == pytest.approx(-120)


def test_gain_is_what_it_promises():
    rng, x = random.Random(0), torch.randn(4800, generator=torch.Generator().manual_seed(0))
    loud = [prepare.decibels(prepare.change_gain(x * 0.5, rng)) - prepare.decibels(x * 0.5) for _ in range(300)]
    assert -24.1 < min(loud) < -22 and 18 < max(loud) < 20.1
    soft = [prepare.decibels(prepare.change_gain(x * 0.02, rng)) for _ in range(300)]  # from -34 dB
    assert min(soft) == pytest.approx(-40, abs=0.01) and sum(s < -39.9 for s in soft) > 60


@pytest.mark.parametrize("files", [False, True])
def test_noise_is_what_it_promises(files, tmp_path):
    rng = random.Random(0)
    noise(tmp_path / "a.wav", 4, 16_000)
    x = prepare.make_noise(60 * SAMPLE_RATE, [str(tmp_path / "a.wav")] if files else [], rng)
    level = torch.tensor([prepare.decibels(w) for w in x.split(2400)])  # of each 0.1 s
    assert 0.15 < (level < -119).float().mean() < 0.45  # silence
    heard = level[level > -119]
    assert heard.max() < -34 and heard.min() > -85 and heard.std() > 4  # short windows scatter around their segment
    whole = [prepare.decibels(prepare.make_noise(SAMPLE_RATE // 2, [], random.Random(i))) for i in range(100)]
    assert all(-72 < w < -38 for w in whole if w > -119)  # half a second, of segments up to three


def test_leakage_is_what_it_promises():
    said, gains, delays = torch.zeros(SAMPLE_RATE), [], []
    said[100] = 1.0
    for i in range(200):
        echo = prepare.leak(torch.zeros(SAMPLE_RATE), said, random.Random(i))
        delays.append((echo.argmax().item() - 100) / SAMPLE_RATE)
        gains.append(echo.max().item())
    assert 0 <= min(gains) < 0.01 and 0.19 < max(gains) <= 0.2
    assert 0.1 <= min(delays) < 0.11 and 0.49 < max(delays) <= 0.5


def test_a_hesitation_is_put_where_it_is_soft():
    x = torch.full((SAMPLE_RATE,), 0.1)
    x[12_000:12_960] = 0.001
    y = prepare.hesitate(x, random.Random(0))
    assert 0.4 * SAMPLE_RATE <= len(y) - len(x) <= 0.9 * SAMPLE_RATE
    assert torch.equal(torch.cat([y[:12_000], y[len(y) - 11_040:]]), torch.cat([x[:12_000], x[12_960:]]))
    assert y[12_480:12_000 + len(y) - len(x)].abs().max() <= 0.001


def test_conversations_with_free_user_input(tmp_path):
    """Each of the user's and the model's sounds is a constant, so the mix tells who speaks when."""
    for name, level, seconds in (("user", 0.1, 1.0), ("model", 0.3, 2.0), ("mhm", 0.01, 0.3)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(int(seconds * SAMPLE_RATE), level), SAMPLE_RATE, subtype="FLOAT")
    part = lambda name: {"path": str(tmp_path / f"{name}.wav"), "text": "a b c"}
    broken = 0
    for seed in range(40):
        rng = random.Random(seed)
        said, heard, sentences = prepare.converse([(part("user"), part("model"))] * 3, [part("mhm")], [], rng)
        assert len(said) == len(heard) and len(said) % FRAME == 0 and len(sentences) == 3 and "cut" not in sentences[-1]
        for s in sentences:
            a, b = round(s["start"] * SAMPLE_RATE), round(s["end"] * SAMPLE_RATE)
            assert a % FRAME == 0 and (said[a:b] > 0.29).all() and said[a - 1] == 0 and (b == len(said) or said[b] == 0)
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
    job = train.ModelJob(FLM, str(out / "encoded"), "cpu")
    loss, _, _ = job.loss(train.Stage("one", 1, 2, 1e-3, 0, 48, {"recorded": (1, 1)}), 0.0, "train", random.Random(0))
    assert torch.isfinite(loss)
    again = tmp_path / "again"
    prepare.mix(str(world / "toy"), str(again), 4, None, 1)
    assert (again / "manifest.jsonl").read_bytes() == (out / "manifest.jsonl").read_bytes()
    assert all((again / f"talks/00000{i}.flac").read_bytes() == (out / f"talks/00000{i}.flac").read_bytes() for i in range(4))
    code, _, err = run("prepare.py", "mix", "--data", world / "toy", "--out", tmp_path / "x", "--noise", tmp_path / "nowhere")
    assert code == 1 and "holds no file of noise" in err and not (tmp_path / "x").exists()
