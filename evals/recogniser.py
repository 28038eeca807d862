"""The judge of spoken replies: a small network that learns letters, or any command that recognises speech.

    waveform -> log-mel frames (100 Hz) -> non-causal convolutions -> letters (50 Hz) -> words

It learns from the original recordings only, never from the codec or the model. It knows nothing but the
words of its data, so its scores are optimistic; as the ceiling, eval.py prints its scores on the originals
and on their codec reconstructions. One that knows the toy world is in weights/; it was made by

    python -m evals.recogniser --data data/wide --minutes 9 --out weights/recogniser.safetensors

and other data get one of their own.
"""
import argparse
import dataclasses
import importlib.util
import json
import os
import random
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from corpora.transcribe import AsrCommand
from files.atomic import replace_when_done
from files.checkpoint import load_weights, open_safetensors
from files.fields import parse_json, short
from files.manifest import read_manifest
from files.spectrogram import MELS, LogMel
from toy.codec import Clips, letters_loss
from train import Stage, train


@dataclass(frozen=True)
class RecogniserConfig:
    width: int = 192
    blocks: int = 5
    kernel: int = 9
    letters: str = ""  # taken from the data


class Recogniser(nn.Module):
    """Non-causal convolutions: log-mel frames at 100 Hz -> logits of letters at 50 Hz."""

    def __init__(self, c: RecogniserConfig):
        super().__init__()
        self.mel = LogMel(240)
        self.begin = nn.Conv1d(MELS, c.width, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.GroupNorm(1, c.width), nn.Conv1d(c.width, c.width, c.kernel, padding=c.kernel // 2), nn.GELU(),
            nn.Conv1d(c.width, c.width, 1)) for _ in range(c.blocks))
        self.end = nn.Conv1d(c.width, len(c.letters) + 1, 1)
        self.letters = c.letters

    def forward(self, wav, noise=None):
        """(B, 1, N) -> logits (B, T, letters). noise: a seed for each row in training, see augment."""
        x = self.mel(wav, self.mel.init_state(len(wav)))
        x = self.begin(x if noise is None else torch.stack([self.augment(*pair) for pair in zip(x, noise)]))
        for block in self.blocks:
            x = x + block(x)
        return self.end(x).mT.float()

    def augment(self, x, seed):
        """Training only: log-mel frames (80, T), blurred, with noise and with bands masked, so that the
        network learns words rather than this synthesiser's details."""
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        smear = rng.choice([1, 1, 3, 5]), rng.choice([1, 1, 3, 5])
        x = F.avg_pool2d(x[None], smear, 1, (smear[0] // 2, smear[1] // 2), count_include_pad=False)[0]
        normal = lambda *shape: torch.randn(*shape, generator=generator).to(x.device)
        x = x + normal(*x.shape) * rng.uniform(0, 0.4) + normal(MELS, 1) * 0.1
        low = rng.randrange(MELS)
        x[low:low + rng.randrange(12)] = 0
        return x

    @torch.no_grad()
    def hear(self, wav):
        """(N,) samples -> a list of words, by greedy CTC decoding."""
        best = self(F.pad(wav, (0, -len(wav) % 240))[None, None])[0].argmax(-1).unique_consecutive()
        return "".join(self.letters[i - 1] for i in best.tolist() if i).split()


class RecogniserTask:
    kind = "recogniser"
    files, from_nothing = {}, True

    def __init__(self, config, data, device, precision=None):
        self.clips = Clips(data)
        self.config, self.device = dataclasses.replace(config, letters=self.clips.letters), device
        self.precision = precision
        self.model = self.modules = Recogniser(self.config).to(device)
        self.fingerprint, self.holds = self.clips.fingerprint, self.clips.holds

    def batch(self, stage, progress, split, rng, rows=None):
        wav, letters, _ = self.clips.batch(stage, progress, split, rng)
        return wav, letters, [rng.getrandbits(60) if split == "train" else None for _ in letters]

    def tokens(self, batch):
        return sum(map(len, batch[1]))

    def totals(self, batch):
        return torch.tensor([len(batch[0])])

    def loss(self, stage, micro, totals):
        wav, letters, noise = micro
        logits = self.model(wav.to(self.device), noise if noise[0] is not None else None)
        loss = letters_loss(logits, letters) * len(wav) / totals[0]
        return loss, {"letters": loss}, None

    def after_step(self, kept, step):
        pass

    def state(self):
        return {"model": self.model.state_dict()}

    def load(self, saved, where):
        load_weights(self.model, saved["model"], where)


RECOGNISER = (Stage("recogniser", 700, 16, 2e-3, 0),)
SHIPPED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                       "weights", "recogniser.safetensors")


class OtherRecogniser(AsrCommand):
    """Any recogniser: a command with {wav} that prints the words it recognises."""

    def hear(self, wav):
        text = self.hear_samples(wav).lower()
        return "".join(c if c.isalnum() or c == "'" else " " for c in text).split()


def train_recogniser(data, out, minutes, device):
    task = RecogniserTask(RecogniserConfig(), data, device)
    train(task, RECOGNISER, out, minutes, resume=True)
    return task.model.eval().to("cpu")


def words_of(data):
    """All words of a manifest's turns."""
    return {w for d in read_manifest(os.path.join(data, "manifest.jsonl"))
            for turn in d.get("turns", ()) for w in turn["text"].lower().split()}


def save_recogniser(recogniser, words, path):
    """Write it in half precision, with the words that it knows."""
    from safetensors.torch import save_file
    facts = {"letters": recogniser.letters, "words": json.dumps(sorted(words))}
    with replace_when_done(path) as temporary:
        save_file({name: x.half() for name, x in recogniser.state_dict().items()}, temporary, facts)


def load_recogniser(path, words):
    """A recogniser that knows these words, or None. Raises ValueError or OSError if the file is damaged."""
    file = open_safetensors(path)
    facts = file.metadata() or {}
    try:
        known, config = set(parse_json(facts["words"])), RecogniserConfig(letters=facts["letters"][:1000])
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: is not what `python -m evals.recogniser` writes ({short(e)})") from None
    recogniser = Recogniser(config)
    load_weights(recogniser, {name: file.get_tensor(name).float() for name in file.keys()}, path)
    return recogniser.eval() if words <= known else None


def get_recogniser(command, data, out, minutes, device):
    """A command; or else, unless it shall be trained for some minutes, the one in weights/ if it knows the
    words of the data; or else one that is trained on them now."""
    if command:
        return OtherRecogniser(command)
    if not os.path.isfile(os.path.join(data, "manifest.jsonl")):
        raise FileNotFoundError(f"{data}/manifest.jsonl: not there for our recogniser to learn from; "
                                "`python prepare.py toy` makes it, or name another recogniser with --asr")
    recogniser = None
    if minutes is None and os.path.isfile(SHIPPED) and importlib.util.find_spec("safetensors"):
        recogniser = load_recogniser(SHIPPED, words_of(data))
    return recogniser or train_recogniser(data, out, minutes, device)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", default="data/toy", help="folder with the manifest of the recordings to learn from")
    add("--minutes", type=float, default=12.0)
    add("--out", default="recogniser.safetensors", help="the file to write")
    args = parser.parse_args()
    try:
        run = f"out/recogniser-{os.path.basename(os.path.normpath(args.data))}"
        recogniser = train_recogniser(args.data, run, args.minutes, "cpu")
        save_recogniser(recogniser, words_of(args.data), args.out)
        print(f"Wrote {args.out} ({os.path.getsize(args.out) / 1e6:.1f} MB)")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
