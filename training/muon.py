"""The optimiser. AdamW, and for a model that starts from nothing Muon for the matrices inside its layers
(Jordan et al., 2024; with the scale of Liu et al., arXiv 2502.16982).

AdamW scales every number of a matrix by itself. Muon looks at the matrix as a whole: its momentum is U S
V^T, and the step is U V^T, the same directions, all equally strong. What only few examples ask for is then
learned as fast as what all of them ask for, and a model that starts from nothing learns several times as
much in a step (RESULTS.md). A pretrained model is trained on with AdamW, as in the paper.

    momentum (m, n) --Newton-Schulz--> nearly orthogonal (m, n) --0.2 sqrt(max(m, n))--> AdamW's step size

With all matrices in every step, Newton-Schulz takes a third of its time on a CPU's core, and the momentum
changes little from step to step. So every matrix moves in every other step, twice as far: half of them in
one step, the others in the next.
"""
import torch

from training.parallel import gather, shard_like

MATRICES = {"qkv", "out", "gate_up", "up", "down", "in_proj", "out_proj"}  # not embeddings, not heads
A, B, C = 3.4445, -4.7750, 2.0315  # a x + b x^3 + c x^5 brings what is in (0, 1] near 1
MOMENTUM = 0.95
EVERY = 2  # steps from one move of a matrix to its next


def is_matrix(name, p):
    """Whether Muon takes this parameter, and not AdamW."""
    return p.ndim > 1 and not MATRICES.isdisjoint(name.split("."))


def make_optimizer(modules, muon):
    """AdamW, with muon Muon for what is inside the layers. For weights in bfloat16: AdamW with 8-bit states
    and stochastic rounding; 6 bytes a parameter with its gradient, instead of 16."""
    named = [(name, p) for name, p in modules.named_parameters() if p.requires_grad]
    muon = muon and named[0][1].dtype != torch.bfloat16
    kinds = [(muon and is_matrix(name, p), p.ndim > 1) for name, p in named]  # (Muon, weight decay)
    groups = [{"params": [p for (_, p), k in zip(named, kinds) if k == kind], "muon": kind[0],
               "weight_decay": 0.05 * kind[1]} for kind in sorted(set(kinds))]
    if named[0][1].dtype != torch.bfloat16:
        return Muon(groups, lr=0, betas=(0.9, 0.98), fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ValueError("--eight-bit needs the extra 'eightbit': pip install '.[eightbit]'") from None
    return AdamW8bit(groups, lr=torch.tensor(0.0), betas=(0.9, 0.98), bf16_stochastic_round=True)


class Muon(torch.optim.AdamW):
    """AdamW, except for the groups that say {"muon": True}. map: how to go through the matrices, such as a
    thread pool's."""
    map = map

    @torch.no_grad()
    def step(self):
        groups = [group for group in self.param_groups if group["muon"]]
        matrices = [(p, p.grad, group) for group in groups for p in group["params"]]
        done = int(self.init_state(matrices[0][0], True)["step"]) if matrices else 0
        moves = [(done + i) % EVERY == 0 for i in range(len(matrices))]
        for _ in self.map(self.update, matrices, moves):
            pass
        super().step()  # leaves alone what has no gradient
        for p, grad, _ in matrices:
            p.grad = grad

    def init_state(self, p, muon):
        """What is kept of a parameter from step to step, zeros at first. AdamW wants a count of steps in all
        of them."""
        state = self.state[p]
        if not state:
            state |= {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p)}
            if not muon:
                state["exp_avg_sq"] = torch.zeros_like(p)
        return state

    @torch.no_grad()
    def update(self, matrix, moves):
        """moves: whether the matrix moves in this step; its momentum always does."""
        p, grad, group = matrix
        state, p.grad = self.init_state(p, True), None
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(grad, 1 - MOMENTUM)
        if not moves:
            return
        step, lr = orthogonal(gather(grad.lerp(momentum, MOMENTUM))), EVERY * group["lr"]  # Nesterov momentum
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(shard_like(p, step), alpha=lr * 0.2 * max(p.shape[-2:]) ** 0.5)


def orthogonal(x, rounds=5):
    """x (..., m, n) = U S V^T -> about U V^T. Each round of Newton-Schulz is x <- q(x x^T) x with the same q,
    so x x^T alone goes through the rounds (smaller than x by n / m), and their product is applied once. On a
    GPU the rounds are in bfloat16, each applied to x: products of q's would lose what is small."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.is_cuda:
        y = in_bfloat16(x, rounds).to(x.dtype)
        return y.mT if tall else y
    gram, q, product = x @ x.mT, None, None
    for i in range(rounds):
        gram = q @ gram @ q if i else gram
        q = B * gram + C * (gram @ gram)
        q.diagonal(dim1=-2, dim2=-1).add_(A)
        product = q @ product if i else q
    x = product @ x
    return x.mT if tall else x


def in_bfloat16(x, rounds):
    """The rounds of orthogonal() for x (..., m, n) of norm 1, m <= n, in bfloat16."""
    x = x.bfloat16()
    for _ in range(rounds):
        gram = x @ x.mT
        x = A * x + (B * gram + C * (gram @ gram)) @ x
    return x
