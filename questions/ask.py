"""Questions, asked of the toy world: each variant of a recipe is trained and measured, with several seeds.

    python -m questions.ask              the paper's; an hour or two; it can be continued
    python -m questions.ask states typed prompts teacher long
    python -m questions.ask states --seeds 1 --items 20

Each variant trains the tiny model with the same data, number of steps and seeds (of the weights and of the
batches), on few voices and without stories, so that a run takes minutes; then it is evaluated in the same
held-out conversations. The codec is that of `make talk`. The tables that are printed have means and standard
deviations over seeds. To ask one of your own, write its variants as in questions/layouts.py, and its name
below. A new layout is a function in layouts/, whose __init__.py says how it is written. What is in
out/questions is not trained again; remove a question's folder there after a change of its code.

    paper      what each stage is for, word-aligned text (FLM-Audio, RQ1 and RQ2)
    long       the same where answers are long
    states     SHIFT and BREAK around each answer (Covo-Audio-Chat-FD)
    division   two columns for each frame (Covo-Audio-FD)
    voices     voice prompts (PersonaPlex), decoupling of speaker and dialogue (Covo-Audio)
    prompts    roles (PersonaPlex)
    typed      turns that are typed (Hello-Chat)
    documents  samples of a row of training that do not see each other
    teacher    distillation from the text model, replay of text (Hello-Chat)
"""
import argparse
import dataclasses
import json
import os
import random
import statistics
import sys

import torch
from tqdm import tqdm

import prepare
import train
from chat import DuplexModel
from evals.recogniser import SHIPPED, get_recogniser
from files.atomic import read_json, replace_when_done
from files.processes import in_processes
from live.packed import unpack
from model import CONFIGS
from questions.layouts import DIVISION, DOCUMENTS, PROMPTS, STATES, STATES_WORLD, TYPED, cost_of_division
from questions.paper import LONG, LONG_WORLD, PAPER, multiplexing
from questions.recipe import MEASURES, World
from questions.teacher import TEACHER, start_teacher
from questions.voices import VOICES, WORLD as VOICES_WORLD

OUT, CODEC = "out/questions", "out/talk/codec.pt"
QUESTIONS = {"paper": PAPER, "long": LONG, "states": STATES, "division": DIVISION, "voices": VOICES,
             "prompts": PROMPTS, "typed": TYPED, "teacher": TEACHER, "documents": DOCUMENTS}
COSTS = {"paper": multiplexing, "division": cost_of_division}  # what else a question prints
WORLDS = {"long": LONG_WORLD, "voices": VOICES_WORLD, "states": STATES_WORLD}


def world_of(question):
    return WORLDS.get(question, World())


def folder_of(question, name, seed):
    return os.path.join(OUT, question, f"{name.strip('<>').replace(', ', '-').replace(' ', '-')}-{seed}")


def answer(task):
    """Train one variant with one seed and measure it, unless that is done."""
    question, name, seed, items, share = task
    variant, world, out = QUESTIONS[question][name], world_of(question), folder_of(question, name, seed)
    held_out, path = world.held_out()[:items], os.path.join(out, "scores.json")
    how = {"items": len(held_out), "share": share, "stages": repr(variant.stages)}
    if os.path.exists(path):
        scores = read_json(path)
        odd = [key for key, value in how.items() if scores.get(key) != value]
        if odd:
            raise ValueError(f"{path}: is of other {' and '.join(odd)}; remove {out}, or ask as before")
        return question, name, scores
    if variant.prepare:
        variant.prepare()
    random.seed(seed)
    torch.manual_seed(seed)
    model_task = variant.task(CONFIGS["tiny"], os.path.join(world.folder, "encoded"), "cpu", None, seed)
    model_task.from_nothing = variant.muon
    stages = [dataclasses.replace(s, steps=max(1, round(s.steps * share))) for s in variant.stages]
    if hasattr(model_task, "teacher"):
        start_teacher(model_task, out, seed, stages)
    train.train(model_task, stages, out, resume=True, seed=seed)
    recogniser = get_recogniser(None, world.folder, "out/questions/recogniser", None, "cpu")
    duplex = DuplexModel.load(out, "cpu")
    scores = {**how, **variant.measure(model_task, duplex, recogniser, held_out)}
    with replace_when_done(path) as temporary, open(temporary, "w") as f:
        json.dump(scores, f)
    return question, name, scores


def make_data(world, processes):
    """A world's data, encoded, and the recogniser that judges, unless they are there."""
    if not os.path.exists(CODEC):
        unpack(os.path.join(os.path.dirname(SHIPPED), "talk.safetensors"), os.path.dirname(CODEC))
    if not os.path.exists(world.folder):
        world.make()
    if not os.path.exists(os.path.join(world.folder, "encoded")):
        prepare.encode(world.folder, CODEC, "bpe", 512, 1, 0.0, False, processes, "cpu")
    get_recogniser(None, world.folder, "out/questions/recogniser", None, "cpu")


def table(found, measures, title):
    """found: {variant: [{measure: value}, one for each seed]} -> the lines of a Markdown table. measures:
    {measure: title}"""
    lines = [f"| {title} | {' | '.join(measures.values())} |", "|---" * (1 + len(measures)) + "|"]
    for name, runs in found.items():
        columns = [[r[key] for r in runs] for key in measures]
        spread = lambda x: f" ± {statistics.stdev(x):.2f}" if len(x) > 1 else ""
        cells = [f"{statistics.mean(x):.2f}{spread(x)}" for x in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ask(names, seeds, items, processes, share=1.0):
    for world in dict.fromkeys(map(world_of, names)):
        make_data(world, processes)
    wanted = [(question, name, seed, items, share) for question in names for seed in range(1, seeds + 1)
              for name in QUESTIONS[question]]
    found = {question: {name: [] for name in QUESTIONS[question]} for question in names}
    answers = in_processes(answer, wanted, processes, "spawn", torch.set_num_threads, (1,),
                           name=lambda task: f"{task[0]}, {task[1]}, seed {task[2]}")
    for question, name, scores in tqdm(answers, "questions", len(wanted), unit="run"):
        found[question][name].append(scores)
    written = []
    for question in names:
        first, held = next(iter(QUESTIONS[question].values())), len(world_of(question).held_out()[:items])
        steps = round(share * sum(s.steps for s in first.stages))
        text = table(found[question], first.titles or MEASURES,
                     f"{question}: {seeds} seeds, {steps} steps, {held} conversations each")
        print("\n" + text)
        written.append(os.path.join(OUT, f"{question}.md"))
        with replace_when_done(written[-1]) as temporary, open(temporary, "w", encoding="utf-8") as f:
            f.write(text + "\n")
    for name in names:
        COSTS.get(name, lambda: None)()
    print(f"\nWrote {', '.join(written)}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME", default=["paper"],
                        help=f"{', '.join(QUESTIONS)} (default: paper)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--items", type=int, default=200, help="held-out conversations for each run")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, for a trial")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        unknown = [name for name in args.names if name not in QUESTIONS]
        if unknown:
            raise ValueError(f"no question {unknown[0]}; there are {', '.join(QUESTIONS)}")
        ask(args.names, args.seeds, args.items, args.processes, args.share)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
