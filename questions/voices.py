"""Does it have the voice that it is prompted with, one that it only ever heard reading too?

The model's answers are in three voices, and a fourth one only reads sentences. The judge of voices learns
from what the codec makes of sentences; its score on other sentences (of the same recorded words, as all that
the model hears of itself) is the ceiling. That of one for original recordings stands beside it. It knows four
voices; an answer without any sound is in none of them.
"""
import os
from functools import partial

import torch
import torch.nn.functional as F

from eval import answers
from evals.codec import reconstruct
from evals.scores import Proportions
from evals.turns import speech
from files.audio import SAMPLE_RATE, read_audio
from files.manifest import read_manifest
from layouts.prompts import make_prompt
from mimi import LogMel
from questions.recipe import ANSWER, Variant, World, measure, stages

MODEL_VOICES = ("model", "en-us+f4", "en-us+klatt4", "en-us+Annie")
READER = MODEL_VOICES[-1]
JUDGED = 30  # sentences of a voice that its judge learns from; as many test the judge
PROMPTS = 3  # sentences of a voice that it is prompted with
WORDS = 3  # in all these sentences, at least
WORLD = World("data/voices", script=(("model_voices", MODEL_VOICES),))


class VoiceJudge:
    """Softmax regression on the mean and the deviation of log-mel frames with sound."""

    def __init__(self, clips):
        """clips: {voice: [(N,) samples, ...]}"""
        self.voices, self.mel = list(clips), LogMel(240)
        x = torch.stack([self.features(wav) for wavs in clips.values() for wav in wavs])
        y = torch.tensor([i for i, wavs in enumerate(clips.values()) for _ in wavs])
        self.mean, self.std = x.mean(0), x.std(0) + 0.05
        self.weights = torch.zeros(x.shape[1] + 1, len(clips), requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weights], max_iter=100)

        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(self.logits(x), y) + 1e-3 * self.weights.square().sum()
            value.backward()
            return value
        optimizer.step(loss)

    def features(self, wav):
        x = self.mel(F.pad(wav, (0, -len(wav) % 240))[None, None], self.mel.init_state(1))[0]
        sounds = x.mean(0) >= x.mean(0).quantile(0.5)
        return torch.cat([x[:, sounds].mean(1), x[:, sounds].std(1, correction=0)])

    def logits(self, x):
        x = (x - self.mean) / self.std
        return torch.cat([x, x.new_ones(len(x), 1)], 1) @ self.weights

    @torch.no_grad()
    def voice(self, wav):
        return self.voices[self.logits(self.features(wav)[None]).argmax()]


def sentences(split, n):
    """{voice: up to n files of the model's sentences}"""
    found = {}
    for d in read_manifest(os.path.join(WORLD.folder, "manifest.jsonl")):
        turn = d["turns"][0]
        if d["split"] == split and d["kind"] == "said" and len(turn["text"].split()) >= WORDS:
            files = found.setdefault(turn["voice"], [])
            if len(files) < n and turn["path"] not in files:
                files.append(turn["path"])
    return found


def spoken(wav):
    """What of (N,) samples is speech."""
    spans = [(round(a * SAMPLE_RATE), round(b * SAMPLE_RATE)) for a, b in speech(wav)]
    return torch.cat([wav[:0], *(wav[a:b] for a, b in spans)])


def in_voices(task, duplex, recogniser, items):
    """Held-out requests: without a prompt, and after held-out sentences in each voice."""
    prompts, found = sentences("seen", PROMPTS), {}
    through = partial(reconstruct, duplex.codec)
    for name, decode in (("original", lambda wav: wav), ("codec", through)):
        clips = {v: [spoken(decode(read_audio(f))) for f in files]
                 for v, files in sentences("train", 2 * JUDGED).items()}
        judge = VoiceJudge({v: wavs[:JUDGED] for v, wavs in clips.items()})
        right = [judge.voice(wav) == v for v, wavs in clips.items() for wav in wavs[JUDGED:]]
        found[name] = sum(right) / len(right)
    found["unprompted"] = measure(task, duplex, recogniser, items)["text"]
    for name, voices in (("", MODEL_VOICES[:-1]), ("reader ", (READER,))):
        scores, ways = Proportions(), [(voice, file) for voice in voices for file in prompts[voice]]
        for i, (voice, file) in enumerate(ways):
            duplex.prompt = make_prompt(duplex, voice=file)
            for _, _, (_, said) in answers(duplex, recogniser, items[i::len(ways)], 7, scores, "seen"):
                sound = spoken(said)
                scores.add("voice", len(sound) > 0 and judge.voice(sound) == voice)
        duplex.prompt = None
        found |= {f"{name}text": scores.proportion("seen text"), f"{name}voice": scores.proportion("voice"),
                  f"{name}spoken": scores.proportion("seen spoken 1 - WER")}
    return found


HOW = {"measure": in_voices, "titles": {
    "unprompted": "no prompt: text", "text": "prompted: text", "voice": "voice matched",
    "spoken": "spoken 1 - WER", "reader text": "reader: text", "reader voice": "reader: voice",
    "reader spoken": "reader: spoken", "original": "judge, originals", "codec": "judge, codec"}}
VOICED = {"voices:voiced": (1, 1)}
# Only the first frames of an answer tell whether the voice is known; so all frames of speech count.
MORE = {"times": 2, "rows": (6, 128), "depth": (1.0, 0.05)}
VOICES = {name: Variant(stages(fine_1=fine_1, fine_2=fine_2, **MORE), **HOW)
          for name, fine_1, fine_2 in (
              ("recipe", ANSWER, ANSWER), ("prompted", VOICED, VOICED),
              ("decoupled", VOICED, {**VOICED, "voices:decoupled": (0.5, 0.5)}))}
