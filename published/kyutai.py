"""Mimi as published, under the names of two files: Kyutai's, and the transformers library's. Both hold the
same weights.

    encoder.model.0.conv.conv.weight                  Kyutai's
    encoder.layers.0.conv.weight                      the transformers library's
    encoder.0.0.weight                                ours

Strict: every tensor of a file is accounted for; an unknown, missing or misshaped one is a ValueError that
names it. """
import re

import torch

from files.checkpoint import open_safetensors
from files.fields import one_line

RENAMES = [  # (pattern in a published name, replacement), applied in turn
    (r"^(encoder|decoder)_transformer\.(transformer\.)?", r"\1.1."),
    (r"^encoder\.(model|layers)\.", "encoder.0."),
    (r"^decoder\.(model|layers)\.", "decoder.2."),
    (r"^downsample\.", "encoder.2."),
    (r"^upsample\.", "decoder.0."),
    (r"\.block\.", "."),
    (r"(\.conv(tr)?)+\.", "."),
    (r"\.self_attn\.(in_projs\.0\.|in_proj_)weight$", ".in_proj.weight"),
    (r"\.self_attn\.(out_projs\.0|out_proj|o_proj)\.", ".out_proj."),
    (r"\.(linear1|mlp\.fc1)\.", ".up."),
    (r"\.(linear2|mlp\.fc2)\.", ".down."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.(layer_scale_1|self_attn_layer_scale)\.scale$", ".scale1"),
    (r"\.(layer_scale_2|mlp_layer_scale)\.scale$", ".scale2"),
    (r"^quantizer\.(rvq_first|semantic_residual_vector_quantizer)\.", "semantic."),
    (r"^quantizer\.(rvq_rest|acoustic_residual_vector_quantizer)\.", "acoustic."),
    (r"\.(vq\.)?layers\.(\d+)\._?codebook\.", r".layers.\2."),
    (r"\.embed_sum$", ".embedding_sum"),
    (r"\._?initialized$", ".initialized"),  # a flag of their training, not used here
]

MOST = 31  # acoustic codebooks


def read_weights(path):
    """({published name: tensor}, number of codebooks)"""
    file = open_safetensors(path)
    weights = {name: file.get_tensor(name) for name in file.keys()}
    acoustic = [n for n in weights if n.endswith("cluster_usage") and ("rvq_rest" in n or "acoustic" in n)]
    if len(acoustic) > MOST:
        raise ValueError(f"{path}: has {len(acoustic)} acoustic codebooks; there are {MOST} at most")
    return weights, 1 + len(acoustic)


def fit(module, weights, heads, where):
    """{published name: tensor} -> {our name: tensor}, all that a Mimi has; it may be one without memory.
    where: the file, for error messages."""
    ours, origin = {}, {}
    for published, tensor in weights.items():
        name = published
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name in ours:
            raise ValueError(f"{where}: holds the same tensor twice, as {origin[name]} and {published}")
        if not name.endswith(".initialized"):
            ours[name], origin[name] = tensor, published
    join_qkv(ours, origin, heads, where)
    for name, layer in module.named_modules():  # transposed convolutions: (C, C', kernel) -> (C', kernel, C)
        if hasattr(layer, "depthwise") and name + ".weight" in ours and ours[name + ".weight"].ndim == 3:
            order = (0, 2, 1) if layer.depthwise else (1, 2, 0)
            ours[name + ".weight"] = ours[name + ".weight"].permute(order)
    expected = module.state_dict()
    for name in ours.keys() - expected.keys():
        raise ValueError(f"{where}: unknown tensor {origin[name]}; not a Mimi, or one of another size")
    for name in expected.keys() - ours.keys():
        raise ValueError(f"{where}: has no tensor for {name}; not a Mimi, or one of another size")
    for name, tensor in ours.items():
        if tensor.shape != expected[name].shape:
            found, right = tuple(tensor.shape), tuple(expected[name].shape)
            raise ValueError(f"{where}: {origin.get(name, name)} is {found}, not {right}")
    return ours


def join_qkv(ours, origin, heads, where):
    """The transformers library stores q, k and v apart, and the channels of a head in the order 0, 2, 4, ...,
    1, 3, 5, ...: join them in place, with pairs of channels next to each other."""
    interleave = lambda w: w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    for name in [n for n in ours if n.endswith(".self_attn.q_proj.weight")]:
        layer = name.removesuffix("self_attn.q_proj.weight")
        try:
            q, k, v = (ours.pop(f"{layer}self_attn.{x}_proj.weight") for x in "qkv")
            ours[layer + "in_proj.weight"] = torch.cat([interleave(q), interleave(k), v])
        except (KeyError, RuntimeError) as e:
            raise ValueError(f"{where}: {origin[name]} does not fit with its keys and values "
                             f"({one_line(e)})") from None
