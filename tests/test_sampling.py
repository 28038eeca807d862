"""One token from logits: what the parameters mean, in small cases with known answers."""
import dataclasses

import pytest
import torch

from kernels.sampling import (MASK, Sampling, kept_weights, penalise, philox, probabilities, reference,
                              sample, weights)


def draws(logits, s, seed=0):
    """One token from each row (N, V), the rows being the steps of one conversation."""
    n = len(logits)
    return sample(logits, s, torch.full((n,), seed), torch.arange(n))


def chi_square_sigmas(tokens, p):
    """Pearson's chi-square of the counts of tokens (N,) against N p, in standard deviations from its mean."""
    kept = p > 0
    assert kept[tokens].all()
    expected, freedom = len(tokens) * p[kept], kept.sum().item() - 1
    x = ((tokens.bincount(minlength=len(p))[kept] - expected) ** 2 / expected).sum().item()
    return abs(x - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("counter, key, right", [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),  # the vectors that its authors publish
    ((MASK,) * 4, (MASK,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     "d16cfe09 94fdcceb 5001e420 24126ea1")])
def test_philox(counter, key, right):
    numbers = philox([torch.tensor(x) for x in counter], [torch.tensor(x) for x in key])
    assert " ".join(f"{x.item():08x}" for x in numbers) == right


def test_greedy_and_seeds():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    assert draws(logits, Sampling()).tolist() == logits.argmax(-1).tolist()
    a, b, c = (draws(logits, Sampling(temperature=1.5), seed).tolist() for seed in (1, 1, 2))
    assert a == b != c


def test_weights_are_probabilities():
    x = torch.randn(8, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    w = weights((x - x.amax(-1, keepdim=True)).float(), 0.7)
    p = (x / 0.7).softmax(-1)
    assert (w / w.sum(-1, keepdim=True) - p).abs().max() < 1e-6
    assert weights(torch.tensor([0.0, -float("inf")]), 1.0).tolist() == [2 ** 31, 0]


@pytest.mark.parametrize("s, allowed", [
    (Sampling(1.0, top_k=2), {0, 1}), (Sampling(1.0, top_p=0.7), {0, 1}),
    (Sampling(1.0, top_k=3, top_p=0.5), {0}), (Sampling(1.0), {0, 1, 2, 3})])
def test_top_k_and_top_p(s, allowed):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    drawn = draws(logits, s)
    assert set(drawn.tolist()) == allowed
    p = torch.zeros(4)
    p[list(allowed)] = logits[0].exp()[list(allowed)]
    assert (drawn.bincount(minlength=4) / 4000 - p / p.sum()).abs().max() < 0.03


@pytest.mark.parametrize("s", [Sampling(1.0), Sampling(0.7, top_k=20), Sampling(1.3, top_p=0.9),
                               Sampling(0.9, top_k=50, top_p=0.8, penalty=1.3), Sampling(2.0, top_k=1)])
def test_integers_keep_the_tokens_and_probabilities_of_ordinary_sampling(s):
    g = torch.Generator().manual_seed(0)
    logits, recent = torch.randn(32, 500, generator=g) * 2, torch.randint(-1, 500, (32, 8), generator=g)
    p = probabilities(logits, s, recent)
    x = penalise(logits, s.penalty, recent)
    w = kept_weights(x - x.amax(-1, keepdim=True), s)
    assert (w > 0).equal(p > 0)
    assert (w / w.sum(-1, keepdim=True) - p).abs().max() < 1e-6
    drawn = p.multinomial(1, generator=g)
    assert (w.gather(1, drawn) > 0).all()


@pytest.mark.parametrize("s", [Sampling(1.0), Sampling(0.7, top_k=20), Sampling(1.3, top_p=0.9),
                               Sampling(0.9, top_k=30, top_p=0.8, penalty=1.3)])
def test_draws_follow_the_distribution_of_ordinary_sampling(s):
    n, g = 40000, torch.Generator().manual_seed(0)
    logits, recent = torch.randn(1, 40, generator=g) * 1.5, torch.randint(-1, 40, (1, 12), generator=g)
    p = probabilities(logits, s, recent)[0].double()
    seed, step = torch.full((n,), 7), torch.arange(n)
    drawn = reference(logits.expand(n, -1), s, seed, step, recent=recent.expand(n, -1))
    ordinary = p.multinomial(n, replacement=True, generator=g)
    assert chi_square_sigmas(drawn, p) < 4 and chi_square_sigmas(ordinary, p) < 4
    other = dataclasses.replace(s, temperature=s.temperature * 1.1)  # a wrong distribution is noticed
    assert chi_square_sigmas(drawn, probabilities(logits, other, recent)[0].double()) > 4


def test_repetition_penalty_looks_at_the_window_only():
    def one(logits, recent):
        zero = torch.zeros(1, dtype=torch.long)
        logits, recent = torch.tensor([logits]), torch.tensor([recent])
        return sample(logits, Sampling(penalty=1.5), zero, zero, recent=recent).item()
    assert one([2.0, 1.9, -1.0], [-1, -1]) == 0
    assert one([2.0, 1.9, -1.0], [0, -1]) == 1
    assert one([-1.0, -1.2], [0]) == 1  # a negative logit becomes more negative


@pytest.mark.parametrize("s", [Sampling(), Sampling(1.0), Sampling(0.8, 2, 0.9)])
def test_invalid_rows_give_no_token(s):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, nan], [0.0, inf], [-inf, -inf], [-inf, 0.0]])
    assert draws(logits, s).tolist() == [-1, -1, -1, 1]


def test_a_row_draws_the_same_among_others():
    logits = torch.randn(16, 90, generator=torch.Generator().manual_seed(0))
    seed, step, s = torch.arange(16) + 2 ** 40, torch.arange(16) * 7, Sampling(1.0, 30, 0.9)
    together = sample(logits, s, seed, step, 3)
    alone = [sample(logits[i:i + 1], s, seed[i:i + 1], step[i:i + 1], 3).item() for i in range(16)]
    assert together.tolist() == alone


@pytest.mark.parametrize("fields", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=-1),
                                    dict(top_p=0), dict(top_p=1.1), dict(penalty=0)])
def test_meaningless_parameters_are_an_error(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sampling(**fields)
