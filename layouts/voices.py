"""Voices: a voice prompt (PersonaPlex), and a voice that was only ever heard reading (Covo-Audio's decoupling
of speaker and dialogue).

    voiced           text             (·)  (·)  (·) |  ·  ·  · it is noon  ·        the prompt and the answer
                     speak semantic   (71) (72) (-) |  ·  ·  ·  ·  · 31 32 ...      are in one voice

    decoupled        text             (·)  (·)  (·) | (·) (·) (·) (up) (on) (two)   up, on, two was read;
                     speak semantic   (81) (82) (-) |  ·   ·   ·    ·    ·    91    it answers nothing

In `decoupled` a sentence that was read stands after a request as if it were the answer. The text is not
learned from, nor is <wait> (or the model would keep silent in this voice), only how the sentence sounds. So
the model can answer in this voice, with what other voices answer.
"""
import functools

import numpy as np

from layouts.prompts import prompt
from streams import TEXT, given, response_tts


@functools.lru_cache(1)
def readings(data, split="train"):
    """{voice: [(line, turn)]} of the model's sentences, and the voices that have no others."""
    index, found, answer = data.encoded.index, {}, set()
    for line, turn in np.concatenate(data.said[split]).tolist():
        voice = data.line(line)["turns"][turn].get("voice")
        if index["turns"][line] == 1:
            found.setdefault(voice, []).append((line, turn))
        else:
            answer.add(voice)
    return found, sorted(set(found) - answer)


def read_aloud(data, voice, rng):
    line, turn = rng.choice(readings(data)[0][voice])
    return data.utterance(data.line(line)["turns"][turn], rng)


def voice_prompt(data, voice, rng):
    return prompt([], read_aloud(data, voice, rng).codes, data.vocab)


def voiced(turns, gaps, data, rng):
    """Response-TTS after a sentence in the voice of the answers; turns in other voices are left out."""
    voice = turns[0][1].voice
    turns, gaps = zip(*((turn, gap) for turn, gap in zip(turns, gaps) if turn[1].voice == voice))
    return np.concatenate([voice_prompt(data, voice, rng), response_tts(turns, gaps, data.vocab)], 1)


def decoupled(turns, gaps, data, rng):
    """A request, and what a voice without dialogues reads, after a prompt in this voice."""
    voice = rng.choice(readings(data)[1])
    read = read_aloud(data, voice, rng)
    answer = response_tts([(turns[0][0], read)], gaps[:1], data.vocab)
    answer[TEXT] = given(answer[TEXT])
    return np.concatenate([voice_prompt(data, voice, rng), answer], 1)
