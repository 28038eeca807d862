"""A teacher (Hello-Chat): the model as it was after the language stage, which knows text and nothing else.

Where an answer follows its transcript (<asr> ... <answer> ...), it stands in the grid as in the text alone.
There the student also learns the teacher's distribution (KL divergence); or a share of text is replayed in
the later stages.
"""
import os
import random

import torch
import torch.nn.functional as F

import train
from model import FLM
from questions.recipe import BOTH, FADE, MEASURES, Variant, answers, stages
from streams import TEXT, blank

REPLAY = {"language": (0.2, 0.2)}


def runs(text, v):
    """[(begin, answer, end)] of each <asr> ... <answer> ... that a row's text (T,) holds as a whole."""
    found, text = [], text.tolist()
    for begin in (t for t, token in enumerate(text) if token == v.asr):
        end = next((t for t in range(begin, len(text)) if text[t] == v.wait), None)
        if end is not None and v.answer in text[begin:end]:
            found.append((begin, text.index(v.answer, begin), end))
    return found


class TaughtTask(train.ModelTask):
    """Adds the KL divergence from the teacher, weighted as a monologue token's loss."""
    teacher = None

    def __init__(self, config, folder, device):
        super().__init__(config, folder, device)
        self.folder = folder

    def loss(self, stage, micro, totals):
        total, parts, kept = super().loss(stage, micro, totals)
        places = [(b, *run) for b, row in enumerate(micro[0]) for run in runs(row[TEXT], self.vocab)]
        if self.teacher is None or stage.name == "language":
            return total, parts, kept
        student = self.model.text_logits(self.model.hidden(micro[0][..., :-1].to(self.device)))
        kl = student.new_zeros(())
        for b, begin, answer, end in places:
            alone = blank(end - begin, self.vocab, self.vocab.empty)
            alone[TEXT] = micro[0][b, TEXT, begin:end]
            with torch.no_grad():
                target = self.teacher.text_logits(self.teacher.hidden(torch.from_numpy(alone)[None]))[0]
            pair = student[b, answer:end - 1].log_softmax(-1), target[answer - begin:-1].log_softmax(-1)
            kl = kl + F.kl_div(*pair, reduction="sum", log_target=True)
        kl = (kl / totals[0].clamp(min=1)).to(total.dtype)
        return total + kl, {**parts, "kl": kl.detach()}, kept


def start_teacher(task, out, seed, stages):
    """The recipe's own language stage, with the same seed."""
    before = train.ModelTask(task.config, task.folder, task.device)
    path = train.train(before, stages[:1], os.path.join(out, "teacher"), resume=True, seed=seed)
    task.teacher = FLM.load(path)[0].requires_grad_(False)


def forgetting(task, duplex, recogniser, items):
    """The scores, and how much of the held-out text alone is still right."""
    text = train.Stage("text", 1, 32, 0, 0, 96, {"language": (1, 1)})
    batch = task.batch(text, 0, "seen", random.Random(7))
    with torch.no_grad():
        parts = train.ModelTask.loss(task, text, batch, task.totals(batch))[1]
    return {**answers(task, duplex, recogniser, items), "language": parts["text_accuracy"].item()}


def with_text(layouts):
    return {**layouts, **REPLAY}


HOW = {"measure": forgetting, "titles": {"language": "text alone", **MEASURES}}
TEACHER = {
    "recipe": Variant(stages(), **HOW),
    "teacher": Variant(stages(), task=TaughtTask, **HOW),
    "replay": Variant(stages(with_text(BOTH), with_text(train.FINE_1), with_text(FADE)), **HOW),
}
