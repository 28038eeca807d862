"""Before step 0: which stages the data can serve, for how long, and what of the data they leave out."""
import dataclasses
import random

import numpy as np

from streams import FRAME_RATE

PAUSE = 14  # frames at most before a clip of post-training
SAMPLED = 1000  # lines whose lengths stand for those of all
FEW = 20  # steps


def survey(task, stages):
    """(lines to print, the stages that there is something for, with their steps). ValueError
    if there is none."""
    kept = [s for s in stages if task.holds(s, "train")]
    if task.kind != "flm":
        if any(s.epochs for s in stages):
            raise ValueError("--epochs is for a model; the codec has --steps or --minutes")
        return [], kept
    notes = [f"{s.name}: skipped, as the data holds {too_little(task.data, s)}"
             for s in stages if s not in kept]
    frames, context = max(s.frames for s in stages), task.config.context
    if frames > context:
        raise ValueError(f"rows of {frames} frames: the model to start from has a context of {context}; "
                         f"--frames {context} makes rows that fit")
    if not kept:
        raise ValueError("the data holds nothing to train on for any stage: "
                         + ("; ".join(too_long(task.data, stages)) or "; ".join(notes)))
    notes += [*too_long(task.data, kept), *one_source(task.data, kept)]
    lengths, kept = in_steps(task.data, kept)
    return notes + lengths, kept


def too_little(data, stage):
    """What keeps a stage from being of use."""
    held = [name for name in stage.layouts if data.holds(name, "train", stage.frames)]
    missing = " and ".join(name for name in stage.layouts if name not in held)
    return f"nothing for {missing}" + f"; {' and '.join(held)} alone is under a quarter of it" * bool(held)


def clips_of(data, stage, frames):
    """{layout of post-training: its clips, [transcribed by a machine, by a person]} for rows of `frames`."""
    return {name: data.sources(name, "train", frames) for name in ("tts", "asr") if name in stage.layouts}


def too_long(data, stages):
    """A line for each stage whose rows are too short for some clips of post-training; alike ones once."""
    lines, index = {}, data.encoded.index
    for s in stages:
        fitting = clips_of(data, s, s.frames)
        for layout, whole in clips_of(data, s, 1 << 30).items():
            n, of = (sum(map(len, some)) for some in (fitting[layout], whole))
            if n < of:
                longest = max(index["frames"][some[:, 0]].max() for some in whole if len(some))
                lines[layout, s.frames] = (f"{layout}: {of - n} of {of} clips do not fit into rows of "
                                           f"{s.frames} frames and are left out; --frames "
                                           f"{longest + PAUSE} holds all")
    return list(lines.values())


def one_source(data, stages):
    """A line for each stage that should weigh what a machine transcribed against what a person did, and has
    only one of them."""
    lines = []
    for s in (s for s in stages if s.sources[0] != s.sources[1]):
        machine, person = (any(map(len, some)) for some in zip(*clips_of(data, s, s.frames).values()))
        if machine != person:
            who = "machine" if machine else "person"
            lines.append(f"{s.name}: all clips were transcribed by a {who} (\"annotated\" in the manifest); "
                         "they count alike")
    return lines


def frames_of(data, stage):
    """How many frames an epoch of a stage has: each clip once in each style of post-training, times the
    weight of its source, and each conversation once."""
    def of_turn(turn):
        return len(turn["tokens"]) + turn["copies"][0]["frames"] * ("language" not in stage.layouts)

    def of_clip(place):
        return of_turn(data.line(place[0])["turns"][place[1]])

    def of_conversation(number):
        line = data.line(number)
        return sum(map(of_turn, line["turns"])) if "turns" in line else line["listen"]["frames"]

    total = 0
    for sources in clips_of(data, stage, stage.frames).values():
        weights = stage.sources if all(map(len, sources)) else (1, 1)
        total += sum(weight * sum_over(some, of_clip) for weight, some in zip(weights, sources))
    others = [name for name in stage.layouts if name not in ("tts", "asr")]
    talks = [data.sources(name, "train", stage.frames) for name in others]
    return total + (sum_over(np.unique(np.concatenate(talks)), of_conversation) if talks else 0)


def sum_over(items, length):
    """The sum of the lengths of all items, if there are many from a sample of them."""
    some = items.tolist() if len(items) <= SAMPLED else random.Random(0).sample(items.tolist(), SAMPLED)
    return sum(map(length, some)) * len(items) / max(1, len(some))


def in_steps(data, stages):
    """(lines to print, the stages): those that are given in epochs with the steps that these take."""
    notes, out = [], []
    for s in stages:
        if s.epochs:
            frames = frames_of(data, s)
            s = dataclasses.replace(s, steps=max(1, round(s.epochs * frames / (s.batch * s.frames))))
            notes.append(f"{s.name}: {s.epochs:g} epochs of {frames / FRAME_RATE / 3600:.2f} hours, "
                         f"{s.steps} steps" + "; a smaller --batch makes more" * (s.steps < FEW))
        out.append(s)
    return notes, out
