"""Audio files: anything that soundfile reads -> float32 at 24 kHz, and back."""
import contextlib
import functools
import math
import os
import struct
from fractions import Fraction

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from files.atomic import replace_when_done
from files.fields import one_line

SAMPLE_RATE = 24_000  # of all audio in this project
RATES = 1000, 768_000  # of files that are read
PROMISE = 2000  # samples that a byte may hold; FLAC and Ogg hold hundreds of silence
LOUDEST = 1e4  # of float samples, 80 dB over full scale
BLOCK = 1 << 19  # numbers that are read at a time
LONGEST = 3600  # seconds that read_audio holds in memory


@contextlib.contextmanager
def open_sound(path):
    """Any file that soundfile reads, opened: a SoundFile. Raises ValueError or OSError with the file's name
    if it is missing, empty, cut off, or of a rate that nobody uses."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise OSError(f"{path}: is a directory or a device, not an audio file")
    if path.lower().endswith(".raw"):
        raise ValueError(f"{path}: bare samples, without rate and channels; convert it to .wav first")
    try:
        with soundfile.SoundFile(path) as f:
            if not RATES[0] <= f.samplerate <= RATES[1]:
                raise ValueError(f"{path}: has {f.samplerate} samples a second; {RATES[0]} to {RATES[1]} "
                                 "can be read")
            if f.frames > PROMISE * os.path.getsize(path):
                raise ValueError(f"{path}: cut off; its header promises {f.frames / f.samplerate / 3600:.0f} "
                                 "hours")
            if f.frames <= 0:
                raise ValueError(f"{path}: holds no audio (zero samples)")
            if cut_off(path):
                raise ValueError(f"{path}: cut off; its header promises more audio than it holds")
            yield f
    except (soundfile.SoundFileError, RuntimeError, TypeError, MemoryError, OverflowError, struct.error) as e:
        raise ValueError(f"{path}: not an audio file that can be read ({one_line(e)})") from None


def part_of(f, path, start, end):
    """(first sample, last + 1) of a part in seconds of an open file. ValueError if it has no such part."""
    first, last = round(start * f.samplerate), f.frames if end is None else round(end * f.samplerate)
    if not 0 <= first <= last <= f.frames:
        raise ValueError(f"{path}: lasts {f.frames / f.samplerate:.2f} s, not from {start} to {end} s")
    if first == last:
        raise ValueError(f"{path}: holds no audio from {start} to {end} s")
    return first, last


def seconds_of(path, start=0.0, end=None):
    """How long a part of a file lasts, by its header. Raises ValueError or OSError."""
    with open_sound(path) as f:
        first, last = part_of(f, path, start, end)
        return (last - first) / f.samplerate


def read_blocks(path, mono=True, start=0.0, end=None):
    """Any file that soundfile reads, or its part from start to end (seconds), as float32 samples at 24 kHz in
    blocks (channels, n) of some seconds, however long it is. Raises ValueError or OSError with the file's
    name if it cannot be opened, has no such part, ends early or holds samples that are not finite."""
    with open_sound(path) as f:
        at, last = part_of(f, path, start, end)
        resampler, block = Resampler(f.samplerate), max(1, BLOCK // f.channels)
        if f.seekable():
            f.seek(at)
        else:  # such as GSM
            for n in [block] * (at // block) + [at % block]:
                f.read(n)
        while at < last:
            x = f.read(min(block, last - at), dtype="float32", always_2d=True).T
            at += x.shape[1]
            if not x.shape[1]:
                raise ValueError(f"{path}: cut off; its header promises more audio than it holds")
            if not np.isfinite(x).all():
                raise ValueError(f"{path}: holds samples that are not finite (NaN or infinity)")
            if np.abs(x).max() > LOUDEST:
                raise ValueError(f"{path}: holds samples of {np.abs(x).max():.3g}; 1 is full scale")
            x = torch.from_numpy(x)
            yield resampler(x.mean(0, keepdim=True) if mono else x, at == last)


def regroup(blocks, size):
    """Blocks (channels, n) -> blocks of `size` samples; the last one may be shorter."""
    rest = None
    for x in blocks:
        *whole, rest = (x if rest is None else torch.cat([rest, x], 1)).split(size, 1)
        yield from whole
        if rest.shape[1] == size:
            yield rest
            rest = None
    if rest is not None and rest.shape[1]:
        yield rest


def read_audio(path, mono=True, start=0.0, end=None):
    """The same at once: (N,), or (channels, N) if not mono. ValueError for more than an hour, too."""
    with open_sound(path) as f:
        first, last = part_of(f, path, start, end)
        channels = 1 if mono else f.channels
        seconds = (last - first) / f.samplerate
        if seconds * channels > LONGEST:
            raise ValueError(f"{path}: {seconds / 3600:.1f} hours, {channels} channels: too much at once; "
                             f"{LONGEST / 3600:.0f} hour can be read")
        out = torch.empty(channels, Resampler(f.samplerate).length(last - first))
    at = 0
    for x in read_blocks(path, mono, start, end):
        out[:, at:at + x.shape[1]] = x
        at += x.shape[1]
    return out[0] if mono else out


# Chunks of a file by its magic: where they begin, letters of a name, format of a length, padded to, the audio
CHUNKS = {b"RIFF": (12, 4, "<I", 2, b"data"), b"RF64": (12, 4, "<I", 2, b"data"),
          b"RIFX": (12, 4, ">I", 2, b"data"), b"FORM": (12, 4, ">I", 2, b"SSND"),
          b"riff": (40, 16, "<Q", 8, b"data")}


def cut_off(path):
    """Whether a WAV, AIFF, AU, W64 or Ogg file ends before its header or its stream says so. libsndfile reads
    such a file without an error."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        head = f.read(40)
        if head[:4] == b".snd":
            begin, length = struct.unpack(">II", head[4:12])
            return length < UNKNOWN and begin + length > size
        if head[:4] == b"OggS":
            f.seek(max(0, size - 65_307))  # the longest page
            tail = f.read()
            page = tail[max(0, tail.rfind(b"OggS")):]
            segments = page[27:27 + page[26]] if len(page) > 26 else b""
            return not segments or not page[5] & 4 or len(page) < 27 + len(segments) + sum(segments)
        if head[:4] not in CHUNKS or head[:4] == b"FORM" and head[8:12] not in (b"AIFF", b"AIFC"):
            return False
        begin, letters, kind, pad, wanted = CHUNKS[head[:4]]
        width, length64 = struct.calcsize(kind), 0
        f.seek(begin)
        for _ in range(10_000):
            if len(chunk := f.read(letters + width)) < letters + width:
                break
            length, = struct.unpack(kind, chunk[letters:])
            length -= letters + width if head[:4] == b"riff" else 0  # it counts itself there
            if chunk[:4] == b"ds64":
                length64 = int.from_bytes(head[28:36], "little")
            if chunk[:4] == wanted:
                length = length64 if head[:4] == b"RF64" and length >= UNKNOWN else length
                return (length < UNKNOWN or length > UNKNOWN + 15) and f.tell() + length > size
            if length < 0:
                return True
            f.seek(length + -length % pad, 1)
    return True


UNKNOWN = 0xFFFFFFF0  # the largest lengths mark a stream whose end was not known


class Resampler:
    """Samples at `rate`, block by block, (channels, n) -> at 24 kHz: one strided convolution with a bank of
    Kaiser-windowed sinc filters. At any rate the blocks together are what one long block gives."""

    def __init__(self, rate):
        self.same = rate == SAMPLE_RATE
        self.bank, self.old, self.new = (None, 1, 1) if self.same else resampling_filters(rate)
        self.past, self.heard, self.said = None, 0, 0

    def length(self, n):
        """How many samples n become."""
        return -(-n * self.new // self.old)

    def __call__(self, x, last):
        if self.same:
            return x
        half = (self.bank.shape[-1] - self.old) // 2
        self.heard += x.shape[1]
        past = x.new_zeros(len(x), half) if self.past is None else self.past
        x = F.pad(torch.cat([past, x], 1), (0, half + self.old if last else 0))
        steps = max(0, (x.shape[1] - self.bank.shape[-1]) // self.old + 1)
        self.past = x[:, steps * self.old:]
        y = F.conv1d(x[:, None], self.bank, stride=self.old) if steps else x.new_zeros(len(x), self.new, 0)
        y = y.mT.flatten(1)  # (channels, new, steps) -> (channels, steps * new)
        y = y[:, :self.length(self.heard) - self.said] if last else y
        self.said += y.shape[1]
        return y


def resample(x, rate):
    """(channels, N) at `rate` -> at 24 kHz."""
    return Resampler(rate)(x, True)


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
    x = np.atleast_2d(np.asarray(x, dtype=np.float32))
    with write_blocks(path, len(x), flush) as write:
        for begin in range(0, x.shape[1], SAMPLE_RATE):  # libsndfile crashes if it gets a long Ogg at once
            write(x[:, begin:begin + SAMPLE_RATE])


@contextlib.contextmanager
def write_blocks(path, channels, flush=True):
    """`with write_blocks(path, 1) as write:` the same, for a call write(samples (n,) or (channels, n)) after
    another, of a second at most."""
    kind = os.path.splitext(path)[1][1:].upper()
    if kind not in soundfile.available_formats():
        raise ValueError(f"{path}: cannot write this kind of file; use an ending such as .wav or .flac")
    try:
        with (replace_when_done(path, flush) as temporary,
              soundfile.SoundFile(temporary, "w", SAMPLE_RATE, channels, format=kind) as f):
            yield lambda x: f.write(np.asarray(x, dtype=np.float32).clip(-1, 1).T)
    except soundfile.LibsndfileError as e:
        raise OSError(f"{path}: could not be written; is the disk full? ({e})") from None
