"""Manifests: text files that say what is spoken where, one JSON object to a line (FLM-Audio, section 3).

    {"audio": "a.flac", "text": "It is late."}                                  a recording: post-training
        optional: "start", "end" in seconds, "lang", "annotated": by a person (true) or by a machine (false)
    {"turns": [                                                                 a dialogue: fine-tuning
      {"role": "user",  "text": "repeat cat red moon", "audio": "user/000007.flac"},
      {"role": "model", "text": "cat red moon",        "audio": "model/cat-red-moon.flac"}]}
        optional: "interjections" [{"text", "audio", "at"}]: what the model says so many seconds after the user has begun
    {"audio": "talk.wav", "sentences": [                                        a recorded conversation in stereo, the
      {"role": "model", "start": 0.5, "end": 1.9, "text": "It is late."}]}      model left and the user right: fine-tuning

and each may say "split": "train", or "seen" for what is held out (otherwise one line in a hundred is).
"""
import itertools
import json
import os
import sys

import soundfile


def read_manifest(path, skip_broken=False, begin=(0, 0), lines=None):
    """The lines of a manifest, one at a time; from the byte and line number `begin` on, so many lines. A broken line or a missing
    sound file is a ValueError that says which line, or, with skip_broken, a message while the rest goes on."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such manifest; `python prepare.py toy` makes one")
    with open(path, "rb") as f:
        f.seek(begin[0])
        for number, line in enumerate(itertools.islice(f, lines), begin[1] + 1):
            try:
                yield check_line(line, number, os.path.dirname(path))
            except (ValueError, OSError) as e:
                if not skip_broken:
                    raise ValueError(f"{path}, line {number}: {e} (--skip-broken goes on without it)") from None
                print(f"skipped {path}, line {number}: {e}", file=sys.stderr)


def check_line(line, number, folder):
    """A line of a manifest, made uniform: {"split", "annotated", "turns": [{"role", "text", "path", "start", "end"}]}, perhaps with
    "interjections": [{"text", "path", "at"}]; or, of a recorded conversation, {"split", "annotated", "path", "sentences":
    [{"role", "text", "start", "end"}]}. Raises ValueError or OSError."""
    d = json.loads(line)
    if not isinstance(d, dict):
        raise ValueError("is not an object {...}")
    if "turns" not in d and "sentences" not in d:  # a recording: good for hearing and for speaking
        d = {"turns": [{**d, "role": "either"}], **{k: d[k] for k in ("id", "split", "annotated", "lang") if k in d}}
    parts = d.get("turns", d.get("sentences"))
    if not isinstance(parts, list) or not parts:
        raise ValueError("needs a list of turns or of sentences, or is a recording with audio and text")
    for part in parts:
        needed = {"audio": str} if "turns" in d else {"start": (int, float), "end": (int, float)}
        for key, kind in {"role": str, "text": str, **needed}.items():
            if not isinstance(part, dict) or not isinstance(part.get(key), kind):
                raise ValueError(f"a {'turn' if 'turns' in d else 'sentence'} needs the field {key!r}")
        if part["role"] not in ("user", "model", "either"):
            raise ValueError(f"a role is user or model, not {part['role']!r}")
        if not part.get("start", 0.0) >= 0 or not part.get("end") is None and not part["end"] > part.get("start", 0.0):
            raise ValueError(f"from {part.get('start', 0.0)} to {part['end']} s is not a stretch of time")
    said = d.get("interjections", [])
    good = lambda t: isinstance(t, dict) and isinstance(t.get("text"), str) and t.get("at", -1) >= 0
    if not isinstance(said, list) or not all(map(good, said)):
        raise ValueError("interjections are a list of {text, audio, at}")
    if "turns" in d and len(parts) > 1 and [p["role"] for p in parts] != ["user", "model"] * (len(parts) // 2):
        raise ValueError("in a dialogue user and model take turns, the user first")
    for part in spoken_parts(d) if "turns" in d else [d]:
        if not isinstance(part.get("audio"), str):
            raise ValueError("needs the field 'audio'")
        part["path"] = os.path.join(folder, part["audio"])
        if not os.path.isfile(part["path"]):
            raise FileNotFoundError(f"no sound file {part['path']}")
    d.setdefault("split", "seen" if number % 100 == 1 else "train")  # one in a hundred is held out
    d.setdefault("annotated", True)
    return d


def spoken_parts(line):
    """All of a line that has a sound file of its own."""
    return [*line.get("turns", ()), *line.get("interjections", ())]


def clip_key(turn):
    return turn["path"], turn.get("start", 0.0), turn.get("end")


def seconds_of(path, start, end):
    return (soundfile.info(path).duration if end is None else end) - start


def must_be_new(out):
    if os.path.exists(out):
        raise ValueError(f"{out}: is there already; remove it, or name another folder with --out")


def write_manifest(lines, work, out):
    """The last thing in a folder of work, which then becomes `out`."""
    with open(os.path.join(work, "manifest.jsonl"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(d, ensure_ascii=False) + "\n" for d in lines)
    os.rename(work, out)
