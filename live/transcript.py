"""The monologue of a conversation, piece by piece as it is written."""
import codecs

from tqdm import tqdm

from streams import FRAME_RATE

PAUSE = 4  # frames (0.32 s) from one piece to the next that begin a new line


class Transcript:
    """Text tokens become pieces of text with the second at which they were written."""

    def __init__(self, duplex):
        self.duplex, self.pieces = duplex, []  # [{"time": seconds, "text": ...}, ...]
        self.last = -PAUSE  # frame of the last piece
        self.new_line = True  # whether the last piece follows a pause
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, t, token):
        """token (int, of frame t) -> the piece that it completes, or ''."""
        if token == self.duplex.vocab.wait:
            return ""
        try:
            piece = self.utf8.decode(self.duplex.tokenizer.decode_single_token_bytes(token))
        except KeyError:  # published vocabularies are padded with ids that mean nothing
            return ""
        if piece:
            self.pieces.append({"time": round((t + 1) / FRAME_RATE, 2), "text": piece})
            self.new_line, self.last = t - self.last >= PAUSE, t
        return piece


class PrintedTranscript(Transcript):
    """Also prints each line, once the next one begins, above a progress bar if there is one."""

    def __init__(self, duplex):
        super().__init__(duplex)
        self.line = ""

    def add(self, t, token):
        if piece := super().add(t, token):
            if self.new_line:
                self.print_line()
                self.line = f"{self.pieces[-1]['time']:7.2f} s "
            self.line += piece
        return piece

    def print_line(self):
        tqdm.write(self.line)
