"""Keys and values in eight bits (chat.py --cache float8): memory for twice as many conversations.

    ring, float8     (B, G, C, E)     numbers from -448 to 448, four significant bits each
    scales           (B, G, C)        what each vector of E numbers is multiplied by

Each key and each value has a scale of its own, so no weights are too large for it and nothing has to be
calibrated. The keys' scales are applied to the scores and the values' to the weights of attention, so what is
read from the rings is only converted, a part at a time: no ring is ever copied whole.
"""
import math
from dataclasses import dataclass

import torch

from model import LayerCache, product, write

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
AT_ONCE = 1 << 24  # numbers that are converted at a time: in bfloat16 they still fit in a GPU's cache


@dataclass
class Float8Cache(LayerCache):
    key_scales: torch.Tensor
    value_scales: torch.Tensor

    @classmethod
    def zeros(cls, shape, like):
        ring, scales = lambda: like.new_zeros(shape, dtype=FLOAT8), lambda: like.new_zeros(shape[:-1])
        return cls(ring(), ring(), scales(), scales())

    def update(self, slot, k, v):
        scales = [(x.abs().amax(-1) / LARGEST).clamp(min=1e-30) for x in (k, v)]
        k, v = ((x / scale[..., None]).to(FLOAT8) for x, scale in zip((k, v), scales))
        write(vars(self).values(), slot, (k, v, *scales))

    def attend(self, q, mask, size=256):
        """In pieces of `size` keys, as model.attend_in_pieces."""
        (B, G, C, E), S = self.keys.shape, mask.shape[-1]
        n = S // math.gcd(S, size) if q.device.type != "cpu" else 1
        pieces = lambda ring: ring[:, :, :S].unflatten(2, (n, -1)).flatten(0, 2)  # (B G n, size, E)
        many = q.reshape(B, G, -1, E).repeat_interleave(n, 1).flatten(0, 1)
        scores = product_with_float8(many, pieces(self.keys).mT).view(B, G, n, -1, S // n)
        scores = scores.transpose(2, 3).flatten(3) * (self.key_scales[:, :, None, :S] * E ** -0.5)
        weights = torch.where(mask, scores, -math.inf).softmax(-1) * self.value_scales[:, :, None, :S]
        many = weights.to(q.dtype).unflatten(3, (n, -1)).transpose(2, 3).flatten(0, 2)
        out = product_with_float8(many, pieces(self.values)).view(B, G, n, -1, E).sum(2)
        return out.to(q.dtype).reshape(q.shape)


def product_with_float8(a, b):
    """model.product of a and b (N, ..., ...), of which a part is converted at a time."""
    rows = max(1, AT_ONCE // b[0].numel())
    return torch.cat([product(x, y.to(x.dtype)) for x, y in zip(a.split(rows), b.split(rows))])
