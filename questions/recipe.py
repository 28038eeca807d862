"""The recipe that every variant changes one thing of, and how it is measured."""
import os
from dataclasses import dataclass

import train
from eval import KINDS, answers
from evals.scores import Proportions
from files.manifest import read_manifest
from toy.script import make_toy
from toy.world import KIND_PROPORTIONS

BOTH = {"tts": (1, 1), "asr": (2, 2)}
FADE = {"asr_response_tts": (0.7, -0.7), "response_tts": (1, 1)}
ANSWER = {"response_tts": (1, 1)}
# what eval.py calls it -> the column's title
MEASURES = {"text": "text right", "text, repeat": "- repeat", "text, count": "- count",
            "spoken 1 - WER": "spoken 1 - WER", "in time": "in time", "early": "early"}


def stages(post=BOTH, fine_1=train.FINE_1, fine_2=FADE, wait=0.3, language=250, times=1, depth=(0.25, 0.05),
           rows=(8, 96), documents=False):
    """times: as many steps as the recipe has. depth, documents: see train.Stage. rows: of a batch, and the
    frames of each."""
    batch, frames = rows

    def stage(name, steps, layouts, end=1.5e-3):
        return train.Stage(name, times * steps, batch, 1.5e-3, end, frames, layouts, wait=wait,
                           frame_dropout=0.15, depth=depth, documents=documents)
    begin = train.Stage("language", times * language, 8, 1.5e-3, 1.5e-3, 96, train.LANGUAGE, wait=1.0,
                        documents=documents)
    more = (250 - language) // 2
    return (*([begin] if language else []), stage("post-training", 150, post),
            stage("fine-tuning 1", 250 + more, fine_1), stage("fine-tuning 2", 400 + more, fine_2, 0))


def measure(task, duplex, recogniser, items, measures=MEASURES):
    """What eval.py measures in held-out conversations: {a key of measures: proportion}."""
    shares = Proportions()
    answers(duplex, recogniser, items, 7, shares, "seen")
    return {measure: shares.proportion(f"seen {measure}") for measure in measures}


@dataclass(frozen=True)
class World:
    """The toy world of a question: few user voices, no stories."""
    folder: str = "data/questions"
    kinds: tuple = KINDS
    script: tuple = ()  # more for toy.script.Script
    words: int = 1  # in the answers of held-out dialogues that are asked for, at least
    tests: int = 240  # held-out dialogues in known voices

    def make(self):
        proportions = {kind: KIND_PROPORTIONS[kind] for kind in self.kinds}
        make_toy(self.folder, "en", items=4000, tests=self.tests, sentences=2000, voices=6, seed=2, tts=None,
                 proportions=proportions, **dict(self.script))

    def held_out(self):
        """Its dialogues in known voices."""
        return [d for d in read_manifest(os.path.join(self.folder, "manifest.jsonl"))
                if d["split"] == "seen" and d["kind"] in self.kinds
                and len(d["turns"][1]["text"].split()) >= self.words]


@dataclass(frozen=True)
class Variant:
    stages: tuple
    task: type = train.ModelTask  # what is trained: made of (config, data, device)
    muon: bool = True  # otherwise AdamW for everything, as if it had started from published weights
    prepare: object = None  # called before training, in the variant's own process
    measure: object = measure  # (task, duplex, recogniser, items) -> {measure: value}
    titles: dict = None  # measure -> the column's title; MEASURES if None
