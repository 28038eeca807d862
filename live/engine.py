"""Many conversations in one batch, each as if it were alone.

    session 7 --[ ][ ]--.                       .--> text, 80 ms
    session 3 ----------+-- tick: one frame of --+
    session 9 -----[ ]--'   each that has one   '--> text, 80 ms

Session 3 has sent nothing in time. It waits alone: its row of the batch is computed with the others, since a batch of
fixed size is what a GPU captures once and replays, but then its state is put back as it was, and its next frame follows
its last.
"""
from collections import deque

import torch

from mimi import FRAME, restore

QUEUE = 6  # frames of a session that may wait: about half a second


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

    def __init__(self, duplex, size):
        self.duplex, self.state = duplex, duplex.init_state(range(size))
        self.step = duplex.compiled_step(self.state)
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
            restore(self.state, new, self.duplex.init_state([sessions[row].seed for row in new]))
        wav = torch.zeros(len(sessions), 1, FRAME)
        for row in ready:
            wav[row, 0] = sessions[row].queue.popleft()
            self.inside[row] = sessions[row]
        waiting = [row for row, s in enumerate(sessions) if s and row not in ready]
        small = self.state.small_tensors() if waiting else []
        kept = [t[waiting] for t in small]
        text, said = self.step(wav.to(self.duplex.device))
        restore(small, waiting, kept)
        text, said, failed = text.tolist(), said.cpu(), self.state.failed.tolist()
        return {sessions[row]: None if failed[row] else (text[row], said[row, 0]) for row in ready}
