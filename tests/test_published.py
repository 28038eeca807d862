"""The FLM-Audio release and Qwen2.5: our model computes the same numbers from their weights. (Mimi:
test_mimi.py)"""
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from chat import DuplexModel
from conftest import noise, run
from files.audio import read_audio
from files.checkpoint import save_checkpoint
from files.tokenizer import dump_published, encode_words, get_tokenizer
from live.engine import Engine
from mimi import FRAME, Mimi
from model import FLM, FLMConfig
from published import release
from published.release import export_release, from_qwen, load_release, qwen_tensors
from streams import Vocab
from test_mimi_reference import GOLDEN, SMALL, audio
from test_model import C

RELEASE = os.path.join(GOLDEN, "flm_release_tiny")


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


# ------------------------------------------------------------------------------------------------------------
# a conversation with the release


def small_mimi():
    """A small random Mimi in Kyutai's format."""
    return Mimi.from_pretrained(os.path.join(GOLDEN, "mimi_kyutai", "model.safetensors"), 8, SMALL)


def test_it_says_what_the_release_says():
    """talk.npz: what the release's own streaming loop chose from flm_release_tiny, greedily and in float32,
    as it heard the codes of mimi_kyutai/golden.npz frame by frame: text and speak codes of each next column,
    and the frame of codes that it decodes in each step but the first. Before, the logits of ids that are no
    codes were set to 0, and the row of <wait> in the text head was multiplied by 6, to be chosen at times."""
    pytest.importorskip("safetensors")
    golden = np.load(os.path.join(RELEASE, "talk.npz"))
    columns, frames = (torch.from_numpy(golden[name].astype(np.int64)) for name in ("columns", "said"))
    (model, vocab), codec = load_release(RELEASE), small_mimi()
    with torch.no_grad():
        model.depth.heads[..., vocab.codebook_size:] = 0
        model.head.weight[vocab.wait] *= 6
    vocab = replace(vocab, silence=tuple(map(tuple, codec.silence())))
    greedy = [replace(how, temperature=0.0) for how in release.SAMPLING]
    duplex = DuplexModel(model, vocab, codec, None, greedy[0], greedy[1:], release=True)
    state, said, decode = duplex.init_state([1]), [], codec.decode_step
    codec.decode_step = lambda codes, state: said.append(codes[0, :, 0].clone()) or decode(codes, state)
    found = []
    for frame in audio(150).split(FRAME, -1):
        duplex.step(frame, state)
        found.append(torch.cat([state.text, state.speak[0]]))
    assert len((columns == vocab.wait).nonzero()) > 20 and len(columns) == 150
    assert torch.equal(torch.stack(found), columns)
    assert torch.equal(torch.stack(said[1:]), frames) and said[0].tolist() == list(vocab.silence[-1])


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A small random release as it lies on the disk after a download: config.json, two files of weights with
    their index, tokeniser, codec. Its vocabulary is padded."""
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    saved = get_tokenizer("bytes", {}, 0)
    config = FLMConfig(1, 32, 4, 2, 48, 1, 16, 2, vocab_size=300, empty=33, context=64)
    model = FLM(config)
    with torch.no_grad():
        model.head.weight.normal_()
    folder = tmp_path / "FLM-Audio"
    export_release(model, Vocab(300, 290, -1, -1, 32, 33, ()), str(folder))
    weights = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        safetensors.save_file({n: weights[n] for n in names if where[n] == file}, folder / file)
    (folder / release.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for name, text in dump_published(saved).items():
        (folder / name).write_text(text)
    shutil.copy(os.path.join(GOLDEN, "mimi_kyutai", "model.safetensors"), folder / release.MIMI)
    published = Mimi.from_pretrained  # of the small size, whatever is asked for
    monkeypatch.setattr(Mimi, "from_pretrained", staticmethod(
        lambda path, codebooks, device="cpu": published(path, codebooks, SMALL, device)))
    return folder


def talk(folder, tmp_path, *more):
    noise(tmp_path / "in.wav", 2.0, 24_000)
    return run("chat.py", "--checkpoint", folder, "--input", tmp_path / "in.wav", "--after", 0,
               "--output", tmp_path / "reply.wav", *more)


def test_chat_with_a_release_as_it_was_downloaded(downloaded, tmp_path):
    code, out, err = talk(downloaded, tmp_path)
    assert code == 0, err
    first = read_audio(str(tmp_path / "reply.wav"))
    assert len(first) == 48_000 and first.abs().max() > 0
    pieces = [json.loads(line) for line in open(tmp_path / "reply.jsonl")]
    assert pieces, "ids past the tokeniser's are skipped, the others are written"
    assert talk(downloaded, tmp_path, "--codec", downloaded / release.MIMI)[0] == 0
    assert torch.equal(read_audio(str(tmp_path / "reply.wav")), first)
    assert talk(downloaded, tmp_path, "--temperature", 2, "--top-p", 1)[0] == 0
    assert not torch.equal(read_audio(str(tmp_path / "reply.wav")), first)


def test_a_release_is_measured_and_reads_aloud(downloaded, tmp_path):
    noise(tmp_path / "set/a.wav", 1.5, 24_000)
    (tmp_path / "set/manifest.jsonl").write_text('{"audio": "a.wav", "text": "It is late."}\n')
    code, out, err = run("eval.py", "--checkpoint", downloaded, "--codec", downloaded / release.MIMI,
                         "--hear", tmp_path / "set", "--keep", tmp_path)
    assert code == 0 and "hearing 1 - WER" in out and " of 3 " in out, err
    code, out, err = run("chat.py", "--checkpoint", downloaded, "--say", "It is late.", "--output",
                         tmp_path / "said.wav")
    assert code == 0 and (tmp_path / "said.wav").exists(), err


def test_a_release_in_the_engine_talks_as_alone(downloaded):
    duplex = DuplexModel.load(str(downloaded))
    heard = torch.randn(6, FRAME, generator=torch.Generator().manual_seed(0)) * 0.1
    text, said = duplex.converse(torch.cat([*heard, torch.zeros(FRAME)])[None], seed=5)
    engine = Engine(duplex, 2)
    engine.join(seed=1)
    for _ in range(2):  # also in a row that was used before
        session = engine.join(seed=5)
        for t, frame in enumerate(heard):
            session.hear(frame)
            token, sound = engine.tick()[session]
            assert token == text[0, t] and (sound - said[0, (t + 1) * FRAME:][:FRAME]).abs().max() < 1e-5
        engine.leave(session)


def shorten(folder, by):
    saved = json.loads((folder / "config.json").read_text())
    saved["vocab_size"] -= by
    (folder / "config.json").write_text(json.dumps(saved))


def absurd_bias(folder):
    saved = json.loads((folder / "config.json").read_text())
    saved["aud_depthgpt"]["bias"] = 1 << 60
    (folder / "config.json").write_text(json.dumps(saved))


SECOND = "model-00002-of-00002.safetensors"


def other_codec(folder):
    (folder / release.MIMI).unlink()
    config = replace(SMALL, codebook_size=64)
    save_checkpoint(str(folder / "codec.pt"), "codec", config, model=Mimi(config).state_dict())


@pytest.mark.parametrize("change, says", [
    (lambda f: (f / SECOND).unlink(), f"holds no {SECOND}; download it again"),
    (lambda f: [(f / name).unlink() for name in (release.INDEX, SECOND)], "has no tensor"),
    (lambda f: (f / release.INDEX).write_text("[]"), "not an index of weights"),
    (lambda f: (f / release.MIMI).unlink(), "name that file with --codec"),
    (lambda f: (f / "config.json").write_text('{"model_type": "qwen2"}'), "is of a qwen2, not of FLMAudio"),
    (lambda f: (f / "config.json").unlink(), "no such checkpoint"),
    (lambda f: (f / "tokenizer.json").unlink(), "holds neither tokenizer.json nor vocab.json"),
    (lambda f: shorten(f, 50), "its tokeniser has 259 tokens, config.json 250"),
    (lambda f: shorten(f, -2000), "its tokeniser has 259 tokens, config.json 2300"),
    (absurd_bias, "not the release's kind of model: bias"),
    (lambda f: other_codec(f), "needs a codec with 8 codebooks of 32, not 8 of 64"),
])
def test_a_folder_that_is_not_a_whole_release_is_one_clear_line(downloaded, tmp_path, change, says):
    change(downloaded)
    code, _, err = talk(downloaded, tmp_path)
    assert code == 1 and len(err.strip().splitlines()) == 1 and says in err and err.startswith("error: ")


def test_a_model_of_ours_is_exported_with_its_tokeniser_and_codec(world, tmp_path):
    pytest.importorskip("safetensors")
    code, out, err = run("published.release", world / "flm", tmp_path / "x")
    assert code == 0 and "codec.pt" in out, err
    ours, theirs = DuplexModel.load(str(world / "flm")), DuplexModel.load(str(tmp_path / "x"))
    assert theirs.release and theirs.vocab == ours.vocab
    assert encode_words("the cat ζ", theirs.tokenizer) == encode_words("the cat ζ", ours.tokenizer)
    names = [theirs.tokenizer.decode_single_token_bytes(i) for i in range(ours.vocab.text_size)]
    assert names == [ours.tokenizer.decode_single_token_bytes(i) for i in range(ours.vocab.text_size)]
    grid = torch.randint(0, 30, (1, 17, 5))
    assert torch.equal(ours.model.hidden(grid), theirs.model.hidden(grid))
    assert talk(tmp_path / "x", tmp_path)[0] == 0


# ------------------------------------------------------------------------------------------------------------
# Qwen2.5


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
