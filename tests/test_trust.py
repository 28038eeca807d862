"""Hostile and damaged inputs: bombs, lies and half files; commands in templates; what the fuzzer finds."""
import io
import json
import os
import random
import shutil
import sys
import time
import zipfile
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile
import torch

import fuzz
import train
from chat import DuplexModel
from conftest import CODEC, FLM, run
from corpora.dialogues import read_dialogues
from corpora.readers import ljspeech
from corpora.transcribe import AsrCommand
from evals.conversations import read_conversations
from evals.testsets import read_questions
from files.atomic import replace_when_done
from files.audio import SAMPLE_RATE, read_audio, read_blocks, regroup, write_audio
from files.checkpoint import load_checkpoint, save_checkpoint
from files.command import Command
from files.manifest import read_manifest
from files.tokenizer import QWEN_PATTERN, load_tokenizer, make_tokenizer
from mimi import FRAME, Mimi
from toy.voices import Several, SpeakingCommand, Style


def is_clean(found):
    return {name: (f["tracebacks"], f["hangs"]) for name, f in found.items()} == dict.fromkeys(found, (0, 0))


def readers():
    """Those whose extras are installed."""
    needs = {"safetensors": ("release", "mimi", "packed"), "aiohttp": ("web",)}
    missing = {name for extra, names in needs.items() for name in names if not find_spec(extra)}
    return [name for name in fuzz.READERS if name not in missing]


def test_a_few_damaged_inputs_for_every_reader():
    pytest.importorskip("safetensors")
    lines = []
    found = fuzz.table(6, 1, readers(), show=lines.append)
    assert len(found) >= 10 and is_clean(found), "\n".join(lines)
    assert all(f["read"] + f["refused"] == 6 for f in found.values())
    assert sum(f["refused"] for f in found.values()) > 20 and sum(f["read"] for f in found.values()) > 5


def test_what_is_not_damaged_is_read_by_every_reader(monkeypatch, tmp_path):
    """Otherwise what the readers refuse means nothing."""
    pytest.importorskip("safetensors")
    for name in ("bytes", "json", "lines", "checkpoint", "safetensors"):
        monkeypatch.setattr(fuzz, f"mutate_{name}", lambda data, rng: data)
    fuzz.make_world(str(tmp_path / "world"))
    for name in set(readers()) - {"web"}:
        for i in (0, 1, 3):  # number 2 for the release has an index that names another folder
            (tmp_path / f"{name}{i}").mkdir()
            fuzz.READERS[name](str(tmp_path / "world"), str(tmp_path / f"{name}{i}"), random.Random(i))


@pytest.mark.slow
def test_two_thousand_damaged_inputs_for_every_reader():
    pytest.importorskip("safetensors")
    found = fuzz.table(2000, 7, readers(), show=lambda line: print(line, file=sys.stderr))
    assert is_clean(found) and max(f["memory"] for f in found.values()) < 500


def test_the_fuzzer_sees_tracebacks_crashes_and_hangs(monkeypatch, tmp_path):
    """Otherwise its zeros mean nothing."""
    def broken(world, work, rng):
        what = rng.choice(("good", "refused", "two lines", "bug", "crash", "hang"))
        if what == "crash":
            os.abort()
        elif what == "hang":
            time.sleep(100)
        elif what == "bug":
            raise KeyError("bug")
        elif what != "good":
            raise ValueError("no" if what == "refused" else "a\nb")
    monkeypatch.setitem(fuzz.READERS, "broken", broken)
    found, wrong = fuzz.fuzz("broken", str(tmp_path), 3, 0, 25, 1.0)
    assert sum(found[k] for k in ("read", "refused", "tracebacks", "hangs")) == 25 == \
        found["read"] + found["refused"] + len(wrong)
    for sign in ("KeyError: \"'bug'\"", "several lines", "ended with -6", "took over 1 s"):
        assert any(sign in line for line in wrong), (sign, wrong)


# ------------------------------------------------------------------------------------------------------------
# checkpoints, configs, tokenisers


def with_pickle(source, target, pickle, kind=zipfile.ZIP_STORED):
    """A copy of a checkpoint with another pickle in it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind) as new:
        for part in old.namelist():
            new.writestr(part, pickle if part.endswith(".pkl") and pickle is not None else old.read(part))


@pytest.mark.parametrize("pickle", fuzz.BOMBS)
def test_bombs_in_a_checkpoint_are_refused_before_they_take_memory(world, tmp_path, pickle):
    with_pickle(world / "flm/checkpoint.pt", tmp_path / "bad.pt", pickle)
    with pytest.raises(ValueError, match="bad.pt: (not a checkpoint|is not a flm checkpoint)"):
        load_checkpoint(str(tmp_path / "bad.pt"), "flm")
    assert not os.path.exists("trueq")


def test_a_compressed_checkpoint_and_one_with_a_flipped_bit_are_refused(world, tmp_path):
    with_pickle(world / "flm/checkpoint.pt", tmp_path / "bad.pt", None, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="larger than the file"):
        load_checkpoint(str(tmp_path / "bad.pt"), "flm")
    data = bytearray((world / "flm/checkpoint.pt").read_bytes())
    weights = torch.load(world / "flm/checkpoint.pt", weights_only=True)["model"]["head.weight"]
    data[data.index(weights.numpy().tobytes()) + 100] ^= 16
    (tmp_path / "bad.pt").write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(str(tmp_path / "bad.pt"), "flm", mmap=True)


def change_checkpoint(world, tmp_path, change, name="checkpoint.pt"):
    folder = shutil.copytree(world / "flm", tmp_path / "flm")
    saved = torch.load(folder / name, weights_only=True)
    change(saved)
    torch.save(saved, folder / name)
    return str(folder)


def huge(saved):
    for name, x in saved["model"].items():
        saved["model"][name] = x.flatten()[:1].expand(x.shape)
    saved["config"]["vocab_size"] = 1 << 20
    for name in ("text.weight", "head.weight"):
        saved["model"][name] = torch.zeros(1).expand(1 << 20, saved["config"]["width"])


@pytest.mark.parametrize("change, says", [
    (lambda s: s["config"].update(layers=10 ** 6), "'layers' is a whole number from 0 to 512, not 1000000"),
    (lambda s: s["config"].update(context=1 << 40), "'context' is a whole number"),
    (lambda s: s["config"].update(heads=0), "'heads' is a whole number from 1"),
    (lambda s: s["config"].update(width=True), "'width' is a whole number"),
    (lambda s: s["config"].update(rope_base=float("nan")), "'rope_base' is a number"),
    (lambda s: s["config"].update(mlp=[[1]] * 1000), "'mlp' is a whole number"),
    (lambda s: s["config"].update(mlp=1 << 16), "its tensors are not those of its config"),
    (lambda s: s["vocab"].update(wait=10 ** 6), "vocabulary is not that of its config"),
    (lambda s: s["vocab"].update(silence=[[0] * 7]), "silence is no frames of 8 codes"),
    (lambda s: s["vocab"].update(silence=[]), "silence is no frames of 8 codes"),
    (lambda s: s.pop("vocab"), "holds no vocab"),
    (lambda s: s.update(model=[]), "holds no model"),
    (lambda s: s["model"].update({"norm.weight": s["model"]["norm.weight"].long()}), "norm.weight is"),
    (lambda s: s["model"].update({"norm.weight": s["model"]["norm.weight"] * float("nan")}), "NaN"),
    (huge, "its tensors are larger than the file")])
def test_a_checkpoint_that_lies_is_one_clear_error(world, tmp_path, change, says):
    folder = change_checkpoint(world, tmp_path, change)
    with pytest.raises(ValueError, match=says) as error:
        DuplexModel.load(folder)
    said = str(error.value)
    assert "checkpoint.pt" in said and "\n" not in said and len(said) < 500


@pytest.mark.parametrize("change", [
    lambda s: s.pop("config"), lambda s: s["progress"].pop("num_steps"),
    lambda s: s["progress"].update(num_steps=7), lambda s: s["progress"].update(stage=7),
    lambda s: s.update(progress=[]), lambda s: s.update(stages=[[]]), lambda s: s.update(seed="x" * 5000),
    lambda s: s["stages"][0].update(name="x" * 5000), lambda s: s.update(optimizer=[]),
    lambda s: s["optimizer"]["state"].update({999: {}}), lambda s: s["optimizer"]["state"].update({0: [1]})])
def test_a_training_that_lies_does_not_go_on(world, tmp_path, change):
    folder = change_checkpoint(world, tmp_path, change)
    task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    stage = train.Stage("once", 2, 2, 1e-3, 0, 48, {"response_tts": (1, 1)})
    with pytest.raises(ValueError, match="checkpoint.pt: |its checkpoint is damaged") as error:
        train.train(task, [stage], folder, resume=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_what_is_told_of_a_file_is_one_line(world, tmp_path):
    pytest.importorskip("safetensors")
    header = b'{"x": {"dtype": "a\\nb", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    saved = torch.load(world / "codec.pt", weights_only=True)
    torch.save(saved | {"config": saved["config"] | {"frontend": "a\nb"}}, tmp_path / "a.pt")
    torch.save(saved | {"config": saved["config"] | {"x" * 5000: 1}}, tmp_path / "b.pt")
    torch.save(saved | {"model": saved["model"] | {"a\nb" * 1000: torch.zeros(1)}}, tmp_path / "c.pt")
    for name, says in (("x.safetensors", "not a safetensors file"), ("a.pt", "'frontend' is seanet or"),
                       ("b.pt", "unknown or missing keys"), ("c.pt", "its tensors are not those")):
        with pytest.raises(ValueError, match=says) as error:
            Mimi.load(str(tmp_path / name))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["checkpoint.pt", "codec.pt"])
def test_a_context_that_only_takes_memory_is_refused(world, tmp_path, monkeypatch, name):
    folder = change_checkpoint(world, tmp_path, lambda s: s["config"].update(context=1 << 16), name)
    DuplexModel.load(folder)
    monkeypatch.setattr("files.checkpoint.CACHE", 1 << 20)
    with pytest.raises(ValueError, match=f"{name}: a conversation would take more memory"):
        DuplexModel.load(folder)


def test_parts_of_several_models_are_told_apart(world, tmp_path):
    folder = shutil.copytree(world / "flm", tmp_path / "flm")
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["specials"] = ["<more>"]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="the tokeniser has .* it is another model's"):
        DuplexModel.load(str(folder))
    shutil.copy(world / "flm/tokenizer.json", folder)
    other = replace(CODEC, codebook_size=64)
    save_checkpoint(str(folder / "codec.pt"), "codec", other, model=Mimi(other).state_dict())
    with pytest.raises(ValueError, match="its codec has 8 of 64: it is another model's"):
        DuplexModel.load(str(folder))


@pytest.mark.parametrize("change, says", [
    (lambda s: s.update(pattern="(?:(?:a|aa)+|\\s+(?!\\S))+X"), "cannot be trusted"),
    (lambda s: s.update(pattern="(?<=a)b"), "cannot be trusted"),
    (lambda s: s.update(pattern="(a)\\1"), "cannot be trusted"),
    (lambda s: s.update(pattern="("), "not a tokeniser"),
    (lambda s: s.update(pattern="a*"), "cannot split"),
    (lambda s: s.update(specials=["<wait>"]), "special tokens"),
    (lambda s: s.update(specials=[""]), "special tokens"),
    (lambda s: s["ranks"].update({"AAA=": "0"}), "ranks"),
    (lambda s: s["ranks"].update({"AAA=": True}), "ranks"),
    (lambda s: s["ranks"].popitem(), "."),
    (lambda s: s.clear(), "needs the field 'ranks'")])
def test_a_tokeniser_that_lies_is_one_clear_error(world, tmp_path, change, says):
    saved = json.loads((world / "flm/tokenizer.json").read_text())
    change(saved)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(saved))
    if says == ".":  # one token fewer is a tokeniser still
        return load_tokenizer(str(path))
    with pytest.raises(ValueError, match=says) as error:
        load_tokenizer(str(path))
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        load_tokenizer(str(path))


def test_published_patterns_are_trusted():
    ranks = {bytes([b]): b for b in range(256)}
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for pattern in (QWEN_PATTERN, gpt2):
        assert make_tokenizer(ranks, pattern).encode_ordinary("a b") == [97, 32, 98]


# ------------------------------------------------------------------------------------------------------------
# sounds


@pytest.mark.parametrize("ending, kind", [
    ("wav", None), ("ogg", None), ("aiff", None), ("au", None), ("w64", None), ("rf64", None), ("flac", None),
    ("mp3", None)])
def test_half_a_file_is_told_and_a_whole_one_is_read(tmp_path, ending, kind):
    x, path = np.random.default_rng(0).normal(size=(50_000, 2)) * 0.1, tmp_path / f"x.{ending}"
    soundfile.write(path, x, 16_000, format=ending.upper(), subtype=kind)
    assert read_audio(str(path), mono=False).shape == (2, 75_000)
    data = path.read_bytes()
    for n in (len(data) // 2, len(data) - 500):
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match=f"x.{ending}: (cut off|not an audio file)"):
            read_audio(str(path))


def test_telephone_recordings_are_read_and_bare_samples_are_explained(tmp_path):
    x = np.sin(np.arange(16_000) / 20) * 0.3
    soundfile.write(tmp_path / "gsm.wav", x, 8000, subtype="GSM610")
    path = str(tmp_path / "gsm.wav")
    whole, part = read_audio(path), read_audio(path, start=0.5, end=1.0)
    assert abs(len(whole) - 48_000) < 1000 and len(part) == 12_000
    assert (part - whole[12_000:24_000])[600:-600].abs().max() < 1e-3
    (tmp_path / "x.raw").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="x.raw: bare samples"):
        read_audio(str(tmp_path / "x.raw"))


@pytest.mark.parametrize("rate", [8000, 24_000, 44_100, 44_101])
def test_blocks_together_are_the_whole(tmp_path, monkeypatch, rate):
    x, path = np.random.default_rng(0).normal(size=(30_000, 2)) * 0.1, str(tmp_path / "x.wav")
    soundfile.write(path, x, rate)
    whole = read_audio(path, mono=False)
    monkeypatch.setattr("files.audio.BLOCK", 2 * 1234)
    blocks = list(read_blocks(path, mono=False))
    assert len(blocks) > 20 and torch.allclose(torch.cat(blocks, 1), whole, atol=1e-6)
    pieces = list(regroup(blocks, FRAME))
    assert {p.shape[1] for p in pieces[:-1]} == {FRAME}
    assert torch.equal(torch.cat(pieces, 1), torch.cat(blocks, 1))


def test_hours_of_silence_in_a_small_file_take_no_memory(tmp_path):
    path = str(tmp_path / "long.flac")
    with soundfile.SoundFile(path, "w", 8000, 1) as f:
        for _ in range(61):
            f.write(np.zeros(8000 * 60, np.int16))
    with pytest.raises(ValueError, match="1.0 hours, 1 channels: too much at once"):
        read_audio(path)
    sizes = [x.shape[1] for x in read_blocks(path)]
    assert sum(sizes) == 3660 * SAMPLE_RATE and max(sizes) < 2 ** 23


def test_a_reply_to_a_file_is_that_of_one_piece(world, tmp_path):
    """chat.py reads, talks and writes frame by frame."""
    x = np.random.default_rng(0).normal(size=30_001) * 0.1
    soundfile.write(tmp_path / "in.wav", x, SAMPLE_RATE)
    code, out, err = run("chat.py", "--checkpoint", world / "flm", "--input", tmp_path / "in.wav",
                         "--after", 0, "--output", tmp_path / "out.wav", "--stereo")
    assert code == 0, err
    heard = read_audio(str(tmp_path / "in.wav"))
    _, said = DuplexModel.load(str(world / "flm")).converse(heard[None])
    written = read_audio(str(tmp_path / "out.wav"), mono=False)
    assert written.shape == (2, 30_001) and torch.allclose(written, torch.stack([heard, said[0]]), atol=1e-4)


def test_what_killed_processes_left_is_removed(tmp_path):
    old, new = (tmp_path / f"x.pt.{c * 16}.tmp" for c in "0a")
    other = tmp_path / f"y.pt.{'0' * 16}.tmp"
    for path in (old, new, other, tmp_path / "x.pt.mine.tmp"):
        path.write_text("half")
        os.utime(path, (0, 0))
    os.utime(new)  # another process may write to it now
    with replace_when_done(str(tmp_path / "x.pt")) as temporary, open(temporary, "w") as f:
        f.write("whole")
    assert {p.name for p in tmp_path.iterdir()} == {"x.pt", new.name, other.name, "x.pt.mine.tmp"}


def test_a_sound_that_is_broken_inside_is_left_out_and_counted(world, tmp_path):
    """Its header is right, so that only reading it all shows it."""
    for name in "abc":
        write_audio(str(tmp_path / f"{name}.wav"), np.random.default_rng(0).normal(size=9000) * 0.1)
    soundfile.write(tmp_path / "b.wav", np.array([0.1] * 8000 + [np.nan]), 24_000, subtype="FLOAT")
    lines = [{"audio": f"{name}.wav", "text": "yes", "split": "train"} for name in "abc"]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(d) + "\n" for d in lines))
    command = "prepare.py", "encode", "--data", tmp_path, "--codec", world / "codec.pt", "--processes", 1
    code, _, err = run(*command)
    assert code == 1 and "b.wav: holds samples that are not finite" in err.splitlines()[-1]
    code, out, err = run(*command, "--skip-broken")
    assert code == 0 and "b.wav" in err
    assert "of 2 lines" in out and "1 lines with broken sounds are left out" in out


@pytest.mark.parametrize("line, says", [
    ("[" * 100_000, "nested too deeply"),
    ('{"audio": "a.wav", "text": "a", "end": 1e400}', "'end' is a number"),
    ('{"audio": "a.wav", "text": "a", "start": 7}', "lasts 0.38 s, not from 7"),
    ('{"audio": "a.wav", "text": "a", "end": 1e5}', "lasts 0.38 s"),
    ('{"audio": "a.wav", "text": "a", "starts": [[]]}', "starts is a list"),
    ('{"audio": "a\\nb.wav", "text": "a"}', "'audio' is text"),
    ('{"audio": "a.wav", "text": "\\ud800"}', "'text' is text"),
    ('{"audio": "a.wav", "text": "a", "split": []}', "there is no split"),
    ('{"audio": "a.wav", "text": "a", "lang": 7}', "lang is a text"),
    ('{"audio": "half.wav", "text": "a"}', "half.wav: cut off")])
def test_every_field_of_a_manifest_is_checked(tmp_path, line, says):
    write_audio(str(tmp_path / "a.wav"), np.zeros(9000) + 0.1)
    (tmp_path / "half.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:5000])
    good = '{"audio": "a.wav", "text": "a"}'
    (tmp_path / "manifest.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=f"line 2: .*{says}") as error:
        list(read_manifest(str(tmp_path / "manifest.jsonl")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, line, says", [
    ("questions", {"audio": "a\nb", "answers": ["a"]}, "line 1: a question's field 'audio' is a file's name"),
    ("questions", {"text": "x", "answers": [7]}, "line 1: needs the field 'answers'"),
    ("dialogues", {"turns": [{"role": "user", "text": "a", "voice": 7}]}, "line 1: turn 0's field 'voice'"),
    ("dialogues", {"turns": [["user", "a"]]}, "line 1: a dialogue's field 'turns' is a list"),
    ("dialogues", {"turns": [], "lang": []}, "line 1: a dialogue's field 'lang' is a text"),
    ("labels", {"scenario": "pause", "end": 1, "pause": [0, 1, 2]}, "'pause' is a list"),
    ("labels", {"scenario": "control", "end": 1, "answer": ["one"]}, "'answer' is a text"),
    ("labels", {"scenario": "control", "end": 10 ** 400}, "'end' is a number of seconds")])
def test_fields_of_what_is_spoken_and_asked(tmp_path, name, line, says):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(line) + "\n")
    for sound in ("input.wav", "output.wav"):
        write_audio(str(tmp_path / sound), np.zeros(9000) + 0.1)
    read = {"questions": lambda: read_questions(str(path), None),
            "dialogues": lambda: read_dialogues(str(path), 2, None, 1, "echo {out}"),
            "labels": lambda: read_conversations(str(tmp_path))}[name]
    with pytest.raises(ValueError, match=f"meta.json.*{says}") as error:
        read()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("text, says", [
    ("a|b\n", "line 1: is not ID"), ("a|b|c\n\xff|b|c\n", "line 2: 'utf-8'")])
def test_a_broken_line_of_a_corpus_names_itself(tmp_path, text, says):
    (tmp_path / "metadata.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"metadata.csv, {says}"):
        list(ljspeech(str(tmp_path)))


def test_the_codec_opens_each_sound_before_it_trains(tmp_path):
    write_audio(str(tmp_path / "a.wav"), np.zeros(9000) + 0.1)
    (tmp_path / "b.wav").write_bytes(b"nothing")
    lines = [{"audio": f"{name}.wav", "text": name} for name in "ab"]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(d) + "\n" for d in lines))
    code, _, err = run("train.py", "--config", "codec", "--data", tmp_path, "--out", tmp_path / "o")
    assert code == 1 and "line 2" in err and "b.wav: not an audio file" in err
    assert not (tmp_path / "o").exists()


def test_the_codec_trains_without_what_is_broken(tmp_path):
    """In its header, or only inside."""
    for name in "acde":
        write_audio(str(tmp_path / f"{name}.wav"), np.random.default_rng(0).normal(size=9000) * 0.1)
    (tmp_path / "b.wav").write_bytes(b"nothing")
    soundfile.write(tmp_path / "c.wav", np.array([0.1] * 8000 + [np.nan]), 24_000, subtype="FLOAT")
    lines = [{"audio": f"{name}.wav", "text": name, "split": "train"} for name in "abcde"]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(d) + "\n" for d in lines))
    command = "train.py", "--config", "codec", "--data", tmp_path, "--steps", 1, "--batch", 4, "--dim", 64
    code, _, err = run(*command, "--out", tmp_path / "o")
    assert code == 1 and "b.wav: not an audio file" in err and "--skip-broken leaves it out" in err
    code, out, err = run(*command, "--out", tmp_path / "o", "--skip-broken")
    assert code == 0 and "1 broken lines are left out" in err and "Wrote" in out
    assert err.count("skipped 1 that are broken inside") == 1 and "c.wav: holds samples that are not" in err
    code, _, err = run("train.py", "--config", "tiny", "--data", tmp_path, "--skip-broken")
    assert code == 1 and "--skip-broken is for the codec" in err


# ------------------------------------------------------------------------------------------------------------
# commands in templates

EVIL = '-x"; touch evil; $(touch evil) `touch evil` \' touch evil'


@pytest.mark.parametrize("template", [
    "sh -c 'say {text} > {out}'", "bash -lc {text} {out}", "python -c 'say(\"{text}\")' {out}",
    "ssh host say {text} {out}",
    "env sh -c 'echo \"{text}\" {out}'", "perl -e {text} {out}", "node --eval={text} {out}",
    "php -r {text} {out}",
    "/bin/sh -c -- {text} {out}", "sh -cx {text} {out}", "bash --rcfile {text} {out}", "sh {text} {out}"])
def test_a_template_that_would_run_the_text_is_refused(template):
    with pytest.raises(ValueError, match="would run what is in the text"):
        SpeakingCommand(template)


@pytest.mark.parametrize("template", [
    "sh -c 'cat > {out}'", "sh -c 'printf %s \"$1\" > \"$2\"' sh {text} {out}",
    "sh -c 'printf %s \"${1#--text=}\" > {out}' sh --text={text}"])
def test_a_text_is_only_ever_said(tmp_path, template, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Command("--tts", template, ["out"])(EVIL, out="said")
    assert (tmp_path / "said").read_text().strip() == EVIL and os.listdir(tmp_path) == ["said"]


def test_voices_and_file_names_are_only_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no plain word"):
        Command("--tts", "sh -c 'echo {voice}'")(voice="$(touch evil)")
    with pytest.raises(ValueError, match="looks like a flag"):
        Command("--tts", "echo {voice}")(voice="-o/tmp/evil")
    for voice in ("festival:x) (system \"touch evil\"", "flite:/tmp/voice.flitevox", "pico:"):
        with pytest.raises(ValueError, match="is no voice's name"):
            Several().speak("yes", voice, Style())
    write_audio("$(touch evil); a.wav", np.zeros(2000) + 0.1)
    path = str(tmp_path / "$(touch evil); a.wav")
    assert AsrCommand("sh -c 'basename {wav}'").hear_file(path) == "speech.wav"
    assert AsrCommand("basename {wav}").hear_file(path) == "$(touch evil); a.wav"
    assert os.listdir(tmp_path) == ["$(touch evil); a.wav"]


def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path):
    template = f"sh -c 'sleep 2 && touch {tmp_path}/late & sleep 60' {{wav}}"
    begin = time.monotonic()
    with pytest.raises(ValueError, match="took over 0.5 s"):
        Command("--asr", template, ["wav"])(wav="a.wav", seconds=0.5)
    assert time.monotonic() - begin < 30
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_a_command_does_not_read_what_the_user_types(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("typed"))
    assert Command("--asr", "cat")() == "" and Command("--tts", "cat")("text") == "text"
