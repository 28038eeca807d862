"""Streams: how text, listening and speaking share one grid of frames (FLM-Audio, sections 2.2 and 3, figures
2 and 3).

A conversation is a grid of integers, a row for each channel and a column for each 80 ms frame:

    row            t-1     t    t+1
     0     text    w_t-1  w_t   w_t+1     the monologue: text tokens, or <wait>
     1     speak   s_t-1  s_t   s_t+1     semantic code of what the model says
     2-8   speak   a_t-2  a_t-1 a_t       its acoustic codes, one frame later
     9     listen  s_t-1  s_t   s_t+1     semantic code of what it hears
    10-16  listen  a_t-2  a_t-1 a_t       its acoustic codes, one frame later

The model reads column t and predicts rows 0-8 of column t+1. A layout decides which tokens and codes go
where. Nothing else distinguishes listening, speaking, answering and being interrupted, and nothing else
changes between the four stages of training.

    python streams.py        prints each layout as a table

K = 8 codebooks, T frames. Layouts build undelayed rows; `delay` applies the delays when a grid is complete.
An entry x that is read but not learned from is -1 - x (see `given`), until `pack` makes a mask of it.
"""
import dataclasses
import runpy
from dataclasses import dataclass

import numpy as np
import torch

K = 8  # codes for each frame of audio
FRAME_RATE = 12.5


@dataclass(frozen=True)
class Stream:
    """A group of rows of the grid and how many frames late they enter it."""
    name: str
    start: int
    stop: int
    delay: int


STREAMS = (Stream("text", 0, 1, 0),
           Stream("speak semantic", 1, 2, 0), Stream("speak acoustic", 2, 1 + K, 1),
           Stream("listen semantic", 1 + K, 2 + K, 0), Stream("listen acoustic", 2 + K, 1 + 2 * K, 1))
TEXT, SPEAK, LISTEN = 0, slice(1, 1 + K), slice(1 + K, 1 + 2 * K)
ROWS = STREAMS[-1].stop  # 17
DELAYED = torch.tensor([s.delay > 0 for s in STREAMS[1:3] for _ in range(s.start, s.stop)])  # (K,): acoustic

TEXT_LEAD = 2  # frames by which the text of an answer precedes its audio ("TTS style", section 3.1)
REACTION = 6  # frames from the start of an interruption until the model is silent: 0.5 s (section 3.2.2)


@dataclass(frozen=True)
class Vocab:
    """Token ids."""
    text_size: int  # text tokens are 0..text_size-1, among them:
    wait: int
    asr: int
    answer: int
    codebook_size: int  # audio codes are 0..codebook_size-1
    empty: int  # in place of a code: no audio at all, which is not silence
    silence: tuple  # ((code,) * K, ...): frames of silence at the start of a stream; the last one repeats

    @staticmethod
    def own(text_size, codebook_size, silence):
        """For our own models: <wait>, <asr> and <answer> are the last text tokens, "empty" follows the
        codes."""
        wait, asr, answer = range(text_size - 3, text_size)
        return Vocab(text_size, wait, asr, answer, codebook_size, codebook_size, silence)


@dataclass(frozen=True)
class Utterance:
    """Something said."""
    tokens: list
    codes: np.ndarray  # (n, K)
    speech: int  # how many of the n frames are speech; those of the fading tail follow
    starts: list = None  # the frame at which each token is spoken; only the word-aligned layout needs it
    interjections: tuple = ()  # what the model says meanwhile: ((frame, Utterance), ...)
    echo: np.ndarray = None  # (n, K): of the model's, what comes back from the loudspeaker (section 3.2)
    voice: str = None  # who speaks, if the data say so


# ------------------------------------------------------------------------------------------------------------
# the delays


def delay(grid, fill):
    """Undelayed rows (17, T) -> the grid that the model sees (17, T): delayed rows start with `fill`."""
    out = np.full_like(grid, fill)
    for s in STREAMS:
        out[s.start:s.stop, s.delay:] = grid[s.start:s.stop, :grid.shape[1] - s.delay]
    return out


# ------------------------------------------------------------------------------------------------------------
# the layouts: utterances -> undelayed rows (17, T)


def blank(T, v, codes):
    """T frames of <wait>, with the same code or codes (K,) in every frame of both audio channels."""
    grid = np.empty((ROWS, T), np.int64)
    grid[TEXT] = v.wait
    grid[SPEAK] = grid[LISTEN] = np.broadcast_to(np.reshape(codes, (-1, 1)), (K, T))
    return grid


def put(grid, rows, t, values):
    """Write values, (n,) tokens or (n, K) codes, from frame t on; what does not fit is cut off."""
    n = max(0, min(len(values), grid.shape[1] - t))
    if n:
        grid[rows, t:t + n] = np.asarray(values[:n]).T


def given(values):
    """Tokens or codes to be read but not learned from: a prompt, what the user types."""
    return -1 - np.asarray(values)


def language(turns, v):
    """Before any audio: a dialogue as text alone, in ASR-Response-TTS's order. The paper starts from a
    language model; a model from scratch learns the language here."""
    text = []
    for user, model in turns:
        text += [v.asr, *user.tokens, v.answer, *model.tokens, v.wait]
    grid = blank(len(text), v, v.empty)
    put(grid, TEXT, 0, text)
    return grid


def tts(u, v):
    """Post-training, TTS style: the sentence, and its audio two frames after the start of the text."""
    grid = blank(max(len(u.tokens), TEXT_LEAD + len(u.codes)), v, v.empty)
    put(grid, TEXT, 0, u.tokens)
    put(grid, SPEAK, TEXT_LEAD, u.codes)
    return grid


def asr(u, v):
    """Post-training, ASR style: the audio, and the sentence as soon as the audio ends."""
    grid = blank(max(u.speech + len(u.tokens), len(u.codes)), v, v.empty)
    put(grid, LISTEN, 0, u.codes)
    put(grid, TEXT, u.speech, u.tokens)
    return grid


def asr_response_tts(turns, gaps, v):
    """Fine-tuning 1: the user speaks; then <asr> transcript <answer> answer, and the answer's audio."""
    return dialogue(turns, gaps, v, lambda user, model: (
        [v.asr, *user.tokens, v.answer, *model.tokens], len(user.tokens) + 2 + TEXT_LEAD))


def response_tts(turns, gaps, v):
    """Fine-tuning 2: the user speaks; then the answer and its audio."""
    return dialogue(turns, gaps, v, lambda user, model: (model.tokens, TEXT_LEAD))


def free_response_tts(turns, gaps, barge_in, backchannels, v):
    """Fine-tuning 2 with free user input. barge_in[i]: how many frames after the start of the i-th answer's
    audio the user starts the next turn, or None; half a second later the model stops text and audio.
    backchannels[i]: (frame, Utterance), a backchannel of the user that many frames after the start of the
    audio, which changes nothing; or None."""
    return dialogue(turns, gaps, v, lambda user, model: (model.tokens, TEXT_LEAD), barge_in, backchannels)


def word_aligned(turns, gaps, v):
    """Moshi's layout, for comparison: each token of the answer is written when it is spoken, with padding
    (here <wait>) between them. The audio starts when it does in Response-TTS."""
    def spread(user, model):
        text = [v.wait] * (TEXT_LEAD + model.speech)
        for token, start in zip(model.tokens, model.starts, strict=True):
            text[TEXT_LEAD + start] = token
        return text, TEXT_LEAD
    return dialogue(turns, gaps, v, spread)


def recorded(listen, speak, sentences, v):
    """A recorded conversation: the codes (n, K) of both sides, and the model's sentences [(frame, tokens,
    cut), ...]. Each is written two frames before its audio, or as soon as the one before it is written, and
    is cut off at the frame `cut` if that is not None."""
    grid = blank(len(listen), v, v.silence[-1])
    put(grid, LISTEN, 0, listen)
    put(grid, SPEAK, 0, speak)
    t = 0
    for frame, tokens, cut in sentences:
        t = max(t, frame - TEXT_LEAD)
        tokens = tokens if cut is None else tokens[:max(0, cut - t)]
        put(grid, TEXT, t, tokens)
        t += len(tokens)
    return grid


def dialogue(turns, gaps, v, monologue, barge_in=None, backchannels=None):
    """Turns [(user, model), ...], each after a gap of silent frames. monologue(user, model) -> the tokens
    written from the user's end on, and how many frames after that end the audio starts. Both channels carry
    real codes throughout, of silence when there is no speech."""
    barge_in, backchannels = barge_in or [None] * len(turns), backchannels or [None] * len(turns)
    plan, t = [], 0
    for (user, model), gap, barge in zip(turns, gaps, barge_in, strict=True):
        start = t + gap
        end = start + user.speech
        text, lead = monologue(user, model)
        audio = end + lead
        t = max(audio + model.speech, end + len(text))  # the end of the answer
        if barge is not None:
            t = min(t, audio + barge)
        plan.append((start, end, text, audio))
    grid = blank(t, v, v.silence[-1])
    put(grid, LISTEN, 0, v.silence)
    for i, ((user, model), (start, end, text, audio)) in enumerate(zip(turns, plan)):
        if i and barge_in[i - 1] is not None:  # cut off the rest of the last answer
            cut = start + REACTION
            grid[TEXT, cut:] = v.wait
            grid[SPEAK, cut:] = grid[LISTEN, cut:] = np.reshape(v.silence[-1], (-1, 1))
        if model.echo is not None:
            put(grid, LISTEN, audio, model.echo)
        put(grid, LISTEN, start, user.codes)
        for frame, said in user.interjections:
            put(grid, TEXT, start + frame - TEXT_LEAD, said.tokens)
            put(grid, SPEAK, start + frame, said.codes)
        put(grid, TEXT, end, text)
        put(grid, SPEAK, audio, model.codes)
        if backchannels[i]:
            put(grid, LISTEN, audio + backchannels[i][0], backchannels[i][1].codes)
    return grid


def pack(grids, T, v):
    """Concatenate grids, cut to T frames, apply the delays: (what the model trains on, which of its entries
    it learns from), (17, T) each."""
    grid = delay(np.concatenate(grids, 1)[:, :T], v.empty)
    return np.maximum(grid, given(grid)), grid >= 0


# ------------------------------------------------------------------------------------------------------------
# python streams.py


def show(title, grid, v, words):
    """One layout as a table, channels down and frames across."""
    names = {v.wait: "·", v.asr: "<asr>", v.answer: "<answer>", **dict(enumerate(words))}
    codes = {v.empty: "-", v.silence[-1][0]: "·", **{x: str(x) for x in range(1, v.codebook_size)}}
    name = lambda names, x: names[x] if x >= 0 else f"({names[given(x).item()]})"  # (not learned from)
    rows = [(s.name, [name(names if s.start == TEXT else codes, x) for x in grid[s.start]]) for s in STREAMS]
    width = [max(len(r[t]) for _, r in rows) for t in range(grid.shape[1])]
    print(f"\n{title}")
    for name, cells in rows:
        print(f"  {name:16}" + " ".join(f"{c:>{w}}" for c, w in zip(cells, width)))


def main():
    """Each layout of figure 3: the user says two words, the model answers with three. Of the audio codes, 11
    is the first of the user, 31 the first of the answer; '·' is silence or <wait>, '-' is empty."""
    words = ["how", "late", "it", "is", "noon", "stop"]
    v = Vocab.own(len(words) + 3, 64, ((0,) * K,))

    def said(tokens, first, frames, starts=None):
        return Utterance(tokens, np.arange(first, first + frames)[:, None].repeat(K, 1), frames, starts)

    user, model, other = said([0, 1], 11, 4), said([2, 3, 4], 31, 9, [0, 3, 6]), said([5], 51, 3)
    print(main.__doc__.replace("\n    ", "\n"))
    for title, grid in (
            ("Language alone (before all others, for a model from scratch)", language([(user, model)], v)),
            ("TTS style (post-training)", tts(model, v)),
            ("ASR style (post-training)", asr(user, v)),
            ("ASR-Response-TTS (fine-tuning 1)", asr_response_tts([(user, model)], [1], v)),
            ("Response-TTS (fine-tuning 2)", response_tts([(user, model)], [1], v)),
            ("Response-TTS with free user input: the user barges in (fine-tuning 2)",
             free_response_tts([(user, model), (other, model)], [1, 0], [2, None], [None, None], v)),
            ("The same: the user backchannels, which changes nothing",
             free_response_tts([(user, model)], [1], [None], [(3, other)], v)),
            ("The same: the model backchannels while the user speaks", response_tts([(dataclasses.replace(
                user, interjections=((3, said([5], 61, 2)),)), model)], [1], v)),
            ("Word-aligned (Moshi, for comparison)", word_aligned([(user, model)], [1], v))):
        show(title, delay(grid, v.empty), v, words)
    runpy.run_module("layouts.show", run_name="__main__")  # those of other papers


if __name__ == "__main__":
    main()
