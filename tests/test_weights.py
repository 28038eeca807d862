"""live/weights.py: eight bits for each weight say nearly the same."""
import pytest
import torch
from torch import nn

import bench_talk
from bench_talk import relative as off
from chat import DuplexModel
from conftest import run
from files.checkpoint import save_checkpoint
from live.weights import Float8Linear, Int8Linear, by_columns, quantise, replace_matrices
from model import CONFIGS, FLM
from streams import ROWS


@pytest.mark.parametrize("inputs, outputs, bias", [(64, 96, True), (96, 64, False), (170, 33, False)])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 5)])
def test_an_int8_matrix_is_within_a_hundredth(inputs, outputs, bias, rows):
    torch.manual_seed(0)
    m = nn.Linear(inputs, outputs, bias)
    x = torch.randn(*rows, inputs)
    y = Int8Linear(m.weight.detach(), m.bias)(x)
    assert y.shape == (*rows, outputs) and y.dtype == x.dtype and off(y, m(x)) < 0.01


def test_each_output_has_its_own_scale():
    torch.manual_seed(0)
    m = nn.Linear(64, 32, bias=False)
    m.weight.data *= torch.logspace(-6, 3, 32)[:, None]
    m.weight.data[7] = 0
    x = torch.randn(1, 64)
    for linear in Int8Linear, Float8Linear:
        y, right = linear(m.weight.detach())(x), m(x)
        assert y[0, 7] == 0
        assert all(off(a, b) < 0.2 for a, b in zip(y[0].split(4), right[0].split(4))), linear


def test_a_float8_matrix_is_within_a_twentieth():
    """On a CPU by PyTorch's own stand-in for the tensor cores, and as torch.compile traces it for one row."""
    torch.manual_seed(0)
    m, x = nn.Linear(64, 96), torch.randn(5, 1, 64)
    f = Float8Linear(m.weight.detach(), m.bias)
    assert f.weight.element_size() == 1 and off(f(x), m(x)) < 0.05
    traced = torch.compile(f, backend="eager", fullgraph=True)
    assert off(traced(x[:1]), m(x[:1])) < off(f(x[:1]), m(x[:1])) < 0.05  # its inputs keep their precision


def model_and_columns():
    torch.manual_seed(0)
    return FLM(CONFIGS["tiny"]).eval(), torch.randint(0, 256, (20, 2, ROWS))


def test_int8_conversations_are_nearly_the_same():
    (model, columns), (other, _) = model_and_columns(), model_and_columns()
    quantise(other, "int8")
    assert {x.dtype for x in other.buffers()} == {torch.int8, torch.bfloat16}
    caches = [m.init_cache(2) for m in (model, other)]
    with torch.inference_mode():
        for column in columns:
            h, h8 = (m.hidden_step(column, cache) for m, cache in zip((model, other), caches))
            assert off(h8, h) < 0.02
            assert off(other.text_logits(h8), model.text_logits(h)) < 0.02
    text, codes = bench_talk.agreement(model, other, columns)
    assert text > 0.8 and codes > 0.7  # of random weights, whose logits are close together
    assert bench_talk.agreement(model, model, columns) == [1, 1]


def test_a_prompt_can_be_read_in_int8():
    (model, columns), (other, _) = model_and_columns(), model_and_columns()
    quantise(other, "int8")
    grid = columns.permute(1, 2, 0)
    with torch.inference_mode():
        assert off(other.hidden(grid, other.init_cache(2)), model.hidden(grid)) < 0.02


def test_by_columns_changes_no_number():
    (model, columns), (other, _) = model_and_columns(), model_and_columns()
    by_columns(other)
    assert not other.blocks[0].mlp.gate_up.weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    with torch.inference_mode():
        a, b = (m.hidden_step(columns[0], m.init_cache(2)) for m in (model, other))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("linear", [Int8Linear, Float8Linear])
def test_eight_bits_are_never_saved(linear, tmp_path):
    model, _ = model_and_columns()
    replace_matrices(model, linear)
    with pytest.raises(RuntimeError, match="not to be saved"):
        save_checkpoint(tmp_path / "checkpoint.pt", "flm", model.config, model=model.state_dict())
    assert not list(tmp_path.iterdir())


def test_weights_on_a_device_that_is_not_made_for_them(world, tmp_path):
    code, _, err = run("chat.py", "--checkpoint", world / "flm", "--say", "x", "--device", "cpu",
                       "--output", tmp_path / "x.wav", "--weights", "float8")
    assert code and err.splitlines()[-1].startswith("error: --weights float8: needs a GPU")
    with torch.device("meta"), pytest.raises(ValueError, match="is for CPUs"):
        quantise(FLM(CONFIGS["tiny"]), "int8")


def test_a_conversation_in_int8(world):
    duplex = DuplexModel.load(world / "flm")
    quantise(duplex.model, "int8")
    wav = torch.randn(2, 1920 * 5, generator=torch.Generator().manual_seed(0)) * 0.1
    text, said = duplex.converse(wav)
    assert text.shape == (2, 5) and said.shape == wav.shape and said.isfinite().all()
