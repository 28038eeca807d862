"""Training: first the codec, then the model in the four stages of dual training (FLM-Audio, section 3, tables
2 and 3).

    python train.py --config codec                            data/toy          -> out/codec
    python prepare.py encode                                  data/toy          -> data/toy/encoded
    python train.py --config tiny                             data/toy/encoded  -> out/tiny
    python train.py --config tiny --layers 6 --lr 1e-3 --steps 2000 --batch 4 --out out/mine

A stage is a row of the table below: which layouts its batches are made of, how fast it learns, how long it
takes. There is one loop for all of them. Every batch is a function of the seed, the stage and the step, so
a run that was killed goes on from its last checkpoint with --resume to the same weights as one that was
not.

    encoded speech --utterances--> a layout's grids (17, T) --packed--> a batch (B, 17, T) --model--> Eq. 3

What a kill, a resume, several processes, the threads of a CPU and a time budget need is in training/run.py.

B rows in a batch, T frames in a row, K codebooks.
"""
import dataclasses
import math
import pkgutil
import random
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import mimi
import model
import streams
from files.audio import SAMPLE_RATE
from files.device import check_device
from mimi import FRAME, Mimi
from published.release import start_from
from streams import K, LISTEN, SPEAK, TEXT, Utterance, blank, pack
from toy.codec import CodecTask
from training import flags, float8, lora, parallel, plan
from training.audio import init_audio
from training.documents import attention, pack_apart
from training.lines import Lines
from training.muon import make_optimizer
from training.recompute import selective
from training.run import Run, Stopped, default_precision
from training.survey import PAUSE, survey

# ------------------------------------------------------------------------------------------------------------
# the stages


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int  # with --minutes: in proportion to it
    batch: int  # rows in a batch
    lr: float  # cosine from here ...
    lr_end: float  # ... to here
    frames: int = 0  # T
    layouts: dict = None  # share of each layout at the start and at the end of the stage
    _: dataclasses.KW_ONLY
    micro_batch: int = 0  # rows at a time where they do not fit at once (0: all)
    wait: float = 0.01  # gamma of Eq. 3: weight of a <wait> token, that of a monologue token being 1
    frame_dropout: float = 0.0  # share of heard frames, and of rows of heard acoustic codes, that is masked
    depth: tuple = (1.0, 1.0)  # shares of frames of speech, of silence that the depth transformer learns from
    sources: tuple = (1.0, 1.0)  # weights of recordings transcribed by a machine, by a person
    epochs: float = 0.0  # over the data, instead of steps
    documents: bool = False  # whether the samples that share a row do not see each other
    augment: float = 0.0  # codec: share of users' clips that it hears through another throat and microphone

    @property
    def recompute(self):
        """Whether rows are so long that of each layer only its input is kept (activation checkpointing)."""
        return self.frames > 1024


LANGUAGE = {"language": (1, 1)}  # instead of the language model that the paper starts from
POST = {"tts": (1, 1), "asr": (1, 1)}
FINE_1 = {"asr_response_tts": (1, 1)}
FINE_2 = {"response_tts": (0.3, 0.3), "free_response_tts": (0.7, 0.7), "recorded": (1, 1)}

# The toy model learns to speak one voice quickly and to hear many slowly, so it hears more. Fine-tuning 2
# takes <asr> away gradually (a share below 0 is none: gone half-way); all at once would cost minutes.
POST_TINY = {"tts": (1, 1), "asr": (2, 2)}
FADE_2 = {"asr_response_tts": (0.7, -0.7), "asr": (0.2, 0.2), **FINE_2}

# Why the wait weight of `tiny` is 0.3 and not the paper's 0.01: <wait> fills nine of ten frames, and a 7B
# language model must not forget its language over it. A model from scratch has no language to forget; it has
# to learn when to keep quiet, and with 0.01 more than a quarter of its answers began before the user had
# ended.
TOY = {"wait": 0.3, "frame_dropout": 0.15, "depth": (0.4, 0.1)}
SMALL, LONG = {**TOY, "micro_batch": 2}, {"micro_batch": 1}
COARSE, FINE = (1.0, 0.0), (0.5, 5.0)  # sources: transcribed by machines; both, most of it by people
STAGES = {
    "codec": (
        Stage("codec", 2200, 16, 3e-3, 0),
    ),
    "tiny": (
        Stage("language", 200, 8, 1.5e-3, 1.5e-3, 128, LANGUAGE, wait=1.0),
        Stage("post-training 1", 400, 8, 1.5e-3, 1.5e-3, 128, POST_TINY, **TOY),
        Stage("post-training 2", 100, 8, 1.5e-3, 1.5e-3, 128, POST_TINY, **TOY),
        Stage("fine-tuning 1", 1000, 8, 1.5e-3, 1.5e-3, 128, FINE_1, **TOY),
        Stage("fine-tuning 2", 2700, 4, 1.5e-3, 0, 256, FADE_2, **TOY),  # long rows: stories
    ),
    "mini": (  # the weights of `make talk`: more voices, so more to hear, and longer
        Stage("language", 400, 8, 1.5e-3, 1.5e-3, 128, LANGUAGE, wait=1.0),
        Stage("post-training 1", 1100, 16, 1.5e-3, 1.5e-3, 128, POST_TINY, **TOY),
        Stage("post-training 2", 200, 16, 1.5e-3, 1.5e-3, 128, POST_TINY, **TOY),
        Stage("fine-tuning 1", 1000, 16, 1.5e-3, 1.5e-3, 128, FINE_1, **TOY),
        Stage("fine-tuning 2", 2300, 8, 1.5e-3, 0, 256, FADE_2, **TOY),
    ),
    "small": (  # one GPU; rows of 82 seconds
        Stage("language", 300, 8, 6e-4, 6e-4, 1024, LANGUAGE, wait=1.0, micro_batch=2),
        Stage("post-training 1", 600, 8, 6e-4, 6e-4, 1024, POST_TINY, sources=COARSE, **SMALL),
        Stage("post-training 2", 100, 8, 6e-4, 6e-4, 1024, POST_TINY, sources=FINE, **SMALL),
        Stage("fine-tuning 1", 700, 8, 6e-4, 6e-4, 1024, FINE_1, **SMALL),
        Stage("fine-tuning 2", 1600, 8, 6e-4, 0, 1024, FADE_2, **SMALL),
    ),
    "7b": (  # epochs of the paper (table 3); the steps are for --plan
        Stage("post-training 1", 100_000, 256, 2e-4, 1e-5, 8192, POST, epochs=3.3, sources=COARSE, **LONG),
        Stage("post-training 2", 30_000, 256, 1e-5, 8e-6, 8192, POST, epochs=1, sources=FINE, **LONG),
        Stage("fine-tuning 1", 1_600, 256, 1e-5, 8e-6, 8192, FINE_1, epochs=2, **LONG),
        Stage("fine-tuning 2", 4_700, 256, 8e-6, 7e-6, 8192, FINE_2, epochs=6, **LONG),
    ),
}
STAGES["0.5b"] = STAGES["7b"]
WARMUP = 100  # steps at the start of a run

NOISE, LEAKAGE = 0.5, 0.3  # shares of dialogues in a noisy room, of answers that leak from the loudspeaker

ALPHA_1, ALPHA_2, BETA = 1.0, 0.5, 1.0  # Eq. 3: semantic, acoustic, monologue; gamma is in the stage


# ------------------------------------------------------------------------------------------------------------
# layouts into batches


class Conversations(Lines):
    """Batches of grids, made of the lines of `prepare.py encode`. What each layout is made of:
    training/lines.py."""

    def dialogue(self, number):
        """[(user, model), ...] of a line; what the model says during the user's first turn is in that."""
        line = self.line(number)
        turns = [{**line["turns"][0], "interjections": line.get("interjections", ())}, *line["turns"][1:]]
        return list(zip(turns[::2], turns[1::2]))

    def utterance(self, turn, rng):
        copy = rng.choice(turn["copies"])
        frame = lambda seconds: -(-(round(seconds * SAMPLE_RATE) + copy["late"]) // FRAME)
        said = [(frame(t["at"]), self.utterance(t, rng)) for t in turn.get("interjections", ())]
        echoes = turn.get("echoes") if rng.random() < LEAKAGE else None
        echo = self.codes(rng.choice(echoes)) if echoes else None
        return Utterance(turn["tokens"], self.codes(copy), copy["speech"], turn.get("starts"), said, echo,
                         turn.get("voice"))

    def codes(self, place):
        """(n, K) codes."""
        if self.used is not None:
            self.used.append(self.encoded.where(place))
        return self.encoded.codes(place)

    def grid(self, layout, stage, split, rng):
        """One sample of a layout, undelayed: (17, any number of frames)."""
        v, sources = self.vocab, self.sources(layout, split, stage.frames)
        if layout in ("tts", "asr"):
            sizes = [len(source) for source in sources]
            weights = [size * weight for size, weight in zip(sizes, stage.sources)]
            line, turn = rng.choice(rng.choices(sources, weights if any(weights) else sizes)[0])
            u = self.utterance(self.line(line)["turns"][turn], rng)
            pause = blank(rng.randint(2, PAUSE - streams.TEXT_LEAD), v, v.empty)
            return np.concatenate([pause, getattr(streams, layout)(u, v)], 1)
        if layout == "recorded":
            d = self.line(rng.choice(sources))
            sentences = [(s["frame"], s["tokens"], s.get("cut")) for s in d["sentences"]]
            grid = streams.recorded(self.codes(d["listen"]), self.codes(d["speak"]), sentences, v)
            return grid[:, rng.randrange(max(1, grid.shape[1] - stage.frames // 2)):]  # from anywhere
        turns = self.dialogue(rng.choice(sources))
        if len(turns) == 1:  # several short ones after each other
            turns += [t for _ in range(rng.randint(0, 2)) for t in self.dialogue(rng.choice(sources))]
        turns = [(self.utterance(a, rng), self.utterance(b, rng)) for a, b in turns]
        if layout == "language":
            return streams.language(turns, v)
        gaps = [rng.randint(2, 20) for _ in turns]
        if layout == "free_response_tts":
            grid = self.free_conversation(turns, gaps, split, rng)
        elif ":" in layout:  # file:function in layouts/, which makes its own choices
            grid = pkgutil.resolve_name(f"layouts.{layout}")(turns, gaps, self, rng)
        else:
            grid = getattr(streams, layout)(turns, gaps, v)
        if len(self.noise[split]) and rng.random() < NOISE:
            self.add_noise(grid, split, rng)
        if grid[TEXT, 0] < 0:  # a prompt, which stays
            return grid
        return grid[:, rng.randrange(max(1, grid.shape[1] - stage.frames)):]  # if too long, from anywhere

    def add_noise(self, grid, split, rng):
        """Replace silence between what a user says by noise (section 3.2)."""
        line = self.line(rng.choice(self.noise[split]))
        codes = self.codes(rng.choice(line["turns"][0]["copies"]))
        silent = (grid[LISTEN] == np.reshape(self.vocab.silence[-1], (-1, 1))).all(0)
        grid[LISTEN][:, silent] = np.resize(codes, (silent.sum(), K)).T

    def free_conversation(self, turns, gaps, split, rng):
        """The user interrupts an answer with probability 0.7 (section 3.2.2), or gives a backchannel."""
        interrupts = [rng.randint(1, answer.speech) if rng.random() < 0.7 else None
                      for _, answer in turns[:-1]] + [None]
        gaps = gaps[:1] + [gap if at is None else 0 for gap, at in zip(gaps[1:], interrupts)]
        known = self.backchannels[split]
        backchannels = [None] * len(turns)
        for i, (_, answer) in enumerate(turns):
            if interrupts[i] is None and len(known) and rng.random() < 0.6:
                said = self.utterance(self.line(rng.choice(known))["turns"][0], rng)
                backchannels[i] = rng.randrange(answer.speech), said
        return streams.free_response_tts(turns, gaps, interrupts, backchannels, self.vocab)

    def row(self, stage, shares, split, rng):
        """A row (17, T) packed with samples of the layouts, which frames the depth transformer learns from,
        (T-1,), and which tokens and codes of what the model says carry a loss, (9, T-1). With
        stage.documents also the sample that each frame is of, (T,)."""
        grids = []
        while (room := stage.frames - sum(g.shape[1] for g in grids)) > 0:
            layout = rng.choices(list(shares), list(shares.values()))[0]
            grid = self.grid(layout, stage, split, rng)
            if layout == "asr" and grid.shape[1] > room:  # it would be cut before its transcript
                grid = blank(room, self.vocab, self.vocab.empty)
            grids.append(grid)
        grid, loss, *documents = (pack_apart if stage.documents else pack)(grids, stage.frames, self.vocab)
        rng = np.random.default_rng(rng.getrandbits(64))
        learn = frames_to_learn(grid, self.vocab, stage.depth, rng) & loss[SPEAK, 1:].any(0)
        if split == "train" and stage.frame_dropout:
            mask_heard(grid, stage.frame_dropout, self.vocab.empty, rng)
        return grid, learn, loss[:LISTEN.start, 1:], *documents

    def batch(self, stage, progress, split, rng, rows=None):
        """(B, 17, T), (B, T-1) and (B, 9, T-1): see row. rows: which of the batch's rows to make (default:
        all); each has random numbers of its own, so that it does not depend on who makes the others.
        progress: how much of the stage is over, 0 to 1."""
        shares = {name: max(0, a + (b - a) * progress) for name, (a, b) in stage.layouts.items()
                  if self.holds(name, split, stage.frames)}
        if not any(shares.values()):
            raise ValueError(f"{stage.name}: the data holds nothing for {', '.join(stage.layouts)} ({split})")
        seeds = [rng.getrandbits(64) for _ in range(stage.batch)]
        made = [self.row(stage, shares, split, random.Random(seeds[i])) for i in rows or range(stage.batch)]
        return tuple(torch.from_numpy(np.stack(x)) for x in zip(*made))


def frames_to_learn(grid, v, shares, rng):
    """Which of the frames 1..T-1 of a row the depth transformer learns from, (T-1,): this share of the frames
    of speech (and of those beside them), and this share of the frames of silence. An empty frame is never
    one."""
    codes = grid[SPEAK, 1:]
    speaks = (codes != np.reshape(v.silence[-1], (-1, 1))).any(0)
    near = speaks.copy()
    near[1:] |= speaks[:-1]
    near[:-1] |= speaks[1:]
    return (codes != v.empty).any(0) & (rng.random(len(near)) < np.where(near, *shares))


def mask_heard(grid, share, empty, rng):
    """Frame dropout: mask this share of what is heard in a row, whole columns and, throughout the row,
    acoustic codes. A small model with few recordings would otherwise learn them by heart instead of
    understanding them."""
    lost = rng.random((K, 1)) < share
    lost[0] = False  # the semantic codes of a row are never all lost
    lost = lost | (rng.random(grid.shape[1]) < share)
    grid[LISTEN][lost] = empty


# ------------------------------------------------------------------------------------------------------------
# the loss


def kinds_of_target(grid, learn, loss, v):
    """What each target of a batch is, as masks: a monologue token or <wait>, (B, T-1); a semantic code (N, 1)
    or an acoustic one (N, K-1) of the N frames to learn from. An empty code is neither and carries no
    loss, and nor does anything where the mask `loss` is False."""
    wait, counts = grid[:, TEXT, 1:] == v.wait, loss[:, TEXT]
    real = ((grid[:, SPEAK, 1:] != v.empty) & loss[:, SPEAK]).transpose(1, 2)[learn]
    return {"text": counts & ~wait, "wait": counts & wait, "semantic": real[:, :1], "acoustic": real[:, 1:]}


def eq_3(flm, grid, learn, mask, v, gamma, totals, documents=None):
    """Eq. 3 for some rows of a batch, to be summed over all of them. grid, learn, mask, documents:
    Conversations.batch. totals (4,): how many targets of each kind the whole batch has. The two kinds of text
    token share one mean, over the monologue tokens. Returns (loss, its parts)."""
    text, right, codes = flm(grid, learn, None if documents is None else attention(documents[:, :-1]))
    masks = kinds_of_target(grid, learn, mask, v)
    n = dict(zip(masks, totals.clamp(min=1)))
    values = {"text": text, "wait": text, "semantic": codes[:, :1], "acoustic": codes[:, 1:]}
    sums = {name: (values[name] * mask).sum() for name, mask in masks.items()}
    parts = {f"{name}_loss": sums[name] / n[name] for name in sums}
    parts["text_accuracy"] = (right * masks["text"]).sum() / n["text"]
    loss = (ALPHA_1 * parts["semantic_loss"] + ALPHA_2 * parts["acoustic_loss"]
            + BETA * parts["text_loss"] + gamma * sums["wait"] / n["text"])
    return loss, parts


class ModelTask:
    """What train() needs to know of the model and its data; toy/codec.py has the same of the codec."""
    kind = "flm"

    def __init__(self, config, data, device, init=None, seed=1, eight_bit=False, precision=None, rank=0,
                 recompute=None, in_float8=False):
        """init: a folder to start from instead of from nothing, see published/release.py: start_from.
        eight_bit: see make_optimizer. rank: of low-rank adapters, see training/lora.py; 0 for none.
        recompute: one of training/recompute.py's choices. in_float8: see training/float8.py."""
        self.device, self.precision, self.recompute = device, precision, recompute
        bfloat16 = (precision or default_precision(device)) == "bfloat16"
        self.data = Conversations(data)
        vocab, meta = self.data.vocab, self.data.encoded.meta

        def place(flm):
            flm = flm.bfloat16() if eight_bit else lora.halve(flm) if rank and bfloat16 else flm
            flm = float8.convert(flm, device) if in_float8 else flm
            flm = selective(flm) if recompute == "selective" else flm
            return parallel.shard_and_allocate(flm, device, bfloat16)
        if init:
            self.model, audio = start_from(init, dataclasses.replace(config, empty=vocab.empty), vocab, meta,
                                           place, seed)
        else:
            words = max(config.vocab_size, vocab.text_size)
            config, audio = dataclasses.replace(config, vocab_size=words, empty=vocab.empty), False
            self.model = parallel.build(config, place, seed)
        self.config = self.model.config
        self.vocab = self.data.vocab = dataclasses.replace(vocab, empty=self.config.empty)
        self.modules, self.from_nothing = self.model, not init
        if not audio:
            codebooks = Mimi.load(meta["codec"], device).codebooks()
            init_audio(self.model, codebooks, seed=seed, assign=parallel.assign_shard)
        if rank:
            lora.add_adapters(self.model, rank, seed)
        self.fingerprint, self.batch = self.data.fingerprint, self.data.batch
        self.files = {"tokenizer.json": meta["tokenizer"], "codec.pt": meta["codec"]}

    def holds(self, stage, split):
        """Whether the data has something for a stage: for a quarter of its layouts at least."""
        shares = {name: max(share) for name, share in stage.layouts.items()}
        held = [share for name, share in shares.items() if self.data.holds(name, split, stage.frames)]
        return sum(held) >= sum(shares.values()) / 4

    def tokens(self, batch):
        return batch[0].numel()

    def totals(self, batch):
        """How many targets of each kind there are, (4,)."""
        return torch.stack([mask.sum() for mask in kinds_of_target(*batch[:3], self.vocab).values()]).double()

    def loss(self, stage, micro, totals):
        """(loss, its parts to be logged, what after_step wants) of a micro-batch: see eq_3."""
        self.model.recompute = self.recompute == "all" if self.recompute else stage.recompute
        grid, learn, mask, *documents = (x.to(self.device, non_blocking=True) for x in micro)
        return *eq_3(self.model, grid, learn, mask, self.vocab, stage.wait, totals.float(), *documents), None

    def after_step(self, kept, step):
        pass

    def clips_of(self, *batch):
        """Where the codes of a batch are from."""
        self.data.used = []
        stage, progress, rng, rows = batch
        self.batch(stage, progress, "train", rng, rows)
        used, self.data.used = self.data.used, None
        return sorted(set(used))

    def state(self):
        return {**lora.state(self.model), "vocab": dataclasses.asdict(self.vocab)}

    def load(self, saved, where):
        lora.load(self.model, saved, where)


# ------------------------------------------------------------------------------------------------------------
# the loop


def learning_rate(stage, progress, step):
    """Cosine from lr to lr_end over the stage, and linear from 0 over the run's first steps."""
    cosine = stage.lr_end + (stage.lr - stage.lr_end) * (0.5 + 0.5 * math.cos(math.pi * progress))
    return cosine * min(1, (step + 1) / WARMUP)


def train(task, stages, out, minutes=None, resume=False, seed=1, save_every=60.0):
    """Run all stages, or with resume what is left of them. Returns the path of the checkpoint. SIGTERM and
    Ctrl-C save and raise Stopped."""
    optimizer = make_optimizer(task.modules, muon=task.from_nothing)
    run = Run(task, stages, out, optimizer, minutes, resume, seed, save_every)
    with run.guarded():
        for stage in run.unfinished_stages():
            for batch in run.batches(stage):
                lr = learning_rate(stage, run.fraction(), run.total_steps())
                for group in optimizer.param_groups:  # torchao's has a tensor
                    group["lr"] = torch.tensor(lr) if torch.is_tensor(group["lr"]) else lr
                totals = run.totals(batch)
                # forward and backward of each micro-batch; p.grad becomes the sum
                parts, kept = run.backward(lambda micro: task.loss(stage, micro, totals), batch)
                run.check_finite("gradient", nn.utils.clip_grad_norm_(run.params, 1.0))
                optimizer.step()
                task.after_step(kept, run.total_steps())
                run.end_step(batch, parts, lr)  # logs, and saves if it is time
        return run.finish()


def resolve(args, rest):
    """(config, stages) of the table, with the flags that name a field of either."""
    config = mimi.CONFIGS["tiny"] if args.config == "codec" else model.CONFIGS[args.config]
    config, stages = flags.apply(config, STAGES[args.config], rest)
    frames = max(s.frames for s in stages)
    if args.config != "codec" and not args.init and frames > config.context:
        raise ValueError(f"rows of {frames} frames need --context {frames}")
    return config, stages


def build_parser(description=__doc__):
    return flags.build_parser(description, STAGES, model.FLMConfig, Stage)


def main(model_task=ModelTask, description=__doc__):
    """model_task: what to train a model as, such as questions/teacher.py's."""
    args, rest = build_parser(description).parse_known_args()
    torch.manual_seed(args.seed)
    try:
        config, stages = resolve(args, rest)
        if args.plan:
            if args.config == "codec":
                raise ValueError("--plan is for a model")
            flags.check_alone(args, args.gpus > 1)
            return plan.show(args, config, stages)
        run(args, config, stages, model_task)
    except Stopped as e:
        print(e.args[0], file=sys.stderr)
        sys.exit(128 + e.args[1])
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        parallel.end()


def run(args, config, stages, model_task):
    begun = time.monotonic()
    check_device(args.device)
    args.device = parallel.begin(args.device)
    flags.check_alone(args, parallel.is_distributed())
    if args.lora and not args.init:
        raise ValueError("--lora needs a model to start from: --init")
    if args.config == "codec":
        task = CodecTask(config, args.data or "data/toy", args.device, args.precision, args.skip_broken)
    else:
        task = model_task(config, args.data or "data/toy/encoded", args.device, args.init, args.seed,
                          args.eight_bit, args.precision, args.lora, args.recompute, args.float8)
    notes, stages = survey(task, stages)
    if parallel.rank() == 0:
        print("\n".join([*map(flags.describe, (task.config, *stages)), *notes]), flush=True)
    out = args.out or f"out/{args.config}"
    minutes = args.minutes and max(0.01, args.minutes - (time.monotonic() - begun) / 60)
    path = train(task, stages, out, minutes, args.resume, args.seed, args.save_every)
    if parallel.rank() == 0:
        size = sum(p.numel() for p in task.model.parameters())
        print(f"Wrote {path} ({size / 1e6:.1f} M parameters)")


if __name__ == "__main__":
    main()
