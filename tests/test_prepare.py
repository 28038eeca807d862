"""The manifest, corpora, and sound -> codes."""
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

import prepare
import train
from conftest import FLM, encode, loss_of, noise, run
from files.audio import read_audio
from files.manifest import check_line, read_manifest
from mimi import FRAME, Mimi
from files.tokenizer import PATTERN, load_tokenizer, make_tokenizer, train_bpe
from train import STAGES


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
    t = make_tokenizer(train_bpe({" a": 1}, 400), PATTERN)
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
    assert len(one) == 6 and encode(tmp_path / "toy", world, processes=2) == one


def test_the_tokeniser_of_another_encoding(world, tmp_path):
    folder = small_world(world, tmp_path)
    assert encode(folder, world, name=str(world / "toy/encoded"))["tokenizer.json"] == (world / "toy/encoded/tokenizer.json").read_bytes()
    assert len(train.read_encoded(f"{world}/toy/encoded,{folder}/encoded")[1]) > 10


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
    task = train.ModelTask(FLM, str(out / "encoded"), "cpu")
    layout = {"recorded": (1, 1)} if kind == "conversations" else {"tts": (1, 1), "asr": (1, 1)}
    loss, parts, _ = loss_of(task, train.Stage("one", 1, 2, 1e-3, 0, 48, layout))
    loss.backward()
    assert torch.isfinite(loss) and parts["mono"] > 0
    with pytest.raises(ValueError, match="the data holds nothing for response_tts"):
        loss_of(task, train.Stage("one", 1, 2, 1e-3, 0, 48, {"response_tts": (1, 1)}))


def test_a_recording_may_be_a_part_of_a_file(world, tmp_path):
    noise(tmp_path / "long.wav", 5.0, 16_000)
    (tmp_path / "manifest.jsonl").write_text(
        '{"audio": "long.wav", "start": 1.0, "end": 2.2, "text": "eins", "lang": "de", "annotated": false, "split": "train"}\n'
        '{"audio": "long.wav", "start": 2.2, "end": 3.0, "text": "zwei", "lang": "de", "split": "train"}\n')
    lines = [json.loads(line) for line in encode(tmp_path, world)["00000.jsonl"].splitlines()]
    assert [d["turns"][0]["copies"][0]["speech"] for d in lines] == [15, 10]
    assert [(d["annotated"], d["lang"]) for d in lines] == [(False, "de"), (True, "de")]
    task = train.ModelTask(FLM, str(tmp_path / "encoded"), "cpu")
    assert [len(s) for s in task.heard["train"]] == [len(s) for s in task.said["train"]] == [1, 1]


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
        check_line(line, 1, str(tmp_path))


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
