"""What is trained, on what, for which loss. The model: layouts of encoded speech, and Eq. 3. The codec: sound, and how it
sounds after it.

    data/toy/encoded --utterances--> a layout's grids (17, T) --packed--> a batch (B, 17, T) --model--> Eq. 3
    data/toy         --clips-------> waveforms (B, 1, N) ---------------------codec-----> spectra, waveform, letters

To train.py both are the same: a job has a model, batch(stage, progress, split, rng), which is made on the CPU, loss(stage, batch,
split, rng) of it, and the state that a checkpoint keeps. Both are functions of the rng. A stage is a row of train.py's table;
progress (0 to 1) is how far it has gone.

B rows in a batch, T frames in a row, K codebooks.
"""
import dataclasses
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import model
import parallel
import prepare
import published
import streams
from files import SAMPLE_RATE, load_weights, read_audio
from manifest import read_manifest, seconds_of, spoken_parts, where_is
from mimi import FRAME, Mimi, mel_filters
from model import loss_parts
from streams import K, LISTEN, Utterance, Vocab, blank, pack
from tokenizer import load_tokenizer

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

    def loss(self, stage, grid, split, rng):
        self.model.recompute = stage.recompute
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
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

    def batch(self, stage, progress, split, rng):
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
        self.batch = self.clips.batch
        self.letters = nn.Linear(config.dim, 4 * (len(self.clips.letters) + 1))  # four guesses a frame
        self.modules = nn.ModuleList([self.model, self.letters]).to(device)
        self.spectra = [Spectrum(n).to(device) for n in (256, 512, 1024, 2048)]
        self.fingerprint = self.clips.fingerprint

    def loss(self, stage, batch, split, rng):
        wav, words = batch
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
        return parts["spectrum"] + parts["wave"] + 0.25 * parts["commitment"] + 0.5 * parts["letters"], parts, chosen

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
    """How far two sounds (B, 1, N), the second of them given, are apart in log-mel and log-magnitude spectra of one window length."""

    def __init__(self, n):
        super().__init__()
        self.n = n
        self.register_buffer("window", torch.hann_window(n) / n ** 0.5)
        self.register_buffer("mel", mel_filters(n, min(80, n // 8)).T)

    def logs(self, x):
        """(B, 1, N) -> log-mel and log-magnitude, (B, T, frequencies) each, of windows that overlap by half."""
        x = F.pad(x.float(), (self.n // 2, self.n // 2), mode="reflect")[:, 0].unfold(-1, self.n, self.n // 2)
        a, b = torch.view_as_real(torch.fft.rfft(x * self.window)).unbind(-1)
        power = a * a + b * b
        return [0.5 * torch.log(p + 1e-6) for p in (power @ self.mel, power)]

    def forward(self, x, y):
        with torch.no_grad():
            right = self.logs(y)
        mel, all_of_it = ((a - b).abs().mean() for a, b in zip(self.logs(x), right))
        return mel + 0.5 * all_of_it
