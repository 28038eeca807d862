"""The measures, on systems whose behaviour is known, and eval.py as a whole on an untrained model."""
import itertools
import json
import math
import shutil
import sys
import types

import pytest
import torch

from evals import turns
from conftest import record, run
from chat import DuplexModel
from eval import answers, hearing, understands
from evals.scores import Proportions, edit_distance
from files.audio import SAMPLE_RATE, read_audio
from files.manifest import read_manifest
from mimi import FRAME, Mimi
from evals import recogniser
from evals.recogniser import RecogniserConfig, RecogniserTask
from toy.world import LANGUAGES
from train import Stage, train
from evals.conversations import read_conversations
from evals.strangers import MICROPHONES, make_strangers
from evals.turns import score_all, speech, wilson


def noise(seconds, level=0.1):
    return torch.randn(round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0)) * level


def silence(seconds):
    return torch.zeros(round(seconds * SAMPLE_RATE))


def test_speech_is_found_where_it_is():
    x = torch.cat([silence(1), noise(0.5), silence(0.2), noise(0.4), silence(0.5), noise(0.06), silence(0.5),
                   noise(1)])
    spans = speech(x)  # the 0.2 s gap is bridged, the 0.06 s burst dropped
    assert len(spans) == 2
    for (a, b), (c, d) in zip(spans, [(1.0, 2.1), (3.16, 4.16)]):
        assert abs(a - c) <= 0.04 and abs(b - d) <= 0.04
    assert speech(silence(1)) == [] and speech(noise(1, 0.001)) == []


@pytest.mark.parametrize("a, b, n", [("a b c", "a b c", 0), ("a c", "a b c", 1), ("a x c d", "a b c", 2),
                                     ("", "a b", 2), ("a", "", 1)])
def test_edit_distance(a, b, n):
    assert edit_distance(a.split(), b.split()) == n


def test_error_rates_count_insertions():
    scores = Proportions()
    for found, right in (("a b", "a b"), ("a x y z", "a"), ("", "c d")):
        scores.add_errors("hearing 1 - WER", found.split(), right.split())
    assert scores.proportion("hearing 1 - WER") == 2 / 5 and scores.error_rate("hearing 1 - WER") == 5 / 5
    line = scores.line("hearing 1 - WER")
    assert line.startswith("0.400 [") and line.endswith("WER 1.000")


def test_wilson_interval():
    low, high = wilson(8, 10)
    assert math.isclose(low, 0.490, abs_tol=1e-3) and math.isclose(high, 0.943, abs_tol=1e-3)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-9) and wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(0, 0) == (0, 1)


class Agent:
    """Stands in for a DuplexModel: writes the answer to each request and makes noise for as long as it
    lasts."""

    def __init__(self, codec, items, delay=0.3, part=1.0, wrong=False):
        self.codec, self.delay, self.part = codec, delay, part
        self.spoken, self.levels = {}, itertools.count()  # audio -> the words in it; each has its own level
        self.answers = {len(read_audio(d["turns"][0]["path"])): d["turns"][1] for d in items}
        self.vocab = types.SimpleNamespace(wait=0)
        words = sorted({w for t in self.answers.values() for w in t["text"].split()})
        self.ids = {w: i + 1 for i, w in enumerate(words)}
        decode = lambda t: b" x" if wrong else f" {words[t - 1]}".encode()
        self.tokenizer = types.SimpleNamespace(decode_single_token_bytes=decode)

    device = torch.device("cpu")

    def converse(self, heard, seed, each):
        texts, audio = [], []
        for x in heard:
            text, y = torch.zeros(-(-len(x) // FRAME), dtype=torch.long), torch.zeros_like(x)
            a, b = x.nonzero()[[0, -1], 0].tolist()
            turn = self.answers[min(self.answers, key=lambda n: abs(n - (b + 1 - a)))]
            start = b + round(self.delay * SAMPLE_RATE)
            n = round(self.part * len(read_audio(turn["path"])))
            y[start:start + n] = noise(n / SAMPLE_RATE, 0.1 + 0.001 * next(self.levels))[:n]
            words = turn["text"].split()
            self.spoken[y.abs().max().item()] = words[:int(self.part * len(words))]
            for k, word in enumerate(words):
                text[b // FRAME + 1 + k] = self.ids[word]
            texts.append(text)
            audio.append(y)
        return torch.stack(texts), torch.stack(audio)


@pytest.mark.parametrize("agent, text, in_time, early, kept", [
    ({}, 1, 1, 0, 1), ({"wrong": True}, 0, 1, 0, 0), ({"delay": 0.6}, 1, 0, 0, 1),
    ({"delay": -0.1}, 1, 0, 1, 1),
    ({"part": 0.5}, 1, 1, 0, 0), ({"part": 0}, 1, 0, 0, 0)])
def test_answers_of_agents_with_known_scores(world, agent, text, in_time, early, kept):
    items = [d for d in read_manifest(str(world / "toy/manifest.jsonl"))
             if d["kind"] in ("repeat", "count", "next")]
    scores, agent = Proportions(), Agent(Mimi.load(str(world / "codec.pt")), items, **agent)
    recogniser = types.SimpleNamespace(hear=lambda wav: agent.spoken[wav.abs().max().item()])
    answers(agent, recogniser, items, 1, scores, "seen")
    assert scores.n["seen text"] == len(items) and scores.n["seen kept on"] > 0
    found = [scores.proportion(f"seen {m}") for m in ("text", "in time", "early", "kept on")]
    assert found == [text, in_time, early, kept]


def test_hearing_reads_only_what_is_heard(world):
    """ASR style on an untrained model: every clip counts, and what is written depends on it."""
    items = [d for d in read_manifest(str(world / "toy/manifest.jsonl")) if d["kind"] == "heard"][:6]
    scores = Proportions()
    hearing(DuplexModel.load(str(world / "flm")), items, scores, "seen")
    assert scores.n["seen hearing 1 - WER"] == sum(len(d["turns"][0]["text"].split()) for d in items)
    assert scores.n["seen hearing 1 - CER"] == sum(len(d["turns"][0]["text"].replace(" ", "")) for d in items)


def test_the_whole_on_an_untrained_model(world, tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "TAIL", 0.5)
    asr = tmp_path / "asr.py"
    asr.write_text("import sys, soundfile\nassert soundfile.info(sys.argv[1]).frames\nprint('One, two!')\n")
    code, out, err = run("eval.py", "--checkpoint", world / "flm", "--data", world / "toy", "--items", 2,
                         "--asr", f"{sys.executable} {asr} {{wav}}", "--keep", tmp_path / "talks")
    assert code == 0, err
    assert "seed 7" in out and out.splitlines()[-1].startswith("Wrote")
    result = json.load(open(world / "flm/eval.json"))
    assert result["shares"]["seen text"][1] == result["shares"]["new text"][1] == 2
    assert result["turns"]["turn-taking"]["TOR"]["n"] == result["turns"]["model interrupt"]["TOR"]["n"] == 2
    assert result["turns"] == json.loads(json.dumps(score_all(read_conversations(str(tmp_path / "talks")))))
    assert out.count("user: ") >= 2 and list((world / "flm/samples").glob("*.wav"))


def test_a_machine_that_is_too_slow_takes_fewer_items(world, monkeypatch):
    """However slow: an item of each kind at least."""
    monkeypatch.setattr(turns, "TAIL", 0.5)
    asr = f"{sys.executable} -c \"print('one')\" {{wav}}"
    for minutes, n in ((1e-6, 1), (1e4, 3)):
        code, out, err = run("eval.py", "--checkpoint", world / "flm", "--data", world / "toy", "--items", 3,
                             "--asr", asr, "--only", "answers", "--minutes", minutes)
        assert code == 0, err
        assert ("% of the items" in out) == ("1% of the items: this machine needs more" in out) == (n == 1)
        assert json.load(open(world / "flm/eval-answers.json"))["shares"]["seen text"][1] == n


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    for name, voice in (("anna", "en-us+f4"), ("bert", "gmw/en+m2"), ("carl", "en-us+m1")):
        for i, word in enumerate(LANGUAGES["en"].numbers[:2 if name == "carl" else 10]):
            record(str(folder / f"recordings/{i}_{name}_0.wav"), word, voice, 8000)
    return folder


def test_strangers_are_heard_through_microphones(people):
    groups = make_strangers(str(people), "anna,bert", None, 7, 4)
    flite = {"flite:awb", "flite:slt"} if shutil.which("flite") else set()
    assert set(groups) == flite | {"anna", "bert"} | {f"all, {name}" for name in MICROPHONES}
    for name, items in groups.items():
        assert len(items) == 4
        for heard, answer in items:
            assert torch.isfinite(heard).all() and answer
            assert all(word in LANGUAGES["en"].words for word in answer)
    for heard, _ in groups["all, noise, 10 dB"]:
        spoken = heard[SAMPLE_RATE:].split(SAMPLE_RATE // 2)[0].square().mean()  # the first half second of it
        before = heard[:SAMPLE_RATE // 2].square().mean()
        assert -20 < 10 * math.log10(before / spoken) < -3
    again = make_strangers(str(people), "anna,bert", None, 7, 4)
    assert all(torch.equal(x, y) for name in groups for (x, _), (y, _) in zip(groups[name], again[name]))


def test_understanding_strangers_is_scored(people):
    """By a stand-in that always writes the answer to the first request."""
    groups = {"anna": make_strangers(str(people), "anna", None, 7, 3)["anna"]}
    words = groups["anna"][0][1]

    def converse(heard, seed, each):
        text = torch.zeros(len(heard), 60, dtype=torch.long)
        text[:, 20:20 + len(words)] = torch.arange(1, len(words) + 1)
        return text, heard
    agent = types.SimpleNamespace(
        device=torch.device("cpu"), converse=converse, vocab=types.SimpleNamespace(wait=0),
        tokenizer=types.SimpleNamespace(decode_single_token_bytes=lambda t: f" {words[t - 1]}".encode()))
    scores = Proportions()
    understands(agent, groups["anna"], 7, scores, "anna", ("anna text", "anna 1 - WER"))
    right = sum(answer == words for _, answer in groups["anna"])
    assert (scores.hits["anna text"], scores.n["anna text"]) == (right, 3) and right >= 1
    assert scores.n["anna 1 - WER"] == sum(len(answer) for _, answer in groups["anna"])


def test_nobody_of_that_name(world, people):
    for speakers, folder, message in (
            ("eve", people, "nobody called eve"), ("carl", people, "nobody called carl"),
            ("", world, "holds no recording of a word")):
        code, _, err = run("eval.py", "--checkpoint", world / "flm", "--data", world / "toy", "--items", 1,
                           "--asr", "echo {wav}", "--people", folder, "--speakers", speakers)
        assert code == 1 and message in err.splitlines()[-1]


def test_the_codec_alone(world, tmp_path):
    asr = tmp_path / "asr.py"
    asr.write_text("print('one two')")
    code, out, err = run("eval.py", "--codec", world / "codec.pt", "--data", world / "toy", "--items", 2,
                         "--asr", f"{sys.executable} {asr} {{wav}}")
    assert code == 0, err
    lines = [line for line in out.splitlines() if "log-mel distance" in line]
    assert len(lines) == 3
    assert all("2 clips" in line and "original 0." in line and "codec 0." in line for line in lines)


def test_the_recogniser_learns_from_originals(world, tmp_path):
    """A few steps on a few clips: it becomes better at reading them, and is found again."""
    task = RecogniserTask(RecogniserConfig(width=32, blocks=1), str(world / "toy"), "cpu")
    stage = Stage("recogniser", 60, 2, 3e-3, 0)
    train(task, [stage], str(tmp_path))
    losses = [json.loads(line)["letters"] for line in open(tmp_path / "log.jsonl")]
    assert losses[-1] < 0.7 * losses[0]


def test_the_recogniser_in_weights_judges_what_it_knows(world, tmp_path, monkeypatch):
    """Any words of its own; for others one is trained, and for those who ask for one by --asr-minutes."""
    safetensors = pytest.importorskip("safetensors.torch", reason="the extra 'weights' is not installed")
    path, data = tmp_path / "recogniser.safetensors", str(world / "toy")
    one = recogniser.Recogniser(RecogniserConfig(letters="abc"))
    recogniser.save_recogniser(one, recogniser.words_of(data), str(path))
    monkeypatch.setattr(recogniser, "SHIPPED", str(path))
    monkeypatch.setattr(recogniser, "train_recogniser", lambda *args: args)
    again = recogniser.get_recogniser(None, data, "out", None, "cpu")
    assert again.letters == "abc" and not again.training
    for name, x in one.state_dict().items():
        assert torch.equal(again.state_dict()[name], x.half().float())
    assert recogniser.get_recogniser(None, data, "out", 2.0, "cpu") == (data, "out", 2.0, "cpu")
    recogniser.save_recogniser(one, {"cat"}, str(path))
    assert recogniser.get_recogniser(None, data, "out", None, "cpu") == (data, "out", None, "cpu")
    safetensors.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not what `python -m evals.recogniser` writes"):
        recogniser.get_recogniser(None, data, "out", None, "cpu")
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        recogniser.get_recogniser(None, data, "out", None, "cpu")


def test_a_recogniser_command_that_fails_is_a_clear_error(world):
    for command, message in (("false {wav}", "failed"), ("echo hello", "does not occur")):
        code, _, err = run("eval.py", "--checkpoint", world / "flm", "--data", world / "toy", "--items", 1,
                           "--asr", command)
        assert code == 1 and message in err.splitlines()[-1]
