"""A step of a conversation in few launches: its layers are compiled, then all of it becomes one CUDA graph,
captured once and replayed for every frame."""
import contextlib
import warnings

import torch

from mimi import TransformerLayer, tensors
from model import Block


def compile_and_capture(step, x, state, *models):
    """capture() with the layers of these models compiled; without, and with a warning, if that fails."""
    try:
        with compiled(layers_of(*models)):
            return capture(step, x, state)
    except Exception as e:  # of many kinds: no C compiler, no Triton for this card, ...
        reason = " ".join(str(e).split()) or type(e).__name__
        warnings.warn(f"layers are not compiled, and a frame takes longer: {reason:.200}")
        return capture(step, x, state)


def layers_of(*models):
    return [m for model in models for m in model.modules() if isinstance(m, (Block, TransformerLayer))]


@contextlib.contextmanager
def compiled(layers, backend="inductor"):
    """Within it, these layers' forward is compiled: many small operations become few kernels. Layers of the
    same class and shapes share the code, so it is made once. Afterwards they are as before: a graph needs no
    Python, and a prompt of another length must not wait for a compiler."""
    for m in layers:
        m.forward = torch.compile(m.forward, backend=backend)
    try:
        yield
    finally:
        for m in layers:
            del m.forward


def capture(step, x, state):
    """step(x) as one CUDA graph: a function of new x's whose results live until its next call. What
    capturing does to `state`, tensors in any nesting, is undone."""
    before = [t.clone() for t in tensors(state)]
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compilers and libraries make their plans and workspaces at the first calls
                step(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step(x)
    finally:
        for t, b in zip(tensors(state), before):
            t.copy_(b)

    def replay(new):
        x.copy_(new)
        graph.replay()
        return y
    return replay
