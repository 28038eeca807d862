"""The FLM-Audio release and Qwen2.5: our model computes the same numbers from their weights. (Mimi:
test_mimi.py)"""
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from model import FLM
from published.release import export_release, from_qwen, load_release, qwen_tensors
from test_model import C

RELEASE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "flm_release_tiny")


def test_the_release_computes_what_it_should():
    """golden.npz: what the release's own code computed from a small random checkpoint, in float32."""
    pytest.importorskip("safetensors")
    golden = {name: torch.from_numpy(x) for name, x in np.load(os.path.join(RELEASE, "golden.npz")).items()}
    model, vocab = load_release(RELEASE, 8192)
    assert (vocab.wait, vocab.empty, vocab.codebook_size) == (130, 33, 32)
    grid = torch.cat([golden["text"][:, None], golden["speak"].mT, golden["listen"].mT], 1)
    with torch.no_grad():
        h = model.hidden(grid)
        depth = model.depth.logits(h[:, :-1].flatten(0, 1), golden["speak"][:, 1:].flatten(0, 1))
        depth = depth.view(golden["depth_logits"].shape)
    for mine, right in ((h, "hidden"), (model.text_logits(h), "text_logits"), (depth, "depth_logits")):
        assert (mine - golden[right]).abs().max() < 1e-4, right


def test_what_is_exported_is_what_was_loaded(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    model, vocab = load_release(RELEASE, 8192)
    export_release(model, vocab, str(tmp_path))
    before, after = load_file(RELEASE + "/model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    again, same = load_release(str(tmp_path), 8192)
    assert same == vocab and again.config == model.config


def as_qwen(model, folder, prefix, kind, shards=2):
    """Write our temporal transformer as Qwen2.5 is published, in several files."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    c, params, out = model.config, dict(model.named_parameters()), {}
    qkv_rows = [c.width, *[c.kv_heads * c.width // c.heads] * 2]
    for ours, theirs in qwen_tensors(c, prefix, prefix + "embed_tokens.weight"):
        rows = qkv_rows if len(theirs) == 3 else [len(params[ours]) // len(theirs)] * len(theirs)
        out |= {name: part.detach().clone() for name, part in zip(theirs, params[ours].split(rows))}
    names = sorted(out)
    for i in range(shards):
        save_file({n: out[n] for n in names[i::shards]}, folder / f"model-{i}.safetensors")
    config = dict(model_type=kind, num_hidden_layers=c.layers, hidden_size=c.width,
                  num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, intermediate_size=c.mlp,
                  vocab_size=c.vocab_size, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
                  rope_theta=c.rope_base)
    write_config(folder, config)
    return config


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix, kind", [("model.", "qwen2"), ("model.language_model.", "qwen2_5_vl")])
def test_qwen_becomes_the_temporal_transformer(tied, prefix, kind, tmp_path):
    c = replace(C, tied=tied)
    source = FLM(c)
    as_qwen(source, tmp_path, prefix, kind)
    other = replace(c, layers=9, width=16, heads=2, kv_heads=1, mlp=8, vocab_size=7, tied=not tied)
    model = from_qwen(str(tmp_path), other)
    assert model.config == c
    for tables in (source.speak, source.listen, model.speak, model.listen):
        for table in tables:
            table.weight.data.zero_()
    grid = torch.randint(0, 20, (2, 17, 9))
    assert torch.equal(model.text_logits(model.hidden(grid)), source.text_logits(source.hidden(grid)))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_qwen_against_the_transformers_library(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=80, vocab_size=200, tie_word_embeddings=tied, rope_theta=1e6)).eval()
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path)
    model = from_qwen(str(tmp_path), C)
    assert model.config.tied == tied
    for table in (*model.speak, *model.listen):
        table.weight.zero_()
    grid = torch.randint(0, 20, (2, 17, 30))
    right = theirs(grid[:, 0]).logits
    assert right.std() > 0.3 and (model.text_logits(model.hidden(grid)) - right).abs().max() < 1e-4


@pytest.mark.parametrize("change, says", [
    (lambda f, c: (f / "config.json").unlink(), "config.json: no such file"),
    (lambda f, c: (f / "config.json").write_text("{"), "config.json: is not JSON"),
    (lambda f, c: write_config(f, {"model_type": "bert"}),
     "config.json: is of a bert, not of qwen2 or qwen2_5_vl"),
    (lambda f, c: write_config(f, {"model_type": "qwen2"}), "config.json: KeyError"),
    (lambda f, c: write_config(f, {**c, "intermediate_size": 50}), "where config.json asks for"),
    (lambda f, c: write_config(f, {**c, "num_hidden_layers": 3}), "has no tensor model.layers.2"),
    (lambda f, c: write_config(f, {**c, "num_hidden_layers": 1}), "unknown tensor model.layers.1"),
    (lambda f, c: (f / "model-0.safetensors").unlink(), "has no tensor"),
    (lambda f, c: (f / "model-0.safetensors").write_bytes(b"nothing"), "not a safetensors file"),
])
def test_a_folder_that_is_not_qwen_is_one_clear_error(change, says, tmp_path):
    change(tmp_path, as_qwen(FLM(C), tmp_path, "model.", "qwen2"))
    with pytest.raises((ValueError, OSError), match=says) as error:
        from_qwen(str(tmp_path), C)
    assert "\n" not in str(error.value)
