"""Speech synthesis: espeak-ng and, where they are installed, flite and festival; or any other command.

    text, voice, style --synthesiser--> samples --trim, normalise--> 24 kHz, -23 dB

A voice is one of espeak-ng's, flite:NAME, festival:NAME, or tts:NAME for the command of --tts.
"""
import _ctypes
import ctypes
import multiprocessing
import os
import shlex
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from files.audio import SAMPLE_RATE, read_audio, resample, write_audio


class Style(NamedTuple):
    """How something is said, in espeak-ng's units."""
    speed: int = 165  # words a minute
    pitch: int = 50  # 0 to 99
    range: int = 50  # 0 to 99: from monotonous to lively


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

    def speak(self, text, voice, style):
        """float32 samples (N,) at 24 kHz."""
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
            for parameter, value in ((1, style.speed), (3, style.pitch), (4, style.range)):
                lib.espeak_SetParameter(parameter, value, 0)
            data = text.encode()
            lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)
            lib.espeak_Synchronize()
            lib.espeak_Terminate()
        finally:
            (_ctypes.FreeLibrary if os.name == "nt" else _ctypes.dlclose)(lib._handle)
        x = torch.from_numpy(np.concatenate(parts).astype(np.float32) / 32768)
        return resample(x[None], self.rate)[0].numpy()


class Command:
    """A synthesiser that is a command which writes an audio file."""

    def run(self, words, out):
        """What the command `words` writes to the file `out`: float32 samples (N,) at 24 kHz."""
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode or not os.path.exists(out):
            reason = done.stderr.strip()[-300:] or "it wrote no file"
            raise ValueError(f"{shlex.join(words)} failed: {reason}")
        return read_audio(out).numpy()


class Flite(Command):
    """flite's voices; all but kal and kal16 are cut from recordings of people. They have no pitch to set."""

    def speak(self, text, voice, style):
        with tempfile.TemporaryDirectory() as folder:
            out, stretch = os.path.join(folder, "speech.wav"), Style().speed / style.speed
            return self.run(["flite", "-voice", voice, "--setf", f"duration_stretch={stretch:.3f}",
                             "-t", text, "-o", out], out)


class OtherSynthesiser(Command):
    """Any other synthesiser: a command with {text}, {voice} and {out}, the audio file that it must write."""

    def __init__(self, template):
        self.words = shlex.split(template)
        for part in ("{text}", "{out}"):
            if not any(part in w for w in self.words):
                raise ValueError(f"--tts {template!r}: {part} does not occur in it")

    def speak(self, text, voice, style):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "speech.wav")
            words = self.words
            for name, value in (("{text}", text), ("{voice}", voice), ("{out}", out)):
                words = [w.replace(name, value) for w in words]
            return self.run(words, out)


class Festival(Command):
    """festival's voices, such as kal_diphone. Slow: it starts anew for each utterance (1.5 s)."""

    def speak(self, text, voice, style):
        with tempfile.TemporaryDirectory() as folder:
            out, source = os.path.join(folder, "speech.wav"), os.path.join(folder, "text")
            with open(source, "w", encoding="utf-8") as f:
                f.write(text)
            stretch = f"(Parameter.set 'Duration_Stretch {Style().speed / style.speed:.3f})"
            return self.run(["text2wave", "-eval", f"(voice_{voice})", "-eval", stretch, source, "-o", out],
                            out)


PROGRAMS = {"flite": "flite", "festival": "text2wave"}  # synthesiser -> its command


class Several:
    """Several synthesisers: the voice tells which one speaks."""

    def __init__(self, tts=None):
        self.espeak = Espeak()
        self.others = {"flite": Flite(), "festival": Festival()}
        if tts:
            self.others["tts"] = OtherSynthesiser(tts)

    def speak(self, text, voice, style):
        name, colon, rest = voice.partition(":")
        if not colon:
            return self.espeak.speak(text, voice, style)
        if name not in self.others:
            raise ValueError(f"voice {voice}: there is no synthesiser {name}; known are "
                             f"{', '.join(self.others)} (tts is the command of --tts)")
        if name in PROGRAMS and not is_installed(voice):
            raise ValueError(f"voice {voice}: {PROGRAMS[name]} is not installed")
        return self.others[name].speak(text, rest, style)


def get_synthesiser(tts, others=()):
    """tts: a command that speaks everything or, if others are given, only the voices that begin with tts:"""
    return OtherSynthesiser(tts) if tts and not others else Several(tts)


def is_installed(voice):
    """Whether the program of a voice is on this machine."""
    name = voice.partition(":")[0]
    return bool(shutil.which(PROGRAMS[name])) if name in PROGRAMS else True


def speak(synthesiser, parts, pauses, voice, style=Style()):
    """Speak parts of text with pauses (seconds) between them, trimmed and normalised: samples at 24 kHz, and
    the second at which each part ends."""
    parts = [trim(synthesiser.speak(text, voice, style)) for text in parts]
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


def trim_noisy(x, floor=-28.0, margin=0.04):
    """The same for a recording with noise: without what is softer by 28 dB than its loudest hundredth of a
    second, but with `margin` seconds of it. Empty if all of it is silent."""
    window, n = SAMPLE_RATE // 100, round(margin * SAMPLE_RATE)
    power = np.square(np.pad(x, (0, -len(x) % window))).reshape(-1, window).mean(1)
    loud = np.flatnonzero(power > power.max(initial=0) * 10 ** (floor / 10))
    return x[max(0, loud[0] * window - n):(loud[-1] + 1) * window + n] if len(loud) else x[:0]


def normalise(x, db=-23.0):
    """To this level (root mean square), without clipping."""
    return x * min(10 ** (db / 20) / (np.sqrt(np.mean(x * x)) + 1e-6), 0.99 / np.abs(x).max())


def start_worker(synthesiser):
    global SYNTHESISER  # of this process
    torch.set_num_threads(1)
    SYNTHESISER = synthesiser


def speak_to_file(job):
    path, *what = job
    x, ends = speak(SYNTHESISER, *what)
    write_audio(path, x, flush=False)
    return ends


def speak_all(jobs, what, synthesiser):
    """Speak every job (path, texts, pauses between them, voice, style) to its file, on all cores. Returns
    for each the seconds at which its parts end."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"  # Windows
    with multiprocessing.get_context(method).Pool(os.cpu_count(), start_worker, (synthesiser,)) as pool:
        return list(tqdm(pool.imap(speak_to_file, jobs, chunksize=8), what, len(jobs), unit="clip"))
