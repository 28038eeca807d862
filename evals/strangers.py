"""Voices that nobody trained on: other synthesisers, people, and all of them through poor microphones.

    flite's awb and slt are cut from recordings of a man and a woman; prepare.py never trains on them.
    --people FOLDER --speakers george,lucas: recordings of single words, as `prepare.py words` reads them
"""
import dataclasses
import math
import random

import torch

import toy.voices
from corpora.words import PROPORTIONS, People, find_words
from evals.turns import LEAD, silence
from files.augment import Microphone
from toy.world import LANGUAGES, make_request

FLITE = ("flite:awb", "flite:slt")
MICROPHONES = {"telephone": Microphone(band=(300, 3400)),
               "room": Microphone(reverberation=0.5, distance=-3),
               "noise, 10 dB": Microphone(noise=-10, rumble=0.5)}
LISTEN_ON = 8.0  # seconds after the request


def make_strangers(people, speakers, tts, seed, n):
    """{name: [(audio (N,), the right answer), ...]}: n held-out requests for each voice that is there, and n
    of all of them for each microphone."""
    synthesiser, language = toy.voices.get_synthesiser(tts), LANGUAGES["en"]
    voices = {} if tts else {v: (synthesiser, ()) for v in FLITE if toy.voices.is_installed(v)}
    if people:
        found = find_words(people, language)
        carried = People(found, list(language.new_voices), synthesiser)
        for name in speakers.split(",") if speakers else sorted(found):
            if len(found.get(name, ())) < 3:
                raise ValueError(f"{people}: nobody called {name} has recorded three words of the toy world")
            voices[name] = carried, sorted(found[name])
    kinds, weights = zip(*((k, w) for k, w in PROPORTIONS.items() if k != "chant"))

    def speak(voice, rng):
        """(speech (N,), answer)"""
        synthesiser, known = voices[voice]
        request, answer = make_request(language, rng.choices(kinds, weights)[0], True, rng, known)
        style = toy.voices.Style(rng.randint(140, 190))
        return torch.from_numpy(toy.voices.speak(synthesiser, [request], [], voice, style)[0]), answer.split()

    groups = {}
    for voice in voices:
        rng = random.Random(f"{seed} {voice}")
        items = [speak(voice, rng) for _ in range(n)]
        groups[voice] = [(in_silence(x), answer) for x, answer in items]
    for name, microphone in MICROPHONES.items() if voices else ():
        rng = random.Random(f"{seed} {name}")
        items = [speak(rng.choice(list(voices)), rng) for _ in range(n)]
        groups[f"all, {name}"] = [(record(x, microphone, i), answer) for i, (x, answer) in enumerate(items)]
    return groups


def in_silence(speech):
    return torch.cat([silence(LEAD), speech, silence(LISTEN_ON)])


def record(speech, microphone, seed):
    """Speech in silence through a microphone, whose noise is as much softer than the speech as it says."""
    x = in_silence(speech)
    louder = 10 * math.log10(len(x) / len(speech))  # the microphone counts from the mean over all of x
    return dataclasses.replace(microphone, noise=microphone.noise + louder, seed=seed)(x)
