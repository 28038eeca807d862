"""The two transformers: stepwise = teacher-forced, the ring of the cache, the loss of Eq. 3, sampling."""
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from model import CONFIGS, FLM, FLMConfig
from streams import K, LISTEN, ROWS, SPEAK, TEXT, Vocab
from train import eq_3, frames_to_learn, kinds_of_target
from training.audio import init_audio

C = FLMConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=48, depth_layers=2, depth_width=16, depth_heads=2,
              vocab_size=40, empty=20, context=32)
V = Vocab.own(40, 20, ((0,) * K,))


@pytest.fixture
def flm():
    torch.manual_seed(0)
    m = FLM(C).eval()
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1:
                p.mul_(4)  # logits that differ
    return m


def grid(B, T, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 21, (B, ROWS, T), generator=g)
    x[:, TEXT] = torch.randint(0, 40, (B, T), generator=g)
    return x


def loss_parts(flm, x, v, shares=(1.0, 1.0), rng=None):
    """The parts of Eq. 3 for a batch (B, 17, T), and the wait tokens for each monologue token."""
    rng = rng or np.random.default_rng(0)
    learn = torch.from_numpy(np.stack([frames_to_learn(row, v, shares, rng) for row in x.numpy()]))
    every = torch.ones(len(x), LISTEN.start, x.shape[-1] - 1, dtype=torch.bool)
    totals = torch.stack([mask.sum() for mask in kinds_of_target(x, learn, every, v).values()])
    _, parts = eq_3(flm, x, learn, every, v, 1.0, totals)
    return parts | {"waits": totals[1] / totals[0].clamp(min=1)}


def test_step_by_step_equals_teacher_forced(flm):
    x = grid(3, 24)
    with torch.no_grad():
        h = flm.hidden(x)
        state = flm.init_cache(3)
        steps = torch.stack([flm.hidden_step(x[..., t], state) for t in range(24)], 1)
    assert (steps - h).abs().max() < 1e-5
    assert (flm.text_logits(steps) - flm.text_logits(h)).abs().max() < 1e-5
    assert state.position.tolist() == [24] * 3


def test_the_depth_transformer_step_by_step_equals_teacher_forced(flm):
    torch.manual_seed(1)
    h, codes = torch.randn(5, 32), torch.randint(0, 20, (5, K))
    seen = []
    with torch.no_grad():
        logits = flm.depth.logits(h, codes)
        flm.depth.generate(h, lambda l, k: seen.append(l) or codes[:, k])
    assert (torch.stack(seen, 1) - logits).abs().max() < 1e-5


def test_the_cache_is_a_ring(flm):
    """Past the context a step sees only the last C frames. In a model of one layer this equals a fresh start
    C frames ago, because rotary positions are relative."""
    one = FLM(dataclasses.replace(C, layers=1)).eval()
    x = grid(1, 80)
    with torch.no_grad():
        long, short = one.init_cache(1), one.init_cache(1)
        for t in range(80):
            a = one.hidden_step(x[..., t], long)
            if t >= 80 - C.context:
                b = one.hidden_step(x[..., t], short)
    assert (a - b).abs().max() < 1e-4
    assert long.layers[0].keys.shape == short.layers[0].keys.shape == (1, 2, C.context, 8)


def test_attention_sees_what_it_has_learned_to_see():
    """A conversation may be longer than any training row, but attention over more frames than that breaks the
    answers, so the context is as long as the longest row."""
    from train import STAGES
    for name, c in CONFIGS.items():
        assert c.context == max(s.frames for s in STAGES[name]), name


@pytest.mark.parametrize("hours", [1, 1000])
def test_after_hours_positions_are_as_exact_as_at_first(hours):
    one = FLM(dataclasses.replace(C, layers=1)).eval()
    with torch.no_grad():
        one.blocks[0].qkv.weight.mul_(20)  # attention that depends on the position
        early, late = one.init_cache(1), one.init_cache(1)
        late.position += hours * 45_000
        for t in range(2 * C.context):
            x = grid(1, 1, t)[..., 0]
            a, b = one.hidden_step(x, early), one.hidden_step(x, late)
    assert (a - b).abs().max() < 1e-5


def test_members_of_a_batch_are_independent(flm):
    """A member that joins late gives what it gives alone."""
    a, b = grid(1, 20, 1), grid(1, 20, 2)
    with torch.no_grad():
        alone = flm.init_cache(1)
        right = torch.stack([flm.hidden_step(b[..., t], alone) for t in range(12)], 1)
        state, got = flm.init_cache(2), []
        for t in range(20):
            if t == 8:
                state.position[1] = 0
            member = b[..., t - 8] if t >= 8 else grid(1, 1, t)[..., 0]
            got.append(flm.hidden_step(torch.cat([a[..., t], member]), state)[1:])
    assert (torch.stack(got[8:], 1) - right).abs().max() < 1e-5


def test_listening_is_never_predicted_and_depth_sees_neither_text_nor_listening_of_its_frame(flm):
    x = grid(1, 6)
    other = x.clone()
    other[:, LISTEN, -1] = 3
    other[:, TEXT, -1] = 3
    a, b = loss_parts(flm, x, V), loss_parts(flm, other, V)
    assert torch.equal(a["semantic_loss"], b["semantic_loss"])
    assert torch.equal(a["acoustic_loss"], b["acoustic_loss"])


def test_the_loss_is_eq_3_counted_by_hand(flm):
    x = grid(2, 10)
    x[:, TEXT, 4:7] = V.wait
    x[0, SPEAK, 5] = V.empty
    parts = loss_parts(flm, x, V)
    with torch.no_grad():
        h = flm.hidden(x[..., :-1])
        text = flm.text_logits(h).log_softmax(-1)
        sums, right = {k: [] for k in ("text", "wait", "semantic", "acoustic")}, []
        for b in range(2):
            for t in range(9):
                token = x[b, TEXT, t + 1].item()
                sums["wait" if token == V.wait else "text"].append(-text[b, t, token].item())
                right += [text[b, t].argmax() == token] * (token != V.wait)
                codes = x[b, SPEAK, t + 1]
                logp = flm.depth.logits(h[b, t:t + 1], codes[None])[0].log_softmax(-1)
                for k, code in enumerate(codes.tolist()):
                    if code != V.empty:
                        sums["semantic" if k == 0 else "acoustic"].append(-logp[k, code].item())
    for name, values in sums.items():
        assert math.isclose(parts[f"{name}_loss"].item(), sum(values) / len(values), rel_tol=1e-4), name
    assert math.isclose(parts["waits"].item(), len(sums["wait"]) / len(sums["text"]), rel_tol=1e-6)
    assert math.isclose(parts["text_accuracy"].item(), sum(right) / len(right), rel_tol=1e-6)


def test_a_loss_in_pieces_is_the_same_loss(flm, monkeypatch):
    """Values and gradients; and the logits of all frames never exist at once."""
    x, sizes, head = grid(2, 10), [], flm.text_logits

    def run():
        flm.zero_grad()
        parts = loss_parts(flm, x, V)
        sum(parts[f"{name}_loss"] for name in ("text", "wait", "semantic", "acoustic")).backward()
        return [parts[k].item() for k in parts], [p.grad.clone() for p in flm.parameters()]
    whole = run()
    monkeypatch.setattr(model, "PIECE", 3 * flm.config.vocab_size)
    monkeypatch.setattr(flm, "text_logits", lambda h: sizes.append(len(h)) or head(h))
    pieces = run()
    assert max(sizes) == 3 and sizes == [3] * 6 * 2  # forwards and again backwards
    for a, b in zip(whole, pieces):
        for u, v in zip(a, b, strict=True):
            torch.testing.assert_close(torch.as_tensor(u), torch.as_tensor(v), rtol=1e-5, atol=1e-6)


def test_depth_learns_from_all_frames_of_speech_and_a_share_of_silence(flm):
    """With a share of 0 only speech and its neighbours count, so silence elsewhere may be anything."""
    x = grid(1, 20)
    x[:, SPEAK] = 0
    x[:, SPEAK, 8:12] = 5
    counted = []
    flm.depth.register_forward_hook(lambda m, args, out: counted.append(len(args[1])))
    loss_parts(flm, x, V, (1.0, 0.0))
    loss_parts(flm, x, V)
    assert counted == [4 + 2, 19]


def test_sizes():
    """Parameters of the configurations, in millions."""
    sizes = {}
    for name, c in CONFIGS.items():
        with torch.device("meta"):
            m = FLM(c)
        sizes[name] = round(sum(p.numel() for p in m.parameters()) / 1e6)
    assert 100 <= sizes["small"] <= 200
    assert sizes["7b"] - sizes["0.5b"] > 7000
    with torch.device("meta"):
        m = FLM(CONFIGS["7b"])
    qwen = sum(p.numel() for part in (m.text, m.blocks, m.norm, m.head) for p in part.parameters())
    assert qwen == 7_615_616_512  # Qwen2.5-7B


def test_attention_of_the_cpu_is_that_of_torch(flm):
    from model import attend
    for T, S, mask in ((7, 7, None), (1, 9, torch.arange(9).reshape(1, 1, 1, 9) < 5), (1, 9, None)):
        q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8)
        right = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T > 1, enable_gqa=True)
        assert (attend(q, k, v, mask) - right).abs().max() < 1e-5


def test_audio_embeddings_may_start_from_the_codec(flm):
    torch.manual_seed(0)
    books = torch.randn(K, 20, 6) + 3
    books[:, 1] = books[:, 0] + 0.01  # two codes that sound alike
    init_audio(flm, books)
    for tables in (flm.speak, flm.listen):
        for table in tables:
            near, far = ((table.weight[0] - table.weight[i]).norm() for i in (1, 2))
            assert near < 0.05 * far
            assert 0.01 < table.weight[20].std() < 0.03  # the empty token is not audio


def test_text_alone_has_no_audio_loss(flm):
    grid = torch.full((2, ROWS, 9), V.empty)
    grid[:, TEXT] = torch.randint(0, 37, (2, 9))
    parts = loss_parts(flm, grid, V)
    assert parts["semantic_loss"] == parts["acoustic_loss"] == 0 and parts["text_loss"] > 1
    sum(parts.values()).backward()


# ------------------------------------------------------------------------------------------------------------
# what a GPU computes in another order


@pytest.mark.parametrize("S", [8, 24, 512, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_pieces_is_attention(S, dtype):
    g = torch.Generator().manual_seed(S)
    q, k, v = (torch.randn(3, 2, n, 16, generator=g).mul(2).to(dtype) for n in (7, S, S))
    mask = torch.arange(S) <= torch.tensor([0, S // 3, S])[:, None, None, None]
    right = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    got = model.attend_in_pieces(q, k, v, mask)
    close = 1e-5 if dtype == torch.float32 else 0.03
    assert got.dtype == dtype and (got.float() - right).abs().max() < close


def test_a_damaged_frame_outside_the_mask_is_not_seen():
    q, k, v = (torch.randn(1, 1, n, 8) for n in (2, 512, 512))
    mask = (torch.arange(512) < 300)[None, None, None]
    before = model.attend_in_pieces(q, k, v, mask)
    k[:, :, 300:], v[:, :, 300:] = 1e4, 1e4
    assert torch.equal(model.attend_in_pieces(q, k, v, mask), before)


def test_weights_in_eights_give_the_same(flm):
    """depth_width 16 has MLPs of 42 and 21 codes: neither is a multiple of eight."""
    torch.manual_seed(1)
    h, codes = torch.randn(5, 32), torch.randint(0, 20, (5, K))
    with torch.no_grad():
        right, greedy = flm.depth.logits(h, codes), lambda logits, k: logits.argmax(-1)
        said = flm.depth.generate(h, greedy)
        flm.depth.align()
        block = flm.depth.blocks[0]
        assert (flm.depth.heads.shape[-1], block.gate_up.shape[-1], block.down.shape[1]) == (24, 96, 48)
        assert (flm.depth.logits(h, codes) - right).abs().max() < 1e-5
        assert torch.equal(flm.depth.generate(h, greedy), said)
        flm.depth.align()
        assert torch.equal(flm.depth.generate(h, greedy), said), "once more changes nothing"


def test_the_depth_transformers_losses_compile_for_any_number_of_frames(flm):
    """As training on a GPU does: in pieces of a few frames, with weights in_eights computed once for all."""
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    counter, plain = CompileCounterWithBackend("aot_eager"), flm.depth.losses
    compiled = torch.compile(plain, dynamic=True, backend=counter)

    def grads(losses, n, aligned):
        h = torch.linspace(-1, 1, n * 32).view(n, 32).requires_grad_()
        codes = torch.arange(n * K).view(n, K) % 20
        weights = flm.depth.aligned() if aligned else None
        y = model.in_pieces(lambda h, codes: losses(h, codes, weights), h, codes, 4)
        return y, *torch.autograd.grad(y.sum(), [h, *flm.depth.parameters()])
    for n in (6, 11, 30):
        for a, b in zip(grads(compiled, n, True), grads(plain, n, False)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_gradients_through_weights_in_eights():
    w = torch.randn(2, 6, 10, requires_grad=True)
    x = torch.randn(2, 3, 6)
    wide = model.in_eights(w, 2)
    assert wide.shape == (2, 6, 16) and torch.equal(wide[..., 8:13], w[..., 5:])
    a, = torch.autograd.grad((x @ w).square().sum(), w)
    b, = torch.autograd.grad((x @ wide).square().sum(), w)
    assert torch.allclose(a, b, atol=1e-5)
    assert model.in_eights(wide, 2) is wide
