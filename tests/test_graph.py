"""live/graph.py as far as a CPU shows: compiled layers compute the same; a failing compiler is survived."""
import pytest
import torch

import mimi
import model
from bench_talk import relative
from live import graph
from streams import K, ROWS


def results(flm, codec, frames=4):
    """h and audio of a few frames of two conversations."""
    rng = torch.Generator().manual_seed(0)
    columns = torch.randint(0, 256, (frames, 2, ROWS), generator=rng)
    codes = torch.randint(0, 256, (frames, 2, K, 1), generator=rng)
    with torch.inference_mode():
        cache, state = flm.init_cache(2), codec.init_state(2)
        cache.position += flm.config.context  # the rings are full: one shape, as on a GPU
        return (torch.stack([flm.hidden_step(column, cache) for column in columns]),
                torch.stack([codec.decode_step(c, state) for c in codes]))


def models():
    torch.manual_seed(0)
    return model.FLM(model.CONFIGS["tiny"]).eval(), mimi.Mimi(mimi.CONFIGS["tiny"]).eval()


def test_layers_are_traced_once_and_compute_the_same():
    graphs = []

    def backend(traced, inputs):
        graphs.append(traced)
        return traced.forward
    flm, codec = models()
    right, layers = results(flm, codec), graph.layers_of(flm, codec)
    with graph.compiled(layers, backend):
        got = results(flm, codec)
    assert len(layers) == 6 and len(graphs) == 2  # one for each kind of layer, without a break
    assert all(relative(a, b) < 1e-6 for a, b in zip(got, right))
    assert all(a.equal(b) for a, b in zip(results(flm, codec), right)) and len(graphs) == 2


@pytest.mark.slow
def test_compiled_layers_compute_the_same():
    flm, codec = models()
    right = results(flm, codec)
    with graph.compiled(graph.layers_of(flm, codec)):
        assert all(relative(a, b) < 1e-5 for a, b in zip(results(flm, codec), right))


def test_a_frame_survives_a_failing_compiler(monkeypatch):
    def fail(traced, inputs):
        raise OSError("no compiler here\nand more")
    monkeypatch.setattr(graph, "capture", lambda step, x, state: (step(x), step)[1])
    compiled = graph.compiled
    monkeypatch.setattr(graph, "compiled", lambda layers: compiled(layers, fail))
    flm, _ = models()
    cache, column = flm.init_cache(1), torch.zeros(1, ROWS, dtype=torch.long)
    with pytest.warns(UserWarning, match="layers are not compiled.*no compiler here and more"):
        step = graph.compile_and_capture(lambda x: flm.hidden_step(x, cache), column, cache, flm)
    assert "forward" not in vars(flm.blocks[0])
    assert step(column).shape == (1, flm.config.width)
