"""The judge of spoken replies: a small network that learns letters, or any command that recognises speech.

    waveform -> log-mel frames (100 Hz) -> non-causal convolutions -> letters (50 Hz) -> words

It learns from the original recordings only, never from the codec or the model. It knows nothing but the
toy world, so its scores are optimistic; as the ceiling, eval.py prints its scores on the originals and on
their codec reconstructions.
"""
import dataclasses
import os
import random
import shlex
import subprocess
import tempfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from files.audio import write_audio
from files.checkpoint import load_weights
from toy.codec import Clips, letters_loss
from mimi import MELS, LogMel
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
        wav, letters = self.clips.batch(stage, progress, split, rng)
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


class OtherRecogniser:
    """Any recogniser: a command with {wav} that prints the words it recognises."""

    def __init__(self, template):
        self.words = shlex.split(template)
        if not any("{wav}" in w for w in self.words):
            raise ValueError(f"--asr {template!r}: {{wav}} does not occur in it")

    def hear(self, wav):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "speech.wav")
            write_audio(path, wav)
            command = [w.replace("{wav}", path) for w in self.words]
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as e:
                raise ValueError(f"--asr {shlex.join(self.words)}: cannot be run ({e})") from None
        if done.returncode:
            reason = " ".join(done.stderr.split())[-300:]
            raise ValueError(f"--asr {shlex.join(self.words)} failed: {reason}")
        return "".join(c if c.isalnum() or c == "'" else " " for c in done.stdout.lower()).split()


def get_recogniser(command, data, out, minutes, device):
    if command:
        return OtherRecogniser(command)
    if not os.path.isfile(os.path.join(data, "manifest.jsonl")):
        raise FileNotFoundError(f"{data}/manifest.jsonl: not there for our recogniser to learn from; "
                                "`python prepare.py toy` makes it, or name another recogniser with --asr")
    task = RecogniserTask(RecogniserConfig(), data, device)
    train(task, RECOGNISER, out, minutes, resume=True)
    return task.model.eval().to("cpu")
