"""The codec alone: how far its speech is from the original, and how well a recogniser understands both."""
import random

from tqdm import tqdm

from evals.scores import Proportions
from files.audio import read_audio
from files.spectrogram import log_spectral_distance, mel_filters


def ceiling(codec, recogniser, items, scores, split):
    """How well the recogniser understands the original recordings, and the same after the codec."""
    for turn in (t for d in items for t in d["turns"]):
        audio = read_audio(turn["path"])
        for version, x in (("original", audio), ("codec", reconstruct(codec, audio))):
            understood(recogniser, x, turn["text"], scores, f"{split} {turn['role']} {version}")


def understood(recogniser, audio, text, scores, label):
    heard, right = recogniser.hear(audio), text.split()
    scores.add_errors(f"{label} 1 - WER", heard, right)
    scores.add(f"{label} exactly", heard == right)


def understood_line(scores, labels):
    return "   ".join(f"{label.split()[-1]} {scores.proportion(f'{label} 1 - WER'):.3f} / "
                      f"{scores.proportion(f'{label} exactly'):.3f}" for label in labels)


def reconstruct(codec, x):
    device = next(codec.parameters()).device
    return codec.decode(codec.encode(x[None, None].to(device)))[0, 0, :len(x)].cpu()


def codec_quality(codec, recogniser, dialogues, n, seed):
    """Held-out speech through the codec: the distance of log-mel spectra, and how well it is still
    understood."""
    print(f"\nHeld-out speech through the codec, seed {seed}: the recogniser's 1 - WER / exact clips")
    filters = mel_filters(1024)
    for split, role, who in (("seen", "user", "users heard in training"), ("new", "user", "new users"),
                             ("seen", "model", "the model's voice")):
        turns = [t for d in dialogues if d["split"] == split for t in d["turns"] if t["role"] == role]
        clips = sorted({t["path"]: t["text"] for t in turns}.items())
        clips = random.Random(seed).sample(clips, min(n, len(clips)))
        scores, distance = Proportions(), 0.0
        for path, text in tqdm(clips, who, unit="clip", leave=False):
            audio = read_audio(path)
            decoded = reconstruct(codec, audio)
            distance += log_spectral_distance(audio, decoded, filters) / len(clips)
            understood(recogniser, audio, text, scores, "original")
            understood(recogniser, decoded, text, scores, "codec")
        print(f"  {who:24} {len(clips):4} clips   log-mel distance {distance:5.2f} dB   "
              + understood_line(scores, ("original", "codec")))
