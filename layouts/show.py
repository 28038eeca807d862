"""The layouts of this room as tables, which `python streams.py` prints after its own; in brackets what is
read but not learned from."""
import random
from types import SimpleNamespace

import numpy as np
import torch

from layouts.division import divide
from layouts.prompts import in_role, prompt
from layouts.states import BREAK, SHIFT, states
from layouts.typed import typed
from streams import K, TEXT, Utterance, Vocab, delay, given, response_tts, show

WORDS = ["how", "late", "it", "is", "noon", "stop", "say", "twice", "SHIFT", "BREAK"]
V = Vocab.own(len(WORDS) + 3, 64, ((0,) * K,))
DATA = SimpleNamespace(vocab=V, tokenizer=SimpleNamespace(
    encode_ordinary=lambda text: [WORDS.index({SHIFT: "SHIFT", BREAK: "BREAK"}.get(text, text))],
    decode_single_token_bytes=lambda token: f" {WORDS[token]}".encode()))


def said(tokens, first, frames, starts=None):
    return Utterance(tokens, np.arange(first, first + frames)[:, None].repeat(K, 1), frames, starts)


USER, MODEL, OTHER = said([0, 1], 11, 4), said([2, 3, 4], 31, 9, [0, 3, 6]), said([5], 51, 3)
SHORT = said([2, 4], 31, 4, [0, 2])


def main():
    twice = response_tts([(USER, in_role("say it twice", SHORT, DATA.tokenizer))], [1], V)
    read = response_tts([(USER, said([2, 4], 54, 4))], [1], V)
    read[TEXT] = given(read[TEXT])
    for title, grid in (
            ("State tokens (Covo-Audio-Chat-FD, figure 4b): SHIFT begins an answer, BREAK ends it",
             states([(USER, MODEL), (OTHER, SHORT)], [1, 4], DATA, random.Random(0))),
            ("Typed turn (after Hello-Chat)",
             typed([(USER, MODEL)], [1], DATA, None, lambda user, rng: True)),
            ("Prompt (PersonaPlex): a role, a voice, nothing; then Response-TTS in this role",
             np.concatenate([prompt([6, 2, 7], said([], 61, 3).codes, V), twice], 1)),
            ("Decoupling (Covo-Audio): a voice, nothing; then what it reads, after a request",
             np.concatenate([prompt([], said([], 51, 3).codes, V), read], 1))):
        show(title, delay(grid, V.empty), V, WORDS)
    native = torch.from_numpy(delay(response_tts([(USER, SHORT)], [1], V), V.empty))[None]
    learn = torch.ones(1, native.shape[-1] - 1, dtype=torch.bool)
    divided, *_ = divide(native, learn, learn[:, None], V)
    show("Time division (Covo-Audio-FD): each frame as two columns", divided[0].numpy(), V, WORDS)


if __name__ == "__main__":
    main()
