"""A conversation through the microphone and the loudspeaker of this machine, in the terminal."""
import collections
import contextlib
import threading

import numpy as np

from files.audio import SAMPLE_RATE
from live.engine import QUEUE, Engine
from live.jitter import JitterBuffer
from live.recordings import find_recordings, level_of, problem_with, save_recording
from live.transcript import Transcript
from mimi import FRAME
from streams import FRAME_RATE
from toy.voices import trim_noisy

LOUD = 0.0056  # root mean square of a frame of speech: -45 dB
SILENT = 5.0  # seconds without a call from the sound card, after which it counts as gone
GONE = "the microphone or the loudspeaker has gone away; connect it and start again"


class SoundCard:
    """What the callback's thread and the model's thread share, under one lock."""

    def __init__(self):
        self.heard = collections.deque(maxlen=QUEUE)  # when full, it drops the oldest frame
        self.playout, self.finished, self.changed = JitterBuffer(), False, threading.Condition()

    def callback(self, indata, outdata, frames, clock, status):
        """sounddevice calls this every 80 ms, in a thread of its own."""
        with self.changed:
            self.heard.append(indata[:, 0].copy())
            outdata[:, 0] = self.playout.pop()[0]
            self.changed.notify()

    def finish(self):
        """sounddevice calls this when the stream has ended, whatever the reason."""
        with self.changed:
            self.finished = True
            self.changed.notify()

    def hear(self):
        """The next frame (1920,). ValueError if the device is gone."""
        with self.changed:
            self.changed.wait_for(lambda: self.heard or self.finished, SILENT)
            if not self.heard:
                raise ValueError(GONE)
            return self.heard.popleft()

    def say(self, t, frame):
        with self.changed:
            self.playout.put(t, frame)


@contextlib.contextmanager
def open_sound_card(card):
    """ValueError if there is no extra, no PortAudio or no device, or if the device goes away."""
    try:
        import sounddevice
    except ImportError:
        raise ValueError("--mic needs the extra 'mic': pip install '.[mic]'") from None
    except OSError:
        raise ValueError("--mic needs the library PortAudio, on Debian: apt install libportaudio2") from None
    opened = False
    try:
        with sounddevice.Stream(SAMPLE_RATE, FRAME, channels=1, dtype="float32", callback=card.callback,
                                finished_callback=card.finish):
            opened = True
            yield
    except sounddevice.PortAudioError as e:
        raise ValueError(GONE if opened else f"no microphone or loudspeaker for 24 kHz: {e}; "
                         "`python -m sounddevice` lists the devices") from None


def talk_to_microphone(duplex, seed):
    """Until Ctrl-C. Raises as open_sound_card does."""
    engine, card = Engine(duplex, 1), SoundCard()
    try:
        with open_sound_card(card):
            print("Talk; Ctrl-C ends. Use headphones, or it hears itself.")
            converse_live(engine, seed, card.hear, card.say)
    except KeyboardInterrupt:
        print()


def record_prompts(folder, prompts):
    """Record those prompts that are not in the folder yet. Raises as open_sound_card does."""
    card = SoundCard()
    with open_sound_card(card):
        record_from(card.hear, folder, prompts)


def record_from(hear, folder, prompts):
    """hear() gives frames (1920,)."""
    recorded = find_recordings(folder)
    missing = [n for n in range(len(prompts)) if n not in recorded]
    print(f"{len(missing)} prompts: read each aloud, then be silent for a second. Ctrl-C ends; what is "
          "recorded stays.")
    for n in missing:
        problem = "begin"
        while problem:
            print(f"\n{n + 1:3} / {len(prompts)}   {prompts[n].text}")
            x = record_until_silent(hear)
            problem = problem_with(x, prompts[n])
            print(f"{problem} Once more." if problem else f"Good, {level_of(x):.0f} dB.")
        save_recording(folder, n, trim_noisy(x, margin=0.3))


def record_until_silent(hear, pause=1.0, longest=12.0):
    """Samples (N,) until someone has spoken and then been silent for `pause` seconds, but not for longer than
    `longest`."""
    frames, quiet, spoken = [], 0, 0
    while len(frames) < longest * FRAME_RATE and not (spoken > 3 and quiet >= pause * FRAME_RATE):
        frames.append(hear())
        loud = np.square(frames[-1]).mean() > LOUD ** 2
        spoken, quiet = spoken + loud, 0 if loud else quiet + 1
    return np.concatenate(frames)


def converse_live(engine, seed, hear, say):
    """A conversation for as long as hear() gives frames (1920,), not None. say(t, frame (1920,)) gets the
    answer to frame t. Prints the monologue as it is written. ValueError if the model's logits are not
    numbers."""
    session, transcript, t = engine.join(seed), Transcript(engine.duplex), 0
    while (frame := hear()) is not None:
        session.hear(frame)
        out = engine.tick()[session]
        if out is None:
            raise ValueError("the model's logits are not numbers; its weights are damaged")
        text, said = out
        if piece := transcript.add(t, text):
            time = f"\n{transcript.pieces[-1]['time']:7.2f} s " if transcript.new_line else ""
            print(time + piece, end="", flush=True)
        say(t, np.asarray(said))
        t += 1
