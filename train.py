"""Training: first the codec, then the model in the four stages of dual training (FLM-Audio, section 3, tables 2 and 3).

    python train.py --config codec                            data/toy          -> out/codec
    python prepare.py encode                                  data/toy          -> data/toy/encoded
    python train.py --config tiny                             data/toy/encoded  -> out/tiny

A stage is a row of the table below: which layouts its batches are made of, how fast it learns, how long it takes. There is
one loop for all of them. Every batch is a function of the seed, the stage and the step, so a run that was killed goes on
from its last checkpoint with --resume to the same weights as one that was not.

jobs.py tells what a batch and a loss are. T frames in a row.
"""
import argparse
import dataclasses
import json
import math
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

import mimi
import model
from training import parallel, plan
from files.atomic import copy
from files.checkpoint import load_checkpoint, save_checkpoint
from toy.codec import CodecTask
from files.audio import SAMPLE_RATE
from files.checkpoint import load_weights
from files.manifest import spoken_parts
from files.tokenizer import load_tokenizer
from mimi import FRAME, Mimi
from model import loss_parts
import numpy as np
import prepare
from published import release as published
import streams
from streams import K, LISTEN, Utterance, Vocab, blank, pack
from training.muon import Muon, is_matrix

# ---------------------------------------------------------------------------------------------------------------------
# the stages


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int  # if --minutes is given: in proportion to it
    batch: int  # rows in a batch
    lr: float  # cosine from here ...
    lr_end: float  # ... to here
    frames: int = 0  # T
    layouts: dict = None  # share of each layout at the start and at the end of the stage
    _: dataclasses.KW_ONLY
    rows: int = 0  # rows of a batch at a time where they do not fit at once (0: all)
    wait: float = 0.01  # gamma of Eq. 3: weight of a <wait> token, that of a monologue token being 1
    frame_dropout: float = 0.0  # share of the heard frames, and of the rows of heard acoustic codes, that is blotted out
    depth: tuple = (1.0, 1.0)  # shares of the frames of speech and of silence that the depth transformer learns from
    sources: tuple = (1.0, 1.0)  # how often a recording that a machine wrote down is used, and one that a person did

    @property
    def recompute(self):
        """Whether rows are so long that of each layer only its input is kept."""
        return self.frames > 1024


LANGUAGE = {"language": (1, 1)}  # instead of the language model that the paper starts from
POST = {"tts": (1, 1), "asr": (1, 1)}
FINE_1 = {"asr_response_tts": (1, 1)}
FINE_2 = {"response_tts": (0.3, 0.3), "free_response_tts": (0.7, 0.7), "recorded": (1, 1)}  # what the data has of them

# The toy model learns to speak one voice quickly and to hear many slowly, so it hears more. Fine-tuning 2 takes <asr> away
# gradually (a share below 0 is none: gone half-way); all at once would cost minutes.
POST_TINY = {"tts": (1, 1), "asr": (2, 2)}
FADE_2 = {"asr_response_tts": (0.7, -0.7), "asr": (0.2, 0.2), **FINE_2}

# Why the wait weight of `tiny` is 0.3 and not the paper's 0.01: <wait> fills nine of ten frames, and a 7B language model
# must not forget its language over it. A model from scratch has no language to forget; it has to learn when to keep quiet,
# and with 0.01 more than a quarter of its answers began before the user had ended.
TOY = {"wait": 0.3, "frame_dropout": 0.15, "depth": (0.4, 0.1)}
STAGES = {
    "codec": (
        Stage("codec", 4400, 4, 3e-3, 0),
    ),
    "tiny": (
        Stage("language", 700, 8, 1.5e-3, 1.5e-3, 128, LANGUAGE, wait=1.0),
        Stage("post-training 1", 400, 8, 1.5e-3, 1.5e-3, 128, POST_TINY, **TOY),
        Stage("post-training 2", 100, 8, 1.5e-3, 1.5e-3, 128, POST_TINY, **TOY),
        Stage("fine-tuning 1", 1000, 8, 1.5e-3, 1.5e-3, 128, FINE_1, **TOY),
        Stage("fine-tuning 2", 2200, 4, 1.5e-3, 0, 256, FADE_2, **TOY),  # long rows: stories
    ),
    "small": (  # one GPU
        Stage("language", 300, 32, 6e-4, 6e-4, 256, LANGUAGE, wait=1.0),
        Stage("post-training 1", 600, 32, 6e-4, 6e-4, 256, POST_TINY, **TOY),
        Stage("post-training 2", 100, 32, 6e-4, 6e-4, 256, POST_TINY, **TOY),
        Stage("fine-tuning 1", 700, 32, 6e-4, 6e-4, 256, FINE_1, **TOY),
        Stage("fine-tuning 2", 1600, 32, 6e-4, 0, 256, FADE_2, **TOY),
    ),
    "7b": (
        Stage("post-training 1", 100_000, 256, 2e-4, 1e-5, 8192, POST, rows=1),
        Stage("post-training 2", 30_000, 256, 1e-5, 8e-6, 8192, POST, sources=(0.5, 5.0), rows=1),
        Stage("fine-tuning 1", 1_600, 256, 1e-5, 8e-6, 8192, FINE_1, rows=1),
        Stage("fine-tuning 2", 4_700, 256, 8e-6, 7e-6, 8192, FINE_2, rows=1),
    ),
}
STAGES["0.5b"] = STAGES["7b"]
WARMUP = 100  # steps at the start of a run

ALPHA_1, ALPHA_2, BETA = 1.0, 0.5, 1.0  # Eq. 3: semantic, acoustic, monologue; gamma, of <wait>, is in the stage

# ---------------------------------------------------------------------------------------------------------------------
# what the model learns from


def read_encoded(folders):
    """What `prepare.py encode` wrote, from one folder or several with commas between: (meta, lines, memory-mapped codes of
    each shard). Raises ValueError if their codecs or tokenisers differ, or are no longer what the folders were made with."""
    metas, lines, codes = [], [], []
    for folder in folders.split(","):
        try:
            with open(os.path.join(folder, "meta.json")) as f:
                meta = json.load(f)
            if meta["version"] != prepare.VERSION:
                raise ValueError(f"{folder}: is of version {meta['version']}, not {prepare.VERSION}; run `python prepare.py encode` again")
            meta["tokenizer"], meta["codec"] = (os.path.join(folder, f) for f in ("tokenizer.json", "codec.pt"))
            metas.append(meta)
            meta["text_size"] = load_tokenizer(meta["tokenizer"]).n_vocab
            for number in range(len(meta["shards"])):
                with open(os.path.join(folder, f"{number:05}.jsonl"), encoding="utf-8") as f:
                    some = [json.loads(line) for line in f]
                for place in (p for d in some for p in places(d)):
                    place["shard"] = len(codes)
                lines += some
                codes.append(np.load(os.path.join(folder, f"{number:05}.npy"), mmap_mode="r"))
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{e.filename}: not there; `python prepare.py encode` makes it") from None
        except (KeyError, TypeError, json.JSONDecodeError) as e:
            raise ValueError(f"{folder}: is not what `python prepare.py encode` writes ({type(e).__name__}: {e})") from None
        for name in ("codec", "tokenizer"):
            if not os.path.isfile(meta[name]) or prepare.sha256(meta[name]) != meta[name + "_sha256"]:
                raise ValueError(f"{folder}: was encoded with another {name} than {meta[name]} now is; encode it again")
            if meta[name + "_sha256"] != metas[0][name + "_sha256"]:
                raise ValueError(f"{folder}: was encoded with another {name} than {folders.split(',')[0]}")
    return metas[0], lines, codes


def places(line):
    if "turns" not in line:
        return [line["listen"], line["speak"]]
    return [c for t in spoken_parts(line) for c in t["copies"]]


def by_annotation(turns, roles):
    """Turns of these roles: (those that a machine wrote down, those that a person did)."""
    return tuple([t for t, by_hand in turns if by_hand == annotated and t["role"] in roles] for annotated in (False, True))


class ModelTask:
    """The lines of `prepare.py encode`, made into grids by the layouts, and the loss of Eq. 3."""
    kind = "flm"

    def __init__(self, config, data, device, init=None, seed=1, eight_bit=False):
        """init: a folder with Qwen2.5's weights to start from, instead of from nothing. eight_bit: see make_optimizer."""
        meta, lines, self.codes = read_encoded(data)
        self.vocab = Vocab.own(meta["text_size"], meta["codebook_size"], tuple(map(tuple, meta["silence"])))
        place = lambda m: parallel.place(m.bfloat16() if eight_bit else m, device, device != "cpu")
        if init:
            self.model = published.from_qwen(init, dataclasses.replace(config, empty=self.vocab.empty), place)
        else:
            self.model = model.build(dataclasses.replace(config, vocab_size=max(config.vocab_size, self.vocab.text_size),
                                                         empty=self.vocab.empty), place, seed)
        self.config = self.model.config
        if self.config.vocab_size < self.vocab.text_size:
            raise ValueError(f"{init}: has {self.config.vocab_size} words, fewer than the {self.vocab.text_size} of the data's "
                             "tokeniser; encode with --tokenizer and this folder")
        self.modules, self.from_nothing = self.model, not init
        self.model.init_audio(Mimi.load(meta["codec"], device).codebooks(), seed=seed)
        self.device = device
        # split -> what the layouts are made of: turns for hearing and for speaking, dialogues, recorded conversations
        self.heard, self.said, self.dialogues, self.free, self.recorded, self.backchannels = {}, {}, {}, {}, {}, {}
        for split in ("train", "seen"):
            mine = [d for d in lines if d["split"] == split]
            self.backchannels[split] = [t for d in mine if d.get("kind") == "backchannel" for t in d["turns"]]
            mine = [d for d in mine if d.get("kind") != "backchannel"]
            turns = [(t, d["annotated"]) for d in mine if "interjections" not in d for t in d.get("turns", ())]
            self.heard[split] = by_annotation(turns, ("user", "either"))
            self.said[split] = by_annotation(turns, ("model", "either"))
            # in fine-tuning 1 the model only speaks when the user has ended; interjections are for 2
            self.free[split] = [list(zip([{**t, "interjections": d.get("interjections", ())} for t in d["turns"][::2]], d["turns"][1::2]))
                                for d in mine if len(d.get("turns", ())) > 1]
            self.dialogues[split] = [turns for turns in self.free[split] if not turns[0][0]["interjections"]]
            self.recorded[split] = [d for d in mine if "sentences" in d]
        self.fingerprint = f"{meta['codec_sha256'][:16]} {meta['tokenizer_sha256'][:16]} {len(lines)} lines"
        self.files = {"tokenizer.json": meta["tokenizer"], "codec.pt": meta["codec"]}
        self.used = None  # a list, while somebody wants to know where a batch is from

    def names(self, stage, progress, rng):
        """Where the sounds of a batch are from."""
        self.used = []
        self.batch(stage, progress, "train", rng)
        used, self.used = self.used, None
        return sorted(set(used))

    def utterance(self, turn, rng):
        copy = rng.choice(turn["copies"])
        said = [(-(-(round(t["at"] * SAMPLE_RATE) + copy["late"]) // FRAME), self.utterance(t, rng)) for t in turn.get("interjections", ())]
        return Utterance(turn["tokens"], self.sound(copy), copy["speech"], turn.get("starts"), said)

    def sound(self, place):
        """(n, K) codes."""
        shard = self.codes[place["shard"]]
        name, codes = f"{shard.filename} from frame {place['offset']}", shard[place["offset"]:place["offset"] + place["frames"]]
        if self.used is not None:
            self.used.append(name)
        if len(codes) < place["frames"] or codes.size and not 0 <= codes.min() <= codes.max() < self.vocab.codebook_size:
            raise ValueError(f"{name}: damaged, not {place['frames']} frames of codes below {self.vocab.codebook_size}; encode it again")
        return codes

    def sources(self, layout, split):
        return {"tts": self.said, "asr": self.heard, "recorded": self.recorded, "response_tts": self.free,
                "free_response_tts": self.free}.get(layout, self.dialogues)[split]

    def grid(self, layout, stage, split, rng):
        """One sample of a layout, undelayed: (17, any number of frames)."""
        v, sources = self.vocab, self.sources(layout, split)
        if layout in ("tts", "asr"):
            turn = rng.choice(rng.choices(sources, [len(s) * w for s, w in zip(sources, stage.sources)])[0])
            pause = blank(rng.randint(2, 12), v, v.empty)
            return np.concatenate([pause, getattr(streams, layout)(self.utterance(turn, rng), v)], 1)
        if layout == "recorded":
            d = rng.choice(sources)
            sentences = [(s["frame"], s["tokens"], s.get("cut")) for s in d["sentences"]]
            grid = streams.recorded(self.sound(d["listen"]), self.sound(d["speak"]), sentences, v)
            return grid[:, rng.randrange(max(1, grid.shape[1] - stage.frames // 2)):]  # from anywhere
        turns = rng.choice(sources)
        if len(turns) == 1:  # several short ones after each other
            turns = turns + [t for _ in range(rng.randint(0, 2)) for t in rng.choice(sources)]
        turns = [(self.utterance(a, rng), self.utterance(b, rng)) for a, b in turns]
        if layout == "language":
            return streams.language(turns, v)
        gaps = [rng.randint(2, 20) for _ in turns]
        if layout != "free_response_tts":
            grid = getattr(streams, layout)(turns, gaps, v)
        else:
            barge_in = [rng.randint(1, answer.speech) if rng.random() < 0.7 else None for _, answer in turns[:-1]] + [None]
            gaps = gaps[:1] + [gap if b is None else 0 for gap, b in zip(gaps[1:], barge_in)]
            backchannels = [(rng.randrange(answer.speech), self.utterance(rng.choice(self.backchannels[split]), rng))
                       if b is None and self.backchannels[split] and rng.random() < 0.4 else None for (_, answer), b in zip(turns, barge_in)]
            grid = streams.free_response_tts(turns, gaps, barge_in, backchannels, v)
        return grid[:, rng.randrange(max(1, grid.shape[1] - stage.frames)):]  # what is too long begins anywhere

    def batch(self, stage, progress, split, rng):
        """(B, 17, T): rows packed with samples of the stage's layouts."""
        shares = {name: max(0, a + (b - a) * progress) for name, (a, b) in stage.layouts.items() if any(self.sources(name, split))}
        if not any(shares.values()):
            raise ValueError(f"{stage.name}: the data holds nothing for {', '.join(stage.layouts)} ({split})")
        rows = []
        for _ in range(stage.batch):
            grids = []
            while sum(g.shape[1] for g in grids) < stage.frames:
                layout = rng.choices(list(shares), list(shares.values()))[0]
                grids.append(self.grid(layout, stage, split, rng))
            rows.append(pack(grids, stage.frames, self.vocab))
        return torch.from_numpy(np.stack(rows))

    def loss(self, stage, grid, split, rng):
        self.model.recompute = stage.recompute
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        if split == "train" and stage.frame_dropout:
            grid = drop_frames(grid, stage.frame_dropout, self.vocab.empty, generator)
        grid = grid.to(self.device)
        parts = loss_parts(self.model, grid, self.vocab, stage.depth, generator)
        # both kinds of text token share one sum, divided by the number of monologue tokens
        waits = parts.pop("waits")
        total = (ALPHA_1 * parts["semantic"] + ALPHA_2 * parts["acoustic"]
                 + BETA * parts["mono"] + stage.wait * waits * parts["wait"])
        return total, parts, None

    def state(self):
        return {"model": self.model.state_dict(), "vocab": dataclasses.asdict(self.vocab)}

    def load(self, saved, where):
        load_weights(self.model, saved["model"], where)


def drop_frames(grid, share, empty, generator):
    """Leave out this share of all that is heard: whole frames, and acoustic codes throughout a row. A small model with few
    recordings would otherwise know them by heart instead of understanding them."""
    B, _, T = grid.shape
    lost = torch.rand(B, K, 1, generator=generator) < share
    lost[:, 0] = False  # the semantic codes of a row are never all lost
    lost = lost | (torch.rand(B, 1, T, generator=generator) < share)
    grid[:, LISTEN] = torch.where(lost, empty, grid[:, LISTEN])
    return grid


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def bf16_is_faster(device):
    """Whether this machine multiplies matrices faster in bfloat16: GPUs, and CPUs with instructions for it."""
    if device != "cpu":
        return True

    def seconds(dtype):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(10):
            a @ a
        return time.perf_counter() - start
    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)


def slices_of_a_batch(device):
    """Into how many slices a batch is cut. On a CPU two threads with a core each do more than one operation after another
    on both cores (half as much again)."""
    return 1 << min(2, (os.cpu_count() or 1).bit_length() - 1) if device == "cpu" else 1


def make_optimizer(modules, muon):
    """AdamW, and with muon Muon for what is inside the layers. For weights in bfloat16 AdamW with states of eight bits, each update
    rounded up or down by chance: 6 bytes a parameter with its gradient, instead of 16."""
    named = [(name, p) for name, p in modules.named_parameters() if p.requires_grad]
    kinds = [(muon and is_matrix(name, p), p.ndim > 1) for name, p in named]
    groups = [{"params": [p for (_, p), k in zip(named, kinds) if k == kind], "muon": kind[0], "weight_decay": 0.05 * kind[1]}
              for kind in sorted(set(kinds))]
    if named[0][1].dtype != torch.bfloat16:
        return Muon(groups, lr=0, betas=(0.9, 0.98), fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ValueError("--eight-bit needs the extra 'eightbit': pip install '.[eightbit]'") from None
    return AdamW8bit(groups, lr=torch.tensor(0.0), betas=(0.9, 0.98), bf16_stochastic_round=True)


class Run:
    """A task on its way through the stages, kept in the folder `out`: checkpoint.pt, log.jsonl, and what else chat.py needs."""

    def __init__(self, task, stages, out, minutes=None, resume=False, seed=1):
        self.task, self.stages, self.out, self.minutes, self.seed = task, stages, out, minutes, seed
        self.path = os.path.join(out, "checkpoint.pt")
        self.params = [p for p in task.modules.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(task.modules, task.from_nothing)
        # where it stands: steps of each stage (None: not known yet), the stage, the step in it
        self.at = {"goals": [None if minutes else s.steps for s in stages], "stage": 0, "step": 0,
                   "bf16": bf16_is_faster(task.device), "slices": max(slices_of_a_batch(task.device), parallel.world())}
        if os.path.exists(self.path) or parallel.is_distributed() and parallel.newest(out):
            if not resume:
                raise ValueError(f"{out}: holds a run already; --resume goes on with it, --out names another folder")
            self.restore()
        # on a CPU, the slices of a batch side by side; otherwise one after another
        n = self.at["slices"]
        self.threads = None
        if task.device == "cpu" and not parallel.is_distributed():
            self.threads = ThreadPoolExecutor(n, initializer=torch.set_num_threads if n > 1 else None,
                                              initargs=(max(1, os.cpu_count() // n),))
            self.optimizer.each = self.threads.map
        self.stopped = False
        self.ahead = {}  # what is made of the next step already: (stage, step, number of the slice) -> see make
        if parallel.rank() == 0:
            os.makedirs(out, exist_ok=True)
            for name, source in task.files.items():
                if not os.path.exists(source):
                    raise FileNotFoundError(f"{source}: not there; the data in use was encoded with it")
                copy(source, os.path.join(out, name))

    def restore(self):
        if parallel.is_distributed():
            path = parallel.newest(self.out)
            if not path:
                raise ValueError(f"{self.path}: is of one process; it cannot go on in several")
            saved, files = parallel.read(path)
        else:
            path, saved = self.path, load_checkpoint(self.path, self.task.kind)
        if saved["config"] != dataclasses.asdict(self.task.config) or saved["data"] != self.task.fingerprint:
            raise ValueError(f"{path}: was trained with another config or on other data; --out names another folder")
        if [s["name"] for s in saved["stages"]] != [s.name for s in self.stages]:
            raise ValueError(f"{path}: was trained in other stages; --out names another folder")
        if "optimizer" not in saved and not parallel.is_distributed():
            raise ValueError(f"{path}: holds no optimiser: it is the result of several processes, which go on with torchrun")
        self.at = saved["at"]
        if parallel.is_distributed():
            parallel.restore(files, self.tensors())
        else:
            self.task.load(saved, path)
            self.optimizer.load_state_dict(saved["optimizer"])

    def tensors(self):
        """All that several processes hold in slices: {name: parameter or state of the optimiser}."""
        out = {}
        parallel.reshard(self.task.modules)
        names = {p: name for name, p in self.task.modules.named_parameters()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                state = self.optimizer.memory(p, group["muon"])
                out |= {f"model {names[p]}": p, **{f"{k} {names[p]}": x for k, x in state.items()}}
        return out

    def facts(self):
        """What a checkpoint says besides its tensors."""
        return {"data": self.task.fingerprint, "at": self.at, "stages": [dataclasses.asdict(s) for s in self.stages]}

    def save(self):
        if parallel.is_distributed():
            parallel.save(self.out, self.steps(), self.tensors(), {"config": dataclasses.asdict(self.task.config), **self.facts()})
        else:
            save_checkpoint(self.path, self.task.kind, self.task.config, **self.task.state(), **self.facts(),
                            optimizer=self.optimizer.state_dict())

    def finish(self):
        """The result of several processes as one checkpoint, which chat.py reads."""
        if parallel.is_distributed():
            if parallel.rank() == 0:
                _, files = parallel.read(parallel.newest(self.out))
                weights = dict(parallel.whole(files, "model "))
                if self.task.config.tied:
                    weights["head.weight"] = weights["text.weight"]
                save_checkpoint(self.path, self.task.kind, self.task.config, **self.task.state() | {"model": weights}, **self.facts())
            parallel.dist.barrier()

    def log(self, **numbers):
        if parallel.rank() == 0:
            entry = {"stage": self.stages[self.at["stage"]].name, "step": self.at["step"], **numbers}
            with open(os.path.join(self.out, "log.jsonl"), "a") as f:
                f.write(json.dumps(entry) + "\n")

    def autocast(self):
        kind = torch.device(self.task.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.at["bf16"] and not parallel.is_distributed())  # which do it themselves

    def steps(self):
        """Of all stages so far."""
        return sum(self.at["goals"][:self.at["stage"]]) + self.at["step"]

    def progress(self, later=0):
        """How far the stage will have gone so many steps later, 0 to 1."""
        goal = self.at["goals"][self.at["stage"]]
        return (self.at["step"] + later) / goal if goal else 0.0

    def step(self):
        """One step of the optimiser. Returns the loss, its parts and the learning rate."""
        stage, progress = self.stages[self.at["stage"]], self.progress()
        lr = stage.lr_end + (stage.lr - stage.lr_end) * (0.5 + 0.5 * math.cos(math.pi * progress))
        if self.at["stage"] == 0:
            lr *= min(1, (self.at["step"] + 1) / WARMUP)
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(lr) if torch.is_tensor(group["lr"]) else lr
        n = max(min(self.at["slices"], stage.batch), stage.batch // (stage.rows or stage.batch))
        if n % parallel.world():
            raise ValueError(f"a batch in {n} slices cannot be shared by {parallel.world()} processes")
        part, mine = dataclasses.replace(stage, batch=stage.batch // n), range(parallel.rank(), n, parallel.world())
        losses, kept = zip(*(self.side_by_side if self.threads else self.one_by_one)(part, mine))
        means = {name: sum(x[name] for x in losses) / len(losses) for name in losses[0]}
        numbers = parallel.mean(torch.stack([*means.values(), torch.tensor(float(self.stopped), device=means["loss"].device)]).float())
        parts = dict(zip([*means, "stopped"], numbers))
        self.stopped = parts.pop("stopped") > 0
        loss = parts.pop("loss")
        if not torch.isfinite(loss):
            self.explain(loss.item(), losses, part, mine)
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        if kept[0] is not None:
            torch.manual_seed(self.at["step"])  # for codebooks that restart
            self.task.after(kept)
        self.at["step"] += 1
        return loss, parts, lr

    def side_by_side(self, part, mine):
        """All slices at the same time, in threads; p.grad becomes their mean. part: the stage, with a batch of one slice; mine: the
        slices' numbers. Returns [(losses, what task.after wants), ...]"""
        def one(i):
            losses, kept = self.slice(part, i)
            return torch.autograd.grad(losses["loss"], self.params, materialize_grads=True), losses, kept
        grads, losses, kept = zip(*self.threads.map(one, mine))
        for p, *slopes in zip(self.params, *grads):
            p.grad = sum(slopes) / len(mine)
        return [({name: x.detach() for name, x in some.items()}, k) for some, k in zip(losses, kept)]

    def one_by_one(self, part, mine):
        """The same in turn, for this process's slices; p.grad becomes the mean over all slices of all processes. A GPU is told what
        to do and is still busy with it afterwards: time to make the next step's first slice."""
        self.optimizer.zero_grad()
        out = []
        for i in mine:
            if parallel.is_distributed():
                self.task.modules.set_requires_gradient_sync(i == mine[-1])
            losses, kept = self.slice(part, i)
            (losses["loss"] / len(mine)).backward()
            out.append(({name: x.detach() for name, x in losses.items()}, kept))
        if self.progress(1) < 1:
            self.ahead = {(self.at["stage"], self.at["step"] + 1, mine[0]): self.make(part, mine[0], 1)}
        return out

    def slice(self, part, i):
        """The i-th slice of a batch: its loss and the parts of it, and what task.after wants of it (None: nothing)."""
        batch, rng = self.ahead.pop((self.at["stage"], self.at["step"], i), None) or self.make(part, i)
        with self.autocast():
            loss, parts, kept = self.task.loss(part, batch, "train", rng)
        return {"loss": loss, **parts}, kept

    def make(self, part, i, later=0):
        """(the i-th slice of the batch, the rng for its loss) of this step or of a later one."""
        rng = self.rng(i, later)
        return self.task.batch(part, self.progress(later), "train", rng), rng

    def rng(self, i, later=0):
        return random.Random(f"{self.seed} {self.at['stage']} {self.at['step'] + later} {i}")

    def explain(self, loss, losses, part, mine):
        """Stop for a loss that is not a number; the last checkpoint stays as it is."""
        bad = [i for i, some in zip(mine, losses) if not torch.isfinite(some["loss"])]
        names = getattr(self.task, "names", lambda *args: [])
        where = [name for i in bad for name in names(part, self.progress(), self.rng(i))]
        raise ValueError(f"the loss is {loss} at step {self.at['step']} of {part.name}; the last good state is in {self.out}; "
                         f"learned from: {', '.join(where[:8]) or 'another process knows'}{', ...' if where[8:] else ''}")

    @torch.no_grad()
    def held_out(self, stage, batches=4):
        """Mean of each part of the loss, over the same batches of held-out items every time; logged."""
        self.task.modules.eval()
        sums = {}
        for i in range(batches):
            rng = random.Random(i)
            batch = self.task.batch(stage, 1.0, "seen", rng)
            with self.autocast():
                _, parts, _ = self.task.loss(stage, batch, "seen", rng)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value.item() / batches
        self.task.modules.train()
        self.log(split="held-out", **{name: round(value, 4) for name, value in sums.items()})
        return sums


def train(task, stages, out, minutes=None, resume=False, seed=1, save_every=60.0):
    """Run all stages, or, with resume, what is left of them. Returns the path of the checkpoint. SIGTERM saves and stops."""
    run = Run(task, stages, out, minutes, resume, seed)
    at, saved_at, first_rank = run.at, time.monotonic(), parallel.rank() == 0
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stopped", True))
    try:
        while at["stage"] < len(stages):
            stage, goal = stages[at["stage"]], at["goals"][at["stage"]]
            bar = tqdm(total=goal, initial=at["step"], desc=f"{stage.name:16}", unit="step", mininterval=1, disable=not first_rank)
            begun, first = time.monotonic(), at["step"]
            while goal is None or at["step"] < goal:
                loss, parts, lr = run.step()
                bar.update()
                if minutes and at["step"] % 50 == 30 and (goal is None or not first):
                    passed = parallel.mean(torch.tensor(time.monotonic() - begun, device=loss.device)).item()
                    mine = 60 * minutes * stage.steps / sum(s.steps for s in stages)  # seconds
                    goal = at["goals"][at["stage"]] = max(at["step"], round((at["step"] - first) * mine / passed))
                    bar.total = goal
                if at["step"] % 10 == 1:
                    numbers = {name: round(value.item(), 4) for name, value in parts.items()}
                    bar.set_postfix({name: f"{value:.2f}" for name, value in numbers.items()}, refresh=False)
                    run.log(lr=lr, loss=round(loss.item(), 4), **numbers)
                if goal and at["step"] % math.ceil(goal / 4) == 0 and at["step"] < goal:
                    run.held_out(stage)
                if run.stopped:
                    run.save()
                    raise Stopped(f"{out}: stopped and saved at step {at['step']} of {stage.name}; --resume goes on")
                if parallel.any_of(time.monotonic() - saved_at > save_every):
                    run.save()
                    saved_at = time.monotonic()
            bar.close()
            held_out = "  ".join(f"{name} {value:.3f}" for name, value in run.held_out(stage).items())
            if first_rank:
                print(f"{stage.name}: held out  {held_out}", flush=True)
            at["stage"], at["step"] = at["stage"] + 1, 0
            run.save()
        run.finish()
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return run.path


class Stopped(Exception):
    """By SIGTERM, with everything saved."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", choices=STAGES)
    parser.add_argument("--data", help="default: data/toy for the codec, data/toy/encoded for a model")
    parser.add_argument("--out", help="default: out/CONFIG")
    parser.add_argument("--init", help="folder with Qwen2.5's weights, as published: start from this language model; the data "
                        "must be encoded with its tokeniser")
    parser.add_argument("--minutes", type=float, help="train about so long on this machine instead of the table's steps")
    parser.add_argument("--eight-bit", action="store_true", help="weights in bfloat16, optimiser in 8 bits: a third of the memory, in "
                        "one process")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plan", action="store_true", help="train nothing: tell what it would take, on --gpus such --card")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--card", default="H100", choices=plan.BF16)
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the card's peak that --plan counts on")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    try:
        if args.plan:
            if args.config == "codec":
                raise ValueError("--plan is for a model")
            return plan.show(args.config, model.CONFIGS[args.config], STAGES[args.config], args.gpus, args.card, args.utilisation,
                             args.eight_bit)
        out = args.out or f"out/{args.config}"
        args.device = parallel.begin(args.device)
        if parallel.is_distributed() and (args.config == "codec" or args.eight_bit):
            raise ValueError(f"{'--eight-bit' if args.eight_bit else 'the codec'} trains in one process, without torchrun")
        if args.config == "codec":
            task = CodecTask(mimi.CONFIGS["tiny"], args.data or "data/toy", args.device)
        else:
            task = ModelTask(model.CONFIGS[args.config], args.data or "data/toy/encoded", args.device, args.init, args.seed, args.eight_bit)
        path = train(task, STAGES[args.config], out, args.minutes, args.resume, args.seed)
    except Stopped as e:
        sys.exit(str(e))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    finally:
        parallel.end()
    if parallel.rank() == 0:
        size = sum(p.numel() for p in task.model.parameters())
        print(f"Wrote {path} ({size / 1e6:.1f} M parameters)")


if __name__ == "__main__":
    main()
