"""Does it hear, speak, take turns? The measures of FLM-Audio (section 4) and of FLEXI, on held-out items.

    python eval.py --checkpoint out/tiny                       answers, hearing, turn-taking, 200 items each
    python eval.py --checkpoint out/tiny --smoke               20 items for each scenario of turn-taking
    python eval.py --checkpoint out/tiny --keep out/talks      keep the scenarios' conversations as folders
    python eval.py --checkpoint out/tiny --people FOLDER       also requests in these people's voices
    python eval.py --folder out/talks                          score such folders, of any system
    python eval.py --checkpoint out/tiny --asr 'mycmd {wav}'   another recogniser: a command that prints words
    python eval.py --codec out/codec/checkpoint.pt             the codec alone: distance, intelligibility
    python eval.py --checkpoint out/tiny --hear data/test      on a test set of your own: evals/testsets.py

Requests that are not in the training data are spoken to the model, frame by frame:

    text              the monologue is the right answer, word for word
    spoken 1 - WER    the reply, as a recogniser hears it, against the right answer; as written: against the
                      monologue; exactly: no word is wrong
    in time           the reply begins at most 0.4 s after the user's end; early: before it
    kept on           of an answer of six words or more, the last word written is also the last one heard
    hearing 1 - WER   ASR style: what the model writes of what it hears; CER: the same in letters
    WER, CER          true error rates: (substitutions + deletions + insertions) / length of the references

1 - WER is at least 0 for each item, so that it is a proportion. Turn-taking: evals/turns.py; voices that
nobody trained on: evals/strangers.py. The recogniser's own scores, on the original recordings and after the
codec, are printed as the ceiling.
"""
import argparse
import json
import os
import random
import sys

import torch

from chat import DuplexModel
from evals.codec import ceiling, codec_quality, understood_line
from evals.conversations import (converse_all, read_conversations, save_conversation, save_samples,
                                 share_within, written)
from evals.recogniser import get_recogniser
from evals.scores import Proportions
from evals.strangers import make_strangers
from evals.testsets import measure, transcribe
from evals.turns import (LEAD, Reply, ScenarioMaker, earliest, report_turns, run_scenarios, score_all,
                         silence, speech, words_of)
from files.atomic import replace_when_done
from files.audio import SAMPLE_RATE, read_audio
from files.device import check_device
from files.manifest import read_manifest
from mimi import Mimi

KINDS = ("repeat", "count", "next", "opposite")  # of requests; chants and stories have no single right answer
LISTEN_ON = 2.5  # seconds that a recording goes on after the expected answer


# ------------------------------------------------------------------------------------------------------------
# does it answer, and speak what it writes?


def answers(duplex, recogniser, items, seed, scores, split):
    """Each item's request, spoken to the model after a second of silence. Returns the conversations."""
    items = sorted(items, key=lambda d: len(d["turns"][1]["starts"]))
    users, replies = ([read_audio(d["turns"][i]["path"]) for d in items] for i in (0, 1))
    heard = [torch.cat([silence(LEAD), user, silence(len(reply) / SAMPLE_RATE + LISTEN_ON)])
             for user, reply in zip(users, replies)]
    (conversations,) = converse_all(duplex, [heard], seed, split)
    several = len({d.get("lang") for d in items}) > 1
    for d, user, (text, said) in zip(items, users, conversations):
        right, wrote = d["turns"][1]["text"].split(), words_of(written(duplex, text))
        for label in ("text", f"text, {d['kind']}", *([f"text, {d['lang']}"] if several else ())):
            scores.add(f"{split} {label}", wrote == right)
        spoken = recogniser.hear(said)
        scores.add_errors(f"{split} spoken 1 - WER", spoken, right)
        scores.add_errors(f"{split} spoken 1 - WER, as written", spoken, wrote)
        scores.add(f"{split} spoken exactly", spoken == right)
        if len(right) >= 6:
            scores.add(f"{split} kept on", bool(spoken) and spoken[-1:] == wrote[-1:])
        end = LEAD + len(user) / SAMPLE_RATE
        onset = earliest(begin for begin, _ in speech(said))
        scores.add(f"{split} in time", onset is not None and end <= onset <= end + 0.4)
        scores.add(f"{split} early", onset is not None and onset < end)
    return list(zip(items, heard, conversations))


# ------------------------------------------------------------------------------------------------------------
# does it understand anybody, and when does it speak?


def hearing(duplex, items, scores, split):
    """ASR style: what the model writes of each request that it hears."""
    for d, text in zip(items, transcribe(duplex, [read_audio(d["turns"][0]["path"]) for d in items])):
        right, found = d["turns"][0]["text"].split(), text.split()
        scores.add_errors(f"{split} hearing 1 - WER", found, right)
        scores.add_errors(f"{split} hearing 1 - CER", "".join(found), "".join(right))


def understands(duplex, items, seed, scores, name, measures):
    """items: [(audio (N,) heard, the right words of the answer), ...]. measures: the names of exactly right
    answers and of right words."""
    (conversations,) = converse_all(duplex, [[heard for heard, _ in items]], seed, name)
    for (_, right), (text, _) in zip(items, conversations):
        wrote = words_of(written(duplex, text))
        scores.add(measures[0], wrote == right)
        scores.add_errors(measures[1], wrote, right)


def turn_taking(duplex, dialogues, tts, seed, n, keep, voices=None):
    """n items of each of FLEXI's scenarios: {scenario: {measure: {"value", "n", ...}}}"""
    def reply(item, text, said):
        out = Reply(speech(said), written(duplex, text))
        if keep:
            save_conversation(keep, item, said, out.written)
        return out

    def run(groups, description):
        said = converse_all(duplex, [[item.audio for item in items] for items in groups], seed, description)
        return [[reply(item, *x) for item, x in zip(items, out)] for out, items in zip(said, groups)]
    return score_all(run_scenarios(run, ScenarioMaker(dialogues, tts, seed, voices), n))


# ------------------------------------------------------------------------------------------------------------
# does it hear, speak and take turns?


def evaluate(duplex, args):
    """All parts, or the one that --only names."""
    only = lambda part: args.only in (None, part)
    scores, conversations, groups, table = Proportions(), [], {}, {}
    n = 20 if args.smoke else args.items
    if args.minutes:
        share = share_within(args.minutes, only("answers") * args.items, only("turns") * n, duplex)
        args.items, n = (max(1, round(share * items)) for items in (args.items, n))
    if only("answers"):
        conversations = evaluate_answers(duplex, args, scores)
    if only("strangers"):
        groups = make_strangers(args.people, args.speakers, args.tts, args.seed, n)
        for name, items in groups.items():
            understands(duplex, items, args.seed, scores, name, (f"{name} text", f"{name} 1 - WER"))
    if only("turns"):
        voices = args.voices and args.voices.split(",")
        table = turn_taking(duplex, read_dialogues(args), args.tts, args.seed, n, args.keep, voices)
    folder = os.path.join(args.checkpoint, "samples")
    if conversations:
        save_samples(duplex, conversations, folder)
    report(scores, groups, args.seed)
    if table:
        report_turns(table, args.checkpoint)
    path = os.path.join(args.checkpoint, f"eval-{args.only}.json" if args.only else "eval.json")
    results = {"seed": args.seed, "shares": {name: [scores.hits[name], scores.n[name]] for name in scores.n},
               "error_rates": {name: scores.error_rate(name) for name in scores.errors}, "turns": table}
    with replace_when_done(path) as temporary, open(temporary, "w") as f:
        json.dump(results, f, indent=1)
    written_too = [f"{folder}/"] * bool(conversations) + [f"{args.keep}/"] * bool(args.keep)
    print(f"\nWrote {' and '.join([path, *written_too])}")


def read_dialogues(args):
    return list(read_manifest(os.path.join(args.data, "manifest.jsonl")))


def make_recogniser(args):
    return get_recogniser(args.asr, args.data, "out/recogniser", args.asr_minutes, args.device)


def evaluate_answers(duplex, args, scores):
    """Returns the conversations."""
    recogniser = make_recogniser(args)
    dialogues, rng, conversations = read_dialogues(args), random.Random(args.seed), []
    for split in ("seen", "new"):
        items = [d for d in dialogues if d["split"] == split and d["kind"] in KINDS]
        items = rng.sample(items, min(args.items, len(items)))
        conversations += answers(duplex, recogniser, items, args.seed, scores, split)
        hearing(duplex, items, scores, split)
        ceiling(duplex.codec, recogniser, items[:50], scores, split)
    return conversations


MEASURES = ("spoken 1 - WER", "spoken exactly", "spoken 1 - WER, as written", "in time", "early", "kept on",
            "hearing 1 - WER", "hearing 1 - CER")


def report(scores, groups, seed):
    print(f"\nHeld out, seed {seed}, 95% intervals in brackets")
    for split, who in (("seen", "voices heard in training"), ("new", "new voices")):
        if f"{split} text" not in scores.n:
            continue
        print(f"\n  {who}")
        kinds = sorted(name for name in scores.n if name.startswith(f"{split} text, "))
        for name in (f"{split} text", *kinds, *(f"{split} {measure}" for measure in MEASURES)):
            print(f"    {name.removeprefix(split)[1:]:28} {scores.line(name)}")
        for role in ("user", "model"):
            line = understood_line(scores, [f"{split} {role} {version}" for version in ("original", "codec")])
            print(f"    the recogniser's ceiling, 1 - WER / exactly, {role}'s speech: {line}")
    if groups:
        print("\n  voices that nobody trained on: text exactly right, 1 - WER")
    for name in groups:
        print(f"    {name:20} {scores.line(f'{name} text'):32} {scores.line(f'{name} 1 - WER')}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--checkpoint", help="folder that train.py wrote, or an FLM-Audio release (default: out/tiny)")
    add("--codec", help="measure this codec alone; with --checkpoint: another than the model's")
    one = parser.add_mutually_exclusive_group().add_argument  # a test set of your own
    one("--folder", help="score the conversations of this folder: ours (--keep) or Full-Duplex-Bench's; "
                         "with --checkpoint: hold them first")
    one("--hear", help="ASR style: folder with the manifest of recordings to transcribe")
    add("--split", help="of --hear: recordings of this split (default: all but those for training)")
    one("--say", help="TTS style: folder with the manifest of texts to speak")
    add("--post-trained", action="store_true", help="for --say: of a model without fine-tuning")
    one("--ask", help='spoken questions: a .jsonl of {"audio" or "text": ..., "answers": [...]}')
    add("--judge", help='of answers: a command that reads {"question", "answers", "reply"}, prints a number')
    add("--data", default="data/toy", help="folder with the manifest of the held-out items")
    add("--items", type=int, help="of each kind (default: 200; all of a test set)")
    add("--only", choices=("answers", "strangers", "turns"), help="measure only this part")
    add("--smoke", action="store_true", help="20 items a scenario")
    add("--minutes", type=float, help="fewer items, if this machine would take longer (strangers are not "
                                      "counted, nor training a recogniser for words that weights/ lacks)")
    add("--keep", help="write transcripts and conversations into this folder")
    add("--seed", type=int, default=7)
    add("--tts", help="another synthesiser for the scenarios, as for prepare.py")
    add("--voices", help="voices of the scenarios, such as flite:awb,flite:slt (default: those of the data)")
    add("--people", help="folder with recordings of single words, as for prepare.py words")
    add("--speakers", help="those of --people who were never trained on (default: all)")
    add("--asr", help="another recogniser: a command with {wav} that prints the words")
    add("--asr-minutes", type=float, help="train a recogniser so long, instead of the one in weights/")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    args = parser.parse_args()
    try:
        device = check_device(args.device)
        if args.folder and not args.checkpoint:
            name = os.path.basename(os.path.normpath(args.folder))
            return report_turns(score_all(read_conversations(args.folder)), name)
        only_codec, args.checkpoint = args.codec and not args.checkpoint, args.checkpoint or "out/tiny"
        load = lambda: DuplexModel.load(args.checkpoint, device, codec=args.codec)
        if args.folder or args.hear or args.say or args.ask:
            return measure(load(), Proportions(), lambda: make_recogniser(args), args)
        args.items = 200 if args.items is None else args.items
        if only_codec:
            codec = Mimi.load(args.codec, device)
            return codec_quality(codec, make_recogniser(args), read_dialogues(args), args.items, args.seed)
        evaluate(load(), args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
