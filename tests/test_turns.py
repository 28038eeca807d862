"""Turn-taking: agents whose scores are known, scenarios as they are built, folders of conversations."""
import json
import math
import os
import types

import pytest
import torch

from evals import conversations, turns
from conftest import run
from chat import DuplexModel
from evals.conversations import converse_all, read_conversations, save_conversation
from files.audio import SAMPLE_RATE, write_audio
from files.manifest import read_manifest
from mimi import FRAME
from evals.turns import Item, Reply, ScenarioMaker, barge_in, jensen_shannon, run_scenarios, score_all, speech


def bursts(total, spans, level=0.1):
    """`total` seconds of silence with noise in it."""
    x = torch.zeros(round(total * SAMPLE_RATE))
    for a, b in spans:
        a, b = (max(0, min(len(x), round(t * SAMPLE_RATE))) for t in (a, b))
        x[a:b] = torch.randn(b - a, generator=torch.Generator().manual_seed(0)) * level
    return x


def items():
    """One item of each scenario, with noise for speech."""
    said = lambda *spans: bursts(spans[-1][1] + 10, spans)
    query = Item("query", "control", said((1, 3)), 3.0)
    return [
        Item("a", "turn-taking", said((1, 3)), 3.0),
        Item("b", "pause", said((1, 2), (2.8, 4)), 4.0, pause=(2.0, 2.8)),
        Item("c", "long pause", said((1, 2), (3.5, 5)), 5.0, pause=(2.0, 3.5)),
        query,
        Item("d", "user interrupt", said((1, 2.5)), 2.5), Item("e", "user backchannel", said((1, 1.6)), 1.6),
        Item("calm", "control", said((1, 12)), 12.0),
        Item("f", "model interrupt", said((1, 12)), 12.0, control="calm"),
        Item("g", "model backchannel", said((1, 15)), 15.0, clauses=(4.1, 8.1, 12.1))]


def perfect(item):
    """Replies 0.4 s after the user's end and speaks 6 s, stops 0.5 s after an interruption begins,
    backchannels at the clauses' ends, warns two seconds before the end."""
    if item.scenario == "model interrupt":
        return [(item.end - 2, item.end + 4)]
    backchannels = [(t, t + 0.3) for t in item.clauses]
    if item.event:
        begun = speech(item.audio)[0][1] + 0.4
        if item.scenario == "user backchannel":
            return [(begun, begun + 6)]
        return [(begun, item.event[0] + 0.5), (item.end + 0.4, item.end + 6.4)]
    return [*backchannels, (item.end + 0.4, item.end + 6.4)]


def endpointer(item):
    """Replies after 0.3 s of silence to whatever lasted a second, and yields to any audio of the user."""
    users, out = [*speech(item.audio, bridge=0.2), (math.inf, math.inf)], []
    for (a, b), (then, _) in zip(users, users[1:]):
        if b - a >= 0.9 and b + 0.3 < then:
            out.append((b + 0.3, min(b + 6.3, then)))
    return out


AGENTS = {"perfect": perfect, "always": lambda item: [(0, len(item.audio) / SAMPLE_RATE)],
          "mute": lambda item: [], "endpointer": endpointer}


def system(agent):
    """(run([items, ...], what) -> [replies, ...], all that it was asked)"""
    asked = []

    def run(groups, what):
        asked.extend(item for items in groups for item in items)
        reply = lambda item: Reply(speech(bursts(len(item.audio) / SAMPLE_RATE, agent(item))))
        return [[reply(item) for item in items] for items in groups]
    return run, asked


def run_all(agent):
    """All scenarios of items(), the interruptions in two passes."""
    run, _ = system(agent)
    some = items()
    query, others = some[3], some[4:6]
    replies = dict(zip((i.name for i in some), run([some], "")[0]))
    out = [(i, replies[i.name]) for i in some if i not in others]
    later = [i for i in (barge_in(query, replies["query"], other) for other in others) if i]
    return out + list(zip(later, run([later], "")[0]))


@pytest.mark.parametrize("scenario, measure, values", [
    # values: perfect, always, mute, endpointer ("-": not asked; None: nothing to measure)
    ("turn-taking", "TOR",                         (1, 1, 0, 1)),
    ("turn-taking", "JIR",                         (0, 1, 0, 0)),
    ("turn-taking", "latency",                     (0.4, None, None, 0.3)),
    ("pause", "TOR",                               (0, 1, 0, "-")),
    ("pause", "TOR as FLEXI counts",               (0, 0, 0, "-")),
    ("long pause", "TOR",                          (0, 1, 0, 1)),
    ("user interrupt", "TTR",                      (1, 0, None, "-")),
    ("user interrupt", "stop latency",             (0.5, None, None, "-")),
    ("user interrupt", "response latency",         (0.4, None, None, "-")),
    ("user interrupt", "overlap (FLEXI's latency)", (0.5, 1.5, None, "-")),
    ("model interrupt", "TOR",                     (1, 1, 0, 0)),
    ("model interrupt", "TOR minus control",       (1, 0, 0, 0)),
    ("user backchannel", "TTR",                    (0, 0, None, 1)),
    ("model backchannel", "TOR",                   (0, 1, 0, "-")),
    ("model backchannel", "BCR",                   (0.2, 0, 0, "-")),
    ("model backchannel", "JSD",                   (0, 1, 1, "-")),
])
def test_agents_with_known_answers(scenario, measure, values):
    for agent, value in zip(AGENTS, values):
        if value != "-":
            column = score_all(run_all(AGENTS[agent])).get(scenario, {}).get(measure)
            found = column["value"] if column else None
            assert found == (value if value is None else pytest.approx(value, abs=0.04)), agent


def test_an_endpointer_takes_a_pause_for_the_end():
    short = Item("x", "pause", bursts(15, [(1, 2), (2.8, 4)]), 4.0, pause=(2.0, 2.8))
    takes = lambda words: Reply(speech(bursts(15, endpointer(short))), [(2.2, text) for text in words])
    # It fits half a second of speech into the pause: a backchannel by its length, unless it is known to have
    # more than two words.
    row = lambda words: turns.score_pause(short, takes(words), None)
    assert row(["one ", "two ", "three"]) == {"TOR": True, "TOR as FLEXI counts": True}
    assert not row(["mhm"])["TOR"]


def test_a_stop_that_lasts_and_a_late_stop_are_seen():
    """What FLEXI's own scoring misses: endless silence after a backchannel; yielding without another word."""
    some = [x for x in run_all(perfect) if x[0].scenario in ("control", "user backchannel", "user interrupt")]
    for i, (item, reply) in enumerate(some):
        if item.event:
            some[i] = item, Reply([(reply.spans[0][0], item.event[0] + 0.5)])
    table = score_all(some)
    assert table["user backchannel"]["TTR"]["value"] == 1 and table["user interrupt"]["TTR"]["value"] == 1
    assert table["user interrupt"]["response latency"] == {"value": None, "n": 0}


def test_jensen_shannon():
    assert jensen_shannon([1.0, 2.0], [1.05, 2.1], 5) == pytest.approx(0)
    assert jensen_shannon([1.0], [3.0], 5) == pytest.approx(1) and jensen_shannon([], [1.0], 5) == 1
    assert jensen_shannon([1.0], [1.0, 3.0], 5) == pytest.approx(0.3113, abs=1e-4)


@pytest.fixture(scope="module")
def dialogues(world):
    return list(read_manifest(str(world / "toy/manifest.jsonl")))


def test_scenarios_as_they_are_built(dialogues):
    """Labels agree with the audio, and the perfect agent is perfect on them."""
    run, asked = system(perfect)
    table = score_all(run_scenarios(run, ScenarioMaker(dialogues, None, 3), 2))
    measures = ("TOR", "JIR", "TTR", "TOR minus control")
    assert {s: {m: c["value"] for m, c in table[s].items() if m in measures} for s in table} == {
        "turn-taking": {"TOR": 1, "JIR": 0}, "pause": {"TOR": 0}, "long pause": {"TOR": 0},
        "user interrupt": {"TTR": 1}, "model interrupt": {"TOR": 1, "TOR minus control": 1},
        "user backchannel": {"TTR": 0}, "model backchannel": {"TOR": 0}}
    assert table["turn-taking"]["latency"]["value"] == pytest.approx(0.4, abs=0.04)
    assert table["user interrupt"]["stop latency"]["value"] == pytest.approx(0.5, abs=0.04)
    for item in asked:
        spans = speech(item.audio, bridge=0.35)
        assert spans[-1][1] == pytest.approx(item.end, abs=0.08)
        assert len(item.audio) / SAMPLE_RATE == pytest.approx(item.end + 10, abs=0.01)
        assert -0.04 <= spans[0][0] - 1 <= 0.3  # a word may begin softly, as "happy" does
        if item.pause:
            low, high = {"pause": (0.64, 0.89), "long pause": (1.5, 1.5)}[item.scenario]
            assert low <= round(item.pause[1] - item.pause[0], 6) <= high
            assert len(spans) == 2 and spans[0][1] == pytest.approx(item.pause[0], abs=0.08)
            assert -0.04 <= spans[1][0] - item.pause[1] <= 0.3
        if item.event:
            assert any(a == pytest.approx(item.event[0], abs=0.04) for a, _ in spans)
        if item.scenario == "user backchannel":
            assert 0.2 <= item.event[1] - item.event[0] <= 0.9
        if item.scenario == "model backchannel":
            assert len(item.clauses) == 11
            assert all(any(b == pytest.approx(t, abs=0.12) for _, b in spans) for t in item.clauses)
    assert len({item.name for item in asked}) == len(asked)
    hazards = {i.name: i for i in asked}
    for item in hazards.values():
        if item.scenario == "model interrupt":
            calm = hazards[item.control]
            same = item.audio[:SAMPLE_RATE * 2] == calm.audio[:SAMPLE_RATE * 2]
            assert same.float().mean() > 0.3 and calm.scenario == "control"


def test_nothing_before_an_event_depends_on_it(world, dialogues):
    """Two passes that differ from the event on: text and audio up to it are the same to the last bit."""
    duplex, make = DuplexModel.load(str(world / "flm")), ScenarioMaker(dialogues, None, 1)
    queries = [make.request("control", "chant") for _ in range(3)]
    fake = [Reply([(item.end + 0.4, item.end + 6)]) for item in queries]
    other = lambda: make.backchannel("user backchannel")
    later = [barge_in(item, reply, other()) for item, reply in zip(queries, fake)]
    converse = lambda items: zip(*next(converse_all(duplex, [[item.audio for item in items]], 1, "")))
    (texts, audio), (texts2, audio2) = converse(queries), converse(later)
    for item, a, b, x, y in zip(later, texts, texts2, audio, audio2):
        n = int(item.event[0] * SAMPLE_RATE)
        t = int(item.event[0] * 12.5)
        assert torch.equal(a[:t], b[:t]) and torch.equal(x[:n], y[:n])
        assert x[:n].abs().max() > 0 and not torch.equal(x[n:], y[n:len(x)])


def test_batches_do_not_depend_on_the_number_of_cores(monkeypatch):
    """Nor do seeds: each recording gets the same conversation on every machine."""
    class Fake:
        device = torch.device("cpu")

        def converse(self, wav, seed, each):
            shapes.append((seed, *wav.shape))
            seeds = torch.arange(seed, seed + len(wav))
            return torch.zeros(len(wav), 1), seeds[:, None].repeat(1, wav.shape[1])
    found = []
    for cores in (1, 2, 64):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        shapes = []
        groups = [[torch.zeros(10 + i) for i in range(n)] for n in (60, 3)]
        for n, out in zip((60, 3), converse_all(Fake(), groups, 5, ""), strict=True):
            assert [(len(said), said[0].item()) for _, said in out] == [(10 + i, 5 + i) for i in range(n)]
        found.append(sorted(shapes))
    assert found[0] == found[1] == found[2]


def test_the_minutes_of_scenarios_are_reckoned_from_their_frames(dialogues, monkeypatch, capsys):
    """On a machine that needs a second for twelve frames of a full batch on each core."""
    run, frames = system(perfect)[0], []

    def counting(groups, description):
        frames.extend(-(-max(len(item.audio) for item in items) // FRAME) for items in groups)
        return run(groups, description)
    run_scenarios(counting, ScenarioMaker(dialogues, None, 3), conversations.BATCH)
    clock = iter(range(100))
    monkeypatch.setattr(conversations.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(conversations, "converse_all", lambda *args: [])
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    device = types.SimpleNamespace(device=torch.device("cpu"))
    share = lambda minutes, n, answers=0: conversations.share_within(minutes, answers, n, device)
    minutes = sum(frames) / 12 / 60 / 4
    assert share(1.25 * minutes, conversations.BATCH) == 1 and not capsys.readouterr().out
    assert 0.7 <= share(5 * minutes, 6 * conversations.BATCH) <= 5 / 6  # with something left for the rest
    few = share(0.7 * minutes, conversations.BATCH)
    assert 0.3 <= few <= 0.7 and f"{few:.0%} of the items, to end" in capsys.readouterr().out
    assert share(0.7 * minutes, conversations.BATCH, 100) < few < share(1, 0, 100) == 1
    assert share(0.1 * minutes, conversations.BATCH) == 0.01
    assert "this machine needs more than" in capsys.readouterr().out


def test_folders_of_conversations(tmp_path):
    """What was kept is read again with the same scores, through the command line too."""
    before = run_all(perfect)
    for item, reply in before:
        save_conversation(str(tmp_path / "talks"), item, bursts(len(item.audio) / SAMPLE_RATE, reply.spans),
                          [(0.5, "hello "), (1.5, "you")])
    after = read_conversations(str(tmp_path / "talks"))
    plain = lambda talks: score_all([(i, Reply(r.spans)) for i, r in talks])
    assert plain(after) == plain(before)
    assert after[0][1].written == [(0.5, "hello "), (1.5, "you")]
    code, out, err = run("eval.py", "--folder", tmp_path / "talks")
    assert code == 0 and "user interrupt" in out and "Moshi" in out and "not comparable" in out, err


def test_full_duplex_bench_v1(tmp_path):
    """Its folders as they are: one label file beside input.wav and output.wav."""
    def add(name, file, facts, user, model):
        (tmp_path / name).mkdir()
        for wav, spans in (("input.wav", user), ("output.wav", model)):
            write_audio(str(tmp_path / name / wav), bursts(12, spans))
        (tmp_path / name / file).write_text(json.dumps(facts))
    add("1", "pause.json", [{"text": "[PAUSE]", "timestamp": [2.0, 2.8]}], [(1, 2), (2.8, 4)], [(2.2, 3.5)])
    add("2", "turn_taking.json", [{"text": "[TURN-TAKING]", "timestamp": [3.0, 4.0]}], [(1, 3)], [(3.5, 6)])
    add("3", "interrupt.json", [{"context": "c", "interrupt": "i", "timestamp": [5.0, 6.5]}],
        [(1, 3), (5, 6.5)], [(3.2, 5.4), (7, 9)])
    add("4", "transcription.json", {"text": "", "chunks": []}, [(1, 8)], [(2, 2.5), (5, 5.4), (9, 11)])
    add("5", "transcription.json", {"text": "", "chunks": []}, [(1, 8)], [(2, 5)])
    table = score_all(read_conversations(str(tmp_path)))
    assert table["model backchannel"]["TOR"]["value"] == 0.5 and "JSD" not in table["model backchannel"]
    assert table["model backchannel"]["BCR"]["value"] == pytest.approx(1 / 8, abs=0.001)
    assert table["pause"]["TOR"]["value"] == 1
    assert table["turn-taking"]["latency"]["value"] == pytest.approx(0.5, abs=0.04)
    assert table["user interrupt"]["stop latency"]["value"] == pytest.approx(0.4, abs=0.04)


@pytest.mark.parametrize("broken, says", [
    (lambda f: (f / "meta.json").write_text("[]"), "meta.json"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json"),
    (lambda f: (f / "meta.json").write_text('{"scenario": "chess", "end": 2}'), "chess"),
    (lambda f: (f / "meta.json").write_text('{"scenario": "pause", "end": "late"}'), "meta.json"),
    (lambda f: (f / "meta.json").write_text('{"scenario": "pause", "end": 2}'), "pause"),
    (lambda f: (f / "output.wav").unlink(), "output.wav"),
    (lambda f: (f / "output.wav").write_bytes(b"RIFF"), "output.wav"),
    (lambda f: (f / "meta.json").unlink(), "holds no folder")])
def test_broken_folders(tmp_path, broken, says):
    item, reply = run_all(perfect)[0]
    save_conversation(str(tmp_path), item, bursts(13, reply.spans), [])
    broken(tmp_path / item.name)
    code, _, err = run("eval.py", "--folder", tmp_path)
    assert code == 1 and says in err.splitlines()[-1], err
