"""Does it hear, speak, take turns? Held-out conversations, frame by frame through chat.py's path.

    python eval.py --checkpoint out/tiny                         200 items with voices of the training, 200 with new ones
    python eval.py --checkpoint out/tiny --asr 'mycmd {wav}'     another recogniser: it prints the words it hears
    python eval.py --codec out/codec/checkpoint.pt               the codec alone: how far off, how well understood

What is measured (FLM-Audio, section 4; all on the clock of the user's sound):

    text        the monologue is the right answer, word for word
    spoken      the reply, as the recogniser hears it: share of right words (1 - word error rate), and all words right
    in time     the reply begins at most 0.4 s after the user's end; early: before it
    interrupted the user breaks into a long answer with a new request: silent within 1 s? and is the new one answered?
    kept on     the same long answers without interruption: all that was written is spoken, to the last word

The default recogniser is a small network that learns letters from the original recordings only, never from the codec or the
model. It knows nothing but the toy world, so it flatters; what it makes of the originals and of their codec
reconstructions is printed as the ceiling.
"""
import argparse
import dataclasses
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import mimi
import train
from chat import Speaker, speech
from mimi import (FRAME, SAMPLE_RATE, LogMel, Mimi, load_weights, log_spectral_distance, mel_filters, read_audio,
                  replace_when_done, write_audio)
from prepare import SHARES, read_manifest
from train import Clips, Stage, letters_loss

LEAD = 1.0  # seconds of silence before the user speaks
LISTEN_ON = 2.5  # seconds that a recording goes on after the expected answer


# ---------------------------------------------------------------------------------------------------------------------
# the recogniser


@dataclass(frozen=True)
class RecogniserConfig:
    width: int = 192
    blocks: int = 5
    kernel: int = 9
    letters: str = ""  # those of the data


class Recogniser(nn.Module):
    """log-mel frames at 100 Hz -> letters at 50 Hz, by convolutions that see both sides."""

    def __init__(self, c: RecogniserConfig):
        super().__init__()
        self.mel = LogMel(240)
        self.begin = nn.Conv1d(mimi.MELS, c.width, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.GroupNorm(1, c.width), nn.Conv1d(c.width, c.width, c.kernel, padding=c.kernel // 2), nn.GELU(),
            nn.Conv1d(c.width, c.width, 1)) for _ in range(c.blocks))
        self.end = nn.Conv1d(c.width, len(c.letters) + 1, 1)
        self.letters = c.letters

    def forward(self, wav, rng=None):  # (B, 1, N) -> (B, T, letters)
        x = self.mel(wav, self.mel.init_state(len(wav)))
        x = self.begin(x if rng is None else self.worsen(x, rng))
        for block in self.blocks:
            x = x + block(x)
        return self.end(x).mT.float()

    def worsen(self, x, rng):
        """Training only: log-mel frames (B, 80, T) smeared, noisy and with bands left out, so that the network learns
        words rather than this synthesiser's details."""
        smear = rng.choice([1, 1, 3, 5]), rng.choice([1, 1, 3, 5])
        x = F.avg_pool2d(x[:, None], smear, 1, (smear[0] // 2, smear[1] // 2), count_include_pad=False)[:, 0]
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        normal = lambda *shape: torch.randn(*shape, generator=generator).to(x.device)
        x = x + normal(*x.shape) * rng.uniform(0, 0.4) + normal(len(x), mimi.MELS, 1) * 0.1
        low = rng.randrange(mimi.MELS)
        x[:, low:low + rng.randrange(12)] = 0
        return x

    @torch.no_grad()
    def hear(self, wav):
        """(N,) samples -> the words, best letter by best letter (CTC)."""
        best = self(F.pad(wav, (0, -len(wav) % 240))[None, None])[0].argmax(-1).unique_consecutive()
        return "".join(self.letters[i - 1] for i in best.tolist() if i).split()


class RecogniserJob:
    kind = "recogniser"
    files = {}

    def __init__(self, config, data, device):
        self.clips = Clips(data)
        self.config, self.device = dataclasses.replace(config, letters=self.clips.letters), device
        self.model = self.modules = Recogniser(self.config).to(device)
        self.fingerprint = self.clips.fingerprint

    def loss(self, stage, progress, split, rng):
        wav, words = self.clips.batch(stage, split, rng)
        logits = self.model(wav.to(self.device), rng if split == "train" else None)
        loss = letters_loss(logits, words)
        return loss, {"letters": loss}, None

    def state(self):
        return {"model": self.model.state_dict()}

    def load(self, saved, where):
        load_weights(self.model, saved["model"], where)


RECOGNISER = (Stage("recogniser", 700, 16, 2e-3, 0),)


class Command:
    """Any recogniser: a command with {wav} that prints the words it hears."""

    def __init__(self, template):
        self.words = shlex.split(template)
        if not any("{wav}" in w for w in self.words):
            raise ValueError(f"--asr {template!r}: {{wav}} does not occur in it")

    def hear(self, wav):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "speech.wav")
            write_audio(path, wav)
            done = subprocess.run([w.replace("{wav}", path) for w in self.words], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"--asr {shlex.join(self.words)} failed: {done.stderr.strip()[-300:]}")
        return "".join(c if c.isalnum() or c == "'" else " " for c in done.stdout.lower()).split()


def get_recogniser(command, data, out, minutes, device):
    if command:
        return Command(command)
    path = os.path.join(out, "checkpoint.pt")
    job = RecogniserJob(RecogniserConfig(), data, device)
    train.train(job, RECOGNISER, out, minutes, resume=True)
    return job.model.eval().to("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# measures


def word_errors(found, right):
    """Words to insert, delete or exchange."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(found, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def wilson(hits, n, z=1.96):
    """95% interval of a share."""
    if not n:
        return 0.0, 1.0
    p = hits / n
    centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


class Shares:
    """Named counts of hits, printed as shares with their 95% intervals."""

    def __init__(self):
        self.hits, self.n = Counter(), Counter()

    def add(self, name, hit, of=1):
        self.hits[name] += hit
        self.n[name] += of

    def share(self, name):
        return self.hits[name] / max(1, self.n[name])

    def line(self, name):
        low, high = wilson(self.hits[name], self.n[name])
        return f"{self.share(name):.3f} [{low:.2f}, {high:.2f}] of {self.n[name]}"


def converse_all(speaker, sounds, seed, what, rows=100):
    """Many conversations, those of similar length side by side: [(text tokens (T,), sound said (N,)), ...]"""
    out = [None] * len(sounds)
    order = sorted(range(len(sounds)), key=lambda i: len(sounds[i]))
    for start in range(0, len(order), rows):
        some = order[start:start + rows]
        N = max(len(sounds[i]) for i in some)
        heard = torch.stack([F.pad(sounds[i], (0, N - len(sounds[i]))) for i in some])
        text, said = speaker.converse(heard, seed, progress=f"{what} {start + len(some)}/{len(sounds)}")
        for row, i in enumerate(some):
            n = len(sounds[i])
            out[i] = text[row, :-(-n // FRAME)], said[row, :n]
    return out


def seconds(x):
    return torch.zeros(round(x * SAMPLE_RATE))


def written(speaker, text, begin=0.0):
    """The words of the monologue from `begin` seconds on."""
    v = speaker.vocab
    tokens = [t for t in text[int(begin * SAMPLE_RATE / FRAME):].tolist() if t != v.wait]
    return speaker.tokenizer.decode(tokens).split()


# ---------------------------------------------------------------------------------------------------------------------
# answers


def answers(speaker, recogniser, items, seed, shares, name):
    """Each item's request, spoken to the model after a second of silence. Returns the conversations."""
    users = [read_audio(d["turns"][0]["path"]) for d in items]
    replies = [read_audio(d["turns"][1]["path"]) for d in items]
    sounds = [torch.cat([seconds(LEAD), u, seconds(len(r) / SAMPLE_RATE + LISTEN_ON)]) for u, r in zip(users, replies)]
    talks = converse_all(speaker, sounds, seed, name)
    languages = len({d.get("lang") for d in items})
    for d, user, reply, (text, said) in zip(items, users, replies, talks):
        right, end = d["turns"][1]["text"].split(), LEAD + len(user) / SAMPLE_RATE
        hit = written(speaker, text) == right
        shares.add(f"{name} text", hit)
        shares.add(f"{name} text, {d['kind']}", hit)
        if languages > 1:
            shares.add(f"{name} text, {d['lang']}", hit)
        heard = recogniser.hear(said)
        shares.add(f"{name} spoken words", max(0, len(right) - word_errors(heard, right)), len(right))
        shares.add(f"{name} spoken exactly", heard == right)
        onset = speech(said)[0][0] if speech(said) else None
        shares.add(f"{name} in time", onset is not None and end <= onset <= end + 0.4)
        shares.add(f"{name} early", onset is not None and onset < end)
        for turn, sound in zip(d["turns"], (user, reply)):
            understood(recogniser, sound, turn["text"], shares, f"{name} {turn['role']} original")
            understood(recogniser, reconstruct(speaker.codec, sound), turn["text"], shares, f"{name} {turn['role']} codec")
    return list(zip(items, sounds, talks))


def understood(recogniser, sound, text, shares, label):
    right = text.split()
    errors = word_errors(recogniser.hear(sound), right)
    shares.add(f"{label} words", max(0, len(right) - errors), len(right))
    shares.add(f"{label} exactly", errors == 0)


def word_seconds(items):
    """How long the model's voice takes for each word."""
    out = {}
    for d in items:
        turn = d["turns"][1]
        ends = turn["starts"][1:] + [len(read_audio(turn["path"])) / SAMPLE_RATE]
        out |= {w: end - start for w, start, end in zip(turn["text"].split(), turn["starts"], ends)}
    return out


def reconstruct(codec, x):
    device = next(codec.parameters()).device
    return codec.decode(codec.encode(x[None, None].to(device)))[0, 0, :len(x)].cpu()


# ---------------------------------------------------------------------------------------------------------------------
# the codec alone


def codec_quality(codec, recogniser, dialogues, n, seed):
    """Held-out speech through the codec: how far its log-mel spectrum is off, and how much of it is still understood."""
    print(f"\nHeld-out speech through the codec, seed {seed}: words understood / clips understood entirely")
    for split, role, who in (("seen", "user", "users heard in training"), ("new", "user", "new users"),
                             ("seen", "model", "the model's voice")):
        clips = {t["path"]: t["text"] for d in dialogues if d["split"] == split for t in d["turns"] if t["role"] == role}
        clips = random.Random(seed).sample(sorted(clips.items()), min(n, len(clips)))
        shares, off = Shares(), 0.0
        for path, text in tqdm(clips, who, unit="clip", leave=False):
            sound = read_audio(path)
            heard = reconstruct(codec, sound)
            off += log_spectral_distance(sound, heard, MEL_1024) / len(clips)
            understood(recogniser, sound, text, shares, "original")
            understood(recogniser, heard, text, shares, "codec")
        print(f"  {who:24} {len(clips):4} clips   log-mel distance {off:5.2f} dB   "
              + "   ".join(f"{v} {shares.share(v + ' words'):.3f} / {shares.share(v + ' exactly'):.3f}" for v in ("original", "codec")))


MEL_1024 = mel_filters(1024)


# ---------------------------------------------------------------------------------------------------------------------
# interruptions


def interruptions(speaker, items, n, seed, shares):
    """Long answers, left alone and then interrupted by another request 1 to 1.5 s after they have begun to sound."""
    rng = random.Random(seed)
    spoken = lambda d: len(d["turns"][1]["starts"]) if d["kind"] == "count" else 0
    long = [d for d in items if spoken(d) >= 6]
    if not long:
        return
    pairs = [(rng.choice(long), rng.choice(items)) for _ in range(n)]
    firsts = [torch.cat([seconds(LEAD), read_audio(a["turns"][0]["path"])]) for a, _ in pairs]
    lasting = [len(read_audio(a["turns"][1]["path"])) / SAMPLE_RATE for a, _ in pairs]
    alone = converse_all(speaker, [torch.cat([x, seconds(s + LISTEN_ON)]) for x, s in zip(firsts, lasting)], seed, "left alone")
    length = word_seconds(items)
    cases, sounds = [], []
    for (a, b), first, (text, said) in zip(pairs, firsts, alone):
        begun = [s for s in speech(said) if s[0] >= len(first) / SAMPLE_RATE - 0.2]
        if not begun:
            shares.add("kept on", 0)
            continue
        onset = begun[0][0]
        last = sum(length.get(w, 0) for w in written(speaker, text))
        shares.add("kept on", begun[0][1] >= onset + last - 0.5)
        at = onset + rng.uniform(1.0, 1.5)
        user = read_audio(b["turns"][0]["path"])
        end = at + len(user) / SAMPLE_RATE
        reply = len(read_audio(b["turns"][1]["path"])) / SAMPLE_RATE
        sound = torch.cat([first, seconds(at)])[:round(at * SAMPLE_RATE)]
        sounds.append(torch.cat([sound, user, seconds(reply + LISTEN_ON)]))
        cases.append((b, at, end))
    for (b, at, end), (text, said) in zip(cases, converse_all(speaker, sounds, seed, "interrupted")):
        still = [s for s in speech(said, bridge=0.16) if s[0] <= at + 1.0 < s[1]]
        shares.add("interrupted: silent within 1 s", not still)
        shares.add("interrupted: new request answered", written(speaker, text, end - 0.1) == b["turns"][1]["text"].split())


# ---------------------------------------------------------------------------------------------------------------------


def report(shares, args):
    print(f"\nHeld out, seed {args.seed}, 95% intervals in brackets")
    for name, who in (("seen", "voices heard in training"), ("new", "new voices")):
        print(f"\n  {who}")
        kinds = sorted(n for n in shares.n if n.startswith(f"{name} text, "))
        for label in (f"{name} text", *kinds, f"{name} spoken words", f"{name} spoken exactly", f"{name} in time", f"{name} early"):
            print(f"    {label[len(name) + 1:]:24} {shares.line(label)}")
        for kind in ("user", "model"):
            ceiling = [f"{version} {shares.share(f'{name} {kind} {version} words'):.3f} / "
                       f"{shares.share(f'{name} {kind} {version} exactly'):.3f}" for version in ("original", "codec")]
            print(f"    the recogniser's ceiling, words / exactly, {kind}'s speech: {',  '.join(ceiling)}")
    print("\n  long answers")
    for label in ("kept on", "interrupted: silent within 1 s", "interrupted: new request answered"):
        print(f"    {label:34} {shares.line(label)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="out/tiny")
    parser.add_argument("--codec", help="measure this codec alone instead of a model")
    parser.add_argument("--data", default="data/toy", help="folder with the manifest of the held-out items")
    parser.add_argument("--items", type=int, default=200, help="for each of seen voices, new voices; half for interruptions")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--asr", help="another recogniser: a command with {wav} that prints the words")
    parser.add_argument("--asr-minutes", type=float, help="train the default recogniser so long, if it is not there yet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        recogniser = get_recogniser(args.asr, args.data, "out/recogniser", args.asr_minutes, args.device)
        dialogues = list(read_manifest(os.path.join(args.data, "manifest.jsonl")))
        if args.codec:
            return codec_quality(Mimi.load(args.codec, args.device), recogniser, dialogues, args.items, args.seed)
        speaker = Speaker(args.checkpoint, args.device)
        rng, shares, talks = random.Random(args.seed), Shares(), []
        splits = {s: [d for d in dialogues if d["split"] == s and len(d["turns"]) == 2] for s in ("seen", "new")}
        for name, items in splits.items():
            items = rng.sample(items, min(args.items, len(items)))
            talks += answers(speaker, recogniser, items, args.seed, shares, name)
        interruptions(speaker, splits["seen"], max(1, args.items // 2), args.seed, shares)
        folder = os.path.join(args.checkpoint, "samples")
        kinds = {d["kind"]: (d, heard, text, said) for d, heard, (text, said) in reversed(talks)}  # the first of each
        print("\nThree of the conversations (left the user, right the model):")
        for kind in [k for k in SHARES if k in kinds][:3]:
            d, heard, text, said = kinds[kind]
            path = os.path.join(folder, f"{kind}.wav")
            write_audio(path, torch.stack([heard, said]))
            print(f"  user: {d['turns'][0]['text']}\n    model: {' '.join(written(speaker, text))}\n    {path}")
        report(shares, args)
        path = os.path.join(args.checkpoint, "eval.json")
        with replace_when_done(path) as temporary, open(temporary, "w") as f:
            json.dump({"seed": args.seed, "shares": {k: [shares.hits[k], shares.n[k]] for k in shares.n}}, f, indent=1)
        print(f"\nWrote {path} and {folder}/")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
