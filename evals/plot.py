"""Pictures: of a conversation (chat.py --picture) and of a training run.

    python -m evals.plot out/tiny        out/tiny/log.jsonl -> out/tiny/log.png
"""
import argparse
import os
import sys

import torch
import torch.nn.functional as F

from files.atomic import replace_when_done
from files.audio import SAMPLE_RATE
from files.fields import parse_json
from evals.turns import yields

NOT_LOSSES = {"stage", "step", "split", "loss", "lr", "seconds", "tokens_per_second",
              "waits"}  # of a log's numbers


def new_figure(width, height):
    """A figure of this many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs the extra 'plot': pip install '.[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def check_picture(path):
    """Before the work: ValueError if no picture can be drawn into `path`."""
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    if os.path.splitext(path)[1][1:] not in ("", *kinds):
        raise ValueError(f"{path}: cannot draw this kind of picture; use an ending such as .png or .svg")


# ------------------------------------------------------------------------------------------------------------
# a conversation


def draw_conversation(path, heard, said, pieces):
    """Both voices above each other, the monologue at the time it was written, a mark where the model
    yielded."""
    length = len(heard) / SAMPLE_RATE
    figure = new_figure(min(40, max(6, 1.2 * length)), 3.6)
    rows = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 2])
    draw_envelope(rows[0], heard, "user", "tab:blue")
    draw_monologue(rows[1], pieces)
    draw_envelope(rows[2], said, "model", "tab:orange")
    for t in yields(heard, said):
        for row in rows:
            row.axvline(t, color="tab:red", linestyle="--", linewidth=1)
        rows[2].text(t, 0.9, " yields", color="tab:red", fontsize=8, va="top",
                     transform=rows[2].get_xaxis_transform())
    rows[2].set_xlabel("seconds")
    rows[2].set_xlim(0, length)
    with replace_when_done(path) as temporary:
        figure.savefig(temporary, dpi=110, format=os.path.splitext(path)[1][1:] or "png")


def draw_envelope(row, x, name, colour):
    peak = F.pad(x, (0, -len(x) % 240)).view(-1, 240).abs().amax(1)  # of each 10 ms
    row.fill_between(torch.arange(len(peak)) / 100, -peak, peak, color=colour, linewidth=0)
    row.set_ylabel(name)
    row.set_yticks([])


def draw_monologue(row, pieces):
    words = []  # [begin, end, text] of pieces that follow one another without a pause
    for piece in pieces:
        if words and piece["time"] - words[-1][1] < 0.2:
            words[-1][1:] = piece["time"], words[-1][2] + piece["text"]
        else:
            words.append([piece["time"], piece["time"], piece["text"]])
    for i, (begin, _, text) in enumerate(words):
        row.text(begin, 0.65 - 0.5 * (i % 2), text.strip(), fontsize=8, clip_on=True, va="center")
        row.axvline(begin, color="0.8", linewidth=0.8, zorder=0)
    row.set_ylabel("text")
    row.set_yticks([])


# ------------------------------------------------------------------------------------------------------------
# a training run


def read_log(path):
    """log.jsonl -> {(stage, step, split): entry}. A run that was killed repeats the steps since its last
    checkpoint: the later line counts. Lines that are not whole (cut off by a kill, or mixed by two
    trainings) are skipped."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such log; name a folder that train.py wrote")
    entries, skipped = {}, 0
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                entry = parse_json(line)
                entries[str(entry["stage"]), int(entry["step"]), entry.get("split")] = entry
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                skipped += 1
    if skipped:
        print(f"warning: {path}: skipped {skipped} line(s) that are not whole", file=sys.stderr)
    if not entries:
        raise ValueError(f"{path}: holds no line of a training run")
    return entries


def losses_of(entry):
    """{name: number}, and the accuracy of the monologue; a loss of 0 has no place on a logarithmic axis."""
    return {k: x for k, x in entry.items() if k not in NOT_LOSSES and isinstance(x, (int, float))
            and (x > 0 or k == "text_accuracy")}


def draw_run(folder):
    """The losses of a run over all its stages, and the share of monologue tokens predicted right, from
    folder/log.jsonl into folder/log.png. Returns the picture's path."""
    entries = read_log(os.path.join(folder, "log.jsonl"))
    begin, starts = 0, {}
    for stage in dict.fromkeys(stage for stage, *_ in entries):
        starts[stage] = begin
        begin += max(step for name, step, _ in entries if name == stage)
    figure = new_figure(9, 4.5)
    axes = figure.subplots()
    names = list(dict.fromkeys(name for entry in entries.values() for name in losses_of(entry)))
    accuracy = axes.twinx() if "text_accuracy" in names else None
    for i, name in enumerate(names):
        for split, style in ((None, {"alpha": 0.35, "linewidth": 0.8}),
                             ("held-out", {"marker": "o", "label": f"{name}, held out"})):
            points = sorted((starts[stage] + step, losses_of(entry)[name])
                            for (stage, step, s), entry in entries.items()
                            if s == split and name in losses_of(entry))
            if points:
                (accuracy if name == "text_accuracy" else axes).plot(*zip(*points), color=f"C{i}", **style)
    label_run(axes, accuracy, starts)
    path = os.path.join(folder, "log.png")
    with replace_when_done(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return path


def label_run(axes, accuracy, starts):
    for i, (stage, start) in enumerate(starts.items()):
        axes.axvline(start, color="0.7", linewidth=0.8)
        axes.text(start, 1.01 + 0.04 * (i % 2), stage, transform=axes.get_xaxis_transform(), va="bottom",
                  fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss")
    axes.legend(fontsize=8, loc="lower left")
    if accuracy:
        accuracy.set_ylabel("accuracy of monologue tokens")
        accuracy.set_ylim(0, 1.02)
        accuracy.legend(fontsize=8, loc="upper right")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", help="folder that train.py wrote")
    try:
        print(f"Wrote {draw_run(parser.parse_args().folder)}")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
