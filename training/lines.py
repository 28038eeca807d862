"""Which lines of encoded data each layout is made of: the index of `prepare.py encode`, sorted once."""
import functools

import numpy as np

from files.encoded import read_encoded
from files.tokenizer import load_tokenizer
from streams import K, Vocab
from training.survey import PAUSE


class Lines:
    def __init__(self, folders):
        """folders: one of `prepare.py encode`, or several with commas. Raises ValueError or OSError."""
        self.encoded = read_encoded(folders)
        meta, index = self.encoded.meta, self.encoded.index
        if meta["codebooks"] != K:
            raise ValueError(f"{folders}: has {meta['codebooks']} codes in a frame, streams.py K = {K}")
        self.vocab = Vocab.own(meta["text_size"], meta["codebook_size"], tuple(map(tuple, meta["silence"])))
        self.tokenizer = load_tokenizer(meta["tokenizer"])
        # For each split: numbers of lines, or (line, turn) of clips: [transcribed by a machine, by a person].
        # heard, said: clips of users and of the model; dialogues: those without interjections, free: all;
        # recorded: stereo. "seen" is the held-out split: requests that were never trained on, in voices that
        # were.
        self.heard, self.said, self.dialogues = {}, {}, {}
        self.free, self.recorded, self.backchannels, self.noise = {}, {}, {}, {}
        for split in ("train", "seen"):
            mine = index["split"] == split.encode()
            for kind, lines in ((b"backchannel", self.backchannels), (b"noise", self.noise)):
                lines[split] = np.flatnonzero(mine & (index["kind"] == kind))
                mine &= index["kind"] != kind
            self.recorded[split] = np.flatnonzero(mine & index["sentences"])
            self.free[split] = np.flatnonzero(mine & (index["turns"] > 1))
            mine &= ~index["interjections"]  # in fine-tuning 1 the model only speaks when the user has ended
            self.dialogues[split] = np.flatnonzero(mine & (index["turns"] > 1))
            by = [mine & (index["annotated"] == by_hand) for by_hand in (False, True)]
            self.heard[split] = [clips(index, some, b"user") for some in by]
            self.said[split] = [clips(index, some, b"model") for some in by]
        self.line = functools.lru_cache(20_000)(self.encoded.line)
        self.sources = functools.cache(self.find_sources)
        self.fingerprint = f"{meta['codec_sha256'][:16]} {meta['tokenizer_sha256'][:16]} {len(index)} lines"
        self.used = None  # a list while ModelTask.clips_of asks which codes a batch reads

    def find_sources(self, layout, split, frames):
        """What a layout is made of: numbers of lines, or clips; of these only such as fit into a row of
        `frames` with their transcripts."""
        found = {"tts": self.said, "asr": self.heard, "recorded": self.recorded, "response_tts": self.free,
                 "free_response_tts": self.free}.get(layout, self.dialogues)[split]
        if layout not in ("tts", "asr"):
            return found
        return [some[self.encoded.index["frames"][some[:, 0]] <= frames - PAUSE] for some in found]

    def holds(self, layout, split, frames):
        return any(map(np.size, self.sources(layout, split, frames)))


def clips(index, mask, role):
    """(line, turn) of each turn of a role in the lines of a mask, (n, 2). In a dialogue user and model take
    turns."""
    single = np.flatnonzero(mask & (index["turns"] == 1) & np.isin(index["role"], (role, b"either")))
    dialogues = np.flatnonzero(mask & (index["turns"] > 1))
    n = index["turns"][dialogues].astype(int) // 2
    turns = 2 * (np.arange(n.sum()) - np.repeat(n.cumsum() - n, n)) + (role == b"model")
    lines = np.concatenate([single, np.repeat(dialogues, n)])
    return np.stack([lines, np.concatenate([np.zeros_like(single), turns])], 1)
