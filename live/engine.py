"""Many conversations in one batch, each as if it were alone.

    session 7 --[ ][ ]--.                       .--> text, 80 ms
    session 3 ----------+-- tick: one frame of --+
    session 9 -----[ ]--'   each that has one   '--> text, 80 ms

Session 3 has sent nothing in time and waits, without delaying the others. Its row of the batch is computed
with theirs, since a GPU captures a batch of fixed size once and replays it, but then its state is put back.
Its next frame follows its last.
"""
from collections import deque

import torch

from mimi import FRAME, restore, tensors

QUEUE = 12  # frames of a session that may wait: about a second, as in the page's jitter buffer


class Session:
    """One conversation of an engine, with the queue of its incoming frames."""

    def __init__(self, seed, prompt=None):
        self.seed, self.prompt, self.queue, self.typed = seed, prompt, deque(), deque()

    def hear(self, audio):
        """80 ms of audio, (1920,) from -1 to 1. False, and not taken, if QUEUE frames wait already.
        ValueError if it has another shape or is not finite."""
        audio = torch.as_tensor(audio, dtype=torch.float32)
        if audio.shape != (FRAME,) or not audio.isfinite().all():
            raise ValueError(f"a frame of audio is {FRAME} finite numbers")
        if len(self.queue) >= QUEUE:
            return False
        self.queue.append(audio.clone())
        return True


    def type(self, tokens):
        """What the user types, with its special tokens (layouts/typed.py): one token in each frame from now
        on, in place of what the model would write. False, and not taken, while earlier ones wait."""
        if self.typed:
            return False
        self.typed.extend(tokens)
        return True


class Engine:
    """Up to `size` conversations in one batch. They join, leave and restart at any frame, independently.

    tick belongs to one thread; join, leave, reset and Session.hear to the same or to one other, even during
    a tick."""

    def __init__(self, duplex, size):
        self.duplex, self.state = duplex, duplex.init_state(range(size))
        self.fresh = duplex.init_state([0]).small_tensors()
        self.step = duplex.compiled_step(self.state)
        self.sessions = [None] * size  # the session of each row,
        self.loaded = [None] * size  # and the one whose memory the row still holds

    def join(self, seed=1, prompt=None):
        """A new Session, or None if the engine is full. prompt: see begin."""
        if None not in self.sessions:
            return None
        session = self.sessions[self.sessions.index(None)] = Session(seed, prompt)
        return session

    def leave(self, session):
        """Frees the session's row. A session that has left before is ignored."""
        if session in self.sessions:
            self.sessions[self.sessions.index(session)] = None

    def reset(self, session, prompt=None):
        """The conversation from its start, after this prompt: a new Session in place of this one, or None if
        it has left before."""
        if session not in self.sessions:
            return None
        new = self.sessions[self.sessions.index(session)] = Session(session.seed, prompt)
        return new

    def tick(self):
        """One frame of each session that has one waiting: {session: (text token, audio said (1920,))}, with
        None in place of the pair if the model's logits are not numbers. Such a conversation is over; the
        others are not."""
        sessions = list(self.sessions)
        ready = [row for row, s in enumerate(sessions) if s and s.queue]
        if not ready:
            return {}
        self.begin([row for row in ready if self.loaded[row] is not sessions[row]], sessions)
        wav = torch.zeros(len(sessions), 1, FRAME)
        for row in ready:
            wav[row, 0] = sessions[row].queue.popleft()
            if sessions[row].typed:
                self.state.text[row] = sessions[row].typed.popleft()
        waiting = self.upload([row for row, s in enumerate(sessions) if s and row not in ready])
        small = self.state.small_tensors() if len(waiting) else []
        saved = [t[waiting] for t in small]
        text, said = self.step(wav.to(self.duplex.device))
        restore(small, waiting, saved)
        text, said, failed = text.tolist(), said.cpu(), self.state.failed.tolist()
        for row in (row for row in ready if sessions[row].typed):  # its next column is typed
            text[row] = self.duplex.vocab.wait
        return {sessions[row]: None if failed[row] else (text[row], said[row, 0]) for row in ready}

    def begin(self, rows, sessions):
        """Gives these rows the state of a conversation's start, in place: after the session's prompt (17, P),
        or else the model's own, or none."""
        if not rows:
            return
        index, seeds = self.upload(rows), self.upload([sessions[row].seed for row in rows])
        for memory in tensors(self.state.cache):  # masked, but a NaN in it would not be
            memory[index] = 0
        restore(self.state.small_tensors(), index, self.fresh)
        self.state.seed[index] = seeds
        for row in rows:
            prompt = self.duplex.prompt if sessions[row].prompt is None else sessions[row].prompt
            if prompt is not None:
                self.duplex.prefill(self.state, row, prompt)
            self.loaded[row] = sessions[row]

    def upload(self, values):
        """A list of integers as one tensor on the device, so that indexing many tensors uploads it once."""
        return torch.tensor(values, dtype=torch.long, device=self.duplex.device)
