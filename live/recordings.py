"""Prompts to read aloud, and whether a recording of one can be learned from.

A folder of recordings holds 01.wav, 02.wav, ... (or .flac, .ogg, .mp3), in the order of the prompts, and
prompts.txt, which says what they are. Some may be missing.
"""
import glob
import os
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np

from files.atomic import write_text
from files.audio import SAMPLE_RATE, read_audio, write_audio
from toy.voices import trim_noisy
from toy.world import LANGUAGES, make_request

KINDS = {"repeat": 0.55, "count": 0.2, "next": 0.1, "opposite": 0.15}


@dataclass(frozen=True)
class Prompt:
    kind: str
    text: str  # what the user reads aloud
    answer: str


def make_prompts(n=40, seed=1, lang="en"):
    """n requests of the toy world that are not held out. Each is, of forty drawn, the one whose words have
    been read least."""
    rng, language, seen, out = random.Random(seed), LANGUAGES[lang], Counter(), []
    while len(out) < n:
        drawn = []
        for kind in rng.choices(list(KINDS), KINDS.values(), k=40):
            drawn.append(Prompt(kind, *make_request(language, kind, False, rng)))
        drawn = [p for p in drawn if p not in out]
        best = min(drawn, key=lambda p: sum(seen[w] for w in p.text.split()) / len(p.text.split()))
        seen.update(best.text.split())
        out.append(best)
    return out


def name_of(number):
    return f"{number + 1:02d}"


def write_prompts(folder, prompts):
    write_text(os.path.join(folder, "prompts.txt"), "".join(f"{name_of(i)}  {p.text}\n"
                                                            for i, p in enumerate(prompts)))


def problem_with(x, prompt):
    """What is wrong with a recording (N,) of a prompt, as one sentence; None if it can be learned from."""
    words, speech = len(prompt.text.split()), trim_noisy(x)
    seconds = len(speech) / SAMPLE_RATE
    if not len(x) or np.abs(x).max() < 1e-4:
        return "Nothing was recorded. Is the microphone muted?"
    if not np.isfinite(x).all():
        return "The recording holds samples that are not numbers."
    if (np.abs(x) > 0.99).mean() > 0.002:
        return "It was too loud and is clipped. Move away from the microphone, or turn it down."
    if level_of(x) < -50:
        return f"It was too soft ({level_of(x):.0f} dB). Come closer to the microphone."
    if is_steady(x):
        return "There is noise in it, but no speech that stands out from it."
    if seconds < 0.12 * words + 0.1:
        return f"It is only {seconds:.1f} s long, too short for these words."
    if seconds > 1.5 * words + 2:
        return f"It is {seconds:.1f} s long, too long for these words. Is it noisy?"
    return None


def level_of(x):
    """dB of what is spoken in a recording (N,); 0 is full scale."""
    return 10 * np.log10(np.square(trim_noisy(x)).mean() + 1e-12)


def is_steady(x, least=8.0):
    """Whether the level of a recording (N,) changes by less than `least` dB, as that of noise or a hum."""
    window = SAMPLE_RATE // 50
    power = np.square(x[:len(x) // window * window].reshape(-1, window)).mean(1) + 1e-12
    low, high = np.percentile(10 * np.log10(power), (5, 95)) if len(power) else (0, 0)
    return high - low < least


def save_recording(folder, number, x):
    """Write recording `number` (from 0) of samples (N,)."""
    write_audio(os.path.join(folder, name_of(number) + ".wav"), x)


def find_recordings(folder):
    """{number from 0: path}"""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*"))):
        name, ending = os.path.splitext(os.path.basename(path))
        if name.isdigit() and ending.lower() in (".wav", ".flac", ".ogg", ".mp3") and int(name) > 0:
            found[int(name) - 1] = path
    return found


def read_recordings(folder, prompts, least=8):
    """[(prompt, trimmed samples (N,)), ...] of a folder, and [(file, problem), ...] of those that cannot be
    used. Raises ValueError if fewer than `least` can."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    good, bad = [], []
    for number, path in sorted(find_recordings(folder).items()):
        try:
            if number >= len(prompts):
                raise ValueError(f"there are only {len(prompts)} prompts")
            x = read_audio(path).numpy()
            problem = problem_with(x, prompts[number])
        except (ValueError, OSError) as e:
            problem = str(e)
        if problem:
            bad.append((path, problem))
        else:
            good.append((prompts[number], trim_noisy(x)))
    if len(good) < least:
        why = f"; {bad[0][0]}: {bad[0][1]}" if bad else " (01.wav, 02.wav, ...)"
        raise ValueError(f"{folder}: holds {len(good)} recordings that can be used, at least {least} are "
                         f"needed{why}")
    return good, bad
