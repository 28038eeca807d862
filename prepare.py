"""Data: from words to sound to codes.

    python prepare.py toy                    speak the toy world: sound files and a manifest, data/toy
    python prepare.py encode                 sound -> Mimi codes, text -> tokens: what train.py reads

A manifest is a text file with one dialogue to a line, each a list of turns (FLM-Audio, section 3.2.1):

    {"id": 7, "kind": "repeat", "split": "train", "turns": [
      {"role": "user",  "voice": "en-us+f4", "text": "repeat cat red moon", "audio": "user/000007.flac"},
      {"role": "model", "voice": "model",    "text": "cat red moon",        "audio": "model/cat-red-moon.flac"}]}

The toy world is the smallest world that needs everything a spoken chatbot needs. A user asks, the model answers:

    repeat cat red moon          -> cat red moon            hear anything, say anything
    what comes after six         -> seven                   know something
    opposite of big              -> small
    count from three to seven    -> three four ... seven    a long answer, good to interrupt

Held out, never trained on: a fifth of all word triples and of all number pairs, and two of the user voices. Besides the
dialogues there are sentences, words in any order, which the users or the model say: a line with a single turn. They stand for
the audio books of the paper's post-training.
The speech is real synthetic speech, by espeak-ng or any other command. To keep the world small, the model's voice
speaks word by word, each word beginning on a frame; the users speak whole sentences at any time.
"""
import _ctypes
import argparse
import base64
import ctypes
import hashlib
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from mimi import FRAME, SAMPLE_RATE, Mimi, read_audio, resample, write_audio
from streams import load_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# the toy world: what is said

NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
OPPOSITES = dict(pair.split("/") for pair in "big/small hot/cold left/right day/night up/down".split())
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
WORDS = NUMBERS + list(OPPOSITES) + "red green cat fish sun moon tree apple".split()  # 30
LITTLE = "repeat count from to what comes after opposite of".split()  # the other words of the requests
SHARES = {"repeat": 0.45, "count": 0.35, "next": 0.1, "opposite": 0.1}  # of the requests

RING = random.Random(0).sample(NUMBERS, len(NUMBERS))
HELD_OUT_PAIRS = {frozenset(pair) for pair in zip(RING, RING[1:] + RING[:1])}  # 12 of 66, each number in two of them


def held_out_triple(words):
    """Whether these three words, in this order, belong to the fifth that is never trained on."""
    return hashlib.sha256(" ".join(words).encode()).digest()[0] < 51


def make_request(kind, test, rng):
    """(request, answer); for a test one that is held out, if the kind has any."""
    while True:
        if kind == "repeat":
            words = rng.sample(WORDS, 3)
            if held_out_triple(words) == test:
                return "repeat " + " ".join(words), " ".join(words)
        elif kind == "count":
            a, b = rng.sample(range(len(NUMBERS)), 2)
            if (frozenset((NUMBERS[a], NUMBERS[b])) in HELD_OUT_PAIRS) == test:
                way = NUMBERS[a:b + 1] if a < b else NUMBERS[b:a + 1][::-1]
                return f"count from {NUMBERS[a]} to {NUMBERS[b]}", " ".join(way)
        elif kind == "next":
            i = rng.randrange(len(NUMBERS) - 1)
            return "what comes after " + NUMBERS[i], NUMBERS[i + 1]
        else:
            word = rng.choice(sorted(OPPOSITES))
            return "opposite of " + word, OPPOSITES[word]


def make_sentence(vocabulary, rng):
    """One to four words in any order, for post-training: its text is no use for guessing what comes next, so whoever
    shall write it down must hear every word. Nothing that is held out occurs in it."""
    while True:
        words = [rng.choice(vocabulary) for _ in range(rng.randint(1, 4))]
        numbers = [w for w in words if w in NUMBERS]
        if not any(held_out_triple(words[i:i + 3]) for i in range(len(words) - 2)) and \
                not any(frozenset((a, b)) in HELD_OUT_PAIRS for a in numbers for b in numbers):
            return " ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# the toy world: who says it

ACCENTS = "en-us en-gb-x-rp gmw/en en-gb-scotland en-us-nyc en-gb-x-gbcwmd".split()
VARIANTS = "m1 m2 m3 m4 m5 m6 m7 f1 f4 Andy Annie steph linda belinda".split()  # not f2, f3, f5: their breath noise differs
MODEL_VOICE = "en-us+m3"
NEW_VOICES = ["en-us+f1", "en-gb-x-rp+m7"]  # heard only in tests


def user_voices(n, seed):
    """The first n of all accents with all variants, shuffled; without the model's voice and the new ones."""
    voices = [f"{a}+{v}" for a in ACCENTS for v in VARIANTS]
    voices = [v for v in voices if v not in [MODEL_VOICE, *NEW_VOICES]]
    random.Random(seed).shuffle(voices)
    return voices[:n]


class Espeak:
    """espeak-ng by ctypes. The library keeps hidden state from one call to the next, so it is loaded anew for each
    utterance (4 ms): the same arguments give the same samples, always."""

    rate = 22_050

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError:
            raise ValueError("speaking needs espeak-ng: pip install espeakng-loader (the extra 'toy'), "
                             "or name another synthesiser with --tts") from None
        self.library, self.data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path().encode()

    def speak(self, text, voice, speed, pitch):
        """float32 samples at self.rate."""
        parts = []

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        def receive(samples, n, _):
            if samples and n:
                parts.append(np.ctypeslib.as_array(samples, (n,)).copy())
            return 0

        lib = ctypes.CDLL(self.library)
        try:
            if lib.espeak_Initialize(2, 0, self.data, 0x8000) != self.rate:
                raise ValueError("espeak-ng could not be started")
            lib.espeak_SetSynthCallback(receive)
            if lib.espeak_SetVoiceByName(voice.encode()):
                raise ValueError(f"espeak-ng knows no voice {voice!r}")
            for parameter, value in ((1, speed), (3, pitch)):
                lib.espeak_SetParameter(parameter, value, 0)
            data = text.encode()
            lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)
            lib.espeak_Synchronize()
            lib.espeak_Terminate()
        finally:
            _ctypes.dlclose(lib._handle)
        return np.concatenate(parts).astype(np.float32) / 32768


class Command:
    """Any other synthesiser: a command with {text}, {voice} and {out}, the sound file that it shall write."""

    def __init__(self, template):
        self.words = shlex.split(template)
        for part in ("{text}", "{out}"):
            if not any(part in w for w in self.words):
                raise ValueError(f"--tts {template!r}: {part} does not occur in it")

    def speak(self, text, voice, speed, pitch):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "speech.wav")
            words = [w.replace("{text}", text).replace("{voice}", voice).replace("{out}", out) for w in self.words]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode or not os.path.exists(out):
                raise ValueError(f"--tts: {shlex.join(words)} failed: {done.stderr.strip()[-300:] or 'it wrote no file'}")
            return read_audio(out).numpy()

    rate = SAMPLE_RATE


def speak_to_file(job):
    """One line of speech: spoken, trimmed, levelled, written. Its seconds."""
    path, text, voice, speed, pitch = job
    x = torch.from_numpy(SYNTHESISER.speak(text, voice, speed, pitch))
    x = level(trim(resample(x[None], SYNTHESISER.rate)[0].numpy()))
    write_audio(path, x)
    return len(x) / SAMPLE_RATE


def trim(x, floor=0.01):
    """Without the silence at both ends: what stays below a hundredth of the peak."""
    loud = np.flatnonzero(np.abs(x) > floor * np.abs(x).max())
    if not len(loud):
        raise ValueError("the synthesiser gave silence")
    return x[loud[0]:loud[-1] + 1]


def level(x, db=-23.0):
    return x * min(10 ** (db / 20) / (np.sqrt(np.mean(x * x)) + 1e-6), 0.99 / np.abs(x).max())


def speak_all(jobs, what):
    """Speak every job, on all cores; the seconds of each."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
        return list(tqdm(pool.imap(speak_to_file, jobs, chunksize=8), what, len(jobs), unit="clip"))


def on_frames(words, gap=0.04):
    """Words one after another, each beginning on a frame, with at least the gap of silence after it: their samples, and
    the second at which each begins."""
    padded = [np.pad(w, (0, int(gap * SAMPLE_RATE))) for w in words]
    padded = [np.pad(w, (0, -len(w) % FRAME)) for w in padded]
    starts = np.cumsum([0] + [len(w) for w in padded[:-1]]) / SAMPLE_RATE
    return np.concatenate(padded), starts.round(4).tolist()


def make_toy(out, items, tests, sentences, voices, seed, tts):
    """Speak the toy world into the folder `out`: user/*.flac, model/*.flac, manifest.jsonl."""
    global SYNTHESISER  # the processes that speak inherit it
    if os.path.exists(out):
        raise ValueError(f"{out}: is there already; remove it, or name another folder with --out")
    SYNTHESISER = Command(tts) if tts else Espeak()
    rng = random.Random(seed)
    known = user_voices(voices, seed)
    lines = []

    def add(kind, split, request=None, answer=None):
        voice = rng.choice(NEW_VOICES if split == "new" else known)
        turns = []
        if request:
            turns.append({"role": "user", "voice": voice, "text": request, "audio": f"user/{len(lines):06d}.flac"})
        if answer:
            path = f"model/{answer.replace(' ', '-')}.flac"
            turns.append({"role": "model", "voice": "model", "text": answer, "audio": path})
        lines.append({"id": len(lines), "kind": kind, "split": split, "turns": turns})

    for split, n in (("train", sentences), ("seen", sentences // 40)):
        for _ in range(n):
            add("heard", split, request=make_sentence(WORDS + LITTLE, rng))
        for _ in range(n // 4):
            add("said", split, answer=make_sentence(WORDS, rng))
    for split, n in (("train", items), ("seen", tests), ("new", tests)):
        for kind in rng.choices(list(SHARES), SHARES.values(), k=n):
            add(kind, split, *make_request(kind, split != "train", rng))

    work = out + ".partial"
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("user", "model", "words"):
        os.makedirs(os.path.join(work, folder))
    said = [t for d in lines for t in d["turns"] if t["role"] == "model"]
    words = {w: os.path.join(work, f"words/{w}.flac") for w in sorted({w for t in said for w in t["text"].split()})}
    speak_all([(path, w, MODEL_VOICE, 170, 50) for w, path in words.items()], "words")
    words = {w: read_audio(path).numpy() for w, path in words.items()}
    shutil.rmtree(os.path.join(work, "words"))
    lasting = {}
    for turn in said:
        x, turn["starts"] = on_frames([words[w] for w in turn["text"].split()])
        if turn["audio"] not in lasting:
            write_audio(os.path.join(work, turn["audio"]), x)
            lasting[turn["audio"]] = len(x) / SAMPLE_RATE
    heard = [t for d in lines for t in d["turns"] if t["role"] == "user"]
    jobs = [(os.path.join(work, t["audio"]), t["text"], t["voice"], rng.randint(140, 190), rng.randint(35, 65)) for t in heard]
    lasting |= dict(zip((t["audio"] for t in heard), speak_all(jobs, "sentences and requests")))
    with open(os.path.join(work, "manifest.jsonl"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(d) + "\n" for d in lines)
    os.rename(work, out)
    print(f"\n{'split':8}{'sentences':>10}{'dialogues':>11}{'minutes':>9}   user voices")
    for split in ("train", "seen", "new"):
        mine = [d for d in lines if d["split"] == split]
        turns = [t for d in mine for t in d["turns"]]
        print(f"{split:8}{sum(len(d['turns']) == 1 for d in mine):10}{sum(len(d['turns']) == 2 for d in mine):11}"
              f"{sum(lasting[t['audio']] for t in turns) / 60:9.1f}   {len({t['voice'] for t in turns if t['role'] == 'user'})}")
    print(f"Held out: a fifth of the {len(WORDS)}*{len(WORDS) - 1}*{len(WORDS) - 2} word triples, {len(HELD_OUT_PAIRS)} of 66 "
          f"number pairs, the voices {' and '.join(NEW_VOICES)}.")
    print(f"Wrote {len(lines)} lines, {sum(lasting.values()) / 3600:.2f} hours of sound, to {out}/manifest.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# manifest -> codes and tokens


def read_manifest(path, skip_broken=False):
    """The dialogues of a manifest. A broken line or a missing sound file is a ValueError that says which line, or, with
    skip_broken, a message while the rest goes on."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such manifest; `python prepare.py toy` makes one")
    dialogues = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                dialogues.append(check_dialogue(line, os.path.dirname(path)))
            except (ValueError, OSError) as e:
                if not skip_broken:
                    raise ValueError(f"{path}, line {number}: {e} (--skip-broken goes on without it)") from None
                print(f"skipped {path}, line {number}: {e}", file=sys.stderr)
    if not dialogues:
        raise ValueError(f"{path}: holds no dialogue")
    return dialogues


def check_dialogue(line, folder):
    d = json.loads(line)
    if not isinstance(d, dict) or not isinstance(d.get("turns"), list) or not d["turns"]:
        raise ValueError("a dialogue needs a list of turns")
    for turn in d["turns"]:
        for key in ("role", "text", "audio"):
            if not isinstance(turn, dict) or not isinstance(turn.get(key), str):
                raise ValueError(f"a turn needs the text field {key!r}")
        if turn["role"] not in ("user", "model"):
            raise ValueError(f"a turn's role is user or model, not {turn['role']!r}")
        turn["path"] = os.path.join(folder, turn["audio"])
        if not os.path.isfile(turn["path"]):
            raise FileNotFoundError(f"no sound file {turn['path']}")
    return d


# ---------------------------------------------------------------------------------------------------------------------
# text -> tokens

PATTERN = r" ?[^\s]+|\s+"  # BPE merges within these: a word with the space before it


def get_tokenizer(name, texts, vocab_size):
    """What the tokenizer.json of an encoded folder holds: {"pattern", "ranks", "specials"}. name is "bytes", "bpe" (learned
    from texts), or the folder of a published vocabulary."""
    if name == "bytes":
        return {"pattern": PATTERN, "ranks": train_bpe([], 256), "specials": []}
    if name == "bpe":
        return {"pattern": PATTERN, "ranks": train_bpe(texts, vocab_size), "specials": []}
    return read_published_bpe(name)


def read_published_bpe(folder):
    """Qwen2.5's tokeniser, or any byte-level BPE in the same files: tokenizer.json, or vocab.json with merges.txt (and
    tokenizer_config.json, which names the special tokens). Raises ValueError or OSError with the file's name."""
    def read(name):
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return json.load(f) if name.endswith(".json") else f.read().split("\n")
    have = [n for n in ("tokenizer.json", "vocab.json") if os.path.isfile(os.path.join(folder, n))]
    if not have:
        raise FileNotFoundError(f"{folder}: holds neither tokenizer.json nor vocab.json; --tokenizer is bytes, bpe or a "
                                "folder with one of them")
    path = os.path.join(folder, have[0])
    try:
        if have[0] == "tokenizer.json":
            saved = read("tokenizer.json")
            vocab, merges = saved["model"]["vocab"], saved["model"]["merges"]
            added = {t["id"]: t["content"] for t in saved["added_tokens"]}
            pattern = next(p["pattern"]["Regex"] for p in saved["pre_tokenizer"]["pretokenizers"] if p["type"] == "Split")
        else:
            vocab, pattern = read("vocab.json"), QWEN_PATTERN
            merges = [line for line in read("merges.txt") if line and not line.startswith("#version")]
            known = os.path.isfile(os.path.join(folder, "tokenizer_config.json"))
            added = {int(i): t["content"] for i, t in read("tokenizer_config.json")["added_tokens_decoder"].items()} if known else {}
        vocab = {t: i for t, i in vocab.items() if i not in added}
        # tiktoken merges by the rank of the result: the same as by the list of merges if results are numbered in its order
        for i, merge in enumerate(merges):
            if vocab["".join(merge.split(" ") if isinstance(merge, str) else merge)] != 256 + i:
                raise ValueError(f"merge {i} does not give token {256 + i}")
        ranks = {bytes(BYTES[c] for c in token): i for token, i in vocab.items()}
        specials = [added[i] for i in sorted(added)]
        if sorted(added) != list(range(len(vocab), len(vocab) + len(added))):
            raise ValueError("its special tokens do not follow its words")
        return {"pattern": pattern, "ranks": ranks, "specials": specials}
    except (KeyError, TypeError, AttributeError, StopIteration, ValueError) as e:
        raise ValueError(f"{path}: not a byte-level BPE that can be read ({type(e).__name__}: {e})") from None


QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
                r"\s+(?!\S)|\s+")
# Published vocabularies write a byte as a letter: those that look like one as themselves, the others from U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*VISIBLE}))}


def train_bpe(texts, vocab_size):
    """Byte-pair encoding: {bytes: rank}. Merges the most frequent pair until the vocabulary is full or each word is one
    token."""
    words = Counter(w for text in texts for w in re.findall(PATTERN, text))
    splits = {w: [bytes([b]) for b in w.encode()] for w in words}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter()
        for w, parts in splits.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[w]
        if not pairs:
            break
        a, b = max(pairs, key=lambda p: (pairs[p], p))
        ranks[a + b] = len(ranks)
        for parts in splits.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (a, b):
                    parts[i:i + 2] = [a + b]
                i += 1
    return ranks


def tokens_of(turn, tokenizer):
    """The tokens of what is said and, where the manifest knows when each word starts, the frame of each token."""
    text = unicodedata.normalize("NFC", turn["text"])
    words = [tokenizer.encode_ordinary(" " + w) for w in text.split()]
    out = {"tokens": [t for w in words for t in w]}
    if "starts" in turn:
        out["starts"] = [round(s * SAMPLE_RATE) // FRAME + i for w, s in zip(words, turn["starts"]) for i in range(len(w))]
    return out


def encode(data, codec_path, tokenizer_name, vocab_size, copies, skip_broken, device):
    """data/manifest.jsonl and its sound -> data/encoded: codes.npy (frames, K), one line for each turn and each dialogue,
    the tokeniser, and what silence sounds like to the codec."""
    codec = Mimi.load(codec_path, device)
    dialogues = read_manifest(os.path.join(data, "manifest.jsonl"), skip_broken)
    out, work = os.path.join(data, "encoded"), os.path.join(data, "encoded.partial")
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    texts = [" " + t["text"] for d in dialogues if d["split"] == "train" for t in d["turns"]]
    saved = get_tokenizer(tokenizer_name, texts, vocab_size)
    saved["ranks"] = {base64.b64encode(b).decode(): r for b, r in saved["ranks"].items()}
    with open(os.path.join(work, "tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(saved, f)
    tokenizer = load_tokenizer(os.path.join(work, "tokenizer.json"))

    # every sound once, the users' in several copies that begin at other places within a frame and at other loudness
    rng = random.Random(0)
    sounds = {}
    for d in dialogues:
        for t in d["turns"]:
            n = copies if t["role"] == "user" and d["split"] == "train" else 1
            sounds.setdefault(t["path"], [(rng.randrange(FRAME) if t["role"] == "user" else 0,
                                           10 ** (rng.uniform(-6, 6) / 20) if t["role"] == "user" else 1.0)
                                          for _ in range(n)])
    jobs = sorted(((soundfile.info(p).duration, p, i) for p, v in sounds.items() for i in range(len(v))))
    where, codes, offset = {}, [], 0
    for start in tqdm(range(0, len(jobs), 32), "encode", unit="batch"):
        batch = []
        for _, path, i in jobs[start:start + 32]:
            phase, gain = sounds[path][i]
            batch.append((path, i, np.pad(read_audio(path).numpy() * gain, (LEAD * FRAME + phase, 0))))
        T = max(-(-len(x) // FRAME) for *_, x in batch) + TAIL
        wav = torch.from_numpy(np.stack([np.pad(x, (0, T * FRAME - len(x))) for *_, x in batch])).float()[:, None]
        encoded = codec.encode(wav.to(device)).cpu().numpy().astype(np.int16)
        for (path, i, x), c in zip(batch, encoded):
            speech = -(-len(x) // FRAME) - LEAD
            where[path, i] = {"offset": offset, "speech": speech, "frames": speech + TAIL}
            codes.append(c[:, LEAD:LEAD + speech + TAIL].T)
            offset += len(codes[-1])
    np.save(os.path.join(work, "codes.npy"), np.concatenate(codes))
    with open(os.path.join(work, "dialogues.jsonl"), "w", encoding="utf-8") as f:
        for d in dialogues:
            turns = [{"role": t["role"], "text": t["text"], **tokens_of(t, tokenizer),
                      "copies": [where[t["path"], i] for i in range(len(sounds[t["path"]]))]} for t in d["turns"]]
            f.write(json.dumps({**d, "turns": turns}) + "\n")
    silence = codec.encode(torch.zeros(1, 1, 32 * FRAME, device=device))[0].T.tolist()
    with open(os.path.join(work, "meta.json"), "w") as f:
        json.dump({"codebook_size": codec.config.codebook_size, "codebooks": codec.config.codebooks,
                   "text_size": tokenizer.n_vocab, "silence": silence, "codec": os.path.abspath(codec_path),
                   "codec_sha256": hashlib.sha256(open(codec_path, "rb").read()).hexdigest()}, f)
    shutil.rmtree(out, ignore_errors=True)
    os.rename(work, out)
    print(f"Wrote {offset} frames ({offset * FRAME / SAMPLE_RATE / 3600:.2f} hours) of {len(dialogues)} dialogues to {out}")


# Sound is encoded with silence before and after it, as it will be heard in a conversation: the codec looks back, so the
# frames after the last word still carry it. The lead is thrown away; the tail is kept, frames[speech:].
LEAD, TAIL = 6, 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="speak the toy world",
                              epilog="example: python prepare.py toy --items 1000 --tts 'say -v {voice} -o {out} {text}'")
    toy.add_argument("--out", default="data/toy")
    toy.add_argument("--items", type=int, default=8000, help="dialogues to train on")
    toy.add_argument("--sentences", type=int, default=4000, help="sentences of users to train on; a fourth as many of the model")
    toy.add_argument("--tests", type=int, default=240, help="held-out dialogues for each of seen and new voices")
    toy.add_argument("--voices", type=int, default=48, help="user voices to train on")
    toy.add_argument("--seed", type=int, default=1)
    toy.add_argument("--tts", help="another synthesiser: a command with {text}, {voice} and {out}")
    enc = commands.add_parser("encode", help="sound -> codes, text -> tokens")
    enc.add_argument("--data", default="data/toy")
    enc.add_argument("--codec", default="out/codec/checkpoint.pt")
    enc.add_argument("--tokenizer", default="bpe", help="bpe: learned here; bytes; or a folder with Qwen2.5's tokenizer.json "
                     "or vocab.json and merges.txt (default: %(default)s)")
    enc.add_argument("--vocab-size", type=int, default=512, help="of the tokeniser that is learned")
    enc.add_argument("--copies", type=int, default=1, help="of each user turn, at other places in a frame and loudness")
    enc.add_argument("--skip-broken", action="store_true", help="go on after a broken line of the manifest")
    enc.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args())
    try:
        if args.pop("command") == "toy":
            make_toy(**args)
        else:
            args["codec_path"], args["tokenizer_name"] = args.pop("codec"), args.pop("tokenizer")
            encode(**args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
