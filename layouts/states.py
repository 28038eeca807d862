"""State tokens (Covo-Audio-Chat-FD): the model writes that it begins to speak, and that it has ended.

    text   THINK THINK SHIFT it is noon  ·  ·  ·  · BREAK THINK

THINK, which fills the frames in which the model only listens, is <wait>: it has its place, its id and its
weight in the loss. SHIFT comes as soon as the user has ended; BREAK in the first frame without text or sound
after an answer, or after the place where the user has cut it off. Covo has one text token for every four
codes of speech; here the monologue is written as a whole, so the frames between its end and BREAK hold <wait>
too.
"""
import numpy as np

from streams import SPEAK, TEXT, TEXT_LEAD, blank, dialogue

# Control characters: a token each in every byte-level vocabulary, in no text, and space to who reads words.
SHIFT, BREAK = "\x1d", "\x1e"


def interruptions(turns, gaps, rng):
    """The user interrupts an answer with probability 0.7: (where each is cut, the gaps that are left)."""
    cuts = [rng.randint(1, model.speech) if rng.random() < 0.7 else None for _, model in turns[:-1]] + [None]
    return cuts, gaps[:1] + [gap if cut is None else 0 for gap, cut in zip(gaps[1:], cuts)]


def waits(turns, gaps, data, rng):
    """Response-TTS with interruptions and with <wait> alone: what `states` is compared with."""
    cuts, gaps = interruptions(turns, gaps, rng)
    return dialogue(turns, gaps, data.vocab, lambda user, model: (model.tokens, TEXT_LEAD), cuts)


def states(turns, gaps, data, rng):
    """The same with state tokens."""
    v, ((shift,), (end,)) = data.vocab, map(data.tokenizer.encode_ordinary, (SHIFT, BREAK))
    cuts, gaps = interruptions(turns, gaps, rng)
    grid = dialogue(turns, gaps, v, lambda user, model: ([shift, *model.tokens], 1 + TEXT_LEAD), cuts)
    grid = np.concatenate([grid, blank(1, v, v.silence[-1])], 1)  # for the last BREAK
    active = (grid[SPEAK] != np.reshape(v.silence[-1], (-1, 1))).any(0) | (grid[TEXT] != v.wait)
    begins = np.flatnonzero(grid[TEXT] == shift).tolist()
    for begin, next_one in zip(begins, [*begins[1:], grid.shape[1]]):
        stop = begin + 1 + np.flatnonzero(active[begin:next_one])[-1]
        if stop < next_one:  # else it goes over into the next answer
            grid[TEXT, stop] = end
    return grid
