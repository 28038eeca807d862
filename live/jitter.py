"""A jitter buffer against late frames. Frames do not come every 80 ms. They come in bursts, and some never:

    sent      0  1  2  3  4  5  6  7  8  9
    arrives   0  1  2  .  .  .  345 6  .  8  79
    played    0  1  2  ~  ~  ~  3  4  5  6  ~  8      ~ concealed; 7 came too late, and is dropped

After a burst everything is played later by as much as the burst was late, so that the next one harms nothing. In pauses the
delay is taken back, quiet frame by quiet frame. web.html plays through the same buffer, line for line in JavaScript.
"""
import numpy as np

from mimi import FRAME

MOST = 12  # frames that may wait to be played: about a second; more, and the oldest are dropped
WINDOW = 50  # frames over which nothing may have been late before the delay is taken back: 4 s
QUIET = 0.005  # rms of a frame that can be left out unheard: -46 dB
FADE = 120  # samples: 5 ms


def conceal(last):
    """What stands for a frame that is not there: the last one backwards, so that nothing jumps, fading out. (1920,) -> same."""
    return last[::-1] * np.linspace(1, 0, FRAME, dtype=np.float32)


class Jitter:
    """Frames (1920,), numbered by the sender, come when they like; one leaves at every pop."""

    def __init__(self):
        self.frames, self.next = {}, None  # what waits, and which is to be played now
        self.last, self.whole = np.zeros(FRAME, np.float32), True  # what was played, and whether it was a real frame
        self.waits = 0  # pops since then for which nothing was there
        self.low, self.count, self.spare = MOST, 0, 0  # the fewest that waited in this window, its pops, frames not needed in the last

    @property
    def waiting(self):
        """Frames from the one to be played now to the newest one."""
        return max(self.frames) - self.next + 1 if self.frames else 0

    def put(self, n, frame):
        """False if it comes too late, and is dropped."""
        if self.next is None:
            self.next = n
        if n < self.next:
            return False
        self.frames[n] = frame
        if self.waiting > MOST:
            self.go_to(max(self.frames) - MOST + 1)
        return True

    def pop(self):
        """(1920,) to play in the next 80 ms, and the number of the frame, or None where it is concealed."""
        self.take_back()
        while self.waits and self.frames and self.next not in self.frames:  # its time went by in waiting
            self.next, self.waits = self.next + 1, self.waits - 1
        if not self.frames:
            self.waits += self.next is not None
            return self.conceal(), None
        n, self.next = self.next, self.next + 1
        frame = self.frames.pop(n, None)
        if frame is None:
            return self.conceal(), None
        if not self.whole:
            frame = np.concatenate([frame[:FADE] * np.linspace(0, 1, FADE, dtype=np.float32), frame[FADE:]])
        self.last, self.whole, self.waits = frame, True, 0
        return frame, n

    def take_back(self):
        """Leave out a quiet frame while fewer have been left out than waited for a whole window without need."""
        self.low, self.count = min(self.low, self.waiting), self.count + 1
        if self.count == WINDOW:
            self.low, self.count, self.spare = self.waiting, 0, max(0, self.low - 1)
        frame = self.frames.get(self.next)
        if self.spare and frame is not None and self.waiting > 1 and np.sqrt(np.mean(frame * frame)) < QUIET:
            self.go_to(self.next + 1)
            self.spare -= 1

    def go_to(self, n):
        self.frames, self.next = {k: f for k, f in self.frames.items() if k >= n}, n

    def conceal(self):
        sound = conceal(self.last)
        self.last, self.whole = np.zeros(FRAME, np.float32), False
        return sound
