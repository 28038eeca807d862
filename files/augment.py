"""What a recording of the same words might have sounded like: another throat, another microphone, another
room.

    clean    clip (N,) --change_throat--> (N',)                             what the codec reconstructs
    heard    clean --Microphone: colour, band, room, noise, gain--> (N',)   what it hears

A few voices are soon known by heart. What all of these have in common is what is said, so a codec that is
trained on them keeps that. Everything is a function of the random numbers. One Fourier transform does colour,
band and room together, so that a clip costs milliseconds.
"""
import bisect
import math
from dataclasses import dataclass

import torch

from files.audio import SAMPLE_RATE, read_audio

NYQUIST = SAMPLE_RATE / 2


FAST = sorted(2 ** a * 3 ** b * 5 ** c for a in range(1, 25) for b in range(10) for c in range(7))


def fast_length(n):
    """The next length from n whose Fourier transform is quick."""
    return FAST[bisect.bisect_left(FAST, n)]


def change_throat(x, ratio):
    """(N,) -> about (N / ratio,), resampled: a ratio above 1 gives a shorter throat, a higher pitch and
    faster speech, all three at once. 0.8 to 1.25 is about the range from large men to small children."""
    n = fast_length(len(x))
    m = fast_length(round(n / ratio))
    spectrum = torch.fft.rfft(x, n)[:m // 2 + 1]
    return torch.fft.irfft(spectrum, m)[:len(x) * m // n] * (m / n)


@dataclass(frozen=True)
class Microphone:
    """A way of recording: call it on samples (N,)."""
    colour: tuple = (0.0,) * 9  # dB at nine points on a logarithmic axis from 60 Hz to the highest frequency
    band: tuple = (0.0, 2 * NYQUIST)  # Hz
    reverberation: float = 0.0  # seconds until the room is 60 dB softer
    distance: float = -20.0  # dB: level of the room's share; 0 far from the microphone
    noise: float = -math.inf  # dB: its level beside the voice's
    rumble: float = 0.0  # from white (0) to brown noise (1)
    gain: float = 0.0  # dB
    seed: int = 0

    @staticmethod
    def draw(rng):
        """Any microphone in any room. Half of them hear all frequencies, a third has a limit (cheap ones,
        coded audio), the rest are telephones."""
        tilt, kind = rng.uniform(-6, 6), rng.random()
        colour = tuple(rng.uniform(-10, 10) * rng.random() + tilt * (i / 4 - 1) for i in range(9))
        band = (0, 2 * NYQUIST) if kind < 0.5 else (rng.uniform(0, 120), rng.uniform(3000, 11_000))
        if kind > 0.85:
            band = rng.uniform(200, 400), rng.uniform(3200, 3800)
        return Microphone(colour, band, rng.uniform(0.1, 0.7) if rng.random() < 0.6 else 0.0,
                          rng.uniform(-15, 3), -rng.triangular(0, 40, 8) if rng.random() < 0.7 else -math.inf,
                          rng.uniform(0, 1), rng.uniform(-20, 8), rng.getrandbits(60))

    def __call__(self, x):
        generator = torch.Generator().manual_seed(self.seed)
        tail = round(self.reverberation * SAMPLE_RATE)
        n = fast_length(len(x) + tail)
        hertz = torch.linspace(0, NYQUIST, n // 2 + 1)
        voice = torch.fft.rfft(x, n)
        loud = power(voice)
        voice = voice * self.response(hertz)
        if tail:
            voice = voice * torch.fft.rfft(impulse(tail, self.distance, generator), n)
        voice = voice * (loud / (power(voice) + 1e-20)).sqrt()
        if self.noise > -math.inf:
            noise = noise_spectrum(hertz, self.rumble, generator)
            # the transform is longer than the clip, and the noise is everywhere in it
            softer = (loud * n / len(x) / power(noise)).sqrt() * 10 ** (self.noise / 20)
            voice = voice + noise * softer
        y = torch.fft.irfft(voice, n)[:len(x)]
        return (y * 10 ** (self.gain / 20)).clamp(-1, 1)  # too loud is clipped, as in a microphone

    def response(self, hertz):
        """Factors of these frequencies (n,)."""
        octaves = (hertz.clamp(60, NYQUIST) / 60).log2() / math.log2(NYQUIST / 60) * 8  # 0..8
        points, i = torch.tensor([*self.colour, self.colour[-1]]), octaves.long()
        decibels = points[i] + (points[i + 1] - points[i]) * (octaves - i)
        low, high = self.band
        edges = torch.sigmoid((hertz - low) / 30) * torch.sigmoid((high - hertz) / 200)
        return 10 ** (decibels / 20) * edges


def impulse(n, distance, generator):
    """What a room returns of a click (n,): the click, and noise of this level (dB) that fades away."""
    tail = torch.randn(n, generator=generator) * torch.exp(-6.9 * torch.arange(n) / n)
    tail *= 10 ** (distance / 20) / tail.square().sum().sqrt()
    tail[0] += 1
    return tail


def noise_spectrum(hertz, rumble, generator):
    """Of noise from white (rumble 0) to brown (1), at these frequencies (n,)."""
    spectrum = torch.view_as_complex(torch.randn(len(hertz), 2, generator=generator))
    return spectrum * (hertz + 50) ** -rumble


def power(spectrum):
    return torch.view_as_real(spectrum).square().sum()


def draw_ratio(rng):
    """A ratio for change_throat: half of all clips stay as they are."""
    return 1.0 if rng.random() < 0.5 else 1.25 ** rng.uniform(-1, 1)


def decibels(x):
    """Level of samples x (N,): their root mean square in dB (footnote 9)."""
    return 20 * math.log10(x.double().square().mean().sqrt().item() + 1e-6)  # the same on any number of cores


def make_noise(n, files, rng):
    """n samples of noise, segment after segment, each scaled to -70 to -40 dB or, with probability 0.3,
    silent. From files, or else generated: white to brown."""
    out = []
    while sum(map(len, out)) < n:
        length = int(rng.uniform(0.5, 3.0) * SAMPLE_RATE)
        if files:
            x = read_audio(rng.choice(files))
            begin = rng.randrange(max(1, len(x) - length))
            x = x[begin:begin + length]
        else:
            bins, generator = length // 2 + 1, torch.Generator().manual_seed(rng.getrandbits(60))
            spectrum = noise_spectrum(torch.linspace(0, NYQUIST, bins), rng.uniform(0, 1), generator)
            x = torch.fft.irfft(spectrum, length)
        silent = rng.random() < 0.3
        out.append(x * 0 if silent else x * 10 ** ((rng.uniform(-70, -40) - decibels(x)) / 20))
    return torch.cat(out)[:n]


@dataclass(frozen=True)
class Version:
    """How a clip (N,) is heard."""
    late: int = 0  # samples by which it begins later
    gain: float = 1.0
    ratio: float = 1.0  # of the throat
    microphone: Microphone = None

    @staticmethod
    def draw(rng, latest, augment=False, same_speed=False):
        ratio = draw_ratio(rng) if augment and not same_speed else 1.0
        microphone = Microphone.draw(rng) if augment else None
        return Version(rng.randrange(latest), 10 ** (rng.uniform(-6, 6) / 20), ratio, microphone)

    @staticmethod
    def echo(rng):
        """Leakage (FLM-Audio, section 3.2): what comes back, weaker and 0.1 to 0.5 s later."""
        return Version(round(rng.uniform(0.1, 0.5) * SAMPLE_RATE), rng.uniform(0, 0.2))

    def throat_of(self, x):
        return x if self.ratio == 1.0 else change_throat(x, self.ratio)

    def record(self, x):
        return x * self.gain if self.microphone is None else self.microphone(x * self.gain)
