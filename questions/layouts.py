"""Does another layout do better? The variants that only change what stands in the grid of fine-tuning."""
import statistics
import time

import torch

from evals.conversations import converse_all, written
from evals.turns import LEAD, silence, words_of
from files.audio import SAMPLE_RATE, read_audio
from layouts.division import divide, halves
from layouts.prompts import ROLES, make_prompt
from model import CONFIGS, FLM
from questions.recipe import ANSWER, FADE, Variant, measure, stages
from streams import FRAME_RATE, K, ROWS, Vocab
from train import ModelTask

FADED = {"asr_response_tts": FADE["asr_response_tts"]}

# SHIFT and BREAK against <wait> alone; the users of both interrupt.
STATES = {
    "<wait>": Variant(stages(fine_2={**FADED, "free_response_tts": (1, 1)})),
    "SHIFT, BREAK": Variant(stages(fine_2={**FADED, "states:states": (1, 1)})),
}

# Samples that share a row of training: does it matter that each sees those before it?
DOCUMENTS = {
    "packed": Variant(stages()),
    "apart": Variant(stages(documents=True)),
}

# Half of the requests typed; and those to count spoken in ASR style alone: are they understood when spoken?
COUNTS = {"typed:typed_counts": (1, 1)}
TYPED = {
    "spoken": Variant(stages(fine_1=ANSWER, fine_2=ANSWER)),
    "half typed": Variant(stages(fine_1={"typed:typed": (1, 1)}, fine_2={"typed:typed": (1, 1)})),
    "counts typed": Variant(stages(fine_1=COUNTS, fine_2=COUNTS)),
}


def in_roles(task, duplex, recogniser, items):
    """The scores without a prompt, and how many answers are right in each role."""
    found = measure(task, duplex, recogniser, items)
    for role, order in ROLES.items():
        duplex.prompt = make_prompt(duplex, role)
        turns = [[read_audio(turn["path"]) for turn in d["turns"][:2]] for d in items]
        heard = [torch.cat([silence(LEAD), user, silence(2.5 + 2 * len(model) / SAMPLE_RATE)])
                 for user, model in turns]
        said = converse_all(duplex, heard, 7, role or "no role")
        right = [words_of(written(duplex, text)) == order(d["turns"][1]["text"].split())
                 for d, (text, _) in zip(items, said)]
        found[role or "as asked"] = sum(right) / max(1, len(right))
    return found


ROLE_TITLES = {"text": "no prompt", **{role: role for role in ["as asked", *ROLES] if role}}
IN_ROLES = {**FADED, "response_tts": (0.3, 0.3), "prompts:prompted": (1, 1)}
PROMPTS = {  # three orders of words take longer to learn than one
    "recipe": Variant(stages(times=3), measure=in_roles, titles=ROLE_TITLES),
    "roles": Variant(stages(times=3, fine_2=IN_ROLES), measure=in_roles, titles=ROLE_TITLES),
}


class DividedTask(ModelTask):
    """Trains on two columns for each frame."""
    def __init__(self, *args):
        super().__init__(*args)
        self.batch = lambda *args: divide(*self.data.batch(*args), self.vocab)


class DividedFLM(FLM):
    """Reads each column in two steps."""
    vocab = None

    def step(self, column, cache, sample_text, sample_code):
        said, heard = halves(column, self.vocab)
        self.hidden_step(said, cache)
        return super().step(heard, cache, sample_text, sample_code)


def divided(task, duplex, recogniser, items):
    duplex.model.__class__, duplex.model.vocab = DividedFLM, duplex.vocab
    return measure(task, duplex, recogniser, items)


@torch.no_grad()
def cost_of_division(seconds=10):
    """What a frame of conversation costs in each, without the codec: medians over `seconds`, in turn."""
    column, times, runs = torch.zeros(1, ROWS, dtype=torch.long), {}, {}
    for name, kind in (("native", FLM), ("time-division", DividedFLM)):
        model = kind(CONFIGS["tiny"]).eval()
        model.vocab = Vocab.own(CONFIGS["tiny"].vocab_size, CONFIGS["tiny"].empty, ((0,) * K,))
        runs[name] = model, model.init_cache(1)
    for _ in range(round(seconds * FRAME_RATE)):
        for name, (model, cache) in runs.items():
            begun = time.perf_counter()
            model.step(column, cache, lambda x: x.argmax(-1), lambda x, k: x.argmax(-1))
            times.setdefault(name, []).append(1000 * (time.perf_counter() - begun))
    native, divided = map(statistics.median, times.values())
    print(f"\nA frame of conversation in `tiny`: native {native:.1f} ms, time-division {divided:.1f} ms "
          f"({divided / native:.2f} times)")


# Two steps of the temporal transformer a frame instead of one.
DIVISION = {
    "native": Variant(stages()),
    "time-division": Variant(stages(), task=DividedTask, measure=divided),
}
