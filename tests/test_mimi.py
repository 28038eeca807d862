"""The codec: streaming equals offline, the quantiser, and files that are not what they say."""
import math
import struct

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import mimi
from mimi import FRAME, SAMPLE_RATE, Mimi, MimiConfig, read_audio, resample, tensors, write_audio

SMALL = {
    "seanet": MimiConfig(width=8, dim=32, encoder_layers=2, decoder_layers=2, heads=4, mlp=64, context=9,
                         codebook_size=32, codebook_dim=16),
    "spectral": MimiConfig("spectral", 24, (240, 4), 2, dim=32, encoder_layers=1, decoder_layers=2, heads=4, mlp=64,
                           context=9, codebook_size=32, codebook_dim=16),
}


@pytest.fixture(params=SMALL)
def codec(request):
    torch.manual_seed(0)
    m = Mimi(SMALL[request.param]).eval()
    with torch.no_grad():
        for name, p in m.named_parameters():
            if "scale" in name:  # LayerScale starts near zero; a test needs attention that matters, ...
                p.fill_(0.7)
            elif "conv" in name or p.ndim == 3:
                p.mul_(2)  # ... and activations large enough to choose among many codes
    return m


def sound(B, frames, seed=0):
    return torch.randn(B, 1, frames * FRAME, generator=torch.Generator().manual_seed(seed)) * 0.2


def test_the_full_size_is_mimis():
    with torch.device("meta"):
        m = Mimi(MimiConfig(codebooks=32))
    assert sum(p.numel() for p in m.parameters()) == 79_308_609


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_streaming_equals_offline(codec, chunk):
    wav = sound(2, 28)
    codes = codec.encode(wav, chunk=28)
    assert len(codes.unique()) > 8
    state = codec.init_state(2)
    assert (torch.cat([codec.encode_step(w, state) for w in wav.split(chunk * FRAME, -1)], -1) == codes).all()
    y = codec.decode(codes, chunk=28)
    state = codec.init_state(2)
    parts = torch.cat([codec.decode_step(c, state) for c in codes.split(chunk, -1)], -1)
    assert (parts - y).abs().max() < 1e-5 * y.abs().max()


def test_streams_of_one_batch_may_start_at_different_times(codec):
    a, b = sound(1, 12, 1), sound(1, 12, 2)
    state, fresh = codec.init_state(2), codec.init_state(2)
    got = []
    for t in range(12):
        if t == 5:  # the second member begins anew
            for s, f in zip(tensors(state), tensors(fresh)):
                s[1] = f[1]
        second = b[..., (t - 5) * FRAME:(t - 4) * FRAME] if t >= 5 else torch.randn(1, 1, FRAME)
        got.append(codec.encode_step(torch.cat([a[..., t * FRAME:(t + 1) * FRAME], second]), state))
    got = torch.cat(got, -1)
    assert (got[:1] == codec.encode(a)).all()
    assert (got[1:, :, 5:] == codec.encode(b)[..., :7]).all()


def test_the_state_does_not_grow(codec):
    state = codec.init_state(1)
    size = [t.shape for t in tensors(state)]
    for w in sound(1, 30).split(FRAME, -1):
        codec.decode_step(codec.encode_step(w, state), state)
    assert [t.shape for t in tensors(state)] == size


def test_what_comes_later_changes_nothing_before(codec):
    wav = sound(1, 10)
    other = wav.clone()
    other[..., 6 * FRAME:] = 0
    assert (codec.encode(wav)[..., :6] == codec.encode(other)[..., :6]).all()


def test_the_end_is_padded_to_a_whole_frame(codec):
    assert codec.encode(sound(1, 2)[..., :FRAME + 1]).shape == (1, 8, 2)


def test_the_windows_of_the_spectral_front_end_sum_to_one():
    """Without a network between analysis and synthesis, sound passes unchanged."""
    synthesis, x = mimi.InverseFourier(4, 240), sound(1, 3)[0]
    state = synthesis.init_state(1)
    spectrum = torch.fft.rfft(F.pad(x, (720, 0)).unfold(-1, mimi.WINDOW, 240) * synthesis.window)
    y = torch.cat([synthesis.overlap(s, state) for s in spectrum.split([1, 2, 5, 16], 1)], -1)
    assert torch.allclose(y[:, 720:], x[:, :-720], atol=1e-5)  # a window is laid down where its frame begins


def test_a_codebook_learns_where_its_vectors_are():
    torch.manual_seed(0)
    book, centres = mimi.Codebook(8, 2), torch.tensor([[5.0, 5], [-5, 5], [5, -5], [-5, -5]])
    for _ in range(200):
        x = centres.repeat(25, 1) + torch.randn(100, 2) * 0.1
        book.learn(x, book.nearest(x))
    distance = torch.cdist(centres, book.embedding).min(1).values
    assert distance.max() < 0.3


def test_training_passes_gradients_to_everything():
    torch.manual_seed(0)
    m = Mimi(SMALL["spectral"])
    y, semantic, commitment = m(sound(2, 6), torch.tensor([8, 3]))
    (y.square().mean() + semantic.square().mean() + commitment).backward()
    missing = [n for n, p in m.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert missing == []


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_resampling_keeps_a_tone(rate):
    f = 1000.0
    x = torch.sin(2 * math.pi * f * torch.arange(rate) / rate)[None]
    y = resample(x, rate)[0]
    assert len(y) == SAMPLE_RATE
    right = torch.sin(2 * math.pi * f * torch.arange(SAMPLE_RATE) / SAMPLE_RATE)
    assert (y - right)[3000:-3000].abs().max() < 1e-3


def test_audio_round_trip_stereo_and_mono(tmp_path):
    x = sound(2, 1)[:, 0].clamp(-1, 1).numpy()
    write_audio(str(tmp_path / "x.flac"), x)
    assert np.allclose(read_audio(str(tmp_path / "x.flac"), mono=False), x, atol=1e-4)
    assert np.allclose(read_audio(str(tmp_path / "x.flac")), x.mean(0), atol=1e-4)


def bad_file(folder, kind):
    path = folder / "bad.wav"
    if kind == "missing":
        return path
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(b"this is not sound" * 100)
    elif kind == "no frames":
        soundfile.write(path, np.zeros((0, 1)), 24000)
    elif kind == "not finite":
        soundfile.write(path, np.array([0.0, np.nan, 1.0]), 24000, subtype="FLOAT")
    elif kind == "cut off":
        soundfile.write(path, np.zeros(24000), 24000)
        path.write_bytes(path.read_bytes()[:20000])
    elif kind == "cut off in the header":
        soundfile.write(path, np.zeros(24000), 24000)
        path.write_bytes(path.read_bytes()[:30])
    return path


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "garbage", "no frames", "not finite", "cut off",
                                  "cut off in the header"])
def test_bad_sound_files_are_one_clear_error(tmp_path, kind):
    path = bad_file(tmp_path, kind)
    with pytest.raises((ValueError, OSError), match="bad.wav") as error:
        read_audio(str(path))
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "x.wav")
    write_audio(path, np.zeros(100))
    before = open(path, "rb").read()
    with pytest.raises(RuntimeError):
        with mimi.replace_when_done(path) as temporary:
            open(temporary, "w").write("half")
            raise RuntimeError("no")
    assert open(path, "rb").read() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.wav"]


def test_an_unknown_sound_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x.xyz"):
        write_audio(str(tmp_path / "x.xyz"), np.zeros(10))


def test_wav_headers_of_odd_sizes_are_read(tmp_path):
    """A chunk of odd length before the data, as phones write them."""
    data = (np.sin(np.arange(800) / 10) * 8000).astype("<i2").tobytes()
    fmt = struct.pack("<HHIIHH", 1, 1, 8000, 16000, 2, 16)
    body = b"WAVE" + b"LIST" + struct.pack("<I", 3) + b"abc\0" + b"fmt " + struct.pack("<I", 16) + fmt
    body += b"data" + struct.pack("<I", len(data)) + data
    (tmp_path / "x.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert len(read_audio(str(tmp_path / "x.wav"))) == 2400
