"""The engine: conversations frame by frame, many in one batch, each as if it were alone.

One frame of a conversation:

    80 ms of sound --codec--> 8 codes heard --.
    text and codes it said in this frame -----+--> column t --model--> text and codes of column t+1
                                              '--- 8 codes said --codec--> 80 ms of sound

The model listens while it speaks: each frame goes both ways. Sound that is made from what was heard up to the end of frame t
can be played in frame t+1 at the earliest.

Many of them:

    session 7 --[ ][ ]--.                       .--> text, 80 ms
    session 3 ----------+-- tick: one frame of --+
    session 9 -----[ ]--'   each that has one   '--> text, 80 ms

Session 3 has sent nothing in time. It waits alone: its row of the batch is computed with the others, since a batch of fixed size
is what a GPU captures once and replays, but then its memory is put back as it was, and its next frame follows its last.

B rows of the batch, K codebooks.
"""
import os
from collections import deque
from dataclasses import dataclass

import torch

from kernels.sampling import Sampling, sample
from mimi import FRAME, Mimi, restore, tensors
from model import FLM, State
from streams import K, LATE, LISTEN, ROWS, SPEAK, TEXT
from tokenizer import load_tokenizer

RECENT = 32  # text tokens that the repetition penalty looks back on
QUEUE = 6  # frames of a session that may wait: about half a second


@dataclass
class Talk:
    """The memory of B conversations between one frame and the next. A frame changes it in place, at the same addresses."""
    model: State
    codec: dict
    text: torch.Tensor  # (B,) the text token of the next column
    speak: torch.Tensor  # (B, K) its speak codes
    heard: torch.Tensor  # (B, K) the codes of the last frame heard, of which the late ones are still to enter
    recent: torch.Tensor  # (B, RECENT) the last text tokens
    seed: torch.Tensor  # (B,) what its random numbers come from
    failed: torch.Tensor  # (B,) whether its logits have not been numbers


def moved(talk):
    """What to put back to undo a frame. The rings of the temporal transformer, by far the most of a talk, are not among it: with
    its position put back, a row's next frame writes over what the undone one wrote, and nothing reads it before."""
    return [*tensors({**vars(talk), "model": talk.model.position})]


class Speaker:
    """A model with its codec and tokeniser, and how it draws text and sound."""

    def __init__(self, model, vocab, codec, tokenizer, text=Sampling(), sound=Sampling()):
        self.device = model.head.weight.device
        # On a GPU a step takes as long as reading the weights does, and in bfloat16 they are half as many bytes.
        self.model = model.bfloat16() if self.device.type == "cuda" else model
        self.vocab, self.codec, self.tokenizer, self.text, self.sound = vocab, codec, tokenizer, text, sound
        self.late = LATE.to(self.device)

    @staticmethod
    def load(folder, device="cpu", text=Sampling(), sound=Sampling()):
        """What train.py has left in a folder. Raises ValueError or OSError with the file's name."""
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such folder; --checkpoint is one that train.py wrote, such as out/tiny")
        model, vocab, _ = FLM.load(os.path.join(folder, "checkpoint.pt"), device)
        codec = Mimi.load(os.path.join(folder, "codec.pt"), device)
        return Speaker(model, vocab, codec, load_tokenizer(os.path.join(folder, "tokenizer.json")), text, sound)

    def begin(self, seeds):
        """The memory at the start of len(seeds) conversations."""
        B, v = len(seeds), self.vocab
        full = lambda value, *shape: torch.full((B, *shape), value, device=self.device)
        speak = torch.where(self.late, v.empty, torch.tensor(v.silence[-1], device=self.device)).repeat(B, 1)
        return Talk(self.model.init_state(B), self.codec.init_state(B), full(v.wait), speak, full(v.empty, K), full(-1, RECENT),
                    torch.tensor(list(seeds), device=self.device), full(False))

    @torch.inference_mode()
    def frame(self, wav, talk):
        """One frame both ways: (B, 1, 1920) heard -> text tokens (B,), (B, 1, 1920) said. talk moves on. Nothing here waits for
        the device, so that all of it can be captured as one CUDA graph."""
        codes = self.codec.encode_step(wav, talk.codec)[..., 0]
        column = torch.empty(len(wav), ROWS, dtype=torch.long, device=self.device)
        column[:, TEXT], column[:, SPEAK], column[:, LISTEN] = talk.text, talk.speak, torch.where(self.late, talk.heard, codes)
        text, speak = self.model.step(column, talk.model, lambda logits: self.draw_text(logits, talk),
                                      lambda logits, k: self.draw_code(logits, k, talk))
        said = torch.where(self.late, speak, talk.speak)
        for old, new in ((talk.text, text), (talk.speak, speak), (talk.heard, codes)):
            old.copy_(new)
        return text, self.codec.decode_step(said[..., None], talk.codec)

    def draw_text(self, logits, talk):
        text = self.draw(logits[:, :self.vocab.text_size], self.text, talk, 0, talk.recent)
        written = text.masked_fill(text == self.vocab.wait, -1)
        talk.recent.copy_(torch.cat([talk.recent[:, 1:], written[:, None]], 1))
        return text

    def draw_code(self, logits, k, talk):
        return self.draw(logits[:, :self.vocab.codebook_size], self.sound, talk, 1 + k)  # never "empty"

    def draw(self, logits, sampling, talk, k, recent=None):
        token = sample(logits, sampling, talk.seed, talk.model.position, k, recent)
        talk.failed |= token < 0
        return token.clamp(min=0)

    def stepper(self, talk):
        """`frame` as a function of the sound alone; on a GPU one launch, whose results the next one overwrites."""
        step = lambda wav: self.frame(wav, talk)
        if self.device.type != "cuda":
            return step
        return capture(step, torch.zeros(len(talk.seed), 1, FRAME, device=self.device), moved(talk))

    def converse(self, wav, seed=1, each=lambda t, text: None):
        """Whole conversations, frame by frame: (B, N) heard -> text tokens (B, T) and sound said (B, N), on one clock.
        each(t, text (B,)) is called after every frame. The b-th conversation's seed is seed + b. ValueError if the model's
        logits are not numbers."""
        B, N = wav.shape
        T = -(-N // FRAME)
        heard = torch.nn.functional.pad(wav, (0, T * FRAME - N)).to(self.device)[:, None]
        talk, texts, sounds = self.begin(range(seed, seed + B)), [], [heard.new_zeros(B, 1, FRAME)]
        step = self.stepper(talk)
        for t, frame in enumerate(heard.split(FRAME, -1)):
            text, sound = step(frame)
            each(t, text)
            texts.append(text.clone())
            sounds.append(sound.clone())
        if talk.failed.any():
            raise ValueError("the model's logits are not numbers; its weights are spoilt")
        return torch.stack(texts, 1).cpu(), torch.cat(sounds, -1)[:, 0, :N].cpu()


def capture(step, x, state):
    """step(x) as one CUDA graph: a function of new x's whose results live until its next call. What capturing does to `state`,
    tensors in any nesting, is undone."""
    before = [t.clone() for t in tensors(state)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries make their plans and workspaces at the first calls
            step(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(x)
    for t, b in zip(tensors(state), before):
        t.copy_(b)

    def replay(new):
        x.copy_(new)
        graph.replay()
        return y
    return replay


# ---------------------------------------------------------------------------------------------------------------------
# many conversations


class Session:
    """One conversation of an engine: what is to be heard queues here."""

    def __init__(self, seed):
        self.seed, self.queue = seed, deque()

    def hear(self, sound):
        """80 ms of sound, (1920,) from -1 to 1. False if QUEUE frames wait already: then it is not taken. ValueError if it is no
        such thing."""
        sound = torch.as_tensor(sound, dtype=torch.float32)
        if sound.shape != (FRAME,) or not sound.isfinite().all():
            raise ValueError(f"a frame of sound is {FRAME} finite numbers")
        if len(self.queue) >= QUEUE:
            return False
        self.queue.append(sound.clone())
        return True


class Engine:
    """Up to `size` conversations in one batch. They join, leave and begin anew at any frame; nobody waits for anybody.

    tick belongs to one thread; join, leave, reset and Session.hear to the same or to one other, even while a tick runs."""

    def __init__(self, speaker, size):
        self.speaker, self.talk = speaker, speaker.begin(range(size))
        self.step = speaker.stepper(self.talk)
        self.sessions = [None] * size  # whose each row is,
        self.inside = [None] * size  # and whose memory it still holds

    def join(self, seed=1):
        """A new Session, or None if the engine is full."""
        if None not in self.sessions:
            return None
        session = self.sessions[self.sessions.index(None)] = Session(seed)
        return session

    def leave(self, session):
        """Its place is free. Nothing happens if it has left before."""
        if session in self.sessions:
            self.sessions[self.sessions.index(session)] = None

    def reset(self, session):
        """The conversation from its start again: a new Session in this one's place, or None if it has left before."""
        if session not in self.sessions:
            return None
        new = self.sessions[self.sessions.index(session)] = Session(session.seed)
        return new

    def tick(self):
        """One frame of each session that has one waiting: {session: (text token, sound said (1920,))}. In place of the pair stands
        None once the model's logits have not been numbers: that conversation is over, and the others are not."""
        sessions = list(self.sessions)
        ready = [row for row, s in enumerate(sessions) if s and s.queue]
        if not ready:
            return {}
        new = [row for row in ready if self.inside[row] is not sessions[row]]
        if new:
            restore(self.talk, new, self.speaker.begin([sessions[row].seed for row in new]))
        wav = torch.zeros(len(sessions), 1, FRAME)
        for row in ready:
            wav[row, 0] = sessions[row].queue.popleft()
            self.inside[row] = sessions[row]
        waiting = [row for row, s in enumerate(sessions) if s and row not in ready]
        memory = moved(self.talk) if waiting else []
        kept = [t[waiting] for t in memory]
        text, said = self.step(wav.to(self.speaker.device))
        restore(memory, waiting, kept)
        text, said, failed = text.tolist(), said.cpu(), self.talk.failed.tolist()
        return {sessions[row]: None if failed[row] else (text[row], said[row, 0]) for row in ready}
