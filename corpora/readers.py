"""Corpora as they are downloaded -> the lines of a manifest."""
import glob
import json
import os

from tqdm import tqdm

from files.atomic import check_folder, read_json, replace_when_done
from files.fields import FILE, SECONDS, check_fields, lines_of, one_line, parse_json
from files.tokenizer import NO_SPACES


def numbered_lines(path):
    """(where it is, for messages, and text) of each line of a file. ValueError for one that is not UTF-8."""
    with open(path, "rb") as f:
        for number, line in enumerate(lines_of(f), 1):
            where = f"{path}, line {number}"
            try:
                yield where, line.decode().rstrip("\r\n")
            except UnicodeDecodeError as e:
                raise ValueError(f"{where}: {e}") from None


def librispeech(folder):
    """LibriSpeech: a *.trans.txt in each chapter's folder, with lines 'ID WORDS' for the files ID.flac."""
    for transcript in sorted(glob.glob(os.path.join(folder, "**", "*.trans.txt"), recursive=True)):
        for _, line in numbered_lines(transcript):
            if " " in line:
                name, text = line.split(" ", 1)
                audio = os.path.join(os.path.dirname(transcript), name + ".flac")
                yield {"audio": audio, "text": text.lower(), "lang": "en"}


def ljspeech(folder):
    """LJSpeech: metadata.csv with lines 'ID|text|text with numbers as words' for the files wavs/ID.wav."""
    for where, line in numbered_lines(os.path.join(folder, "metadata.csv")):
        if line.strip():
            if line.count("|") != 2:
                raise ValueError(f"{where}: is not ID|text|text with numbers as words")
            name, _, text = line.split("|")
            yield {"audio": os.path.join(folder, "wavs", name + ".wav"), "text": text, "lang": "en"}


def conversations(path):
    """Stereo conversations in the format of moshi-finetune, the model left and the user right: lines {"path",
    "duration"}, and beside each audio file a .json with {"alignments": [[word, [start, end], speaker],
    ...]}."""
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                d = parse_json(line)
                check_fields(d, {"path": FILE})
                audio = os.path.join(os.path.dirname(path), d["path"])
                heard = read_json(os.path.splitext(audio)[0] + ".json")["alignments"]
                words = [(w.strip(), float(a), float(b), speaker)
                         for w, (a, b), speaker in heard if w.strip()]
                if not all(SECONDS[1](a) and SECONDS[1](b) and a <= b for _, a, b, _ in words):
                    raise ValueError("a word has no start and end in seconds")
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as e:
                raise ValueError(f"{path}, line {number}: {one_line(e)}") from None
            yield {"audio": audio, "sentences": sentences_of(words)}


def sentences_of(words, pause=0.8, longest=20.0):
    """Words (text, start, end, speaker) in order -> sentences, with the start of each word (of each text
    without spaces, in a script that has none). A new one begins after a full stop or a pause (seconds), or
    when one becomes too long (seconds)."""
    out = []
    for role in ("model", "user"):
        last = None
        for text, start, end, _ in (w for w in words if (w[3] == "SPEAKER_MAIN") == (role == "model")):
            if last is None or start - last["end"] > pause or end - last["start"] > longest \
                    or last["text"][-1] in ".?!。？！":
                last = {"role": role, "text": text, "start": start, "end": end, "starts": []}
                out.append(last)
            else:
                space = "" if NO_SPACES.match(text) and NO_SPACES.match(last["text"][-1]) else " "
                last["text"], last["end"] = last["text"] + space + text, end
            new = len(last["text"].split()) - len(last["starts"])  # 0, or 1: more if a "word" has spaces
            last["starts"] += [max([start, *last["starts"]])] * new  # in order, even if these are not
    return sorted(out, key=lambda s: s["start"])


READERS = {"librispeech": librispeech, "ljspeech": ljspeech, "conversations": conversations}


def collect(corpus, source, out):
    """Write out/manifest.jsonl for a corpus as it was downloaded."""
    path, _ = check_folder(os.path.join(out, "manifest.jsonl"))
    n = 0
    with replace_when_done(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        for n, line in enumerate(tqdm(READERS[corpus](os.path.abspath(source)), corpus, unit="line"), 1):
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
        if not n:
            raise ValueError(f"{source}: there is nothing of {corpus} in it")
    print(f"Wrote {n} lines to {path}; next: python prepare.py encode --data {out}")
