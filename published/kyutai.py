"""Mimi as published, in two files' layouts: Kyutai's, and the transformers library's. Both hold the same weights.

    encoder.model.0.conv.conv.weight                  Kyutai's
    encoder.layers.0.conv.weight                      the transformers library's
    encoder.0.0.weight                                here

Strict: every tensor of a file is accounted for, and an unknown, missing or misshaped one is a ValueError that names it.
"""
import re

import torch

from files.checkpoint import open_safetensors

MIMI_NAMES = [  # what a tensor is called in Kyutai's or in the transformers library's file -> what it is called here, in turn
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


def read(path):
    """(its tensors by their published names, how many codebooks it has)"""
    file = open_safetensors(path)
    weights = {name: file.get_tensor(name) for name in file.keys()}
    acoustic = [name for name in weights if name.endswith("cluster_usage") and ("rvq_rest" in name or "acoustic" in name)]
    return weights, 1 + len(acoustic)


def fill(module, weights, heads, where):
    """Put tensors under their published names into module."""
    ours, origin = {}, {}
    for published, tensor in weights.items():
        name = published
        for pattern, replacement in MIMI_NAMES:
            name = re.sub(pattern, replacement, name)
        if name in ours:
            raise ValueError(f"{where}: holds the same tensor twice, as {origin[name]} and {published}")
        if not name.endswith(".initialized"):
            ours[name], origin[name] = tensor, published
    # The transformers library keeps q, k and v apart, and a head's channels in the order (0, 2, 4, ..., 1, 3, 5, ...).
    neighbours = lambda w: w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    for name in [n for n in ours if n.endswith(".self_attn.q_proj.weight")]:
        layer = name.removesuffix("self_attn.q_proj.weight")
        try:
            q, k, v = (ours.pop(f"{layer}self_attn.{x}_proj.weight") for x in "qkv")
            ours[layer + "in_proj.weight"] = torch.cat([neighbours(q), neighbours(k), v])
        except (KeyError, RuntimeError) as e:
            raise ValueError(f"{where}: {origin[name]} does not fit with its keys and values ({e})") from None
    for name, layer in module.named_modules():
        if hasattr(layer, "depthwise") and name + ".weight" in ours and ours[name + ".weight"].ndim == 3:
            ours[name + ".weight"] = ours[name + ".weight"].permute((0, 2, 1) if layer.depthwise else (1, 2, 0))
    wanted = module.state_dict()
    for name in ours.keys() - wanted.keys():
        raise ValueError(f"{where}: unknown tensor {origin[name]}; not a Mimi, or one of another size")
    for name in wanted.keys() - ours.keys():
        raise ValueError(f"{where}: has no tensor for {name}; not a Mimi, or one of another size")
    for name, tensor in ours.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{where}: {origin.get(name, name)} is {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}")
    module.load_state_dict(ours)
