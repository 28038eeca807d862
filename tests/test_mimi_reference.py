"""Mimi against the two implementations whose files it reads: Kyutai's `moshi` package and the transformers
library (slow; `make slow` installs them). To show that two implementations compute the same, random weights
will do: they are scaled layer by layer until all activations are of order one and the codes are diverse.

    python tests/test_mimi_reference.py     writes the golden files that tests/test_mimi.py compares with
"""
import os
import sys

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from mimi import FRAME, Mimi, MimiConfig  # noqa: E402

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
SMALL = MimiConfig(width=4, dim=32, encoder_layers=2, decoder_layers=2, heads=4, mlp=64, context=24,
                   codebooks=8, codebook_size=32, codebook_dim=16)
FULL = MimiConfig(codebooks=32)


def audio(frames, B=1):
    """Noise and rising tones that come and go: (B, 1, 1920*frames), the same everywhere."""
    n, random = frames * FRAME, np.random.RandomState(0)
    t = np.arange(n) / 24000
    rows = []
    for b in range(B):
        tones = np.sin(2 * np.pi * (200 + 150 * b + 90 * t) * t) + 0.5 * np.sin(2 * np.pi * 1830 * t)
        noise = random.randn(n)
        rows.append(0.2 * tones * np.sin(2.1 * t + b) ** 2 + 0.1 * noise * np.sin(0.9 * t + 2 * b) ** 2)
    return torch.from_numpy(np.stack(rows)).float()[:, None]


# ------------------------------------------------------------------------------------------------------------
# the references: (module, encode(wav, K), decode(codes), [(input projection, [(cluster usage, embedding sum)
# of each codebook]) of each quantiser])


def kyutai(c):
    from moshi.models.loaders import _mimi_config, get_mimi
    seanet = {**_mimi_config["seanet"], "dimension": c.dim, "n_filters": c.width}
    transformer = {**_mimi_config["transformer"], "d_model": c.dim, "num_heads": c.heads,
                   "num_layers": c.encoder_layers, "dim_feedforward": c.mlp, "context": c.context,
                   "input_dimension": c.dim, "output_dimensions": [c.dim]}
    quantizer = {"dimension": c.codebook_dim, "n_q": c.codebooks, "bins": c.codebook_size,
                 "input_dimension": c.dim, "output_dimension": c.dim}
    m = get_mimi(None, {**_mimi_config, "seanet": seanet, "transformer": transformer, "quantizer": quantizer},
                 num_codebooks=c.codebooks)

    def encode(wav, K):
        m.set_num_codebooks(K)
        return m.encode(wav)
    quantisers = m.quantizer.rvq_first, m.quantizer.rvq_rest
    codebooks = lambda q: (layer._codebook for layer in q.vq.layers)
    books = [(q.input_proj, [(b.cluster_usage, b.embedding_sum) for b in codebooks(q)]) for q in quantisers]
    return m, encode, m.decode, books


def transformers(c):
    import transformers
    m = transformers.MimiModel(transformers.MimiConfig(
        hidden_size=c.dim, num_filters=c.width, num_hidden_layers=c.encoder_layers, intermediate_size=c.mlp,
        num_attention_heads=c.heads, num_key_value_heads=c.heads, head_dim=c.dim // c.heads,
        sliding_window=c.context, codebook_size=c.codebook_size, codebook_dim=c.codebook_dim,
        vector_quantization_hidden_dimension=c.codebook_dim, num_quantizers=c.codebooks,
        upsample_groups=c.dim)).eval()
    q = m.quantizer
    books = [(r.input_proj, [(layer.codebook.cluster_usage, layer.codebook.embed_sum) for layer in r.layers])
             for r in (q.semantic_residual_vector_quantizer, q.acoustic_residual_vector_quantizer)]
    encode = lambda wav, K: m.encode(wav, num_quantizers=K).audio_codes
    return m, encode, lambda codes: m.decode(codes).audio_values, books


REFERENCES = {"kyutai": kyutai, "transformers": transformers}


@torch.no_grad()
def make_healthy(reference, wav, seed=0):
    """Random weights with which each convolution's output has variance one, attention matters, and many codes
    occur."""
    m, encode, decode, books = reference
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    for name, p in m.named_parameters():
        if name.endswith("scale"):  # LayerScale
            p.copy_(0.4 + 0.1 * normal(*p.shape))
        elif p.ndim == 1:
            p.copy_(("norm" in name and "weight" in name) + 0.1 * normal(*p.shape))
        else:
            p.copy_(normal(*p.shape) / p[0].numel() ** 0.5)

    def unit_variance(layer, _, y):
        for p in layer.parameters():
            p.div_(y.std())
        return y / y.std()
    convolutions = [layer for layer in m.modules() if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d))]
    hooks = [layer.register_forward_hook(unit_variance) for layer in convolutions]
    latent = []
    grab = [proj.register_forward_hook(lambda _, x, y: latent.append(y)) for proj, _ in books]
    for _, layers in books:
        for _, total in layers:
            total.copy_(normal(*total.shape))
    K = encode(wav, sum(len(layers) for _, layers in books)).shape[1]
    for hook in grab:
        hook.remove()
    for (_, layers), y in zip(books, latent):
        rest = y.mT.flatten(0, 1)
        for usage, total in layers:
            N, D = total.shape
            e = normal(N, D) * rest.std() * (2 * np.log(N) / D) ** 0.5  # the best length in random directions
            usage.copy_(torch.rand(N, generator=generator) * 3 + 0.5)
            total.copy_(e * usage[:, None])
            rest = rest - e[torch.cdist(rest, e).argmin(1)]
    clear_embedding_caches(m)
    decode(encode(wav, K))
    for hook in hooks:
        hook.remove()


def clear_embedding_caches(m):
    """Both references cache sum / usage: drop the cache."""
    for layer in m.modules():
        for cache in {"_embedding", "_embed"} & {*dir(layer)}:
            setattr(layer, cache, None)


def save(m, folder):
    """folder/model.safetensors, with the names of the published files."""
    if hasattr(m, "save_pretrained"):
        m.save_pretrained(folder)
    else:
        from safetensors.torch import save_file
        os.makedirs(folder, exist_ok=True)
        weights = {name: t.contiguous() for name, t in m.state_dict().items()}
        save_file(weights, os.path.join(folder, "model.safetensors"))
    return os.path.join(folder, "model.safetensors")


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("who", REFERENCES)
@torch.no_grad()
def test_the_same_codes_and_the_same_audio(who, size, tmp_path):
    pytest.importorskip({"kyutai": "moshi"}.get(who, who))
    config = {"small": SMALL, "full": FULL}[size]
    wav = audio(150, 2)  # 12 s: longer than the context
    reference = m, encode, decode, _ = REFERENCES[who](config)
    make_healthy(reference, wav)
    path = save(m, tmp_path)
    for K in (1, 8, config.codebooks):
        ours = Mimi.from_pretrained(path, K, config)
        codes = encode(wav, K)
        assert min(len(row.unique()) for row in codes.transpose(0, 1)) > min(32, config.codebook_size / 3)
        agree = (ours.encode(wav) == codes).float().mean().item()
        y = decode(codes)
        apart = (ours.decode(codes) - y).abs().max() / y.abs().max()
        print(f"{who}, {size}, {K} codebooks: {agree:.2%} of {codes.numel()} codes, "
              f"audio within {apart:.1e} of its peak")
        assert agree >= 0.999 and apart < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_streaming_against_kyutais(tmp_path):
    """Frame by frame. The package caches exactly `context` keys, and has overwritten the oldest two with both
    steps of a frame when the first step attends. So from 10 s on that step misses one key that it sees
    offline."""
    pytest.importorskip("moshi")
    wav = audio(150)
    reference = m, encode, decode, _ = kyutai(SMALL)
    make_healthy(reference, wav)
    ours = Mimi.from_pretrained(save(m, tmp_path), 8, SMALL)
    state, theirs, mine = ours.init_state(1), [], []
    with m.streaming(1):
        for frame in wav.split(FRAME, -1):
            theirs.append(m.encode(frame))
            mine.append(ours.encode_step(frame, state))
    theirs, mine = torch.cat(theirs, -1), torch.cat(mine, -1)
    within = SMALL.context // 2
    assert (theirs[..., :within] == mine[..., :within]).float().mean() >= 0.999
    assert (mine == encode(wav, 8)).float().mean() >= 0.999
    print(f"after the context is full: streaming package agrees with itself offline in "
          f"{(theirs == encode(wav, 8))[..., within:].float().mean():.2%}, we with it offline in "
          f"{(mine == encode(wav, 8))[..., within:].float().mean():.2%} of the codes")


if __name__ == "__main__":
    for who, build in REFERENCES.items():
        reference = m, encode, decode, _ = build(SMALL)
        make_healthy(reference, audio(150))
        for t in (*m.parameters(), *m.buffers()):  # half the digits: a small file
            if t is not None and t.is_floating_point():
                t.data.copy_(t.half())
        clear_embedding_caches(m)
        path = save(m.half(), os.path.join(GOLDEN, f"mimi_{who}"))
        m.float()
        with torch.no_grad():
            codes = encode(audio(150), 8)
            y = decode(codes)[0, 0]
        peak = y.abs().max().item()
        np.savez_compressed(path.replace("model.safetensors", "golden.npz"),
                            codes=codes[0].numpy().astype(np.uint8), peak=np.float32(peak),
                            sound=np.round(y[::7].numpy() / peak * 32767).astype(np.int16))
        print(f"Wrote {path} and golden.npz ({len(codes[0].unique())} different codes, peak {peak:.2f})")
