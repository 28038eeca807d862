"""Text conversations as they are published, and recordings that a recogniser transcribes."""
import json
import os
import sys

import numpy as np
import pytest
import soundfile

from conftest import run
from corpora.chats import speakable
from files.manifest import read_manifest

ASKED, SAID = "What is **Mimi**?", "- A codec.\n- It makes codes."
LAYOUTS = {
    "ShareGPT": {"conversations": [{"from": "system", "value": "Be nice."}, {"from": "human", "value": ASKED},
                                   {"from": "gpt", "value": SAID}]},
    "ShareGPT with roles": {"conversations": [{"role": "user", "content": ASKED},
                                              {"role": "assistant", "content": SAID}]},
    "OpenAI": {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]},
    "Alpaca": {"instruction": "What is", "input": "Mimi?", "output": SAID},
    "UltraChat": {"id": "1", "data": [ASKED, SAID]}}


def read_lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("as_list", [False, True])
def test_each_layout_becomes_turns(tmp_path, layout, as_list):
    source, out = tmp_path / "chats.json", tmp_path / "dialogues.jsonl"
    objects = [LAYOUTS[layout]] * 3
    source.write_text(json.dumps(objects) if as_list else "\n".join(map(json.dumps, objects)) + "\n\n")
    code, text, err = run("prepare.py", "chats", source, "--out", out)
    assert code == 0, err
    lines = read_lines(out)
    assert len(lines) == 3 and f"Wrote 3 dialogues to {out}" in text
    assert lines[0] == {"lang": "en", "turns": [
        {"role": "user", "text": "What is Mimi?"}, {"role": "model", "text": "A codec. It makes codes."}]}


@pytest.mark.parametrize("text, spoken", [
    ("Hello, **you**!", "Hello, you!"), ("# Title\n\n1. one\n2) two", "Title one two"),
    ("see https://a.b", None), ("```x```", None), ("`print`", None), ("a | b", None), ("$x^2$", None),
    ("<b>x</b>", None), ("...", None), ("word " * 11, None), ("5 < 6 apples", "5 < 6 apples"),
    ("你好，世界。", "你好，世界。")])
def test_what_can_be_spoken(text, spoken):
    found, problem = speakable(text, 10)
    assert found == spoken and (problem is None) == (spoken is not None)


def test_a_conversation_ends_where_it_cannot_be_spoken(tmp_path):
    """And is counted; so is one that begins with the model."""
    talk = lambda *texts: {"data": list(texts)}
    source, out = tmp_path / "chats.jsonl", tmp_path / "out.jsonl"
    chats = [talk("a", "b", "c", "```d```", "e", "f"), talk("a", "b", "c"), talk("x " * 100, "b"),
             {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}]
    source.write_text("\n".join(map(json.dumps, chats)))
    code, text, err = run("prepare.py", "chats", source, "--out", out)
    assert code == 0, err
    assert [[t["text"] for t in d["turns"]] for d in read_lines(out)] == [["a", "b"], ["a", "b"]]
    assert "2 conversations end early or are left out: user and model do not take turns" in text
    assert "1 conversations end early or are left out: code" in text and "more than 80 words" in text


@pytest.mark.parametrize("content, message", [
    ("", "it is empty"), ("{", "line 1: is not JSON"), ("[{", "is not JSON"),
    ('{"text": "a"}', "none of the layouts"),
    ("3", "none of the layouts"), ('{"data": [1, 2]}', "none of the layouts"), ("[" * 100_000, "is not JSON"),
    ('{"messages": [{"role": "user"}]}', "none of the layouts"), ('{"data": ["```", "b"]}', "code")])
def test_chats_that_cannot_be_read_are_one_clear_error(tmp_path, content, message):
    (tmp_path / "chats.jsonl").write_text(content)
    code, _, err = run("prepare.py", "chats", tmp_path / "chats.jsonl", "--out", tmp_path / "out.jsonl")
    assert code == 1 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "out.jsonl").exists()


def test_chats_are_spoken(tmp_path):
    (tmp_path / "chats.json").write_text(json.dumps([LAYOUTS["OpenAI"]]))
    assert run("prepare.py", "chats", tmp_path / "chats.json", "--out", tmp_path / "d.jsonl")[0] == 0
    code, _, err = run("prepare.py", "speak", tmp_path / "d.jsonl", "--out", tmp_path / "spoken")
    assert code == 0, err
    assert len(list(read_manifest(str(tmp_path / "spoken/manifest.jsonl")))) == 1


# ------------------------------------------------------------------------------------------------------------
# recordings that a recogniser transcribes


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    for i, name in enumerate(("a/one.wav", "a/two.flac", "b/three.ogg", "four.wav")):
        os.makedirs((folder / name).parent, exist_ok=True)
        soundfile.write(folder / name, np.random.default_rng(i).normal(size=8000 + 800 * i) * 0.1, 16_000)
    (folder / "readme.txt").write_text("no audio")
    return folder


def recogniser(tmp_path, body):
    script = f"import sys, os\npath = sys.argv[1]\nname = os.path.basename(path)\n{body}\n"
    (tmp_path / "asr.py").write_text(script)
    return f"{sys.executable} {tmp_path / 'asr.py'} {{wav}}"


def test_recordings_are_transcribed(tmp_path, recordings):
    """At any depth; what is silent to the recogniser is counted, and lines are marked."""
    asr = recogniser(tmp_path, "print('' if 'four' in name else ' It is ' + name.split('.')[0] + '\\n')")
    code, out, err = run("prepare.py", "transcribe", recordings, "--asr", asr, "--out", tmp_path / "data")
    assert code == 0, err
    lines = read_lines(tmp_path / "data/manifest.jsonl")
    assert [d["text"] for d in lines] == ["It is one", "It is two", "It is three"]
    assert not any(d["annotated"] for d in lines) and "1 files in which nothing was heard" in out
    assert len(list(read_manifest(str(tmp_path / "data/manifest.jsonl")))) == 3
    assert os.listdir(tmp_path / "data") == ["manifest.jsonl"]


def test_a_stopped_transcription_is_continued(tmp_path, recordings):
    """Even if its last line is torn."""
    asr = recogniser(tmp_path, "open(path + '.count', 'a').write('x')\n"
                               "if 'two' in name and not os.path.exists(path + '.go'):\n"
                               "    sys.exit('no memory')\n"
                               "print(name)")
    command = ("prepare.py", "transcribe", recordings, "--asr", asr, "--out", tmp_path / "data")
    code, _, err = run(*command)
    assert code == 1 and "two.flac" in err.splitlines()[-1] and "no memory" in err.splitlines()[-1]
    with open(tmp_path / "data/transcripts.jsonl", "a") as f:
        f.write('{"audio": "torn')
    (recordings / "a/two.flac.go").write_text("")
    code, _, err = run(*command)
    assert code == 0, err
    assert len(read_lines(tmp_path / "data/manifest.jsonl")) == 4
    assert (recordings / "a/one.wav.count").read_text() == "x"  # was not done again


@pytest.mark.parametrize("what, message", [
    ("no audio", "holds no audio file"), ("no wav", "{wav} does not occur"), ("broken", "one.wav"),
    ("silent", "heard nothing"), ("missing", "holds no audio file"), ("there", "is there already")])
def test_what_cannot_be_transcribed_is_one_clear_error(tmp_path, recordings, what, message):
    asr, source = recogniser(tmp_path, "print('x')"), recordings
    if what in ("no audio", "missing"):
        source = tmp_path / "empty"
        source.mkdir() if what == "no audio" else None
    if what == "broken":
        (recordings / "a/one.wav").write_bytes(b"RIFF")
    if what == "silent":
        asr = recogniser(tmp_path, "pass")
    if what == "there":
        (tmp_path / "data").mkdir()
        (tmp_path / "data/manifest.jsonl").write_text("")
    code, _, err = run("prepare.py", "transcribe", source, "--asr", "echo x" if what == "no wav" else asr,
                       "--out", tmp_path / "data")
    assert code == 1 and message in err.splitlines()[-1] and "Traceback" not in err
    if what == "broken":
        code, out, err = run("prepare.py", "transcribe", source, "--asr", asr, "--out", tmp_path / "data",
                             "--skip-broken")
        assert code == 0 and "1 broken ones" in out and "Wrote 3 lines" in out
