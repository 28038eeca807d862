"""Waveforms into log-mel spectrograms, and predicted spectra into waveforms: both frame by frame."""
import math

import torch
import torch.nn.functional as F
from torch import nn

from files.audio import SAMPLE_RATE

WINDOW = 960  # samples: 40 ms
MELS = 80


def mel_filters(n_fft, n_mels=MELS):
    """Triangular filters, evenly spaced on the mel scale: (n_mels, n_fft//2 + 1)."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, n_mels + 2) / 2595) - 1)
    f = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)
    rise = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rise, fall).clamp(min=0)


class LogMel(nn.Module):
    """(B, 1, hop*T) -> (B, 80, T), one step for each window that has just ended. State: the windows'
    overlap."""

    def __init__(self, hop):
        super().__init__()
        self.hop = hop
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("mel", mel_filters(WINDOW), persistent=False)

    def init_state(self, B):
        return {"past": self.window.new_zeros(B, WINDOW - self.hop)}

    def forward(self, x, state):
        with torch.autocast(x.device.type, enabled=False):
            x = torch.cat([state["past"], x[:, 0].float()], -1)
            state["past"].copy_(x[:, self.hop - WINDOW:])
            x = torch.fft.rfft(x.unfold(-1, WINDOW, self.hop) * self.window)  # (B, T, bins)
            power = x.real.square() + x.imag.square()
            return 0.3 * torch.log(power @ self.mel.T + 1e-3).mT  # roughly within -2..2


class InverseFourier(nn.Module):
    """(B, C, T) -> (B, 1, hop*T): each step predicts magnitudes and phases of one window, and the windows are
    overlap-added. State: what the last windows add to samples that are not complete yet."""

    def __init__(self, c_in, hop):
        super().__init__()
        self.hop = hop
        self.norm = nn.LayerNorm(c_in)
        self.head = nn.Linear(c_in, WINDOW + 2)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def init_state(self, B):
        return {"overlap": self.window.new_zeros(B, WINDOW - self.hop)}

    def forward(self, x, state):
        magnitude, phase = self.head(self.norm(x.mT)).float().chunk(2, dim=-1)  # (B, T, bins)
        with torch.autocast(x.device.type, enabled=False):
            return self.overlap_add(torch.polar(magnitude.clamp(max=6).exp(), phase), state)[:, None]

    def overlap_add(self, spectrum, state):
        """(B, T, bins) -> (B, hop*T)"""
        B, T, _ = spectrum.shape
        n = WINDOW // self.hop
        squares = 0.375 * n  # the sum of n squared Hann windows: one is applied in analysis, one here
        windows = (torch.fft.irfft(spectrum, WINDOW) * self.window / squares).view(B, T, n, self.hop)
        y = sum(F.pad(windows[:, :, i], (0, 0, i, n - 1 - i)) for i in range(n)).flatten(1)
        y = torch.cat([y[:, :WINDOW - self.hop] + state["overlap"], y[:, WINDOW - self.hop:]], -1)
        state["overlap"].copy_(y[:, T * self.hop:].detach())
        return y[:, :T * self.hop]


def log_spectral_distance(x, y, filters=None):
    """Distance of two waveforms (N,) in dB: root mean square over frequency of the difference of their power
    spectra in dB, mean over windows of 43 ms. With filters (bands, 513): over bands instead of single
    frequencies."""
    total, windows = 0.0, 0
    for pair in zip(x.split(60 * SAMPLE_RATE), y.split(60 * SAMPLE_RATE)):
        power = [torch.stft(F.pad(p, (512, 512)), 1024, 256, window=torch.hann_window(1024), center=False,
                            return_complex=True).abs().square() for p in pair]
        a, b = (10 * torch.log10((p if filters is None else filters @ p) + 1e-5) for p in power)
        distance = (a - b).square().mean(0).sqrt()
        total, windows = total + distance.sum().item(), windows + len(distance)
    return total / windows
