"""Typed turns (after Hello-Chat's interleaving): the user speaks, or types into the text row.

    text             ·  · (<asr>) (how) (late) (<answer>) it is noon  ·  ·

What is typed is read but not learned from. It stands between <asr> and <answer>, where fine-tuning 1 has the
model's own transcript, so that a model of the usual stages has an idea of it too.
"""
import dataclasses

from files.tokenizer import encode_words
from layouts.prompts import tokens_of
from streams import TEXT_LEAD, dialogue, given


def typed_tokens(text, v, tokenizer):
    """What Session.type takes: the tokens of a text, between <asr> and <answer>."""
    return [v.asr, *tokens_of(text, tokenizer), v.answer]


def typed(turns, gaps, data, rng, types=lambda user, rng: rng.random() < 0.5):
    """Response-TTS; the user types the turns for which types(user, rng) is true (default: half of them)."""
    v = data.vocab

    def monologue(user, model):
        before = [] if user.speech else [v.asr, *user.tokens, v.answer]
        return [*given(before), *model.tokens], len(before) + TEXT_LEAD
    quiet = lambda user: dataclasses.replace(user, codes=user.codes[:0], speech=0, interjections=())
    return dialogue([(quiet(u) if types(u, rng) else u, m) for u, m in turns], gaps, v, monologue)


def typed_counts(turns, gaps, data, rng):
    """Requests to count are always typed, others never."""
    (count, *_), = encode_words("count", data.tokenizer)
    return typed(turns, gaps, data, rng, lambda user, rng: user.tokens[:1] == [count])
