"""Qwen2.5's language model, and the FLM-Audio release that contains it: loading and exporting.

    their tensors  ---- a table of names ---->  ours      q, k, v -> one matrix;
                                                          one matrix for each of K positions -> a stack

Strict: every tensor of a file is accounted for; an unknown, missing or misshaped one is a ValueError that
names it. The tests compare with numbers that the published models' own code computed.

    python -m published.release out/7b flm-audio-mine        export a model of ours in the release's format

A release folder is talked to as its own code does: see load_to_talk.
"""
import argparse
import dataclasses
import glob
import json
import os
import sys

import torch

from files.atomic import copy, read_json, replace_when_done, write_text
from files.checkpoint import check_vocab, from_fields, open_safetensors
from files.fields import one_line
from files.tokenizer import dump_published, get_tokenizer, make_tokenizer, read_published_bpe
from kernels.sampling import Sampling
from model import FLM, FLMConfig
from streams import K, Vocab
from training.parallel import assign_shard, build, build_from_checkpoint, gather

# ------------------------------------------------------------------------------------------------------------
# tables of names. The temporal transformer is Qwen2.5; the whole model is the FLM-Audio release


def qwen_tensors(c: FLMConfig, prefix, embedding):
    """The temporal transformer's tensors: (our name, the published names whose tensors are concatenated)."""
    yield "text.weight", [embedding]
    for i in range(c.layers):
        ours, theirs = f"blocks.{i}.", f"{prefix}layers.{i}."
        for part in ("weight", "bias"):
            yield f"{ours}qkv.{part}", [f"{theirs}self_attn.{x}_proj.{part}" for x in "qkv"]
        yield f"{ours}out.weight", [f"{theirs}self_attn.o_proj.weight"]
        yield f"{ours}mlp.gate_up.weight", [f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up")]
        yield f"{ours}mlp.down.weight", [f"{theirs}mlp.down_proj.weight"]
        yield f"{ours}norm1.weight", [f"{theirs}input_layernorm.weight"]
        yield f"{ours}norm2.weight", [f"{theirs}post_attention_layernorm.weight"]
    yield "norm.weight", [f"{prefix}norm.weight"]
    if not c.tied:
        yield "head.weight", ["lm_head.weight"]


def release_tensors(c: FLMConfig):
    """The same for the whole model. A list of lists: one matrix for each of the K positions, transposed and
    stacked."""
    yield from qwen_tensors(c, "model.", "model.embed_tokens.text_embeddings.weight")
    for side in ("speak", "listen"):
        for k in range(K):
            yield f"{side}.{k}.weight", [f"model.embed_tokens.aud_{side}_embeddings.{k}.weight"]
    depth = "aud_output_layers."
    yield "depth.from_h.weight", [depth + "linear_in.weight"]
    yield "depth.positions", [depth + "transformer.wpe.weight"]
    for k in range(K):
        yield f"depth.codes.{k}.weight", [f"{depth}transformer.wtes.{k}.weight"]
    for i in range(c.depth_layers):
        ours, theirs = f"depth.blocks.{i}.", f"{depth}transformer.h.{i}."
        renames = {"norm1": "ln_1", "norm2": "ln_2", "qkv": "attn.c_attn", "out": "attn.c_proj"}
        for name, published in renames.items():
            yield f"{ours}{name}.weight", [f"{theirs}{published}.weight"]
        mlps = [f"{theirs}mlps.{k}." for k in range(K)]
        yield f"{ours}gate_up", [[f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"] for mlp in mlps]
        yield f"{ours}down", [[f"{mlp}down_proj.weight"] for mlp in mlps]
    yield "depth.norm.weight", [depth + "transformer.ln_f.weight"]
    yield "depth.heads", [[f"{depth}lm_heads.{k}.weight"] for k in range(K)]


# ------------------------------------------------------------------------------------------------------------
# loading


@torch.no_grad()
def load_tensors(model, files, folder, table, ignore=()):
    """Load parameters from the open files of a folder (see open_all), one tensor at a time; only compare
    names and shapes if the model has no memory yet. table: {our name: published names}. ValueError for a
    missing or misshaped tensor, and for an unknown one unless its name starts with one of `ignore`."""
    params, used = dict(model.named_parameters()), set()

    def read(name):
        if model.head.weight.is_meta:
            return torch.empty(files[name].shape(name), device="meta")
        return files[name].get_tensor(name)

    def concatenated(names):
        for name in names:
            if name not in files:
                raise ValueError(f"{folder}: has no tensor {name}")
            used.add(name)
        try:
            return torch.cat([read(name) for name in names])
        except RuntimeError as e:
            raise ValueError(f"{folder}: {' and '.join(names)} do not fit together ({one_line(e)})") from None

    for ours, theirs in table.items():
        stacked = isinstance(theirs[0], list)
        parts = [concatenated(names) for names in (theirs if stacked else [theirs])]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"{folder}: {theirs[0][0]} and its like are of several shapes")
        tensor = torch.stack([part.mT for part in parts]) if stacked else parts[0]
        if tensor.shape != params[ours].shape:
            name = theirs[0][0] if stacked else theirs[0]
            raise ValueError(f"{folder}: {name}: gives {tuple(tensor.shape)} "
                             f"where config.json asks for {tuple(params[ours].shape)}")
        assign_shard(params[ours], tensor)
    unknown = sorted(name for name in files.keys() - used if not name.startswith(tuple(ignore)))
    if unknown:
        more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
        raise ValueError(f"{folder}: unknown tensor {unknown[0]}{more}")


def open_all(folder):
    """{name of a tensor: the open file that holds it} for the files of a folder that its index names, or all
    model*.safetensors (the release's folder holds its codec, too). OSError for one that is missing."""
    paths, index = glob.glob(os.path.join(folder, "model*.safetensors")), os.path.join(folder, INDEX)
    if os.path.exists(index):
        try:
            names = {*read_json(index)["weight_map"].values()}
            if any(os.path.basename(name) != name for name in names):
                raise ValueError(f"{index}: names files in other folders")
            paths = {os.path.join(folder, name) for name in names}
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{index}: not an index of weights ({type(e).__name__}: {e})") from None
    missing = sorted(path for path in paths if not os.path.isfile(path))
    if missing or not paths:
        name = os.path.basename(missing[0]) if missing else "model*.safetensors"
        raise FileNotFoundError(f"{folder}: holds no {name}; download it again")
    return {name: f for f in map(open_safetensors, sorted(paths)) for name in f.keys()}


QWEN = "qwen2", "qwen2_5_vl", "qwen2_5_vl_text"


def read_config(folder, kinds):
    """The fields of config.json, whose model_type must be one of these; those of its text_config come
    first."""
    path = os.path.join(folder, "config.json")
    c = read_json(path)
    text_config = c.get("text_config", {}) if isinstance(c, dict) else None
    if not isinstance(text_config, dict):
        raise ValueError(f"{path}: not a model's config")
    if c.get("model_type") not in kinds:
        found = " ".join(str(c.get("model_type")).split())[:40]
        raise ValueError(f"{path}: is of a {found}, not of {' or '.join(kinds)}")
    return {**c, **text_config}


def qwen_fields(c, where):
    """The fields of FLMConfig that Qwen2.5's config.json tells. where: its folder, for error messages."""
    try:
        rope = c.get("rope_parameters") or {}
        return dict(layers=c["num_hidden_layers"], width=c["hidden_size"], heads=c["num_attention_heads"],
                    kv_heads=c["num_key_value_heads"], mlp=c["intermediate_size"], vocab_size=c["vocab_size"],
                    tied=c.get("tie_word_embeddings", False), norm_eps=c["rms_norm_eps"],
                    rope_base=float(c["rope_theta"] if "rope_theta" in c else rope["rope_theta"]))
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise ValueError(f"{where}/config.json: {type(e).__name__}: {one_line(e)}") from None


def load(folder, config, table, place, seed=0, ignore=()):
    """A model of this config with the tensors of a folder, which are compared with it before it gets memory.
    table: {our name: published names}. place: see build."""
    files = open_all(folder)
    with torch.device("meta"):
        load_tensors(FLM(config), files, folder, table, ignore)
    model = build(config, place, seed, given=table)
    load_tensors(model, files, folder, table, ignore)
    return model


def from_qwen(folder, config: FLMConfig, place=None, seed=0):
    """A model whose temporal transformer is the published language model in `folder` (Qwen2.5, or the
    language part of Qwen2.5-VL). The rest is new: config's depth transformer, audio embeddings and context.
    place: see build."""
    c = read_config(folder, QWEN)
    fields = {**dataclasses.asdict(config), **qwen_fields(c, folder)}
    config, names = from_fields(FLMConfig, fields, f"{folder}/config.json"), open_all(folder)
    prefix = next((p for p in ("model.language_model.", "model.") if p + "norm.weight" in names), "model.")
    table = dict(qwen_tensors(config, prefix, prefix + "embed_tokens.weight"))
    return load(folder, config, table, place, seed, ["visual.", "model.visual."] + ["lm_head."] * config.tied)


def load_release(folder, context=8192, place=None):
    """The FLM-Audio release, or an export of ours: (model, vocab). context: frames that attention sees, at
    most. place: see build. Raises ValueError or OSError."""
    config, vocab = read_release_config(folder, context)
    check_vocab(vocab, config, f"{folder}/config.json", frames=0)  # the release does not tell
    return load(folder, config, dict(release_tensors(config)), place), vocab


def start_from(folder, config, vocab, meta, place=None, seed=0):
    """The model that a training starts from: of a run of ours, the FLM-Audio release (or an export of ours),
    or the language model Qwen2.5. vocab, meta: of the data. Returns (model, whether it knows audio already).
    Raises ValueError or OSError."""
    ours, theirs = os.path.exists(os.path.join(folder, "checkpoint.pt")), None
    if ours:
        model = build_from_checkpoint(folder, meta, place)
    elif read_config(folder, ("FLMAudio", *QWEN))["model_type"] == "FLMAudio":
        model, theirs = load_release(folder, config.context, place)
        codes = theirs.codebook_size
        if codes != vocab.codebook_size:
            raise ValueError(f"{folder}: speaks the {codes} codes of its codec, the data has "
                             f"{vocab.codebook_size}; encode with the release's codec, Kyutai's Mimi")
    else:
        model = from_qwen(folder, config, place, seed)
    if model.config.vocab_size < vocab.text_size:
        raise ValueError(f"{folder}: has {model.config.vocab_size} words, fewer than the {vocab.text_size} "
                         f"of the data's tokeniser; encode with --tokenizer {folder}")
    if theirs:
        move_token(model, theirs.wait, vocab.wait)
    return model, bool(ours or theirs)


@torch.no_grad()
def move_token(model, old, new):
    """Make a token mean what another one means."""
    for p in {model.text.weight, model.head.weight}:
        rows = gather(p).clone()
        rows[new] = rows[old]
        assign_shard(p, rows)


def read_release_config(folder, context):
    """(FLMConfig, Vocab) of the release's config.json."""
    c = read_config(folder, ("FLMAudio",))
    try:
        depth, ids, mup = c["aud_depthgpt"], c["mm_token_info"], c.get("use_mup", False)
        empty, codebook_size = ids["aud_emp_token_id"], ids["aud_pad_token_id"]
        odd = [k for k in ("use_cmlp", "use_rmsnorm", "use_swiglu") if not depth[k]]
        odd += ["bias"] * bool(depth["bias"])
        if odd or c["aud_channel"] != K or c["aud_vocab_size"] != empty + 1:
            odd = ", ".join(odd) or "its audio channels or ids"
            raise ValueError(f"not the release's kind of model: {odd}")
        config = dict(
            **qwen_fields(c, folder), depth_layers=depth["n_layer"], depth_width=depth["n_embd"],
            depth_heads=depth["n_head"], empty=empty,
            context=min(context, c.get("max_position_embeddings", context)),
            input_scale=c["input_mult"] if mup else 1.0,
            output_scale=c["output_mult"] / c["mup_scale_factor"] if mup else 1.0)
        # -1: the release has no <asr> and <answer> tokens
        vocab = dict(text_size=c["vocab_size"], wait=ids["text_wait_token_id"], asr=-1, answer=-1,
                     codebook_size=codebook_size, empty=empty, silence=())
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise ValueError(f"{folder}/config.json: {type(e).__name__}: {one_line(e)}") from None
    where = f"{folder}/config.json"
    return from_fields(FLMConfig, config, where), from_fields(Vocab, vocab, where)


# ------------------------------------------------------------------------------------------------------------
# talking

MIMI = "tokenizer-e351c8d8-checkpoint125.safetensors"  # the release's codec
INDEX = "model.safetensors.index.json"
# How the release samples its text, the first four codes of a frame, and the others. (It asks for top-k 1,
# too, but its code ignores that where top-p is given.)
SAMPLING = [Sampling(0.01, top_p=0.9, penalty=1.03),
            *[Sampling(0.5, top_p=0.9, penalty=1.2)] * 4, *[Sampling(0.5, top_p=0.9)] * (K - 4)]


def is_release(folder):
    """Whether a folder holds a published model rather than one of ours."""
    has = lambda name: os.path.isfile(os.path.join(folder, name))
    return has("config.json") and not has("checkpoint.pt")


def find_codec(folder):
    """The path of the codec in the release's folder, or in an export of ours. OSError if there is none."""
    for path in (os.path.join(folder, name) for name in (MIMI, "codec.pt")):
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(f"{folder}: holds no {MIMI}; name that file with --codec")


def load_to_talk(folder, codec):
    """What chat.DuplexModel is made of: {"model", "vocab", "codec", "tokenizer", "text", "audio", "release"}.
    codec: a Mimi, which gives the codes of silence. On a GPU the weights are bfloat16. Raises ValueError or
    OSError."""
    config, vocab = read_release_config(folder, 8192)
    tokenizer, n = read_tokenizer(folder), vocab.text_size
    if not n - 1024 < tokenizer.n_vocab <= n:  # vocabularies are padded a little
        raise ValueError(f"{folder}: its tokeniser has {tokenizer.n_vocab} tokens, config.json {n}: "
                         "it is another model's")
    if (codec.config.codebook_size, codec.config.codebooks) != (vocab.codebook_size, K):
        raise ValueError(f"{folder}: needs a codec with {K} codebooks of {vocab.codebook_size}, "
                         f"not {codec.config.codebooks} of {codec.config.codebook_size}; see --codec")
    device = codec.codebooks().device
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, _ = load_release(folder, place=lambda model: model.to(kind).to_empty(device=device))
    ours = {name: tokenizer.encode_single_token(f"<{name}>") for name in ("asr", "answer")
            if f"<{name}>" in tokenizer.special_tokens_set}  # in an export
    vocab = dataclasses.replace(vocab, silence=tuple(map(tuple, codec.silence())), **ours)
    return dict(model=model.eval(), vocab=vocab, codec=codec, tokenizer=tokenizer,
                text=SAMPLING[0], audio=SAMPLING[1:], release=True)


def read_tokenizer(folder):
    """The published tokeniser of a folder as a tiktoken.Encoding. Raises ValueError or OSError."""
    saved = read_published_bpe(folder)
    return make_tokenizer(saved["ranks"], saved["pattern"], saved["specials"], ours=())


# ------------------------------------------------------------------------------------------------------------
# exporting


@torch.no_grad()
def export_release(model, vocab, folder):
    """Write a model in the FLM-Audio release's format: folder/config.json and folder/model.safetensors."""
    from safetensors.torch import save_file
    c, params, out = model.config, dict(model.named_parameters()), {}
    qkv_rows = [c.width, c.kv_heads * c.width // c.heads, c.kv_heads * c.width // c.heads]
    for ours, theirs in release_tensors(c):
        if not isinstance(theirs[0], list):
            pairs = [(params[ours], theirs)]
        else:
            pairs = zip(params[ours].mT, theirs)
        for tensor, names in pairs:
            sizes = qkv_rows if len(names) == 3 else [len(tensor) // len(names)] * len(names)
            out |= {name: part.contiguous() for name, part in zip(names, tensor.split(sizes))}
    with replace_when_done(os.path.join(folder, "model.safetensors")) as temporary:
        save_file(out, temporary, metadata={"format": "pt"})
    with replace_when_done(os.path.join(folder, "config.json")) as temporary, open(temporary, "w") as f:
        json.dump(release_config(c, vocab), f, indent=1)


def release_config(c, vocab):
    """config.json as a dict: the inverse of read_release_config."""
    depth = dict(n_layer=c.depth_layers, n_embd=c.depth_width, n_head=c.depth_heads, bias=False, dropout=0.0,
                 use_cmlp=True, use_rmsnorm=True, use_swiglu=True)
    ids = dict(aud_emp_token_id=vocab.empty, aud_pad_token_id=vocab.codebook_size,
               text_wait_token_id=vocab.wait)
    return dict(
        model_type="FLMAudio", architectures=["FLMAudioForCausalLM"], num_hidden_layers=c.layers,
        hidden_size=c.width, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
        head_dim=c.width // c.heads, intermediate_size=c.mlp, vocab_size=c.vocab_size,
        tie_word_embeddings=c.tied, rms_norm_eps=c.norm_eps, rope_theta=c.rope_base, rope_scaling=None,
        max_position_embeddings=c.context, hidden_act="silu", attention_bias=True, disable_att_o_bias=True,
        mlp_bias=False, use_mup=True,
        input_mult=c.input_scale, output_mult=c.output_scale, mup_scale_factor=1.0, aud_channel=K,
        aud_vocab_size=c.empty + 1, aud_depthgpt=depth, mm_token_info=ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", help="folder that train.py wrote")
    parser.add_argument("folder", help="folder to write the export to")
    args = parser.parse_args()
    try:
        model, vocab, _ = FLM.load(os.path.join(args.run, "checkpoint.pt"))
        export_release(model, vocab, args.folder)
        for name, text in dump_published(get_tokenizer(args.run, {}, 0)).items():
            write_text(os.path.join(args.folder, name), text)
        copy(os.path.join(args.run, "codec.pt"), os.path.join(args.folder, "codec.pt"))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"Wrote {args.folder}, with codec.pt for chat.py; the release's own code needs {MIMI} in its place")


if __name__ == "__main__":
    main()
