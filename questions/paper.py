"""The paper's own questions (FLM-Audio, sections 4.3 and 4.4).

    recipe             language, post-training in ASR and TTS style, answers with <asr>, then without
    wait 0.01          the paper's weight for <wait> instead of 0.3
    TTS only           post-training in TTS style alone                              (RQ2)
    ASR only           post-training in ASR style alone                              (RQ2)
    no fine-tuning 1   answers without <asr> from the start                          (RQ2)
    word-aligned       the same; each word is written when it is spoken, as in Moshi (RQ1: see the row above)
    AdamW              the recipe with the paper's optimiser for everything
    no language        the recipe without the text-only stage; fine-tuning gets its steps

LONG asks RQ1 and RQ2 again where answers are long (counts and chants of eight words and more), with twice the
steps and a depth transformer that learns from more frames.
"""
import dataclasses
import time
from functools import partial

import torch

import streams
from model import CONFIGS, FLM
from questions.recipe import ANSWER, Variant, World, measure, stages
from streams import ROWS

ALIGNED = {"word_aligned": (1, 1)}


def aligned_tts(u, v):
    """TTS style with each token at the frame where it is spoken."""
    grid = streams.blank(streams.TEXT_LEAD + len(u.codes), v, v.empty)
    for token, start in zip(u.tokens, u.starts, strict=True):
        streams.put(grid, streams.TEXT, streams.TEXT_LEAD + start, [token])
    streams.put(grid, streams.SPEAK, streams.TEXT_LEAD, u.codes)
    return grid


def align():
    streams.tts = aligned_tts


def variants(**more):
    """more: see stages."""
    return {
        "recipe": Variant(stages(**more)),
        "wait 0.01": Variant(stages(wait=0.01, **more)),
        "TTS only": Variant(stages(post={"tts": (1, 1)}, **more)),
        "ASR only": Variant(stages(post={"asr": (1, 1)}, **more)),
        "no fine-tuning 1": Variant(stages(fine_1=ANSWER, fine_2=ANSWER, **more)),
        "word-aligned": Variant(stages(fine_1=ALIGNED, fine_2=ALIGNED, **more), prepare=align),
        "AdamW": Variant(stages(**more), muon=False),
        "no language": Variant(stages(language=0, **more)),
    }


RQ = ("recipe", "TTS only", "ASR only", "no fine-tuning 1", "word-aligned")
PAPER = variants()
LONG_TITLES = {"text": "text right", "text, count": "- count", "text, chant": "- chant",
               "spoken 1 - WER": "spoken 1 - WER", "in time": "in time", "early": "early"}
LONG = {name: dataclasses.replace(variant, measure=partial(measure, measures=LONG_TITLES), titles=LONG_TITLES)
        for name, variant in variants(times=2, depth=(0.4, 0.1), rows=(4, 192)).items() if name in RQ}
LONG_WORLD = World("data/long", ("repeat", "count", "chant"), words=8, tests=900)


def multiplexing(seconds=10):
    """Figure 1: native full duplex has one position a frame, multiplexing in time one a token."""
    frames = round(seconds * streams.FRAME_RATE)
    print("\nTen seconds of conversation in `tiny`'s temporal transformer, forward and backward, one row:")
    multiplexed = f"multiplexed, {ROWS} positions a frame"
    for name, T in (("native, one position a frame", frames), (multiplexed, ROWS * frames)):
        model = FLM(dataclasses.replace(CONFIGS["tiny"], context=T))
        grid, times = torch.randint(0, 256, (1, ROWS, T)), []
        for _ in range(4):
            begun = time.perf_counter()
            model(grid).sum().backward()
            times.append(time.perf_counter() - begun)
        print(f"  {name:38} {T:5} positions {1000 * min(times):8.0f} ms")
