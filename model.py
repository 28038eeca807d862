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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mimi import from_fields, load_checkpoint, load_weights
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
    codebook_size: int  # of the codec; one more entry stands for "empty"
    context: int  # frames that attention sees
    tied: bool = False  # text head = text embedding
    rope_base: float = 1e6
    norm_eps: float = 1e-6


CONFIGS = {
    "tiny": FLMConfig(4, 256, 4, 2, 768, 2, 128, 2, vocab_size=512, codebook_size=256, context=512, rope_base=1e4),
    "small": FLMConfig(12, 768, 12, 4, 2304, 4, 512, 8, vocab_size=512, codebook_size=256, context=2048, rope_base=1e4),
    # Qwen2.5's sizes, with the depth transformer of the FLM-Audio release
    "0.5b": FLMConfig(24, 896, 14, 2, 4864, 6, 1024, 16, vocab_size=151936, codebook_size=2048, context=8192, tied=True),
    "7b": FLMConfig(28, 3584, 28, 4, 18944, 6, 1024, 16, vocab_size=152064, codebook_size=2048, context=8192),
}


# ---------------------------------------------------------------------------------------------------------------------
# primitives


def attend(q, k, v, mask):
    """Scaled dot-product attention. q (B, H, T, E), k and v (B, G, S, E), mask (..., T, S): True where it may look."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    # On a CPU and for short sequences the plain formula is twice as fast.
    B, H, T, E = q.shape
    q = q.reshape(B, k.shape[1], H // k.shape[1] * T, E)  # the heads that share keys stand above one another: (B, G, H/G * T, E)
    scores = (q @ k.mT).view(B, H, T, k.shape[2]) * E ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=q.dtype)
    return (weights.view(*q.shape[:3], k.shape[2]) @ v).view(B, H, T, E)


def rotary(position, E, base):
    """cos and sin, (*position.shape, E), by which queries and keys are turned."""
    rate = base ** (-torch.arange(0, E, 2, device=position.device, dtype=torch.float32) / E)
    angle = (position[..., None] * rate).repeat(*[1] * position.ndim, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


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

    def forward(self, x, cos, sin, mask, remember=None):
        """x (B, T, D). remember, if given, takes the new keys and values and returns all that attention shall see."""
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, -1, self.E).transpose(1, 2).split([self.H, self.G, self.G], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
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

    def forward(self, x, k0, mask, remember=None):
        """x (N, n, W): positions k0 to k0 + n of N frames."""
        N, n, W = x.shape
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.H, W // self.H)).transpose(1, 2).chunk(3, 1)
        if remember:
            k, v = remember(k, v)
        x = x + self.out(attend(q, k, v, mask).transpose(1, 2).reshape(N, n, W))
        y = self.norm2(x).transpose(0, 1)  # (n, N, W): one matrix product for each position
        gate, up = (y @ self.gate_up[k0:k0 + n].to(y.dtype)).chunk(2, -1)
        return x + ((F.silu(gate) * up) @ self.down[k0:k0 + n].to(y.dtype)).transpose(0, 1)


class Depth(nn.Module):
    """h_t and the codes before k -> logits of code k. It sees this frame only: no other frame, no text."""

    def __init__(self, c: FLMConfig):
        super().__init__()
        W, A = c.depth_width, c.codebook_size + 1
        self.empty = c.codebook_size
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
        mask = torch.ones(K, K, dtype=torch.bool, device=h.device).tril()
        for block in self.blocks:
            x = block(x, 0, mask)
        return (self.norm(x).transpose(0, 1) @ self.heads.to(h.dtype)).transpose(0, 1)

    def generate(self, h, draw):
        """h (B, D) -> codes (B, K), each drawn by draw(logits (B, A), k) -> (B,) and shown to the next position."""
        cache = [[None, None] for _ in self.blocks]
        from_h = self.from_h(h).unflatten(-1, self.positions.shape)
        code, codes = torch.full_like(h[:, 0], self.empty, dtype=torch.long), []
        for k in range(K):
            x = (self.codes[k](code) + from_h[:, k] + self.positions[k])[:, None]
            mask = torch.ones(1, k + 1, dtype=torch.bool, device=h.device)
            for block, past in zip(self.blocks, cache):
                def remember(*new, past=past):
                    past[:] = [y if p is None else torch.cat([p, y], 2) for p, y in zip(past, new)]
                    return past
                x = block(x, k, mask, remember)
            code = draw(self.norm(x[:, 0]) @ self.heads[k], k)
            codes.append(code)
        return torch.stack(codes, 1)


# ---------------------------------------------------------------------------------------------------------------------
# the whole


@dataclass
class State:
    """The memory of B conversations: a ring of the last C frames' keys and values, (layers, B, G, C, E) each, and how
    many frames each conversation has had, (B,)."""
    keys: torch.Tensor
    values: torch.Tensor
    position: torch.Tensor


class FLM(nn.Module):
    def __init__(self, config: FLMConfig):
        super().__init__()
        c = self.config = config
        A = c.codebook_size + 1
        self.text = nn.Embedding(c.vocab_size, c.width)
        self.speak = nn.ModuleList(nn.Embedding(A, c.width) for _ in range(K))
        self.listen = nn.ModuleList(nn.Embedding(A, c.width) for _ in range(K))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, c.norm_eps)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        self.depth = Depth(c)
        if c.tied:
            self.head.weight = self.text.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.ndim > 1:  # the norms keep their ones
                residual = name.endswith(("out.weight", "down.weight", "down"))
                p.normal_(std=0.02 / (2 * self.config.layers) ** 0.5 if residual else 0.02)

    @torch.no_grad()
    def init_audio(self, codebooks, std=0.05):
        """Let the embeddings of sound start as a random projection of the codec's own vectors, codebooks (K, A - 1, dim): codes
        that sound alike then look alike, and the sum over a frame's acoustic codes is a picture of its sound. A model that
        starts from scratch hears much sooner for it."""
        for group in (slice(0, 1), slice(1, K)):  # semantic, acoustic: two vector spaces
            vectors = codebooks[group] - codebooks[group].mean(1, keepdim=True)
            spread = vectors.square().mean(1).sum(0).sum().sqrt()  # of the sum over the group
            for tables in (self.speak, self.listen):
                projection = torch.randn(vectors.shape[-1], self.config.width, device=vectors.device)
                for table, v in zip(tables[group], vectors):
                    table.weight[:-1] = v @ projection * (std / spread)

    def embed(self, grid):
        """Eq. 1: (B, 17, T) -> (B, T, D)."""
        channels = [self.text, *self.speak, *self.listen]
        return sum(embedding(grid[:, row]) for row, embedding in enumerate(channels))

    def forward(self, grid):
        """Eq. 2, teacher-forced: (B, 17, T) -> h (B, T, D). self.head and self.depth read it."""
        B, _, T = grid.shape
        assert T <= self.config.context, (T, self.config.context)
        cos, sin = rotary(torch.arange(T, device=grid.device), self.blocks[0].E, self.config.rope_base)
        mask = torch.ones(T, T, dtype=torch.bool, device=grid.device).tril()
        x = self.embed(grid)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.norm(x)

    def init_state(self, B):
        c, w = self.config, self.head.weight
        shape = (c.layers, B, c.kv_heads, c.context, c.width // c.heads)
        return State(w.new_zeros(shape), w.new_zeros(shape), torch.zeros(B, dtype=torch.long, device=w.device))

    def hidden_step(self, column, state):
        """One frame: column (B, 17) -> h (B, D). The state moves on by one frame; what is older than the context is
        overwritten, so a conversation may last for ever."""
        B, C = len(column), self.config.context
        slot, members = state.position % C, torch.arange(B, device=column.device)
        cos, sin = (y[:, None, None] for y in rotary(state.position, self.blocks[0].E, self.config.rope_base))
        mask = (torch.arange(C, device=column.device) <= state.position[:, None])[:, None, None]  # (B, 1, 1, C)
        x = self.embed(column[..., None])
        for block, keys, values in zip(self.blocks, state.keys, state.values):
            def remember(k, v, keys=keys, values=values):
                keys[members, :, slot], values[members, :, slot] = k[:, :, 0], v[:, :, 0]
                return keys, values
            x = block(x, cos, sin, mask, remember)
        state.position += 1
        return self.norm(x[:, 0])

    @torch.no_grad()
    def step(self, column, state, draw_text, draw_code):
        """One step of conversation: column t (B, 17) -> text (B,) and speak codes (B, 8) of column t+1.
        draw_text(logits (B, V)) and draw_code(logits (B, A), k) choose."""
        h = self.hidden_step(column, state)
        return draw_text(self.head(h)), self.depth.generate(h, draw_code)

    @staticmethod
    def load(path, device="cpu"):
        """(model, its vocabulary, the whole checkpoint) from what train.py wrote. Raises ValueError if it is not that."""
        saved = load_checkpoint(path, "flm")
        model = FLM(from_fields(FLMConfig, saved["config"], path))
        load_weights(model, saved["model"], path)
        return model.to(device).eval(), from_fields(Vocab, saved["vocab"], path), saved


# ---------------------------------------------------------------------------------------------------------------------
# the loss


def loss_parts(model, grid, v: Vocab, depth_share=(1.0, 1.0), rng=None):
    """The four cross-entropies of Eq. 3, and how many wait tokens there are for each monologue token.

    grid (B, 17, T) -> {"semantic", "acoustic", "mono", "wait"}: means over the tokens of each kind, and "waits".
    Empty speak tokens carry no loss. depth_share: which shares of the frames of speech (and those beside them) and of the
    frames of silence enter the depth transformer, drawn by the torch.Generator rng; the rest costs nothing.
    """
    h, target = model(grid[..., :-1]), grid[..., 1:]
    h, text = h.flatten(0, 1), target[:, TEXT].flatten()
    ce = F.cross_entropy(model.head(h).float(), text, reduction="none")
    wait = text == v.wait
    parts = {"mono": mean_where(ce, ~wait), "wait": mean_where(ce, wait), "waits": wait.sum() / (~wait).sum().clamp(min=1)}

    codes = target[:, SPEAK].transpose(1, 2)  # (B, T-1, K)
    speaks = (codes != torch.tensor(v.silence[-1], device=grid.device)).any(-1)
    speaks = F.max_pool1d(speaks[:, None].float(), 3, 1, 1)[:, 0] > 0
    share = torch.where(speaks, *depth_share)
    chosen = (codes != v.empty).any(-1) & (torch.rand(share.shape, generator=rng).to(grid.device) < share)
    codes = codes.flatten(0, 1)[chosen.flatten()]  # (N, K)
    logits = model.depth(h[chosen.flatten()], codes).float()
    ce = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view(-1, K)
    sound = codes != v.empty
    return parts | {"semantic": mean_where(ce[:, :1], sound[:, :1]), "acoustic": mean_where(ce[:, 1:], sound[:, 1:])}


def mean_where(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# sampling


@dataclass(frozen=True)
class Sampling:
    """How to draw one token from logits. temperature 0 is greedy."""
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    penalty: float = 1.0  # logits of the last tokens are divided (if negative multiplied) by it


def sample(logits, s: Sampling, generator=None, recent=None):
    """logits (B, V) -> tokens (B,). recent (B, n): the tokens that the repetition penalty is for; -1 is none."""
    logits = logits.float()
    if recent is not None and s.penalty != 1:
        known = F.one_hot(recent + 1, logits.shape[1] + 1).amax(1)[:, 1:] > 0  # (B, V); the first column is "none"
        logits = torch.where(known, torch.where(logits > 0, logits / s.penalty, logits * s.penalty), logits)
    if s.temperature == 0:
        return logits.argmax(-1)
    logits = logits / s.temperature
    if s.top_k:
        logits = logits.masked_fill(logits < logits.topk(min(s.top_k, logits.shape[-1])).values[:, -1:], float("-inf"))
    if s.top_p < 1:
        ranked, order = logits.softmax(-1).sort(-1, descending=True)
        drop = ranked.cumsum(-1) - ranked >= s.top_p  # what lies behind the first p of the probability
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
