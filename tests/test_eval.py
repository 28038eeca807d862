"""The measures, on systems whose behaviour is known, and eval.py as a whole on an untrained model."""
import json
import math
import sys
import types

import pytest
import torch

import eval as evaluation
from conftest import run
from chat import speech
from eval import Shares, interruptions, wilson, word_errors
from mimi import FRAME, SAMPLE_RATE, read_audio


def noise(seconds, level=0.1):
    return torch.randn(round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0)) * level


def silence(seconds):
    return torch.zeros(round(seconds * SAMPLE_RATE))


def test_speech_is_found_where_it_is():
    x = torch.cat([silence(1), noise(0.5), silence(0.2), noise(0.4), silence(0.5), noise(0.06), silence(0.5), noise(1)])
    spans = speech(x)  # the 0.2 s gap is bridged, the 0.06 s burst dropped
    assert len(spans) == 2
    for (a, b), (c, d) in zip(spans, [(1.0, 2.1), (3.16, 4.16)]):
        assert abs(a - c) <= 0.04 and abs(b - d) <= 0.04
    assert speech(silence(1)) == [] and speech(noise(1, 0.001)) == []


@pytest.mark.parametrize("a, b, n", [("a b c", "a b c", 0), ("a c", "a b c", 1), ("a x c d", "a b c", 2), ("", "a b", 2), ("a", "", 1)])
def test_word_errors(a, b, n):
    assert word_errors(a.split(), b.split()) == n


def test_wilson_interval():
    low, high = wilson(8, 10)
    assert math.isclose(low, 0.490, abs_tol=1e-3) and math.isclose(high, 0.943, abs_tol=1e-3)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-9) and wilson(10, 10)[1] == pytest.approx(1) and wilson(0, 0) == (0, 1)


class Agent:
    """Stands in for a Speaker: replies 0.4 s after the user has been silent for good, for as long as its answer lasts;
    stops (or not) 0.5 s after the user breaks in; writes the answer to the last request."""

    def __init__(self, items, stops=True, talks=True, gives_up=False):
        self.answers = {round(len(read_audio(d["turns"][0]["path"])) / SAMPLE_RATE, 2): d for d in items}
        self.stops, self.talks, self.gives_up = stops, talks, gives_up
        self.vocab = types.SimpleNamespace(wait=0)
        self.words = ["<wait>"]
        self.tokenizer = types.SimpleNamespace(decode=lambda tokens: " ".join(self.words[t] for t in tokens))

    def converse(self, heard, seed, progress):
        texts, sounds = [], []
        for x in heard:
            text, y = torch.zeros(-(-len(x) // FRAME), dtype=torch.long), torch.zeros_like(x)
            turns = speech(x, bridge=0.5)
            for i, (a, b) in enumerate(turns):
                d = min(self.answers.items(), key=lambda kv: abs(kv[0] - (b - a)))[1]
                start, last = b + 0.4, len(read_audio(d["turns"][1]["path"])) / SAMPLE_RATE
                stop = start + (0.8 if self.gives_up else last)
                if self.stops and i + 1 < len(turns):
                    stop = min(stop, turns[i + 1][0] + 0.5)
                if self.talks:
                    n = len(y[round(start * SAMPLE_RATE):round(stop * SAMPLE_RATE)])
                    y[round(start * SAMPLE_RATE):round(start * SAMPLE_RATE) + n] = noise(n / SAMPLE_RATE)[:n]
                    for k, word in enumerate(d["turns"][1]["text"].split()):
                        self.words.append(word)
                        text[int(b * 12.5) + 1 + k] = len(self.words) - 1
            texts.append(text)
            sounds.append(y)
        return torch.stack(texts), torch.stack(sounds)


@pytest.fixture(scope="module")
def items(world):
    items = [d for d in evaluation.read_manifest(str(world / "toy/manifest.jsonl")) if len(d["turns"]) == 2]
    chosen, lengths = [], []  # requests that differ in length: the agent knows them by it
    for d in sorted(items, key=lambda d: -len(d["turns"][1]["starts"])):
        length = len(read_audio(d["turns"][0]["path"])) / SAMPLE_RATE
        if all(abs(length - other) > 0.15 for other in lengths):
            chosen.append(d)
            lengths.append(length)
    assert len(chosen) > 3 and len(chosen[0]["turns"][1]["starts"]) >= 6
    return chosen


@pytest.mark.parametrize("agent, kept, silent, answered", [
    ({}, 1, 1, 1), ({"stops": False}, 1, 0, 1), ({"talks": False}, 0, None, None), ({"gives_up": True}, 0, 1, 1)])
def test_interruptions_of_agents_with_known_answers(items, agent, kept, silent, answered):
    shares = Shares()
    interruptions(Agent(items, **agent), items, 12, 1, shares)
    assert shares.n["kept on"] == 12 and shares.share("kept on") == kept
    if silent is None:
        assert shares.n["interrupted: silent within 1 s"] == 0
    else:
        assert shares.share("interrupted: silent within 1 s") == silent
        assert shares.share("interrupted: new request answered") == answered


def test_the_whole_on_an_untrained_model(world, tmp_path):
    asr = tmp_path / "asr.py"
    asr.write_text("import sys, soundfile\nassert soundfile.info(sys.argv[1]).frames\nprint('One, two!')\n")
    code, out, err = run("eval.py", "--checkpoint", world / "flm", "--data", world / "toy", "--items", 3, "--asr",
                         f"{sys.executable} {asr} {{wav}}")
    assert code == 0, err
    assert "seed 7" in out and out.splitlines()[-1].startswith("Wrote")
    result = json.load(open(world / "flm/eval.json"))
    assert result["shares"]["seen text"][1] == result["shares"]["new text"][1] == 3
    assert out.count("user: ") >= 2 and list((world / "flm/samples").glob("*.wav"))


def test_the_codec_alone(world, tmp_path):
    asr = tmp_path / "asr.py"
    asr.write_text("print('one two')")
    code, out, err = run("eval.py", "--codec", world / "codec.pt", "--data", world / "toy", "--items", 2, "--asr",
                         f"{sys.executable} {asr} {{wav}}")
    assert code == 0, err
    lines = [line for line in out.splitlines() if "log-mel distance" in line]
    assert len(lines) == 3 and all("2 clips" in line and "original 0." in line and "codec 0." in line for line in lines)


def test_the_recogniser_learns_from_originals(world, tmp_path):
    """A few steps on a few clips: it becomes better at reading them, and is found again."""
    job = evaluation.RecogniserJob(evaluation.RecogniserConfig(width=32, blocks=1), str(world / "toy"), "cpu")
    stage = evaluation.Stage("recogniser", 60, 2, 3e-3, 0)
    evaluation.train.train(job, [stage], str(tmp_path))
    losses = [json.loads(line)["letters"] for line in open(tmp_path / "log.jsonl")]
    assert losses[-1] < 0.7 * losses[0]


def test_a_recogniser_command_that_fails_is_a_clear_error(world):
    for command, message in (("false {wav}", "failed"), ("echo hello", "does not occur")):
        code, _, err = run("eval.py", "--checkpoint", world / "flm", "--data", world / "toy", "--items", 1, "--asr", command)
        assert code == 1 and message in err.splitlines()[-1]
