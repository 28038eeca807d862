"""Audio files: anything that soundfile reads -> float32 at 24 kHz, and back."""
import functools
import math
import os
from fractions import Fraction

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from files.atomic import replace_when_done

SAMPLE_RATE = 24_000  # of all audio in this project
RATES = 1000, 768_000  # of files that are read
PROMISE = 2000  # samples that a byte may hold; FLAC and Ogg hold hundreds of silence
LOUDEST = 1e4  # of float samples, 80 dB over full scale


def read_audio(path, mono=True, start=0.0, end=None):
    """Any file that soundfile reads, or its part from start to end (seconds), -> float32 samples at 24 kHz:
    (N,), or (channels, N) if not mono. Raises ValueError or OSError with the file's name if the file is
    missing, empty, cut off or holds samples that are not finite."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a directory, not an audio file")
    try:
        with soundfile.SoundFile(path) as f:
            rate = f.samplerate
            if not RATES[0] <= rate <= RATES[1]:
                raise ValueError(f"{path}: has {rate} samples a second; {RATES[0]} to {RATES[1]} can be read")
            first, last = round(start * rate), f.frames if end is None else round(end * rate)
            if not 0 <= first <= last <= f.frames:
                raise ValueError(f"{path}: lasts {f.frames / rate:.2f} s, not from {start} to {end} s")
            if f.frames > PROMISE * os.path.getsize(path):
                raise ValueError(f"{path}: cut off; its header promises {f.frames / rate / 3600:.0f} hours")
            f.seek(first)
            x = f.read(last - first, dtype="float32", always_2d=True).T
    except (soundfile.LibsndfileError, RuntimeError, TypeError, MemoryError, OverflowError) as e:
        raise ValueError(f"{path}: not an audio file that can be read ({e})") from None
    if first == last:
        raise ValueError(f"{path}: holds no audio (zero samples)")
    if x.shape[1] < last - first or cut_off(path):
        raise ValueError(f"{path}: cut off; its header promises more audio than it holds")
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: holds samples that are not finite (NaN or infinity)")
    if np.abs(x).max() > LOUDEST:
        raise ValueError(f"{path}: holds samples of {np.abs(x).max():.3g}; 1 is full scale")
    x = torch.from_numpy(x)
    x = resample(x.mean(0, keepdim=True) if mono else x, rate)
    return x[0] if mono else x


def cut_off(path):
    """Whether a WAV file is shorter than its header says. libsndfile reads such a file without an error."""
    with open(path, "rb") as f:
        head = f.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return False
        size = os.path.getsize(path)
        while len(chunk := f.read(8)) == 8:
            length = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                return length < 0xFFFFFFF0 and f.tell() + length > size  # the largest values mark a stream
            f.seek(length + length % 2, 1)
    return True


def resample(x, rate):
    """(channels, N) at `rate` -> at 24 kHz: one strided convolution with a bank of Kaiser-windowed sinc
    filters."""
    if rate == SAMPLE_RATE:
        return x
    bank, old, new = resampling_filters(rate)
    half = (bank.shape[-1] - old) // 2
    n = math.ceil(x.shape[1] * new / old)
    y = F.conv1d(F.pad(x, (half, half + old))[:, None], bank, stride=old)  # (channels, new, steps)
    return y.mT.flatten(1)[:, :n]


@functools.lru_cache(4)
def resampling_filters(rate, width=64, rolloff=0.9476, beta=14.77):
    """A filter for each of the `new` samples that take the place of `old` ones: (new, 1, 2*half + old), old,
    new."""
    # An odd rate, such as 44,101 Hz, is off by a millionth: its exact ratio would take gigabytes of filters.
    new, old = Fraction(SAMPLE_RATE, rate).limit_denominator(960).as_integer_ratio()
    cut = min(old, new) * rolloff
    half = math.ceil(width * old / cut)
    t = torch.arange(-half, half + old, dtype=torch.float64) / old  # in units of `old` samples
    t = (t - torch.arange(new, dtype=torch.float64)[:, None] / new) * cut
    window = torch.special.i0(beta * (1 - (t / width).clamp(-1, 1).square()).sqrt())
    window = window / torch.special.i0(torch.tensor(beta))
    return (torch.sinc(t) * window * (cut / old)).float()[:, None], old, new


def check_output(path):
    """ValueError or OSError if write_audio(path, ...) could not succeed. Makes the folder if there is
    none."""
    if not soundfile.check_format(os.path.splitext(path)[1][1:].upper()):
        raise ValueError(f"{path}: cannot write this kind of file; use an ending such as .wav or .flac")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a folder; name a file")
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder}: no permission to write there")


def write_audio(path, x, flush=True):
    """float samples at 24 kHz, (N,) or (channels, N), -> 16-bit file, whole or not at all; the ending says
    the format. flush: see replace_when_done."""
    x = np.asarray(x, dtype=np.float32)
    kind = os.path.splitext(path)[1][1:].upper()
    if kind not in soundfile.available_formats():
        raise ValueError(f"{path}: cannot write this kind of file; use an ending such as .wav or .flac")
    x = x.clip(-1, 1).T
    channels = 1 if x.ndim == 1 else x.shape[1]
    try:
        with (replace_when_done(path, flush) as temporary,
              soundfile.SoundFile(temporary, "w", SAMPLE_RATE, channels, format=kind) as f):
            for begin in range(0, len(x), SAMPLE_RATE):  # libsndfile crashes if it gets a long Ogg at once
                f.write(x[begin:begin + SAMPLE_RATE])
    except soundfile.LibsndfileError as e:
        raise OSError(f"{path}: could not be written; is the disk full? ({e})") from None
