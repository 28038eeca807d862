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

B batch, T frames, D width, H heads (G of them for keys and values), E channels of a head, K codebooks, V vocabulary,
C frames of context, W width of the depth transformer.
"""
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from files.checkpoint import from_fields, load_checkpoint, load_weights
from training.parallel import fill
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
    empty: int  # the last entry of an embedding of sound, for no sound at all; those before it are the codec's codes
    context: int  # frames that attention sees: as many as a row of training has, for it has not learned to look further back
    tied: bool = False  # text head = text embedding
    rope_base: float = 1e6
    norm_eps: float = 1e-6
    input_scale: float = 1.0  # muP, in the FLM-Audio release: of the sum of embeddings
    output_scale: float = 1.0  # and of the text logits


CONFIGS = {
    "tiny": FLMConfig(4, 192, 4, 2, 512, 2, 64, 2, vocab_size=512, empty=256, context=256, rope_base=1e4),
    "small": FLMConfig(12, 768, 12, 4, 2304, 4, 512, 8, vocab_size=512, empty=256, context=256, rope_base=1e4),
    # Qwen2.5's sizes, with the depth transformer of the FLM-Audio release
    "0.5b": FLMConfig(24, 896, 14, 2, 4864, 6, 1024, 16, vocab_size=151936, empty=2048, context=8192, tied=True),
    "7b": FLMConfig(28, 3584, 28, 4, 18944, 6, 1024, 16, vocab_size=152064, empty=2048, context=8192),
}


# ---------------------------------------------------------------------------------------------------------------------
# primitives


def attend(q, k, v, mask=None):
    """Scaled dot-product attention. q (B, H, T, E), k and v (B, G, S, E). A single query (T = 1) looks at all, or where the mask
    (B, 1, 1, S) is True; several look at themselves and what is before them."""
    B, H, T, E = q.shape
    G = k.shape[1]
    if T == 1:  # the heads that share keys are as many queries, which see the same
        return F.scaled_dot_product_attention(q.reshape(B, G, -1, E), k, v, attn_mask=mask).reshape(B, H, T, E)
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
    # On a CPU and for short sequences the plain formula is twice as fast. The heads that share keys stand above one another.
    q, k, v = q.reshape(B * G, H // G * T, E), k.reshape(B * G, T, E), v.reshape(B * G, T, E)
    later = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1).repeat(H // G, 1)
    weights = torch.baddbmm(later, q, k.mT, alpha=E ** -0.5).softmax(-1, dtype=q.dtype)
    return (weights @ v).view(B, H, T, E)


def rotary(position, E, base):
    """cos and sin, (*position.shape, E), by which queries and keys are turned. The angles are float64: an hour of conversation is
    45,000 frames, where float32 would be off by up to 0.002, and ever more."""
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


# ---------------------------------------------------------------------------------------------------------------------
# temporal transformer


class Block(nn.Module):
    """One layer of Qwen2.5's decoder."""

    def __init__(self, c: FLMConfig):
        super().__init__()
        self.H, self.G, self.E = c.heads, c.kv_heads, c.width // c.heads
        self.norm1, self.norm2 = nn.RMSNorm(c.width, c.norm_eps), nn.RMSNorm(c.width, c.norm_eps)
        self.qkv = nn.Linear(c.width, (self.H + 2 * self.G) * self.E)  # the only biases
        self.out = nn.Linear(self.H * self.E, c.width, bias=False)
        self.mlp = SwiGLU(c.width, c.mlp)

    def forward(self, x, cos, sin, mask=None, remember=None):
        """x (B, T, D). mask: see attend. remember, if given, takes the new keys and values and returns all that attention shall see."""
        B, T, _ = x.shape
        qk, v = self.qkv(self.norm1(x)).view(B, T, -1, self.E).transpose(1, 2).split([self.H + self.G, self.G], 1)
        q, k = rotate(qk, cos, sin).split([self.H, self.G], 1)
        if remember:
            k, v = remember(k, v)
        x = x + self.out(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))
        return x + self.mlp(self.norm2(x))


# ---------------------------------------------------------------------------------------------------------------------
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

    def forward(self, x, k0, past):
        """x (N, n, W): positions k0 to k0 + n of N frames. past: keys and values of those before, [(N, 2H, n, E), ...], to which
        these are added."""
        N, n, W = x.shape
        q, kv = self.qkv(self.norm1(x)).view(N, n, 3 * self.H, W // self.H).transpose(1, 2).split([self.H, 2 * self.H], 1)
        past.append(kv)
        k, v = (torch.cat(past, 2) if past[1:] else kv).chunk(2, 1)
        x = x + self.out(attend(q, k, v).transpose(1, 2).reshape(N, n, W))
        y = self.norm2(x).transpose(0, 1)  # (n, N, W): one matrix product for each position
        gate, up = torch.bmm(y, self.gate_up[k0:k0 + n]).chunk(2, -1)
        return x + torch.bmm(F.silu(gate) * up, self.down[k0:k0 + n]).transpose(0, 1)


class Depth(nn.Module):
    """h_t and the codes before k -> logits of code k. It sees this frame only: no other frame, no text."""

    def __init__(self, c: FLMConfig):
        super().__init__()
        W, A = c.depth_width, c.empty + 1
        self.empty = c.empty
        self.from_h = nn.Linear(c.width, K * W, bias=False)
        self.codes = nn.ModuleList(nn.Embedding(A, W) for _ in range(K))  # of what position k sees: code k - 1
        self.positions = nn.Parameter(torch.empty(K, W))
        self.blocks = nn.ModuleList(DepthBlock(c) for _ in range(c.depth_layers))
        self.norm = nn.RMSNorm(W, c.norm_eps)
        self.heads = nn.Parameter(torch.empty(K, W, A))

    def forward(self, h, codes):
        """Teacher-forced: h (N, D) and the frame's own codes (N, K) -> logits (N, K, A)."""
        seen = torch.cat([torch.full_like(codes[:, :1], self.empty), codes[:, :-1]], 1)
        x = torch.stack([e(seen[:, k]) for k, e in enumerate(self.codes)], 1)
        x = x + self.from_h(h).unflatten(-1, self.positions.shape) + self.positions
        for block in self.blocks:
            x = block(x, 0, [])
        return torch.bmm(self.norm(x).transpose(0, 1), self.heads).transpose(0, 1)

    def generate(self, h, draw):
        """h (B, D) -> codes (B, K), each drawn by draw(logits (B, A), k) -> (B,) and shown to the next position."""
        pasts = [[] for _ in self.blocks]
        given = self.from_h(h).unflatten(-1, self.positions.shape) + self.positions
        code, codes = torch.full_like(h[:, 0], self.empty, dtype=torch.long), []
        for k in range(K):
            x = (self.codes[k](code) + given[:, k])[:, None]
            for block, past in zip(self.blocks, pasts):
                x = block(x, k, past)
            code = draw(self.norm(x[:, 0]) @ self.heads[k], k)
            codes.append(code)
        return torch.stack(codes, 1)


# ---------------------------------------------------------------------------------------------------------------------
# the whole


def rng_for(name, seed, device):
    """A generator of random numbers for this name alone."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))


@dataclass
class KVCache:
    """The memory of B conversations: for each layer a ring of the last C frames' keys and values, (B, G, C, E) each, and how
    many frames each conversation has had, (B,)."""
    keys: list
    values: list
    position: torch.Tensor


class FLM(nn.Module):
    def __init__(self, config: FLMConfig):
        super().__init__()
        c = self.config = config
        A = c.empty + 1
        self.text = nn.Embedding(c.vocab_size, c.width)
        self.speak = nn.ModuleList(nn.Embedding(A, c.width) for _ in range(K))
        self.listen = nn.ModuleList(nn.Embedding(A, c.width) for _ in range(K))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, c.norm_eps)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        self.depth = Depth(c)
        self.recompute = False  # of each block, keep its input only and compute it again for the gradients
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed=0, given=()):
        """The weights at the start, the same however many processes hold them: each tensor is drawn by a generator of its own. The
        names in `given` are left to others."""
        if self.config.tied:
            self.head.weight = self.text.weight
        for name, p in self.named_parameters():
            if p.is_meta or name in given:
                continue
            value = torch.zeros(p.shape, device=p.device) if name.endswith("bias") else torch.ones(p.shape, device=p.device)
            if p.ndim > 1:
                residual = name.endswith(("out.weight", "down.weight", "down"))
                value.normal_(0.0, 0.02 / (2 * self.config.layers) ** 0.5 if residual else 0.02, generator=rng_for(name, seed, p.device))
            fill(p, value)

    @torch.no_grad()
    def init_audio(self, codebooks, std=0.05, seed=0):
        """Let the embeddings of sound start as a random projection of the codec's own vectors, codebooks (K, A - 1, dim): codes
        that sound alike then look alike, and the sum over a frame's acoustic codes is a picture of its sound. A model that
        starts from scratch hears much sooner for it."""
        for group in (slice(0, 1), slice(1, K)):  # semantic, acoustic: two vector spaces
            vectors = codebooks[group] - codebooks[group].mean(1, keepdim=True)
            spread = vectors.square().mean(1).sum(0).sum().sqrt()  # of the sum over the group
            for side in ("speak", "listen"):
                generator = rng_for(f"{side} {group}", seed, vectors.device)
                projection = torch.randn(vectors.shape[-1], self.config.width, device=vectors.device, generator=generator)
                for table, v in zip(getattr(self, side)[group], vectors):
                    empty = torch.randn(1, self.config.width, device=vectors.device, generator=generator) * 0.02
                    fill(table.weight, torch.cat([v @ projection * (std / spread), empty]))

    def embed(self, grid):
        """Eq. 1: (B, 17, T) -> (B, T, D)."""
        channels = [self.text, *self.speak, *self.listen]
        return sum(embedding(grid[:, row]) for row, embedding in enumerate(channels)) * self.config.input_scale

    def forward(self, grid):
        """Eq. 2, teacher-forced: (B, 17, T) -> h (B, T, D), which text_logits and depth read."""
        B, _, T = grid.shape
        assert T <= self.config.context, (T, self.config.context)
        cos, sin = rotary(torch.arange(T, device=grid.device), self.blocks[0].E, self.config.rope_base)
        x = self.embed(grid)
        for block in self.blocks:
            x = checkpoint(block, x, cos, sin, use_reentrant=False) if self.recompute and x.requires_grad else block(x, cos, sin)
        return self.norm(x)

    def text_logits(self, h):
        """h (..., D) -> (..., V)"""
        return self.head(h) * self.config.output_scale

    def init_cache(self, B):
        c, w = self.config, self.head.weight
        keys, values = ([w.new_zeros(B, c.kv_heads, c.context, c.width // c.heads) for _ in self.blocks] for _ in range(2))
        return KVCache(keys, values, torch.zeros(B, dtype=torch.long, device=w.device))

    def hidden_step(self, column, state):
        """One frame: column (B, 17) -> h (B, D). The state moves on by one frame; what is older than the context is
        overwritten, so a conversation may last for ever."""
        B, C = len(column), self.config.context
        slot, members = state.position % C, torch.arange(B, device=column.device)
        cos, sin = (y[:, None, None] for y in rotary(state.position, self.blocks[0].E, self.config.rope_base))
        used = min(C, int(state.position.max()) + 1) if column.device.type == "cpu" else C  # what is captured has one shape
        mask = (torch.arange(used, device=column.device) <= state.position[:, None])[:, None, None]  # (B, 1, 1, used)
        x = self.embed(column[..., None])
        for block, keys, values in zip(self.blocks, state.keys, state.values):
            def remember(k, v, keys=keys, values=values):
                keys[members, :, slot], values[members, :, slot] = k[:, :, 0], v[:, :, 0]
                return keys[:, :, :used], values[:, :, :used]
            x = block(x, cos, sin, mask, remember)
        state.position += 1
        return self.norm(x[:, 0])

    @torch.no_grad()
    def step(self, column, state, draw_text, draw_code):
        """One step of conversation: column t (B, 17) -> text (B,) and speak codes (B, 8) of column t+1.
        draw_text(logits (B, V)) and draw_code(logits (B, A), k) choose."""
        h = self.hidden_step(column, state)
        return draw_text(self.text_logits(h)), self.depth.generate(h, draw_code)

    @staticmethod
    def load(path, device="cpu"):
        """(model, its vocabulary, the whole checkpoint) from what train.py wrote. Raises ValueError if it is not that."""
        saved = load_checkpoint(path, "flm", mmap=True)  # the optimiser's part of it is not read
        model = build(from_fields(FLMConfig, saved["config"], path), lambda m: m.to_empty(device=device), given=saved["model"])
        load_weights(model, saved["model"], path)
        return model.eval(), from_fields(Vocab, saved["vocab"], path), saved

    @staticmethod
    def from_pretrained(folder, context=8192):
        """(model, its vocabulary) from the FLM-Audio release in `folder` (config.json, *.safetensors), on the CPU. What its silence
        sounds like is not in there: the codec must tell. Raises ValueError for another kind of model, and for an unknown, missing
        or misshaped tensor."""
        from published.release import load_release
        return load_release(folder, context)


def build(config: FLMConfig, place=None, seed=0, given=()):
    """A new model. It is made without memory; place(model) gives it some (default: on the CPU), and only then is it filled, so
    it never exists twice. given: names of parameters that the caller fills."""
    with torch.device("meta"):
        model = FLM(config)
    model = place(model) if place else model.to_empty(device="cpu")
    model.init_weights(seed, given)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# the loss


def loss_parts(model, grid, v: Vocab, depth_share=(1.0, 1.0), rng=None):
    """The four cross-entropies of Eq. 3, and how many wait tokens there are for each monologue token.

    grid (B, 17, T) -> {"semantic", "acoustic", "mono", "wait"}: means over the tokens of each kind; "waits"; and "right", the
    share of monologue tokens that are the most probable one.
    Empty speak tokens carry no loss. depth_share: which shares of the frames of speech (and those beside them) and of the
    frames of silence enter the depth transformer, drawn by the torch.Generator rng; the rest costs nothing.
    """
    h, target = model(grid[..., :-1]), grid[..., 1:]
    h, text = h.flatten(0, 1), target[:, TEXT].flatten()
    ce, right = text_losses(model, h, text).unbind(-1)
    wait = text == v.wait
    parts = {"mono": mean_where(ce, ~wait), "wait": mean_where(ce, wait), "waits": wait.sum() / (~wait).sum().clamp(min=1),
             "right": mean_where(right, ~wait)}

    codes = target[:, SPEAK].transpose(1, 2)  # (B, T-1, K)
    speaks = (codes != torch.tensor(v.silence[-1], device=grid.device)).any(-1)
    speaks = F.max_pool1d(speaks[:, None].float(), 3, 1, 1)[:, 0] > 0
    share = torch.where(speaks, *depth_share)
    chosen = (codes != v.empty).any(-1) & (torch.rand(share.shape, generator=rng).to(grid.device) < share)
    codes = codes.flatten(0, 1)[chosen.flatten()]  # (N, K)
    ce = sound_losses(model, h[chosen.flatten()], codes)
    sound = codes != v.empty
    return parts | {"semantic": mean_where(ce[:, :1], sound[:, :1]), "acoustic": mean_where(ce[:, 1:], sound[:, 1:])}


def text_losses(model, h, text):
    """h (N, D), text (N,) -> (N, 2): the cross-entropy, and whether the most probable token was the right one."""
    def piece(h, text):
        logits = model.text_logits(h).float()
        return torch.stack([F.cross_entropy(logits, text, reduction="none"), logits.argmax(-1) == text], -1)
    return in_pieces(piece, h, text, rows_of_text(model.config))


def sound_losses(model, h, codes):
    """h (N, D), codes (N, K) -> the cross-entropies (N, K)."""
    def piece(h, codes):
        logits = model.depth(h, codes).float()
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
    return in_pieces(piece, h, codes, rows_of_sound(model.config))


PIECE = 1 << 26  # numbers that may exist at a time for a loss: 256 MiB in float32


def rows_of_text(c: FLMConfig):
    return max(1, PIECE // c.vocab_size)


def rows_of_sound(c: FLMConfig):
    return max(1, PIECE // (K * (c.empty + 1 + 24 * c.depth_width)))


def in_pieces(f, x, y, rows):
    """f(x (N, ...), y (N, ...)) by so many rows at a time, which are computed again for the gradients instead of kept. The logits
    of 8192 frames with Qwen2.5's vocabulary would be 5 GB."""
    if len(x) <= rows:
        return f(x, y)
    return torch.cat([checkpoint(f, a, b, use_reentrant=False, preserve_rng_state=False) for a, b in zip(x.split(rows), y.split(rows))])


def mean_where(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)
