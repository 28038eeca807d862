"""Data: from words to sound to codes.

    python prepare.py toy                                          speak the toy world: sound and a manifest, data/toy
    python prepare.py speak dialogues.jsonl --out data/mine        dialogues as text -> spoken ones
    python prepare.py librispeech FOLDER --out data/libri          a corpus as it was downloaded -> a manifest
    python prepare.py encode --data data/toy                       sound -> Mimi codes, text -> tokens: what train.py reads

A manifest is a text file with one JSON object to a line. What a line may hold, and what it is for (FLM-Audio, section 3):

    {"audio": "a.flac", "text": "It is late."}                                  a recording: post-training
        optional: "start", "end" in seconds, "lang", "annotated": by a person (true) or by a machine (false)
    {"turns": [                                                                 a dialogue: fine-tuning
      {"role": "user",  "text": "repeat cat red moon", "audio": "user/000007.flac"},
      {"role": "model", "text": "cat red moon",        "audio": "model/cat-red-moon.flac"}]}
    {"audio": "talk.wav", "sentences": [                                        a recorded conversation in stereo, the
      {"role": "model", "start": 0.5, "end": 1.9, "text": "It is late."}]}      model left and the user right: fine-tuning

and each may say "split": "train", or "seen" for what is held out (otherwise one line in a hundred is).

The toy world is the smallest world that needs everything a spoken chatbot needs. A user asks, the model answers:

    repeat cat red moon          -> cat red moon            hear anything, say anything
    what comes after six         -> seven                   know something
    opposite of big              -> small
    count from three to seven    -> three four ... seven    a long answer
    chant cat red moon           -> five times those        a longer one, good to interrupt

or tells a story, clause by clause: the model murmurs in between, and warns at once if something is on fire; all
in English, in Mandarin (从 三 数到 七), or in both: --lang en,zh.
Held out, never trained on: a fifth of all word triples and of all number pairs, and two of the user voices. Besides the
dialogues there are sentences, words in any order, which the users or the model say: a line with a single turn. They stand for
the audio books of the paper's post-training.
The speech is real synthetic speech, by espeak-ng or any other command. To keep the world small, the model's voice
speaks word by word, each word beginning on a frame; the users speak whole sentences at any time.
"""
import _ctypes
import argparse
import base64
import contextlib
import ctypes
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from mimi import FRAME, SAMPLE_RATE, Mimi, read_audio, replace_when_done, resample, write_audio
from streams import REACTION, TEXT_LEAD, load_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# the toy world: what is said

VARIANTS = "m1 m2 m3 m4 m5 m6 m7 f1 f4 Andy Annie steph linda belinda".split()  # not f2, f3, f5: their breath noise differs


class Language:
    """What is said in one language, with a space between any two words, and the voices of espeak-ng that say it."""

    def __init__(self, numbers, opposites, others, requests, story, accents, model_voice, new_voices):
        self.numbers = numbers.split()
        self.opposites = dict(pair.split("/") for pair in opposites.split())
        self.opposites |= {b: a for a, b in self.opposites.items()}
        self.words = self.numbers + list(self.opposites) + others.split()  # 30
        self.requests = dict(zip(SHARES, requests))  # all but the story
        self.little = list(dict.fromkeys(w for r in requests for w in r.split() if "{" not in w))  # the requests' other words
        self.story = story
        self.accents, self.model_voice = accents.split(), model_voice
        self.new_voices = new_voices.split()  # heard only in tests

    def user_voices(self, n, seed):
        """The first n of all accents with all variants, shuffled; without the model's voice and the new ones."""
        voices = [f"{a}+{v}" for a in self.accents for v in VARIANTS]
        voices = [v for v in voices if v not in [self.model_voice, *self.new_voices]]
        random.Random(seed).shuffle(voices)
        return voices[:n]


SHARES = {"repeat": 0.38, "count": 0.3, "next": 0.08, "opposite": 0.08, "chant": 0.1, "story": 0.06}  # of the dialogues


@dataclass(frozen=True)
class Story:
    """A user's long story: clauses with pauses between them, in which the model murmurs; at a hazard it warns at once."""
    begin: str
    clause: str
    nouns: str
    adjectives: str
    hazard: str
    end: str
    reply: str
    warning: str
    murmur: str
    backchannels: tuple  # what a user murmurs while the model speaks, which must not stop it


LANGUAGES = {
    "en": Language("one two three four five six seven eight nine ten eleven twelve",
                   "big/small hot/cold left/right day/night up/down", "red green cat fish sun moon tree apple",
                   ["repeat {}", "count from {} to {}", "what comes after {}", "opposite of {}", "chant {}"],
                   Story("listen", "the {} is {}", "cat fish sun moon tree apple", "big small hot cold red green",
                         "the {} is on fire", "the end", "nice story", "watch out there is a fire", "mhm", ("mhm", "yeah", "okay")),
                   "en-us en-gb-x-rp gmw/en en-gb-scotland en-us-nyc en-gb-x-gbcwmd", "en-us+m3", "en-us+f1 en-gb-x-rp+m7"),
    "zh": Language("一 二 三 四 五 六 七 八 九 十 十一 十二",
                   "大/小 热/冷 左/右 白天/黑夜 上/下", "红 绿 猫 鱼 太阳 月亮 树 苹果",
                   ["重复 {}", "从 {} 数到 {}", "{} 后面 是 什么", "{} 的 反义词", "反复 说 {}"],
                   Story("听 我 说", "{} 很 {}", "猫 鱼 太阳 月亮 树 苹果", "大 小 热 冷 红 绿", "{} 着火 了", "讲 完 了", "好 故事",
                         "小心 那里 着火 了 快 走", "嗯", ("嗯", "对", "好")),
                   "cmn", "cmn+m3", "cmn+f1 cmn+m7"),
}

RING = random.Random(0).sample(range(12), 12)
HELD_OUT_PAIRS = {frozenset(pair) for pair in zip(RING, RING[1:] + RING[:1])}  # 12 of 66, each number in two of them


def held_out_triple(words):
    """Whether these three words, in this order, belong to the fifth that is never trained on."""
    return hashlib.sha256(" ".join(words).encode()).digest()[0] < 51


def make_request(lang, kind, test, rng):
    """(request, answer); for a test one that is held out, if the kind has any."""
    numbers, request = lang.numbers, lang.requests[kind].format
    while True:
        if kind in ("repeat", "chant"):
            words = rng.sample(lang.words, 3)
            if held_out_triple(words) == test:
                return request(" ".join(words)), " ".join(words * (CHANT if kind == "chant" else 1))
        elif kind == "count":
            a, b = rng.sample(range(len(numbers)), 2)
            if (frozenset((a, b)) in HELD_OUT_PAIRS) == test:
                return request(numbers[a], numbers[b]), " ".join(numbers[a:b + 1] if a < b else numbers[b:a + 1][::-1])
        elif kind == "next":
            i = rng.randrange(len(numbers) - 1)
            return request(numbers[i]), numbers[i + 1]
        else:
            word = rng.choice(sorted(lang.opposites))
            return request(word), lang.opposites[word]


def cut_in_two(request, rng):
    """A request before and after a pause at which what was said cannot be all."""
    words = request.split()
    cut = rng.randrange(1, len(words))
    return [" ".join(words[:cut]), " ".join(words[cut:])]


CHANT = 5  # times that a chant is said: an answer of six seconds


def make_story(lang, clauses, hazard, rng):
    """The parts of a story of so many clauses; hazard: the number of the clause that is one, or None."""
    s, parts = lang.story, [lang.story.begin]
    for i in range(clauses):
        noun, adjective = rng.choice(s.nouns.split()), rng.choice(s.adjectives.split())
        parts.append(s.hazard.format(noun) if i == hazard else s.clause.format(noun, adjective))
    return [*parts, s.end]


def make_sentence(lang, vocabulary, rng):
    """One to four words in any order, for post-training: its text is no use for guessing what comes next, so whoever
    shall write it down must hear every word. Nothing that is held out occurs in it."""
    while True:
        words = [rng.choice(vocabulary) for _ in range(rng.randint(1, 4))]
        numbers = [lang.numbers.index(w) for w in words if w in lang.numbers]
        if not any(held_out_triple(words[i:i + 3]) for i in range(len(words) - 2)) and \
                not any(frozenset((a, b)) in HELD_OUT_PAIRS for a in numbers for b in numbers):
            return " ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# the toy world: who says it


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


def speak(synthesiser, parts, pauses, voice, speed, pitch):
    """Parts of speech with pauses of so many seconds between them, trimmed and levelled: samples at 24 kHz, and the second at
    which each part ends."""
    sounds = [torch.from_numpy(synthesiser.speak(text, voice, speed, pitch)) for text in parts]
    sounds = [trim(resample(x[None], synthesiser.rate)[0].numpy()) for x in sounds]
    loud = level(np.concatenate(sounds))
    out, ends, at = [], [], 0
    for x, pause in zip(sounds, [*pauses, 0.0], strict=True):
        out += [loud[at:at + len(x)], np.zeros(round(pause * SAMPLE_RATE), np.float32)]
        at += len(x)
        ends.append(sum(map(len, out[:-1])) / SAMPLE_RATE)
    return np.concatenate(out), ends


def speak_to_file(job):
    """One line of speech, written; the second at which each of its parts ends."""
    path, *what = job
    sound, ends = speak(SYNTHESISER, *what)
    write_audio(path, sound)
    return ends


def trim(x, floor=0.01):
    """Without the silence at both ends: what stays below a hundredth of the peak."""
    loud = np.flatnonzero(np.abs(x) > floor * np.abs(x).max())
    if not len(loud):
        raise ValueError("the synthesiser gave silence")
    return x[loud[0]:loud[-1] + 1]


def level(x, db=-23.0):
    return x * min(10 ** (db / 20) / (np.sqrt(np.mean(x * x)) + 1e-6), 0.99 / np.abs(x).max())


def speak_all(jobs, what):
    """Speak every job (path, texts, pauses between them, voice, speed, pitch), on all cores; where the parts of each end."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
        return list(tqdm(pool.imap(speak_to_file, jobs, chunksize=8), what, len(jobs), unit="clip"))


def on_frames(words, gap=0.04):
    """Words one after another, each beginning on a frame, with at least the gap of silence after it: their samples, and
    the second at which each begins."""
    padded = [np.pad(w, (0, int(gap * SAMPLE_RATE))) for w in words]
    padded = [np.pad(w, (0, -len(w) % FRAME)) for w in padded]
    starts = np.cumsum([0] + [len(w) for w in padded[:-1]]) / SAMPLE_RATE
    return np.concatenate(padded), starts.round(4).tolist()


def model_turn(text):
    return {"role": "model", "voice": "model", "text": text, "audio": f"model/{text.replace(' ', '-')}.flac"}


def interject(story, ends, hazard):
    """What the model says while the user tells a story whose parts end at these seconds: a murmur in the pause after each clause,
    and after a hazard, a moment later, the warning."""
    out = []
    for i, end in enumerate(ends[1:-1]):
        if i == hazard:
            out.append({**model_turn(story.warning), "at": end + 0.3})
        elif not out or out[-1]["text"] == story.murmur or end > out[-1]["at"] + 3:  # not while it warns
            out.append({**model_turn(story.murmur), "at": end + 0.08})
    return out


def get_synthesiser(tts):
    return Command(tts) if tts else Espeak()


def begin_speaking(out, tts):
    global SYNTHESISER  # the processes that speak inherit it
    must_be_new(out)
    SYNTHESISER = get_synthesiser(tts)


def must_be_new(out):
    if os.path.exists(out):
        raise ValueError(f"{out}: is there already; remove it, or name another folder with --out")


def write_manifest(lines, work, out):
    """The last thing in a folder of work, which then becomes `out`."""
    with open(os.path.join(work, "manifest.jsonl"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(d, ensure_ascii=False) + "\n" for d in lines)
    os.rename(work, out)


def make_toy(out, lang, items, tests, sentences, voices, seed, tts):
    """Speak the toy world into the folder `out`: user/*.flac, model/*.flac, manifest.jsonl."""
    begin_speaking(out, tts)
    unknown = set(lang.split(",")) - {*LANGUAGES}
    if unknown:
        raise ValueError(f"--lang {lang}: there is no {' and no '.join(sorted(unknown))}; languages are {', '.join(LANGUAGES)}")
    codes = lang.split(",")  # such as en, zh
    rng = random.Random(seed)
    known = {c: LANGUAGES[c].user_voices(voices // len(codes), seed) for c in codes}
    lines, spoken = [], []  # spoken: (turn, parts, pauses)

    def add(code, kind, split, request=None, answer=None, pauses=()):
        """A line; request: the parts of what the user says."""
        voice, turns = rng.choice(LANGUAGES[code].new_voices if split == "new" else known[code]), []
        if request:
            turns.append({"role": "user", "voice": voice, "text": " ".join(request), "audio": f"user/{len(lines):06d}.flac"})
            spoken.append((turns[0], request, pauses))
        if answer:
            turns.append(model_turn(answer))
        lines.append({"id": len(lines), "kind": kind, "lang": code, "split": split, "turns": turns})
        return lines[-1]

    stories = []
    for i, code in enumerate(codes):
        lang = LANGUAGES[code]
        share = lambda n: n * (i + 1) // len(codes) - n * i // len(codes)
        for split, n in (("train", share(sentences)), ("seen", share(sentences) // 40)):
            for _ in range(n):
                add(code, "heard", split, [make_sentence(lang, lang.words + lang.little, rng)])
            for _ in range(n // 4):
                add(code, "said", split, answer=make_sentence(lang, lang.words, rng))
            for _ in range(-(-n // 50)):
                add(code, "backchannel", split, [rng.choice(lang.story.backchannels)])
        for split, n in (("train", share(items)), ("seen", share(tests)), ("new", share(tests))):
            for kind in rng.choices(list(SHARES), SHARES.values(), k=n):
                if kind == "story":
                    clauses = rng.choice([2, 3, 3, 4, 4, 5, 11])
                    hazard = rng.randrange(clauses - 1) if rng.random() < 0.5 else None
                    parts = make_story(lang, clauses, hazard, rng)
                    stories.append((add(code, kind, split, parts, lang.story.reply, [0.4] * (len(parts) - 1)), hazard))
                    continue
                request, answer = make_request(lang, kind, split != "train", rng)
                if rng.random() < 0.25:  # with a pause for thought
                    add(code, kind, split, cut_in_two(request, rng), answer, [rng.uniform(0.4, 1.6)])
                else:
                    add(code, kind, split, [request], answer)

    work = out + ".partial"
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("user", "model", "words"):
        os.makedirs(os.path.join(work, folder))
    jobs = [(os.path.join(work, t["audio"]), parts, pauses, t["voice"], rng.randint(140, 190), rng.randint(35, 65))
            for t, parts, pauses in spoken]
    ends = {t["audio"]: e for (t, _, _), e in zip(spoken, speak_all(jobs, "sentences, requests, stories"))}
    for line, hazard in stories:
        line["interjections"] = interject(LANGUAGES[line["lang"]].story, ends[line["turns"][0]["audio"]], hazard)
    lasting = {audio: e[-1] for audio, e in ends.items()}

    said = [(d["lang"], t) for d in lines for t in (*d["turns"], *d.get("interjections", ())) if t["role"] == "model"]
    words = sorted({(code, w) for code, t in said for w in t["text"].split()})
    paths = [os.path.join(work, f"words/{code}-{w}.flac") for code, w in words]
    speak_all([(path, [w], [], LANGUAGES[code].model_voice, 170, 50) for path, (code, w) in zip(paths, words)], "words")
    words = {key: read_audio(path).numpy() for key, path in zip(words, paths)}
    shutil.rmtree(os.path.join(work, "words"))
    for code, turn in said:
        x, turn["starts"] = on_frames([words[code, w] for w in turn["text"].split()])
        if turn["audio"] not in lasting:
            write_audio(os.path.join(work, turn["audio"]), x)
            lasting[turn["audio"]] = len(x) / SAMPLE_RATE
    write_manifest(lines, work, out)
    print(f"\n{'split':8}{'sentences':>10}{'dialogues':>11}{'minutes':>9}   user voices")
    for split in ("train", "seen", "new"):
        mine = [d for d in lines if d["split"] == split]
        turns = [t for d in mine for t in d["turns"]]
        print(f"{split:8}{sum(len(d['turns']) == 1 for d in mine):10}{sum(len(d['turns']) == 2 for d in mine):11}"
              f"{sum(lasting[t['audio']] for t in turns) / 60:9.1f}   {len({t['voice'] for t in turns if t['role'] == 'user'})}")
    n = len(lang.words)
    print(f"Held out: a fifth of the {n}*{n - 1}*{n - 2} word triples, {len(HELD_OUT_PAIRS)} of 66 number pairs, "
          f"the voices {', '.join(v for c in codes for v in LANGUAGES[c].new_voices)}.")
    print(f"Wrote {len(lines)} lines, {sum(lasting.values()) / 3600:.2f} hours of sound, to {out}/manifest.jsonl")


def speak_dialogues(source, out, voices, seed, tts):
    """Dialogues as text, lines {"turns": [{"role": "user", "text": "..."}, {"role": "model", "text": "..."}, ...]}, perhaps with
    "lang" -> the same with sound, in the folder `out`. A dialogue's user keeps one voice."""
    begin_speaking(out, tts)
    rng, lines, jobs = random.Random(seed), [], []
    work = out + ".partial"
    with open(source, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                d = json.loads(line)
                language = LANGUAGES[d.get("lang", "en")]
                voice = {"user": rng.choice(language.user_voices(voices, seed)), "model": language.model_voice}
                for i, t in enumerate(d["turns"]):
                    if t["role"] != ("user", "model")[i % 2] or not t["text"].strip():
                        raise ValueError("user and model take turns, the user first, and each says something")
                    t["voice"], t["audio"] = voice[t["role"]], f"turns/{number:06d}-{i}.flac"
                    jobs.append((os.path.join(work, t["audio"]), [t["text"]], [], t["voice"], 165, 50))
                if not d["turns"] or len(d["turns"]) % 2:
                    raise ValueError("it needs turns, and the last one is the model's")
                lines.append(d)
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{source}, line {number}: {type(e).__name__}: {e}") from None
    if not lines:
        raise ValueError(f"{source}: holds no dialogue")
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(os.path.join(work, "turns"))
    seconds = sum(ends[-1] for ends in speak_all(jobs, "turns"))
    write_manifest(lines, work, out)
    print(f"Wrote {len(lines)} dialogues, {seconds / 3600:.2f} hours of sound, to {out}/manifest.jsonl; "
          f"next: python prepare.py encode --data {out}")


# ---------------------------------------------------------------------------------------------------------------------
# manifest -> codes and tokens


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
    "interjections": [{"text", "path", "at"}] of the model, so many seconds after the user has begun, or, of a recorded conversation, {"split", "path", "sentences": [{"role", "text", "start", "end"}]}. Raises ValueError or OSError."""
    d = json.loads(line)
    if not isinstance(d, dict):
        raise ValueError("is not an object {...}")
    if "turns" not in d and "sentences" not in d:  # a recording: good for hearing and for speaking
        d = {"turns": [{**d, "role": "either"}], **{k: d[k] for k in ("id", "split", "annotated", "lang") if k in d}}
    parts = d.get("turns", d.get("sentences"))
    if not isinstance(parts, list) or not parts:
        raise ValueError("needs a list of turns or of sentences, or is a recording with audio and text")
    for part in parts:
        for key, kind in {"role": str, "text": str, **({"audio": str} if "turns" in d else {"start": (int, float), "end": (int, float)})}.items():
            if not isinstance(part, dict) or not isinstance(part.get(key), kind):
                raise ValueError(f"a {'turn' if 'turns' in d else 'sentence'} needs the field {key!r}")
        if part["role"] not in ("user", "model", "either"):
            raise ValueError(f"a role is user or model, not {part['role']!r}")
        if not part.get("start", 0.0) >= 0 or not part.get("end") is None and not part["end"] > part.get("start", 0.0):
            raise ValueError(f"from {part.get('start', 0.0)} to {part['end']} s is not a stretch of time")
    said = d.get("interjections", [])
    if not isinstance(said, list) or not all(isinstance(t, dict) and isinstance(t.get("text"), str) and t.get("at", -1) >= 0 for t in said):
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


# ---------------------------------------------------------------------------------------------------------------------
# corpora as they are downloaded -> a manifest


def librispeech(folder):
    """LibriSpeech: a *.trans.txt in each chapter's folder, with lines 'ID WORDS' for the files ID.flac."""
    for transcript in sorted(glob.glob(os.path.join(folder, "**", "*.trans.txt"), recursive=True)):
        with open(transcript, encoding="utf-8") as f:
            for name, text in (line.rstrip("\n").split(" ", 1) for line in f if " " in line):
                yield {"audio": os.path.join(os.path.dirname(transcript), name + ".flac"), "text": text.lower(), "lang": "en"}


def ljspeech(folder):
    """LJSpeech: metadata.csv with lines 'ID|text|text with numbers as words' for the files wavs/ID.wav."""
    with open(os.path.join(folder, "metadata.csv"), encoding="utf-8") as f:
        for name, _, text in (line.rstrip("\n").split("|") for line in f if line.strip()):
            yield {"audio": os.path.join(folder, "wavs", name + ".wav"), "text": text, "lang": "en"}


def conversations(path):
    """Stereo conversations in the format of moshi-finetune, the model left and the user right: lines {"path", "duration"}, and
    beside each sound file a .json with {"alignments": [[word, [start, end], speaker], ...]}."""
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                audio = os.path.join(os.path.dirname(path), json.loads(line)["path"])
                with open(os.path.splitext(audio)[0] + ".json", encoding="utf-8") as g:
                    words = [(w.strip(), float(a), float(b), speaker) for w, (a, b), speaker in json.load(g)["alignments"]]
            except (ValueError, KeyError, TypeError, OSError) as e:
                raise ValueError(f"{path}, line {number}: {e}") from None
            yield {"audio": audio, "sentences": sentences_of(words)}


def sentences_of(words, pause=0.8, longest=20.0):
    """Words (text, start, end, speaker) in order -> sentences: a new one after a full stop, a pause, or too long a time."""
    out = []
    for role in ("model", "user"):
        begun = None
        for text, start, end, _ in (w for w in words if (w[3] == "SPEAKER_MAIN") == (role == "model")):
            if begun is None or start - begun["end"] > pause or end - begun["start"] > longest or begun["text"][-1] in ".?!。？！":
                begun = {"role": role, "text": text, "start": start, "end": end}
                out.append(begun)
            else:
                begun["text"], begun["end"] = f"{begun['text']} {text}", end
    return sorted(out, key=lambda s: s["start"])


CORPORA = {"librispeech": librispeech, "ljspeech": ljspeech, "conversations": conversations}


def collect(corpus, source, out):
    """Write out/manifest.jsonl for a corpus as it was downloaded."""
    path = os.path.join(out, "manifest.jsonl")
    must_be_new(path)
    n = 0
    with replace_when_done(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        for n, line in enumerate(tqdm(CORPORA[corpus](os.path.abspath(source)), corpus, unit="line"), 1):
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
        if not n:
            raise ValueError(f"{source}: there is nothing of {corpus} in it")
    print(f"Wrote {n} lines to {path}; next: python prepare.py encode --data {out}")


# ---------------------------------------------------------------------------------------------------------------------
# dialogues -> conversations as a microphone hears them (section 3.2): free user input, noise, gain, leakage


def decibels(x):
    """Of a sound's root mean square (footnote 9)."""
    return 20 * math.log10(x.square().mean().sqrt().item() + 1e-6)


def change_gain(x, rng):
    """Louder or softer by -24 to +20 dB, but never below -40 dB."""
    return x * 10 ** (max(rng.uniform(-24, 20), -40 - decibels(x)) / 20)


def make_noise(n, files, rng):
    """n samples of noise, segment after segment, each scaled to -70 to -40 dB or, with probability 0.3, silent. From files, or
    else generated: white to brown."""
    out = []
    while sum(map(len, out)) < n:
        length = int(rng.uniform(0.5, 3.0) * SAMPLE_RATE)
        if files:
            x = read_audio(rng.choice(files))
            begin = rng.randrange(max(1, len(x) - length))
            x = x[begin:begin + length]
        else:
            spectrum = torch.randn(length // 2 + 1, 2, generator=torch.Generator().manual_seed(rng.getrandbits(60)))
            fall = (torch.arange(length // 2 + 1) / length * SAMPLE_RATE + 50) ** -rng.uniform(0.0, 1.0)  # above 50 Hz
            x = torch.fft.irfft(torch.view_as_complex(spectrum) * fall, length)
        silent = rng.random() < 0.3
        out.append(x * 0 if silent else x * 10 ** ((rng.uniform(-70, -40) - decibels(x)) / 20))
    return torch.cat(out)[:n]


def leak(heard, said, rng):
    """What the loudspeaker says comes back into the microphone: weaker (0 to 0.2) and later (0.1 to 0.5 s)."""
    delay = round(rng.uniform(0.1, 0.5) * SAMPLE_RATE)
    echo = torch.nn.functional.pad(said, (delay, 0))[:len(heard)] * rng.uniform(0, 0.2)
    return heard + torch.nn.functional.pad(echo, (0, len(heard) - len(echo)))


def hesitate(x, rng):
    """A pause of 0.4 to 0.9 s where the middle of x is softest."""
    n = SAMPLE_RATE // 50
    a, b = int(0.3 * len(x)) // n, int(0.7 * len(x)) // n
    if b <= a:
        return x
    at = (a + x[a * n:b * n].view(-1, n).square().mean(1).argmin().item()) * n
    return torch.cat([x[:at], torch.zeros(round(rng.uniform(0.4, 0.9) * SAMPLE_RATE)), x[at:]])


def converse(turns, backchannels, noises, rng):
    """turns [(user, model), ...] of a manifest -> said and heard (N,), and the model's sentences. With probability 0.7 the user
    breaks into an answer with the next turn, and the model is silent half a second later. A backchannel does not stop it."""
    plan, t = [], 0  # in samples
    for i, (user, model) in enumerate(turns):
        x, y = (read_audio(p["path"], start=p.get("start", 0.0), end=p.get("end")) for p in (user, model))
        if rng.random() < 0.2:
            x = hesitate(x, rng)
        if rng.random() < 0.6:
            x = change_gain(x, rng)
        start = t + (round(rng.uniform(0.2, 1.6) * SAMPLE_RATE) if not plan or plan[-1]["cut"] is None else 0)
        sound = -(-(start + len(x)) // FRAME) * FRAME + TEXT_LEAD * FRAME
        breaks_in = i < len(turns) - 1 and rng.random() < 0.7
        t = sound + (rng.randint(FRAME, len(y)) if breaks_in else len(y))
        cut = t + REACTION * FRAME if breaks_in else None
        plan.append({"x": x, "y": y, "start": start, "sound": sound, "cut": cut, "text": model["text"]})
    n = t + round(rng.uniform(0.5, 1.5) * SAMPLE_RATE)
    n += -n % FRAME
    said, heard, sentences = torch.zeros(n), torch.zeros(n), []
    for p in plan:
        mix_in(heard, p["x"], p["start"])
        end = p["sound"] + len(p["y"]) if p["cut"] is None else min(p["cut"], p["sound"] + len(p["y"]))
        mix_in(said, p["y"][:end - p["sound"]], p["sound"])
        sentences.append({"role": "model", "start": p["sound"] / SAMPLE_RATE, "end": end / SAMPLE_RATE, "text": p["text"]})
        if p["cut"] is not None:
            sentences[-1]["cut"] = p["cut"] / SAMPLE_RATE
        elif backchannels and rng.random() < 0.3:
            b = rng.choice(backchannels)
            mix_in(heard, read_audio(b["path"]), p["sound"] + rng.randrange(len(p["y"])))
    if rng.random() < 0.3:
        heard = leak(heard, said, rng)
    return said, heard + make_noise(n, noises, rng), sentences


def mix_in(whole, part, at):
    whole[at:at + len(part)] += part[:max(0, len(whole) - at)]


def mix(data, out, conversations, noise, seed):
    """Dialogues of data/manifest.jsonl -> out/manifest.jsonl with recorded conversations."""
    must_be_new(out)
    noises = sorted(p for p in glob.glob(os.path.join(noise, "**"), recursive=True) if os.path.isfile(p)) if noise else []
    if noise and not noises:
        raise ValueError(f"{noise}: holds no file of noise")
    dialogues, backchannels = {"train": [], "seen": []}, []
    for d in read_manifest(os.path.join(data, "manifest.jsonl")):
        turns = d.get("turns", ())
        if d.get("kind") == "backchannel":
            backchannels += turns
        elif len(turns) > 1 and d["split"] in dialogues:
            dialogues[d["split"]].append(list(zip(turns[::2], turns[1::2])))
    if not dialogues["train"]:
        raise ValueError(f"{data}/manifest.jsonl: holds no dialogue to train on")
    work = out + ".partial"
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(os.path.join(work, "talks"))
    rng, seconds = random.Random(seed), 0.0
    with open(os.path.join(work, "manifest.jsonl"), "w", encoding="utf-8") as f:
        for i in tqdm(range(conversations), "mix", unit="talk"):
            split = "seen" if i % 50 == 0 and dialogues["seen"] else "train"
            turns = rng.choice(dialogues[split])
            if len(turns) == 1:  # a few short ones after each other
                turns = turns + [t for _ in range(rng.randint(0, 3)) for t in rng.choice(dialogues[split])]
            said, heard, sentences = converse(turns, backchannels, noises, rng)
            write_audio(os.path.join(work, f"talks/{i:06d}.flac"), torch.stack([said, heard]))
            f.write(json.dumps({"id": i, "split": split, "audio": f"talks/{i:06d}.flac", "sentences": sentences}) + "\n")
            seconds += len(said) / SAMPLE_RATE
    os.rename(work, out)
    print(f"Wrote {conversations} conversations, {seconds / 3600:.2f} hours, to {out}/manifest.jsonl; "
          f"next: python prepare.py encode --data {out}")


# ---------------------------------------------------------------------------------------------------------------------
# text -> tokens

PATTERN = r" ?[^\s]+|\s+"  # BPE merges within these: a word with the space before it


def get_tokenizer(name, words, vocab_size):
    """What the tokenizer.json of an encoded folder holds: {"pattern", "ranks", "specials"}. name is "bytes", "bpe" (learned
    from words {word: how often}), or a folder with a published vocabulary."""
    if name == "bytes":
        return {"pattern": PATTERN, "ranks": train_bpe({}, 256), "specials": []}
    if name == "bpe":
        return {"pattern": PATTERN, "ranks": train_bpe(words, vocab_size), "specials": []}
    path = os.path.join(name, "tokenizer.json")
    if os.path.isfile(path) and "ranks" in (saved := read_json(path)):  # of another encoded folder
        load_tokenizer(path)
        return {**saved, "ranks": {base64.b64decode(b): r for b, r in saved["ranks"].items()}}
    return read_published_bpe(name)


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise ValueError(f"{path}: is not JSON ({e})") from None


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


def train_bpe(words, vocab_size):
    """Byte-pair encoding of words {word: how often it occurs}: {bytes: rank}. Merges the most frequent pair until the vocabulary
    is full or each word is one token."""
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


# ---------------------------------------------------------------------------------------------------------------------
# manifest -> codes and tokens
#
#     encoded/meta.json           version, codec and tokeniser with their fingerprints, the sound of silence
#     encoded/tokenizer.json
#     encoded/00000.npy           codes (frames, K) of 500 lines; training reads what it needs from the disk
#     encoded/00000.jsonl         those lines: tokens, and where their codes stand

VERSION = 2  # of this format
SHARD = 500  # lines

# Sound is encoded with silence before and after it, as it will be heard in a conversation: the codec looks back, so the
# frames after the last word still carry it. The lead is thrown away; the tail is kept, frames[speech:].
LEAD, TAIL = 6, 5


def encode(data, codec_path, tokenizer_name, vocab_size, copies, skip_broken, processes, device):
    """data/manifest.jsonl and its sound -> data/encoded. What a killed run has finished is kept by the next one with the same
    settings."""
    begun = time.monotonic()
    manifest = os.path.join(data, "manifest.jsonl")
    out, work = os.path.join(data, "encoded"), os.path.join(data, "encoded.partial")
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
            "copies": copies, "shards": []}
    with open(manifest, "rb") as f:  # where each shard begins: byte, line
        at = 0
        for number, line in enumerate(f):
            if number % SHARD == 0:
                meta["shards"].append([at, number])
            at += len(line)
    if not os.path.isfile(os.path.join(work, "meta.json")) or read_json(os.path.join(work, "meta.json")) != meta:
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)
        for name, text in (("tokenizer.json", tokenizer), ("meta.json", json.dumps(meta))):
            with replace_when_done(os.path.join(work, name)) as temporary, open(temporary, "w", encoding="utf-8") as f:
                f.write(text)
    shards = len(meta["shards"])
    jobs = [(i, begin) for i, begin in enumerate(meta["shards"]) if not os.path.exists(os.path.join(work, f"{i:05}.jsonl"))]
    settings = (manifest, work, codec_path, copies, skip_broken, device)
    with tqdm(total=shards, initial=shards - len(jobs), desc="encode", unit="shard") as bar:
        if min(processes, len(jobs)) < 2:
            start_encoder(*settings)
            for _ in map(encode_shard, jobs):
                bar.update()
        else:  # each with one thread, which together do more than one with several
            with multiprocessing.get_context("spawn").Pool(min(processes, len(jobs)), start_encoder, (*settings, 1)) as pool:
                for _ in pool.imap_unordered(encode_shard, jobs):
                    bar.update()
    frames = sum(len(np.load(os.path.join(work, f"{i:05}.npy"), mmap_mode="r")) for i in range(shards))
    shutil.rmtree(out, ignore_errors=True)
    os.rename(work, out)
    hours, took = frames * FRAME / SAMPLE_RATE / 3600, (time.monotonic() - begun) / 3600
    memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / (1e9 if sys.platform == "darwin" else 1e6)
    print(f"Wrote {frames} frames ({hours:.2f} hours of sound, {hours / took:.0f} hours an hour, at most {memory:.2f} GB a process) "
          f"of {lines} lines to {out}")


def words_of(line):
    """What the tokeniser is learned from."""
    for part in line.get("turns", line.get("sentences")):
        yield from re.findall(PATTERN, " " + unicodedata.normalize("NFC", part["text"]))


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
    ENCODER = manifest, work, Mimi.load(codec_path, device), tokenizer, copies, skip_broken, device


def encode_shard(job):
    """Encode one shard's lines: NUMBER.npy, then NUMBER.jsonl, which says that both are whole."""
    number, begin = job
    manifest, work, codec, tokenizer, copies, skip_broken, device = ENCODER
    with contextlib.redirect_stderr(io.StringIO()):  # what is skipped has been said
        lines = list(read_manifest(manifest, skip_broken, begin, SHARD))
    # Every sound of this shard once. The users' begin anywhere in a frame and at another loudness each time.
    rng = random.Random(number)
    sounds = {}
    for d in lines:
        for t in spoken_parts(d):
            key, live = where_is(t), t.get("role") == "user"
            n = copies if live and d["split"] == "train" else 1
            sounds.setdefault(key, [(rng.randrange(FRAME) * live, 10 ** (rng.uniform(-6, 6) / 20) if live else 1.0) for _ in range(n)])
    jobs = sorted((seconds_of(*key), key, i) for key, versions in sounds.items() for i in range(len(versions)))
    places, codes = {}, [np.zeros((0, codec.config.codebooks), np.int16)]

    def keep(c):  # (T, K)
        codes.append(c.astype(np.int16))
        return {"shard": number, "offset": sum(map(len, codes[:-1])), "frames": len(c)}
    while jobs:
        rows = max(1, min(32, int(160 / min(10, jobs[-1][0]))))  # the longest first, as many as memory holds
        batch, jobs = jobs[-rows:], jobs[:-rows]
        wavs = []
        for _, (path, start, end), i in batch:
            phase, gain = sounds[path, start, end][i]
            wavs.append(torch.nn.functional.pad(read_audio(path, start=start, end=end) * gain, (LEAD * FRAME + phase, 0)))
        T = max(-(-len(x) // FRAME) for x in wavs) + TAIL
        wav = torch.stack([torch.nn.functional.pad(x, (0, T * FRAME - len(x))) for x in wavs])
        for (_, key, i), x, c in zip(batch, wavs, codec.encode(wav[:, None].to(device)).cpu().numpy()):
            speech = -(-len(x) // FRAME) - LEAD
            places[key, i] = {**keep(c[:, LEAD:LEAD + speech + TAIL].T), "speech": speech, "late": sounds[key][i][0]}
    encoded = []
    for d in lines:
        line = {k: d[k] for k in ("id", "kind", "split", "annotated", "lang") if k in d}
        if "turns" in d:
            encode_part = lambda t: {"text": t["text"], **tokens_of(t, tokenizer),
                                     "copies": [places[where_is(t), i] for i in range(len(sounds[where_is(t)]))]}
            line["turns"] = [{"role": t["role"], **encode_part(t)} for t in d["turns"]]
            if "interjections" in d:
                line["interjections"] = [{"at": t["at"], **encode_part(t)} for t in d["interjections"]]
        else:
            wav = read_audio(d["path"], mono=False)
            if len(wav) != 2:
                raise ValueError(f"{d['path']}: has {len(wav)} channels; a conversation has two, the model left, the user right")
            line["speak"], line["listen"] = (keep(c.T) for c in codec.encode(wav[:, None].to(device)).cpu().numpy())
            frame = lambda seconds: round(seconds * SAMPLE_RATE) // FRAME
            line["sentences"] = [{"frame": frame(s["start"]), **tokens_of(s, tokenizer), **({"cut": frame(s["cut"])} if "cut" in s else {})}
                                 for s in d["sentences"] if s["role"] == "model"]
        encoded.append(line)
    path = os.path.join(work, f"{number:05}")
    with replace_when_done(path + ".npy") as temporary, open(temporary, "wb") as f:
        np.save(f, np.concatenate(codes))
    with replace_when_done(path + ".jsonl") as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in encoded)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc keeps what tensors of ever new sizes leave: more with each shard
        ctypes.CDLL(None).malloc_trim(0)


def where_is(turn):
    return turn["path"], turn.get("start", 0.0), turn.get("end")


def seconds_of(path, start, end):
    return (soundfile.info(path).duration if end is None else end) - start


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
                                 epilog="example: python prepare.py speak dialogues.jsonl --out data/mine --tts 'say -v {voice} -o {out} {text}'")
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
