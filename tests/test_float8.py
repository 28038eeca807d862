"""Keys and values in eight bits: nearly the same numbers, and everything else as with the whole ones."""
import dataclasses

import pytest
import torch

import model
from bench_talk import bytes_of
from conftest import FLM
from live import float8
from live.engine import Engine
from live.float8 import Float8Cache
from mimi import tensors
from streams import ROWS
from test_engine import alone, duplex_of, noise, same


def both(dtype, layers=2):
    """A model with large activations, and a cache of each kind for two conversations."""
    torch.manual_seed(0)
    flm = model.FLM(dataclasses.replace(FLM, layers=layers, context=16)).to(dtype).eval()
    with torch.no_grad():
        for block in flm.blocks:
            block.qkv.weight.mul_(8)
    whole, flm.layer_cache = flm.init_cache(2), Float8Cache
    return flm, whole, flm.init_cache(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_same_within_the_digits_of_eight_bits(dtype):
    """Past the context too; and some error there is, or nothing was rounded."""
    flm, whole, small = both(dtype)
    for column in torch.randint(0, 32, (40, 2, ROWS), generator=torch.Generator().manual_seed(0)):
        x, y = flm.hidden_step(column, whole), flm.hidden_step(column, small)
        assert y.dtype == dtype and (x - y).norm() < 0.1 * x.norm()
    assert (x - y).norm() > 1e-3 * x.norm()


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e6])
def test_a_vector_of_any_size_keeps_four_bits(size):
    """Keys beyond 448, as some published models have, neither overflow nor round the others away."""
    x = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(0)) * size
    x[0, 0] = 0
    cache = Float8Cache.zeros((2, 2, 4, 8), x)
    cache.update(torch.tensor([1, 3]), x, 2 * x)
    for ring, scales, right in (cache.keys, cache.key_scales, x), (cache.values, cache.value_scales, 2 * x):
        got = ring.float() * scales[..., None]
        for b, slot in enumerate((1, 3)):
            assert (got[b, :, slot] - right[b, :, 0]).abs().max() <= right[b].abs().max() / 16
            assert not got[b, :, [s for s in range(4) if s != slot]].any()


@torch.no_grad()
def test_converted_a_part_at_a_time(monkeypatch):
    """And never more of it, on a GPU's path too."""
    flm, _, small = both(torch.float32, layers=1)
    small.position += 40
    for ring in vars(small.layers[0]).values():
        ring.copy_(torch.rand(ring.shape))
    q, mask = torch.randn(2, FLM.heads, 1, 8), torch.rand(2, 1, 1, 16) < 0.7
    right, parts = small.layers[0].attend(q, mask), []
    monkeypatch.setattr(float8, "product", lambda a, b: parts.append(b.numel()) or model.product(a, b))
    monkeypatch.setattr(float8, "AT_ONCE", 64)
    torch.testing.assert_close(small.layers[0].attend(q, mask, size=4), right, rtol=1e-4, atol=1e-5)
    assert len(parts) > 4 and max(parts) <= 16 * 8


@torch.no_grad()
def test_a_prompt_is_as_its_frames():
    flm, _, small = both(torch.float32)
    grid = torch.randint(0, 32, (1, ROWS, 9), generator=torch.Generator().manual_seed(0))
    flm.hidden(grid[..., :8], small.row(1))
    alone = flm.init_cache(1)
    for column in grid[..., :8].unbind(-1):
        flm.hidden_step(column, alone)
    x = flm.hidden_step(grid[..., 8].repeat(2, 1), small)[1]
    y = flm.hidden_step(grid[..., 8], alone)[0]
    assert small.position.tolist() == [1, 9] and (x - y).norm() < 0.1 * y.norm()


def test_a_conversation_takes_half_the_memory():
    for dtype, share in ((torch.bfloat16, 1 / 2), (torch.float32, 1 / 4)):
        with torch.device("meta"):
            flm = model.FLM(model.CONFIGS["0.5b"]).to(dtype)
        whole = bytes_of(tensors(flm.init_cache(3).layers))
        flm.layer_cache = Float8Cache
        assert share < bytes_of(tensors(flm.init_cache(3).layers)) / whole < share + 0.02


def test_conversations_join_leave_and_begin_anew(world):
    """Each as if alone, and one that breaks leaves nothing behind."""
    duplex = duplex_of(world, 8)
    duplex.model.layer_cache = Float8Cache
    engine, x = Engine(duplex, 2), noise(12).split(1920)
    a, b = engine.join(1), engine.join(2)
    got = {1: [], 2: [], 3: []}
    for t in range(12):
        if t == 6:
            engine.leave(a)
            for memory in tensors(engine.state.cache.layers):
                memory[0] = float("nan")
            a = engine.join(3)
        for s in (a, b):
            s.hear(x[t])
        for s, out in engine.tick().items():
            got[s.seed].append(out)
    for seed, frames in ((1, x[:6]), (2, x), (3, x[6:])):
        assert same(got[seed], alone(duplex, frames, seed))


def test_the_flag(world, tmp_path, capsys):
    from conftest import run
    code, out, err = run("chat.py", "--checkpoint", world / "flm", "--type", "one two", "--cache", "float8",
                         "--output", tmp_path / "said.wav", "--device", "cpu")
    assert code == 0 and (tmp_path / "said.wav").exists(), err
