"""The toy world: the smallest world that needs everything a spoken chatbot needs. A user asks, the model answers:

    repeat cat red moon          -> cat red moon            hear anything, say anything
    what comes after six         -> seven                   know something
    opposite of big              -> small
    count from three to seven    -> three four ... seven    a long answer
    chant cat red moon           -> five times those        a longer one, good to interrupt

or tells a story, clause by clause: the model murmurs in between, and warns at once if something is on fire; all
in English, in Mandarin (从 三 数到 七), or in both.

Held out, never trained on: a fifth of all word triples and of all number pairs, and two of the user voices. Besides the
dialogues there are sentences, words in any order, which the users or the model say: a line with a single turn. They stand for
the audio books of the paper's post-training.

The speech is real synthetic speech, by espeak-ng or any other command. To keep the world small, the model's voice
speaks word by word, each word beginning on a frame; the users speak whole sentences at any time.

    python prepare.py toy                                          speaks it: sound and a manifest, data/toy
    python prepare.py speak dialogues.jsonl --out data/mine        speaks dialogues of your own
"""
import _ctypes
import ctypes
import hashlib
import json
import multiprocessing
import os
import random
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from files import SAMPLE_RATE, read_audio, resample, write_audio
from manifest import must_be_new, spoken_parts, write_manifest
from mimi import FRAME

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

RING = random.Random(13).sample(range(12), 12)
HELD_OUT_PAIRS = {frozenset(pair) for pair in zip(RING, RING[1:] + RING[:1])}  # 12 of 66: each number in two, no length whole


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


class OtherSynthesiser:
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
            out.append({**model_turn(story.murmur), "at": end})
    return out


def get_synthesiser(tts):
    return OtherSynthesiser(tts) if tts else Espeak()


def begin_speaking(out, tts):
    global SYNTHESISER  # the processes that speak inherit it
    must_be_new(out)
    SYNTHESISER = get_synthesiser(tts)


class Script:
    """Who says what: the lines of a manifest, before anything is spoken."""

    def __init__(self, codes, voices, seed):
        self.rng = random.Random(seed)
        self.known = {c: LANGUAGES[c].user_voices(voices // len(codes), seed) for c in codes}
        self.lines = []
        self.spoken = []  # what users say: (turn, its parts, the pauses between them)
        self.stories = []  # (line, number of the clause that is a hazard, or None)

    def add(self, code, kind, split, request=None, answer=None, pauses=()):
        """A line; request: the parts of what the user says."""
        voice, turns = self.rng.choice(LANGUAGES[code].new_voices if split == "new" else self.known[code]), []
        if request:
            turns.append({"role": "user", "voice": voice, "text": " ".join(request), "audio": f"user/{len(self.lines):06d}.flac"})
            self.spoken.append((turns[0], request, pauses))
        if answer:
            turns.append(model_turn(answer))
        self.lines.append({"id": len(self.lines), "kind": kind, "lang": code, "split": split, "turns": turns})
        return self.lines[-1]

    def add_sentences(self, code, split, n):
        """n of users, a fourth as many of the model, and a few murmurs."""
        lang = LANGUAGES[code]
        for _ in range(n):
            self.add(code, "heard", split, [make_sentence(lang, lang.words + lang.little, self.rng)])
        for _ in range(n // 4):
            self.add(code, "said", split, answer=make_sentence(lang, lang.words, self.rng))
        for _ in range(-(-n // 50)):
            self.add(code, "backchannel", split, [self.rng.choice(lang.story.backchannels)])

    def add_dialogues(self, code, split, n):
        lang, rng = LANGUAGES[code], self.rng
        for kind in rng.choices(list(SHARES), SHARES.values(), k=n):
            if kind == "story":
                clauses = rng.choice([2, 3, 3, 4, 4, 5, 11])
                hazard = rng.randrange(clauses - 1) if rng.random() < 0.5 else None
                parts = make_story(lang, clauses, hazard, rng)
                self.stories.append((self.add(code, kind, split, parts, lang.story.reply, [0.4] * (len(parts) - 1)), hazard))
                continue
            request, answer = make_request(lang, kind, split != "train", rng)
            if rng.random() < 0.25:  # with a pause for thought
                self.add(code, kind, split, cut_in_two(request, rng), answer, [rng.uniform(0.4, 1.6)])
            else:
                self.add(code, kind, split, [request], answer)

    def speak_users(self, work):
        """{sound file: seconds}; what the model says during their stories is known then."""
        jobs = [(os.path.join(work, t["audio"]), parts, pauses, t["voice"], self.rng.randint(140, 190), self.rng.randint(35, 65))
                for t, parts, pauses in self.spoken]
        ends = {t["audio"]: e for (t, _, _), e in zip(self.spoken, speak_all(jobs, "sentences, requests, stories"))}
        for line, hazard in self.stories:
            line["interjections"] = interject(LANGUAGES[line["lang"]].story, ends[line["turns"][0]["audio"]], hazard)
        return {audio: e[-1] for audio, e in ends.items()}

    def speak_model(self, work):
        """{sound file: seconds}. Each word is spoken once, and put together on frames."""
        said = [(d["lang"], t) for d in self.lines for t in spoken_parts(d) if t["role"] == "model"]
        words = sorted({(code, w) for code, t in said for w in t["text"].split()})
        paths = [os.path.join(work, f"words/{code}-{w}.flac") for code, w in words]
        speak_all([(path, [w], [], LANGUAGES[code].model_voice, 170, 50) for path, (code, w) in zip(paths, words)], "words")
        words = {key: read_audio(path).numpy() for key, path in zip(words, paths)}
        shutil.rmtree(os.path.join(work, "words"))
        lasting = {}
        for code, turn in said:
            x, turn["starts"] = on_frames([words[code, w] for w in turn["text"].split()])
            if turn["audio"] not in lasting:
                write_audio(os.path.join(work, turn["audio"]), x)
                lasting[turn["audio"]] = len(x) / SAMPLE_RATE
        return lasting


def make_toy(out, lang, items, tests, sentences, voices, seed, tts):
    """Speak the toy world into the folder `out`: user/*.flac, model/*.flac, manifest.jsonl."""
    begin_speaking(out, tts)
    codes = lang.split(",")  # such as en, zh
    unknown = set(codes) - {*LANGUAGES}
    if unknown:
        raise ValueError(f"--lang {lang}: there is no {' and no '.join(sorted(unknown))}; languages are {', '.join(LANGUAGES)}")
    script = Script(codes, voices, seed)
    for i, code in enumerate(codes):
        part = lambda n: n * (i + 1) // len(codes) - n * i // len(codes)
        script.add_sentences(code, "train", part(sentences))
        script.add_sentences(code, "seen", part(sentences) // 40)
        for split, n in (("train", items), ("seen", tests), ("new", tests)):
            script.add_dialogues(code, split, part(n))
    work = out + ".partial"
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("user", "model", "words"):
        os.makedirs(os.path.join(work, folder))
    lasting = script.speak_users(work) | script.speak_model(work)
    write_manifest(script.lines, work, out)
    print(f"\n{'split':8}{'sentences':>10}{'dialogues':>11}{'minutes':>9}   user voices")
    for split in ("train", "seen", "new"):
        mine = [d for d in script.lines if d["split"] == split]
        turns = [t for d in mine for t in d["turns"]]
        print(f"{split:8}{sum(len(d['turns']) == 1 for d in mine):10}{sum(len(d['turns']) == 2 for d in mine):11}"
              f"{sum(lasting[t['audio']] for t in turns) / 60:9.1f}   {len({t['voice'] for t in turns if t['role'] == 'user'})}")
    n = len(LANGUAGES[codes[-1]].words)
    print(f"Held out: a fifth of the {n}*{n - 1}*{n - 2} word triples, {len(HELD_OUT_PAIRS)} of 66 number pairs, "
          f"the voices {', '.join(v for c in codes for v in LANGUAGES[c].new_voices)}.")
    print(f"Wrote {len(script.lines)} lines, {sum(lasting.values()) / 3600:.2f} hours of sound, to {out}/manifest.jsonl")


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
