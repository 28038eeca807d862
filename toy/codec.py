"""Trains the tiny codec in minutes: batches of clips, and the losses of their reconstruction.

    clips (B, 1, N) --encoder, quantiser, decoder--> (B/4, 1, N)   spectra and waveforms are compared
                              '-- first codebook --> letters          CTC: the words that were said

All clips of a batch are heard, and every fourth is decoded.

CodecTask has the methods of train.py's ModelTask, so one loop trains both.
"""
import os
import random
import sys

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from files.augment import Microphone, change_throat, draw_ratio
from files.audio import SAMPLE_RATE, read_audio, seconds_of
from files.checkpoint import load_weights
from files.manifest import clip_key, read_manifest
from files.spectrogram import mel_filters
from mimi import FRAME, Mimi


class Clips:
    """The clips of manifests, up to six seconds each, with the text that is said in each of them; and the
    letters, in any script, of that text."""

    def __init__(self, data, skip_broken=False):
        """data: folders with manifests, with commas. skip_broken: leave out what cannot be read; otherwise it
        is an error."""
        self.clips = {"train": set(), "seen": set()}  # (key of the clip, its text, who speaks)
        manifests = [os.path.join(folder, "manifest.jsonl") for folder in data.split(",")]
        for d in (d for manifest in manifests for d in read_manifest(manifest, skip_broken)):
            if d["split"] in self.clips and d.get("kind") != "noise":
                self.clips[d["split"]] |= {(clip_key(t), t["text"], t["role"]) for t in d.get("turns", ())
                                          if "audio" in t}
        self.letters = "".join(sorted({c for _, text, _ in self.clips["train"] for c in text.lower()}))
        keys = {key for clips in self.clips.values() for key, *_ in clips}
        self.frames = {key: round(seconds_of(*key) * SAMPLE_RATE) for key in keys}
        self.clips = {split: sorted((c for c in clips if self.frames[c[0]] <= 6 * SAMPLE_RATE), key=str)
                      for split, clips in self.clips.items()}
        if not self.clips["train"]:
            raise ValueError(f"{data}/manifest.jsonl: holds no clip of at most six seconds to train on")
        self.fingerprint = f"{sum(map(len, self.clips.values()))} clips"
        self.audio, self.skip_broken = {}, skip_broken  # key -> int16 samples, once read; None if broken

    def holds(self, stage, split):
        return bool(self.clips[split])

    def batch(self, stage, progress, split, rng, rows=None):
        """B clips of about the same length, each starting anywhere within a frame: waveforms (B, 1, 1920*T),
        the letters of each, and for the share stage.augment of users' clips, which are also of other
        throats, a seed of a microphone. B is smaller if there are fewer clips."""
        clips, wavs, letters, microphones = self.clips[split], [], [], []
        pool = rng.sample(clips, min(len(clips), 8 * stage.batch))
        pool.sort(key=lambda clip: self.frames[clip[0]])
        start = rng.randrange(max(1, len(pool) - stage.batch + 1))
        number = {letter: i for i, letter in enumerate(self.letters, 1)}  # 0 is CTC's blank
        for key, text, role in pool[start:start + stage.batch]:
            augment = split == "train" and role != "model" and rng.random() < stage.augment
            x = self.read(key)
            if x is None:
                continue
            x = x * 10 ** (rng.uniform(-6, 6) / 20)
            x = change_throat(x, draw_ratio(rng)) if augment else x
            wavs.append(F.pad(x, (rng.randrange(2 * FRAME), 0)))
            letters.append([number[c] for c in text.lower() if c in number])
            microphones.append(rng.getrandbits(60) if augment else None)
        if not wavs:
            raise ValueError("a whole batch of recordings is broken inside")
        N = (max(map(len, wavs)) // FRAME + 2) * FRAME
        return torch.stack([F.pad(x, (0, N - len(x))) for x in wavs])[:, None], letters, microphones

    def read(self, key):
        """(N,) samples; None if they are broken and --skip-broken leaves them out."""
        if key not in self.audio:
            path, start, end = key
            try:
                self.audio[key] = (read_audio(path, start=start, end=end) * 32767).short()
            except (ValueError, OSError) as e:
                if not self.skip_broken:
                    raise ValueError(f"{e} (--skip-broken leaves it out)") from None
                self.audio[key] = None
                broken = sum(x is None for x in self.audio.values())
                tqdm.write(f"skipped {broken} that are broken inside, now {e}", sys.stderr)
        return None if self.audio[key] is None else self.audio[key].float() / 32767


def heard(wav, microphones):
    """Clips (B, 1, N) as these microphones record them: a seed for each clip, or None for as it is."""
    return torch.stack([x if seed is None else Microphone.draw(random.Random(seed))(x[0])[None]
                        for x, seed in zip(wav, microphones)])


class CodecTask:
    """Loss: spectra, waveform, commitment, and letters: a CTC head reads the words off the first codebook,
    a cheap substitute for Mimi's distillation, so that its codes tell what is said and not who says it."""
    kind = "codec"
    files, from_nothing = {}, True

    def __init__(self, config, data, device, precision=None, skip_broken=False):
        self.config, self.device, self.precision = config, device, precision
        self.model = Mimi(config)
        self.clips = Clips(data, skip_broken)
        self.letters = nn.Linear(config.dim, 4 * (len(self.clips.letters) + 1))  # four guesses a frame
        self.modules = nn.ModuleList([self.model, self.letters]).to(device)
        self.spectra = [Spectrum(n).to(device) for n in (256, 512, 1024, 2048)]
        self.fingerprint, self.holds = self.clips.fingerprint, self.clips.holds

    def batch(self, stage, progress, split, rng, rows=None):
        """Waveforms, letters, microphones; in training also how many codebooks each clip uses (quantiser
        dropout), and which two spectra compare the whole batch. Every fourth clip is decoded: to hear takes
        more examples than to speak, and decoding takes most of the time."""
        clips = self.clips.batch(stage, progress, split, rng)
        training, K, B = split == "train", self.config.codebooks, len(clips[0])
        depth = torch.tensor([rng.randint(1, K) if training and rng.random() < 0.4 else K for _ in range(B)])
        decoded = torch.arange(B) % (4 if training else 1) == 0
        spectra = rng.sample(range(len(self.spectra)), 2) if training else range(len(self.spectra))
        return *clips, depth, decoded, [list(spectra)] * B

    def tokens(self, batch):
        return batch[0].numel() // FRAME * self.config.codebooks

    def totals(self, batch):
        return torch.tensor([len(batch[0]), batch[4].sum()])

    def loss(self, stage, micro, totals):
        """(loss, its parts, which vectors chose which codes). Summed over the micro-batches, the loss and its
        parts are means over the whole batch. The codec hears clips through microphones and rooms, but what
        it decodes is compared with the clips themselves."""
        wav, letters, microphones, depth, decoded, spectra = micro
        y, semantic, commitment, chosen = reconstruct(self.model, heard(wav, microphones).to(self.device),
                                                      depth.to(self.device), decoded.to(self.device))
        logits = self.letters(semantic.mT).float().unflatten(-1, (4, -1)).flatten(1, 2)  # (B, 4*T, letters)
        rows, wav = len(wav) / totals[0], wav[decoded].to(self.device)
        parts = {"commitment": commitment * rows, "letters": letters_loss(logits, letters) * rows}
        if len(wav):
            share = len(wav) / totals[1]
            parts["spectrum"] = share * sum(self.spectra[i](y, wav) for i in spectra[0]) / len(spectra[0])
            parts["wave"] = share * (y - wav).abs().mean()
        else:
            parts["spectrum"] = parts["wave"] = commitment.new_zeros(())
        loss = parts["spectrum"] + parts["wave"] + 0.25 * parts["commitment"] + 0.5 * parts["letters"]
        return loss, parts, chosen

    def after_step(self, kept, step):
        """The codebooks learn by moving averages, not by gradients. kept: the third value that loss returned
        for each micro-batch."""
        torch.manual_seed(step)  # unused codes restart at random
        books = *self.model.semantic.layers, *self.model.acoustic.layers
        for book, choices in zip(books, zip(*kept), strict=True):
            ema_update(book, *map(torch.cat, zip(*choices)))

    def state(self):
        return {"model": self.model.state_dict(), "letters": self.letters.state_dict()}

    def load(self, saved, where):
        load_weights(self.model, saved["model"], where)
        load_weights(self.letters, saved["letters"], where)


# ------------------------------------------------------------------------------------------------------------
# one training pass


def reconstruct(codec, wav, n_codebooks, decoded):
    """wav (B, 1, 1920*T) -> the reconstruction of its `decoded` rows (a mask), the quantised semantic part
    (B, C, T), the commitment loss, and for each codebook what ema_update takes. n_codebooks (B,): how many
    each item uses (quantiser dropout)."""
    x = codec.encoder(wav, codec.encoder.init_state(len(wav)))
    with torch.autocast(x.device.type, enabled=False):
        semantic, loss1, assigned1 = quantise(codec.semantic, x, n_codebooks)
        acoustic, loss2, assigned2 = quantise(codec.acoustic, x, n_codebooks - 1)
    latent = (semantic + acoustic)[decoded]
    y = codec.decoder(latent, codec.decoder.init_state(len(latent))) if len(latent) else wav[:0]
    return y, semantic, loss1 + loss2, assigned1 + assigned2


def quantise(quantizer, x, n_codebooks):
    """x (B, C, T), each item with the quantiser's first n_codebooks (B,). Gradients pass straight through.
    Returns the quantised x (B, C, T), the commitment loss, and what each codebook is updated with:
    [(vectors (B*T, dim), their codes (B*T,)), ...]. Full precision, as in ResidualQuantizer.encode."""
    x = quantizer.input_proj(x.float()).mT  # (B, T, dim)
    residual, out, commitment, assigned = x, torch.zeros_like(x), x.new_zeros(()), []
    for k, layer in enumerate(quantizer.layers):
        used = (n_codebooks > k)[:, None, None]
        vectors = residual.detach().flatten(0, 1)
        codes = layer.nearest(vectors)
        assigned.append((vectors, codes))
        quantised = layer.embedding[codes].view_as(residual)
        commitment = commitment + ((residual - quantised.detach()).square() * used).mean()
        out, residual = out + quantised * used, residual - quantised.detach()
    out = x + (out - x).detach()
    return quantizer.output_proj(out.mT), commitment / len(quantizer.layers), assigned


@torch.no_grad()
def ema_update(book, x, codes, decay=0.97, dead=0.2):
    """Move a codebook's embeddings towards the vectors x (N, dim) assigned to the codes (N,). A dead code,
    whose usage is below `dead`, restarts at one of the vectors."""
    one_hot = F.one_hot(codes, len(book.cluster_usage)).to(x.dtype)
    book.cluster_usage.lerp_(one_hot.sum(0), 1 - decay)
    book.embedding_sum.lerp_(one_hot.T @ x, 1 - decay)
    restart = book.cluster_usage < dead
    sample = x[torch.randint(len(x), (len(restart),), device=x.device)]
    book.embedding_sum[restart] = sample[restart]
    book.cluster_usage[restart] = 1.0
    book.update_embedding()


# ------------------------------------------------------------------------------------------------------------
# losses


def letters_loss(logits, words):
    """Connectionist temporal classification: logits (B, T, letters) against the letters of each item."""
    B, T, _ = logits.shape
    targets = torch.tensor(sum(words, []), device=logits.device)
    lengths = torch.tensor([len(w) for w in words])
    return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), targets, torch.full((B,), T), lengths,
                      zero_infinity=True)


class Spectrum(nn.Module):
    """The distance of two waveforms (B, 1, N) in log-mel and log-magnitude spectra of one window length.
    Gradients go to the first waveform."""

    def __init__(self, n):
        super().__init__()
        self.n = n
        self.register_buffer("window", torch.hann_window(n) / n ** 0.5)
        self.register_buffer("mel", mel_filters(n, min(80, n // 8)).T)

    def logs(self, x):
        """(B, 1, N) -> log-mel and log-magnitude, (B, T, bins) each, with windows that overlap by half."""
        x = F.pad(x.float(), (self.n // 2, self.n // 2), mode="reflect")[:, 0].unfold(-1, self.n, self.n // 2)
        a, b = torch.view_as_real(torch.fft.rfft(x * self.window)).unbind(-1)
        power = a * a + b * b
        return [0.5 * torch.log(p + 1e-6) for p in (power @ self.mel, power)]

    def forward(self, x, y):
        with torch.no_grad():
            target = self.logs(y)
        mel, magnitude = ((a - b).abs().mean() for a, b in zip(self.logs(x), target))
        return mel + 0.5 * magnitude
