"""Corpora laid out as they are downloaded: from their files to a model that is talked to."""
import dataclasses
import io
import json
import sys

import numpy as np
import pytest
import soundfile
import torch

import train
from conftest import CODEC, encode, noise, run
from corpora import mix
from corpora.readers import sentences_of
from files.audio import SAMPLE_RATE, write_audio
from files.checkpoint import load_checkpoint, save_checkpoint
from files.manifest import read_manifest
from files.tokenizer import load_tokenizer
from mimi import FRAME, Mimi
from streams import SPEAK, TEXT, Utterance, word_aligned
from test_prepare import corpus
from toy.script import make_toy
from toy.voices import Espeak, Style
from toy.world import KIND_PROPORTIONS

TALK = {"turns": [{"role": "user", "text": "who are you"}, {"role": "model", "text": "a small model"}]}
SIZE = ("--layers 1 --width 32 --heads 2 --kv-heads 2 --mlp 32 --depth-layers 1 --depth-width 16 "
        "--depth-heads 2")


def write_lines(path, lines):
    path.write_text("".join(json.dumps(d) + "\n" for d in lines))
    return path


def learn_and_talk(data, codec, tmp_path, config="small", frames=256):
    """encode, train a few steps, talk to the model over a file: (what train.py said, stages of the run)."""
    code, _, err = run("prepare.py", "encode", "--data", data, "--codec", codec, "--processes", 1)
    assert code == 0, err
    flags = f"{SIZE} --frames {frames} --context {frames} --batch 2 --micro-batch 0 --device cpu".split()
    code, said, err = run("train.py", "--config", config, "--data", data / "encoded", "--out", tmp_path / "o",
                          *flags, "--steps", 8)
    assert code == 0 and f"Wrote {tmp_path}/o/checkpoint.pt" in said, err
    noise(tmp_path / "user.wav", 1.0, 16_000)
    code, out, err = run("chat.py", "--checkpoint", tmp_path / "o", "--input", tmp_path / "user.wav",
                         "--after", 0.8, "--output", tmp_path / "reply.wav", "--device", "cpu")
    assert code == 0 and "Wrote" in out, err
    assert soundfile.info(tmp_path / "reply.wav").duration == pytest.approx(1.8)
    return said, [s["name"] for s in load_checkpoint(str(tmp_path / "o/checkpoint.pt"), "flm")["stages"]]


POST, FINE = ["post-training 1", "post-training 2"], ["fine-tuning 1", "fine-tuning 2"]


@pytest.mark.parametrize("kind, stages", [("librispeech", POST), ("ljspeech", POST),
                                          ("conversations", FINE[1:]), ("speak", ["language", *POST, *FINE]),
                                          ("transcribe", POST)])
def test_from_a_corpus_to_a_conversation(world, tmp_path, kind, stages):
    """Each serves some stages; the others are skipped, and the run says so."""
    if kind == "speak":
        source, more = write_lines(tmp_path / "talks.jsonl", [TALK] * 3), []
    elif kind == "transcribe":
        source, more = tmp_path / "wavs", ["--asr", "echo it is late {wav}"]
        for i in range(3):
            noise(source / f"{i}.wav", 0.5, 16_000)
    else:
        source, more = corpus(tmp_path / "download", kind), []
    code, said, err = run("prepare.py", kind, source, "--out", tmp_path / "data", *more)
    assert code == 0 and "next: python prepare.py encode" in said, err
    said, found = learn_and_talk(tmp_path / "data", world / "codec.pt", tmp_path)
    assert found == stages
    for name in {"language", *POST, *FINE} - {*stages}:
        assert f"\n{name}: skipped, as the data holds nothing for" in said
    who = {"librispeech": "person", "ljspeech": "person", "transcribe": "machine"}.get(kind)
    assert who is None or f"post-training 1: all clips were transcribed by a {who}" in said
    if kind != "conversations":  # these are not clips
        code, out, err = run("eval.py", "--checkpoint", tmp_path / "o", "--hear", tmp_path / "data",
                             "--split", "train", "--device", "cpu")
        assert code == 0 and "WER" in out, err


# ------------------------------------------------------------------------------------------------------------
# dialogues: several speakers, other voices, other languages


def synthesiser(tmp_path):
    """A command that notes which voice said what, and writes a second of noise."""
    script = ("import sys, numpy, soundfile\ntext, voice, out = sys.argv[1:]\n"
              f"open({str(tmp_path / 'said.txt')!r}, 'a').write(f'{{voice}}: {{text}}\\n')\n"
              "soundfile.write(out, numpy.random.default_rng(0).normal(size=8000) * 0.1, 16000)\n")
    (tmp_path / "tts.py").write_text(script)
    return f"{sys.executable} {tmp_path / 'tts.py'} {{text}} {{voice}} {{out}}"


def said_by(tmp_path):
    lines = (tmp_path / "said.txt").read_text().splitlines()
    return {text: voice for voice, text in (line.split(": ") for line in lines)}


def test_several_speakers_have_several_voices(tmp_path):
    """Each keeps its own throughout a dialogue; a turn may say its voice."""
    (tmp_path / "voices.txt").write_text("anna\nbert\n\ncarl\ndora\n")
    turn = lambda text, **more: {"role": "user", "text": text, **more}
    answer = lambda text: {"role": "model", "text": text}
    lines = [{"turns": [turn("one", speaker="mum"), answer("yes"), turn("two", speaker="dad"),
                        answer("no"), turn("three", speaker="mum"), answer("well"),
                        turn("four", voice="zoe"), answer("bye")]},
             {"lang": "sw", "turns": [turn("five"), answer("so"), turn("six"), answer("then")]}]
    write_lines(tmp_path / "talks.jsonl", lines)
    code, _, err = run("prepare.py", "speak", tmp_path / "talks.jsonl", "--out", tmp_path / "data", "--tts",
                       synthesiser(tmp_path), "--tts-voices", tmp_path / "voices.txt")
    assert code == 0, err
    voice = said_by(tmp_path)
    assert {voice[text] for text in ("yes", "no", "well", "bye", "so", "then")} == {"anna"}
    assert voice["one"] == voice["three"] != voice["two"] and voice["four"] == "zoe"
    assert voice["five"] == voice["six"]
    assert {voice["one"], voice["two"], voice["five"]} <= {"bert", "carl", "dora"}
    lines = list(read_manifest(str(tmp_path / "data/manifest.jsonl")))
    assert lines[1]["lang"] == "sw" and [t["voice"] for t in lines[0]["turns"]][6] == "zoe"


@pytest.mark.parametrize("change, more, says", [
    ({"lang": "sw"}, [], "lang 'sw' needs another synthesiser"), ({}, ["one"], "needs two voices or more"),
    ({"turns": [{**t, "speaker": i} for i in range(3) for t in TALK["turns"]]}, ["one", "two", "three"],
     "has 3 speakers, more than the 2 user voices")])
def test_voices_that_are_missing(tmp_path, change, more, says):
    write_lines(tmp_path / "talks.jsonl", [TALK | change])
    (tmp_path / "voices.txt").write_text("\n".join(more))
    flags = ["--tts-voices", tmp_path / "voices.txt", "--tts", synthesiser(tmp_path)] if more else []
    code, _, err = run("prepare.py", "speak", tmp_path / "talks.jsonl", "--out", tmp_path / "data", *flags)
    assert code == 1 and says in err.splitlines()[-1] and not (tmp_path / "data").exists()


# ------------------------------------------------------------------------------------------------------------
# conversations: when each word is spoken


def test_words_keep_their_times():
    """One for each word as a text is split; in order, even if the corpus is not."""
    me, you = "SPEAKER_MAIN", "SPEAKER_OTHER"
    words = [("Hi", 0.5, 0.8, me), ("New York.", 0.8, 1.0, me), ("Oh", 1.2, 1.4, you), ("so", 1.5, 1.6, me),
             ("late", 1.45, 1.7, me), ("你", 5.0, 5.1, me), ("好", 5.1, 5.2, me)]
    found = [(s["text"], s["starts"]) for s in sentences_of(words) if s["role"] == "model"]
    assert found == [("Hi New York.", [0.5, 0.8, 0.8]), ("so late", [1.5, 1.5]), ("你好", [5.0])]


def test_a_word_aligned_layout_can_be_made_of_conversations(world, tmp_path):
    """Each token stands in the frame in which its word is spoken."""
    code, _, err = run("prepare.py", "conversations", corpus(tmp_path / "download", "conversations"),
                       "--out", tmp_path / "data")
    assert code == 0, err
    encode(tmp_path / "data", world)
    data = train.Conversations(str(tmp_path / "data/encoded"))
    line, v = data.line(0), data.vocab
    tokenizer = load_tokenizer(str(tmp_path / "data/encoded/tokenizer.json"))
    said, spoken = line["sentences"][0], data.codes(line["speak"])
    assert said["starts"][0] == said["frame"] == 6 and len(said["starts"]) == len(said["tokens"])
    starts = [start - said["frame"] for start in said["starts"]]
    model = Utterance(said["tokens"], spoken[said["frame"]:], 20, starts)
    user = Utterance([1], data.codes(line["listen"])[:5], 5)
    grid = word_aligned([(user, model)], [0], v)
    first = 5 + 2  # the audio starts two frames after the user's end
    assert (grid[SPEAK, first] == spoken[6]).all()
    word = [t for t, text in enumerate(grid[TEXT]) if text != v.wait and t >= first + int((0.8 - 0.5) * 12.5)]
    assert tokenizer.decode(grid[TEXT, word].tolist()) == " you." and word[0] == first + 0.8 * 12.5 - 6


# ------------------------------------------------------------------------------------------------------------
# mixing keeps what the model says while a story is told


def test_interjections_are_mixed(tmp_path):
    """On a frame, at the second that the manifest says, each a sentence of its own."""
    for name, level, seconds in (("story", 0.1, 6), ("reply", 0.3, 1), ("mhm", 0.2, 0.3)):
        write_audio(str(tmp_path / f"{name}.flac"), np.full(int(seconds * SAMPLE_RATE), level, np.float32))
    line = {"turns": [{"role": "user", "text": "listen", "audio": "story.flac"},
                      {"role": "model", "text": "nice", "audio": "reply.flac"}],
            "interjections": [{"text": "mhm", "audio": "mhm.flac", "at": 1.5},
                              {"text": "mhm", "audio": "mhm.flac", "at": 4.0}], "split": "train"}
    write_lines(tmp_path / "manifest.jsonl", [line] * 2)
    code, _, err = run("prepare.py", "mix", "--data", tmp_path, "--out", tmp_path / "out",
                       "--conversations", 6)
    assert code == 0, err
    for d in read_manifest(str(tmp_path / "out/manifest.jsonl")):
        speak, _ = soundfile.read(d["path"])[0].T
        stories = [s for s in d["sentences"] if s["text"] == "nice"]
        interjected = [s for s in d["sentences"] if s["text"] == "mhm"]
        assert len(interjected) == 2 * len(stories) and d["sentences"] == sorted(d["sentences"],
                                                                                 key=lambda s: s["start"])
        for s in interjected:
            a, b = (round(s[x] * SAMPLE_RATE) for x in ("start", "end"))
            assert a % FRAME == 0 and np.allclose(speak[a:b], 0.2, atol=1e-3) and speak[a - 1] == 0
        for first, second, reply in zip(interjected[::2], interjected[1::2], stories):
            assert second["start"] - first["start"] == pytest.approx(2.5, abs=0.08)
            assert 1.9 < reply["start"] - second["start"] < 2.4


def test_a_world_with_stories_is_mixed(tmp_path, monkeypatch):
    monkeypatch.setitem(KIND_PROPORTIONS, "story", 10.0)
    make_toy(str(tmp_path / "toy"), "en", items=6, tests=1, sentences=4, voices=4, seed=1, tts=None)
    mix.mix(str(tmp_path / "toy"), str(tmp_path / "mixed"), 8, None, 1)
    lines = list(read_manifest(str(tmp_path / "mixed/manifest.jsonl")))
    assert any(s["text"] == "mhm" for d in lines for s in d["sentences"])


# ------------------------------------------------------------------------------------------------------------
# answers that are codes already


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """One of the shape of Kyutai's, untrained."""
    torch.manual_seed(0)
    config = dataclasses.replace(CODEC, codebook_size=2048)
    path = tmp_path_factory.mktemp("codec") / "codec.pt"
    save_checkpoint(str(path), "codec", config, model=Mimi(config).state_dict())
    return path


def spoken(text):
    return Espeak().speak(text, "en-us", Style())


def sound_file(text, format="WAV"):
    file = io.BytesIO()
    soundfile.write(file, spoken(text), SAMPLE_RATE, format=format)
    return file.getvalue()


def codes_of(text, codec):
    """8 codes a frame, one frame after another."""
    wav = torch.from_numpy(spoken(text))
    wav = torch.nn.functional.pad(wav, (0, -len(wav) % FRAME))
    return Mimi.load(str(codec)).encode(wav[None, None])[0].T.flatten().tolist()


def write_parquet(path, rows):
    """Rows [(texts, questions, answers), ...] as MiniMind-O has them."""
    pyarrow = pytest.importorskip("pyarrow", reason="pip install '.[parquet]'")
    from pyarrow.parquet import write_table
    chat = lambda texts: json.dumps([{"role": ("user", "assistant")[i % 2], "content": text}
                                     for i, text in enumerate(texts)])
    columns = {"conversations": [chat(texts) for texts, *_ in rows],
               "question_audios": pyarrow.array([q for _, q, _ in rows], pyarrow.list_(pyarrow.binary())),
               "answer_audios": pyarrow.array([a for *_, a in rows],
                                              pyarrow.list_(pyarrow.list_(pyarrow.int64())))}
    write_table(pyarrow.table(columns), path)
    return path


def test_from_minimind_to_a_conversation(codec, tmp_path):
    ask, say = sound_file("who are you"), codes_of("a small model", codec)
    once, twice = ["who are you", "a small model"], ["who are you", "a small model", "really", "yes"]
    rows = [(["who are you", "<think>\n\n</think>\n\na small model"], [ask], [say]),
            (twice, [ask, sound_file("really", "FLAC")], [say, say]),
            (twice, [ask], [say, say]),  # the second question is not spoken
            (once, [], [say + [2050] * 8]),  # a written question; the answer's end is marked
            (once, [ask], []), (["alone"], [ask], []), *[(once, [ask], [say])] * 3]
    source = write_parquet(tmp_path / "sft.parquet", rows)
    code, out, err = run("prepare.py", "minimind", source, "--out", tmp_path / "mm")
    assert code == 0 and "Wrote 7 lines" in out, err
    assert "1 rows are left out: nothing spoken" in out and "1 rows are left out: user and assistant" in out
    lines = list(read_manifest(str(tmp_path / "mm/manifest.jsonl")))
    assert [len(d["turns"]) for d in lines] == [2, 4, 2, 1, 2, 2, 2]
    assert [t["text"] for t in lines[1]["turns"]] == ["who are you", "a small model", "really", "yes"]
    assert lines[0]["turns"][1]["text"] == "a small model" and lines[3]["turns"][0]["role"] == "model"
    assert lines[1]["turns"][2]["audio"].endswith(".flac")
    stages = learn_and_talk(tmp_path / "mm", codec, tmp_path)[1]
    assert stages == ["language", *POST, *FINE]
    data = train.Conversations(str(tmp_path / "mm/encoded"))  # the codes are those of the parquet file
    for i, turn in ((0, 1), (1, 3), (3, 0)):
        place, = data.line(i)["turns"][turn]["copies"]
        assert data.codes(place).flatten().tolist() == say and place["speech"] == len(say) // 8


def test_codes_need_the_codec_that_they_are_of(world, codec, tmp_path):
    """And may be nothing else."""
    np.save(tmp_path / "a.npy", np.zeros((5, 8), np.int16))
    manifest = tmp_path / "manifest.jsonl"
    write_lines(manifest, [{"codes": "a.npy", "text": "a", "split": "train"}])
    code, _, err = run("prepare.py", "encode", "--data", tmp_path, "--codec", world / "codec.pt")
    assert code == 1 and "manifest.jsonl: holds codes of Kyutai's Mimi (8 x 2048)" in err.splitlines()[-1]
    assert "not one of 8 x 32" in err and not (tmp_path / "encoded").exists()
    encoding = ["prepare.py", "encode", "--data", tmp_path, "--codec", codec, "--processes", 1]
    assert run(*encoding)[0] == 0
    for bad in (np.zeros((5, 7), np.int16), np.full((5, 8), 2048), np.zeros((5, 8)), np.zeros((0, 8), int),
                np.array([{"a": 1}]), b"text"):
        path = tmp_path / "a.npy"
        path.write_bytes(bad) if isinstance(bad, bytes) else np.save(path, bad, allow_pickle=True)
        manifest.write_text(manifest.read_text().replace('"a"', '"b"'))
        code, _, err = run(*encoding)
        assert code == 1 and "a.npy: " in err.splitlines()[-1] and "codes" in err.splitlines()[-1], bad
    write_lines(manifest, [{"codes": "a.npy", "audio": "a.wav", "text": "a"}])
    code, _, err = run(*encoding)
    assert code == 1 and "has codes or audio" in err
    write_lines(manifest, [{"turns": [{"role": "user", "codes": "a.npy", "text": "a"},
                                      {"role": "model", "codes": "a.npy", "text": "a"}], "split": "train"}])
    code, _, err = run("prepare.py", "mix", "--data", tmp_path, "--out", tmp_path / "mixed")
    assert code == 1 and "holds codes instead of audio, which cannot be mixed" in err


@pytest.mark.parametrize("what, says", [("missing", "no such file"), ("text", "not a .parquet file"),
                                        ("columns", "is not of MiniMind-O"), ("empty", "holds no row"),
                                        ("silent", "holds nothing that is spoken"),
                                        ("json", "row 0: JSONDecodeError")])
def test_files_that_are_not_minimind(tmp_path, what, says):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install '.[parquet]'")
    from pyarrow.parquet import write_table
    source = tmp_path / "x.parquet"
    if what == "text":
        source.write_text("hello")
    elif what == "columns":
        write_table(pyarrow.table({"conversations": ["[]"]}), source)
    elif what == "json":
        write_table(pyarrow.table({"conversations": ["{"], "answer_audios": [[[1] * 8]]}), source)
    elif what != "missing":
        write_parquet(source, [(["a", "b"], [b"no sound"], [])] * (what == "silent"))
    code, _, err = run("prepare.py", "minimind", source, "--out", tmp_path / "mm")
    assert code == 1 and says in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "mm").exists()


def test_parquet_needs_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = run("prepare.py", "minimind", tmp_path / "x.parquet", "--out", tmp_path / "mm")
    assert code == 1 and "pip install '.[parquet]'" in err
