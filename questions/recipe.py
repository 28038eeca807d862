"""The recipe that every variant changes one thing of, and how it is measured."""
from dataclasses import dataclass

import eval as evaluation
import train

BOTH = {"tts": (1, 1), "asr": (2, 2)}
FADE = {"asr_response_tts": (0.7, -0.7), "response_tts": (1, 1)}
ANSWER = {"response_tts": (1, 1)}
# what eval.py calls it -> the column's title
MEASURES = {"text": "text right", "text, repeat": "- repeat", "text, count": "- count",
            "spoken 1 - WER": "spoken 1 - WER", "in time": "in time", "early": "early"}


def stages(post=BOTH, fine_1=train.FINE_1, fine_2=FADE, wait=0.3, language=250, times=1, depth=(0.25, 0.05)):
    """times: as many steps as the recipe has. depth: see train.Stage."""
    def stage(name, steps, layouts, end=1.5e-3):
        return train.Stage(name, times * steps, 8, 1.5e-3, end, 96, layouts, wait=wait, frame_dropout=0.15,
                           depth=depth)
    begin = train.Stage("language", times * language, 8, 1.5e-3, 1.5e-3, 96, train.LANGUAGE, wait=1.0)
    more = (250 - language) // 2
    return (*([begin] if language else []), stage("post-training", 150, post),
            stage("fine-tuning 1", 250 + more, fine_1), stage("fine-tuning 2", 400 + more, fine_2, 0))


def answers(task, duplex, recogniser, items):
    """What eval.py measures in held-out conversations: {a key of MEASURES: proportion}."""
    shares = evaluation.Proportions()
    evaluation.answers(duplex, recogniser, items, 7, shares, "seen")
    return {measure: shares.proportion(f"seen {measure}") for measure in MEASURES}


@dataclass(frozen=True)
class Variant:
    stages: tuple
    task: type = train.ModelTask  # what is trained: made of (config, data, device)
    muon: bool = True  # otherwise AdamW for everything, as if it had started from published weights
    prepare: object = None  # called before training, in the variant's own process
    measure: object = answers  # (task, duplex, recogniser, items) -> {measure: value}
    titles: dict = None  # measure -> the column's title; MEASURES if None
