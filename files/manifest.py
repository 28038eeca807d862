"""Manifests: text files that say what is spoken where, one JSON object to a line (FLM-Audio, section 3).

    {"audio": "a.flac", "text": "It is late."}                              a recording: post-training
        optional: "start", "end" in seconds, "lang", "annotated": by a person (true) or by a machine (false)
    {"turns": [                                                             a dialogue: fine-tuning
      {"role": "user",  "text": "repeat cat red moon", "audio": "user/000007.flac"},
      {"role": "model", "text": "cat red moon",        "audio": "model/cat-red-moon.flac"}]}
        optional in a turn: "starts", the second at which each word starts
        a turn may have "codes" instead of "audio": a .npy of (frames, 8) codes of Kyutai's Mimi
        optional: "interjections" [{"text", "audio", "at"}]: what the model says while the user speaks
    {"audio": "talk.wav", "sentences": [                                    a conversation in stereo, model
      {"role": "model", "start": 0.5, "end": 1.9, "text": "It is late."}]}  left and user right: fine-tuning
        optional in a sentence: "cut", the second at which an interruption ends it; "starts" of its words

Each line may have a "split": "train"; or "seen" and "new", which are held out (of known and of new voices).
Without it one line in a hundred is "seen".
"""
import itertools
import json
import os
import sys

import numpy as np

from files.atomic import move_folder, read_array, replace_when_done
from files.audio import seconds_of
from files.fields import FILE, FLAG, SECONDS, list_of, lines_of, parse_json, short, text

SPLITS = ("train", "seen", "new")
CODEC = 8, 2048  # codebooks and their size, of codes in a manifest: Kyutai's Mimi
SPOKEN = r"manifest\.jsonl|user|model|words|turns|talks"  # the names in the folders that prepare.py writes


def read_manifest(path, skip_broken=False, begin=(0, 0), lines=None):
    """Yield the lines of a manifest as check_line returns them, from `begin` (byte, line number) on, at most
    `lines`. A broken line or a missing audio file is a ValueError with the line's number, or, with
    skip_broken, a message on stderr; in the end it says how many there were."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such manifest; `python prepare.py toy` makes one")
    broken = 0
    with open(path, "rb") as f:
        f.seek(begin[0])
        for number, line in enumerate(itertools.islice(lines_of(f), lines), begin[1] + 1):
            try:
                yield check_line(line, number, os.path.dirname(path))
            except (ValueError, OSError) as e:
                if not skip_broken:
                    raise ValueError(f"{path}, line {number}: {e} (--skip-broken leaves it out)") from None
                print(f"skipped {path}, line {number}: {e}", file=sys.stderr)
                broken += 1
    if broken:
        print(f"{path}: {broken} broken lines are left out", file=sys.stderr)


def check_line(line, number, folder):
    """A line of a manifest in one form: {"split", "annotated", "turns": [{"role", "text", "path", "start",
    "end"}]}, perhaps with "interjections": [{"text", "path", "at"}]; or, for a recorded conversation,
    {"split", "annotated", "path", "sentences": [{"role", "text", "start", "end"}]}. A recording becomes a
    single turn of the role "either". Raises ValueError or OSError."""
    d = parse_json(line)
    if not isinstance(d, dict):
        raise ValueError("is not an object {...}")
    if "turns" not in d and "sentences" not in d:
        kept = {k: d[k] for k in ("id", "split", "annotated", "lang") if k in d}
        d = {"turns": [{**d, "role": "either"}], **kept}
    d.setdefault("split", "seen" if number % 100 == 1 else "train")
    d.setdefault("annotated", True)
    if d["split"] not in SPLITS:
        raise ValueError(f"there is no split {short(d['split'])}; known are {', '.join(SPLITS)}")
    for key, (kind, valid) in FACTS.items():
        if key in d and not valid(d[key]):
            raise ValueError(f"{key} is {kind}, not {short(d[key])}")
    turns, parts = "turns" in d, d.get("turns", d.get("sentences"))
    if not isinstance(parts, list) or not parts:
        raise ValueError("needs a list of turns or of sentences, or is a recording with audio and text")
    interjections = d.get("interjections", [])
    if not isinstance(interjections, list):
        raise ValueError("interjections are a list of {text, audio, at}")
    for part in parts:
        if turns:
            check_part(part, "turn", ("role", "text", sound_of(part)))
        else:
            check_part(part, "sentence", ("role", "text", "start", "end"))
    for part in interjections:
        check_part(part, "interjection", ("text", "audio", "at"))
    if turns and len(parts) > 1 and [p["role"] for p in parts] != ["user", "model"] * (len(parts) // 2):
        raise ValueError("in a dialogue user and model take turns, the user first")
    for part in spoken_parts(d) if turns else [d]:
        sound = sound_of(part) if turns else "audio"
        if not FILE[1](part.get(sound)):
            raise ValueError("needs the field 'audio', a file's name")
        part["path"] = os.path.join(folder, part[sound])
        if not os.path.isfile(part["path"]):
            raise FileNotFoundError(f"no audio file {part['path']}")
        if sound == "audio":
            seconds_of(part["path"], part.get("start", 0.0), part.get("end"))  # an error if it is broken
    return d


def sound_of(part):
    """The field that names the file of what is said."""
    return "codes" if isinstance(part, dict) and "codes" in part else "audio"


FACTS = {"annotated": FLAG, "lang": text(40), "kind": text(40)}  # of a line
FIELDS = {**dict.fromkeys(("role", "text"), ("text", text()[1])),
          **dict.fromkeys(("audio", "codes"), ("text", FILE[1])),
          **dict.fromkeys(("start", "end", "cut", "at"), SECONDS)}


def check_part(part, what, needed):
    """Raise ValueError unless a turn, sentence or interjection has the needed fields, and those it has are
    valid."""
    for key, (kind, valid) in FIELDS.items():
        if not isinstance(part, dict) or key in needed and key not in part:
            raise ValueError(f"the {what} needs the field {key!r}")
        optional = key == "end" and key not in needed and part.get(key) is None  # up to the end of the file
        if key in part and not valid(part[key]) and not optional:
            raise ValueError(f"the {what}'s field {key!r} is {kind}, not {short(part[key])}")
    if part.get("role", "either") not in ("user", "model", "either"):
        raise ValueError(f"a role is user or model, not {short(part['role'])}")
    if "codes" in part and {"audio", "start", "end"} & part.keys():
        raise ValueError(f"a {what} has codes or audio, and codes are used from the first to the last")
    start, end, words = part.get("start", 0.0), part.get("end"), part["text"].split()
    if end is not None and end <= start:
        raise ValueError(f"from {start} to {end} s is not a stretch of time")
    if part.get("cut", start) < start:
        raise ValueError(f"a sentence that starts at {start} s cannot be cut at {part['cut']} s")
    starts = part.get("starts", [0.0] * len(words))
    if not list_of(SECONDS)[1](starts) or len(starts) != len(words) or starts != sorted(starts):
        raise ValueError("starts is a list of seconds, one for each word, in order")


def spoken_parts(line):
    """All parts of a line that have an audio file of their own."""
    return [*line.get("turns", ()), *line.get("interjections", ())]


def clip_key(turn):
    """(path, start, end or None), which tells two clips apart."""
    return turn["path"], turn.get("start", 0.0), turn.get("end")


def check_codec(found, where):
    """ValueError unless a codec (codebooks, their size) is of the kind that codes in a manifest are from."""
    if found != CODEC:
        raise ValueError(f"{where}: holds codes of Kyutai's Mimi ({CODEC[0]} x {CODEC[1]}) and needs that "
                         "codec (--codec tokenizer-e351c8d8-checkpoint125.safetensors), not one of "
                         f"{found[0]} x {found[1]}")


def read_codes(path):
    """A turn's "codes": (frames, 8) int16. Raises ValueError with the file's name."""
    codes = read_array(path, "not a .npy file of codes")
    K, size = CODEC
    if codes.dtype.kind not in "iu" or codes.shape[1:] != (K,) \
            or not len(codes) or not 0 <= codes.min() <= codes.max() < size:
        raise ValueError(f"{path}: holds no codes: whole numbers from 0 to {size - 1}, {K} for each frame")
    return codes.astype(np.int16)


def write_manifest(lines, work, out):
    """The last step of making a folder: its manifest; then `work` becomes `out`."""
    path = os.path.join(work, "manifest.jsonl")
    with replace_when_done(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(d, ensure_ascii=False) + "\n" for d in lines)
    move_folder(work, out)
