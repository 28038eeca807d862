"""Prompts (PersonaPlex's hybrid prompt): columns before the conversation that say who the model is.

    text            (say) (it) (twice)    (·)  (·)  (·) (·) |  ·  ·  · it is noon it is noon
    speak semantic    (-)  (-)     (-)   (71) (72) (73) (-) |  ·  ·  ·  ·  · 31 32 33 ...

First the role as text, then a voice as codes of what it says, then a column of nothing, after which all
delays are over: what follows begins as any conversation. Nothing of it is learned. `DuplexModel.prefill`
reads it at once.
"""
import numpy as np
import torch

from files.audio import SAMPLE_RATE, read_audio
from files.tokenizer import encode_words
from streams import FRAME_RATE, K, LISTEN, SPEAK, TEXT, Utterance, blank, delay, given, put, response_tts

SECONDS = 3  # of a voice that are heard


def prompt(role, voice, v):
    """role: tokens; voice: codes (n, K), cut to SECONDS -> undelayed columns (17, P), marked as given."""
    voice = voice[:round(SECONDS * FRAME_RATE)]
    grid = blank(len(role) + len(voice) + 1, v, v.empty)
    put(grid, TEXT, 0, role)
    put(grid, SPEAK, len(role), voice)
    grid[:LISTEN.start] = given(grid[:LISTEN.start])
    return grid


def tokens_of(text, tokenizer):
    return [t for word in encode_words(text, tokenizer) for t in word]


@torch.inference_mode()
def make_prompt(duplex, role="", voice=None):
    """The columns (17, P) of a role and of a voice, the name of an audio file or samples (N,) at 24 kHz, for
    DuplexModel.prefill. ValueError or OSError for a file that cannot be read, or if they are more than half
    of the model's context."""
    v, codes = duplex.vocab, np.zeros((0, len(duplex.silence)), np.int64)
    if voice is not None:
        wav = (voice if torch.is_tensor(voice) else read_audio(voice))[:SECONDS * SAMPLE_RATE]
        codes = duplex.codec.encode(wav[None, None].to(duplex.device))[0].T.cpu().numpy()
    grid = delay(prompt(tokens_of(role, duplex.tokenizer), codes, v), v.empty)
    if 2 * grid.shape[1] > duplex.model.config.context:
        raise ValueError(f"a prompt of {grid.shape[1]} frames is more than half of the model's context, "
                         f"{duplex.model.config.context}; shorten the role or the voice")
    return np.maximum(grid, given(grid))


# The toy world's roles: what becomes of the words of an answer.
ROLES = {"": lambda words: words,
         "say it twice": lambda words: [*words, *words],
         "say it backward": lambda words: words[::-1]}


def in_role(role, model, tokenizer):
    """An answer, an Utterance with the start of each token, as the role has it. ValueError without them."""
    if model.starts is None:
        raise ValueError("prompts:prompted: the answers' words have no times; the toy world's have")
    begins = [i for i, t in enumerate(model.tokens) if tokenizer.decode_single_token_bytes(t)[:1] == b" "]
    frames = [*(model.starts[i] for i in begins), model.speech]
    words = [(model.tokens[i:j], model.codes[a:b]) for i, j, a, b in
             zip(begins, [*begins[1:], len(model.tokens)], frames, frames[1:])]
    tokens, codes = zip(*ROLES[role](words))
    codes = np.concatenate(codes)
    return Utterance([t for some in tokens for t in some], codes, len(codes))


def prompted(turns, gaps, data, rng):
    """Response-TTS after a prompt: one of the roles, and half of the time the voice of another answer."""
    role, v = rng.choice(list(ROLES)), data.vocab
    turns = [(user, in_role(role, model, data.tokenizer)) for user, model in turns]
    voice = np.zeros((0, K), np.int64)
    if rng.random() < 0.5:
        line, turn = rng.choice([clip for clips in data.said["train"] for clip in clips])
        voice = data.utterance(data.line(line)["turns"][turn], rng).codes
    before = prompt(tokens_of(role, data.tokenizer), voice, v)
    return np.concatenate([before, response_tts(turns, gaps, v)], 1)
