"""A whole conversation through files, as a user would have it, with any file a user may have."""
import json

import numpy as np
import pytest
import soundfile
import torch

from conftest import run
from chat import DuplexModel
from live.transcript import PrintedTranscript, Transcript
from files.audio import read_audio
from evals.plot import draw_conversation
from evals.turns import yields


def tone(path, seconds, rate=24_000, channels=1, **kwargs):
    x = 0.2 * np.sin(np.arange(int(seconds * rate)) / rate * 2000)
    soundfile.write(path, np.stack([x] * channels, 1), rate, **kwargs)
    return path


def chat(world, source, target, *more):
    return run("chat.py", "--checkpoint", world / "flm", "--input", source, "--after", 0, "--output", target,
               *more)


def test_a_reply_on_the_clock_of_the_input(world, tmp_path):
    source, target = tone(tmp_path / "in.wav", 1.23), tmp_path / "reply.wav"
    code, out, err = chat(world, source, target)
    assert code == 0, err
    assert soundfile.info(target).frames == soundfile.info(source).frames
    assert soundfile.info(target).samplerate == 24_000
    for line in open(tmp_path / "reply.jsonl"):
        piece = json.loads(line)
        assert 0 < piece["time"] <= 1.3 and isinstance(piece["text"], str)
    assert "times real time" in out and out.splitlines()[-1].startswith("Wrote")


@pytest.mark.parametrize("name, seconds, rate, channels", [
    ("phone.wav", 0.7, 8000, 1), ("cd.wav", 0.7, 44100, 2), ("studio.flac", 0.5, 96000, 2),
    ("voice.ogg", 0.6, 48000, 1),
    ("music.mp3", 0.6, 44100, 2), ("blink.wav", 0.0001, 24000, 1), ("surround.wav", 0.3, 48000, 6)])
def test_any_audio_file(world, tmp_path, name, seconds, rate, channels):
    source, target = tone(tmp_path / name, seconds, rate, channels), tmp_path / "reply.flac"
    code, _, err = chat(world, source, target, "--stereo")
    assert code == 0, err
    info = soundfile.info(target)
    assert info.channels == 2 and abs(info.frames - soundfile.info(source).frames * 24000 / rate) < 2


def test_stereo_holds_the_user_left_and_the_model_right(world, tmp_path):
    source = tone(tmp_path / "in.wav", 0.5)
    assert chat(world, source, tmp_path / "one.wav")[0] == 0
    assert chat(world, source, tmp_path / "two.wav", "--stereo")[0] == 0
    left, right = read_audio(str(tmp_path / "two.wav"), mono=False)
    assert torch.equal(left, read_audio(str(source)))
    assert torch.equal(right, read_audio(str(tmp_path / "one.wav")))


def test_the_answer_may_outlast_the_file(world, tmp_path):
    """A question ends with its recording; the answer comes in the silence after it, six seconds if not said
    otherwise."""
    source = tone(tmp_path / "in.wav", 0.5)
    flags = "--checkpoint", world / "flm", "--output", tmp_path / "a.wav"
    code, _, err = run("chat.py", *flags, "--input", source)
    assert code == 0 and soundfile.info(tmp_path / "a.wav").duration == pytest.approx(6.5), err
    longer = read_audio(str(tmp_path / "a.wav"))
    assert chat(world, source, tmp_path / "b.wav", "--after", 0.8)[0] == 0
    assert torch.equal(read_audio(str(tmp_path / "b.wav")), longer[:31_200])
    code, _, err = run("chat.py", *flags, "--input", source, "--after", "nan")
    assert code == 1 and err.strip() == "error: --after nan: from 0 to 3600 seconds"


def test_where_the_model_yields():
    def spans(*pairs):
        x = torch.zeros(24_000 * 6)
        for a, b in pairs:
            x[int(a * 24_000):int(b * 24_000)] = 0.1
        return x
    said = spans((1.0, 2.5), (4.0, 5.0))
    assert yields(spans((2.0, 3.0)), said) == [2.5]  # half a second after the user broke in
    assert yields(spans((0.2, 0.9)), said) == []  # the user spoke before
    assert yields(spans((1.2, 3.0)), said) == []  # the model went on for more than a second: it did not yield
    assert yields(spans(), said) == []


def test_a_picture_of_the_conversation(world, tmp_path):
    pytest.importorskip("matplotlib")
    source = tone(tmp_path / "in.wav", 2.0)
    code, out, err = chat(world, source, tmp_path / "reply.wav", "--picture", tmp_path / "reply.png")
    assert code == 0, err
    assert (tmp_path / "reply.png").read_bytes()[:4] == b"\x89PNG"
    assert out.splitlines()[-1].endswith("reply.png")


def test_a_picture_draws_what_it_is_given(tmp_path):
    pytest.importorskip("matplotlib")
    heard, said = torch.zeros(48_000), torch.zeros(48_000)
    heard[24_000:36_000], said[:30_000] = 0.1, 0.1
    draw_conversation(str(tmp_path / "a.svg"), heard, said,
                      [{"time": 0.2, "text": " eins"}, {"time": 0.28, "text": " zwei"}])
    svg = (tmp_path / "a.svg").read_text()
    assert "<!-- eins zwei -->" in svg and "<!--  yields -->" in svg


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "garbage", "no frames", "not finite",
                                  "cut off"])
def test_bad_input_is_one_line_and_leaves_the_old_reply(world, tmp_path, kind):
    from test_files import bad_file
    target = tmp_path / "reply.wav"
    target.write_text("old")
    code, _, err = chat(world, bad_file(tmp_path, kind), target)
    assert code == 1 and len(err.strip().splitlines()) == 1 and err.startswith("error: ") and "bad.wav" in err
    assert target.read_text() == "old"


@pytest.mark.parametrize("target, message", [
    ("reply.xyz", "cannot write this kind of file"), ("reply", "cannot write this kind of file"),
    ("folder.wav", "is a folder"), ("file.txt/reply.wav", "file.txt")])
def test_an_output_is_checked_before_the_conversation(world, tmp_path, monkeypatch, target, message):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "file.txt").write_text("in the way")
    monkeypatch.setattr(DuplexModel, "load", None)
    code, _, err = chat(world, tone(tmp_path / "in.wav", 0.3), tmp_path / target)
    assert code == 1 and len(err.strip().splitlines()) == 1 and message in err


def test_a_picture_is_checked_before_the_conversation(world, tmp_path, monkeypatch):
    monkeypatch.setattr(DuplexModel, "load", None)
    source = tone(tmp_path / "in.wav", 0.3)
    code, _, err = chat(world, source, tmp_path / "reply.wav", "--picture", tmp_path / "reply.docx")
    assert code == 1 and len(err.strip().splitlines()) == 1 and ("reply.docx" in err or "extra 'plot'" in err)


@pytest.mark.parametrize("device, message", [
    ("mps", "float64"), ("tpu", "unknown"), ("xpu", "unknown"), ("", "unknown"), ("cuda:99", "GPU")])
@pytest.mark.parametrize("script", ["chat.py", "eval.py"])
def test_a_device_is_checked_before_any_work(world, tmp_path, monkeypatch, script, device, message):
    monkeypatch.setattr(DuplexModel, "load", None)
    flags = ("--input", tone(tmp_path / "in.wav", 0.3)) if script == "chat.py" else ()
    code, _, err = run(script, "--checkpoint", world / "flm", "--device", device, *flags)
    assert code == 1 and len(err.strip().splitlines()) == 1 and f"--device {device}" in err and message in err


def test_a_new_folder_is_made_for_the_output(world, tmp_path):
    source, target = tone(tmp_path / "in.wav", 0.3), tmp_path / "new/folder/reply.wav"
    assert chat(world, source, target)[0] == 0 and target.exists()


def test_the_monologue_is_printed_line_by_line(world, capsys):
    transcript = PrintedTranscript(DuplexModel.load(str(world / "flm")))
    for t, token in ((0, b"a"), (3, b"b"), (7, b"c")):
        transcript.add(t, token[0])
    lines = capsys.readouterr().out.split("\n")
    assert lines[1:] == ["   0.08 s ab", ""], "a pause of four frames ends a line"
    transcript.print_line()
    assert capsys.readouterr().out == "   0.64 s c\n"


def test_bad_checkpoints_are_one_line(world, tmp_path):
    source = tone(tmp_path / "in.wav", 0.3)
    for folder, message in (("nowhere", "no such folder"), (tmp_path, "no such checkpoint")):
        code, _, err = run("chat.py", "--checkpoint", folder, "--input", source, "--output",
                           tmp_path / "r.wav")
        assert code == 1 and len(err.strip().splitlines()) == 1 and message in err
    assert not (tmp_path / "r.wav").exists()


def test_the_transcript_joins_bytes_to_characters(world):
    duplex = DuplexModel.load(str(world / "flm"))
    transcript = Transcript(duplex)
    pieces = [transcript.add(t, token)
              for t, token in enumerate([*"é".encode(), duplex.vocab.wait, duplex.vocab.asr])]
    assert pieces == ["", "é", "", "<asr>"]
    assert transcript.pieces == [{"time": 0.16, "text": "é"}, {"time": 0.32, "text": "<asr>"}]
