"""Experiments: a variant trains, is measured and gives a row of its table; the teacher's places by hand."""
import dataclasses
import json
import random
import shutil

import pytest
import torch
from conftest import FLM, encode, run
from test_published import as_qwen
from test_streams import MODEL, R, USER, A, V, W
from test_tokenizer import publish

import model
import prepare
import train
from layouts import states
from questions import ask, layouts, recipe, teacher, voices
from files.manifest import read_manifest
from files.tokenizer import load_tokenizer
from streams import TEXT, asr_response_tts, blank, pack
from toy.script import make_toy


class Deaf:
    def hear(self, wav):
        return []


@pytest.mark.parametrize("question, name", [
    ("states", "SHIFT, BREAK"), ("typed", "half typed"), ("typed", "counts typed"), ("prompts", "roles"),
    ("teacher", "teacher"), ("teacher", "replay"), ("documents", "apart"), ("long", "word-aligned"),
    ("division", "time-division")])
def test_a_variant_from_training_to_its_row(world, tmp_path, monkeypatch, question, name):
    import streams
    monkeypatch.setattr(streams, "tts", streams.tts)  # put back what word-aligned replaces
    monkeypatch.setattr(ask, "world_of", lambda question: recipe.World(str(world / "toy")))
    monkeypatch.setattr(ask, "OUT", str(tmp_path))
    monkeypatch.setattr(ask, "CONFIGS", {"tiny": dataclasses.replace(FLM, context=256)})
    monkeypatch.setattr(ask, "get_recogniser", lambda *a: Deaf())
    found = ask.answer((question, name, 1, 2, 0.004))
    assert found[:2] == (question, name)
    assert ask.answer((question, name, 1, 2, 0.004)) == found, "read, not trained again"
    with pytest.raises(ValueError, match="is of other items; remove "):
        ask.answer((question, name, 1, 3, 0.004))
    titles = ask.QUESTIONS[question][name].titles or ask.MEASURES
    assert set(titles) <= set(found[2]) and all(0 <= found[2][key] <= 1 for key in titles)
    table = ask.table({name: [found[2], found[2]]}, titles, "a title").splitlines()
    assert table[0].startswith("| a title | ") and table[2].startswith(f"| {name} | ")
    assert table[0].count("|") == table[1].count("|") == table[2].count("|") == len(titles) + 2


@pytest.fixture(scope="module")
def world_of_voices(world, tmp_path_factory):
    """A small world in which the model has four voices, encoded."""
    small = dict(items=24, tests=12, sentences=1000, voices=2, seed=2, tts=None)
    folder = str(tmp_path_factory.mktemp("voices") / "data")
    found = recipe.World(folder, script=voices.WORLD.script)
    make_toy(folder, "en", **small, model_voices=voices.MODEL_VOICES)
    prepare.encode(folder, str(world / "codec.pt"), "bpe", 300, 1, 0.0, False, 1, "cpu")
    return found


def test_voices_from_training_to_their_row(world_of_voices, tmp_path, monkeypatch):
    monkeypatch.setattr(voices, "WORLD", world_of_voices)
    monkeypatch.setattr(voices, "JUDGED", 10)
    monkeypatch.setattr(voices, "WORDS", 1)
    monkeypatch.setattr(ask, "world_of", lambda question: world_of_voices)
    monkeypatch.setattr(ask, "OUT", str(tmp_path))
    monkeypatch.setattr(ask, "CONFIGS", {"tiny": dataclasses.replace(FLM, context=256)})
    monkeypatch.setattr(ask, "get_recogniser", lambda *a: Deaf())
    scores = ask.answer(("voices", "decoupled", 1, 6, 0.004))[2]
    assert set(ask.VOICES["decoupled"].titles) <= set(scores)
    assert scores["original"] > 0.9, "the judge of voices knows those of original recordings"


def test_who_reads_answers_nothing(world_of_voices):
    manifest = list(read_manifest(f"{world_of_voices.folder}/manifest.jsonl"))
    who = {kind: {t["voice"] for d in manifest if (d["kind"] == "said") == kind for t in d["turns"]
                  if t["role"] == "model"} for kind in (True, False)}
    assert who[True] == set(voices.MODEL_VOICES) and who[False] == set(voices.MODEL_VOICES[:-1])
    assert len({t["audio"] for d in manifest for t in d["turns"] if t["role"] == "model"}) >= 250 // 4


def test_a_question_has_one_recipe_and_columns():
    for variants in ask.QUESTIONS.values():
        assert len({tuple(v.titles or ask.MEASURES) for v in variants.values()}) == 1
        assert len({sum(s.steps for s in v.stages) for v in variants.values()}) == 1


def test_the_teacher_reads_what_the_language_stage_has():
    grid = asr_response_tts([(USER, MODEL)], [2], V)
    (packed, _) = pack([grid, grid], 30, V)  # the second is cut in its answer: not a whole run, at the end
    text = torch.from_numpy(packed)[TEXT]
    assert text[5:13].tolist() == [A, 3, 4, R, 5, 6, 7, W]
    begin, answer, end = teacher.runs(text, V)[0]
    assert (begin, answer, end) == (5, 8, 12) and text[begin:end].tolist() == [A, 3, 4, R, 5, 6, 7]


@pytest.mark.parametrize("documents", [False, True])
def test_a_student_who_is_its_teacher_learns_nothing_from_it(world, documents):
    """Both read the same where a mask hides the turns before. A shift by one token would not be 0."""
    task = teacher.FromStart(FLM, str(world / "toy/encoded"), "cpu", str(world / "flm"))
    for p in (p for p in task.model.parameters() if p.ndim > 1):
        p.data.mul_(10)
    task.teacher.load_state_dict(task.model.state_dict())
    stage = train.Stage("s", 1, 4, 0, 0, 96, {"language": (1, 1)})
    batch = task.batch(stage, 0, "train", random.Random(0))
    batch += ((batch[0][:, TEXT] == task.vocab.asr).cumsum(-1),) * documents  # each turn a document
    kl = task.loss(stage, batch, task.totals(batch))[1]["kl"]
    assert kl.abs() < 1e-5 if documents else kl > 1e-4, kl


def test_a_teacher_who_knows_what_the_student_knows_adds_nothing_and_another_does(world):
    task = teacher.TaughtTask(FLM, str(world / "toy/encoded"), "cpu")
    stage = train.Stage("s", 1, 4, 0, 0, 96, {"asr_response_tts": (1, 1)})
    batch = task.batch(stage, 0, "train", random.Random(0))
    total = task.totals(batch)
    assert any(teacher.runs(row[TEXT], task.vocab) for row in batch[0])
    plain = task.loss(stage, batch, total)
    assert "kl" not in plain[1]
    torch.manual_seed(5)
    task.teacher = model.FLM(task.config).eval()
    for p in task.teacher.parameters():
        p.data.mul_(3)
    loss, parts, _ = task.loss(stage, batch, total)
    assert parts["kl"] > 1e-3 and torch.allclose(loss, plain[0] + parts["kl"])
    loss.backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    with torch.no_grad():  # nothing but one answer for both
        for m in (task.model, task.teacher):
            m.head.weight.zero_()
    assert task.loss(stage, batch, total)[1]["kl"].abs() < 1e-5


def test_qwen_teaches_as_it_chats(world, tmp_path):
    """What it says to a transcript in its own format, without any audio, is what the student learns from."""
    data, start = tmp_path / "toy", tmp_path / "qwen"
    start.mkdir()
    shutil.copytree(world / "toy", data, ignore=shutil.ignore_patterns("encoded"))
    publish(start, "tokenizer.json")
    encode(data, world, name=str(start))
    source = model.FLM(dataclasses.replace(FLM, vocab_size=320)).eval()
    as_qwen(source, start, "model.", "qwen2")
    flags = ["--config", "tiny", "--data", data / "encoded", "--device", "cpu"]
    code, out, err = run("questions.teacher", *flags, "--init", start, "--steps", 5, "--frames", 96,
                         "--out", tmp_path / "o")
    assert code == 0 and f"Wrote {tmp_path}/o/checkpoint.pt" in out, err
    logged = [json.loads(line) for line in (tmp_path / "o/log.jsonl").read_text().splitlines()]
    assert any(line["kl"] > 0 for line in logged if line["stage"] == "fine-tuning 1")
    assert not any("kl" in line for line in logged if line["stage"] == "language")

    task = teacher.FromStart(FLM, str(data / "encoded"), "cpu", str(start))
    words = load_tokenizer(str(data / "encoded/tokenizer.json"))
    heard, said = (torch.tensor(words.encode(text)) for text in (" repeat the", " the the"))
    chat = words.encode(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nrepeat the<|im_end|>\n<|im_start|>assistant\n the the",
        allowed_special="all")
    grid = blank(len(chat), task.vocab, task.vocab.empty)
    grid[TEXT] = chat
    with torch.no_grad():
        for table in (*source.speak, *source.listen):
            table.weight.zero_()
        right = source.text_logits(source.hidden(torch.from_numpy(grid)[None]))[0].log_softmax(-1)
    assert torch.allclose(task.taught(heard, said), right[-len(said) - 1:-1], atol=1e-5)
    assert task.model.speak[0].weight.abs().max() > 0, "the student keeps its ears"


def test_a_teacher_is_named(world, tmp_path):
    flags = ["--config", "tiny", "--data", world / "toy/encoded", "--out", tmp_path / "o", "--device", "cpu"]
    code, _, err = run("questions.teacher", *flags)
    assert code == 1 and "a teacher needs --init" in err
    task = teacher.FromStart(FLM, str(world / "toy/encoded"), "cpu", str(world / "flm"))
    assert task.teacher is not task.model and task.chats is None
    release = tmp_path / "release"
    release.mkdir()
    (release / "config.json").write_text('{"model_type": "FLMAudio"}')
    with pytest.raises(ValueError, match="a teacher needs --init"):
        teacher.FromStart(FLM, str(world / "toy/encoded"), "cpu", str(release))
    as_qwen(model.FLM(dataclasses.replace(FLM, vocab_size=400)), tmp_path, "model.", "qwen2")
    with pytest.raises(ValueError, match="has no <.im_start.> and <.im_end.>"):
        teacher.FromStart(FLM, str(world / "toy/encoded"), "cpu", str(tmp_path))


def test_roles_are_judged_by_their_own_right_answers(monkeypatch, world):
    class Duplex:
        prompt, vocab = None, V
    monkeypatch.setattr(layouts, "measure", lambda *a: {"text": 0.5})
    monkeypatch.setattr(layouts, "make_prompt", lambda duplex, role: role)
    monkeypatch.setattr(layouts, "written", lambda duplex, text: [(0.0, text)])
    monkeypatch.setattr(layouts, "converse_all", lambda duplex, groups, *a: [[
        ({"": "one two", "say it twice": "one two one two", "say it backward": "one two"}[duplex.prompt], 0)
        for _ in heard] for heard in groups])
    monkeypatch.setattr(layouts, "read_audio", lambda path: torch.zeros(10))
    item = {"turns": [{"path": "a", "text": "x"}, {"path": "b", "text": "one two"}]}
    assert layouts.in_roles(None, Duplex(), None, [item]) == {
        "text": 0.5, "as asked": 1.0, "say it twice": 1.0, "say it backward": 0.0}


def test_the_state_tokens_are_no_words():
    assert f"{states.SHIFT}one two{states.BREAK}".split() == ["one", "two"]
