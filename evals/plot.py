"""Pictures: a conversation (chat.py --picture), and a run.

    python plot.py out/tiny        out/tiny/log.jsonl -> out/tiny/log.png
"""
import argparse
import json
import os
import sys

import torch

from files.atomic import replace_when_done
from files.audio import SAMPLE_RATE
from evals.turns import yields


def new_figure(width, height):
    """A figure of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs the extra 'plot': pip install '.[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw_talk(path, heard, said, pieces):
    """Both voices above each other, the monologue where it was written, a mark where the model yielded to the user."""
    length = len(heard) / SAMPLE_RATE
    figure = new_figure(min(40, max(6, 1.2 * length)), 3.6)
    rows = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 2])
    for row, x, name, colour in ((rows[0], heard, "user", "tab:blue"), (rows[2], said, "model", "tab:orange")):
        peak = torch.nn.functional.pad(x, (0, -len(x) % 240)).view(-1, 240).abs().amax(1)  # of each 10 ms
        time = torch.arange(len(peak)) / 100
        row.fill_between(time, -peak, peak, color=colour, linewidth=0)
        row.set_ylabel(name)
        row.set_yticks([])
    words = []  # pieces that follow one another without a pause belong together
    for piece in pieces:
        if words and piece["time"] - words[-1][1] < 0.2:
            words[-1][1:] = piece["time"], words[-1][2] + piece["text"]
        else:
            words.append([piece["time"], piece["time"], piece["text"]])
    for i, (begin, _, text) in enumerate(words):
        rows[1].text(begin, 0.65 - 0.5 * (i % 2), text.strip(), fontsize=8, clip_on=True, va="center")
        rows[1].axvline(begin, color="0.8", linewidth=0.8, zorder=0)
    rows[1].set_ylabel("text")
    rows[1].set_yticks([])
    for at in yields(heard, said):
        for row in rows:
            row.axvline(at, color="tab:red", linestyle="--", linewidth=1)
        rows[2].text(at, 0.9, " yields", color="tab:red", fontsize=8, va="top", transform=rows[2].get_xaxis_transform())
    rows[2].set_xlabel("seconds")
    rows[2].set_xlim(0, length)
    with replace_when_done(path) as temporary:
        figure.savefig(temporary, dpi=110, format=os.path.splitext(path)[1][1:] or "png")


def draw_run(folder):
    """The losses of a run over all its stages, and the share of monologue tokens that were right, from folder/log.jsonl into
    folder/log.png. Returns the picture's path."""
    source = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(source):
        raise FileNotFoundError(f"{source}: no such log; name a folder that train.py wrote")
    # A run that was killed repeats the steps since its last checkpoint: the later line counts.
    lines = {}
    with open(source) as f:
        for line in f:
            entry = json.loads(line)
            lines[entry["stage"], entry["step"], entry.get("split")] = entry
    stages = list(dict.fromkeys(stage for stage, *_ in lines))
    begin, starts = 0, {}
    for stage in stages:
        starts[stage] = begin
        begin += max(step for name, step, _ in lines if name == stage)
    names = list(dict.fromkeys(k for e in lines.values() for k in e if k not in ("stage", "step", "lr", "loss", "split", "waits")))
    figure = new_figure(9, 4.5)
    axes = figure.subplots()
    shares = axes.twinx() if "right" in names else None
    for colour, name in enumerate(names):
        for split, style in ((None, {"alpha": 0.35, "linewidth": 0.8}), ("held-out", {"marker": "o", "label": name + ", held out"})):
            shown = [(key, e[name]) for key, e in lines.items() if name in e and (e[name] > 0 or name == "right")]  # log 0 has no place
            points = sorted((starts[stage] + step, value) for (stage, step, s), value in shown if s == split)
            (shares if name == "right" else axes).plot(*zip(*points), color=f"C{colour}", **style) if points else None
    for i, stage in enumerate(stages):
        axes.axvline(starts[stage], color="0.7", linewidth=0.8)
        axes.text(starts[stage], 1.01 + 0.04 * (i % 2), stage, transform=axes.get_xaxis_transform(), va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss")
    axes.legend(fontsize=8, loc="lower left")
    if shares:
        shares.set_ylabel("monologue tokens right")
        shares.set_ylim(0, 1.02)
        shares.legend(fontsize=8, loc="upper right")
    path = os.path.join(folder, "log.png")
    with replace_when_done(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="that train.py wrote")
    try:
        print(f"Wrote {draw_run(parser.parse_args().folder)}")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
