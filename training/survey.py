"""Before step 0: which stages the data can serve, and what of it they leave out."""


def survey(task, stages):
    """(lines to print, the stages that there is something for). ValueError if there is none."""
    kept = [s for s in stages if task.holds(s, "train")]
    notes = [f"{s.name}: skipped, as the data holds little or nothing for {' and '.join(s.layouts)}"
             for s in stages if s not in kept]
    if not kept:
        raise ValueError("the data holds nothing to train on for any stage: "
                         + ("; ".join(too_long(task, stages)) or "; ".join(notes)))
    return [*notes, *too_long(task, kept)], kept


def too_long(task, stages):
    """A line for each stage whose rows are too short for some clips of post-training; alike ones once."""
    if task.kind != "flm":
        return []
    lines, index = {}, task.data.encoded.index
    for s in stages:
        for layout in [name for name in ("tts", "asr") if name in s.layouts]:
            whole = task.data.sources(layout, "train", 1 << 30)
            fit = task.data.sources(layout, "train", s.frames)
            n, of = (sum(map(len, some)) for some in (fit, whole))
            if n < of:
                longest = max(index["frames"][some[:, 0]].max() for some in whole if len(some))
                lines[layout, s.frames] = (f"{layout}: {of - n} of {of} clips do not fit into rows of "
                                           f"{s.frames} frames and are left out; rows of {longest + 14} "
                                           "frames hold all")
    return list(lines.values())
