"""Qwen2.5's language model, and the FLM-Audio release that contains it: read and written.

    their tensors  ---- a table of names ---->  ours        q, k, v -> one matrix; a matrix for each of K positions -> a stack

All strict: every tensor of a file is accounted for, and an unknown, missing or misshaped one is a ValueError that names it.
What the published models compute is compared with their own code's numbers in tests/.

    python -m published.release out/7b flm-audio-mine        a model of ours, laid out as the release is
"""
import argparse
import dataclasses
import glob
import json
import os
import sys

import torch

from files.atomic import copy, read_json, replace_when_done
from files.checkpoint import open_safetensors
from model import FLM, FLMConfig
from streams import K, Vocab
from training.parallel import assign_shard, build

# ---------------------------------------------------------------------------------------------------------------------
# the temporal transformer: Qwen2.5; the whole: the FLM-Audio release


def qwen_tensors(c: FLMConfig, prefix, embedding):
    """What the published tensors of the temporal transformer become: (name here, names there, whose rows are put together)."""
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
    """The same for the whole model. A list of lists: one matrix for each of the K positions, here transposed and stacked."""
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
        for name, there in (("norm1", "ln_1"), ("norm2", "ln_2"), ("qkv", "attn.c_attn"), ("out", "attn.c_proj")):
            yield f"{ours}{name}.weight", [f"{theirs}{there}.weight"]
        yield f"{ours}gate_up", [[f"{theirs}mlps.{k}.{x}_proj.weight" for x in ("gate", "up")] for k in range(K)]
        yield f"{ours}down", [[f"{theirs}mlps.{k}.down_proj.weight"] for k in range(K)]
    yield "depth.norm.weight", [depth + "transformer.ln_f.weight"]
    yield "depth.heads", [[f"{depth}lm_heads.{k}.weight"] for k in range(K)]


@torch.no_grad()
def load_tensors(model, files, folder, table, ignore=()):
    """Fill parameters from the open files of a folder (see open_all), one tensor at a time. table: {name here: names there}. Every
    tensor there is accounted for, but those whose names begin with `ignore`: ValueError for an unknown, missing or misshaped one."""
    params, used = dict(model.named_parameters()), set()

    def read(names):
        for name in names:
            if name not in files:
                raise ValueError(f"{folder}: has no tensor {name}")
            used.add(name)
        try:
            return torch.cat([files[name].get_tensor(name) for name in names])
        except RuntimeError as e:
            raise ValueError(f"{folder}: {' and '.join(names)} do not fit together ({e})") from None

    for ours, theirs in table.items():
        if isinstance(theirs[0], list):
            tensor = torch.stack([read(names).T for names in theirs])
        else:
            tensor = read(theirs)
        if tensor.shape != params[ours].shape:
            raise ValueError(f"{folder}: {theirs[0] if isinstance(theirs[0], str) else theirs[0][0]}: gives {tuple(tensor.shape)} "
                             f"where config.json asks for {tuple(params[ours].shape)}")
        assign_shard(params[ours], tensor)
    unknown = sorted(name for name in files.keys() - used if not name.startswith(tuple(ignore)))
    if unknown:
        raise ValueError(f"{folder}: unknown tensor {unknown[0]}" + (f" and {len(unknown) - 1} more" if unknown[1:] else ""))


def open_all(folder):
    """{name of a tensor: the open file that holds it}, of a folder's *.safetensors files"""
    files = [open_safetensors(path) for path in sorted(glob.glob(os.path.join(folder, "*.safetensors")))]
    if not files:
        raise FileNotFoundError(f"{folder}: holds no *.safetensors file")
    return {name: f for f in files for name in f.keys()}


def read_config(folder, kinds):
    """config.json, whose model_type must be one of these; the language model's part of it if it has one."""
    path = os.path.join(folder, "config.json")
    c = read_json(path)
    part = c.get("text_config", {}) if isinstance(c, dict) else None
    if not isinstance(part, dict):
        raise ValueError(f"{path}: not a model's config")
    if c.get("model_type") not in kinds:
        raise ValueError(f"{path}: is of a {c.get('model_type')}, not of {' or '.join(kinds)}")
    return {**c, **part}


def qwen_fields(c, where):
    """The fields of FLMConfig that a config.json of Qwen2.5's kind tells."""
    try:
        rope = c.get("rope_parameters") or {}
        return dict(layers=c["num_hidden_layers"], width=c["hidden_size"], heads=c["num_attention_heads"],
                    kv_heads=c["num_key_value_heads"], mlp=c["intermediate_size"], vocab_size=c["vocab_size"],
                    tied=c.get("tie_word_embeddings", False), norm_eps=c["rms_norm_eps"],
                    rope_base=float(c["rope_theta"] if "rope_theta" in c else rope["rope_theta"]))
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{where}/config.json: {type(e).__name__}: {e}") from None


def from_qwen(folder, config: FLMConfig, place=None):
    """A model with the language model in `folder` (Qwen2.5 or the language part of Qwen2.5-VL, as published) as its temporal
    transformer, and with config's depth transformer, codec and context, which are new. place: see build."""
    c = read_config(folder, ("qwen2", "qwen2_5_vl", "qwen2_5_vl_text"))
    config = dataclasses.replace(config, **qwen_fields(c, folder))
    files = open_all(folder)
    prefix = next((p for p in ("model.language_model.", "model.") if p + "norm.weight" in files), "model.")
    table = dict(qwen_tensors(config, prefix, prefix + "embed_tokens.weight"))
    model = build(config, place, given=table)
    load_tensors(model, files, folder, table, ignore=("visual.", "model.visual.", *(["lm_head."] if config.tied else [])))
    return model


def load_release(folder, context=8192):
    """(model, its vocabulary) from the FLM-Audio release in `folder` (config.json, *.safetensors), on the CPU. What its silence
    sounds like is not in there: the codec must tell. Raises ValueError for another kind of model, and for an unknown, missing
    or misshaped tensor."""
    config, vocab = read_release_config(folder, context)
    table = dict(release_tensors(config))
    model = build(config, given=table)
    load_tensors(model, open_all(folder), folder, table)
    return model, vocab


def read_release_config(folder, context):
    """(FLMConfig, Vocab) that the release's config.json tells."""
    c = read_config(folder, ("FLMAudio",))
    try:
        depth, ids, mup = c["aud_depthgpt"], c["mm_token_info"], c.get("use_mup", False)
        odd = [k for k in ("use_cmlp", "use_rmsnorm", "use_swiglu") if not depth[k]] + ["bias"] * depth["bias"]
        if odd or c["aud_channel"] != K or c["aud_vocab_size"] != ids["aud_emp_token_id"] + 1:
            raise ValueError(f"not the release's kind of model: {', '.join(odd) or 'its audio channels or ids'}")
        config = FLMConfig(**qwen_fields(c, folder), depth_layers=depth["n_layer"], depth_width=depth["n_embd"],
                           depth_heads=depth["n_head"], empty=ids["aud_emp_token_id"], context=context,
                           input_scale=c["input_mult"] if mup else 1.0,
                           output_scale=c["output_mult"] / c["mup_scale_factor"] if mup else 1.0)
        none = -1  # the release keeps no ids for these
        return config, Vocab(c["vocab_size"], ids["text_wait_token_id"], none, none, ids["aud_pad_token_id"], ids["aud_emp_token_id"], ())
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{folder}/config.json: {type(e).__name__}: {e}") from None


@torch.no_grad()
def export_release(model, vocab, folder):
    """Write model as the FLM-Audio release is laid out: folder/config.json and folder/model.safetensors."""
    from safetensors.torch import save_file
    c, params, out = model.config, dict(model.named_parameters()), {}
    rows = {"qkv": [c.width, c.kv_heads * c.width // c.heads, c.kv_heads * c.width // c.heads]}
    for ours, theirs in release_tensors(c):
        stacked = isinstance(theirs[0], list)
        for tensor, names in zip(params[ours].mT if stacked else [params[ours]], theirs if stacked else [theirs]):
            sizes = rows["qkv"] if len(names) == 3 else [len(tensor) // len(names)] * len(names)
            out |= {name: part.contiguous() for name, part in zip(names, tensor.split(sizes))}
    saved = dict(
        model_type="FLMAudio", architectures=["FLMAudioForCausalLM"], num_hidden_layers=c.layers, hidden_size=c.width,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.width // c.heads, intermediate_size=c.mlp,
        vocab_size=c.vocab_size, tie_word_embeddings=c.tied, rms_norm_eps=c.norm_eps, rope_theta=c.rope_base, rope_scaling=None,
        max_position_embeddings=c.context, hidden_act="silu", attention_bias=True, disable_att_o_bias=True, mlp_bias=False,
        use_mup=True, input_mult=c.input_scale, output_mult=c.output_scale, mup_scale_factor=1.0, aud_channel=K,
        aud_vocab_size=c.empty + 1, aud_depthgpt=dict(n_layer=c.depth_layers, n_embd=c.depth_width, n_head=c.depth_heads, bias=False,
                                                      dropout=0.0, use_cmlp=True, use_rmsnorm=True, use_swiglu=True),
        mm_token_info=dict(aud_emp_token_id=vocab.empty, aud_pad_token_id=vocab.codebook_size, text_wait_token_id=vocab.wait))
    with replace_when_done(os.path.join(folder, "model.safetensors")) as temporary:
        save_file(out, temporary, metadata={"format": "pt"})
    with replace_when_done(os.path.join(folder, "config.json")) as temporary, open(temporary, "w") as f:
        json.dump(saved, f, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder that train.py wrote")
    parser.add_argument("folder", help="where the release's layout of it shall be")
    args = parser.parse_args()
    try:
        model, vocab, _ = FLM.load(os.path.join(args.run, "checkpoint.pt"))
        export_release(model, vocab, args.folder)
        copy(os.path.join(args.run, "tokenizer.json"), os.path.join(args.folder, "tokenizer.json"))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"Wrote {args.folder}")


if __name__ == "__main__":
    main()
