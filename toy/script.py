"""The toy world as a data set: who says what, as a manifest with its audio files.

    python prepare.py toy        data/toy: user/*.flac, model/*.flac, manifest.jsonl

To keep the world small, the model's voice speaks word by word, each word beginning on a frame. The users
speak whole sentences at any time.
"""
import math
import os
import random
import shutil
import tempfile
import time

import numpy as np

from files.atomic import check_folder
from files.audio import SAMPLE_RATE, read_audio, write_audio
from files.augment import make_noise
from files.manifest import SPOKEN, spoken_parts, write_manifest
from mimi import FRAME
from toy.voices import Style, get_synthesiser, speak_all, voices_named
from toy.world import (HELD_OUT_PAIRS, KIND_PROPORTIONS, LANGUAGES, cut_in_two, make_request, make_sentence,
                       make_story)

MODEL_STYLE = Style(170)
LEAST = 0.1  # share of the world that is spoken however slow the machine


def on_frames(words, gap=0.04):
    """Put words (samples) one after another, each on the start of a frame and with `gap` seconds of silence
    or more after it. Returns the samples, and the second at which each word starts."""
    padded = [np.pad(w, (0, int(gap * SAMPLE_RATE))) for w in words]
    padded = [np.pad(w, (0, -len(w) % FRAME)) for w in padded]
    starts = np.cumsum([0] + [len(w) for w in padded[:-1]]) / SAMPLE_RATE
    return np.concatenate(padded), starts.round(4).tolist()


def model_turn(text, voice="model"):
    name = text.replace(" ", "-") + ("" if voice == "model" else f"-{voice}")
    return {"role": "model", "voice": voice, "text": text, "audio": f"model/{name}.flac"}


def interject(story, ends, hazard):
    """What the model says while the user tells a story whose parts end at these seconds: a backchannel after
    each clause; after a hazard, a moment later, the warning."""
    out = []
    for i, end in enumerate(ends[1:-1]):
        if i == hazard:
            out.append({**model_turn(story.warning), "at": end + 0.3})
        elif not out or out[-1]["text"] != story.warning or end > out[-1]["at"] + 3:  # not while it warns
            out.append({**model_turn(story.model_backchannel), "at": end})
    return out


class Script:
    """Who says what: the lines of a manifest, before anything is spoken.

    users: {language: {split: groups of voices}}; each group is heard as often as any other. known: {voice:
    the words that it can say}, for recordings of words; other voices say all. proportions: of the kinds of
    dialogues. model_voices: the model has them in turn, the last of several in sentences alone; "model" is
    the language's own."""

    def __init__(self, users, seed, known=None, proportions=KIND_PROPORTIONS, model_voices=("model",)):
        self.rng, self.users, self.known = random.Random(seed), users, known or {}
        self.proportions, self.model_voices = proportions, model_voices
        self.lines = []
        self.user_turns = []  # (turn, its parts, the pauses between them, split)
        self.stories = []  # (line, number of the clause that is a hazard, or None)

    def pick_voice(self, code, split):
        return self.rng.choice(self.rng.choice(self.users[code][split]))

    def add(self, code, kind, split, voice, request=None, answer=None, pauses=()):
        """Add a line and return it. request: the parts of the user's turn; answer: the model's turn."""
        turns = []
        if request:
            audio = f"user/{len(self.lines):06d}.flac"
            turns.append({"role": "user", "voice": voice, "text": " ".join(request), "audio": audio})
            self.user_turns.append((turns[0], request, pauses, split))
        if answer:
            voices = self.model_voices[:-1] if request and self.model_voices[1:] else self.model_voices
            turns.append(model_turn(answer, voices[len(self.lines) % len(voices)]))
        self.lines.append({"id": len(self.lines), "kind": kind, "lang": code, "split": split, "turns": turns})
        return self.lines[-1]

    def add_sentences(self, code, split, n):
        """n user sentences, a fourth as many of the model, and a tenth as many user backchannels."""
        lang = LANGUAGES[code]
        for _ in range(n):
            voice = self.pick_voice(code, split)
            words = [*self.known.get(voice, lang.words), *lang.function_words]
            self.add(code, "heard", split, voice, [make_sentence(lang, words, self.rng)])
        for _ in range(n // 4):
            self.add(code, "said", split, None, answer=make_sentence(lang, lang.words, self.rng))
        for _ in range(-(-n // 10)):
            backchannel = self.rng.choice(lang.story.user_backchannels)
            self.add(code, "backchannel", split, self.pick_voice(code, split), [backchannel])

    def add_dialogues(self, code, split, n):
        lang, rng = LANGUAGES[code], self.rng
        for kind in rng.choices(list(self.proportions), self.proportions.values(), k=n):
            voice = self.pick_voice(code, split)
            if kind == "story":
                clauses = rng.choice([2, 3, 3, 4, 4, 5, 11])
                hazard = rng.randrange(clauses - 1) if rng.random() < 0.5 else None
                parts = make_story(lang, clauses, hazard, rng)
                line = self.add(code, kind, split, voice, parts, lang.story.reply, [0.4] * (len(parts) - 1))
                self.stories.append((line, hazard))
                continue
            request, answer = make_request(lang, kind, split != "train", rng, self.known.get(voice, ()))
            if rng.random() < 0.25:  # with a pause for thought
                self.add(code, kind, split, voice, cut_in_two(request, rng), answer, [rng.uniform(0.4, 1.6)])
            else:
                self.add(code, kind, split, voice, [request], answer)

    def fill(self, code, sentences, items, tests):
        """Everything in one language: sentences, dialogues, and tests ({split: how many})."""
        self.add_sentences(code, "train", sentences)
        self.add_sentences(code, "seen", sentences // 40)
        for split, n in {"train": items, **tests}.items():
            self.add_dialogues(code, split, n)

    def add_noise(self, n):
        """n stretches of noise, for what a microphone hears between sentences."""
        for i in range(n):
            turn = {"role": "user", "voice": None, "text": "", "audio": f"user/noise-{i:03d}.flac"}
            self.lines.append({"id": len(self.lines), "kind": "noise", "split": "train", "turns": [turn]})

    def write_noise(self, work):
        """{audio file: seconds}"""
        files = [d["turns"][0]["audio"] for d in self.lines if d["kind"] == "noise"]
        for file in files:
            noise = make_noise(8 * SAMPLE_RATE, None, self.rng)
            write_audio(os.path.join(work, file), noise, flush=False)
        return dict.fromkeys(files, 8.0)

    def pick_style(self, split):
        """Training hears slow and fast, deep and high, flat and lively voices; tests, the usual ones."""
        randint = self.rng.randint
        if split == "train":
            return Style(randint(120, 210), randint(10, 90), randint(20, 90))
        return Style(randint(140, 190), randint(35, 65))

    def jobs(self, turns, work):
        """What speak_all takes: to speak these of self.user_turns into the folder `work`."""
        return [(os.path.join(work, t["audio"]), parts, pauses, t["voice"], self.pick_style(split))
                for t, parts, pauses, split in turns]

    def share_within(self, minutes, synthesiser, sample=128):
        """What share of the turns to train on, so that speaking takes at most these minutes: a few of them
        tell how fast this machine is. Takes random numbers, so this script is not the one to speak."""
        train = sum(split == "train" for *_, split in self.user_turns)
        if not train:
            return 1
        turns = self.rng.sample(self.user_turns, min(sample, len(self.user_turns)))
        with tempfile.TemporaryDirectory() as work:
            os.mkdir(os.path.join(work, "user"))
            begun = time.monotonic()
            speak_all(self.jobs(turns, work), "how fast", synthesiser)
            pace = (time.monotonic() - begun) / len(turns)
        return (60 * minutes / pace - (len(self.user_turns) - train)) / train

    def speak_users(self, work, synthesiser):
        """Speak all user turns: {audio file: seconds}. Add the model's interjections, whose times are known
        now."""
        spoken = speak_all(self.jobs(self.user_turns, work), "sentences, requests, stories", synthesiser)
        ends = {t["audio"]: e for (t, *_), e in zip(self.user_turns, spoken)}
        for line, hazard in self.stories:
            story, audio = LANGUAGES[line["lang"]].story, line["turns"][0]["audio"]
            line["interjections"] = interject(story, ends[audio], hazard)
        return {audio: e[-1] for audio, e in ends.items()}

    def speak_model(self, work, synthesiser):
        """Speak all model turns: {audio file: seconds}. Each word is spoken once, and then put together on
        frames."""
        turns = [(d["lang"], t) for d in self.lines for t in spoken_parts(d) if t["role"] == "model"]
        words = sorted({(code, t["voice"], w) for code, t in turns for w in t["text"].split()})
        paths = [os.path.join(work, f"words/{i}.flac") for i in range(len(words))]
        name = lambda code, voice: LANGUAGES[code].model_voice if voice == "model" else voice
        jobs = [(path, [w], [], name(c, voice), MODEL_STYLE) for path, (c, voice, w) in zip(paths, words)]
        speak_all(jobs, "words", synthesiser)
        words = {key: read_audio(path).numpy() for key, path in zip(words, paths)}
        shutil.rmtree(os.path.join(work, "words"))
        seconds = {}
        for code, turn in turns:
            x, turn["starts"] = on_frames([words[code, turn["voice"], w] for w in turn["text"].split()])
            if turn["audio"] not in seconds:
                write_audio(os.path.join(work, turn["audio"]), x, flush=False)
                seconds[turn["audio"]] = len(x) / SAMPLE_RATE
        return seconds

    def speak(self, out, work, users, model):
        """Speak everything into the folder `work`, which then becomes `out`. users, model: synthesisers.
        Returns the hours of audio."""
        shutil.rmtree(work, ignore_errors=True)
        for folder in ("user", "model", "words"):
            os.makedirs(os.path.join(work, folder))
        seconds = self.speak_users(work, users) | self.speak_model(work, model) | self.write_noise(work)
        write_manifest(self.lines, work, out)
        show_table(self.lines, seconds)
        return sum(seconds.values()) / 3600


def make_toy(out, lang, items, tests, sentences, voices, seed, tts, others="", minutes=0.0, **script):
    """Speak the toy world into the folder `out`: user/*.flac, model/*.flac, manifest.jsonl. minutes: less to
    train on, if this machine would take longer. script: more for Script."""
    out, work = check_folder(out, SPOKEN)
    codes = lang.split(",")  # such as en, zh
    unknown = " and no ".join(sorted(set(codes) - {*LANGUAGES}))
    if unknown:
        raise ValueError(f"--lang {lang}: there is no {unknown}; languages are {', '.join(LANGUAGES)}")
    more = {code: voices_named(others, LANGUAGES[code].other_voices) for code in codes}
    synthesiser, users = get_synthesiser(tts, any(more.values())), {}
    for code in codes:
        some = LANGUAGES[code].user_voices(voices // len(codes), seed)
        groups = [some] * 3 + [more[code] or some] * 2
        users[code] = {"train": groups, "seen": groups, "new": [LANGUAGES[code].new_voices]}

    def written(share):
        made = Script(users, seed, **script)
        for i, code in enumerate(codes):
            part = lambda n: n * (i + 1) // len(codes) - n * i // len(codes)
            made.fill(code, part(math.ceil(share * sentences)), part(math.ceil(share * items)),
                      {"seen": part(tests), "new": part(tests)})
        made.add_noise(max(1, items // 100))
        return made
    share = written(1).share_within(minutes, synthesiser) if minutes else 1
    if share < 1:
        share = max(LEAST, share)
        print(f"{share:.0%} of the sentences and dialogues to train on, as this machine would take longer "
              f"than {minutes:.1f} minutes for all")
    script = written(min(1, share))
    hours = script.speak(out, work, synthesiser, synthesiser)
    n, pairs = len(LANGUAGES[codes[-1]].words), math.comb(len(LANGUAGES[codes[-1]].numbers), 2)
    voices = ", ".join(v for c in codes for v in LANGUAGES[c].new_voices)
    print(f"Held out: a fifth of the {n}*{n - 1}*{n - 2} word triples, "
          f"{len(HELD_OUT_PAIRS)} of {pairs} number pairs, the voices {voices}.")
    print(f"Wrote {len(script.lines)} lines, {hours:.2f} hours of audio, to {out}/manifest.jsonl")


def show_table(lines, seconds):
    """seconds: {audio file: its length}"""
    print(f"\n{'split':8}{'sentences':>10}{'dialogues':>11}{'minutes':>9}   user voices")
    for split in ("train", "seen", "new"):
        some = [d for d in lines if d["split"] == split]
        turns = [t for d in some for t in d["turns"]]
        singles, pairs = (sum(len(d["turns"]) == n for d in some) for n in (1, 2))
        print(f"{split:8}{singles:10}{pairs:11}{sum(seconds[t['audio']] for t in turns) / 60:9.1f}   "
              f"{len({t['voice'] for t in turns if t['role'] == 'user'})}")
