"""The toy world, the manifest, and sound -> codes."""
import json
import os
import random
import sys
import unicodedata

import numpy as np
import pytest
import soundfile
import torch

import prepare
from conftest import run
from mimi import FRAME, Mimi, read_audio
from prepare import (HELD_OUT_PAIRS, MODEL_VOICE, NEW_VOICES, NUMBERS, OPPOSITES, WORDS, Espeak, held_out_triple, make_request,
                     make_sentence, on_frames, read_manifest, train_bpe, user_voices)
from streams import make_tokenizer


def manifest(world):
    return [json.loads(line) for line in open(world / "toy/manifest.jsonl")]


def test_some_thirty_words():
    assert len(WORDS) == len(set(WORDS)) == 30
    assert all(OPPOSITES[OPPOSITES[w]] == w for w in OPPOSITES)


@pytest.mark.parametrize("kind", prepare.SHARES)
def test_answers_are_right_and_tests_are_held_out(kind):
    rng = random.Random(0)
    train = {make_request(kind, False, rng) for _ in range(400)}
    test = {make_request(kind, True, rng) for _ in range(400)}
    for request, answer in train | test:
        words = request.split()
        if kind == "repeat":
            assert words[1:] == answer.split() and len(words) == 4
        elif kind == "count":
            a, b = NUMBERS.index(words[2]), NUMBERS.index(words[4])
            assert answer.split() == (NUMBERS[a:b + 1] if a < b else NUMBERS[b:a + 1][::-1]) and a != b
        elif kind == "next":
            assert NUMBERS.index(answer) == NUMBERS.index(words[-1]) + 1
        else:
            assert OPPOSITES[words[-1]] == answer
    if kind in ("repeat", "count"):
        assert not train & test
    if kind == "repeat":
        assert all(held_out_triple(a.split()) for _, a in test) and not any(held_out_triple(a.split()) for _, a in train)
    if kind == "count":
        assert {frozenset((a.split()[0], a.split()[-1])) for _, a in test} <= HELD_OUT_PAIRS


def test_sentences_hold_nothing_that_is_held_out():
    rng = random.Random(0)
    assert len(HELD_OUT_PAIRS) == 12 and all(sum(w in p for p in HELD_OUT_PAIRS) == 2 for w in NUMBERS)
    for _ in range(500):
        words = make_sentence(WORDS, rng).split()
        assert not any(held_out_triple(words[i:i + 3]) for i in range(len(words) - 2))
        assert not any(set(p) <= set(words) for p in HELD_OUT_PAIRS)


def test_voices_held_out_are_never_trained_on(world):
    for d in manifest(world):
        for voice in [t["voice"] for t in d["turns"] if t["role"] == "user"]:
            assert (voice in NEW_VOICES) == (d["split"] == "new") and voice != MODEL_VOICE
    assert not set(user_voices(1000, 1)) & {*NEW_VOICES, MODEL_VOICE}


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    out = str(tmp_path / "again")
    prepare.make_toy(out, items=24, tests=8, sentences=40, voices=6, seed=1, tts=None)
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
    assert "Wrote 13 lines" in out.splitlines()[-1]


@pytest.mark.parametrize("tts, message", [("say {text}", "{out}"), ("false {text} {out}", "failed")])
def test_a_synthesiser_that_does_not_work_leaves_nothing(tmp_path, tts, message):
    code, _, err = run("prepare.py", "toy", "--out", tmp_path / "toy", "--items", 4, "--tests", 2, "--sentences", 4, "--tts", tts)
    assert code == 1 and message in err.splitlines()[-1] and not (tmp_path / "toy").exists()


def test_an_existing_world_is_not_overwritten(world):
    code, _, err = run("prepare.py", "toy", "--out", world / "toy")
    assert code == 1 and "is there already" in err


def test_bpe_makes_words_whole_and_text_round_trips():
    ranks = train_bpe([" repeat cat red moon"] * 3 + [" opposite of red"], 400)
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
    saved = prepare.get_tokenizer(name if "." not in name else publish(tmp_path, name), TEXTS[:2], 300)
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
    ours = make_tokenizer(**prepare.get_tokenizer(publish(tmp_path, name), [], 0))
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
        prepare.get_tokenizer(str(tmp_path), [], 0)


def test_codes_are_those_of_a_live_stream(world):
    """A turn's stored codes are what the codec gives when the sound comes after silence, frame by frame."""
    codec = Mimi.load(str(world / "codec.pt"))
    codes = np.load(world / "toy/encoded/codes.npy")
    for line in list(open(world / "toy/encoded/dialogues.jsonl"))[-6:]:
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
    for line in open(world / "toy/encoded/dialogues.jsonl"):
        model = json.loads(line)["turns"][-1]
        if model["role"] == "user":
            continue
        assert len(model["starts"]) == len(model["tokens"]) and model["starts"][0] == 0
        assert model["starts"] == sorted(model["starts"]) and model["starts"][-1] < model["copies"][0]["speech"]


def test_a_word_that_begins_on_a_frame_belongs_to_it():
    t = make_tokenizer(train_bpe([" a"], 400), prepare.PATTERN)
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
        read_manifest(str(folder / "manifest.jsonl"))
    assert [d["id"] for d in read_manifest(str(folder / "manifest.jsonl"), skip_broken=True)] == [0, 2]
    assert "line 2" in capsys.readouterr().err
    code, out, err = run("prepare.py", "encode", "--data", folder, "--codec", world / "codec.pt")
    assert code == 1 and "line 2" in err.splitlines()[-1] and not (folder / "encoded").exists()
    code, out, err = run("prepare.py", "encode", "--data", folder, "--codec", world / "codec.pt", "--skip-broken")
    assert code == 0 and "of 2 dialogues" in out


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
