"""The monologue of a live conversation, piece by piece as it is written."""
import codecs
import sys

from streams import FRAME_RATE


class Transcript:
    """The monologue as it comes: pieces of text with the second at which each was written."""

    def __init__(self, duplex):
        self.duplex, self.pieces = duplex, []
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, t, token):
        """The piece that token (an int, of frame t) completes, or ''."""
        v = self.duplex.vocab
        if token == v.wait:
            return ""
        raw = self.duplex.tokenizer.decode_single_token_bytes(token)  # <asr> and <answer> too have their names there
        piece = self.utf8.decode(raw)
        if piece:
            self.pieces.append({"time": round((t + 1) / FRAME_RATE, 2), "text": piece})
        return piece


class Lines:
    """The monologue in a terminal: a pause begins a new line."""

    def __init__(self, transcript):
        self.transcript, self.last = transcript, None  # the frame of the last word

    def add(self, t, token):
        piece = self.transcript.add(t, token)
        if piece:
            if self.last is None or t - self.last > 3:
                sys.stdout.write(f"\n{(t + 1) / FRAME_RATE:7.2f} s ")
            sys.stdout.write(piece)
            sys.stdout.flush()
            self.last = t
