"""A teacher (after Hello-Chat): the model as it was after the language stage, which knows text alone.

Where an answer follows its transcript (<asr> ... <answer> ..., in fine-tuning 1), it stands in the grid as in
the text alone. There the student also learns what the teacher makes of this turn (KL divergence); or a share
of text is replayed in the later stages. (Hello-Chat's student has no transcript in view, only the audio.)

    python -m questions.teacher --config 0.5b --init Qwen2.5-0.5B-Instruct --data data/mine/encoded

is train.py with what --init names as the teacher, frozen: a run of ours, or Qwen2.5, to whom a transcript
is a user's turn of a chat. The data must be encoded with its tokeniser. It trains in one process, and --plan
does not count the teacher.
"""
import copy
import os
import random

import torch
import torch.nn.functional as F

import train
from files.tokenizer import load_tokenizer
from model import FLM
from published.release import QWEN, read_config
from questions.recipe import BOTH, FADE, MEASURES, Variant, measure, stages
from streams import TEXT, blank
from training import parallel
from training.documents import attention

IM = "<|im_start|>", "<|im_end|>"
# Qwen2.5's chats, in place of <asr> and <answer>
CHAT = ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
REPLAY = {"language": (0.2, 0.2)}
TEXT_ALONE = train.Stage("text", 1, 64, 0, 0, 96, {"language": (1, 1)})


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
    teacher = chats = None

    def __init__(self, config, folder, device, init=None, *more):
        super().__init__(config, folder, device, init, *more)
        self.folder = folder

    def teach(self, teacher, chats=False):
        """Learn from this model from now on. chats: it is a language model that knows nothing of grids."""
        self.teacher = teacher.eval().requires_grad_(False)
        if chats:
            self.chats = load_tokenizer(self.files["tokenizer.json"])
            if not set(IM) <= self.chats.special_tokens_set:
                raise ValueError("the data's tokeniser has no <|im_start|> and <|im_end|>, so that it cannot "
                                 "chat; encode with --tokenizer and an Instruct model's folder")
            for table in (*teacher.speak, *teacher.listen):
                table.weight.zero_()

    @torch.no_grad()
    def taught(self, heard, said):
        """The teacher's log-probabilities (n, V) where it answers `heard` with the n tokens of `said`."""
        v, heard = self.vocab, heard.tolist()
        if self.chats:  # it begins without a space
            heard = self.chats.decode(heard).strip().join(CHAT)
            before = self.chats.encode(heard, allowed_special=set(IM))
        else:
            before = [v.asr, *heard, v.answer]
        alone = blank(len(before) + len(said), v, v.empty)
        alone[TEXT] = [*before, *said.tolist()]
        h = self.teacher.hidden(torch.from_numpy(alone)[None].to(self.device))[0, len(before) - 1:-1]
        return self.teacher.text_logits(h).float().log_softmax(-1)

    def loss(self, stage, micro, totals):
        total, parts, kept = super().loss(stage, micro, totals)
        places = [(b, *run) for b, row in enumerate(micro[0]) for run in runs(row[TEXT], self.vocab)]
        if self.teacher is None or stage.name == "language" or not places:
            return total, parts, kept
        grid, _, _, *documents = (x.to(self.device) for x in micro)
        mask = attention(documents[0][:, :-1]) if documents else None
        h = self.model.hidden(grid[..., :-1], mask=mask)
        kl = h.new_zeros(())
        for b, begin, answer, end in places:
            text, skip = micro[0][b, TEXT], 1 if self.chats else 0  # ours begins with a space, a chat's not
            target = self.taught(text[begin + 1:answer], text[answer + 1:end])[skip:]
            found = self.model.text_logits(h[b, answer + skip:end - 1]).float().log_softmax(-1)
            kl = kl + F.kl_div(found, target, reduction="sum", log_target=True)
        kl = (kl / totals[0].clamp(min=1)).to(total.dtype)
        return total + kl, {**parts, "kl": kl.detach()}, kept


def start_teacher(task, out, seed, stages):
    """The recipe's own language stage, with the same seed."""
    before = train.ModelTask(task.config, task.folder, task.device, None, seed)
    path = train.train(before, stages[:1], os.path.join(out, "teacher"), resume=True, seed=seed)
    task.teach(FLM.load(path)[0])


@torch.no_grad()
def known_text(task, model):
    """The share of the tokens of held-out answers that a model knows from the text before them."""
    v, right = task.vocab, []
    grid = task.batch(TEXT_ALONE, 0, "seen", random.Random(7))[0]
    chosen = model.text_logits(model.hidden(grid))[..., :-1, :].argmax(-1)
    for row, found in zip(grid[:, TEXT], chosen):
        for _, answer, end in runs(row, v):
            right += (found[answer:end - 1] == row[answer + 1:end]).tolist()
    return sum(right) / len(right)


def forgetting(task, duplex, recogniser, items):
    """The scores, and how much of the held-out text alone is still right."""
    return {**measure(task, duplex, recogniser, items), "language": known_text(task, duplex.model)}


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
        if parallel.is_distributed():
            raise ValueError("a teacher is for a single process, without torchrun")
        ours = init and os.path.exists(os.path.join(init, "checkpoint.pt"))
        if not init or not ours and read_config(init, ("FLMAudio", *QWEN))["model_type"] == "FLMAudio":
            raise ValueError("a teacher needs --init: a run of ours, or the folder of Qwen2.5's weights")
        super().__init__(config, folder, device, init, *more)
        self.teach(copy.deepcopy(self.model), chats=not ours)


def main():
    train.main(FromStart, __doc__)


if __name__ == "__main__":
    main()
