"""A run as a picture: the losses over all its stages, and the share of monologue tokens that were right.

    python plot.py out/tiny        out/tiny/log.jsonl -> out/tiny/log.png
"""
import argparse
import json
import os
import sys

from files import replace_when_done


def plot(folder):
    """The losses of a run over all its stages, and the share of monologue tokens that were right, from folder/log.jsonl into
    folder/log.png. Returns the picture's path."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs the extra 'plot': pip install '.[plot]'") from None
    source = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(source):
        raise FileNotFoundError(f"{source}: no such log; --plot takes a folder that train.py wrote")
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
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    shares = axes.twinx() if "right" in names else None
    for colour, name in enumerate(names):
        for split, style in ((None, {"alpha": 0.35, "linewidth": 0.8}), ("held-out", {"marker": "o", "label": name + ", held out"})):
            points = sorted((starts[stage] + step, e[name]) for (stage, step, s), e in lines.items() if s == split and e.get(name))
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
        print(f"Wrote {plot(parser.parse_args().folder)}")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
