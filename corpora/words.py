"""Recordings of single words -> sentences and requests of the toy world, each in one person's voice.

    python prepare.py words SpeechCommands --out data/people
    python prepare.py words free-spoken-digit-dataset --out data/people --hold-out george,lucas

A request needs words that nobody recorded ("what comes after"). A synthesiser speaks those.
"""
import glob
import os
import random
import re

import numpy as np

from files.atomic import check_folder
from files.audio import SAMPLE_RATE, read_audio
from files.manifest import SPOKEN
from toy.script import Script
from toy.voices import get_synthesiser, normalise, trim, trim_noisy, voices_named
from toy.world import LANGUAGES

LAYOUTS = (re.compile(r"(?P<word>[a-z]+)/(?P<speaker>\w+)_nohash_\d+\.wav"),  # Speech Commands
           re.compile(r"\w+/(?P<word>\d)_(?P<speaker>[a-z]+)_\d+\.wav"))  # free-spoken-digit-dataset
PROPORTIONS = {"repeat": 0.5, "count": 0.26, "next": 0.1, "opposite": 0.1, "chant": 0.04}


def find_words(folder, lang):
    """{speaker: {word: [audio file, ...]}} of the recordings in a folder, at any depth, of words of the toy
    world."""
    speakers = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.wav"), recursive=True)):
        name = "/".join(os.path.abspath(path).split(os.sep)[-2:])
        for found in filter(None, (layout.fullmatch(name) for layout in LAYOUTS)):
            word = lang.numbers[int(found["word"])] if found["word"].isdigit() else found["word"]
            if word in lang.words:
                speakers.setdefault(found["speaker"], {}).setdefault(word, []).append(path)
    if not speakers:
        raise ValueError(f"{folder}: holds no recording of a word of the toy world, such as "
                         "three/anna_nohash_0.wav (Speech Commands) or recordings/3_anna_0.wav "
                         "(free-spoken-digit-dataset)")
    return speakers


class People:
    """A synthesiser that joins recordings of words {speaker: {word: [audio file, ...]}}, with natural gaps
    (seconds, from and to). What a speaker did not record is spoken by one of the carriers, voices of another
    synthesiser."""

    def __init__(self, speakers, carriers, synthesiser, gaps=(0.02, 0.25)):
        self.speakers, self.carriers, self.synthesiser, self.gaps = speakers, carriers, synthesiser, gaps

    def speak(self, text, voice, style):
        """float32 samples (N,) at 24 kHz: another choice of recordings for each style."""
        rng, words, out = random.Random(f"{text} {voice} {style}"), text.split(), []
        known, carrier = self.speakers.get(voice, {}), rng.choice(self.carriers)
        while words:
            n = next((i for i, word in enumerate(words) if word in known), len(words))  # words to be carried
            if n:
                part = self.synthesiser.speak(" ".join(words[:n]), carrier, style)
            else:
                part = read_word(rng.choice(known[words[0]]))
            words = words[max(1, n):]
            gap = np.zeros(round(rng.uniform(*self.gaps) * SAMPLE_RATE * bool(words)), np.float32)
            out += [normalise(trim(part)), gap]
        return np.concatenate(out)


def read_word(path, margin=0.04):
    """A recording of a word without silence and noise at both ends, but with fades of `margin` seconds."""
    x = trim_noisy(read_audio(path).numpy(), margin=margin).copy()
    if not len(x):
        raise ValueError(f"{path}: is silent")
    n = min(round(margin * SAMPLE_RATE), len(x) // 2)
    fade = np.linspace(0, 1, n, dtype=np.float32)
    x[:n] *= fade
    x[len(x) - n:] *= fade[::-1]
    return x


def make_words(source, out, lang, items, sentences, tests, hold_out, others, seed, tts):
    """Recordings of single words, as Speech Commands (word/speaker_nohash_0.wav) or the
    free-spoken-digit-dataset (3_theo_12.wav) has them -> sentences and requests of the toy world. A speaker
    needs at least three of its words."""
    out, work = check_folder(out, SPOKEN)
    language, synthesiser = LANGUAGES[lang], get_synthesiser(tts, others)
    found = find_words(source, language)
    speakers = {name: words for name, words in found.items() if len(words) > 2}
    held_out = [name for name in hold_out.split(",") if name]
    unknown = ", ".join(sorted(set(held_out) - speakers.keys()))
    if unknown:
        raise ValueError(f"--hold-out: nobody called {unknown} has recorded three words or more")
    train = sorted(speakers.keys() - set(held_out))
    if not train:
        raise ValueError(f"{source}: no speaker to train on has recorded three words of the toy world")
    known = {name: sorted(words) for name, words in speakers.items()}
    script = Script({lang: {"train": [train], "seen": [train], "new": [held_out]}}, seed, known, PROPORTIONS)
    script.fill(lang, sentences, items, {"seen": tests, "new": tests if held_out else 0})
    others = voices_named(others, language.other_voices)
    people = People(speakers, [*language.user_voices(24, seed), *others], synthesiser)
    hours = script.speak(out, work, people, synthesiser)
    print(f"{len(train)} speakers to train on, {len(held_out)} held out; "
          f"{len(found) - len(speakers)} left out, with fewer than three words")
    print(f"Wrote {len(script.lines)} lines, {hours:.2f} hours of audio, to {out}/manifest.jsonl; "
          f"next: python prepare.py encode --data {out} --tokenizer data/toy/encoded")
