"""What a run says before step 0, and how long its stages are for the data that there is."""
import dataclasses
import json
import random

import numpy as np
import pytest

import train
from conftest import FLM, encode, run
from streams import LISTEN, TEXT
from train import STAGES, Stage
from training.survey import frames_of, survey

POST = {"tts": (1, 1), "asr": (1, 1)}


def recordings(world, folder, annotated):
    """A manifest of clips of the toy world, encoded; annotated: of each line."""
    folder.mkdir()
    lines = [json.loads(line) for line in open(world / "toy/manifest.jsonl")]
    turns = [t for d in lines if len(d["turns"]) == 2 for t in d["turns"]]
    with open(folder / "manifest.jsonl", "w") as f:
        for t, by_person in zip(turns, annotated, strict=False):
            f.write(json.dumps({"audio": str(world / "toy" / t["audio"]), "text": t["text"], "split": "train",
                                "annotated": by_person}) + "\n")
    encode(folder, world)
    return train.ModelTask(dataclasses.replace(FLM, context=300), str(folder / "encoded"), "cpu")


def lengths(data):
    """Frames of each clip with its text, counted line by line."""
    turns = [data.line(i)["turns"][0] for i in range(len(data.encoded))]
    return np.array([t["copies"][0]["frames"] + len(t["tokens"]) for t in turns])


def test_an_epoch_is_all_of_the_data_once(world, tmp_path):
    """In each of the two styles, times the weights of table 2's second stage."""
    task = recordings(world, tmp_path / "data", [i < 3 for i in range(8)])
    n, of = lengths(task.data), task.data.encoded.index["annotated"]
    stage = Stage("s", 1, 2, 0, 0, 300, POST, epochs=3)
    assert frames_of(task.data, stage) == pytest.approx(2 * n.sum())
    fine = dataclasses.replace(stage, sources=(0.5, 5.0))
    assert frames_of(task.data, fine) == pytest.approx(2 * (0.5 * n[~of].sum() + 5 * n[of].sum()))
    notes, (kept,) = survey(task, [stage])
    assert kept.steps == round(3 * 2 * n.sum() / (2 * 300)) > 1
    assert notes == [f"s: 3 epochs of {2 * n.sum() / 12.5 / 3600:.2f} hours, {kept.steps} steps; "
                     "a smaller --batch makes more"]
    short = dataclasses.replace(stage, frames=int(np.median(n)) + train.PAUSE)  # only what fits counts
    assert 0 < frames_of(task.data, short) < 1.5 * n.sum()


def test_dialogues_count_once_in_an_epoch(world):
    """However many layouts they serve; as text alone they are short."""
    data = train.Conversations(str(world / "toy/encoded"))
    of = lambda *layouts: frames_of(data, Stage("s", 1, 1, 0, 0, 256, dict.fromkeys(layouts, (1, 1))))
    turns = [t for i in data.free["train"] for t in data.line(i)["turns"]]
    whole = sum(t["copies"][0]["frames"] + len(t["tokens"]) for t in turns)
    assert of("response_tts", "free_response_tts") == of("response_tts") == whole
    assert 0 < of("asr_response_tts") < whole  # without stories
    turns = [t for i in data.dialogues["train"] for t in data.line(i)["turns"]]
    assert of("language") == sum(len(t["tokens"]) for t in turns)


def test_the_papers_epochs(world, tmp_path):
    assert [s.epochs for s in STAGES["7b"]] == [3.3, 1, 2, 6]
    resolve = lambda *given: train.resolve(*train.build_parser().parse_known_args(["--config", "7b", *given]))
    assert {s.epochs for s in resolve("--epochs", "1.5")[1]} == {1.5}
    assert {s.epochs for s in resolve("--steps", "500")[1]} == {0}
    with pytest.raises(ValueError, match="give one of them"):
        resolve("--steps", "500", "--epochs", "1")
    code, _, err = run("train.py", "--config", "codec", "--epochs", 2, "--data", world / "toy",
                       "--out", tmp_path / "o")
    assert code == 1 and "--epochs is for a model" in err


@pytest.mark.parametrize("annotated, says", [
    ([True] * 6, "by a person"), ([False] * 6, "by a machine"), ([True, False] * 3, "")])
def test_one_kind_of_transcript_trains_both_stages(world, tmp_path, annotated, says):
    """And the run says so."""
    task = recordings(world, tmp_path / "data", annotated)
    stages = [Stage("1", 1, 2, 0, 0, 300, POST, sources=train.COARSE),
              Stage("2", 1, 2, 0, 0, 300, POST, sources=train.FINE)]
    notes, kept = survey(task, stages)
    assert kept == stages and len(notes) == (2 if says else 0)
    assert all(f"{s.name}: all clips were transcribed {says}" in note for s, note in zip(stages, notes))
    for s in stages:
        assert task.batch(s, 0, "train", random.Random(0))[0].shape == (2, 17, 300)
    machine, person = (set(part[:, 0].tolist()) for part in task.data.heard["train"])
    task.data.line = lambda i, line=task.data.line: used.append(i) or line(i)
    for s, allowed in zip(stages, ((machine or person), machine | person)):
        used = []
        for seed in range(8):
            task.data.grid("asr", s, "train", random.Random(seed))
        assert set(used) <= allowed


def test_nothing_is_cut_before_its_transcript(world):
    """Whatever is heard in a row of ASR style is followed by all of its text, at the row's end too."""
    data = train.Conversations(str(world / "toy/encoded"))
    v, found = data.vocab, 0
    clips = np.concatenate(data.heard["train"]).tolist()
    known = {tuple(data.line(i)["turns"][t]["tokens"]) for i, t in clips}
    rows, *_ = data.batch(Stage("s", 1, 40, 0, 0, 128, {"asr": (1, 1)}), 0, "train", random.Random(0))
    for row in rows.numpy():
        heard = row[LISTEN][0] != v.empty
        starts = [t for t in range(1, 128) if heard[t] and not heard[t - 1]]
        for begin, end in zip(starts, [*starts[1:], 128]):
            text = row[TEXT, begin:end]
            assert tuple(text[text != v.wait].tolist()) in known
            found += 1
    assert found > 80


def test_rows_of_80_seconds_on_one_gpu():
    assert {s.frames for s in STAGES["small"]} == {1024}
    code, out, _ = run("train.py", "--config", "small", "--plan", "--card", "4090")
    memory = float(out.split("  all ")[2].split()[0].rstrip(":"))
    assert code == 0 and 1 < memory < 8
