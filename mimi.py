"""Mimi, the codec: 24 kHz waveform <-> 8 codes for each 80 ms frame (12.5 Hz), offline or frame by frame.

    wav (B, 1, 1920*T)
      | front end       SEANet convolutions (Kyutai's Mimi) or a spectrogram (ours, which trains in minutes)
      v (B, 512, 2*T)   25 Hz
      | transformer, stride-2 convolution
      v (B, 512, T)     12.5 Hz
      | split residual vector quantiser
      v
    codes (B, 8, T)     row 0 semantic, rows 1-7 acoustic; the decoder is the mirror image

Source: Moshi (arXiv 2410.00037), section 3.3; FLM-Audio, section 2.1, uses Mimi as it is.

Why two front ends. SEANet learns its filters from raw samples, which takes GPU-days and a discriminator. The
codec that trains on a laptop in minutes is given what such filters end up near: log-mel frames in, an inverse
Fourier transform out. Both are stacks of the same causal convolutions; everything else is shared.

Streaming. Each layer that looks back keeps what it needs in a state that the caller holds: `init_state(B)`
makes it, each step reads and updates it. Offline processing is one long step from a fresh state, so the two
cannot differ.

B batch, C channels, T frames or time steps, K codebooks, H heads, D channels of a head.
"""
import argparse
import dataclasses
import math
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from files.audio import SAMPLE_RATE, check_output, read_audio, write_audio
from files.device import check_device
from files.checkpoint import check_weights, from_fields, is_safetensors, load_checkpoint, load_weights
from files.spectrogram import MELS, WINDOW, InverseFourier, LogMel, log_spectral_distance
from published import kyutai

FRAME = 1920  # samples in one frame: 80 ms

# Codes are the nearest vectors, and the ten bits of TF32 would choose others here and there: float32 as a CPU
# has it. (Matrix products are float32 unless someone allows less; convolutions are not.)
torch.backends.cudnn.allow_tf32 = False


@dataclass(frozen=True)
class MimiConfig:
    frontend: str = "seanet"  # "seanet": Mimi as released; "spectral": trains from scratch in minutes
    width: int = 64  # channels of the front end next to the waveform
    ratios: tuple = (4, 5, 6, 8)  # strides of the front end, from the waveform; their product is 960: 25 Hz
    blocks: int = 1  # residual blocks at each stride (seanet) or in all (spectral)
    dim: int = 512  # channels of the transformers
    encoder_layers: int = 8
    decoder_layers: int = 8
    heads: int = 8
    mlp: int = 2048
    context: int = 250  # 25 Hz steps that attention sees: 10 s
    codebooks: int = 8  # 1 semantic, the rest acoustic; the release trained 32
    codebook_size: int = 2048
    codebook_dim: int = 256

    def __post_init__(self):
        spectral = self.frontend == "spectral" and len(self.ratios) == 2 and self.ratios[0] <= WINDOW // 2
        if not (spectral or self.frontend == "seanet") or math.prod(self.ratios) * 2 != FRAME:
            raise ValueError(f"front end {self.frontend} with strides {self.ratios}: none with 12.5 frames a "
                             "second")
        if self.dim % (2 * self.heads) or self.width < 2:
            raise ValueError(f"dim {self.dim}, heads {self.heads}, width {self.width}: heads must divide dim "
                             "into even parts, and width is at least 2")


CONFIGS = {
    "mimi": MimiConfig(),
    # No transformer before the quantiser: the codes of a word then depend on little but the word, so a small
    # language model predicts them more easily. The decoder may look back as far as it likes.
    "tiny": MimiConfig("spectral", width=128, ratios=(240, 4), blocks=3, dim=192, encoder_layers=0,
                       decoder_layers=2, heads=4, mlp=384, context=25, codebook_size=256, codebook_dim=64),
}


# ------------------------------------------------------------------------------------------------------------
# causal layers: forward(x, state) reads the past from the state and writes the newest past back


class Conv(nn.Conv1d):
    """Causal convolution, (B, C, stride*T) -> (B, C', T). State: the end of the input so far, at first
    zeros."""

    def __init__(self, c_in, c_out, kernel, stride=1, groups=1, bias=True, repeat_first=False):
        super().__init__(c_in, c_out, kernel, stride=stride, groups=groups, bias=bias)
        self.past = kernel - stride
        self.repeat_first = repeat_first  # pad with copies of the first step instead of zeros

    def init_state(self, B):
        state = {"past": self.weight.new_zeros(B, self.in_channels, self.past)}
        if self.repeat_first:
            state["started"] = torch.zeros(B, 1, 1, dtype=torch.bool, device=self.weight.device)
        return state

    def forward(self, x, state):
        if self.past:
            past = state["past"].to(x.dtype)
            if self.repeat_first:
                past = torch.where(state["started"].clone(), past, x[..., :1])
                state["started"].fill_(True)
            x = torch.cat([past, x], -1)
            state["past"].copy_(x[..., -self.past:].detach())
        # One matrix product. For the few steps of a stream, conv1d would spend as much time on rearranging
        # the weights as on the rest; here they are read in order.
        weight = self.weight.flatten(1)
        windows = x.unfold(-1, *self.kernel_size, *self.stride)  # (B, C, T, kernel)
        if self.groups > 1 and windows.shape[2] > 8:
            return super().forward(x)
        if self.groups > 1:  # depthwise
            return (windows @ weight[..., None])[..., 0] + self.bias[:, None]
        if windows.shape[2] <= 4:
            return F.linear(windows.transpose(1, 2).flatten(2), weight, self.bias).mT
        y = weight.expand(len(x), -1, -1) @ windows.mT.flatten(1, 2)
        return y if self.bias is None else y.add_(self.bias[:, None])


class ConvTranspose(nn.Module):
    """Causal transposed convolution, (B, C, T) -> (B, C', stride*T). Each step gives `kernel` samples; those
    beyond the stride overlap the next step's and are added to them. State: this overlap; at the end of the
    audio it is dropped, as in Mimi. The weight's layout (C', kernel, C) lets each step of a stream read it
    once, in order."""

    def __init__(self, c_in, c_out, kernel, stride, depthwise=False, bias=True):
        super().__init__()
        assert kernel in (stride, 2 * stride), "a step may overlap the next one only"
        self.stride, self.overlap, self.depthwise = stride, kernel - stride, depthwise
        weight = torch.empty(c_out, kernel, 1 if depthwise else c_in)
        bound = (kernel * (1 if depthwise else c_out)) ** -0.5
        self.weight = nn.Parameter(weight.uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None

    def init_state(self, B):
        return {"overlap": self.weight.new_zeros(B, len(self.weight), self.overlap)}

    def forward(self, x, state):
        x = x.mT
        if self.depthwise:
            y = x[..., None] * self.weight[..., 0]  # (B, T, C', kernel)
        else:
            y = F.linear(x, self.weight.flatten(0, 1)).unflatten(-1, self.weight.shape[:2])
        y, overlap = y.split([self.stride, self.overlap], -1)
        if self.overlap:
            y = y + torch.cat([state["overlap"][:, None].to(y.dtype), overlap[:, :-1]], 1)
            state["overlap"].copy_(overlap[:, -1].detach())
        y = y.transpose(1, 2).flatten(2)
        return y if self.bias is None else y + self.bias[:, None]


class StreamingSequential(nn.Sequential):
    """Layers one after another; the state is the list of their states (None for a layer without one)."""

    def init_state(self, B):
        return [layer.init_state(B) if hasattr(layer, "init_state") else None for layer in self]

    def forward(self, x, state):
        for layer, s in zip(self, state, strict=True):
            x = layer(x) if s is None else layer(x, s)
        return x


class Residual(StreamingSequential):
    def forward(self, x, state):
        return x + super().forward(x, state)


# ------------------------------------------------------------------------------------------------------------
# front end 1: SEANet, from raw samples (Mimi as released)


def seanet_encoder(c: MimiConfig):
    n = c.width
    layers = [Conv(1, n, 7)]
    for r in c.ratios:
        layers += [*(seanet_block(n) for _ in range(c.blocks)), nn.ELU(), Conv(n, 2 * n, 2 * r, stride=r)]
        n *= 2
    return StreamingSequential(*layers, nn.ELU(), Conv(n, c.dim, 3))


def seanet_decoder(c: MimiConfig):
    n = c.width * 2 ** len(c.ratios)
    layers = [Conv(c.dim, n, 7)]
    for r in reversed(c.ratios):
        n //= 2
        layers += [nn.ELU(), ConvTranspose(2 * n, n, 2 * r, stride=r)]
        layers += [seanet_block(n) for _ in range(c.blocks)]
    return StreamingSequential(*layers, nn.ELU(), Conv(n, 1, 3))


def seanet_block(n):
    return Residual(nn.ELU(), Conv(n, n // 2, 3), nn.ELU(), Conv(n // 2, n, 1))


# ------------------------------------------------------------------------------------------------------------
# front end 2: a spectrogram at 100 Hz, and back (trains in minutes): a window every ratios[0] = 240 samples

def spectral_encoder(c: MimiConfig):
    hop, r = c.ratios
    return StreamingSequential(
        LogMel(hop), Conv(MELS, c.width, 3), *(convnext(c.width) for _ in range(c.blocks)),
        Conv(c.width, c.dim, r, stride=r))


def spectral_decoder(c: MimiConfig):
    hop, r = c.ratios
    return StreamingSequential(ConvTranspose(c.dim, c.width, r, stride=r),
                               *(convnext(c.width) for _ in range(c.blocks)), InverseFourier(c.width, hop))


def convnext(n):
    """A depthwise convolution over time, then a small MLP at each step."""
    return Residual(Conv(n, n, 7, groups=n), Pointwise(n))


class Pointwise(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(n), nn.Linear(n, 3 * n), nn.Linear(3 * n, n)

    def forward(self, x):  # (B, C, T)
        return self.down(F.gelu(self.up(self.norm(x.mT)))).mT


# ------------------------------------------------------------------------------------------------------------
# transformer over the 25 Hz steps: each step attends to itself and the context - 1 steps before it


@dataclass
class RingCache:
    """Keys and values of one layer for the last `context` steps: a ring buffer (B, 2, H, context, D)."""
    kv: torch.Tensor

    def update(self, k, v, slots):
        """New k and v (B, H, T, D) -> the cached ones followed by the new ones; then the new ones are cached
        in their slots (B, 1, 1, min(T, context), 1), expanded to k's heads and channels."""
        new = torch.stack([k, v], 1)
        k, v = torch.cat([self.kv.to(new.dtype), new], 3).unbind(1)
        self.kv.scatter_(3, slots, new[..., -self.kv.shape[3]:, :].detach().to(self.kv.dtype))
        return k, v


class Transformer(nn.Module):
    def __init__(self, c: MimiConfig, n_layers):
        super().__init__()
        self.context, self.heads, self.head_dim = c.context, c.heads, c.dim // c.heads
        self.layers = nn.ModuleList(TransformerLayer(c) for _ in range(n_layers))

    def init_state(self, B):
        device = self.layers[0].out_proj.weight.device if self.layers else None
        return {"position": torch.zeros(B, dtype=torch.long, device=device),
                "layers": [layer.init_state(B) for layer in self.layers]}

    def forward(self, x, state):  # (B, C, T)
        if not self.layers:
            return x
        T, C = x.shape[-1], self.context
        # Keys are the C cached steps and the T new ones. Before the start of a stream there is none.
        last = state["position"][:, None] - 1
        cached = last - (last - torch.arange(C, device=x.device)) % C  # (B, C) the step in each slot
        new = last + 1 + torch.arange(T, device=x.device)  # (B, T)
        keys, queries = torch.cat([cached, new], 1)[:, None], new[..., None]
        mask = (keys >= 0) & (keys <= queries) & (keys > queries - C)  # (B, T, C + T)
        rotation = rotary(new, self.head_dim)
        slots = (new % C)[:, None, None, -C:, None].expand(-1, 2, self.heads, -1, self.head_dim)
        x = x.mT
        for layer, cache in zip(self.layers, state["layers"], strict=True):
            x = layer(x, rotation, mask[:, None], slots, cache)
        state["position"] += T
        return x.mT


class TransformerLayer(nn.Module):
    def __init__(self, c: MimiConfig):
        super().__init__()
        self.heads, self.context = c.heads, c.context
        self.norm1, self.norm2 = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.in_proj = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.out_proj = nn.Linear(c.dim, c.dim, bias=False)
        self.up = nn.Linear(c.dim, c.mlp, bias=False)
        self.down = nn.Linear(c.mlp, c.dim, bias=False)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((c.dim,), 0.01)) for _ in range(2))  # LayerScale

    def init_state(self, B):
        w = self.out_proj.weight
        return RingCache(w.new_zeros(B, 2, self.heads, self.context, w.shape[0] // self.heads))

    def forward(self, x, rotation, mask, slots, cache):  # (B, T, C)
        qkv = self.in_proj(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], rotation)  # (B, H, T, D) each
        k, v = cache.update(k, qkv[2], slots)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, self.scale1, self.out_proj(y))
        return torch.addcmul(x, self.scale2, self.down(F.gelu(self.up(self.norm2(x)))))


def rotary(position, D):
    """Rotary position embedding at positions (B, T): cos + i sin of each pair of channels, (B, 1, T, D/2).
    The angles are float64: after an hour, 90,000 steps, float32 would be off by up to 0.004."""
    rate = 10000 ** (-torch.arange(0, D, 2, device=position.device, dtype=torch.float32) / D)
    angle = (position[..., None].double() * rate)[:, None]
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x, rotation):
    """Rotate neighbouring pairs of the channels of x (..., B, H, T, D)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------
# split residual vector quantiser: one semantic codebook next to a residual stack of acoustic ones


class Codebook(nn.Module):
    """EMA vector quantisation: an embedding is a running sum of the vectors assigned to it over a running
    count of them, as Mimi's files store it (toy/codec.py: ema_update)."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("embedding_sum", torch.randn(size, dim))
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer("embedding", torch.empty(size, dim), persistent=False)
        self.register_buffer("neg_half_squared_norm", torch.empty(size), persistent=False)  # -|e|^2 / 2
        self.update_embedding()
        self.register_load_state_dict_post_hook(lambda codebook, _: codebook.update_embedding())

    @torch.no_grad()
    def update_embedding(self):
        self.embedding.copy_(self.embedding_sum / self.cluster_usage.clamp(min=1e-5)[:, None])
        self.neg_half_squared_norm.copy_(-0.5 * self.embedding.square().sum(1))

    def nearest(self, x):  # (N, dim) -> (N,)
        # argmin |x - e|^2 = argmax x.e - |e|^2 / 2
        return torch.addmm(self.neg_half_squared_norm, x, self.embedding.T).argmax(1)

class ResidualQuantizer(nn.Module):
    """Each codebook quantises the residual of those before it."""

    def __init__(self, c: MimiConfig, codebooks):
        super().__init__()
        self.input_proj = nn.Conv1d(c.dim, c.codebook_dim, 1, bias=False)
        self.output_proj = nn.Conv1d(c.codebook_dim, c.dim, 1, bias=False)
        self.layers = nn.ModuleList(Codebook(c.codebook_size, c.codebook_dim) for _ in range(codebooks))

    def encode(self, x):  # (B, C, T) -> (B, K, T)
        B, _, T = x.shape
        with torch.autocast(x.device.type, enabled=False):  # close neighbours differ in the last digits only
            residual = F.linear(x.float().mT, self.input_proj.weight[..., 0]).flatten(0, 1)
            codes = torch.empty(B, len(self.layers), T, dtype=torch.long, device=x.device)
            for k, layer in enumerate(self.layers):
                code = layer.nearest(residual)
                codes[:, k] = code.view(B, T)
                if k + 1 < len(self.layers):
                    residual = residual - layer.embedding[code]
        return codes

    def decode(self, codes):  # (B, K, T) -> (B, C, T)
        x = sum(layer.embedding[codes[:, k]] for k, layer in enumerate(self.layers[:codes.shape[1]]))
        return self.output_proj(x.mT)

# ------------------------------------------------------------------------------------------------------------
# the codec


class Mimi(nn.Module):
    def __init__(self, config: MimiConfig):
        super().__init__()
        c = self.config = config
        encoder, decoder = {"seanet": (seanet_encoder, seanet_decoder),
                            "spectral": (spectral_encoder, spectral_decoder)}[c.frontend]
        self.encoder = StreamingSequential(
            encoder(c), Transformer(c, c.encoder_layers),
            Conv(c.dim, c.dim, 4, stride=2, bias=False, repeat_first=True))
        self.semantic = ResidualQuantizer(c, 1)
        self.acoustic = ResidualQuantizer(c, c.codebooks - 1)
        self.decoder = StreamingSequential(
            ConvTranspose(c.dim, c.dim, 4, stride=2, depthwise=True, bias=False),
            Transformer(c, c.decoder_layers), decoder(c))

    def init_state(self, B):
        """The state of B streams at their start, for encode_step and decode_step."""
        return {"encoder": self.encoder.init_state(B), "decoder": self.decoder.init_state(B)}

    @torch.no_grad()
    def encode_step(self, wav, state):
        """(B, 1, 1920*n) samples -> (B, K, n) codes; the state moves on by n frames."""
        x = self.encoder(wav, state["encoder"])
        return torch.cat([self.semantic.encode(x), self.acoustic.encode(x)], 1)

    @torch.no_grad()
    def decode_step(self, codes, state):
        """(B, K, n) codes -> (B, 1, 1920*n) samples; the state moves on by n frames."""
        x = self.semantic.decode(codes[:, :1])
        if codes.shape[1] > 1:
            x = x + self.acoustic.decode(codes[:, 1:])
        return self.decoder(x, state["decoder"])

    def encode(self, wav, chunk=125):
        """(B, 1, N) samples -> (B, K, T) codes, T = ceil(N / 1920); in chunks, to bound the memory."""
        wav = F.pad(wav, (0, -wav.shape[-1] % FRAME))
        state = self.init_state(len(wav))
        return torch.cat([self.encode_step(w, state) for w in wav.split(chunk * FRAME, -1)], -1)

    def decode(self, codes, chunk=125):
        """(B, K, T) codes -> (B, 1, 1920*T) samples."""
        state = self.init_state(len(codes))
        return torch.cat([self.decode_step(c, state) for c in codes.split(chunk, -1)], -1)

    def silence(self):
        """The codes of a stream that begins with silence, [[code] * K, ...]; the last frame's repeat."""
        return self.encode(torch.zeros(1, 1, 32 * FRAME, device=self.codebooks().device))[0].T.tolist()

    def codebooks(self):
        """The embeddings of all codes, (K, codebook_size, codebook_dim)."""
        return torch.stack([layer.embedding for layer in (*self.semantic.layers, *self.acoustic.layers)])

    def keep_codebooks(self, K, where="this codec"):
        """Drop all but the first K codebooks. ValueError if there are fewer."""
        if not 1 <= K <= self.config.codebooks:
            raise ValueError(f"{where}: has 1 to {self.config.codebooks} codebooks to offer, not {K}")
        self.config = dataclasses.replace(self.config, codebooks=K)
        del self.acoustic.layers[K - 1:]

    @staticmethod
    def from_pretrained(path, num_codebooks=8, config=CONFIGS["mimi"], device="cpu"):
        """Mimi as published, with its first num_codebooks of 32: Kyutai's
        tokenizer-e351c8d8-checkpoint125.safetensors or the transformers library's kyutai/mimi
        model.safetensors. Raises ValueError for any tensor that is unknown, missing or of another shape."""
        weights, available = kyutai.read_weights(path)
        config = dataclasses.replace(config, codebooks=available)
        with torch.device("meta"):
            weights = kyutai.fit(Mimi(config), weights, config.heads, path)  # before it gets memory
        mimi = Mimi(config)
        load_weights(mimi, weights, path)
        mimi.keep_codebooks(num_codebooks, path)
        return mimi.to(device).eval()

    @staticmethod
    def load(path, device="cpu", num_codebooks=None):
        """The codec that `train.py --config codec` wrote, or Mimi as published, with its first num_codebooks
        (default: all of ours, 8 of Mimi's). Raises ValueError if the file is neither."""
        if is_safetensors(path):
            return Mimi.from_pretrained(path, num_codebooks or 8, device=device)
        saved = load_checkpoint(path, "codec")
        config = from_fields(MimiConfig, saved["config"], path)
        with torch.device("meta"):
            check_weights(Mimi(config), saved["model"], path)  # before it gets memory
        mimi = Mimi(config)
        load_weights(mimi, saved["model"], path)
        mimi.keep_codebooks(num_codebooks or mimi.config.codebooks, path)
        return mimi.to(device).eval()


def tensors(state):
    """All tensors of a nested state, in a fixed order; the first dimension of each is the stream."""
    if isinstance(state, torch.Tensor):
        yield state
    elif dataclasses.is_dataclass(state):
        yield from tensors(vars(state))
    else:
        for s in state.values() if isinstance(state, dict) else state or ():
            yield from tensors(s)


def restore(state, rows, other):
    """Overwrite these rows of a batch, a list of numbers, with another state, in place. With
    init_state(len(rows)) these streams start anew."""
    for old, new in zip(tensors(state), tensors(other), strict=True):
        old[rows] = new


# ------------------------------------------------------------------------------------------------------------
# a file through the codec


def reconstruct(codec, wav):
    """(N,) samples -> the decoded codes (N,), frame by frame as in a conversation."""
    state, out = codec.init_state(1), []
    frames = F.pad(wav, (0, -len(wav) % FRAME)).to(codec.codebooks().device).split(FRAME)
    for frame in tqdm(frames, "encode, decode", unit="frame", mininterval=0.5):
        out.append(codec.decode_step(codec.encode_step(frame[None, None], state), state)[0, 0].cpu())
    return torch.cat(out)[:len(wav)]


def main():
    parser = argparse.ArgumentParser(
        description="Encode an audio file and decode it again, frame by frame.",
        epilog="examples: python mimi.py in.wav out.wav    python mimi.py in.mp3 out.flac --codebooks 4 "
               "--checkpoint tokenizer-e351c8d8-checkpoint125.safetensors")
    parser.add_argument("input", help="any audio file; several channels are mixed into one")
    parser.add_argument("output", help="24 kHz, as long as the input; the file extension sets the format")
    parser.add_argument("--codebooks", type=int, help="how many of the codec's codebooks to use (default: 8)")
    parser.add_argument("--checkpoint", default="out/codec/checkpoint.pt",
                        help="of train.py, or Mimi as published (.safetensors) (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        check_device(args.device)
        check_output(args.output)
        codec = Mimi.load(args.checkpoint, args.device, args.codebooks)
        wav = read_audio(args.input)
        start = time.perf_counter()
        out = reconstruct(codec, wav)
        seconds = time.perf_counter() - start
        write_audio(args.output, out)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    K, size = codec.config.codebooks, codec.config.codebook_size
    print(f"{K * math.log2(size) * SAMPLE_RATE / FRAME:.0f} bits per second ({K} codebooks of {size}), "
          f"{len(wav) / SAMPLE_RATE / seconds:.1f} times real time, "
          f"log-spectral distance {log_spectral_distance(wav, out):.1f} dB")
    print(f"Wrote {args.output} ({len(wav) / SAMPLE_RATE:.2f} s)")


if __name__ == "__main__":
    main()
