"""Recordings without text -> a manifest, with what a recogniser hears in them.

    python prepare.py transcribe FOLDER --asr 'whisper-cli -nt {wav}' --out data/mine

Lines are marked as transcribed by a machine ("annotated": false): post-training 1 of `7b` uses only these.
"""
import glob
import json
import os
import shutil
import sys
import tempfile

import soundfile
from tqdm import tqdm

from files.atomic import check_folder, replace_when_done
from files.audio import read_blocks, write_audio
from files.command import PLAIN, Command
from files.fields import FILE, check_fields, parse_json, text


class AsrCommand:
    """A recogniser: a command with {wav}, the audio file, that prints what it hears."""

    def __init__(self, template):
        self.command = Command("--asr", template, ["wav"])

    def hear_file(self, path):
        """What it prints, in one line. ValueError if it fails."""
        if not self.command.joins("wav") or PLAIN.fullmatch(path):
            return " ".join(self.command(wav=path).split())
        with tempfile.TemporaryDirectory() as folder:  # a shell would see more than one word in this name
            ending = os.path.splitext(path)[1]
            copy = os.path.join(folder, "speech" + (ending if PLAIN.fullmatch(ending) else ""))
            return " ".join(self.command(wav=shutil.copyfile(path, copy)).split())

    def hear_samples(self, wav):
        """The same for samples (N,)."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "speech.wav")
            write_audio(path, wav)
            return self.hear_file(path)


def audio_files(folder):
    """All files of a folder, at any depth, whose ending soundfile reads."""
    endings = {"." + name.lower() for name in soundfile.available_formats()} | {".aif", ".opus"}
    found = glob.glob(os.path.join(glob.escape(folder), "**", "*"), recursive=True)
    return sorted(path for path in found if os.path.splitext(path)[1].lower() in endings - {".raw"})


def read_done(path):
    """{audio file: text} of what an earlier run has transcribed; a torn last line is done again."""
    done = {}
    if os.path.isfile(path):
        with open(path, "rb") as f:
            for line in f:
                try:
                    d = parse_json(line)
                    check_fields(d, {"audio": FILE, "text": text()})
                    done[d["audio"]] = d["text"]
                except ValueError:
                    pass
    return done


def transcribe(source, out, asr, lang, skip_broken):
    """Recordings at any depth of a folder -> out/manifest.jsonl, by a recogniser of your choice. If it is
    killed, the next run with the same --out continues."""
    command, source = AsrCommand(asr), os.path.abspath(source)
    path, _ = check_folder(os.path.join(out, "manifest.jsonl"))
    files, work = audio_files(source), os.path.join(out, "transcripts.jsonl")
    if not files:
        raise ValueError(f"{source}: holds no audio file")
    os.makedirs(out, exist_ok=True)
    done, broken = read_done(work), 0
    with open(work, "a", encoding="utf-8") as log:
        log.write("\n" if done else "")  # after a torn line
        for audio in tqdm([audio for audio in files if audio not in done], "transcribe", unit="file"):
            try:
                for _ in read_blocks(audio):  # raises an error if it is broken
                    pass
                done[audio] = command.hear_file(audio)
            except (ValueError, OSError) as e:
                if not skip_broken:
                    raise ValueError(f"{audio}: {e} (--skip-broken leaves it out)") from None
                print(f"{audio}: {e}", file=sys.stderr)
                broken += 1
                continue
            log.write(json.dumps({"audio": audio, "text": done[audio]}, ensure_ascii=False) + "\n")
            log.flush()
    lines = [{"audio": audio, "text": done[audio], "lang": lang, "annotated": False}
             for audio in files if done.get(audio)]
    if not lines:
        raise ValueError(f"{source}: the recogniser heard nothing in {len(files)} files")
    with replace_when_done(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(d, ensure_ascii=False) + "\n" for d in lines)
    os.remove(work)
    silent = len(files) - broken - len(lines)
    print(f"{silent} files in which nothing was heard and {broken} broken ones are left out")
    print(f"Wrote {len(lines)} lines to {path}; next: python prepare.py encode --data {out}")
