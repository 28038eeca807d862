"""A conversation with the microphone and the loudspeaker of this machine, in the terminal."""
import queue

from files.audio import SAMPLE_RATE
from live.engine import Engine
from live.jitter import Jitter
from live.transcript import Lines, Transcript
from mimi import FRAME


def talk_to_microphone(duplex, seed):
    """Until Ctrl-C. ValueError if there is no extra, no PortAudio or no device."""
    try:
        import sounddevice
    except ImportError:
        raise ValueError("--mic needs the extra 'mic': pip install '.[mic]'") from None
    except OSError:
        raise ValueError("--mic needs the library PortAudio, on Debian: apt install libportaudio2") from None
    heard, jitter = queue.Queue(), Jitter()

    def callback(indata, outdata, frames, clock, status):
        heard.put(indata[:, 0].copy())
        outdata[:, 0] = jitter.pop()[0]

    try:
        with sounddevice.Stream(SAMPLE_RATE, FRAME, channels=1, dtype="float32", callback=callback):
            print("ConversationState; Ctrl-C ends. With headphones it hears you alone.")
            converse_live(duplex, seed, heard.get, jitter.put)
    except sounddevice.PortAudioError as e:
        raise ValueError(f"no microphone or loudspeaker of 24 kHz: {e}; `python -m sounddevice` lists what there is") from None
    except KeyboardInterrupt:
        print()


def converse_live(duplex, seed, hear, say):
    """A conversation for as long as hear() gives frames (1920,), not None; say(t, frame (1920,)) gets what is said to the t-th.
    The monologue is printed. ValueError if the model's logits are not numbers."""
    engine, lines, t = Engine(duplex, 1), Lines(Transcript(duplex)), 0
    session = engine.join(seed)
    while (frame := hear()) is not None:
        session.hear(frame)
        out = engine.tick()[session]
        if out is None:
            raise ValueError("the model's logits are not numbers; its weights are spoilt")
        lines.add(t, out[0])
        say(t, out[1].numpy())
        t += 1
