"""Conversations frame by frame: as training saw them, the same alone and in a batch, without end."""
import contextlib
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from chat import DuplexModel
from live.engine import QUEUE, Engine
from kernels.sampling import Sampling
from mimi import FRAME, tensors
from streams import LISTEN, ROWS, SPEAK, TEXT, delay


def noise(frames, seed=0):
    return torch.randn(frames * FRAME, generator=torch.Generator().manual_seed(seed)) * 0.1


def duplex_of(world, context=128, device="cpu"):
    """One that draws at random and remembers `context` frames."""
    duplex = DuplexModel.load(str(world / "flm"), device, Sampling(1.0, penalty=1.2), Sampling(1.0))
    duplex.model.config = replace(duplex.model.config, context=context)
    return duplex


def alone(duplex, heard, seed):
    """What a conversation alone gives for frames [(1920,), ...]: [(text token, audio (1920,)), ...]"""
    text, said = duplex.converse(torch.cat([*heard, torch.zeros(FRAME)])[None], seed)
    return list(zip(text[0, :len(heard)].tolist(), said[0, FRAME:].split(FRAME)))


def same(a, b):
    """The same tokens; and the same audio, but for the order in which sums over more rows are made."""
    return ([x[0] for x in a] == [x[0] for x in b]
            and all((x[1] - y[1]).abs().max() < 1e-5 for x, y in zip(a, b, strict=True)))


# ------------------------------------------------------------------------------------------------------------
# one conversation


def test_what_is_heard_later_changes_nothing_before(world):
    duplex = DuplexModel.load(str(world / "flm"))
    x = torch.randn(1, 10 * FRAME, generator=torch.Generator().manual_seed(0)) * 0.1
    y = x.clone()
    y[:, 6 * FRAME:] = 0
    (text_a, said_a), (text_b, said_b) = duplex.converse(x), duplex.converse(y)
    assert torch.equal(text_a[:, :6], text_b[:, :6])
    assert torch.equal(said_a[:, :7 * FRAME], said_b[:, :7 * FRAME])
    assert (said_a[:, :FRAME] == 0).all()  # nothing can be said about what has not been heard


def test_a_conversation_is_the_grid_that_training_sees(world):
    """Replay what a conversation heard, wrote and said as a delayed grid, teacher-forced: the same choices
    come out."""
    duplex = DuplexModel.load(str(world / "flm"))
    x = torch.randn(1, 12 * FRAME, generator=torch.Generator().manual_seed(0)) * 0.1
    columns, step = [], duplex.model.step
    duplex.model.step = lambda column, *a: columns.append(column.clone()) or step(column, *a)
    text, _ = duplex.converse(x)
    grid = torch.stack(columns, -1)  # (1, 17, T)
    heard = duplex.codec.encode(x[:, None])[0]
    undelayed = np.concatenate([grid[0, :LISTEN.start].numpy(), heard.numpy()])
    assert (delay(undelayed, duplex.vocab.empty)[LISTEN] == grid[0, LISTEN].numpy()).all()
    h = duplex.model.hidden(grid)
    assert (duplex.model.text_logits(h)[0, :-1].argmax(-1) == grid[0, TEXT, 1:]).all()
    logits = duplex.model.depth.logits(h[0, :-1], grid[0, SPEAK, 1:].T)
    codes = logits[..., :duplex.vocab.codebook_size].argmax(-1)
    assert (codes == grid[0, SPEAK, 1:].T).float().mean() > 0.99


def test_a_second_conversation_equals_the_first_and_seeds_matter(world):
    duplex = DuplexModel.load(str(world / "flm"), text=Sampling(1.0), audio=Sampling(1.0))
    x = torch.zeros(1, 8 * FRAME)
    a, b, c = duplex.converse(x, seed=1)[0], duplex.converse(x, seed=1)[0], duplex.converse(x, seed=2)[0]
    assert torch.equal(a, b) and not torch.equal(a, c)
    both = duplex.converse(x.repeat(2, 1), seed=1)[0]
    assert torch.equal(both, torch.cat([a, c])), "alone or among others, a conversation draws the same"


def test_logits_that_are_not_numbers_stop_the_conversation(world):
    duplex = DuplexModel.load(str(world / "flm"))
    with torch.no_grad():
        duplex.model.head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not numbers"):
        duplex.converse(torch.zeros(1, 3 * FRAME))


def test_a_frame_never_waits_for_its_device(world, monkeypatch):
    """From PyTorch's meta device nothing can be read back; a frame runs there, in bfloat16, so a GPU's can
    be captured."""
    # does not know that device
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    s = DuplexModel.load(str(world / "flm"))
    duplex = DuplexModel(s.model.to("meta").bfloat16(), s.vocab, s.codec.to("meta"), s.tokenizer,
                         Sampling(0.7, 20, 0.9, 1.2),
                      Sampling(0.8, 20))
    text, said = duplex.step(torch.zeros(2, 1, FRAME, device="meta"), duplex.init_state([1, 2]))
    assert text.shape == (2,) and said.shape == (2, 1, FRAME) and said.is_meta


def test_bfloat16_as_on_a_gpu(world):
    """The same model within the digits that bfloat16 has, frame by frame, past the context too."""
    whole, half = duplex_of(world, 8), duplex_of(world, 8)
    half.model.bfloat16()
    a, b = whole.model.init_cache(2), half.model.init_cache(2)
    for column in torch.randint(0, 32, (20, 2, ROWS), generator=torch.Generator().manual_seed(0)):
        x, y = whole.model.hidden_step(column, a), half.model.hidden_step(column, b)
        assert y.dtype == torch.bfloat16 and (x - y).norm() < 0.03 * x.norm()
    assert half.converse(noise(20)[None])[0].shape == (1, 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_frame_is_the_same(world):
    duplex = duplex_of(world, 16, "cuda")
    wav = noise(2 * 40).view(2, -1).cuda()
    captured, state = duplex.converse(wav)[0], duplex.init_state([1, 2])
    eager = torch.stack([duplex.step(x[:, None], state)[0] for x in wav.split(FRAME, -1)], 1)
    assert (captured == eager.cpu()).all()


# ------------------------------------------------------------------------------------------------------------
# many


@pytest.mark.parametrize("context, seed", [(128, 1), (8, 10)])
def test_each_session_is_as_if_alone(world, context, seed):
    """They join, leave, begin anew and miss frames at random, past the context too."""
    duplex, rng = duplex_of(world, context), random.Random(seed)
    engine, heard, got = Engine(duplex, 3), {}, {}
    for t in range(50):
        for s in [s for s in engine.sessions if s]:
            if rng.random() < 0.03:
                engine.leave(s)
            elif rng.random() < 0.03:
                engine.reset(s)
        if rng.random() < 0.3:
            engine.join(rng.randrange(100))
        for s in [s for s in engine.sessions if s]:
            for _ in range(rng.choice([0, 1, 1, 2])):
                x = noise(1, rng.getrandbits(32))
                if s.hear(x):
                    heard.setdefault(s, []).append(x)
        for s, out in engine.tick().items():
            got.setdefault(s, []).append(out)
    assert len(got) >= 6 and max(map(len, got.values())) > 20
    for s, outs in got.items():
        assert same(outs, alone(duplex, heard[s][:len(outs)], s.seed))


def test_a_silent_session_delays_no_other_and_a_hasty_one_gains_nothing(world):
    duplex = duplex_of(world, 8)
    engine = Engine(duplex, 3)
    steady, silent, hasty = (engine.join(seed) for seed in (1, 2, 3))
    x, got = noise(30).split(FRAME), {steady: [], silent: [], hasty: []}
    for t in range(30):
        assert steady.hear(x[t])
        taken = [hasty.hear(x[t]) for _ in range(5)]  # five times as fast as it can be heard
        if t < 10 or t >= 20:
            silent.hear(x[t])
        out = engine.tick()
        assert steady in out and hasty in out and not steady.queue and not silent.queue
        assert len(hasty.queue) < QUEUE
        for s, y in out.items():
            got[s].append(y)
    assert len(got[silent]) == 20 and taken == [True] + [False] * 4
    assert same(got[steady], alone(duplex, x, 1))
    assert same(got[silent], alone(duplex, x[:10] + x[20:], 2)), "ten missed ticks have left no trace"


def test_joining_allocates_no_state(world, monkeypatch):
    duplex = duplex_of(world)
    engine, x = Engine(duplex, 2), noise(3).split(FRAME)
    monkeypatch.setattr(duplex, "init_state", None)
    sessions = [engine.join(1), engine.join(2)]
    for frame in x:
        got = [s.hear(frame) and engine.tick() for s in sessions]
        assert [list(out) for out in got] == [[s] for s in sessions]
    assert engine.reset(sessions[0]).hear(x[0]) and len(engine.tick()) == 1


def test_a_full_engine_refuses(world):
    engine = Engine(duplex_of(world), 2)
    a, b = engine.join(), engine.join()
    assert engine.join() is None and engine.tick() == {}
    engine.leave(a)
    engine.leave(a)
    c = engine.join()
    assert c is not None and engine.join() is None and engine.reset(a) is None
    c.hear(noise(1))
    assert list(engine.tick()) == [c] and b in engine.sessions


def test_a_second_session_equals_the_first(world):
    engine, x = Engine(duplex_of(world, 8), 1), noise(20).split(FRAME)

    def converse(session):
        return [session.hear(frame) and engine.tick()[session] for frame in x]
    first = engine.join(5)
    a = converse(first)
    second = engine.reset(first)
    b = converse(second)
    engine.leave(second)
    c = converse(engine.join(5))
    for other in (b, c):
        assert all(u[0] == v[0] and torch.equal(u[1], v[1]) for u, v in zip(a, other, strict=True))


def test_a_frame_of_another_shape_or_not_finite_is_refused(world):
    session = Engine(duplex_of(world), 1).join()
    for bad in (torch.zeros(FRAME - 1), torch.zeros(1, FRAME), torch.full((FRAME,), float("nan")),
                np.full(FRAME, np.inf)):
        with pytest.raises(ValueError, match="1920 finite numbers"):
            session.hear(bad)
    assert session.hear(np.zeros(FRAME)) and len(session.queue) == 1


def test_a_conversation_that_breaks_ends_alone(world):
    duplex = duplex_of(world, 8)
    engine, x = Engine(duplex, 2), noise(12).split(FRAME)
    broken, whole = engine.join(1), engine.join(2)
    got = []
    for t in range(12):
        if t == 6:
            for memory in tensors(engine.state):
                if memory.is_floating_point():
                    memory[0] = float("nan")
        broken.hear(x[t])
        whole.hear(x[t])
        out = engine.tick()
        got.append(out[whole])
        assert (out[broken] is None) == (t >= 6)
    assert same(got, alone(duplex, x, 2))
    new = engine.reset(broken)
    got = [new.hear(frame) and engine.tick()[new] for frame in x]
    assert same(got, alone(duplex, x, 1)), "and leaves nothing behind for the next one in its place"


def test_ticks_may_run_in_a_thread_of_their_own(world):
    duplex = duplex_of(world, 8)
    engine, got, over = Engine(duplex, 2), {}, threading.Event()

    def ticks():
        while not over.is_set():
            for s, out in engine.tick().items() or time.sleep(0.001) or ():
                got.setdefault(s, []).append(out)
    thread, x = threading.Thread(target=ticks), noise(20).split(FRAME)
    thread.start()
    try:
        first = engine.join(1)
        for t in range(40):  # two at a time; the second leaves in the middle of the first one's conversation
            if t % 20 == 0:
                second = engine.join(2 + t)
            talks = [(first, x[t // 2]), (second, x[t % 20])] if t % 2 else [(second, x[t % 20])]
            for s, frame in talks:
                while not s.hear(frame):
                    time.sleep(0.001)
            if t % 20 == 19:
                engine.leave(second)
        while first.queue or len(got.get(first, [])) < 20:
            time.sleep(0.001)
    finally:
        over.set()
        thread.join()
    assert same(got.pop(first), alone(duplex, x, 1)) and len(got) == 2
    for s, outs in got.items():
        assert same(outs, alone(duplex, x[:len(outs)], s.seed))


# ------------------------------------------------------------------------------------------------------------
# no end


def test_a_conversation_has_no_end(world):
    """Many contexts long: the same memory at the same addresses, a frame said for each one heard, and still
    not stuck."""
    duplex = duplex_of(world, 8)
    state, texts = duplex.init_state([1]), []
    memory = [(t.data_ptr(), t.shape) for t in tensors(state)]
    for frame in noise(100).split(FRAME):
        text, said = duplex.step(frame[None, None], state)
        assert said.shape == (1, 1, FRAME) and said.isfinite().all()
        texts.append(text.item())
    assert [(t.data_ptr(), t.shape) for t in tensors(state)] == memory
    assert state.cache.position.item() == 100 and len(set(texts[50:])) > 10


@pytest.mark.parametrize("samples", [1, FRAME - 1, FRAME, 20 * FRAME + 7])
def test_the_clocks_do_not_drift(world, samples):
    text, said = duplex_of(world).converse(torch.zeros(2, samples))
    assert said.shape == (2, samples) and text.shape == (2, -(-samples // FRAME))
