"""How the audio embeddings of a model begin that has never heard: as pictures of the codec's codes."""
import torch

from model import rng_for
from streams import K


@torch.no_grad()
def init_audio(flm, codebooks, std=0.05, seed=0, assign=torch.Tensor.copy_):
    """Start the audio embeddings as a random projection of the codec's own vectors, codebooks (K, A - 1,
    dim): codes that sound alike then look alike, and the sum over a frame's acoustic codes is a
    picture of its sound. A model that starts from scratch learns to hear much sooner."""
    for group in (slice(0, 1), slice(1, K)):  # semantic, acoustic: two vector spaces
        vectors = codebooks[group] - codebooks[group].mean(1, keepdim=True)
        spread = vectors.square().mean(1).sum(0).sum().sqrt()  # of the sum over the group
        for side in ("speak", "listen"):
            D, device = flm.config.width, vectors.device
            rng = rng_for(f"{side} {group}", seed, device)
            projection = torch.randn(vectors.shape[-1], D, device=device, generator=rng)
            for table, v in zip(getattr(flm, side)[group], vectors):
                empty = torch.randn(1, D, device=device, generator=rng) * 0.02
                assign(table.weight, torch.cat([v @ projection * (std / spread), empty]))
