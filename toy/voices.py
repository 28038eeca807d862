"""Speech synthesis: espeak-ng, or any other command.

    text, voice, speed, pitch --synthesiser--> samples --trim, normalise--> 24 kHz, -23 dB
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


class Espeak:
    """espeak-ng by ctypes. The library keeps hidden state from one call to the next, so it is loaded anew for
    each utterance (4 ms): the same arguments always give the same samples."""

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
            (_ctypes.FreeLibrary if os.name == "nt" else _ctypes.dlclose)(lib._handle)
        return np.concatenate(parts).astype(np.float32) / 32768


class OtherSynthesiser:
    """Any other synthesiser: a command with {text}, {voice} and {out}, the audio file that it must write."""

    rate = SAMPLE_RATE

    def __init__(self, template):
        self.words = shlex.split(template)
        for part in ("{text}", "{out}"):
            if not any(part in w for w in self.words):
                raise ValueError(f"--tts {template!r}: {part} does not occur in it")

    def speak(self, text, voice, speed, pitch):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "speech.wav")
            words = self.words
            for name, value in (("{text}", text), ("{voice}", voice), ("{out}", out)):
                words = [w.replace(name, value) for w in words]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode or not os.path.exists(out):
                reason = done.stderr.strip()[-300:] or "it wrote no file"
                raise ValueError(f"--tts: {shlex.join(words)} failed: {reason}")
            return read_audio(out).numpy()


def get_synthesiser(tts):
    return OtherSynthesiser(tts) if tts else Espeak()


def speak(synthesiser, parts, pauses, voice, speed, pitch):
    """Speak parts of text with pauses (seconds) between them, trimmed and normalised: samples at 24 kHz, and
    the second at which each part ends."""
    parts = [torch.from_numpy(synthesiser.speak(text, voice, speed, pitch)) for text in parts]
    parts = [trim(resample(x[None], synthesiser.rate)[0].numpy()) for x in parts]
    x = normalise(np.concatenate(parts))
    out, ends = [], []
    for part, pause in zip(np.split(x, np.cumsum([len(p) for p in parts])[:-1]), [*pauses, 0.0], strict=True):
        out += [part, np.zeros(round(pause * SAMPLE_RATE), np.float32)]
        ends.append(sum(map(len, out[:-1])) / SAMPLE_RATE)
    return np.concatenate(out), ends


def trim(x, floor=0.01):
    """Without the silence at both ends: what is below this share of the peak."""
    loud = np.flatnonzero(np.abs(x) > floor * np.abs(x).max())
    if not len(loud):
        raise ValueError("the synthesiser gave silence")
    return x[loud[0]:loud[-1] + 1]


def normalise(x, db=-23.0):
    """To this level (root mean square), without clipping."""
    return x * min(10 ** (db / 20) / (np.sqrt(np.mean(x * x)) + 1e-6), 0.99 / np.abs(x).max())


def start_worker(tts):
    global SYNTHESISER  # of this process
    torch.set_num_threads(1)
    SYNTHESISER = get_synthesiser(tts)


def speak_to_file(job):
    path, *what = job
    x, ends = speak(SYNTHESISER, *what)
    write_audio(path, x, flush=False)
    return ends


def speak_all(jobs, what, tts):
    """Speak every job (path, texts, pauses between them, voice, speed, pitch) to its file, on all cores.
    Returns for each the seconds at which its parts end."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"  # Windows
    with multiprocessing.get_context(method).Pool(os.cpu_count(), start_worker, (tts,)) as pool:
        return list(tqdm(pool.imap(speak_to_file, jobs, chunksize=8), what, len(jobs), unit="clip"))
