"""The paper's questions, asked of the toy world (FLM-Audio, sections 4.3 and 4.4).

    python tests/questions.py        after `make demo`; an hour or two on two cores; it can be continued

Each variant trains the tiny model with the same data, number of steps and seeds, on fewer voices and without
chants and stories, so that a run takes minutes; then it is evaluated in the same held-out conversations. The
table that is printed has means and standard deviations over seeds.

    recipe             language, post-training in ASR and TTS style, answers with <asr>, then without
    wait 0.01          the paper's weight for <wait> instead of 0.3
    TTS only           post-training in TTS style alone                              (RQ2)
    ASR only           post-training in ASR style alone                              (RQ2)
    no fine-tuning 1   answers without <asr> from the start                          (RQ2)
    word-aligned       the same; each word is written when it is spoken, as in Moshi (RQ1: see the row above)
    AdamW              the recipe with the paper's optimiser for everything
    no language        the recipe without the text-only stage; fine-tuning gets its steps
"""
import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import statistics
import sys
import time

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import eval as evaluation  # noqa: E402
import prepare  # noqa: E402
from toy import script as toy_script  # noqa: E402
import streams  # noqa: E402
import train  # noqa: E402
from chat import DuplexModel  # noqa: E402
from files.atomic import read_json, replace_when_done  # noqa: E402
from files.manifest import read_manifest  # noqa: E402
from eval import KINDS  # noqa: E402
from model import CONFIGS, FLM  # noqa: E402
from evals.recogniser import get_recogniser  # noqa: E402
from streams import ROWS  # noqa: E402

DATA, OUT, CODEC = "data/questions", "out/questions", "out/codec/checkpoint.pt"
BOTH = {"tts": (1, 1), "asr": (2, 2)}
FADE = {"asr_response_tts": (0.7, -0.7), "response_tts": (1, 1)}
ANSWER, ALIGNED = {"response_tts": (1, 1)}, {"word_aligned": (1, 1)}


def stages(post=BOTH, fine_1=train.FINE_1, fine_2=FADE, wait=0.3, language=250):
    def stage(name, steps, layouts, end=1.5e-3):
        return train.Stage(name, steps, 8, 1.5e-3, end, 96, layouts, wait=wait, frame_dropout=0.15,
                           depth=(0.25, 0.05))
    begin = train.Stage("language", language, 8, 1.5e-3, 1.5e-3, 96, train.LANGUAGE, wait=1.0)
    more = (250 - language) // 2
    return (*([begin] if language else []), stage("post-training", 150, post),
            stage("fine-tuning 1", 250 + more, fine_1), stage("fine-tuning 2", 400 + more, fine_2, 0))


VARIANTS = {
    "recipe": stages(),
    "wait 0.01": stages(wait=0.01),
    "TTS only": stages(post={"tts": (1, 1)}),
    "ASR only": stages(post={"asr": (1, 1)}),
    "no fine-tuning 1": stages(fine_1=ANSWER, fine_2=ANSWER),
    "word-aligned": stages(fine_1=ALIGNED, fine_2=ALIGNED),
    "AdamW": stages(),
    "no language": stages(language=0),
}
# what eval.py calls it -> the column's title
MEASURES = {"text": "text right", "text, repeat": "- repeat", "text, count": "- count",
            "spoken 1 - WER": "spoken 1 - WER", "in time": "in time", "early": "early"}


def aligned_tts(u, v):
    """TTS style with each token at the frame where it is spoken."""
    grid = streams.blank(streams.TEXT_LEAD + len(u.codes), v, v.empty)
    for token, start in zip(u.tokens, u.starts, strict=True):
        streams.put(grid, streams.TEXT, streams.TEXT_LEAD + start, [token])
    streams.put(grid, streams.SPEAK, streams.TEXT_LEAD, u.codes)
    return grid


def answer(task):
    """Train one variant with one seed and measure it, unless that is done."""
    name, seed, items = task
    torch.set_num_threads(1)  # Run then uses one thread too
    if name == "word-aligned":
        streams.tts = aligned_tts
    out = os.path.join(OUT, f"{name.replace(' ', '-')}-{seed}")
    path = os.path.join(out, "scores.json")
    if os.path.exists(path):
        return name, read_json(path)
    random.seed(seed)
    torch.manual_seed(seed)
    model_task = train.ModelTask(CONFIGS["tiny"], os.path.join(DATA, "encoded"), "cpu")
    model_task.from_nothing = name != "AdamW"  # as if it had started from published weights
    train.train(model_task, VARIANTS[name], out, resume=True, seed=seed)
    recogniser = get_recogniser(None, DATA, "out/questions/recogniser", 1.5, "cpu")
    manifest = read_manifest(os.path.join(DATA, "manifest.jsonl"))
    held_out = [d for d in manifest if d["split"] == "seen" and d["kind"] in KINDS]
    shares = evaluation.Proportions()
    evaluation.answers(DuplexModel.load(out, "cpu"), recogniser, held_out[:items], 7, shares, "seen")
    scores = {measure: shares.proportion(f"seen {measure}") for measure in MEASURES}
    with replace_when_done(path) as temporary, open(temporary, "w") as f:
        json.dump(scores, f)
    return name, scores


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


def make_data(processes):
    """The data of all variants, encoded, and the recogniser that judges them, unless they are there."""
    encoded = os.path.exists(os.path.join(DATA, "encoded"))
    if not encoded and not os.path.exists(CODEC):
        raise ValueError(f"{CODEC}: not there; needs what `make demo` leaves")
    toy_script.KIND_PROPORTIONS = {kind: toy_script.KIND_PROPORTIONS[kind] for kind in KINDS}
    if not os.path.exists(DATA):
        toy_script.make_toy(DATA, "en", items=4000, tests=240, sentences=2000, voices=6, seed=2, tts=None)
    if not encoded:
        prepare.encode(DATA, CODEC, "bpe", 512, 1, 0.0, False, processes, "cpu")
    get_recogniser(None, DATA, "out/questions/recogniser", 1.5, "cpu")


def table(found, title):
    """found: {variant: [{measure: value}, one for each seed]} -> the lines of a Markdown table."""
    lines = [f"| {title} | {' | '.join(MEASURES.values())} |", "|---" * (1 + len(MEASURES)) + "|"]
    for name, runs in found.items():
        columns = [[r[key] for r in runs] for key in MEASURES]
        cells = [(statistics.mean(x), statistics.stdev(x) if len(x) > 1 else 0.0) for x in columns]
        lines.append(f"| {name} | " + " | ".join(f"{m:.2f} ± {s:.2f}" for m, s in cells) + " |")
    return "\n".join(lines)


def ask(seeds, items, processes):
    make_data(processes)
    wanted = [(name, seed, items) for seed in range(1, seeds + 1) for name in VARIANTS]
    found = {name: [] for name in VARIANTS}
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        for name, scores in tqdm(pool.imap_unordered(answer, wanted), "questions", len(wanted), unit="run"):
            found[name].append(scores)
    steps = sum(s.steps for s in VARIANTS["recipe"])
    text = table(found, f"{seeds} seeds, {steps} steps, {items} conversations each")
    print("\n" + text)
    multiplexing()
    path = os.path.join(OUT, "table.md")
    with replace_when_done(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.write(text + "\n")
    print(f"\nWrote {path}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--items", type=int, default=200, help="held-out conversations for each run")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        ask(args.seeds, args.items, args.processes)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
