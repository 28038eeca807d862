"""Data: recordings and their text -> codes and tokens, which train.py reads.

    python prepare.py toy                                   speak the toy world: audio and a manifest
    python prepare.py speak talks.jsonl --out data/mine     written dialogues -> spoken ones
    python prepare.py librispeech FOLDER --out data/libri   a corpus as it was downloaded -> a manifest
    python prepare.py mix --data data/toy --out data/mixed  dialogues -> conversations as they are heard
    python prepare.py encode --data data/toy                audio -> Mimi codes, text -> tokens

files/manifest.py says what a manifest may hold, files/encoded.py what the folder of codes and tokens holds.
Shapes: B clips, N samples, T frames of 80 ms, K codebooks.
"""
import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import os
import random
import shutil
import sys
import time
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from corpora.commands import CORPORA, SEED, TTS
from files.atomic import check_folder, copy, move_folder, read_json, replace_when_done, write_text
from files.audio import SAMPLE_RATE, read_audio, read_blocks, regroup, seconds_of
from files.augment import Version
from files.device import check_device
from files.encoded import ENCODED, SHARD, VERSION, sha256, write_index
from files.manifest import check_codec, clip_key, read_codes, read_manifest, spoken_parts
from files.processes import in_processes
from files.tokenizer import dump_tokenizer, encode_words, get_tokenizer, load_tokenizer, words_of
from mimi import FRAME, Mimi
from toy.script import make_toy

# ------------------------------------------------------------------------------------------------------------
# a shard: SHARD lines of a manifest
#
#     audio --codec-->     00000.npy    codes (frames, K), one clip after another
#     text --tokeniser-->  00000.jsonl  for each line its tokens, and where the codes of its clips are

# Every clip is encoded with silence before and after it, as it will be heard in a conversation. The codec
# looks back, so the frames after the last word still carry it. The lead is thrown away; the tail is kept:
# frames speech, speech + 1, ...
LEAD, TAIL = 6, 5  # frames


class Shard:
    """The codes of a shard, and where they are."""

    def __init__(self, number, codec, tokenizer):
        self.number, self.codec, self.tokenizer = number, codec, tokenizer
        self.codes, self.frames = [np.zeros((0, codec.config.codebooks), np.int16)], 0
        self.places = {}  # clip -> the places of its copies
        self.broken = {}  # clip -> the error of reading it

    def add(self, codes):
        """(T, K) -> their place"""
        self.codes.append(codes.astype(np.int16))
        self.frames += len(codes)
        return {"shard": self.number, "offset": self.frames - len(codes), "frames": len(codes)}

    def encode_audio(self, wavs):
        """(B, N) -> (B, T, K)"""
        device = next(self.codec.parameters()).device
        return self.codec.encode(wavs[:, None].to(device)).mT.cpu().numpy()

    def encode_conversation(self, path):
        """A file of two channels, however long -> (2, T, K)"""
        state, codes = self.codec.init_state(2), []
        for wav in regroup(read_blocks(path, mono=False), 125 * FRAME):
            if len(wav) != 2:
                raise ValueError(f"{path}: has {len(wav)} channels; a conversation has two, "
                                 "the model left, the user right")
            wav = F.pad(wav, (0, -wav.shape[1] % FRAME))[:, None].to(self.codec.codebooks().device)
            codes.append(self.codec.encode_step(wav, state).mT.cpu().numpy())
        return np.concatenate(codes, 1)

    def encode_clips(self, lines, copies, augment):
        """Encode every clip of these lines. One of a user to train with is encoded `copies` times, and begins
        anywhere in a frame and has another gain each time; each copy but the first is, with probability
        `augment`, from another throat, microphone and room (files/augment.py). One of the model is encoded
        as it is, and then as a user's microphone may hear it from the loudspeaker."""
        rng, versions = random.Random(self.number), {}  # clip -> [Version]
        for d in lines:
            for part in spoken_parts(d):
                clip, user = clip_key(part), part.get("role") == "user"
                if clip in versions or "codes" in part:
                    continue
                versions[clip] = [Version.draw(rng, FRAME) if user else Version()]
                if d["split"] == "train" and user:
                    same = "interjections" in d  # they are at certain seconds: the speed must stay
                    versions[clip] += [Version.draw(rng, FRAME, rng.random() < augment, same)
                                       for _ in range(copies - 1)]
                elif augment and part.get("role") == "model":
                    versions[clip].append(Version.echo(rng))
        self.places = {clip: [None] * len(versions[clip]) for clip in versions}
        jobs = [(seconds_of(*clip), clip, i) for clip in versions for i in range(len(versions[clip]))]
        jobs.sort(key=lambda job: (job[0], str(job)))  # an end may be None
        while jobs:  # the longest first, as many at a time as memory holds
            n = max(1, min(32, int(160 / min(10, jobs[-1][0]))))
            batch, jobs = jobs[-n:], jobs[:-n]
            self.encode_batch([(clip, i, versions[clip][i]) for _, clip, i in batch])

    def add_codes(self, lines):
        """The parts of these lines that are codes already."""
        for part in (part for d in lines for part in spoken_parts(d) if "codes" in part):
            try:
                codes = read_codes(part["path"])
            except (ValueError, OSError) as e:
                self.broken[clip_key(part)] = e
                continue
            self.places[clip_key(part)] = [{**self.add(codes), "speech": len(codes), "late": 0}]

    def encode_batch(self, batch):
        """batch: [(clip, number of the copy, Version)]"""
        wavs, batch = [], [job for job in batch if job[0] not in self.broken]
        for clip, _, version in [*batch]:
            try:
                wavs.append(version.throat_of(read_audio(clip[0], start=clip[1], end=clip[2])))
            except (ValueError, OSError) as e:
                self.broken[clip] = e
        batch = [job for job in batch if job[0] not in self.broken]
        if not batch:
            return
        ends = [version.late + len(x) for x, (*_, version) in zip(wavs, batch)]  # of the speech, in samples
        T = max(-(-end // FRAME) for end in ends) + LEAD + TAIL
        wavs = [F.pad(x, (LEAD * FRAME + version.late, T * FRAME)) for x, (*_, version) in zip(wavs, batch)]
        wavs = [version.record(x[:T * FRAME]) for x, (*_, version) in zip(wavs, batch)]
        codes = self.encode_audio(torch.stack(wavs))
        for (clip, i, version), end, c in zip(batch, ends, codes):
            speech = -(-end // FRAME)
            place = self.add(c[LEAD:LEAD + speech + TAIL])
            self.places[clip][i] = {**place, "speech": speech, "late": version.late}

    def places_of(self, turn):
        if clip_key(turn) in self.broken:
            raise self.broken[clip_key(turn)]
        places = self.places[clip_key(turn)]
        if turn.get("role") != "model":
            return {"copies": places}
        return {"copies": places[:1], "echoes": places[1:]}

    def encode_line(self, d):
        """A line of a manifest as training reads it."""
        line = {k: d[k] for k in ("id", "kind", "split", "annotated", "lang") if k in d}
        if "turns" in d:
            part = lambda t: {"text": t["text"], **tokens_of(t, self.tokenizer), **self.places_of(t)}
            who = lambda t: {k: t[k] for k in ("role", "voice") if t.get(k)}
            line["turns"] = [{**who(t), **part(t)} for t in d["turns"]]
            if "interjections" in d:
                line["interjections"] = [{"at": t["at"], **part(t)} for t in d["interjections"]]
            return line
        line["speak"], line["listen"] = (self.add(c) for c in self.encode_conversation(d["path"]))
        line["sentences"] = [{"frame": frame(s["start"]), **tokens_of(s, self.tokenizer),
                              **({"cut": frame(s["cut"])} if "cut" in s else {})}
                             for s in d["sentences"] if s["role"] == "model"]
        return line


def frame(seconds):
    return round(seconds * SAMPLE_RATE) // FRAME


def tokens_of(turn, tokenizer):
    """The tokens of a turn and, if the manifest has the start of each word, the frame of each token."""
    words = encode_words(turn["text"], tokenizer)
    out = {"tokens": [t for w in words for t in w]}
    if "starts" in turn:
        out["starts"] = [frame(s) + i for w, s in zip(words, turn["starts"]) for i in range(len(w))]
    return out


def start_encoder(manifest, work, copies, augment, skip_broken, device, threads=None):
    global ENCODER  # what this process needs for each shard
    if threads:
        torch.set_num_threads(threads)
    codec, tokenizer = os.path.join(work, "codec.pt"), os.path.join(work, "tokenizer.json")
    ENCODER = (manifest, work, copies, augment, skip_broken, Mimi.load(codec, device),
               load_tokenizer(tokenizer))


def encode_shard(task):
    """task: (number, where its lines begin). The .jsonl is written last, so if it is there both are whole."""
    number, begin = task
    manifest, work, copies, augment, skip_broken, codec, tokenizer = ENCODER
    with contextlib.redirect_stderr(io.StringIO()):  # the broken lines have been reported by now
        lines = list(read_manifest(manifest, skip_broken, begin, SHARD))
    shard = Shard(number, codec, tokenizer)
    shard.encode_clips(lines, copies, augment)
    shard.add_codes(lines)
    encoded = []
    for d in lines:
        try:
            encoded.append(shard.encode_line(d))
        except (ValueError, OSError) as e:  # a sound that is broken inside
            if not skip_broken:
                raise ValueError(f"{e} (--skip-broken leaves it out)") from None
            tqdm.write(f"skipped: {e}", sys.stderr)
    path = os.path.join(work, f"{number:05}")
    with replace_when_done(path + ".npy") as temporary, open(temporary, "wb") as f:
        np.save(f, np.concatenate(shard.codes))
    write_text(path + ".jsonl", "".join(json.dumps(line) + "\n" for line in encoded))
    # glibc keeps the memory of tensors of ever new sizes, more with each shard, until it is told not to
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# ------------------------------------------------------------------------------------------------------------
# a manifest: all of its shards


def encode(data, codec, tokenizer, vocab_size, copies, augment, skip_broken, processes, device):
    """data/manifest.jsonl and its audio -> data/encoded. If it is killed, the next run with the same settings
    continues."""
    begun, manifest = time.monotonic(), os.path.join(data, "manifest.jsonl")
    out, work = check_folder(os.path.join(data, "encoded"), ENCODED, replace=True)
    check_device(device)
    mimi = Mimi.load(codec, device)
    lines, words = survey(manifest, skip_broken, (mimi.config.codebooks, mimi.config.codebook_size))
    tokenizer = dump_tokenizer(get_tokenizer(tokenizer, words, vocab_size))
    meta = {"version": VERSION, "codec_sha256": sha256(codec), "manifest_sha256": sha256(manifest),
            "tokenizer_sha256": hashlib.sha256(tokenizer.encode()).hexdigest(),
            "codebook_size": mimi.config.codebook_size, "codebooks": mimi.config.codebooks,
            "silence": mimi.silence(), "copies": copies, "augment": augment,
            "shards": shard_offsets(manifest)}
    path = os.path.join(work, "meta.json")
    if not os.path.isfile(path) or read_json(path) != meta:  # not from a run with these settings
        shutil.rmtree(work, ignore_errors=True)
        copy(codec, os.path.join(work, "codec.pt"))
        write_text(os.path.join(work, "tokenizer.json"), tokenizer)
        write_text(path, json.dumps(meta))
    encode_shards(meta["shards"], processes or (os.cpu_count() if device == "cpu" else 1),
                  (manifest, work, copies, augment, skip_broken, device))
    frames = write_index(work, len(meta["shards"]))
    kept = len(np.load(os.path.join(work, "index.npy")))
    move_folder(work, out)
    hours, took = frames * FRAME / SAMPLE_RATE / 3600, (time.monotonic() - begun) / 3600
    speed = f"{hours / took:.0f} hours an hour{peak_memory()}"
    print(f"Wrote {frames} frames ({hours:.2f} hours of audio, {speed}) of {kept} lines to {out}"
          + (f"; {lines - kept} lines with broken sounds are left out" if lines > kept else ""))


def survey(manifest, skip_broken, codec):
    """Check every line: (number of good lines, Counter of the words to train on). codec: its codebooks and
    their size."""
    lines, words = 0, Counter()
    for d in tqdm(read_manifest(manifest, skip_broken), "check", unit="line", leave=False):
        lines += 1
        if any("codes" in part for part in spoken_parts(d)):
            check_codec(codec, manifest)
        if d["split"] == "train":
            words.update(w for part in d.get("turns", d.get("sentences")) for w in words_of(part["text"]))
    if not lines:
        raise ValueError(f"{manifest}: holds no line that can be used")
    return lines, words


def shard_offsets(manifest):
    """[(byte, line number) at which each shard begins]"""
    offsets, byte = [], 0
    with open(manifest, "rb") as f:
        for number, line in enumerate(f):
            if number % SHARD == 0:
                offsets.append([byte, number])
            byte += len(line)
    return offsets


def encode_shards(offsets, processes, settings):
    """All shards that are not there yet. settings: the arguments of start_encoder."""
    _, work, *_ = settings
    done = lambda i: os.path.exists(os.path.join(work, f"{i:05}.jsonl"))
    tasks = [(i, begin) for i, begin in enumerate(offsets) if not done(i)]
    n = min(processes, len(tasks))
    with tqdm(total=len(offsets), initial=len(offsets) - len(tasks), desc="encode", unit="shard") as bar:
        if n < 2:
            start_encoder(*settings)
            for _ in map(encode_shard, tasks):
                bar.update()
        else:  # n processes with one thread each are faster than one with n threads
            for _ in in_processes(encode_shard, tasks, n, "spawn", start_encoder, (*settings, 1),
                                  name=lambda task: f"shard {task[0]}"):
                bar.update()


def peak_memory():
    """Of the largest process, for the last line."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return f", at most {peak / (1e9 if sys.platform == 'darwin' else 1e6):.2f} GB a process"


# ------------------------------------------------------------------------------------------------------------
# the commands: name, function, what it does, example, flags (name, default or ... if it must be given, help).
# corpora/commands.py has those that read what exists already.

COMMANDS = (
    ("toy", make_toy, "speak the toy world", "--items 1000 --tts 'say -v {voice} -o {out} {text}'", (
        ("--out", "data/toy", "folder to write"),
        ("--lang", "en", "en, zh, or en,zh for half of each"),
        ("--items", 8000, "dialogues to train on"),
        ("--sentences", 4000, "user sentences to train on; of the model, a fourth as many"),
        ("--tests", 240, "held-out dialogues of known voices, and as many of new voices"),
        ("--voices", 24, "user voices of espeak-ng to train on"),
        ("--others", "", "for two fifths of what users say, voices of other synthesisers, such as flite:rms,"
                         "tts:Alex; or installed: toy/world.py's OTHER_VOICES that this machine has"),
        ("--minutes", 0.0, "fewer items and sentences, if this machine would take longer; 0: all of them"),
        SEED, TTS)),
    *CORPORA,
    ("encode", encode, "audio -> codes, text -> tokens", "--data data/libri --tokenizer data/toy/encoded", (
        ("--data", "data/toy", "folder with the manifest"),
        ("--codec", "out/codec/checkpoint.pt", "what train.py --config codec wrote, or Mimi as published"),
        ("--tokenizer", "bpe", "bpe: learned here; bytes; or a folder: another encoded one, or Qwen2.5's, "
                               "with tokenizer.json or with vocab.json and merges.txt"),
        ("--vocab-size", 512, "of a tokeniser that is learned"),
        ("--copies", 1, "of each user turn, at other places in a frame and with another gain"),
        ("--augment", 0.0, "share of these copies, after the first, that come from another throat, "
                           "microphone and room"),
        ("--processes", 0, "0: one for each core, or one on a GPU"),
        ("--skip-broken", False, "skip the broken lines of the manifest"),
        ("--device", "cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu"))),
)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, help, example, flags in COMMANDS:
        command = commands.add_parser(name, help=help, description=function.__doc__,
                                      epilog=f"example: python prepare.py {name} {example}")
        command.set_defaults(run=function)
        for flag, default, help in flags:
            if default is False:
                command.add_argument(flag, action="store_true", help=help)
            elif default is ...:
                command.add_argument(flag, help=help, **({"required": True} if flag.startswith("-") else {}))
            else:
                kind, shown = (str, "") if default is None else (type(default), f" (default: {default})")
                command.add_argument(flag, default=default, type=kind, help=help + shown)
    args = vars(parser.parse_args())
    try:
        args.pop("run")(**args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
