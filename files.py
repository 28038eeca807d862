"""Files: sound, checkpoints, weights. None that is read is trusted, and none is written half.

Everything that is read gives a tensor or one clear error with the file's name; nothing in a file is ever run.
"""
import dataclasses
import functools
import json
import math
import os
import shutil

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

SAMPLE_RATE = 24_000  # of all sound in this house


def read_audio(path, mono=True, start=0.0, end=None):
    """Any file that soundfile reads, or its seconds from start to end, -> float32 samples at 24 kHz: (N,), or (channels, N)
    if not mono. Raises ValueError or OSError, with the file's name, for what is missing, empty, cut off or not finite."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a directory, not a sound file")
    try:
        with soundfile.SoundFile(path) as f:
            rate = f.samplerate
            first, last = round(start * rate), f.frames if end is None else round(end * rate)
            if not 0 <= first <= last <= f.frames:
                raise ValueError(f"{path}: lasts {f.frames / rate:.2f} s; there is no part from {start} to {end} s")
            f.seek(first)
            x = f.read(last - first, dtype="float32", always_2d=True).T
    except (soundfile.LibsndfileError, RuntimeError) as e:
        raise ValueError(f"{path}: not a sound file that can be read ({e})") from None
    if first == last:
        raise ValueError(f"{path}: holds no sound (zero samples)")
    if x.shape[1] < last - first or cut_off(path):
        raise ValueError(f"{path}: cut off; its header promises more sound than it holds")
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: holds samples that are not finite (NaN or infinity)")
    x = torch.from_numpy(x)
    x = resample(x.mean(0, keepdim=True) if mono else x, rate)
    return x[0] if mono else x


def cut_off(path):
    """Whether a WAV file is shorter than its header says; libsndfile reads the rest without a word."""
    with open(path, "rb") as f:
        head = f.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return False
        size = os.path.getsize(path)
        while len(chunk := f.read(8)) == 8:
            length = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                return length < 0xFFFFFFF0 and f.tell() + length > size  # the largest values mean: a stream
            f.seek(length + length % 2, 1)
    return True


def resample(x, rate):
    """(channels, N) at `rate` -> at 24 kHz: one strided convolution with a bank of Kaiser-windowed sinc filters."""
    if rate == SAMPLE_RATE:
        return x
    bank, old, new = resampling_filters(rate)
    half = (bank.shape[-1] - old) // 2
    n = math.ceil(x.shape[1] * new / old)
    y = F.conv1d(F.pad(x, (half, half + old))[:, None], bank, stride=old)  # (channels, new, steps)
    return y.mT.flatten(1)[:, :n]


@functools.lru_cache(4)
def resampling_filters(rate, width=64, rolloff=0.9476, beta=14.77):
    """A filter for each of the `new` samples that take the place of `old` ones: (new, 1, 2*half + old), old, new."""
    g = math.gcd(rate, SAMPLE_RATE)
    old, new = rate // g, SAMPLE_RATE // g
    cut = min(old, new) * rolloff
    half = math.ceil(width * old / cut)
    t = torch.arange(-half, half + old, dtype=torch.float64) / old  # seconds, in units of 1/g
    t = (t - torch.arange(new, dtype=torch.float64)[:, None] / new) * cut
    window = torch.special.i0(beta * (1 - (t / width).clamp(-1, 1).square()).sqrt()) / torch.special.i0(torch.tensor(beta))
    return (torch.sinc(t) * window * (cut / old)).float()[:, None], old, new


def write_audio(path, x):
    """float samples at 24 kHz, (N,) or (channels, N), -> 16-bit file, whole or not at all; the ending says the format."""
    x = np.asarray(x, dtype=np.float32)
    kind = os.path.splitext(path)[1][1:].upper()
    if kind not in soundfile.available_formats():
        raise ValueError(f"{path}: cannot write this kind of file; use an ending such as .wav or .flac")
    with replace_when_done(path) as temporary:
        soundfile.write(temporary, x.clip(-1, 1).T, SAMPLE_RATE, format=kind)


class replace_when_done:
    """`with replace_when_done(path) as temporary:` write the temporary file; it takes its place only if all went well."""

    def __init__(self, path):
        self.path, self.temporary = path, f"{path}.{os.getpid()}.tmp"

    def __enter__(self):
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        return self.temporary

    def __exit__(self, error, *_):
        if error is None:
            os.replace(self.temporary, self.path)
        elif os.path.exists(self.temporary):
            os.remove(self.temporary)


def copy(source, target):
    with replace_when_done(target) as temporary:
        shutil.copyfile(source, temporary)


def save_checkpoint(path, kind, config, **parts):
    with replace_when_done(path) as temporary:
        try:
            torch.save({"kind": kind, "config": dataclasses.asdict(config), **parts}, temporary)
        except RuntimeError as e:  # so torch tells of a full disk
            raise OSError(f"{path}: could not be written; is the disk full? ({str(e).splitlines()[0]})") from None


def load_checkpoint(path, kind, mmap=False):
    """What save_checkpoint wrote, or (mmap) what reads it from the disk as it is needed. Never runs code from the file. Raises
    ValueError or OSError with the file's name."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # torch has no one class for a damaged file
        raise ValueError(f"{path}: not a checkpoint, or cut off ({type(e).__name__})") from None
    if not isinstance(saved, dict) or saved.get("kind") != kind:
        found = saved.get("kind") if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path}: is not a {kind} checkpoint but {found}")
    return saved


def from_fields(cls, fields, where):
    """A config from the names and values of its fields; an unknown or missing one is an error that names it."""
    names = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(fields, dict) or set(fields) != names:
        odd = sorted(set(fields) ^ names) if isinstance(fields, dict) else fields
        raise ValueError(f"{where}: {cls.__name__} has unknown or missing keys: {odd}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def load_weights(module, weights, where):
    try:
        module.load_state_dict(weights)
    except RuntimeError as e:
        raise ValueError(f"{where}: its tensors are not those of its config: {' '.join(str(e).split())[:300]}") from None


def is_safetensors(path):
    """By its beginning: eight bytes of length and a brace."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as f:
        return f.read(9)[8:] == b"{"


def open_safetensors(path):
    """The file with its tensors still on the disk: keys(), get_tensor(name). Raises ValueError or OSError with the file's name."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f"{path}: published weights need the extra 'weights': pip install '.[weights]'") from None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: not a safetensors file, or cut off ({e})") from None


def read_json(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise ValueError(f"{path}: is not JSON ({e})") from None
