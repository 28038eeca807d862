"""Files: any rate, and what is not what it says."""
import math
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from conftest import ROOT
from files.atomic import move_folder, replace_when_done
from files.audio import SAMPLE_RATE, read_audio, resample, resampling_filters, write_audio
from files.manifest import seconds_of
from files.processes import in_processes


@pytest.mark.parametrize("rate", [8000, 11025, 11127, 16000, 22050, 44100, 44101, 48000, 192_001, 768_000])
def test_resampling_keeps_a_tone(rate):
    """Odd rates too, without gigabytes of filters."""
    f = 1000.0
    x = torch.sin(2 * math.pi * f * torch.arange(rate) / rate)[None]
    y = resample(x, rate)[0]
    assert abs(len(y) - SAMPLE_RATE) <= 1 and resampling_filters(rate)[0].numel() < 4e6
    y = y[:SAMPLE_RATE]
    expected = torch.sin(2 * math.pi * f * torch.arange(len(y)) / SAMPLE_RATE)
    exact = rate * 960 % SAMPLE_RATE == 0 or rate == 11025
    assert (y - expected)[3000:-3000].abs().max() < (1e-3 if exact else 0.04)  # a phase that drifts slowly


def test_audio_round_trip_stereo_and_mono(tmp_path):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 1920))
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
        path.write_bytes(b"this is not audio" * 100)
    elif kind == "no frames":
        soundfile.write(path, np.zeros((0, 1)), 24000)
    elif kind == "not finite":
        soundfile.write(path, np.array([0.0, np.nan, 1.0]), 24000, subtype="FLOAT")
    elif kind == "too loud":
        soundfile.write(path, np.array([0.0, 3e38, 1.0]), 24000, subtype="FLOAT")
    elif kind in ("too slow", "too fast"):
        soundfile.write(path, np.zeros(100), 500 if kind == "too slow" else 800_000)
    elif kind == "a promise":  # of 2^36 - 1 samples, in the header of a FLAC file
        soundfile.write(path, np.zeros(24000), 24000, format="FLAC")
        data = bytearray(path.read_bytes())
        data[21] |= 15
        data[22:26] = b"\xff" * 4
        path.write_bytes(data)
    elif kind == "cut off":
        soundfile.write(path, np.zeros(24000), 24000)
        path.write_bytes(path.read_bytes()[:20000])
    elif kind == "cut off in the header":
        soundfile.write(path, np.zeros(24000), 24000)
        path.write_bytes(path.read_bytes()[:30])
    return path


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "garbage", "no frames", "not finite",
                                  "too loud", "too slow", "too fast", "a promise", "cut off",
                                  "cut off in the header"])
def test_bad_audio_files_are_one_clear_error(tmp_path, kind):
    path = bad_file(tmp_path, kind)
    with pytest.raises((ValueError, OSError), match="bad.wav") as error:
        read_audio(str(path))
    assert "\n" not in str(error.value)


def test_the_length_of_a_file_that_is_no_audio_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="bad.wav: not an audio file"):
        seconds_of(str(bad_file(tmp_path, "garbage")), 0.0, None)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "x.wav")
    write_audio(path, np.zeros(100))
    before = open(path, "rb").read()
    with pytest.raises(RuntimeError):
        with replace_when_done(path) as temporary:
            open(temporary, "w").write("half")
            raise RuntimeError("no")
    assert open(path, "rb").read() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.wav"]
    with pytest.raises(FileNotFoundError), replace_when_done(path):
        pass  # nothing was written
    assert open(path, "rb").read() == before


def test_what_replaces_a_file_is_on_the_disk_first(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(str(b)), replace(a, b)))
    path = str(tmp_path / "x.txt")
    with replace_when_done(path) as temporary, open(temporary, "w") as f:
        f.write("whole")
    assert done == [5, path] and open(path).read() == "whole"
    monkeypatch.setattr(os, "sync", lambda: done.append("sync"), raising=False)
    monkeypatch.setattr(os, "rename", lambda a, b: done.append(str(b)))
    move_folder(str(tmp_path / "work"), str(tmp_path / "out"))
    assert done[2:] == ["sync", str(tmp_path / "out")]


def test_two_containers_with_equal_pids_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = str(tmp_path / "x.txt")
    with replace_when_done(path) as a, replace_when_done(path) as b:
        assert a != b and os.path.dirname(a) == os.path.dirname(b) == str(tmp_path)
        for name in (a, b):
            open(name, "w").write(name)
    assert open(path).read() == a and os.listdir(tmp_path) == ["x.txt"]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    with replace_when_done(str(tmp_path / "a")) as temporary:
        open(temporary, "w").close()
    open(tmp_path / "b", "w").close()
    assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "b").st_mode


def test_an_unknown_audio_format_is_refused(tmp_path):
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


def test_a_long_ogg_file_is_written(tmp_path):
    """In blocks: libsndfile overflows its stack with two minutes at once."""
    write_audio(str(tmp_path / "long.ogg"), torch.zeros(2, 120 * SAMPLE_RATE))
    assert read_audio(str(tmp_path / "long.ogg"), mono=False).shape == (2, 120 * SAMPLE_RATE)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_work_in_processes(method):
    work = lambda function, jobs: list(in_processes(function, jobs, 2, method, int, (), 2, "job {}".format))
    assert work(math.sqrt, [1, 4, 9, 16, 25]) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="math domain error"):
        work(math.sqrt, [1, 4, -9])
    with pytest.raises(ValueError, match="a process died.* at job 9, or at one of the next"):
        work(os._exit, [9, 9, 9])


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("end, code", [("killed", -signal.SIGKILL), ("Ctrl-C", -signal.SIGINT), ("error", 1)])
def test_processes_end_with_their_parent(method, end, code):
    """A wait of hours is not waited for."""
    first = -1 if end == "error" else 0
    text = f"""import signal, time
from files.processes import in_processes
if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    for _ in in_processes(time.sleep, [{first}] + 40 * [9999], 2, '{method}', int, ()):
        print('at work')
"""
    process = subprocess.Popen([sys.executable, "-uc", text], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    if end != "error":
        process.stdout.readline()
        process.send_signal(-code)
    _, err = process.communicate(timeout=60)  # until all who could write to it have ended
    assert process.returncode == code and b"During handling" not in err and b"in thread" not in err
