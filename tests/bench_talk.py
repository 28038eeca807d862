"""Does it keep up? A conversation of an hour, many at once, one with echo, and the step beside Kyutai's.

    python tests/bench_talk.py hour        held-out requests for an hour, faster than real time
    python tests/bench_talk.py sessions    1, 2, 4, ... conversations, until a frame takes over 80 ms
    python tests/bench_talk.py echo        held-out requests while the model hears itself from loudspeakers
    python tests/bench_talk.py step        where the time of a frame goes, and what reading the weights takes
    python tests/bench_talk.py step --config 7b --device cuda     the same with random weights and Mimi itself
    python tests/bench_talk.py step --config 7b --device meta     what it reads and launches, without a GPU
    python tests/bench_talk.py cache       held-out requests with keys and values in 8 bits: what changes
    python tests/bench_talk.py lmgen       our step and that of the `moshi` package's LMGen, same shapes

All but the last need what `make demo` leaves (--checkpoint, --data); `step` and `sessions` need only a
--config, whose weights are then random. The last one needs the packages that `make slow` installs.
--weights int8 or float8: the same in eight bits, and how many greedy tokens stay the same.
"""
import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import os
import random
import resource
import sys
import time
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from chat import DuplexModel  # noqa: E402
from live.engine import Engine  # noqa: E402
from live.float8 import Float8Cache  # noqa: E402
from live.graph import compile_and_capture  # noqa: E402
from eval import KINDS  # noqa: E402
from evals.conversations import written  # noqa: E402
from kernels.sampling import Sampling, kernel, sample  # noqa: E402
from live.transcript import Transcript  # noqa: E402
from live.weights import by_columns, quantise  # noqa: E402
from files.audio import SAMPLE_RATE, read_audio  # noqa: E402
from mimi import CONFIGS as CODECS, FRAME, Mimi, tensors  # noqa: E402
from model import CONFIGS, FLM, FLMConfig, LayerCache  # noqa: E402
from files.manifest import read_manifest  # noqa: E402
from streams import FRAME_RATE, K, DELAYED, LISTEN, ROWS, SPEAK, TEXT, Vocab  # noqa: E402
from training.parallel import build  # noqa: E402
from training.plan import BF16, SPEED  # noqa: E402
from evals.turns import words_of  # noqa: E402

aten = torch.ops.aten
PAUSE = 1.5  # seconds after each answer
MINUTE = round(60 * FRAME_RATE)  # frames


def numbers(model):
    """How many of each kind a model holds: {dtype: n}."""
    held = [*model.parameters(), *model.buffers()]
    return {kind: sum(x.numel() for x in held if x.dtype == kind) for kind in {x.dtype for x in held}}


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def quantile(times, q):
    return sorted(times)[min(len(times) - 1, int(q * len(times)))]


def held_out(data):
    """The dialogues of held-out requests."""
    dialogues = read_manifest(os.path.join(data, "manifest.jsonl"))
    return [d for d in dialogues if d["split"] == "seen" and d["kind"] in KINDS]


def requests(data, frames):
    """Held-out requests, each followed by time for its answer, of `frames` frames in all: yields
    (frames of audio, right answer)."""
    items, rng, t = held_out(data), random.Random(1), 0
    while t < frames:
        d = rng.choice(items)
        user, reply = (read_audio(turn["path"]) for turn in d["turns"])
        audio = torch.cat([user, torch.zeros(len(reply) + round(PAUSE * SAMPLE_RATE))])
        audio = torch.nn.functional.pad(audio, (0, -len(audio) % FRAME)).split(FRAME)[:frames - t]
        t += len(audio)
        yield audio, d["turns"][1]["text"]


def hour(args):
    duplex, frames = DuplexModel.load(args.checkpoint, args.device), round(args.minutes * MINUTE)
    engine, transcript = Engine(duplex, 1), Transcript(duplex)
    session, times, heard, said, answers = engine.join(), [], 0, 0, []
    held = lambda: bytes_of(tensors(engine.state)) / 2 ** 20
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
    print(f"{frames} frames, {frames / duplex.model.config.context:.1f} times the context; "
          f"the conversation's memory {held():.2f} MiB")
    for frames_heard, right in requests(args.data, frames):
        answer = []
        for x in frames_heard:
            session.hear(x)
            begun = time.perf_counter()
            token, audio = engine.tick()[session]
            times.append(time.perf_counter() - begun)
            heard, said = heard + len(x), said + len(audio)
            answer.append(transcript.add(len(times) - 1, token))
            if len(times) == MINUTE:
                first = peak()
        answers.append("".join(answer).split() == right.split())
    for name, some, n in (("first", times[:MINUTE], answers[:50]), ("last", times[-MINUTE:], answers[-50:])):
        print(f"{name:5} minute: {1000 * quantile(some, 0.5):6.2f} ms a frame "
              f"(p99 {1000 * quantile(some, 0.99):.2f})   "
              f"{name} {len(n)} requests: {sum(n)} answered right")
    print(f"{frames / sum(times) / FRAME_RATE:.1f} times real time; {heard} samples heard, {said} said; "
          f"memory {held():.2f} MiB; "
          f"the process's peak {first:.0f} MiB after a minute, {peak():.0f} at the end")


@torch.inference_mode()
def cache(args):
    """Greedy conversations with either cache; and the columns of the first ones through the second."""
    duplex, items = DuplexModel.load(args.checkpoint, args.device), held_out(args.data)[:args.items]
    heard = [read_audio(d["turns"][0]["path"]) for d in items]
    N, columns, step = max(map(len, heard)) + 4 * SAMPLE_RATE, [], duplex.model.step
    heard = torch.stack([torch.nn.functional.pad(x, (0, N - len(x))) for x in heard])
    greedy, found = lambda logits, k: logits[:, :-1].argmax(-1), []
    for kind in (LayerCache, Float8Cache):
        duplex.model.layer_cache, outs = kind, []
        duplex.model.step = step if columns else lambda column, *rest: (
            columns.append(column.clone()) or step(column, *rest))
        right = [words_of(written(duplex, row)) == d["turns"][1]["text"].split()
                 for row, d in zip(duplex.converse(heard)[0], items)]
        state = duplex.model.init_cache(len(items))
        for column in columns:
            h = duplex.model.hidden_step(column, state)
            outs.append((duplex.model.text_logits(h).float(), duplex.model.depth.generate(h, greedy)))
        found.append([torch.stack(x) for x in zip(*outs)])
        size = bytes_of(tensors(state.layers)) / len(items)
        print(f"{kind.__name__}: {size / 1e6:.3f} MB a conversation, {sum(right)} of {len(right)} right")
    (a, codes), (b, others) = found
    share = lambda same: f"{same.float().mean().item():.2%}"
    print(f"{len(columns)} frames: the logits are {(a - b).norm() / a.norm():.2%} off; the same text in "
          f"{share(a.argmax(-1) == b.argmax(-1))} of the columns, {share(codes == others)} of the codes")


@torch.inference_mode()
def in_a_room(duplex, heard, gain, later):
    """Conversations (B, N) with an echo of the reply: (text tokens (B, T), what was really heard (B, N))"""
    state, room, texts = duplex.init_state(range(len(heard))), heard.clone(), []
    for at in range(0, heard.shape[1], FRAME):
        text, said = duplex.step(room[:, None, at:at + FRAME].to(duplex.device), state)
        texts.append(text.clone())
        part = room[:, at + FRAME + later:at + 2 * FRAME + later]  # it is played in the next frame
        part += gain * said[:, 0, :part.shape[1]].cpu()
    return torch.stack(texts, 1), room


def echo(args):
    """Held-out requests in one batch; the model's voice comes back `gain` times as loud after `delay` s."""
    duplex, items = DuplexModel.load(args.checkpoint, args.device), held_out(args.data)[:args.items]
    heard = [read_audio(d["turns"][0]["path"]) for d in items]
    N = -(-(max(map(len, heard)) + 5 * SAMPLE_RATE) // FRAME) * FRAME
    heard = torch.stack([torch.nn.functional.pad(x, (0, N - len(x))) for x in heard])
    for gain, delay in ((0, 0.1), (0.05, 0.1), (0.1, 0.1), (0.2, 0.1), (0.2, 0.3), (0.2, 0.5), (0.5, 0.3)):
        text, room = in_a_room(duplex, heard, gain, round(delay * SAMPLE_RATE))
        right = [words_of(written(duplex, row)) == d["turns"][1]["text"].split()
                 for row, d in zip(text, items)]
        level = 20 * torch.log10((room - heard).square().mean().sqrt() + 1e-6)
        print(f"gain {gain:<4} delay {delay} s: {sum(right)} of {len(right)} answered right; "
              f"the echo is heard at {level:.0f} dB")


def duplex_of(args):
    """The trained model, or random weights of the size --config with a codec of the size --codec; in eight
    bits with --weights."""
    duplex = DuplexModel.load(args.checkpoint, args.device) if not args.config else random_duplex(args)
    if args.weights:
        quantise(duplex.model, args.weights)
    return duplex


def random_duplex(args):
    c = dataclasses.replace(CONFIGS[args.config], empty=CODECS[args.codec].codebook_size)
    place = lambda m: (m if args.device == "cpu" else m.bfloat16()).to_empty(device=args.device)
    codec = Mimi(CODECS[args.codec]).to(args.device).eval()
    return DuplexModel(build(c, place).eval(), Vocab.own(c.vocab_size, c.empty, ((0,) * K,)), codec, None,
                   Sampling(0.7, 25), Sampling(0.8, 250))


def seconds(f, n=10):
    """The mean duration of n calls of f()."""
    begun = time.perf_counter()
    for _ in range(n):
        f()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / n


def middle(f, n, rounds=10):
    """The median of so many such means."""
    return quantile([seconds(f, n) for _ in range(rounds + 1)][1:], 0.5)  # the first warms up


def copy_speed(device, rounds):
    """Bytes read and written in a second."""
    a = torch.empty(2 ** (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * len(a) / middle(lambda: b.copy_(a), 5, rounds)


def parts_of(duplex, state):
    """{name: (function, what it is called with)} of a frame's parts, and the audio of a frame."""
    m, codec, B, device = duplex.model, duplex.codec, len(state.seed), duplex.device
    wav = torch.zeros(B, 1, FRAME, device=device)
    column = torch.zeros(B, ROWS, dtype=torch.long, device=device)
    h = m.hidden_step(column, state.cache)
    text, audio = m.text_logits(h), h.new_zeros(B, m.config.empty + 1)
    greedy = lambda logits, k: logits[:, :-1].argmax(-1)

    def draws(_):
        duplex.sample_text(text, state)
        for k in range(K):
            duplex.sample_code(audio, k, state)
    parts = {"codec, audio to codes": (lambda x: codec.encode_step(x, state.codec), wav),
             "temporal transformer": (lambda x: m.hidden_step(x, state.cache), column),
             "text head": (m.text_logits, h),
             "depth transformer, 8 codes": (lambda x: m.depth.generate(x, greedy), h),
             "nine draws": (draws, h),
             "codec, codes to audio": (lambda x: codec.decode_step(x, state.codec), column[:, SPEAK, None])}
    return parts, wav


class Launches(TorchDispatchMode):
    """Counts operations, but for those that only allocate memory or look at it in other ways; and the bytes
    of what is `held` from frame to frame and read as a whole: a table of embeddings is not."""

    def __init__(self, held):
        super().__init__()
        self.held, self.read, self.n = {t.untyped_storage()._cdata: bytes_of([t]) for t in held}, {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += not (op.is_view or "empty" in op.name() or op is aten.detach.default)
        rows = op.overloadpacket in (aten.embedding, aten.index, aten.index_put_)
        for t in () if rows else tree_leaves(args):
            key = t.untyped_storage()._cdata if torch.is_tensor(t) else None
            self.read |= {key: self.held[key]} if key in self.held else {}
        return op(*args, **(kwargs or {}))


@torch.inference_mode()
@mock.patch("torch.autocast", lambda device, enabled: contextlib.nullcontext())
@mock.patch("torch.is_autocast_enabled", lambda device: False)
def reckon(duplex):
    """On the meta device, which autocast does not know: [(part, bytes that it reads, what it launches), ...],
    the bytes of the weights, and those of a conversation."""
    duplex.draw = lambda logits, how, row, recent, state: kernel(  # one launch
        logits, state.seed, state.cache.position, recent, row, how.temperature, how.top_k, how.top_p,
        how.penalty)
    duplex.model.depth.align()
    state, lines = duplex.init_state([1]), []
    weights = [w for m in (duplex.model, duplex.codec) for w in (*m.parameters(), *m.buffers())]
    for name, (f, x) in parts_of(duplex, state)[0].items():
        with Launches([*weights, *tensors(state)]) as mode:
            f(x)
        lines.append((name, sum(mode.read.values()), mode.n))
    return lines, bytes_of(weights), bytes_of(tensors(state))


def show_reckoned(lines, weights, each):
    """Without a GPU: what a frame reads and launches, how long data sheets' memory takes, and what fits."""
    _, reads, launches = zip(*lines)
    print(f"{'':28} {'MB read':>9} {'launches':>9} {'H100, ms':>9} {'H200, ms':>9}")
    for name, read, n in [*lines, ("a frame", sum(reads), sum(launches))]:
        times = (1000 * read / SPEED[card][0] for card in ("H100", "H200"))
        print(f"{name:28} {read / 1e6:9.1f} {n:9} " + " ".join(f"{t:9.3f}" for t in times))
    print(f"\nweights {weights / 1e9:.2f} GB, a conversation {each / 1e6:.1f} MB")
    for card in ("H100", "H200"):
        room = BF16[card][1]
        n = int((0.92 * room - weights) / each)
        read = sum(reads) + (n - 1) * each
        print(f"{card}: {n} conversations fit in 92% of {room / 1e9:.0f} GB; a frame of all reads "
              f"{read / 1e9:.1f} GB: {1000 * read / SPEED[card][0]:.1f} ms at least")


@torch.inference_mode()
def step(args):
    duplex = duplex_of(args)
    if duplex.device.type == "meta":
        return show_reckoned(*reckon(duplex))
    m, codec, device, n = duplex.model, duplex.codec, duplex.device, max(1, args.ticks // 10)
    state = duplex.init_state([1])
    # one row of each
    rows_only = [*m.text.parameters(), *m.speak.parameters(), *m.listen.parameters(),
                 *m.depth.codes.parameters()]
    weights = {*m.parameters(), *m.buffers()} - ({*rows_only} - {m.head.weight})
    read = bytes_of([*weights, *tensors(state.cache.layers),
                     *codec.parameters()])
    speed = copy_speed(device, args.rounds)
    kinds = "".join(f", {n / 1e6:.1f} M {str(kind)[6:]}" for kind, n in numbers(m).items())
    print(f"{sum(numbers(m).values()) / 1e6:.1f} M parameters{kinds}, and a codec of "
          f"{sum(p.numel() for p in codec.parameters()) / 1e6:.1f} M; context {m.config.context}; {device}, "
          f"{torch.get_num_threads()} threads")
    floor = read / speed
    print(f"a frame reads {read / 1e6:.1f} MB, memory is copied at {speed / 1e9:.1f} GB/s: "
          f"{1000 * floor:.3f} ms at least\n")
    state.cache.position += m.config.context  # the ring is full
    parts, wav = parts_of(duplex, state)
    for name, (f, x) in parts.items():
        run = compile_and_capture(f, x, state.small_tensors(), m, codec) if device.type == "cuda" else f
        print(f"  {name:28} {1000 * middle(lambda: run(x), n, args.rounds):8.3f} ms")
    run = duplex.compiled_step(state)
    took = middle(lambda: run(wav), n, args.rounds)
    print(f"  {'a frame, in one':28} {1000 * took:8.3f} ms: {took / floor:.2f} times the least")
    if args.weights:
        compare_tokens(duplex, args)


def sessions(args):
    """Twice as many each time, until they do not keep up; then half of the way back or forth."""
    duplex, most, over, B = duplex_of(args), 0, None, 1
    audio = torch.randn(FRAME, generator=torch.Generator().manual_seed(0)) * 0.05
    while True:
        if keep_up(duplex, B, audio, args.ticks):
            most = B
        else:
            over = B
        B = min(2 * B, args.most) if over is None else (most + over) // 2
        if B == most or over and over - most <= max(1, most // 16):
            break
    print(f"{most} sessions keep up")


def keep_up(duplex, B, audio, n):
    """Whether 99 in a hundred frames of B sessions take less than they last."""
    try:
        times = ticks(Engine(duplex, B), B, audio, n)
    except torch.OutOfMemoryError:
        print(f"{B:5} sessions: out of memory", flush=True)
        return False
    p50, p99 = (1000 * quantile(times[5:], q) for q in (0.5, 0.99))
    print(f"{B:5} sessions: {p50:7.2f} ms a frame, p99 {p99:7.2f} ms{'' if p99 < 80 else ': too slow'}",
          flush=True)
    return p99 < 80


def ticks(engine, B, audio, n):
    """Seconds of each of n + 5 ticks with B conversations. The first five warm up."""
    conversations, times = [engine.join(seed) for seed in range(B)], []
    for _ in range(n + 5):
        for s in conversations:
            s.hear(audio)
        begun = time.perf_counter()
        engine.tick()
        times.append(time.perf_counter() - begun)
    return times


def relative(y, right):
    """The error's size relative to that of what is right."""
    return ((y - right).float().norm() / right.float().norm()).item()


@torch.inference_mode()
def agreement(model, other, columns):
    """The shares of greedy text tokens and codes that two models have in common. columns: of a grid, (B, 17)
    each. Both see the same columns, and the same codes before each code."""
    caches, same = [m.init_cache(len(columns[0])) for m in (model, other)], [[], []]
    for column in columns:
        h, h2 = (m.hidden_step(column, cache) for m, cache in zip((model, other), caches))
        same[0].append(model.text_logits(h).argmax(-1) == other.text_logits(h2).argmax(-1))
        codes = model.depth.generate(h, lambda logits, k: logits[:, :-1].argmax(-1))

        def shown(logits, k):
            same[1].append(logits[:, :-1].argmax(-1) == codes[:, k])
            return codes[:, k]
        other.depth.generate(h2, shown)
    return [torch.stack(x).float().mean().item() for x in same]


def compare_tokens(duplex, args):
    """Prints it for held-out requests and the model's answers, or for random columns and weights."""
    whole = (random_duplex(args) if args.config else DuplexModel.load(args.checkpoint, args.device))
    columns = []
    if args.config:
        columns = torch.randint(0, whole.model.config.empty, (args.ticks, 1, ROWS), device=whole.device)
    else:
        step = whole.model.step  # seen by the way
        whole.model.step = lambda column, *more: (columns.append(column.clone()), step(column, *more))[1]
        audio = [x for some, _ in requests(args.data, args.ticks) for x in some]
        whole.converse(torch.cat(audio)[None])
    text, codes = agreement(whole.model, duplex.model, columns)
    print(f"greedy tokens on the same {len(columns)} columns as with {numbers(whole.model)}: "
          f"text {text:.2%}, codes {codes:.2%}")


def kyutai(V):
    """LMGen, and its model of 8 layers x 512, depth 4 x 256, with random weights."""
    from moshi.models import LMGen
    from moshi.models.loaders import _lm_kwargs, get_moshi_lm
    sizes = {"dim": 512, "num_heads": 8, "num_layers": 8, "depformer_dim": 256, "text_card": V,
             "depformer_dim_feedforward": int(4.125 * 256), "depformer_num_heads": 4,
             "depformer_num_layers": 4}
    m = get_moshi_lm(None, {**_lm_kwargs, **sizes}, device="cpu", dtype=torch.float32)
    return LMGen(m, temp=0.8, top_k=250, temp_text=0.7, top_k_text=25), m


@torch.inference_mode()
def lmgen(args):
    V, A = 4000, 2048
    gen, theirs = kyutai(V)
    config = FLMConfig(8, 512, 8, 8, 1408, 4, 256, 4, vocab_size=V, empty=A,
                       context=theirs.transformer.layers[0].self_attn.context)
    ours = FLM(config).eval()
    whole = copy.deepcopy(ours) if args.weights else None
    quantise(ours, args.weights) if args.weights else by_columns(ours)
    for name, m in (("LMGen", theirs), ("ours", ours)):
        print(f"{name:6} {sum(numbers(m).values()) / 1e6:6.1f} M parameters")
    state, seed = ours.init_cache(1), torch.tensor([1])
    text, (speak, heard) = torch.tensor([0]), torch.zeros(2, 1, K, dtype=torch.long)

    def our_step(codes, how_text, how_audio):
        column = torch.empty(1, ROWS, dtype=torch.long)
        column[:, TEXT], column[:, SPEAK], column[:, LISTEN] = text, speak, torch.where(DELAYED, heard, codes)
        new = ours.step(column, state, lambda logits: sample(logits, how_text, seed, state.position),
                        lambda logits, k: sample(logits[:, :A], how_audio, seed, state.position, 1 + k))
        for old, x in zip((text, speak, heard), (*new, codes)):
            old.copy_(x)
    codes = torch.randint(0, A, (1, K))

    for name, draw, how in (("drawn", True, (Sampling(0.7, 25), Sampling(0.8, 250))),
                            ("greedy", False, (Sampling(), Sampling()))):
        gen.use_sampling = draw
        with gen.streaming(1):
            rows = [(seconds(lambda: gen.step(codes[..., None])), seconds(lambda: our_step(codes, *how)))
                    for _ in range(args.rounds + 1)][1:]  # the first round warms up
        a, b = (1000 * quantile(t, 0.5) for t in zip(*rows))
        ratios = [y / x for x, y in rows]
        print(f"{name:6}  LMGen {a:6.2f} ms, ours {b:6.2f} ms a step: {quantile(ratios, 0.5):.3f} of it "
              f"({min(ratios):.3f} to {max(ratios):.3f} over {len(rows)} rounds), "
              f"{torch.get_num_threads()} threads, {args.weights or 'float32'}, context {config.context}")
    if args.weights:
        columns = torch.randint(0, A, (100, 1, ROWS))
        text, spoken = agreement(whole, ours, columns)
        print(f"greedy tokens as in float32, random weights: text {text:.1%}, codes {spoken:.1%}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("hour", "sessions", "echo", "step", "cache", "lmgen"))
    parser.add_argument("--checkpoint", default="out/tiny")
    parser.add_argument("--config", choices=CONFIGS,
                        help="step, sessions: random weights of this size instead")
    parser.add_argument("--codec", choices=CODECS, default="mimi", help="with --config: its codec's size")
    parser.add_argument("--data", default="data/toy",
                        help="hour, echo, cache: folder with the manifest of the held-out items")
    parser.add_argument("--minutes", type=float, default=60, help="hour: so long, at least one")
    parser.add_argument("--items", type=int, default=200, help="echo, cache: requests")
    parser.add_argument("--ticks", type=int, default=250, help="sessions, step: frames of each kind")
    parser.add_argument("--rounds", type=int, default=10, help="step, lmgen: of which the median counts")
    parser.add_argument("--most", type=int, default=4096, help="sessions: no more than so many")
    parser.add_argument("--cache", choices=("float8",), help="sessions, step: keys and values in 8 bits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", choices=("int8", "float8"), help="step, sessions, lmgen: in eight bits")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cache:
        FLM.layer_cache = Float8Cache
    if args.what == "lmgen" and not importlib.util.find_spec("moshi"):
        sys.exit("error: needs the package moshi; `make slow` installs it")
    functions = {"hour": hour, "sessions": sessions, "echo": echo, "step": step, "cache": cache,
                 "lmgen": lmgen}
    try:
        functions[args.what](args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}; `make demo` leaves what this needs")


if __name__ == "__main__":
    main()
