"""The model: a temporal transformer over frames and a depth transformer over the codes of one frame
(FLM-Audio, section 2.1: an RQ-Transformer, as Moshi's).

    column t of the grid      text  8 speak codes  8 listen codes          17 integers
      | sum of 17 embeddings                                               Eq. 1
      v e_t (B, T, D)
      | temporal transformer: Qwen2.5's decoder over the frames so far     Eq. 2
      v h_t (B, T, D)
      |---- linear head ----> text of column t+1
      '---- depth transformer, one code after another ----> 8 speak codes of column t+1

What the user will say (the listen rows) is never predicted.

B batch, T frames, D width, H heads (G of them for keys and values), E channels of a head, K codebooks, V
vocabulary, C frames of context, S of them in use, W width of the depth transformer, A audio vocabulary
(codes and empty), N frames of any rows.
"""
import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from files.checkpoint import check_vocab, check_weights, from_fields, load_checkpoint, load_weights
from streams import K, SPEAK, TEXT, Vocab


@dataclass(frozen=True)
class FLMConfig:
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    depth_layers: int
    depth_width: int
    depth_heads: int
    vocab_size: int  # text tokens, with <wait>, <asr>, <answer>
    empty: int  # the last entry of an audio embedding: no audio at all; those before it are the codec's codes
    context: int  # frames that attention sees: no more than a row of training has, or answers get worse
    tied: bool = False  # text head = text embedding
    rope_base: float = 1e6
    norm_eps: float = 1e-6
    input_scale: float = 1.0  # muP, in the FLM-Audio release: of the sum of embeddings
    output_scale: float = 1.0  # and of the text logits

    def __post_init__(self):
        sizes = self.width, self.heads, self.kv_heads, self.depth_width, self.depth_heads
        W, H, G, D, N = sizes
        if min(sizes) < 1 or W % (2 * H) or H % G or D % N:
            raise ValueError(f"width, heads, kv_heads, depth_width, depth_heads {sizes}: heads must divide "
                             "the widths (the temporal one into even parts), and kv_heads the heads")

    @property
    def audio_vocab_size(self):
        return self.empty + 1


CONFIGS = {
    "tiny": FLMConfig(4, 192, 4, 2, 512, 2, 64, 2, vocab_size=512, empty=256, context=256, rope_base=1e4),
    "mini": FLMConfig(5, 192, 4, 2, 512, 2, 64, 2, vocab_size=512, empty=256, context=256, rope_base=1e4),
    "small": FLMConfig(12, 768, 12, 4, 2304, 4, 512, 8, vocab_size=512, empty=256, context=1024,
                       rope_base=1e4),
    # Qwen2.5's sizes, with the depth transformer of the FLM-Audio release
    "0.5b": FLMConfig(24, 896, 14, 2, 4864, 6, 1024, 16, vocab_size=151936, empty=2048, context=8192,
                      tied=True),
    "7b": FLMConfig(28, 3584, 28, 4, 18944, 6, 1024, 16, vocab_size=152064, empty=2048, context=8192),
}


# ------------------------------------------------------------------------------------------------------------
# primitives


# PyTorch's choice on Hopper, cuDNN's attention, makes a plan for every new shape, half a second each.
torch.backends.cuda.enable_cudnn_sdp(False)


def attend(q, k, v, mask=None):
    """Scaled dot-product attention. q (B, H, T, E), k and v (B, G, S, E). A single query (T = 1) sees all
    keys, or those where the mask (B, 1, 1, S) is True; several are causal, or what a function `mask` does."""
    B, H, T, E = q.shape
    G = k.shape[1]
    if callable(mask):
        return mask(q, k, v)
    if T == 1:  # the heads that share keys become as many queries, which see the same
        q = q.reshape(B, G, -1, E)
        if mask is not None and q.device.type != "cpu":
            return attend_in_pieces(q, k, v, mask).reshape(B, H, T, E)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, T, E)
    if q.device.type != "cpu" and T > K:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
    # On a CPU, and for a frame's few codes, the plain formula is twice as fast. Heads that share keys are
    # stacked.
    q, k, v = q.reshape(B * G, H // G * T, E), k.reshape(B * G, T, E), v.reshape(B * G, T, E)
    later = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1).repeat(H // G, 1)
    weights = torch.baddbmm(later, q, k.mT, alpha=E ** -0.5).softmax(-1, dtype=q.dtype)
    return (weights @ v).view(B, H, T, E)


def attend_in_pieces(q, k, v, mask, size=256):
    """For a step on a GPU: q (B, G, R, E) over many keys, k and v (B, G, S, E). With a mask PyTorch's kernels
    give a single block of threads all keys of a head. Here each block has `size` of them (flash-decoding),
    so that the whole GPU reads. Sums are float32."""
    B, G, S, E = k.shape
    n = S // math.gcd(S, size)
    many = lambda x: x.unflatten(2, (n, -1)).flatten(0, 2)  # (B G n, size, E)
    scores = product(q.repeat_interleave(n, 1).flatten(0, 1), many(k).mT)  # (B G n, R, size)
    scores = scores.view(B, G, n, -1, S // n).transpose(2, 3).flatten(3) * E ** -0.5
    weights = torch.where(mask, scores, -math.inf).softmax(-1).to(v.dtype)  # (B, G, R, S)
    weights = weights.unflatten(3, (n, -1)).transpose(2, 3).flatten(0, 2)
    return product(weights, many(v)).view(B, G, n, -1, E).sum(2).to(v.dtype)


def product(a, b):
    """torch.bmm of bfloat16 or float32, summed and returned in float32."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return torch.bmm(a.float(), b.float())
    return torch.bmm(a, b, out_dtype=torch.float32)


def in_eights(w, parts=1):
    """w with zeros after its columns (after those of each part), up to a multiple of eight: a GPU multiplies
    bfloat16 at full speed only where rows begin at multiples of 16 bytes."""
    n = w.shape[-1] // parts
    return w if n % 8 == 0 else F.pad(w.unflatten(-1, (parts, n)), (0, -n % 8)).flatten(-2)


def for_products(w):
    """w as autocast would make it, once."""
    kind = w.device.type
    return w.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else w


def rotary(position, E, base):
    """cos and sin, (*position.shape, E), that rotate queries and keys. The angles are float64: an hour of
    conversation is 45,000 frames, where float32 would be off by up to 0.002."""
    rate = base ** (-torch.arange(0, E, 2, device=position.device, dtype=torch.float32) / E)
    angle = position[..., None].double() * rate
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).float(), torch.cat([-sin, sin], -1).float()


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([b, a], -1) * sin).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


# ------------------------------------------------------------------------------------------------------------
# temporal transformer


@dataclass
class LayerCache:
    """A layer's keys and values of the last C frames, (B, G, C, E) each: rings."""
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def zeros(cls, shape, like):
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def update(self, slot, k, v):
        """Write one frame, k and v (B, G, 1, E), to slot (B,) of the rings, over what is C frames old; or,
        without a slot, T frames to their start."""
        write((self.keys, self.values), slot, (k, v))

    def attend(self, q, mask):
        """The attention of q (B, H, 1, E) to the first S entries of the rings, where mask (B, 1, 1, S) is
        True."""
        S = mask.shape[-1]
        return attend(q, self.keys[:, :, :S], self.values[:, :, :S], mask)


def write(rings, slot, new):
    """new (B, G, T, ...) to rings (B, G, C, ...): see LayerCache.update."""
    members = None if slot is None else torch.arange(len(slot), device=slot.device)
    for ring, x in zip(rings, new):
        if slot is None:
            ring[:, :, :x.shape[2]] = x
        else:
            ring[members, :, slot] = x[:, :, 0]


@dataclass
class KVCache:
    """What the temporal transformer remembers of B conversations. It does not grow: a conversation has no
    end."""
    layers: list  # of LayerCache
    position: torch.Tensor  # (B,) frames that each conversation has had

    def row(self, b):
        """The memory of conversation b alone: views, so what is written to it is written here."""
        return KVCache([type(x)(*(ring[b:b + 1] for ring in vars(x).values())) for x in self.layers],
                       self.position[b:b + 1])


class Block(nn.Module):
    """One layer of Qwen2.5's decoder."""

    def __init__(self, c: FLMConfig):
        super().__init__()
        self.H, self.G, self.E = c.heads, c.kv_heads, c.width // c.heads
        self.norm1, self.norm2 = nn.RMSNorm(c.width, c.norm_eps), nn.RMSNorm(c.width, c.norm_eps)
        self.qkv = nn.Linear(c.width, (self.H + 2 * self.G) * self.E)  # the only biases
        self.out = nn.Linear(self.H * self.E, c.width, bias=False)
        self.mlp = SwiGLU(c.width, c.mlp)

    def forward(self, x, cos, sin, cache=None, slot=None, mask=None):
        """x (B, T, D) -> (B, T, D). With a LayerCache and slot (B,), T is 1: this frame goes there, and it
        sees the first S entries where mask (B, 1, 1, S) is True. With a LayerCache alone, the frames are a
        conversation's first and fill it from its start."""
        B, T, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, -1, self.E).transpose(1, 2)  # (B, H + 2G, T, E)
        qk, v = qkv.split([self.H + self.G, self.G], 1)
        q, k = rotate(qk, cos, sin).split([self.H, self.G], 1)
        if cache is not None:
            cache.update(slot, k, v)
        y = attend(q, k, v, mask) if slot is None else cache.attend(q, mask)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
        return x + self.mlp(self.norm2(x))


# ------------------------------------------------------------------------------------------------------------
# depth transformer


class DepthBlock(nn.Module):
    """A layer whose attention is shared by the K positions, while each position has an MLP of its own."""

    def __init__(self, c: FLMConfig):
        super().__init__()
        W, hidden = c.depth_width, int(8 * c.depth_width / 3)
        self.H = c.depth_heads
        self.norm1, self.norm2 = nn.RMSNorm(W, c.norm_eps), nn.RMSNorm(W, c.norm_eps)
        self.qkv, self.out = nn.Linear(W, 3 * W, bias=False), nn.Linear(W, W, bias=False)
        self.gate_up = nn.Parameter(torch.empty(K, W, 2 * hidden))
        self.down = nn.Parameter(torch.empty(K, hidden, W))

    def forward(self, x, k0, past, weights=None):
        """x (N, n, W): positions k0 to k0 + n of N frames. past: keys and values of the positions before
        them, [(N, 2H, n, E), ...], to which these are appended. weights: see aligned."""
        N, n, W = x.shape
        qkv = self.qkv(self.norm1(x)).view(N, n, 3 * self.H, W // self.H).transpose(1, 2)
        q, kv = qkv.split([self.H, 2 * self.H], 1)
        past.append(kv)
        k, v = (torch.cat(past, 2) if past[1:] else kv).chunk(2, 1)
        x = x + self.out(attend(q, k, v).transpose(1, 2).reshape(N, n, W))
        return x + self.mlp(self.norm2(x), k0, weights)

    def mlp(self, x, k0, weights=None):
        """x (N, n, W), positions as above: one matrix product for each."""
        n = x.shape[1]
        gate_up, down = weights or (self.gate_up[k0:k0 + n], self.down[k0:k0 + n])
        gate, up = torch.bmm(x.transpose(0, 1), gate_up).chunk(2, -1)
        return torch.bmm(F.silu(gate) * up, down).transpose(0, 1)

    def aligned(self):
        """The MLPs' weights in_eights, in the precision of products. The zeros change no result."""
        return for_products(in_eights(self.gate_up, 2)), for_products(in_eights(self.down.mT).mT)


class Depth(nn.Module):
    """h_t and the codes before k -> logits of code k. It sees this frame only: no other frame, no text."""

    def __init__(self, c: FLMConfig):
        super().__init__()
        W, A = c.depth_width, c.audio_vocab_size
        self.config = c
        self.from_h = nn.Linear(c.width, K * W, bias=False)
        self.codes = nn.ModuleList(nn.Embedding(A, W) for _ in range(K))  # position k sees code k - 1
        self.positions = nn.Parameter(torch.empty(K, W))
        self.blocks = nn.ModuleList(DepthBlock(c) for _ in range(c.depth_layers))
        self.norm = nn.RMSNorm(W, c.norm_eps)
        self.heads = nn.Parameter(torch.empty(K, W, A))

    def forward(self, h, codes):
        """For training: h (N, D), the frames' own codes (N, K) -> their cross-entropies (N, K)."""
        weights = self.aligned() if h.is_cuda else None  # once, not in every piece
        losses = lambda h, codes: self.losses(h, codes, weights)
        return in_pieces(losses, h, codes, pieces_of_codes(self.config))

    def losses(self, h, codes, weights=None):
        return F.cross_entropy(self.logits(h, codes, weights).float().mT, codes, reduction="none")

    def aligned(self):
        return for_products(in_eights(self.heads)), [block.aligned() for block in self.blocks]

    def logits(self, h, codes, weights=None):
        """Teacher-forced: h (N, D) and the frame's own codes (N, K) -> logits (N, K, A)."""
        heads, of_blocks = weights or (self.heads, [None] * len(self.blocks))
        seen = torch.cat([torch.full_like(codes[:, :1], self.config.empty), codes[:, :-1]], 1)
        x = torch.stack([e(seen[:, k]) for k, e in enumerate(self.codes)], 1)
        x = x + self.from_h(h).unflatten(-1, self.positions.shape) + self.positions
        for block, mlp in zip(self.blocks, of_blocks):
            x = block(x, 0, [], mlp)
        logits = torch.bmm(self.norm(x).transpose(0, 1), heads).transpose(0, 1)
        return logits[..., :self.config.audio_vocab_size]

    @torch.no_grad()
    def align(self):
        """To talk on a GPU: the weights in_eights once, instead of in every step. Not for a model to save."""
        heads, of_blocks = self.aligned()
        self.heads = nn.Parameter(heads)
        for block, mlp in zip(self.blocks, of_blocks):
            block.gate_up, block.down = map(nn.Parameter, mlp)

    def generate(self, h, sample):
        """h (B, D) -> codes (B, K), each chosen by sample(logits (B, A), k) -> (B,) and shown to the next
        position."""
        pasts = [[] for _ in self.blocks]
        given = self.from_h(h).unflatten(-1, self.positions.shape) + self.positions
        code, codes = torch.full_like(h[:, 0], self.config.empty, dtype=torch.long), []
        for k in range(K):
            x = (self.codes[k](code) + given[:, k])[:, None]
            for block, past in zip(self.blocks, pasts):
                x = block(x, k, past)
            logits = self.norm(x[:, 0]) @ self.heads[k]
            code = sample(logits[:, :self.config.audio_vocab_size], k)
            codes.append(code)
        return torch.stack(codes, 1)


# ------------------------------------------------------------------------------------------------------------
# the whole


def rng_for(name, seed, device):
    """A generator of random numbers for this name alone."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))


class FLM(nn.Module):
    layer_cache = LayerCache  # or live/float8.py's

    def __init__(self, config: FLMConfig):
        super().__init__()
        c = self.config = config
        A = c.audio_vocab_size
        self.text = nn.Embedding(c.vocab_size, c.width)
        self.speak = nn.ModuleList(nn.Embedding(A, c.width) for _ in range(K))
        self.listen = nn.ModuleList(nn.Embedding(A, c.width) for _ in range(K))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, c.norm_eps)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        self.depth = Depth(c)
        self.recompute = False  # activation checkpointing: keep each block's input, compute the rest again
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed=0, given=(), assign=torch.Tensor.copy_):
        """Each tensor is drawn by a generator of its own, so the weights are the same however many processes
        hold them. given: names that the caller fills. assign(parameter, value): how (training/parallel.py:
        only this process's rows)."""
        if self.config.tied:
            self.head.weight = self.text.weight
        for name, p in self.named_parameters():
            if p.is_meta or name in given:
                continue
            value = torch.zeros(p.shape, device=p.device)
            if p.ndim > 1:
                residual = name.endswith(("out.weight", "down.weight", "down"))
                std = 0.02 / (2 * self.config.layers) ** 0.5 if residual else 0.02
                value.normal_(0.0, std, generator=rng_for(name, seed, p.device))
            elif not name.endswith("bias"):
                value.fill_(1.0)
            assign(p, value)

    def embed(self, grid):
        """Eq. 1: (B, 17, T) -> (B, T, D)."""
        channels = [self.text, *self.speak, *self.listen]
        return sum(table(grid[:, row]) for row, table in enumerate(channels)) * self.config.input_scale

    def hidden(self, grid, cache=None, mask=None):
        """Eq. 2, teacher-forced: (B, 17, T) -> h (B, T, D), which text_logits and depth read. With a KVCache
        the frames become the first of its conversations (prefill). mask: a function, see attend."""
        B, _, T = grid.shape
        assert T <= self.config.context, (T, self.config.context)
        cos, sin = rotary(torch.arange(T, device=grid.device), self.blocks[0].E, self.config.rope_base)
        x = self.embed(grid)
        recompute = self.recompute and x.requires_grad
        for i, block in enumerate(self.blocks):
            given = x, cos, sin, cache.layers[i] if cache else None, None, mask
            x = checkpoint(block, *given, use_reentrant=False) if recompute else block(*given)
        if cache:
            cache.position.fill_(T)
        return self.norm(x)

    def text_logits(self, h):
        """h (..., D) -> (..., V)"""
        return self.head(h) * self.config.output_scale

    def forward(self, grid, learn, mask=None):
        """For training, all in one call (FSDP2's hooks are on this call): grid (B, 17, T), and
        learn (B, T-1), which frames the depth transformer learns from, N in all -> cross-entropies of the
        text (B, T-1), whether its most probable token was right (B, T-1), cross-entropies of the codes (N,
        K). mask: see attend."""
        h, target = self.hidden(grid[..., :-1], mask=mask), grid[..., 1:]
        text = self.text_losses(h.flatten(0, 1), target[:, TEXT].flatten()).view(*learn.shape, 2)
        return *text.unbind(-1), self.depth(h[learn], target[:, SPEAK].transpose(1, 2)[learn])

    def text_losses(self, h, text):
        """h (N, D), text (N,) -> (N, 2): the cross-entropy, and whether the most probable token was the right
        one."""
        def losses(h, text):
            logits = self.text_logits(h).float()
            ce = F.cross_entropy(logits, text, reduction="none")
            return torch.stack([ce, logits.argmax(-1) == text], -1)
        return in_pieces(losses, h, text, pieces_of_text(self.config))

    def init_cache(self, B):
        c, w = self.config, self.head.weight
        shape = B, c.kv_heads, c.context, c.width // c.heads
        return KVCache([self.layer_cache.zeros(shape, w) for _ in self.blocks],
                       torch.zeros(B, dtype=torch.long, device=w.device))

    def hidden_step(self, column, cache):
        """One frame: column (B, 17) -> h (B, D). The cache moves on by one frame."""
        C, position, device = self.config.context, cache.position, column.device
        cos, sin = (y[:, None, None] for y in rotary(position, self.blocks[0].E, self.config.rope_base))
        # On a CPU only the filled part of the rings is read; a captured CUDA graph has one shape.
        used = min(C, int(position.max()) + 1) if device.type == "cpu" else C
        mask = (torch.arange(used, device=device) <= position[:, None])[:, None, None]  # (B, 1, 1, used)
        x = self.embed(column[..., None])
        for block, layer in zip(self.blocks, cache.layers):
            x = block(x, cos, sin, layer, position % C, mask)
        cache.position += 1
        return self.norm(x[:, 0])

    @torch.no_grad()
    def step(self, column, cache, sample_text, sample_code):
        """One step of conversation: column t (B, 17) -> text (B,) and speak codes (B, 8) of column t+1.
        sample_text(logits (B, V)) and sample_code(logits (B, A), k) choose."""
        h = self.hidden_step(column, cache)
        return sample_text(self.text_logits(h)), self.depth.generate(h, sample_code)

    @staticmethod
    def load(path, device="cpu"):
        """(model, its vocabulary, the whole checkpoint) from what train.py wrote. Raises ValueError if it is
        not that."""
        saved = load_checkpoint(path, "flm", mmap=True)  # the optimiser's part of it is not read
        with torch.device("meta"):
            model = FLM(from_fields(FLMConfig, saved["config"], path))
        vocab = from_fields(Vocab, saved["vocab"], path)
        check_vocab(vocab, model.config, path)
        check_weights(model, saved["model"], path)  # before it gets memory
        load_weights(model.to_empty(device=device), saved["model"], path)
        return model.eval(), vocab, saved


# ------------------------------------------------------------------------------------------------------------
# losses piece by piece: the logits of 8192 frames with Qwen2.5's vocabulary would be 5 GB

PIECE = 1 << 26  # numbers that may exist at a time for a loss: 256 MiB in float32


def pieces_of_text(c: FLMConfig):
    """Frames in a piece."""
    return max(1, PIECE // c.vocab_size)


def pieces_of_codes(c: FLMConfig):
    return max(1, 2 * PIECE // (K * (c.audio_vocab_size + 24 * c.depth_width)))


def in_pieces(f, x, y, rows):
    """f(x (N, ...), y (N, ...)), `rows` at a time, which are computed again for the gradients instead
    of kept."""
    if len(x) <= rows:
        return f(x, y)
    pieces = zip(x.split(rows), y.split(rows))
    return torch.cat([checkpoint(f, a, b, use_reentrant=False, preserve_rng_state=False) for a, b in pieces])
