"""The manifest, corpora, and audio -> codes."""
import json
import os
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch

import corpora.dialogues
import corpora.mix
from corpora.readers import READERS
import prepare
import toy.script
import train
from conftest import FLM, encode, loss_of, noise, run
from files.audio import read_audio
from files.encoded import read_encoded
from files.manifest import check_line, read_manifest, spoken_parts
from mimi import FRAME, Mimi
from files.tokenizer import PATTERN, load_tokenizer, make_tokenizer, train_bpe
from train import STAGES


def test_codes_are_those_of_a_live_stream(world):
    """A turn's stored codes are what the codec gives when the audio comes after silence, frame by frame."""
    codec = Mimi.load(str(world / "codec.pt"))
    codes = np.load(world / "toy/encoded/00000.npy")
    for line in list(open(world / "toy/encoded/00000.jsonl"))[-7:]:
        turn = json.loads(line)["turns"][-1]  # the model's: begins on a frame
        if turn["role"] == "user":
            continue
        copy = turn["copies"][0]
        x = read_audio(str(world / "toy/model" / (turn["text"].replace(" ", "-") + ".flac")))
        state, heard = codec.init_state(1), []
        x = torch.nn.functional.pad(x, (20 * FRAME, 10 * FRAME - len(x) % FRAME))
        for w in x[None, None].split(FRAME, -1):
            heard.append(codec.encode_step(w, state)[0, :, 0])
        heard = torch.stack(heard)[20:20 + copy["frames"]].numpy()
        assert (heard == codes[copy["offset"]:copy["offset"] + copy["frames"]]).mean() > 0.999
        speech = -(-(len(x) - 30 * FRAME + 1) // FRAME)
        assert copy["speech"] == speech or copy["frames"] == copy["speech"] + prepare.TAIL


def test_tokens_know_their_frames(world):
    for line in open(world / "toy/encoded/00000.jsonl"):
        model = json.loads(line)["turns"][-1]
        if model["role"] == "user":
            continue
        assert len(model["starts"]) == len(model["tokens"]) and model["starts"][0] == 0
        assert model["starts"] == sorted(model["starts"])
        assert model["starts"][-1] < model["copies"][0]["speech"]


def test_a_word_that_begins_on_a_frame_belongs_to_it():
    t = make_tokenizer(train_bpe({" a": 1}, 400), PATTERN)
    turn = {"text": " ".join("a" * 400), "starts": [round(i * 0.08, 4) for i in range(400)]}
    assert prepare.tokens_of(turn, t)["starts"] == list(range(400))


def broken(world, tmp_path, what):
    folder = tmp_path / "toy"
    folder.mkdir()
    lines = list(open(world / "toy/manifest.jsonl"))[-3:]
    lines = [{**json.loads(line), "id": i} for i, line in enumerate(lines)]
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
    elif what == "no audio":
        text[1] = text[1].replace("/user/", "/nowhere/")
    (folder / "manifest.jsonl").write_text("\n".join(text) + "\n")
    return folder


@pytest.mark.parametrize("what", ["not json", "no turns", "odd role", "no audio"])
def test_a_broken_line_is_named_and_may_be_skipped(world, tmp_path, what, capsys):
    folder = broken(world, tmp_path, what)
    with pytest.raises(ValueError, match="line 2"):
        list(read_manifest(str(folder / "manifest.jsonl")))
    assert [d["id"] for d in read_manifest(str(folder / "manifest.jsonl"), skip_broken=True)] == [0, 2]
    assert "line 2" in capsys.readouterr().err
    command = "encode", "--data", folder, "--codec", world / "codec.pt"
    code, out, err = run("prepare.py", *command)
    assert code == 1 and "line 2" in err.splitlines()[-1] and not (folder / "encoded").exists()
    code, out, err = run("prepare.py", *command, "--skip-broken")
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


def small_world(world, tmp_path, n=10):
    """Some lines of the toy world in another folder."""
    (tmp_path / "toy").mkdir(parents=True)
    lines = [json.loads(line) for line in list(open(world / "toy/manifest.jsonl"))[-n:]]
    for t in (t for d in lines for t in spoken_parts(d)):
        t["audio"] = str(world / "toy" / t["audio"])
    text = "".join(json.dumps(d | {"split": "train"}) + "\n" for d in lines)
    (tmp_path / "toy/manifest.jsonl").write_text(text)
    return tmp_path / "toy"


def test_a_killed_encoding_is_continued(world, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD", 4)
    folder = small_world(world, tmp_path)
    whole = encode(folder, world)
    assert sorted(whole) == ["00000.jsonl", "00000.npy", "00001.jsonl", "00001.npy", "00002.jsonl",
                             "00002.npy", "codec.pt", "index.npy", "meta.json", "tokenizer.json"]
    done, real = [], prepare.encode_shard

    def dies(task):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task)
        real(task)
    monkeypatch.setattr(prepare, "encode_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, world)
    assert {f.name: f.read_bytes() for f in (folder / "encoded").iterdir()} == whole  # the old one is intact
    (folder / "encoded.partial/00001.jsonl").unlink()  # as if killed between the two files of a shard
    monkeypatch.setattr(prepare, "encode_shard", lambda task: (done.append(task), real(task)))
    done.clear()
    assert encode(folder, world) == whole and [task[0] for task in done] == [1, 2]
    done.clear()
    encode(folder, world, name="bytes")  # other settings: nothing can be kept
    assert len(done) == 3 and not (folder / "encoded.partial").exists()


def test_two_processes_write_what_one_writes(world, tmp_path):
    lines = (small_world(world, tmp_path, 1) / "manifest.jsonl").read_text() * (prepare.SHARD + 5)
    (tmp_path / "toy/manifest.jsonl").write_text(lines)
    one = encode(tmp_path / "toy", world)
    assert len(one) == 8 and encode(tmp_path / "toy", world, processes=2) == one


def test_the_tokeniser_of_another_encoding(world, tmp_path):
    folder = small_world(world, tmp_path)
    ours = encode(folder, world, name=str(world / "toy/encoded"))["tokenizer.json"]
    assert ours == (world / "toy/encoded/tokenizer.json").read_bytes()
    assert len(read_encoded(f"{world}/toy/encoded,{folder}/encoded")) > 10


def corpus(folder, kind):
    """A small one, laid out as it is downloaded; and what to give to prepare.py."""
    if kind == "librispeech":
        for i, words in enumerate(["HELLO THERE", "IT'S LATE"]):
            noise(folder / f"dev-clean/84/121/84-121-000{i}.flac", 0.7, 16_000)
        text = "84-121-0000 HELLO THERE\n84-121-0001 IT'S LATE\n"
        (folder / "dev-clean/84/121/84-121.trans.txt").write_text(text)
        return folder
    if kind == "ljspeech":
        noise(folder / "wavs/LJ001-0001.wav", 0.8, 22_050)
        noise(folder / "wavs/LJ001-0002.wav", 0.6, 22_050)
        text = "LJ001-0001|In 1455.|In fourteen fifty-five.\nLJ001-0002|Being|Being\n"
        (folder / "metadata.csv").write_text(text)
        return folder
    words = [["Hi", [0.5, 0.8], "SPEAKER_MAIN"], ["you.", [0.8, 1.0], "SPEAKER_MAIN"],
             ["Oh", [1.2, 1.4], "SPEAKER_OTHER"], ["Well", [1.1, 1.3], "SPEAKER_MAIN"],
             ["then", [1.3, 1.5], "SPEAKER_MAIN"], ["bye", [2.4, 2.8], "SPEAKER_MAIN"]]
    for name in "ab":
        noise(folder / f"stereo/{name}.wav", 3.0, 24_000, 2)
        (folder / f"stereo/{name}.json").write_text(json.dumps({"alignments": words}))
    lines = [{"path": f"stereo/{name}.wav", "duration": 3.0} for name in "ab"]
    (folder / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in lines))
    return folder / "data.jsonl"


@pytest.mark.parametrize("kind", READERS)
def test_a_corpus_as_it_is_downloaded(kind, world, tmp_path):
    """From its files to a step of training."""
    out = tmp_path / "data"
    code, said, err = run("prepare.py", kind, corpus(tmp_path / "download", kind), "--out", out)
    assert code == 0 and said.startswith("Wrote 2 lines"), err
    encoded = encode(out, world)
    lines = [json.loads(line) for line in encoded["00000.jsonl"].splitlines()]
    t = load_tokenizer(out / "encoded/tokenizer.json")
    texts = {"librispeech": [" hello there", " it's late"],
             "ljspeech": [" In fourteen fifty-five.", " Being"],
             "conversations": [" Hi you.", " Well then", " bye"]}[kind]
    parts = lines[0]["sentences"] if kind == "conversations" else [d["turns"][0] for d in lines]
    assert [t.decode(p["tokens"]) for p in parts] == texts
    if kind == "conversations":
        assert [p["frame"] for p in parts] == [6, 13, 30]
        assert lines[0]["speak"]["frames"] == lines[0]["listen"]["frames"] == 38
    task = train.ModelTask(FLM, str(out / "encoded"), "cpu")
    layout = {"recorded": (1, 1)} if kind == "conversations" else {"tts": (1, 1), "asr": (1, 1)}
    loss, parts, _ = loss_of(task, train.Stage("one", 1, 2, 1e-3, 0, 48, layout))
    loss.backward()
    assert torch.isfinite(loss) and parts["text_loss"] > 0
    with pytest.raises(ValueError, match="the data holds nothing for response_tts"):
        loss_of(task, train.Stage("one", 1, 2, 1e-3, 0, 48, {"response_tts": (1, 1)}))


def test_a_recording_may_be_a_part_of_a_file(world, tmp_path):
    noise(tmp_path / "long.wav", 5.0, 16_000)
    (tmp_path / "manifest.jsonl").write_text(
        '{"audio": "long.wav", "start": 1.0, "end": 2.2, "text": "eins", "lang": "de", "annotated": false, '
        '"split": "train"}\n'
        '{"audio": "long.wav", "start": 2.2, "end": 3.0, "text": "zwei", "lang": "de", "split": "train"}\n')
    lines = [json.loads(line) for line in encode(tmp_path, world)["00000.jsonl"].splitlines()]
    assert [d["turns"][0]["copies"][0]["speech"] for d in lines] == [15, 10]
    assert [(d["annotated"], d["lang"]) for d in lines] == [(False, "de"), (True, "de")]
    task = train.ModelTask(FLM, str(tmp_path / "encoded"), "cpu")
    assert [len(s) for s in task.data.heard["train"]] == [len(s) for s in task.data.said["train"]] == [1, 1]


def test_annotated_recordings_are_used_more_in_post_training_2():
    a, b = STAGES["7b"][:2]
    assert a.sources == (1, 0) and b.sources == (0.5, 5)


WORDS = '{"audio": "x.wav", "text": "a b", '
TALK = '{"audio": "x.wav", "sentences": [{"role": "model", "text": "a", "start": 1, "end": 2, '
DIALOGUE = ('{"turns": [{"role": "user", "text": "a", "audio": "x.wav"}], '
            '"interjections": [{"audio": "x.wav", "text": "m", ')


@pytest.mark.parametrize("line, says", [
    (WORDS + '"split": "valid"}', "no split 'valid'; known are train, seen, new"),
    (WORDS + '"split": ["train"]}', "known are train, seen, new"),
    (WORDS + '"annotated": "yes"}', "annotated is true or false"),
    (WORDS + '"start": null}', "turn's field 'start' is a number of seconds, not None"),
    (WORDS + '"start": "1"}', "turn's field 'start' is a number of seconds, not '1'"),
    (WORDS + '"start": true}', "not True"), (WORDS + '"start": -1}', "not -1"),
    (WORDS + '"start": NaN}', "not nan"), (WORDS + '"end": Infinity}', "not inf"),
    (WORDS + '"end": 1e999}', "not inf"),
    (WORDS + '"end": [2]}', r"not \[2\]"), (WORDS + '"starts": 1}', "starts is a list"),
    (WORDS + '"starts": [0]}', "one for each word"),
    (WORDS + '"starts": [0, null]}', "starts is a list of seconds"),
    (WORDS + '"starts": [1, 0.5]}', "in order"), (WORDS + '"starts": [0, NaN]}', "starts is a list"),
    (TALK + '"cut": null}]}', "sentence's field 'cut' is a number of seconds, not None"),
    (TALK + '"cut": 0.5}]}', "cannot be cut at 0.5"), (TALK + '"cut": "2"}]}', "not '2'"),
    (TALK + '"end": null}]}', "sentence's field 'end' is a number of seconds, not None"),
    (DIALOGUE + '"at": "1"}]}', "interjection's field 'at'"), (DIALOGUE + '"at": NaN}]}', "not nan"),
    (DIALOGUE + '"at": 1, "start": null}]}', "not None"), ('{"turns": [1]}', "turn needs the field 'role'"),
    ('{"audio": 3, "text": "a"}', "turn's field 'audio' is text, not 3"),
    ('{"audio": "x.wav", "text": null}', "turn's field 'text' is text, not None"),
    ('{"audio": "x.wav", "text": "a", "start": 2, "end": 1}', "not a stretch of time"),
    ('{"audio": "x.wav"}', "needs the field 'text'"),
    ('{"audio": "x.wav", "sentences": [{"role": "model", "text": "a"}]}', "needs the field 'start'"),
    ('{"turns": [{"role": "model", "text": "a", "audio": "x.wav"}, '
     '{"role": "user", "text": "a", "audio": "x.wav"}]}', "take turns"),
    ('[]', "not an object"),
])
def test_lines_that_cannot_be_used(line, says, tmp_path):
    noise(tmp_path / "x.wav", 0.1, 8000)
    with pytest.raises(ValueError, match=says):
        check_line(line, 1, str(tmp_path))
    (tmp_path / "manifest.jsonl").write_text(f'{line}\n{{"audio": "x.wav", "text": "a", "id": 7}}\n')
    with pytest.raises(ValueError, match="manifest.jsonl, line 1: "):
        list(read_manifest(str(tmp_path / "manifest.jsonl")))
    assert [d["id"] for d in read_manifest(str(tmp_path / "manifest.jsonl"), skip_broken=True)] == [7]


def test_a_corpus_that_is_not_one(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"path": "gone.wav"}\n')
    for kind, source, says in (("librispeech", "empty", "nothing of librispeech"),
                               ("ljspeech", "empty", "metadata.csv"),
                               ("conversations", "bad.jsonl", "bad.jsonl, line 1")):
        code, _, err = run("prepare.py", kind, tmp_path / source, "--out", tmp_path / "out")
        assert code == 1 and says in err.splitlines()[-1] and not (tmp_path / "out/manifest.jsonl").exists()


def test_training_refuses_codes_of_another_codec_or_tokeniser(world, tmp_path):
    codec = tmp_path / "codec.pt"
    shutil.copy(world / "codec.pt", codec)
    folder = small_world(world, tmp_path)
    prepare.encode(str(folder), str(codec), "bpe", 300, 1, 0.0, False, 1, "cpu")
    where = str(folder / "encoded")
    assert len(read_encoded(where + "," + where)) == 20
    with pytest.raises(ValueError, match="another tokenizer than .*toy/encoded"):
        read_encoded(str(world / "toy/encoded") + "," + where)
    codec.write_bytes(codec.read_bytes() + b" ")
    assert len(read_encoded(where)) == 10  # it has its own copy
    shutil.copy(codec, folder / "encoded/codec.pt")
    with pytest.raises(ValueError, match="another codec than .*codec.pt now is"):
        read_encoded(where)
    meta = json.loads((folder / "encoded/meta.json").read_text())
    old = f"is of version 2, not {prepare.VERSION}; run `python prepare.py encode` again"
    for changed, says in (({**meta, "version": 2}, old), ({"version": prepare.VERSION}, "needs the field"),
                          ([], "is not what")):
        (folder / "encoded/meta.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=says):
            read_encoded(where)


def test_without_the_module_resource(world, tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "resource", None)
    assert prepare.peak_memory() == ""
    assert len(encode(small_world(world, tmp_path, 2), world)) == 6


def test_a_file_with_and_without_an_end(world, tmp_path):
    noise(tmp_path / "a.wav", 1.0, 16_000)
    lines = [{"audio": "a.wav", "text": "one"}, {"audio": "a.wav", "start": 0, "end": 1.0, "text": "two"},
             {"audio": "a.wav", "end": 1.0, "text": "one"}, {"audio": "a.wav", "end": None, "text": "two"}]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(d) + "\n" for d in lines))
    lines = [json.loads(line) for line in encode(tmp_path, world)["00000.jsonl"].splitlines()]
    assert [d["turns"][0]["copies"][0]["speech"] for d in lines] == [13] * 4


def commands(world, tmp_path):
    """Of every command that writes a folder: its command line, all but --out."""
    talk = {"turns": [{"role": "user", "text": "hello"}, {"role": "model", "text": "you"}]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk) + "\n")
    return {"toy": ["--items", 2, "--tests", 1, "--sentences", 4, "--voices", 2],
            "speak": [tmp_path / "talks.jsonl"], "mix": ["--data", world / "toy", "--conversations", 1],
            **{kind: [corpus(tmp_path / kind, kind)] for kind in READERS}}


@pytest.mark.parametrize("name", ["toy", "speak", "mix", *READERS])
def test_a_slash_at_the_end_of_out(world, tmp_path, name):
    code, _, err = run("prepare.py", name, *commands(world, tmp_path)[name], "--out", f"{tmp_path}/out/")
    assert code == 0 and os.listdir(tmp_path / "out") and not (tmp_path / "out/.partial").exists(), err
    code, _, err = run("prepare.py", name, *commands(world, tmp_path)[name], "--out", f"{tmp_path}/out/")
    assert code == 1 and "is there already; remove it, or name another folder with --out" in err


@pytest.mark.parametrize("name", ["toy", "speak", "mix", *READERS, "encode"])
def test_folders_that_are_not_ours_are_left_alone(world, tmp_path, name, monkeypatch):
    """A link, a file, and a folder with other files, at the output's place or at its .partial: one line,
    before any work."""
    for module, work in ((toy.script, "speak_all"), (corpora.dialogues, "speak_all"),
                         (corpora.mix, "converse"), (prepare, "survey"), (prepare.Mimi, "load")):
        monkeypatch.setattr(module, work, lambda *args, **kwargs: pytest.fail("it has begun to work"))
    arguments = ["encode", "--data", tmp_path / "data"] if name == "encode" else \
        [name, *commands(world, tmp_path)[name], "--out", tmp_path / "data/encoded"]
    ends = ["/manifest.jsonl"] if name in READERS else ["", ".partial"]
    for end in ends:
        for kind in ("link", "file", "folder"):
            shutil.rmtree(tmp_path / "data", ignore_errors=True)
            place = tmp_path / f"data/encoded{end}"
            place.parent.mkdir(parents=True)
            if kind == "link":
                (tmp_path / "target").mkdir(exist_ok=True)
                place.symlink_to(tmp_path / "target" if end != ".partial" else tmp_path / "nowhere")
            elif kind == "file":
                place.write_text("mine")
            else:
                place.mkdir()
                (place / "thesis.txt").write_text("mine")
            code, _, err = run("prepare.py", *arguments)
            assert code == 1 and str(place) in err and len(err.splitlines()) == 1, (kind, err)
            assert os.path.islink(place) if kind == "link" else \
                (place / "thesis.txt" if kind == "folder" else place).read_text() == "mine"
