"""A teacher (Hello-Chat): the model as it was after the language stage, which knows text and nothing else.

Where an answer follows its transcript (<asr> ... <answer> ...), it stands in the grid as in the text alone.
There the student also learns the teacher's distribution (KL divergence); or a share of text is replayed in
the later stages.

    python -m questions.teacher --config 0.5b --init Qwen2.5-0.5B-Instruct --data data/mine/encoded

is train.py with what --init names as the teacher, frozen: a run of ours, or Qwen2.5, to whom a transcript
is a user's turn of a chat. The data must be encoded with its tokeniser. It trains in one process.
"""
import copy
import os
import random

import torch
import torch.nn.functional as F

import train
from files.tokenizer import load_tokenizer
from model import FLM
from questions.recipe import BOTH, FADE, MEASURES, Variant, measure, stages
from streams import TEXT, blank
from training import parallel

IM = "<|im_start|>", "<|im_end|>"
CHAT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"  # in place of <asr> and <answer>
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

    def __init__(self, config, folder, device, init=None, *more):
        super().__init__(config, folder, device, init, *more)
        self.folder, self.marks = folder, [[self.vocab.asr], [self.vocab.answer]]
        if init:
            if parallel.is_distributed():
                raise ValueError("a teacher is for a single process, without torchrun")
            self.teach(copy.deepcopy(self.model), os.path.exists(os.path.join(init, "checkpoint.pt")))

    def teach(self, teacher, ours=True):
        """Learn from this model from now on. ours: otherwise it is a language model that knows chats."""
        self.teacher = teacher.eval().requires_grad_(False)
        if not ours:
            tokenizer = load_tokenizer(self.files["tokenizer.json"])
            if not set(IM) <= tokenizer.special_tokens_set:
                raise ValueError("the data's tokeniser has no <|im_start|> and <|im_end|>, so that it cannot "
                                 "chat; encode with --tokenizer and an Instruct model's folder")
            self.marks = [tokenizer.encode(turn, allowed_special=set(IM)) for turn in CHAT]
            for table in (*teacher.speak, *teacher.listen):
                table.weight.zero_()

    @torch.no_grad()
    def taught(self, heard, said):
        """The teacher's log-probabilities (n, V) where it answers `heard` with the n tokens of `said`."""
        before = torch.cat([self.tokens_of(0), heard, self.tokens_of(1)])
        alone = blank(len(before) + len(said), self.vocab, self.vocab.empty)
        alone[TEXT] = torch.cat([before, said])
        h = self.teacher.hidden(torch.from_numpy(alone)[None].to(self.device))[0, len(before) - 1:-1]
        return self.teacher.text_logits(h).float().log_softmax(-1)

    def tokens_of(self, mark):
        return torch.tensor(self.marks[mark])

    def loss(self, stage, micro, totals):
        total, parts, kept = super().loss(stage, micro, totals)
        places = [(b, *run) for b, row in enumerate(micro[0]) for run in runs(row[TEXT], self.vocab)]
        if self.teacher is None or stage.name == "language":
            return total, parts, kept
        student = self.model.text_logits(self.model.hidden(micro[0][..., :-1].to(self.device)))
        kl = student.new_zeros(())
        for b, begin, answer, end in places:
            text = micro[0][b, TEXT]
            target = self.taught(text[begin + 1:answer], text[answer + 1:end])
            found = student[b, answer:end - 1].float().log_softmax(-1)
            kl = kl + F.kl_div(found, target, reduction="sum", log_target=True)
        kl = (kl / totals[0].clamp(min=1)).to(total.dtype)
        return total + kl, {**parts, "kl": kl.detach()}, kept


def start_teacher(task, out, seed, stages):
    """The recipe's own language stage, with the same seed."""
    before = train.ModelTask(task.config, task.folder, task.device, None, seed)
    path = train.train(before, stages[:1], os.path.join(out, "teacher"), resume=True, seed=seed)
    task.teach(FLM.load(path)[0])


def forgetting(task, duplex, recogniser, items):
    """The scores, and how much of the held-out text alone is still right."""
    text = train.Stage("text", 1, 32, 0, 0, 96, {"language": (1, 1)})
    batch = task.batch(text, 0, "seen", random.Random(7))
    with torch.no_grad():
        parts = train.ModelTask.loss(task, text, batch, task.totals(batch))[1]
    return {**measure(task, duplex, recogniser, items), "language": parts["text_accuracy"].item()}


def with_text(layouts):
    return {**layouts, **REPLAY}


HOW = {"measure": forgetting, "titles": {"language": "text alone", **MEASURES}}
TEACHER = {
    "recipe": Variant(stages(), **HOW),
    "teacher": Variant(stages(), task=TaughtTask, **HOW),
    "replay": Variant(stages(with_text(BOTH), with_text(train.FINE_1), with_text(FADE)), **HOW),
}


class FromStart(TaughtTask):
    """The teacher is the model that training starts from."""
    def __init__(self, config, folder, device, init=None, *more):
        if not init:
            raise ValueError("a teacher needs --init: a run of ours, or the folder of Qwen2.5's weights")
        super().__init__(config, folder, device, init, *more)


def main():
    train.main(FromStart, __doc__)


if __name__ == "__main__":
    main()
