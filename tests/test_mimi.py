"""The codec: streaming equals offline, the quantiser, and files that are not what they say."""
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import mimi
from conftest import run
from files.audio import SAMPLE_RATE, read_audio
from files.spectrogram import WINDOW, InverseFourier, log_spectral_distance, mel_filters
from live.graph import capture
from mimi import FRAME, Mimi, MimiConfig, restore, tensors
from test_mimi_reference import GOLDEN, audio as reference_audio
from test_mimi_reference import SMALL as GOLDEN_CONFIG
from toy.codec import ema_update, reconstruct

SMALL = {
    "seanet": MimiConfig(width=8, dim=32, encoder_layers=2, decoder_layers=2, heads=4, mlp=64, context=9,
                         codebook_size=32, codebook_dim=16),
    "spectral": MimiConfig("spectral", 24, (240, 4), 2, dim=32, encoder_layers=1, decoder_layers=2, heads=4,
                           mlp=64, context=9, codebook_size=32, codebook_dim=16),
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


def noise(B, frames, seed=0):
    return torch.randn(B, 1, frames * FRAME, generator=torch.Generator().manual_seed(seed)) * 0.2


def test_the_full_size_is_mimis():
    with torch.device("meta"):
        m = Mimi(MimiConfig(codebooks=32))
    assert sum(p.numel() for p in m.parameters()) == 79_308_609


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_streaming_equals_offline(codec, chunk):
    wav = noise(2, 28)
    codes = codec.encode(wav, chunk=28)
    assert len(codes.unique()) > 8
    state = codec.init_state(2)
    assert (torch.cat([codec.encode_step(w, state) for w in wav.split(chunk * FRAME, -1)], -1) == codes).all()
    y = codec.decode(codes, chunk=28)
    state = codec.init_state(2)
    parts = torch.cat([codec.decode_step(c, state) for c in codes.split(chunk, -1)], -1)
    assert (parts - y).abs().max() < 1e-5 * y.abs().max()


def test_streams_of_one_batch_may_start_at_different_times(codec):
    a, b = noise(1, 12, 1), noise(1, 12, 2)
    state, codes, audio = codec.init_state(2), [], []
    for t in range(12):
        if t == 5:
            restore(state, [1], codec.init_state(1))
        second = b[..., (t - 5) * FRAME:(t - 4) * FRAME] if t >= 5 else torch.randn(1, 1, FRAME)
        codes.append(codec.encode_step(torch.cat([a[..., t * FRAME:(t + 1) * FRAME], second]), state))
        audio.append(codec.decode_step(codes[-1], state))
    codes, audio = torch.cat(codes, -1), torch.cat(audio, -1)
    assert (codes[:1] == codec.encode(a)).all()
    assert (codes[1:, :, 5:] == codec.encode(b)[..., :7]).all()
    assert torch.allclose(audio[:1], codec.decode(codes[:1]), atol=1e-5)
    assert torch.allclose(audio[1:, :, 5 * FRAME:], codec.decode(codes[1:, :, 5:]), atol=1e-5)


def test_after_a_reset_all_is_as_at_first(codec):
    state = codec.init_state(2)
    first = codec.encode_step(noise(2, 3), state)
    codec.encode_step(noise(2, 20, 1), state)
    restore(state, [0, 1], codec.init_state(2))
    assert (codec.encode_step(noise(2, 3), state) == first).all()


def test_after_ten_minutes(codec):
    """The state does not grow, and the last seconds, frame by frame, are those of one offline pass."""
    wav = noise(1, 7500)
    codes = codec.encode(wav, chunk=500)
    y = codec.decode(codes, chunk=500)
    state = codec.init_state(1)
    size = [t.shape for t in tensors(state)]
    for w, c in zip(wav[..., :7450 * FRAME].split(149 * FRAME, -1), codes[..., :7450].split(149, -1)):
        codec.encode_step(w, state)
        codec.decode_step(c, state)
    for t in range(7450, 7500):
        c = codec.encode_step(wav[..., t * FRAME:(t + 1) * FRAME], state)
        assert (c[..., 0] == codes[..., t]).all()
        difference = codec.decode_step(c, state) - y[..., t * FRAME:(t + 1) * FRAME]
        assert difference.abs().max() < 1e-4 * y.abs().max()
    assert [t.shape for t in tensors(state)] == size


@pytest.mark.parametrize("hours", [1, 1000])
def test_after_hours_positions_are_as_exact_as_at_first(hours):
    torch.manual_seed(0)
    layers = mimi.Transformer(MimiConfig(dim=32, heads=4, mlp=64, context=24), 1)
    early, late = layers.init_state(1), layers.init_state(1)
    late["position"] += hours * 90_000
    with torch.no_grad():
        layers.layers[0].in_proj.weight.mul_(5)
        layers.layers[0].scale1.fill_(1.0)
        for _ in range(30):
            x = torch.randn(1, 32, 2)
            a, b = layers(x, early), layers(x, late)
    assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("K", [1, 2, 8])
def test_fewer_codebooks(codec, K):
    wav = noise(1, 4)
    codes = codec.encode(wav)
    codec.keep_codebooks(K)
    assert (codec.encode(wav) == codes[:, :K]).all() and codec.codebooks().shape[0] == K
    assert codec.decode(codes[:, :K]).shape == (1, 1, 4 * FRAME)


def test_half_precision(codec):
    """bfloat16 by autocast: the quantiser keeps all digits, so most codes stay."""
    wav = noise(2, 20)
    codes, y = codec.encode(wav), codec.decode(codec.encode(wav))
    with torch.autocast("cpu", torch.bfloat16):
        assert (codec.encode(wav)[:, 0] == codes[:, 0]).float().mean() > 0.8
        assert (codec.decode(codes).float() - y).abs().mean() < 0.05 * y.abs().mean()


@pytest.mark.slow
def test_a_compiled_step_is_the_same(codec):
    wav, state, state_c = noise(1, 4), codec.init_state(1), codec.init_state(1)
    encode, decode = (torch.compile(step, fullgraph=True) for step in (codec.encode_step, codec.decode_step))
    for w in wav.split(FRAME, -1):
        codes = codec.encode_step(w, state)
        assert (encode(w, state_c) == codes).float().mean() > 0.99
        assert torch.allclose(decode(codes, state_c), codec.decode_step(codes, state), atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_is_the_same(codec):
    codec.cuda()
    wav = noise(2, 8).cuda()
    codes, state = codec.encode(wav), codec.init_state(2)
    step = capture(lambda w: codec.encode_step(w, state), wav[..., :FRAME].clone(), state)
    got = torch.cat([step(w).clone() for w in wav.split(FRAME, -1)], -1)
    assert (got == codes).float().mean() > 0.99


# ------------------------------------------------------------------------------------------------------------
# published weights (test_mimi_reference.py compares with the reference implementations)


@pytest.fixture(params=["kyutai", "transformers"])
def published(request):
    pytest.importorskip("safetensors")
    return f"{GOLDEN}/mimi_{request.param}/"


def test_golden_codes_and_audio(published):
    golden = np.load(published + "golden.npz")
    codec = Mimi.from_pretrained(published + "model.safetensors", 8, GOLDEN_CONFIG)
    codes = torch.from_numpy(golden["codes"].astype(np.int64))[None]
    assert codes.shape == (1, 8, 150)
    assert (codec.encode(reference_audio(150)) == codes).float().mean() >= 0.999
    right = torch.from_numpy(golden["sound"]) / 32767.0
    assert (codec.decode(codes)[0, 0, ::7] / golden["peak"].item() - right).abs().max() < 1e-4


def change(weights, how):
    name = next(n for n in weights if how["where"] in n)
    tensor = weights.pop(name)
    if "to" in how:
        weights[name.replace(how["where"], how["to"])] = tensor
    if "slice" in how:
        weights[name] = tensor[:how["slice"]].clone()
    if "copy" in how:
        weights[name] = tensor
        weights[name.replace(how["where"], how["copy"])] = tensor.clone()
    return name


@pytest.mark.parametrize("how, says", [
    ({"where": "encoder_transformer", "to": "encoder_former"}, "unknown tensor encoder_former"),
    ({"where": "decoder_transformer"}, "no tensor for decoder.1"),
    ({"where": "quantizer", "slice": 3}, "quantizer.* is \\(3"),
    ({"where": "upsample.conv", "copy": "upsample.conv.conv"}, "the same tensor twice"),
    ({"where": "usage", "slice": 0}, "is \\(0,\\), not"),
])
def test_every_tensor_is_accounted_for(published, how, says, tmp_path):
    from safetensors.torch import load_file, save_file
    weights = load_file(published + "model.safetensors")
    change(weights, how)
    save_file(weights, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=says) as error:
        Mimi.from_pretrained(str(tmp_path / "changed.safetensors"), 8, GOLDEN_CONFIG)
    assert "changed.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_or_missing_file_of_weights(published, tmp_path):
    path = str(tmp_path / "cut.safetensors")
    open(path, "wb").write(open(published + "model.safetensors", "rb").read()[:5000])
    with pytest.raises(ValueError, match="cut.safetensors: not a safetensors file, or cut off"):
        Mimi.from_pretrained(path, 8, GOLDEN_CONFIG)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Mimi.from_pretrained("nowhere.safetensors")
    with pytest.raises(ValueError, match="1 to 8 codebooks"):
        Mimi.from_pretrained(published + "model.safetensors", 9, GOLDEN_CONFIG)


def test_without_the_safetensors_package(published, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ValueError, match="extra 'weights'"):
        Mimi.from_pretrained(published + "model.safetensors")


# ------------------------------------------------------------------------------------------------------------
# a file through the codec


def test_a_file_through_the_codec(world, tmp_path):
    rate = 8000  # a stereo telephone recording, not a whole number of frames
    t = np.arange(int(1.33 * rate)) / rate
    soundfile.write(tmp_path / "in.wav", np.stack([np.sin(2000 * t), np.sin(900 * t)], 1) * 0.3, rate)
    code, out, err = run("mimi.py", tmp_path / "in.wav", tmp_path / "out.flac",
                         "--checkpoint", world / "codec.pt", "--codebooks", 2)
    assert code == 0, err
    assert "125 bits per second (2 codebooks of 32)" in out and "times real time" in out and "dB" in out
    assert len(read_audio(str(tmp_path / "out.flac"))) == round(1.33 * SAMPLE_RATE)


@pytest.mark.parametrize("arguments, says", [
    (["missing.wav", "out.wav"], "missing.wav: no such file"),
    (["in.wav", "out.wav", "--codebooks", 9], "has 1 to 8"),
    (["in.wav", "out.xyz", "--checkpoint", "nowhere.pt"], "cannot write this kind of file"),  # first of all
    (["in.wav", "out.wav", "--checkpoint", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
])
def test_what_the_command_refuses(arguments, says, world, tmp_path):
    soundfile.write(tmp_path / "in.wav", np.zeros(2000), SAMPLE_RATE)
    arguments = [tmp_path / a if str(a).endswith(("wav", "xyz")) else a for a in arguments]
    if "--checkpoint" not in arguments:
        arguments += ["--checkpoint", world / "codec.pt"]
    code, out, err = run("mimi.py", *arguments)
    assert code == 1 and says in err and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["in.wav"]


def test_the_benchmark_says_in_one_line_what_it_misses(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "moshi", None)
    code, _, err = run("bench_mimi.py")
    assert code == 1 and "needs the package moshi; `make slow` installs it" in err and err.count("\n") == 1


def test_log_spectral_distance():
    x = noise(1, 30)[0, 0]
    assert log_spectral_distance(x, x) == 0
    assert abs(log_spectral_distance(x, 0.1 * x) - 20) < 0.5
    assert abs(log_spectral_distance(x, 0.1 * x, mel_filters(1024)) - 20) < 0.5


def test_what_comes_later_changes_nothing_before(codec):
    wav = noise(1, 10)
    other = wav.clone()
    other[..., 6 * FRAME:] = 0
    assert (codec.encode(wav)[..., :6] == codec.encode(other)[..., :6]).all()


def test_the_end_is_padded_to_a_whole_frame(codec):
    assert codec.encode(noise(1, 2)[..., :FRAME + 1]).shape == (1, 8, 2)


def test_the_windows_of_the_spectral_front_end_sum_to_one():
    """Without a network between analysis and synthesis, the waveform passes unchanged."""
    synthesis, x = InverseFourier(4, 240), noise(1, 3)[0]
    state = synthesis.init_state(1)
    spectrum = torch.fft.rfft(F.pad(x, (720, 0)).unfold(-1, WINDOW, 240) * synthesis.window)
    y = torch.cat([synthesis.overlap_add(s, state) for s in spectrum.split([1, 2, 5, 16], 1)], -1)
    assert torch.allclose(y[:, 720:], x[:, :-720], atol=1e-5)  # a window is added where its frame begins


def test_a_codebook_learns_where_its_vectors_are():
    torch.manual_seed(0)
    book, centres = mimi.Codebook(8, 2), torch.tensor([[5.0, 5], [-5, 5], [5, -5], [-5, -5]])
    for _ in range(200):
        x = centres.repeat(25, 1) + torch.randn(100, 2) * 0.1
        ema_update(book, x, book.nearest(x))
    distance = torch.cdist(centres, book.embedding).min(1).values
    assert distance.max() < 0.3


def test_training_passes_gradients_to_everything():
    torch.manual_seed(0)
    m = Mimi(SMALL["spectral"])
    y, semantic, commitment, _ = reconstruct(m, noise(2, 6), torch.tensor([8, 3]), torch.tensor([True, True]))
    (y.square().mean() + semantic.square().mean() + commitment).backward()
    missing = [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_only_some_clips_of_a_batch_may_be_decoded():
    m, wav, depth = Mimi(SMALL["spectral"]), noise(3, 6), torch.tensor([8, 8, 8])
    whole, semantic, *_ = reconstruct(m, wav, depth, torch.tensor([True] * 3))
    some, semantic2, *_ = reconstruct(m, wav, depth, torch.tensor([False, True, False]))
    assert torch.allclose(some, whole[1:2], atol=1e-5) and torch.equal(semantic, semantic2)
    assert reconstruct(m, wav, depth, torch.tensor([False] * 3))[0].shape == (0, 1, wav.shape[-1])
