"""Samples packed into a row that do not see each other: a row of two is the two alone."""
import dataclasses

import numpy as np
import pytest
import torch

import model
import streams
import train
from conftest import FLM
from files.checkpoint import load_checkpoint
from streams import K, LISTEN, SPEAK, TEXT, Utterance, Vocab
from test_train import SHORT
from training import documents
from training.run import Run

V = Vocab.own(300, 32, ((0,) * K,))


def conversation(seed, frames):
    rng = np.random.default_rng(seed)
    said = lambda n: Utterance(rng.integers(0, 290, 3).tolist(), rng.integers(1, 32, (n, K)), n)
    return streams.response_tts([(said(frames), said(frames + 2))], [2], V)


def losses(flm, grids, apart=True):
    """(cross-entropies of the text and of the codes that are learned from, the gradients of their sum)"""
    pack, T = documents.pack_apart if apart else streams.pack, sum(g.shape[1] for g in grids)
    grid, loss, *ids = (torch.from_numpy(x)[None] for x in pack(grids, T, V))
    learn = loss[:, SPEAK, 1:].any(1)
    text, _, codes = flm(grid, learn, documents.attention(ids[0][:, :-1]) if apart else None)
    text, codes = text[loss[:, TEXT, 1:]], codes[loss[:, SPEAK, 1:].mT[learn]]
    flm.zero_grad()
    (text.sum() + codes.sum()).backward()
    return text.detach(), codes.detach(), torch.cat([p.grad.flatten() for p in flm.parameters()])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_row_of_two_is_the_two_alone(recompute):
    flm = model.FLM(dataclasses.replace(FLM, layers=2))
    flm.recompute = recompute
    a, b = conversation(1, 5), conversation(2, 9)
    packed, alone = losses(flm, [a, b]), [losses(flm, [x]) for x in (a, b)]
    for kind in (0, 1):
        torch.testing.assert_close(packed[kind], torch.cat([x[kind] for x in alone]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[2], alone[0][2] + alone[1][2], rtol=1e-4, atol=1e-5)
    same_row = losses(flm, [a, b], apart=False)  # otherwise b sees a
    assert (same_row[0][-len(alone[1][0]):] - alone[1][0]).abs().max() > 1e-3


def test_a_packed_sample_is_as_in_a_conversation():
    """Frame by frame from a fresh cache: the same h as the second sample of a row has."""
    flm = model.FLM(FLM).eval()
    a, b = conversation(3, 6), conversation(4, 4)
    grid, _, ids = documents.pack_apart([a, b], a.shape[1] + b.shape[1], V)
    grid, ids = torch.from_numpy(grid)[None], torch.from_numpy(ids)[None]
    with torch.no_grad():
        row = flm.hidden(grid, mask=documents.attention(ids))[0, a.shape[1]:]
        cache = flm.init_cache(1)
        steps = [flm.hidden_step(column, cache)[0] for column in grid[..., a.shape[1]:].unbind(-1)]
    torch.testing.assert_close(row, torch.stack(steps), rtol=1e-4, atol=1e-5)


def test_flex_attention_sees_the_same():
    """The form that a GPU uses, uncompiled."""
    ids = torch.tensor([[0] * 50 + [1] * 100 + [2] * 33, [0] * 183])
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 183, 16, generator=g) for heads in (4, 2, 2))
    right, got = documents.attention(ids)(q, k, v), documents.Blocks.of(ids)(q, k, v)
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(documents.attention(ids)(q, k, v)[1:], model.attend(q[1:], k[1:], v[1:]),
                               rtol=1e-4, atol=1e-5)


@torch.no_grad()  # on a CPU flex attention has no gradients
def test_other_rows_need_no_new_compilation():
    """The samples' numbers are an input of the compiled layer, not a part of it."""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    block, counter = model.Block(FLM), CompileCounter()
    compiled = torch.compile(block, backend=counter)
    cos, sin = model.rotary(torch.arange(40), block.E, FLM.rope_base)
    for make in (documents.attention, documents.Blocks.of):
        for ids in (torch.arange(40) // 7, torch.arange(40) // 11, torch.arange(40) // 20):
            mask = make(ids[None])
            x = torch.randn(1, 40, FLM.width)
            torch.testing.assert_close(compiled(x, cos, sin, None, None, mask),
                                       block(x, cos, sin, None, None, mask), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_a_stage_of_documents(world, tmp_path):
    """In threads and micro-batches, with held-out losses; a checkpoint of before there were documents goes
    on."""
    task = lambda: train.ModelTask(FLM, str(world / "toy/encoded"), "cpu")
    on = [dataclasses.replace(s, steps=3, batch=4, documents=True) for s in SHORT]
    train.train(task(), on, str(tmp_path / "on"))
    many = dataclasses.replace(on[1], batch=32)
    grid, learn, loss, ids = task().batch(many, 0.5, "train", train.random.Random(0))
    starts = ids[:, 1:] != ids[:, :-1]
    assert starts.any() and not loss.mT[starts].any() and not learn[starts].any()
    assert (grid[:, LISTEN.start + 1:, 1:].mT[starts] == task().vocab.empty).all()

    off = [dataclasses.replace(s, steps=3) for s in SHORT]
    path = train.train(task(), off, str(tmp_path / "off"))
    saved = load_checkpoint(path, "flm")
    for stage in saved["stages"]:
        del stage["documents"]
    torch.save(saved, path)
    optimizer = train.make_optimizer((new := task()).modules, True)
    assert Run(new, off, str(tmp_path / "off"), optimizer, resume=True).total_steps() == 6
    with pytest.raises(ValueError, match="other stages .one: batch, documents"):
        Run(task(), on, str(tmp_path / "off"), optimizer, resume=True)
