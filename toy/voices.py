"""Who speaks: synthesisers as functions from text to samples. espeak-ng, or any other command.

    text, voice, speed, pitch  --synthesiser-->  samples  --trim, level-->  speech at 24 kHz, -23 dB, no silence around it
"""
import _ctypes
import ctypes
import multiprocessing
import os
import shlex
import subprocess
import tempfile

import numpy as np
import torch
from tqdm import tqdm

from files.audio import SAMPLE_RATE, read_audio, resample, write_audio
from files.manifest import must_be_new


class Espeak:
    """espeak-ng by ctypes. The library keeps hidden state from one call to the next, so it is loaded anew for each
    utterance (4 ms): the same arguments give the same samples, always."""

    rate = 22_050

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError:
            raise ValueError("speaking needs espeak-ng: pip install espeakng-loader (the extra 'toy'), "
                             "or name another synthesiser with --tts") from None
        self.library, self.data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path().encode()

    def speak(self, text, voice, speed, pitch):
        """float32 samples at self.rate."""
        parts = []

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        def receive(samples, n, _):
            if samples and n:
                parts.append(np.ctypeslib.as_array(samples, (n,)).copy())
            return 0

        lib = ctypes.CDLL(self.library)
        try:
            if lib.espeak_Initialize(2, 0, self.data, 0x8000) != self.rate:
                raise ValueError("espeak-ng could not be started")
            lib.espeak_SetSynthCallback(receive)
            if lib.espeak_SetVoiceByName(voice.encode()):
                raise ValueError(f"espeak-ng knows no voice {voice!r}")
            for parameter, value in ((1, speed), (3, pitch)):
                lib.espeak_SetParameter(parameter, value, 0)
            data = text.encode()
            lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)
            lib.espeak_Synchronize()
            lib.espeak_Terminate()
        finally:
            _ctypes.dlclose(lib._handle)
        return np.concatenate(parts).astype(np.float32) / 32768


class OtherSynthesiser:
    """Any other synthesiser: a command with {text}, {voice} and {out}, the sound file that it shall write."""

    def __init__(self, template):
        self.words = shlex.split(template)
        for part in ("{text}", "{out}"):
            if not any(part in w for w in self.words):
                raise ValueError(f"--tts {template!r}: {part} does not occur in it")

    def speak(self, text, voice, speed, pitch):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "speech.wav")
            words = [w.replace("{text}", text).replace("{voice}", voice).replace("{out}", out) for w in self.words]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode or not os.path.exists(out):
                raise ValueError(f"--tts: {shlex.join(words)} failed: {done.stderr.strip()[-300:] or 'it wrote no file'}")
            return read_audio(out).numpy()

    rate = SAMPLE_RATE


def get_synthesiser(tts):
    return OtherSynthesiser(tts) if tts else Espeak()


def begin_speaking(out, tts):
    global SYNTHESISER  # the processes that speak inherit it
    must_be_new(out)
    SYNTHESISER = get_synthesiser(tts)


def speak(synthesiser, parts, pauses, voice, speed, pitch):
    """Parts of speech with pauses of so many seconds between them, trimmed and levelled: samples at 24 kHz, and the second at
    which each part ends."""
    sounds = [torch.from_numpy(synthesiser.speak(text, voice, speed, pitch)) for text in parts]
    sounds = [trim(resample(x[None], synthesiser.rate)[0].numpy()) for x in sounds]
    loud = level(np.concatenate(sounds))
    out, ends, at = [], [], 0
    for x, pause in zip(sounds, [*pauses, 0.0], strict=True):
        out += [loud[at:at + len(x)], np.zeros(round(pause * SAMPLE_RATE), np.float32)]
        at += len(x)
        ends.append(sum(map(len, out[:-1])) / SAMPLE_RATE)
    return np.concatenate(out), ends


def speak_to_file(job):
    """One line of speech, written; the second at which each of its parts ends."""
    path, *what = job
    sound, ends = speak(SYNTHESISER, *what)
    write_audio(path, sound)
    return ends


def trim(x, floor=0.01):
    """Without the silence at both ends: what stays below a hundredth of the peak."""
    loud = np.flatnonzero(np.abs(x) > floor * np.abs(x).max())
    if not len(loud):
        raise ValueError("the synthesiser gave silence")
    return x[loud[0]:loud[-1] + 1]


def level(x, db=-23.0):
    return x * min(10 ** (db / 20) / (np.sqrt(np.mean(x * x)) + 1e-6), 0.99 / np.abs(x).max())


def speak_all(jobs, what):
    """Speak every job (path, texts, pauses between them, voice, speed, pitch), on all cores; where the parts of each end."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
        return list(tqdm(pool.imap(speak_to_file, jobs, chunksize=8), what, len(jobs), unit="clip"))
