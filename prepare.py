"""Data: sound and what is said in it -> codes and tokens, which train.py reads.

    python prepare.py toy                                          speak the toy world: sound and a manifest, data/toy
    python prepare.py speak dialogues.jsonl --out data/mine        dialogues as text -> spoken ones
    python prepare.py librispeech FOLDER --out data/libri          a corpus as it was downloaded -> a manifest
    python prepare.py mix --data data/toy --out data/mixed         dialogues -> conversations as a microphone hears them
    python prepare.py encode --data data/toy                       sound -> Mimi codes, text -> tokens

toy.py says what the toy world is, manifest.py what a manifest may hold, mix.py what a microphone hears.

    manifest.jsonl            -> encoded/meta.json           version, codec and tokeniser with their fingerprints, the sound of silence
    and its sound files          encoded/tokenizer.json
                                 encoded/00000.npy           codes (frames, K) of 500 lines; training reads what it needs from the disk
                                 encoded/00000.jsonl         those lines: tokens, and where their codes stand
"""
import argparse
import base64
import contextlib
import ctypes
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import time
import unicodedata
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from files.atomic import read_json, replace_when_done
from files.audio import SAMPLE_RATE, read_audio
from files.manifest import read_manifest, seconds_of, spoken_parts, clip_key
from mimi import FRAME, Mimi
from corpora.mix import mix
from corpora.readers import CORPORA, collect
from files.tokenizer import PATTERN, get_tokenizer, load_tokenizer
from corpora.dialogues import speak_dialogues
from toy.script import make_toy

# ---------------------------------------------------------------------------------------------------------------------
# manifest -> codes and tokens

VERSION = 2  # of this format
SHARD = 500  # lines

# Sound is encoded with silence before and after it, as it will be heard in a conversation: the codec looks back, so the
# frames after the last word still carry it. The lead is thrown away; the tail is kept, frames[speech:].
LEAD, TAIL = 6, 5


def encode(data, codec_path, tokenizer_name, vocab_size, copies, skip_broken, processes, device):
    """data/manifest.jsonl and its sound -> data/encoded. What a killed run has finished is kept by the next one with the same
    settings."""
    begun = time.monotonic()
    manifest, out, work = (os.path.join(data, name) for name in ("manifest.jsonl", "encoded", "encoded.partial"))
    codec = Mimi.load(codec_path, device)
    words, lines = Counter(), 0
    for d in tqdm(read_manifest(manifest, skip_broken), "check", unit="line", leave=False):
        lines += 1
        if d["split"] == "train":
            words.update(words_of(d))
    if not lines:
        raise ValueError(f"{manifest}: holds no line that can be used")
    tokenizer = get_tokenizer(tokenizer_name, words, vocab_size)
    tokenizer["ranks"] = {base64.b64encode(b).decode(): r for b, r in tokenizer["ranks"].items()}
    tokenizer = json.dumps(tokenizer)
    silence = codec.encode(torch.zeros(1, 1, 32 * FRAME, device=device))[0].T.tolist()
    meta = {"version": VERSION, "codec": os.path.abspath(codec_path), "codec_sha256": sha256(codec_path),
            "tokenizer_sha256": hashlib.sha256(tokenizer.encode()).hexdigest(), "manifest_sha256": sha256(manifest),
            "codebook_size": codec.config.codebook_size, "codebooks": codec.config.codebooks, "silence": silence,
            "copies": copies, "shards": begins_of_shards(manifest)}
    if not os.path.isfile(os.path.join(work, "meta.json")) or read_json(os.path.join(work, "meta.json")) != meta:
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)
        for name, text in (("tokenizer.json", tokenizer), ("meta.json", json.dumps(meta))):
            with replace_when_done(os.path.join(work, name)) as temporary, open(temporary, "w", encoding="utf-8") as f:
                f.write(text)
    encode_shards(meta["shards"], processes, (manifest, work, codec_path, copies, skip_broken, device))
    frames = sum(len(np.load(os.path.join(work, f"{i:05}.npy"), mmap_mode="r")) for i in range(len(meta["shards"])))
    shutil.rmtree(out, ignore_errors=True)
    os.rename(work, out)
    hours, took = frames * FRAME / SAMPLE_RATE / 3600, (time.monotonic() - begun) / 3600
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    memory = most / (1e9 if sys.platform == "darwin" else 1e6)
    print(f"Wrote {frames} frames ({hours:.2f} hours of sound, {hours / took:.0f} hours an hour, at most {memory:.2f} GB a process) "
          f"of {lines} lines to {out}")


def begins_of_shards(manifest):
    """[(byte, number of the line) at which each shard begins]"""
    begins, at = [], 0
    with open(manifest, "rb") as f:
        for number, line in enumerate(f):
            if number % SHARD == 0:
                begins.append([at, number])
            at += len(line)
    return begins


def encode_shards(begins, processes, settings):
    """All that are not there yet. settings: see start_encoder."""
    _, work, *_ = settings
    jobs = [(i, begin) for i, begin in enumerate(begins) if not os.path.exists(os.path.join(work, f"{i:05}.jsonl"))]
    with tqdm(total=len(begins), initial=len(begins) - len(jobs), desc="encode", unit="shard") as bar:
        if min(processes, len(jobs)) < 2:
            start_encoder(*settings)
            for _ in map(encode_shard, jobs):
                bar.update()
        else:  # each with one thread, which together do more than one with several
            with multiprocessing.get_context("spawn").Pool(min(processes, len(jobs)), start_encoder, (*settings, 1)) as pool:
                for _ in pool.imap_unordered(encode_shard, jobs):
                    bar.update()


def words_of(line):
    """What the tokeniser is learned from."""
    for part in line.get("turns", line.get("sentences")):
        yield from re.findall(PATTERN, " " + unicodedata.normalize("NFC", part["text"]))


def tokens_of(turn, tokenizer):
    """The tokens of what is said and, where the manifest knows when each word starts, the frame of each token."""
    text = unicodedata.normalize("NFC", turn["text"])
    words = [tokenizer.encode_ordinary(" " + w) for w in text.split()]
    out = {"tokens": [t for w in words for t in w]}
    if "starts" in turn:
        out["starts"] = [round(s * SAMPLE_RATE) // FRAME + i for w, s in zip(words, turn["starts"]) for i in range(len(w))]
    return out


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def start_encoder(manifest, work, codec_path, copies, skip_broken, device, threads=None):
    global ENCODER  # of this process
    if threads:
        torch.set_num_threads(threads)
    tokenizer = load_tokenizer(os.path.join(work, "tokenizer.json"))
    ENCODER = manifest, work, Mimi.load(codec_path, device), tokenizer, copies, skip_broken


def encode_shard(job):
    """Encode one shard's lines: NUMBER.npy, then NUMBER.jsonl, which says that both are whole."""
    number, begin = job
    manifest, work, codec, tokenizer, copies, skip_broken = ENCODER
    with contextlib.redirect_stderr(io.StringIO()):  # what is skipped has been said
        lines = list(read_manifest(manifest, skip_broken, begin, SHARD))
    codes = Codes(number, codec.config.codebooks)
    places = encode_sounds(lines, copies, codec, codes)
    encoded = [encode_line(d, places, tokenizer, codec, codes) for d in lines]
    path = os.path.join(work, f"{number:05}")
    with replace_when_done(path + ".npy") as temporary, open(temporary, "wb") as f:
        np.save(f, np.concatenate(codes.parts))
    with replace_when_done(path + ".jsonl") as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in encoded)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc keeps what tensors of ever new sizes leave: more with each shard
        ctypes.CDLL(None).malloc_trim(0)


class Codes:
    """The codes of a shard, one sound after another."""

    def __init__(self, number, K):
        self.number, self.frames, self.parts = number, 0, [np.zeros((0, K), np.int16)]

    def keep(self, codes):
        """(T, K) -> where they stand."""
        self.parts.append(codes.astype(np.int16))
        self.frames += len(codes)
        return {"shard": self.number, "offset": self.frames - len(codes), "frames": len(codes)}


def encode_sounds(lines, copies, codec, codes):
    """Every sound of these lines once, of a user to train with `copies` times: {where it is: [where each version's codes stand]}.
    The users' begin anywhere in a frame and at another loudness each time."""
    rng = random.Random(codes.number)
    versions = {}  # where -> [(samples by which it begins late in a frame, gain)]
    for d in lines:
        for t in spoken_parts(d):
            live = t.get("role") == "user"
            n = copies if live and d["split"] == "train" else 1
            versions.setdefault(clip_key(t), [(rng.randrange(FRAME) * live, 10 ** (rng.uniform(-6, 6) / 20) if live else 1.0)
                                              for _ in range(n)])
    jobs = sorted((seconds_of(*key), key, i) for key in versions for i in range(len(versions[key])))
    places = {key: [None] * len(versions[key]) for key in versions}
    while jobs:
        rows = max(1, min(32, int(160 / min(10, jobs[-1][0]))))  # the longest first, as many as memory holds
        batch, jobs = jobs[-rows:], jobs[:-rows]
        wavs = []
        for _, (path, start, end), i in batch:
            late, gain = versions[path, start, end][i]
            wavs.append(F.pad(read_audio(path, start=start, end=end) * gain, (LEAD * FRAME + late, 0)))
        T = max(-(-len(x) // FRAME) for x in wavs) + TAIL
        all_codes = to_codes(codec, torch.stack([F.pad(x, (0, T * FRAME - len(x))) for x in wavs]))
        for (_, key, i), x, c in zip(batch, wavs, all_codes):
            speech = -(-len(x) // FRAME) - LEAD
            places[key][i] = {**codes.keep(c[LEAD:LEAD + speech + TAIL]), "speech": speech, "late": versions[key][i][0]}
    return places


def to_codes(codec, wavs):
    """(B, N) -> (B, T, K)"""
    device = next(codec.parameters()).device
    return codec.encode(wavs[:, None].to(device)).mT.cpu().numpy()


def encode_line(d, places, tokenizer, codec, codes):
    """A line of a manifest as training reads it."""
    line = {k: d[k] for k in ("id", "kind", "split", "annotated", "lang") if k in d}
    if "turns" in d:
        encode_part = lambda t: {"text": t["text"], **tokens_of(t, tokenizer), "copies": places[clip_key(t)]}
        line["turns"] = [{"role": t["role"], **encode_part(t)} for t in d["turns"]]
        if "interjections" in d:
            line["interjections"] = [{"at": t["at"], **encode_part(t)} for t in d["interjections"]]
        return line
    wav = read_audio(d["path"], mono=False)
    if len(wav) != 2:
        raise ValueError(f"{d['path']}: has {len(wav)} channels; a conversation has two, the model left, the user right")
    line["speak"], line["listen"] = (codes.keep(c) for c in to_codes(codec, wav))
    frame = lambda seconds: round(seconds * SAMPLE_RATE) // FRAME
    line["sentences"] = [{"frame": frame(s["start"]), **tokens_of(s, tokenizer), **({"cut": frame(s["cut"])} if "cut" in s else {})}
                         for s in d["sentences"] if s["role"] == "model"]
    return line


# ---------------------------------------------------------------------------------------------------------------------
# the commands


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="speak the toy world",
                              epilog="example: python prepare.py toy --items 1000 --tts 'say -v {voice} -o {out} {text}'")
    toy.add_argument("--out", default="data/toy")
    toy.add_argument("--lang", default="en", help="en, zh or en,zh: each a part of everything (default: %(default)s)")
    toy.add_argument("--items", type=int, default=8000, help="dialogues to train on")
    toy.add_argument("--sentences", type=int, default=4000, help="sentences of users to train on; a fourth as many of the model")
    toy.add_argument("--tests", type=int, default=240, help="held-out dialogues for each of seen and new voices")
    toy.add_argument("--voices", type=int, default=24, help="user voices to train on")
    toy.add_argument("--seed", type=int, default=1)
    toy.add_argument("--tts", help="another synthesiser: a command with {text}, {voice} and {out}")
    spoken = commands.add_parser("speak", help="dialogues as text -> dialogues with sound",
                                 description=speak_dialogues.__doc__,
                                 epilog="example: python prepare.py speak dialogues.jsonl --out data/mine "
                                        "--tts 'say -v {voice} -o {out} {text}'")
    spoken.add_argument("source", help="the .jsonl of the dialogues")
    spoken.add_argument("--out", required=True)
    spoken.add_argument("--voices", type=int, default=24, help="user voices")
    spoken.add_argument("--seed", type=int, default=1)
    spoken.add_argument("--tts", help="another synthesiser: a command with {text}, {voice} and {out}")
    for corpus, source in (("librispeech", "folder with *.trans.txt somewhere below"), ("ljspeech", "folder with metadata.csv"),
                           ("conversations", "the .jsonl of moshi-finetune's format")):
        command = commands.add_parser(corpus, help=CORPORA[corpus].__doc__.split(":")[0].split(",")[0] + " -> a manifest",
                                      description=CORPORA[corpus].__doc__)
        command.add_argument("source", help=source)
        command.add_argument("--out", required=True, help="folder for the manifest, such as data/" + corpus)
    mixed = commands.add_parser("mix", help="dialogues -> conversations with interruptions, noise, gain and leakage",
                                epilog="example: python prepare.py mix --data data/toy --out data/mixed --noise ~/noise")
    mixed.add_argument("--data", default="data/toy", help="folder with the manifest of the dialogues")
    mixed.add_argument("--out", default="data/mixed")
    mixed.add_argument("--conversations", type=int, default=2000)
    mixed.add_argument("--noise", help="folder with sound files of noise, at any depth (default: generated noise)")
    mixed.add_argument("--seed", type=int, default=1)
    enc = commands.add_parser("encode", help="sound -> codes, text -> tokens")
    enc.add_argument("--data", default="data/toy")
    enc.add_argument("--codec", default="out/codec/checkpoint.pt")
    enc.add_argument("--tokenizer", default="bpe", help="bpe: learned here; bytes; or a folder: another encoding's, or "
                     "Qwen2.5's with tokenizer.json, or vocab.json and merges.txt (default: %(default)s)")
    enc.add_argument("--vocab-size", type=int, default=512, help="of the tokeniser that is learned")
    enc.add_argument("--copies", type=int, default=1, help="of each user turn, at other places in a frame and loudness")
    enc.add_argument("--processes", type=int, default=None, help="default: one for each core, or one on a GPU")
    enc.add_argument("--skip-broken", action="store_true", help="go on after a broken line of the manifest")
    enc.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args())
    try:
        command = args.pop("command")
        if command == "toy":
            make_toy(**args)
        elif command == "speak":
            speak_dialogues(**args)
        elif command == "mix":
            mix(**args)
        elif command in CORPORA:
            collect(command, **args)
        else:
            args["processes"] = args["processes"] or (os.cpu_count() if args["device"] == "cpu" else 1)
            args["codec_path"], args["tokenizer_name"] = args.pop("codec"), args.pop("tokenizer")
            encode(**args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
