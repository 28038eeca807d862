"""A jitter buffer. Frames are sent every 80 ms, but they arrive in bursts, and some never do:

    sent      0  1  2  3  4  5  6  7  8  9
    arrives   0  1  2  .  .  .  345 6  .  8  79
    played    0  1  2  ~  ~  ~  3  4  5  6  ~  8      ~ concealed; 7 came too late and is dropped

After a burst, playout is delayed by as much as the burst was late, so that the next burst does no harm. The
delay shrinks again in pauses, one quiet frame at a time. The page plays through the same buffer, written in
JavaScript (web.html).
"""
import numpy as np

from mimi import FRAME

CAPACITY = 12  # frames that may wait: about a second; the oldest are dropped beyond that
WINDOW = 50  # frames (4 s) over which the buffer must have held more than it needed before the delay shrinks
QUIET = 0.005  # rms of a frame that can be skipped unnoticed: -46 dB
FADE = 120  # samples: 5 ms


def conceal(last):
    """Packet loss concealment: the last frame (1920,) backwards, so that nothing jumps, fading out. None
    gives silence."""
    if last is None:
        return np.zeros(FRAME, np.float32)
    return last[::-1] * np.linspace(1, 0, FRAME, dtype=np.float32)


def rms(x):
    return np.sqrt(np.mean(x * x))


class JitterBuffer:
    """Frames (1920,), numbered by the sender, arrive at any time; one leaves at every pop."""

    def __init__(self):
        self.frames, self.next = {}, None  # frames that wait, by number; the number to be played next
        self.last = None  # the frame played last; None if that was concealed
        self.underruns = 0  # pops that found the buffer empty, since a frame was last played
        self.least, self.count = CAPACITY, 0  # the fewest frames that waited in this window; pops in it
        self.surplus = 0  # frames that the last window did not need

    @property
    def waiting(self):
        """Frames from the one to be played next to the newest."""
        return max(self.frames) - self.next + 1 if self.frames else 0

    def put(self, n, frame):
        """False if the frame is too late and is dropped."""
        if self.next is None:
            self.next = n
        if n < self.next:
            return False
        self.frames[n] = frame
        if self.waiting > CAPACITY:
            self.skip_to(max(self.frames) - CAPACITY + 1)
        return True

    def pop(self):
        """(1920,) to play for the next 80 ms, and the number of the frame, or None if it is concealed."""
        self.shrink_delay()
        # its time passed in an underrun
        while self.underruns and self.frames and self.next not in self.frames:
            self.next, self.underruns = self.next + 1, self.underruns - 1
        frame = self.frames.pop(self.next, None)
        if self.frames or frame is not None:
            self.next += 1
        elif self.next is not None:
            self.underruns += 1
        if frame is None:
            audio, self.last = conceal(self.last), None
            return audio, None
        if self.last is None:  # fade in
            frame = np.concatenate([frame[:FADE] * np.linspace(0, 1, FADE, dtype=np.float32), frame[FADE:]])
        self.last, self.underruns = frame, 0
        return frame, self.next - 1

    def shrink_delay(self):
        """Skip a quiet frame, at most as many as the last window had to spare."""
        self.least, self.count = min(self.least, self.waiting), self.count + 1
        if self.count == WINDOW:
            self.least, self.count, self.surplus = self.waiting, 0, max(0, self.least - 1)
        frame = self.frames.get(self.next)
        if self.surplus and frame is not None and self.waiting > 1 and rms(frame) < QUIET:
            self.skip_to(self.next + 1)
            self.surplus -= 1

    def skip_to(self, n):
        self.frames, self.next = {k: f for k, f in self.frames.items() if k >= n}, n
