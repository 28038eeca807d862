"""Does another layout do better? The variants that only change what stands in the grid of fine-tuning."""
import dataclasses
import statistics
import time

import torch

from evals.conversations import converse_all, written
from evals.turns import LEAD, Reply, ScenarioMaker, barge_in, score_all, silence, speech, words_of
from files.audio import SAMPLE_RATE, read_audio
from layouts.division import divide, halves
from layouts.prompts import ROLES, make_prompt
from layouts.typed import typed_tokens
from model import CONFIGS, FLM
from questions.paper import LONG_WORLD
from questions.recipe import ANSWER, FADE, MEASURES, Variant, measure, stages
from streams import FRAME_RATE, K, ROWS, Vocab
from train import ModelTask

FADED = {"asr_response_tts": FADE["asr_response_tts"]}


def interrupted(task, duplex, recogniser, items):
    """The scores, and what becomes of as many long answers that are interrupted after two seconds."""
    def run(items):
        (said,) = converse_all(duplex, [[item.audio for item in items]], 7, items[0].scenario)
        return [Reply(speech(wav), written(duplex, text)) for text, wav in said]
    maker = ScenarioMaker(items, None, 7)
    long = [maker.request("control", "chant") for _ in items[:INTERRUPTED]]
    alone = run(long)
    others = [maker.interruption("user interrupt") for _ in long]
    cut = [item for item in map(barge_in, long, alone, others) if item]
    table = score_all([*zip(long, alone), *(zip(cut, run(cut)) if cut else ())]).get("user interrupt", {})
    value = lambda name: table[name]["value"] if name in table else 0.0
    return {**measure(task, duplex, recogniser, items), "eligible": value("eligible") * len(cut) / len(long),
            "silent": value("silent within 1 s"), "answered": value("answered")}


# SHIFT and BREAK against <wait> alone; the users of both interrupt.
INTERRUPTED = 50  # long answers
STATES_WORLD = dataclasses.replace(LONG_WORLD, words=1)  # it has chants, which take long
INTERRUPTIONS = {"measure": interrupted, "titles": {
    "text": "text right", "spoken 1 - WER": "spoken 1 - WER", "in time": "in time", "early": "early",
    "eligible": "interrupted", "silent": "- silent within 1 s", "answered": "- then answered"}}
STATES = {name: Variant(stages(fine_2={**FADED, layout: (1, 1)}, rows=(4, 192)), **INTERRUPTIONS)
          for name, layout in (("<wait>", "states:waits"), ("SHIFT, BREAK", "states:states"))}

# Samples that share a row of training: does it matter that each sees those before it?
DOCUMENTS = {
    "packed": Variant(stages()),
    "apart": Variant(stages(documents=True)),
}



def typing(task, duplex, recogniser, items):
    """The scores, and how many requests to count are answered rightly if they are typed."""
    counts, right = [d for d in items if d["kind"] == "count"][:40], []
    for d in counts:
        request = typed_tokens(d["turns"][0]["text"], duplex.vocab, duplex.tokenizer)
        typed = [duplex.vocab.wait] * 6 + request
        (text,), _ = duplex.converse(silence((len(typed) + 30) / FRAME_RATE)[None], 7, typed=typed)
        right.append(words_of(written(duplex, text[len(typed) - 1:])) == d["turns"][1]["text"].split())
    return {**measure(task, duplex, recogniser, items), "typed": sum(right) / max(1, len(right))}


# Half of the requests typed; and those to count spoken in ASR style alone: are they understood when spoken?
COUNTS = {"typed:typed_counts": (1, 1)}
HALF = {"typed:typed": (1, 1)}
TYPING = {"measure": typing, "titles": {**MEASURES, "typed": "counts, typed"}}
TYPED = {
    "spoken": Variant(stages(fine_1=ANSWER, fine_2=ANSWER), **TYPING),
    "half typed": Variant(stages(fine_1=HALF, fine_2=HALF), **TYPING),
    "counts typed": Variant(stages(fine_1=COUNTS, fine_2=COUNTS), **TYPING),
}


def in_roles(task, duplex, recogniser, items):
    """The scores without a prompt, and how many answers are right in each role."""
    found = measure(task, duplex, recogniser, items)
    items = [d for d in items if len(d["turns"][1]["text"].split()) > 1]  # one word is its own reverse
    for role, order in ROLES.items():
        duplex.prompt = make_prompt(duplex, role)
        turns = [[read_audio(turn["path"]) for turn in d["turns"][:2]] for d in items]
        heard = [torch.cat([silence(LEAD), user, silence(2.5 + 2 * len(model) / SAMPLE_RATE)])
                 for user, model in turns]
        (said,) = converse_all(duplex, [heard], 7, role or "no role")
        right = [words_of(written(duplex, text)) == order(d["turns"][1]["text"].split())
                 for d, (text, _) in zip(items, said)]
        found[role or "as asked"] = sum(right) / max(1, len(right))
    return found


ROLE_TITLES = {"text": "no prompt", **{role: role for role in ["as asked", *ROLES] if role}}
IN_ROLES = {**FADED, "response_tts": (0.3, 0.3), "prompts:prompted": (1, 1)}
ROLES_TOLD = {"measure": in_roles, "titles": ROLE_TITLES}
PROMPTS = {  # three orders of words take longer to learn than one
    "recipe": Variant(stages(times=2, rows=(6, 128)), **ROLES_TOLD),
    "roles": Variant(stages(times=2, rows=(6, 128), fine_2=IN_ROLES), **ROLES_TOLD),
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
