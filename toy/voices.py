"""Speech synthesis: espeak-ng and, where they are installed, flite, festival, mbrola, pico and RHVoice; or
any other command.

    text, voice, style --synthesiser--> samples --trim, normalise--> 24 kHz, -23 dB

A voice is one of espeak-ng's, or SYNTHESISER:NAME, such as flite:rms; tts:NAME for the command of --tts.
"""
import _ctypes
import contextlib
import ctypes
import multiprocessing
import os
import re
import shutil
import tempfile
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from files.audio import SAMPLE_RATE, read_audio, resample, write_audio
from files.command import Command
from files.processes import in_processes


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


# Synthesisers that a machine may have. The text is also on their standard input.
COMMANDS = {
    "flite": "flite -voice {voice} --setf duration_stretch={stretch} -o {out} -t {text}",
    "festival": "text2wave -o {out} -eval (voice_{voice}) "  # slow: it starts anew for each utterance (1.5 s)
                "-eval \"(Parameter.set 'Duration_Stretch {stretch})\"",
    "mbrola": "espeak-ng -v mb-{voice} -s {speed} -p {pitch} -w {out} -- {text}",
    "pico": "pico2wave -l {voice} -w {out} -- {text}",
    "rhvoice": "RHVoice-test -p {voice} -r {percent} -o {out}"}


class SpeakingCommand:
    """A synthesiser that is a command: a template with {out}, the audio file that it must write. It reads the
    text from its standard input, or as {text}; {voice} is the voice. What it can set: {speed} (words a
    minute, 165 is usual), {percent} (of the usual speed), {stretch} (of the usual length), {pitch} (0 to
    99)."""

    def __init__(self, template):
        self.command = Command("--tts", template, ["out"])

    def speak(self, text, voice, style):
        """float32 samples (N,) at 24 kHz."""
        usual = Style().speed
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "speech.wav")
            self.command(text, voice=voice, out=out, speed=style.speed, pitch=style.pitch,
                         percent=round(100 * style.speed / usual), stretch=f"{usual / style.speed:.3f}")
            if not os.path.exists(out):
                raise ValueError(f"{self.command.name} failed: it wrote no file")
            return read_audio(out).numpy()


class Several:
    """Several synthesisers: the voice tells which one speaks."""

    def __init__(self, tts=None):
        self.espeak = Espeak()
        templates = {**COMMANDS, "tts": tts} if tts else COMMANDS
        self.others = {name: SpeakingCommand(template) for name, template in templates.items()}

    def speak(self, text, voice, style):
        name, colon, rest = voice.partition(":")
        if not colon:
            return self.espeak.speak(text, voice, style)
        if name not in self.others:
            raise ValueError(f"voice {voice}: there is no synthesiser {name}; known are "
                             f"{', '.join(self.others)} (tts is the command of --tts)")
        if name in COMMANDS and not re.fullmatch(r"[\w.+-]+", rest):  # not a path or an address to load
            raise ValueError(f"voice {voice[:60]!r}: is no voice's name")
        program = self.others[name].command.words[0]
        if not shutil.which(program):
            raise ValueError(f"voice {voice}: {program} is not installed")
        return self.others[name].speak(text, rest, style)


def voices_named(others, known):
    """--others: names with commas, or "installed" for those of `known` that this machine has."""
    if others == "installed":
        return list(filter(is_installed, known))
    return [voice for voice in others.split(",") if voice]


def get_synthesiser(tts, others=False):
    """tts: a command that speaks everything or, beside others, only the voices that begin with tts:"""
    return SpeakingCommand(tts) if tts and not others else Several(tts)


def is_installed(voice):
    """Whether a voice of COMMANDS is on this machine: whether it can speak."""
    name, _, voice = voice.partition(":")
    synthesiser = SpeakingCommand(COMMANDS[name])
    if not shutil.which(synthesiser.command.words[0]):
        return False
    with contextlib.suppress(ValueError):
        return np.ptp(synthesiser.speak("yes", voice, Style())) > 0
    return False


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
    start_method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"  # Windows
    spoken = in_processes(speak_to_file, jobs, os.cpu_count(), start_method, start_worker, (synthesiser,), 8,
                          lambda job: f"{' '.join(job[1])!r}, voice {job[3]}")
    return list(tqdm(spoken, what, len(jobs), unit="clip"))
