"""Training: first the codec, then the model in the four stages of dual training (FLM-Audio, section 3, tables 2 and 3).

    python train.py --config codec                            data/toy          -> out/codec
    python prepare.py encode                                  data/toy          -> data/toy/encoded
    python train.py --config tiny                             data/toy/encoded  -> out/tiny

A stage is a row of the table below: which layouts its batches are made of, how fast it learns, how long it takes. There is
one loop for all of them. Every batch is a function of the seed, the stage and the step, so a run that was killed goes on
from its last checkpoint with --resume to the same weights as one that was not.

B rows in a batch, T frames in a row, K codebooks.
"""
import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import mimi
import model
import parallel
import plan
import prepare
import streams
from files import SAMPLE_RATE, load_checkpoint, load_weights, read_audio, replace_when_done, save_checkpoint
from manifest import read_manifest, seconds_of, spoken_parts, where_is
from mimi import FRAME, Mimi, mel_filters
from model import FLM, loss_parts
from muon import Muon, is_matrix
from streams import K, LISTEN, Utterance, Vocab, blank, pack
from tokenizer import load_tokenizer

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
    blot: float = 0.0  # share of the heard frames, and of the rows of heard acoustic codes, that is blotted out
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
TOY = {"wait": 0.3, "blot": 0.15, "depth": (0.4, 0.1)}
STAGES = {
    "codec": (
        Stage("codec", 4400, 4, 1.5e-3, 0),
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
ALPHA_1, ALPHA_2, BETA = 1.0, 0.5, 1.0  # Eq. 3: semantic, acoustic, monologue
WARMUP = 100  # steps at the start of a run


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
            meta["tokenizer"] = os.path.join(folder, "tokenizer.json")
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


class ModelJob:
    """The lines of `prepare.py encode`, made into grids by the layouts, and the loss of Eq. 3."""
    kind = "flm"

    def __init__(self, config, data, device, init=None, seed=1, eight_bit=False):
        """init: a folder with Qwen2.5's weights to start from, instead of from nothing. eight_bit: see make_optimizer."""
        meta, lines, self.codes = read_encoded(data)
        self.vocab = Vocab.own(meta["text_size"], meta["codebook_size"], tuple(map(tuple, meta["silence"])))
        place = lambda m: parallel.place(m.bfloat16() if eight_bit else m, device, device != "cpu")
        if init:
            self.model = model.from_qwen(init, dataclasses.replace(config, empty=self.vocab.empty), place)
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
        self.heard, self.said, self.dialogues, self.free, self.recorded, self.murmurs = {}, {}, {}, {}, {}, {}
        for split in ("train", "seen"):
            mine = [d for d in lines if d["split"] == split]
            self.murmurs[split] = [t for d in mine if d.get("kind") == "backchannel" for t in d["turns"]]
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
            murmurs = [(rng.randrange(answer.speech), self.utterance(rng.choice(self.murmurs[split]), rng))
                       if b is None and self.murmurs[split] and rng.random() < 0.4 else None for (_, answer), b in zip(turns, barge_in)]
            grid = streams.free_response_tts(turns, gaps, barge_in, murmurs, v)
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

    def loss(self, stage, progress, split, rng):
        self.model.recompute = stage.recompute
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        grid = self.batch(stage, progress, split, rng)
        if split == "train" and stage.blot:
            grid = blot_out(grid, stage.blot, self.vocab.empty, generator)
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


def blot_out(grid, share, empty, generator):
    """Leave out this share of all that is heard: whole frames, and acoustic codes throughout a row. A small model with few
    recordings would otherwise know them by heart instead of understanding them."""
    B, _, T = grid.shape
    lost = torch.rand(B, K, 1, generator=generator) < share
    lost[:, 0] = False  # the semantic codes of a row are never all lost
    lost = lost | (torch.rand(B, 1, T, generator=generator) < share)
    grid[:, LISTEN] = torch.where(lost, empty, grid[:, LISTEN])
    return grid


# ---------------------------------------------------------------------------------------------------------------------
# what the codec learns from


class Clips:
    """The sound files of a manifest, up to six seconds each, and what is said in them; the letters, of whatever writing, that occur
    in it."""

    def __init__(self, data):
        self.clips = {"train": set(), "seen": set()}  # (where it is, what is said)
        for d in read_manifest(os.path.join(data, "manifest.jsonl")):
            if d["split"] in self.clips:
                self.clips[d["split"]] |= {(where_is(t), t["text"]) for t in d.get("turns", ())}
        self.letters = "".join(sorted({c for _, text in self.clips["train"] for c in text.lower()}))
        self.frames = {place: round(seconds_of(*place) * SAMPLE_RATE) for clips in self.clips.values() for place, _ in clips}
        self.clips = {split: sorted((c for c in clips if self.frames[c[0]] <= 6 * SAMPLE_RATE), key=str)
                      for split, clips in self.clips.items()}
        self.fingerprint = f"{sum(map(len, self.clips.values()))} clips"
        self.sounds = {}  # where -> int16 samples, once read

    def batch(self, stage, split, rng):
        """B clips of about the same length, begun at any place in a frame: sound (B, 1, 1920*T), letters of each."""
        pool = sorted(rng.sample(self.clips[split], 8 * stage.batch), key=lambda clip: self.frames[clip[0]])
        start = stage.batch * rng.randrange(8)
        pool = pool[start:start + stage.batch]
        leads = [rng.randrange(2 * FRAME) for _ in pool]
        T = max(-(-(lead + self.frames[place]) // FRAME) for lead, (place, _) in zip(leads, pool)) + 1
        wav = torch.zeros(stage.batch, 1, T * FRAME)
        for row, lead, (place, _) in zip(wav, leads, pool):
            if place not in self.sounds:
                path, start, end = place
                self.sounds[place] = (read_audio(path, start=start, end=end) * 32767).short()
            x = self.sounds[place].float() / 32767
            row[0, lead:lead + len(x)] = x * 10 ** (rng.uniform(-6, 6) / 20)
        return wav, [[1 + self.letters.index(c) for c in text.lower() if c in self.letters] for _, text in pool]


class CodecJob:
    """Loss: spectra, waveform, commitment, and letters: a CTC head reads the words off the first codebook, a cheap stand-in
    for Mimi's distillation that makes its codes tell what is said and not who says it."""
    kind = "codec"
    files, from_nothing = {}, True

    def __init__(self, config, data, device):
        self.config, self.device = config, device
        self.model = Mimi(config)
        self.clips = Clips(data)
        self.letters = nn.Linear(config.dim, 4 * (len(self.clips.letters) + 1))  # four guesses a frame
        self.modules = nn.ModuleList([self.model, self.letters]).to(device)
        self.spectra = [Spectrum(n).to(device) for n in (256, 512, 1024, 2048)]
        self.fingerprint = self.clips.fingerprint

    def loss(self, stage, progress, split, rng):
        wav, words = self.clips.batch(stage, split, rng)
        wav = wav.to(self.device)
        training = split == "train"
        K = self.config.codebooks
        depth = [rng.randint(1, K) if training and rng.random() < 0.4 else K for _ in wav]
        y, semantic, commitment, chosen = self.model(wav, torch.tensor(depth, device=self.device))
        logits = self.letters(semantic.mT).float().unflatten(-1, (4, -1)).flatten(1, 2)  # (B, 4*T, letters)
        spectra = rng.sample(self.spectra, 2) if training else self.spectra
        parts = {
            "spectrum": sum(s(y, wav) for s in spectra) / len(spectra),
            "wave": (y - wav).abs().mean(),
            "commitment": commitment,
            "letters": letters_loss(logits, words)}
        return parts["spectrum"] + parts["wave"] + 0.25 * parts["commitment"] + 0.3 * parts["letters"], parts, chosen

    def after(self, slices):
        """The codebooks learn by moving averages, not by gradients."""
        self.model.learn([[torch.cat(x) for x in zip(*choices)] for choices in zip(*slices)])

    def state(self):
        return {"model": self.model.state_dict(), "letters": self.letters.state_dict()}

    def load(self, saved, where):
        load_weights(self.model, saved["model"], where)
        load_weights(self.letters, saved["letters"], where)


def letters_loss(logits, words):
    """Connectionist temporal classification: logits (B, T, letters) against the letters of each item."""
    return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), torch.tensor(sum(words, []), device=logits.device),
                      torch.full((len(logits),), logits.shape[1]), torch.tensor([len(w) for w in words]), zero_infinity=True)


class Spectrum(nn.Module):
    """How far two sounds (B, 1, N) are apart in log-mel and log-magnitude spectra of one window length."""

    def __init__(self, n):
        super().__init__()
        self.n = n
        self.register_buffer("window", torch.hann_window(n))
        self.register_buffer("mel", mel_filters(n, min(80, n // 8)))

    def forward(self, x, y):
        X, Y = (torch.view_as_real(torch.stft(s[:, 0].float(), self.n, self.n // 4, window=self.window, return_complex=True))
                .square().sum(-1) / self.n for s in (x, y))  # power
        distance = lambda a, b: 0.5 * (torch.log(a + 1e-6) - torch.log(b + 1e-6)).abs().mean()
        return distance(self.mel @ X, self.mel @ Y) + 0.5 * distance(X, Y)


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


def copy(source, target):
    with replace_when_done(target) as temporary:
        shutil.copyfile(source, temporary)


class Run:
    """A job on its way through the stages, kept in the folder `out`: checkpoint.pt, log.jsonl, and what else chat.py needs."""

    def __init__(self, job, stages, out, minutes=None, resume=False, seed=1):
        self.job, self.stages, self.out, self.minutes, self.seed = job, stages, out, minutes, seed
        self.path = os.path.join(out, "checkpoint.pt")
        self.params = [p for p in job.modules.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(job.modules, job.from_nothing)
        # where it stands: steps of each stage (None: not known yet), the stage, the step in it, the step of all
        self.at = {"plan": [None if minutes else s.steps for s in stages], "stage": 0, "step": 0, "total": 0,
                   "bf16": bf16_is_faster(job.device), "slices": max(slices_of_a_batch(job.device), parallel.world())}
        if os.path.exists(self.path) or parallel.together() and parallel.newest(out):
            if not resume:
                raise ValueError(f"{out}: holds a run already; --resume goes on with it, --out names another folder")
            self.restore()
        # on a CPU, the slices of a batch side by side; otherwise one after another
        n = self.at["slices"]
        self.threads = None
        if job.device == "cpu" and not parallel.together():
            self.threads = ThreadPoolExecutor(n, initializer=torch.set_num_threads if n > 1 else None,
                                              initargs=(max(1, os.cpu_count() // n),))
            self.optimizer.each = self.threads.map
        self.stopped = False
        if parallel.rank() == 0:
            os.makedirs(out, exist_ok=True)
            for name, source in job.files.items():
                if not os.path.exists(source):
                    raise FileNotFoundError(f"{source}: not there; the data in use was encoded with it")
                copy(source, os.path.join(out, name))

    def restore(self):
        if parallel.together():
            path = parallel.newest(self.out)
            if not path:
                raise ValueError(f"{self.path}: is of one process; it cannot go on in several")
            saved, files = parallel.read(path)
        else:
            path, saved = self.path, load_checkpoint(self.path, self.job.kind)
        if saved["config"] != dataclasses.asdict(self.job.config) or saved["data"] != self.job.fingerprint:
            raise ValueError(f"{path}: was trained with another config or on other data; --out names another folder")
        if [s["name"] for s in saved["stages"]] != [s.name for s in self.stages]:
            raise ValueError(f"{path}: was trained in other stages; --out names another folder")
        if "optimizer" not in saved and not parallel.together():
            raise ValueError(f"{path}: holds no optimiser: it is the result of several processes, which go on with torchrun")
        self.at = saved["at"]
        if parallel.together():
            parallel.restore(files, self.tensors())
        else:
            self.job.load(saved, path)
            self.optimizer.load_state_dict(saved["optimizer"])

    def tensors(self):
        """All that several processes hold in slices: {name: parameter or state of the optimiser}."""
        out = {}
        parallel.in_slices(self.job.modules)
        for name, p in self.job.modules.named_parameters():
            state = self.optimizer.memory(p, self.job.from_nothing and is_matrix(name, p))
            out |= {f"model {name}": p, **{f"{k} {name}": x for k, x in state.items()}}
        return out

    def facts(self):
        """What a checkpoint says besides its tensors."""
        return {"data": self.job.fingerprint, "at": self.at, "stages": [dataclasses.asdict(s) for s in self.stages]}

    def save(self):
        if parallel.together():
            parallel.save(self.out, self.at["total"], self.tensors(), {"config": dataclasses.asdict(self.job.config), **self.facts()})
        else:
            save_checkpoint(self.path, self.job.kind, self.job.config, **self.job.state(), **self.facts(),
                            optimizer=self.optimizer.state_dict())

    def finish(self):
        """The result of several processes as one checkpoint, which chat.py reads."""
        if parallel.together():
            if parallel.rank() == 0:
                _, files = parallel.read(parallel.newest(self.out))
                weights = dict(parallel.whole(files, "model "))
                if self.job.config.tied:
                    weights["head.weight"] = weights["text.weight"]
                save_checkpoint(self.path, self.job.kind, self.job.config, **self.job.state() | {"model": weights}, **self.facts())
            parallel.dist.barrier()

    def log(self, **numbers):
        if parallel.rank() == 0:
            entry = {"stage": self.stages[self.at["stage"]].name, "step": self.at["step"], **numbers}
            with open(os.path.join(self.out, "log.jsonl"), "a") as f:
                f.write(json.dumps(entry) + "\n")

    def autocast(self):
        kind = torch.device(self.job.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.at["bf16"] and not parallel.together())  # which do it themselves

    def step(self, stage, progress):
        """One step of the optimiser. Returns the loss, its parts and the learning rate."""
        lr = stage.lr_end + (stage.lr - stage.lr_end) * (0.5 + 0.5 * math.cos(math.pi * progress))
        if self.at["stage"] == 0:
            lr *= min(1, (self.at["step"] + 1) / WARMUP)
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(lr) if torch.is_tensor(group["lr"]) else lr
        n = max(min(self.at["slices"], stage.batch), stage.batch // (stage.rows or stage.batch))
        if n % parallel.world():
            raise ValueError(f"a batch in {n} slices cannot be shared by {parallel.world()} processes")
        part, mine = dataclasses.replace(stage, batch=stage.batch // n), range(parallel.rank(), n, parallel.world())
        losses, kept = zip(*(self.side_by_side if self.threads else self.one_by_one)(part, progress, mine))
        means = {name: sum(x[name] for x in losses) / len(losses) for name in losses[0]}
        numbers = parallel.mean(torch.stack([*means.values(), torch.tensor(float(self.stopped), device=means["loss"].device)]).float())
        parts = dict(zip([*means, "stopped"], numbers))
        self.stopped = parts.pop("stopped") > 0
        loss = parts.pop("loss")
        if not torch.isfinite(loss):
            self.explain(loss.item(), losses, part, progress, mine)
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        if kept[0] is not None:
            torch.manual_seed(self.at["step"])  # for codebooks that restart
            self.job.after(kept)
        self.at["step"] += 1
        self.at["total"] += 1
        return loss, parts, lr

    def side_by_side(self, part, progress, mine):
        """All slices at the same time, in threads; p.grad becomes their mean. part: the stage, with a batch of one slice; mine: the
        slices' numbers. Returns [(losses, what job.after wants), ...]"""
        def one(i):
            losses, kept = self.slice(part, progress, i)
            return torch.autograd.grad(losses["loss"], self.params, materialize_grads=True), losses, kept
        grads, losses, kept = zip(*self.threads.map(one, mine))
        for p, *slopes in zip(self.params, *grads):
            p.grad = sum(slopes) / len(mine)
        return [({name: x.detach() for name, x in some.items()}, k) for some, k in zip(losses, kept)]

    def one_by_one(self, part, progress, mine):
        """The same in turn, for this process's slices; p.grad becomes the mean over all slices of all processes."""
        self.optimizer.zero_grad()
        out = []
        for i in mine:
            if parallel.together():
                self.job.modules.set_requires_gradient_sync(i == mine[-1])
            losses, kept = self.slice(part, progress, i)
            (losses["loss"] / len(mine)).backward()
            out.append(({name: x.detach() for name, x in losses.items()}, kept))
        return out

    def slice(self, part, progress, i):
        """The i-th slice of a batch: its loss and the parts of it, and what job.after wants of it (None: nothing)."""
        with self.autocast():
            loss, parts, kept = self.job.loss(part, progress, "train", self.rng(i))
        return {"loss": loss, **parts}, kept

    def rng(self, i):
        return random.Random(f"{self.seed} {self.at['stage']} {self.at['step']} {i}")

    def explain(self, loss, losses, part, progress, mine):
        """Stop for a loss that is not a number; the last checkpoint stays as it is."""
        bad = [i for i, some in zip(mine, losses) if not torch.isfinite(some["loss"])]
        names = getattr(self.job, "names", lambda *args: [])
        where = [name for i in bad for name in names(part, progress, self.rng(i))]
        raise ValueError(f"the loss is {loss} at step {self.at['step']} of {part.name}; the last good state is in {self.out}; "
                         f"learned from: {', '.join(where[:8]) or 'another process knows'}{', ...' if where[8:] else ''}")

    @torch.no_grad()
    def held_out(self, stage, batches=4):
        """Mean of each part of the loss, over the same batches of held-out items every time; logged."""
        self.job.modules.eval()
        sums = {}
        for i in range(batches):
            with self.autocast():
                _, parts, _ = self.job.loss(stage, 1.0, "seen", random.Random(i))
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value.item() / batches
        self.job.modules.train()
        self.log(split="held-out", **{name: round(value, 4) for name, value in sums.items()})
        return sums


CALIBRATION = (30, 300)  # steps after which --minutes reckons how many there will be; the first ones read files and are slow


def train(job, stages, out, minutes=None, resume=False, seed=1, save_every=60.0):
    """Run all stages, or, with resume, what is left of them. Returns the path of the checkpoint. SIGTERM saves and stops."""
    run = Run(job, stages, out, minutes, resume, seed)
    at, saved_at, first_rank = run.at, time.monotonic(), parallel.rank() == 0
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stopped", True))
    try:
        while at["stage"] < len(stages):
            stage, plan = stages[at["stage"]], at["plan"][at["stage"]]
            bar = tqdm(total=plan, initial=at["step"], desc=f"{stage.name:16}", unit="step", mininterval=1, disable=not first_rank)
            begun, first = time.monotonic(), at["step"]
            while plan is None or at["step"] < plan:
                loss, parts, lr = run.step(stage, at["step"] / plan if plan else 0.0)
                bar.update()
                if minutes and at["step"] - first in CALIBRATION and (plan is None or not first):
                    each = parallel.mean(torch.tensor((time.monotonic() - begun) / (at["step"] - first), device=loss.device)).item()
                    share = stage.steps / sum(s.steps for s in stages)
                    plan = at["plan"][at["stage"]] = max(at["step"], round(60 * minutes * share / each))
                    bar.total = plan
                if at["step"] % 10 == 1:
                    numbers = {name: round(value.item(), 4) for name, value in parts.items()}
                    bar.set_postfix({name: f"{value:.2f}" for name, value in numbers.items()}, refresh=False)
                    run.log(lr=lr, loss=round(loss.item(), 4), **numbers)
                if plan and at["step"] % math.ceil(plan / 4) == 0 and at["step"] < plan:
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


# ---------------------------------------------------------------------------------------------------------------------
# a run as a picture


def plot(folder):
    """The losses of a run over all its stages, and the share of monologue tokens that were right, from folder/log.jsonl into
    folder/log.png. Returns the picture's path."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs the extra 'plot': pip install '.[plot]'") from None
    source = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(source):
        raise FileNotFoundError(f"{source}: no such log; --plot takes a folder that train.py wrote")
    # A run that was killed repeats the steps since its last checkpoint: the later line counts.
    lines = {}
    with open(source) as f:
        for line in f:
            entry = json.loads(line)
            lines[entry["stage"], entry["step"], entry.get("split")] = entry
    stages = list(dict.fromkeys(stage for stage, *_ in lines))
    begin, starts = 0, {}
    for stage in stages:
        starts[stage] = begin
        begin += max(step for name, step, _ in lines if name == stage)
    names = list(dict.fromkeys(k for e in lines.values() for k in e if k not in ("stage", "step", "lr", "loss", "split", "waits")))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    shares = axes.twinx() if "right" in names else None
    for colour, name in enumerate(names):
        for split, style in ((None, {"alpha": 0.35, "linewidth": 0.8}), ("held-out", {"marker": "o", "label": name + ", held out"})):
            points = sorted((starts[stage] + step, e[name]) for (stage, step, s), e in lines.items() if s == split and e.get(name))
            (shares if name == "right" else axes).plot(*zip(*points), color=f"C{colour}", **style) if points else None
    for i, stage in enumerate(stages):
        axes.axvline(starts[stage], color="0.7", linewidth=0.8)
        axes.text(starts[stage], 1.01 + 0.04 * (i % 2), stage, transform=axes.get_xaxis_transform(), va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss")
    axes.legend(fontsize=8, loc="lower left")
    if shares:
        shares.set_ylabel("monologue tokens right")
        shares.set_ylim(0, 1.02)
        shares.legend(fontsize=8, loc="upper right")
    path = os.path.join(folder, "log.png")
    with replace_when_done(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return path


def export(out, folder):
    """The model in the folder `out` in the layout of the FLM-Audio release, with its tokeniser. Returns the folder."""
    flm, vocab, _ = FLM.load(os.path.join(out, "checkpoint.pt"))
    os.makedirs(folder, exist_ok=True)
    model.export_release(flm, vocab, folder)
    copy(os.path.join(out, "tokenizer.json"), os.path.join(folder, "tokenizer.json"))
    return folder


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
    parser.add_argument("--export", metavar="FOLDER", help="train nothing: write the model in --out as the FLM-Audio release is laid out")
    parser.add_argument("--plot", metavar="FOLDER", help="train nothing: draw the losses of the run in this folder")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    try:
        if args.plot:
            return print(f"Wrote {plot(args.plot)}")
        if args.plan:
            if args.config == "codec":
                raise ValueError("--plan is for a model")
            return plan.show(args.config, model.CONFIGS[args.config], STAGES[args.config], args.gpus, args.card, args.utilisation,
                             args.eight_bit)
        out = args.out or f"out/{args.config}"
        if args.export:
            return print(f"Wrote {export(out, args.export)}")
        args.device = parallel.begin(args.device)
        if parallel.together() and (args.config == "codec" or args.eight_bit):
            raise ValueError(f"{'--eight-bit' if args.eight_bit else 'the codec'} trains in one process, without torchrun")
        if args.config == "codec":
            job = CodecJob(mimi.CONFIGS["tiny"], args.data or "data/toy", args.device)
        else:
            job = ModelJob(model.CONFIGS[args.config], args.data or "data/toy/encoded", args.device, args.init, args.seed, args.eight_bit)
        path = train(job, STAGES[args.config], out, args.minutes, args.resume, args.seed)
    except Stopped as e:
        sys.exit(str(e))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    finally:
        parallel.end()
    if parallel.rank() == 0:
        size = sum(p.numel() for p in job.model.parameters())
        print(f"Wrote {path} ({size / 1e6:.1f} M parameters)")


if __name__ == "__main__":
    main()
