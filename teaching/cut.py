"""Cuts recordings of sentences at their words. A synthesiser says the same words one by one, so that it is
known where each begins; dynamic time warping finds the same places in the recording.

    recording   --log-mel--.
                           +-- the path of least distance --> where each word begins
    synthesised --log-mel--'
"""
import numpy as np
import torch

from files.audio import SAMPLE_RATE
from files.spectrogram import mel_filters
from toy.voices import Style, normalise, trim

HOP, WINDOW = SAMPLE_RATE // 100, 1024
NEAR = 4  # steps on both sides, among which a boundary moves to the softest
MARGIN = SAMPLE_RATE // 40
VOICES = "en-us+m3", "en-gb-x-rp+f4", "en-us+klatt4", "en-gb-scotland+m5", "en-us+f2"


def features(x):
    """Samples (N,) -> (T, 40): log-mel, one step in 10 ms; each band without its mean, which is mostly the
    microphone's and the throat's."""
    x = torch.nn.functional.pad(torch.as_tensor(x), (WINDOW // 2, WINDOW // 2))
    power = torch.stft(x, WINDOW, HOP, window=torch.hann_window(WINDOW), center=False,
                       return_complex=True).abs().square()
    y = torch.log(mel_filters(WINDOW, 40) @ power + 1e-5).T
    return (y - y.mean(0)) / y.std()


def align(a, b):
    """For each step of a (S, F) the first of b (T, F) that it is compared with on the path whose distances
    sum to least, from both beginnings to both ends."""
    cost = torch.cdist(a, b).tolist()
    S, T, far = len(a), len(b), float("inf")
    total, came = [[far] * T for _ in range(S)], [[0] * T for _ in range(S)]
    for i in range(S):
        for j in range(T):
            both = total[i - 1][j - 1] if i and j else far if i or j else 0.0
            one, other = total[i - 1][j] if i else far, total[i][j - 1] if j else far
            least = min(both, one, other)
            came[i][j] = 0 if both == least else 1 if one == least else 2
            # a step on both sides at once costs what one on each costs
            total[i][j] = least + cost[i][j] * (2 if both == least else 1)
    path, i, j = [0] * S, S - 1, T - 1
    while i >= 0 and j >= 0:
        path[i] = j
        move = came[i][j]
        i, j = i - (move < 2), j - (move != 1)
    return path


def find_starts(x, parts, synthesiser):
    """Where each of these parts of text begins in samples x (N,), in samples: the median over VOICES, moved
    to the softest place nearby."""
    guesses, heard = [], features(x)
    for voice in VOICES:
        spoken = [normalise(trim(synthesiser.speak(part, voice, Style()))) for part in parts]
        path = align(features(np.concatenate(spoken)), heard)
        begins = np.cumsum([0] + [len(part) for part in spoken[:-1]]) // HOP
        guesses.append([path[min(i, len(path) - 1)] for i in begins])
    power = np.convolve(np.square(x), np.ones(2 * HOP), "same")[::HOP]
    starts = [0]
    for guess in np.median(guesses, 0).astype(int)[1:]:
        low = max(starts[-1] + 5, guess - NEAR)
        near = power[low:max(low + 1, guess + NEAR + 1)]
        starts.append(low + (int(near.argmin()) if len(near) else 0))
    return [min(len(x), start * HOP) for start in starts]


def cut(x, parts, synthesiser):
    """Samples (N,) of a sentence -> those of each of its parts, with a little of their neighbours, to fade in
    and out. A part that is not found is empty."""
    starts = find_starts(x, parts, synthesiser)
    ends = [*starts[1:], len(x)]
    return [x[max(0, a - MARGIN):b + MARGIN] if a < b else x[:0] for a, b in zip(starts, ends)]
