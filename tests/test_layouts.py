"""The layouts of other papers: worked examples by hand, and streaming against teacher forcing for each."""
import dataclasses
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FLM, run
from test_streams import MODEL, R, USER, A, E, V, W, said

import train
from chat import DuplexModel
from layouts.division import divide
from layouts.prompts import ROLES, in_role, make_prompt, prompt
from layouts.show import DATA as SHOWN
from layouts.states import states, waits
from layouts.typed import typed, typed_tokens
from layouts.voices import decoupled, readings, voiced
from live.engine import Engine
from mimi import FRAME
from questions.layouts import DividedFLM
from streams import LISTEN, ROWS, SPEAK, TEXT, pack, response_tts

NAMES = ["states:states", "states:waits", "typed:typed", "typed:typed_counts", "prompts:prompted",
         "voices:voiced"]
SHIFT, BREAK = 1, 2


class Data:
    vocab = V

    class tokenizer:
        encode_ordinary = lambda text: [{"\x1d": SHIFT, "\x1e": BREAK}[text]]


class Never:
    """Random numbers of a user who never interrupts, or always after 3 frames."""
    def __init__(self, number):
        self.random, self.randint = lambda: number, lambda a, b: 3


def test_state_tokens():
    grid = states([(USER, MODEL)], [2], Data, Never(1.0))
    #                              the user is heard, then SHIFT, the answer; BREAK after its last frame
    assert grid[TEXT].tolist() == [W, W, W, W, W, SHIFT, 5, 6, 7, W, W, W, W, BREAK]
    assert grid[SPEAK][0].tolist() == [0] * 8 + [30, 31, 32, 33, 34, 0]
    grid = states([(USER, MODEL), (USER, MODEL)], [0, 3], Data, Never(1.0))
    assert grid[TEXT].tolist() == ([W, W, W, SHIFT, 5, 6, 7] + [W] * 5 + [BREAK, W, W, W, W]
                                   + [SHIFT, 5, 6, 7] + [W] * 4 + [BREAK])
    assert grid[SPEAK][0].tolist() == [0] * 6 + [30, 31, 32, 33, 34, 9] + [0] * 8 + [30, 31, 32, 33, 34, 0]
    plain = waits([(USER, MODEL), (USER, MODEL)], [0, 3], Data, Never(1.0))
    assert plain.tolist() == response_tts([(USER, MODEL), (USER, MODEL)], [0, 3], V).tolist()


def test_an_interrupted_answer_ends_with_break_where_the_model_falls_silent():
    long, loud = said([5] * 12, 30, 14), said([8], 20, 10)
    grid = states([(USER, long), (loud, MODEL)], [0, 0], Data, Never(0.0))
    # audio from frame 6; interrupted 3 frames later, at 9; silent from 9 + 6
    assert grid[TEXT].tolist() == ([W, W, W, SHIFT] + [5] * 11 + [BREAK, W, W, W] + [SHIFT, 5, 6, 7] + [W] * 4
                                   + [BREAK])
    assert grid[SPEAK][0].tolist() == [0] * 6 + [30 + i for i in range(9)] + [0] * 7 + [30, 31, 32, 33, 34, 0]
    plain = waits([(USER, long), (loud, MODEL)], [0, 0], Data, Never(0.0))
    assert plain[SPEAK][0].tolist() == [0] * 5 + [30 + i for i in range(9)] + [0] * 6 + [30, 31, 32, 33, 34]


def test_a_typed_turn():
    first = iter([True, False])
    grid = typed([(USER, MODEL), (USER, MODEL)], [1, 2], Data, None, lambda user, rng: next(first))
    text = [W, A, 3, 4, R, 5, 6, 7] + [W] * 9 + [5, 6, 7] + [W] * 4
    packed, loss = pack([grid], len(text), V)
    assert packed[TEXT].tolist() == text
    assert np.flatnonzero(~loss).tolist() == [1, 2, 3, 4], "the text row, from <asr> to <answer>"
    assert packed[SPEAK][0].tolist() == [0] * 7 + [30, 31, 32, 33, 34, 9] + [0] * 6 + [30, 31, 32, 33, 34]
    assert packed[LISTEN][0].tolist() == [1] + [0] * 13 + [20, 21, 22, 9] + [0] * 6


def test_a_prompt():
    before = prompt([8, 9], said([], 40, 3).codes, V)
    packed, loss = pack([before, response_tts([(USER, MODEL)], [1], V)], 17, V)
    assert packed[TEXT].tolist() == [8, 9, W, W, W, W] + [W, W, W, W, 5, 6, 7, W, W, W, W]
    assert packed[SPEAK][0].tolist() == [E, E, 40, 41, 42, E] + [0] * 6 + [30, 31, 32, 33, 34]
    assert packed[SPEAK][1].tolist() == [E, E, E, 40, 41, 42, E] + [0] * 6 + [30, 31, 32, 33]
    assert packed[LISTEN][0].tolist() == [E] * 6 + [1, 20, 21, 22, 9] + [0] * 6
    assert not loss[:2, :6].any() and loss[:2, 6:].all()
    assert not loss[2:LISTEN.start, 1:7].any() and loss[2:LISTEN.start, 7:].all()


def test_roles():
    words = said([2, 3, 4], 30, 9, starts=[0, 3, 7])  # 30 31 32 | 33 34 35 36 | 37 38
    assert list(ROLES) == ["", "say it twice", "say it backward"]
    once, twice, backward = (in_role(role, words, SHOWN.tokenizer) for role in ROLES)
    assert (once.tokens, once.codes[:, 0].tolist()) == ([2, 3, 4], list(range(30, 39)))
    assert (twice.tokens, twice.codes[:, 0].tolist()) == ([2, 3, 4] * 2, [*range(30, 39)] * 2)
    assert backward.tokens == [4, 3, 2] and backward.speech == 9
    assert backward.codes[:, 0].tolist() == [37, 38, 33, 34, 35, 36, 30, 31, 32]


class Voices:
    """Data in which two voices answer and read, and a third only reads."""
    vocab = V
    lines = [[("a", 30)], [("b", 40)], [("c", 50)], [("user", 20), ("a", 30)], [("user", 20), ("b", 40)]]
    said = {"train": [np.array([[0, 0], [1, 0], [2, 0], [3, 1], [4, 1]]), np.zeros((0, 2), int)]}
    encoded = SimpleNamespace(index={"turns": np.array([1, 1, 1, 2, 2])})

    def line(self, i):
        return {"turns": [{"voice": voice, "first": first} for voice, first in self.lines[i]]}

    def utterance(self, turn, rng):
        return said([8], turn["first"], 2)


def test_voices():
    data, (a, b) = Voices(), (dataclasses.replace(MODEL, voice=v) for v in "ab")
    assert readings(data) == ({"a": [(0, 0)], "b": [(1, 0)], "c": [(2, 0)]}, ["c"])
    grid = voiced([(USER, b), (USER, a), (USER, b)], [1, 1, 2], data, random.Random(0))
    packed, loss = pack([grid], grid.shape[1], V)
    answer = [30, 31, 32, 33, 34]
    assert packed[SPEAK][0].tolist() == [40, 41, E] + [0] * 6 + answer + [9] + [0] * 6 + answer
    assert not loss[:2, :3].any() and loss[:2, 3:].all()
    grid = decoupled([(USER, a)], [1], data, random.Random(0))
    packed, loss = pack([grid], grid.shape[1], V)
    assert packed[TEXT].tolist() == [W] * 7 + [8] + [W] * 3
    assert packed[SPEAK][0].tolist() == [50, 51, E] + [0] * 6 + [50, 51]
    assert not loss[TEXT].any(), "neither what was read nor when"
    assert loss[SPEAK.start, 3:].all()


def test_time_division():
    T = 10
    grid, loss = pack([response_tts([(USER, MODEL)], [0], V)], T, V)
    learn = torch.rand(1, T - 1) < 0.5
    grid, loss = torch.from_numpy(grid), torch.from_numpy(loss)
    two, learn_2, loss_2 = divide(grid[None], learn, loss[None, :9, 1:], V)
    assert [*two.shape, *learn_2.shape, *loss_2.shape] == [1, ROWS, 2 * T, 1, 2 * T - 1, 1, 9, 2 * T - 1]
    assert two[0, TEXT].tolist() == [x for token in grid[TEXT] for x in (token, W)]
    assert two[0, SPEAK][0].tolist() == [x for code in grid[SPEAK][0] for x in (code, E)]
    assert two[0, LISTEN][0].tolist() == [x for code in grid[LISTEN][0] for x in (E, code)]
    assert (torch.where(learn_2[0])[0] + 1).tolist() == [2 * (t + 1) for t in torch.where(learn[0])[0]]
    assert loss_2[..., 1::2].all() and not loss_2[..., ::2].any(), "targets are what is said"


def test_they_are_printed(capsys):
    sys.modules.pop("layouts.show")  # it is run as a program
    code, out, _ = run("streams.py")
    assert code == 0
    assert "text            · (<asr>) (how) (late) (<answer>) it is noon" in out
    assert "text            (say) (it) (twice)  (·)  (·)  (·)  (·)   ·" in out
    assert "SHIFT it is noon  ·  ·  ·  ·  ·  ·  ·  · BREAK" in out
    assert "listen semantic - · - 11" in out


# ---- training ----


@pytest.fixture(scope="module")
def task(world):
    return train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")


def stage(layout, **kwargs):
    return train.Stage("s", 2, 4, 1e-3, 0, 96, {layout: (1, 1)}, **kwargs)


@pytest.mark.parametrize("layout", NAMES)
def test_batches(task, layout):
    grid, learn, loss = task.batch(stage(layout), 0, "train", random.Random(0))
    assert grid.shape == (4, ROWS, 96) and loss.shape == (4, LISTEN.start, 95) and grid.min() >= 0
    assert loss.all() == layout.startswith("states:")
    assert not (learn & ~loss[:, SPEAK].any(1)).any()
    total, parts, _ = task.loss(stage(layout), (grid, learn, loss), task.totals((grid, learn, loss)))
    assert total.isfinite()
    text, _, _ = task.model(grid, learn)
    counted = text[loss[:, TEXT] & (grid[:, TEXT, 1:] != task.vocab.wait)]
    assert torch.allclose(parts["text_loss"], counted.mean(), atol=1e-5)


def plain_eq_3(flm, grid, learn, mask, v, gamma, totals):
    """Eq. 3 as it is without a mask."""
    text, right, codes = flm(grid, learn)
    wait = grid[:, TEXT, 1:] == v.wait
    real = grid[:, SPEAK, 1:].transpose(1, 2)[learn] != v.empty
    n = totals.clamp(min=1)
    semantic, acoustic = ((codes[:, k] * real[:, k]).sum() for k in (slice(0, 1), slice(1, None)))
    loss = (semantic / n[2] + 0.5 * (acoustic / n[3]) + (text * ~wait).sum() / n[0]
            + gamma * (text * wait).sum() / n[0])
    return loss, {}


def test_where_everything_counts_training_is_the_same_to_the_last_bit(world, monkeypatch):
    def trained():
        task = train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
        layouts = {"response_tts": (1, 1), "asr": (1, 1), "tts": (1, 1), "free_response_tts": (1, 1)}
        s = dataclasses.replace(stage("tts", wait=0.3, depth=(0.5, 0.2), frame_dropout=0.1), layouts=layouts)
        for step in range(3):
            batch = task.batch(s, 0, "train", random.Random(step))
            assert batch[2].all()
            task.loss(s, batch, task.totals(batch))[0].backward()
        return [p.grad for p in task.model.parameters()]
    masked = trained()
    monkeypatch.setattr(train, "eq_3", plain_eq_3)
    assert all(map(torch.equal, masked, trained()))


# ---- conversation ----


@pytest.fixture(scope="module")
def duplex(world):
    return DuplexModel.load(str(world / "flm"))


def voice(seed, frames=12):
    return torch.randn(frames * FRAME, generator=torch.Generator().manual_seed(seed)) * 0.1


def columns_of(duplex, converse):
    """What the model read, (B, 17, T), while `converse` ran."""
    columns, step = [], duplex.model.step
    duplex.model.step = lambda column, *a: columns.append(column.clone()) or step(column, *a)
    try:
        return converse(), torch.stack(columns, -1)
    finally:
        duplex.model.step = step


@pytest.mark.parametrize("layout", NAMES)
def test_streaming_equals_teacher_forced(task, duplex, layout):
    """Fed frame by frame, or a prompt's length prefilled and the rest fed."""
    grid = task.batch(stage(layout), 0, "train", random.Random(1))[0][:2]
    model = duplex.model
    with torch.no_grad():
        h = model.hidden(grid)
        for P in (0, 20):
            cache = model.init_cache(2)
            for row in range(2) if P else ():
                model.hidden(grid[row:row + 1, :, :P], cache.row(row))
            steps = torch.stack([model.hidden_step(grid[..., t], cache) for t in range(P, 96)], 1)
            assert (steps - h[:, P:]).abs().max() < 1e-5
            assert cache.position.tolist() == [96, 96]


def test_time_division_streaming_equals_teacher_forced(task, duplex, world):
    """A conversation in which each frame takes two steps, read again as the grid that training has."""
    other = DuplexModel.load(str(world / "flm"))
    other.model.__class__, other.model.vocab = DividedFLM, other.vocab
    (text, _), read = columns_of(other, lambda: other.converse(voice(0)[None]))
    nothing = torch.zeros(1, read.shape[-1] - 1, dtype=torch.bool)
    grid = divide(read, nothing, nothing[:, None].repeat(1, 9, 1), other.vocab)[0]
    with torch.no_grad():
        logits = duplex.model.text_logits(duplex.model.hidden(grid))[0, 1::2, :duplex.vocab.text_size]
    assert torch.equal(logits.argmax(-1), text[0])


def test_a_conversation_after_a_prompt_is_the_layout_of_training(duplex, tmp_path):
    """The prompt's columns and what was then read, teacher-forced, give the text that was written."""
    start = make_prompt(duplex, "say it twice")
    duplex.prompt = start
    try:
        (text, _), read = columns_of(duplex, lambda: duplex.converse(voice(0)[None]))
    finally:
        duplex.prompt = None
    P = start.shape[1]
    fill = duplex.vocab.empty
    assert (start[SPEAK] == fill).all() and (start[TEXT, -1] == duplex.vocab.wait)
    assert (read[0, 2:LISTEN.start, 0] == fill).all(), "the prompt's last column has no acoustic codes"
    grid = torch.cat([torch.from_numpy(start)[None], read], -1)
    with torch.no_grad():
        logits = duplex.model.text_logits(duplex.model.hidden(grid))[0, P:, :duplex.vocab.text_size]
    assert torch.equal(logits.argmax(-1), text[0])


def test_a_prompt_never_reaches_another_row(duplex):
    """Three conversations in an engine, two with prompts of different lengths, are each as if alone."""
    prompts = [None, make_prompt(duplex, "say it twice"), make_prompt(duplex, "up down left right " * 3)]

    def alone(i, prompt):
        engine = Engine(duplex, 1)
        return frames(engine, [engine.join(i, prompt)], [voice(i)])[0]

    def frames(engine, sessions, voices):
        out = [[] for _ in sessions]
        for t in range(12):
            for s, x in zip(sessions, voices):
                assert s.hear(x[t * FRAME:(t + 1) * FRAME])
            for s, (text, said) in engine.tick().items():
                out[sessions.index(s)].append((text, said))
        return out
    engine = Engine(duplex, 3)
    sessions = [engine.join(i, p) for i, p in enumerate(prompts)]
    together = frames(engine, sessions, [voice(i) for i in range(3)])
    for i, prompt_ in enumerate(prompts):
        for (a, x), (b, y) in zip(together[i], alone(i, prompt_), strict=True):
            assert a == b and (x - y).abs().max() < 1e-4
    assert engine.state.cache.position.tolist() == [12, 12 + prompts[1].shape[1], 12 + prompts[2].shape[1]]
    # a prompt is over with its session
    engine.leave(engine.sessions[1])
    again = frames(engine, [engine.join(0)], [voice(0)])[0]
    assert [a for a, _ in again] == [a for a, _ in together[0]]


def test_what_is_typed_stands_in_the_text_row_and_is_not_shown(duplex):
    tokens = typed_tokens("up down", duplex.vocab, duplex.tokenizer)
    assert tokens[0] == duplex.vocab.asr and tokens[-1] == duplex.vocab.answer and len(tokens) > 3
    (text, _), read = columns_of(duplex, lambda: duplex.converse(voice(1)[None], typed=tokens))
    n = len(tokens)
    assert read[0, TEXT, :n].tolist() == tokens
    assert (text[0, :n - 1] == duplex.vocab.wait).all() and text[0, n - 1] == read[0, TEXT, n]
    engine = Engine(duplex, 2)
    a, b = engine.join(1), engine.join(1)
    assert a.type(tokens) and not a.type(tokens)
    heard, found = voice(1), {a: [], b: []}
    for t in range(12):
        for s in (a, b):
            s.hear(heard[t * FRAME:(t + 1) * FRAME])
        for s, (token, _) in engine.tick().items():
            found[s].append(token)
    assert found[a] == text[0].tolist()
    assert found[b] == duplex.converse(heard[None])[0][0].tolist(), "the other row reads nothing of it"


def test_the_commands(world, tmp_path):
    out = tmp_path / "a.wav"
    code, text, err = run("chat.py", "--checkpoint", world / "flm", "--type", "repeat cat", "--output", out)
    assert code == 0 and f"Wrote {out}" in text, err
    clip = next((world / "toy/model").glob("*.flac"))
    code, text, err = run("chat.py", "--checkpoint", world / "flm", "--input", clip, "--output", out,
                          "--role", "say it twice", "--voice", clip)
    assert code == 0 and f"Wrote {out}" in text, err
    code, _, err = run("chat.py", "--checkpoint", world / "flm", "--input", clip, "--role", "cat " * 99)
    assert code == 1 and "shorten the role or the voice" in err and len(err.splitlines()) == 1
    no = tmp_path / "no.wav"
    code, _, err = run("chat.py", "--checkpoint", world / "flm", "--input", clip, "--voice", no)
    assert code == 1 and "no.wav" in err
