"""How the tiny codec learns, in minutes: what it hears, and what its reconstruction is compared by.

    clips (B, 1, N) --encoder, quantiser, decoder--> (B, 1, N)        spectra and waveform of both are compared
                              '-- first codebook --> letters          CTC: what was said

The Task has the same methods as train.py's own: one loop trains both.
"""
import os

import torch
import torch.nn.functional as F
from torch import nn

from files.audio import SAMPLE_RATE, read_audio
from files.checkpoint import load_weights
from files.manifest import read_manifest, seconds_of, clip_key
from mimi import FRAME, Mimi, mel_filters


class Clips:
    """The sound files of a manifest, up to six seconds each, and what is said in them; the letters, of whatever writing, that occur
    in it."""

    def __init__(self, data):
        self.clips = {"train": set(), "seen": set()}  # (where it is, what is said)
        for d in read_manifest(os.path.join(data, "manifest.jsonl")):
            if d["split"] in self.clips:
                self.clips[d["split"]] |= {(clip_key(t), t["text"]) for t in d.get("turns", ())}
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


class CodecTask:
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
        self.model.update_codebooks([[torch.cat(x) for x in zip(*choices)] for choices in zip(*slices)])

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
