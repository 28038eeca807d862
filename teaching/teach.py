"""Teach a model your voice: read some forty prompts aloud, then it is fine-tuned for five minutes on this
machine. Nothing leaves the machine, and the model that was there stays as it was.

    python -m teaching.teach --checkpoint out/talk --mic                   record in the terminal, then learn
    python -m teaching.teach --checkpoint out/talk --recordings my-voice   learn from recordings
    python -m teaching.teach --recordings my-voice --show                  only write the prompts to be read

    recordings, and others joined from their words, augmented --.
                                                                +-- the model's own codec --> out/taught
    a small toy world ------------------------------------------'   fine-tuning 2 of train.py

Half of what it learns from is what it knew: it would forget it otherwise. Every eighth recording is held out,
to say how well the voice was understood before and after.
"""
import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile

import numpy as np
import torch
from tqdm import tqdm

import prepare
from chat import DuplexModel
from corpora.words import People
from eval import KINDS, understands
from evals.scores import Proportions
from evals.turns import LEAD, silence
from files.atomic import check_folder, move_folder
from files.audio import SAMPLE_RATE, read_audio, write_audio
from files.checkpoint import from_fields, load_checkpoint
from files.device import check_device
from files.manifest import SPOKEN, read_manifest
from live.recordings import KINDS as KINDS_READ
from live.recordings import find_recordings, make_prompts, read_recordings, write_prompts
from model import FLMConfig
from toy.script import Script, make_toy
from teaching.cut import VOICES, cut
from toy.voices import get_synthesiser
from toy.world import LANGUAGES
from train import TOY, ModelTask, Stage, train
from training.run import Stopped, lock

WORK = r"lock|data|model"  # the names in the folder that it works in
OLD = {"items": 900, "sentences": 500, "tests": 40, "voices": 600}  # of what it knew
HELD_OUT = 8  # one recording in so many
AGAIN = 10  # how often each recording occurs, beside what is joined from its words
SHORTEST = 0.08  # seconds of a word that is cut out
LISTEN_ON = 6.0  # seconds after a request


def stages_of(frames):
    layouts = {"asr": (0.4, 0.2), "response_tts": (0.3, 0.3), "free_response_tts": (0.5, 0.5)}
    return [Stage("teaching", 1000, 8, 5e-4, 0, frames, layouts, **TOY)]


class Recordings(People):
    """A synthesiser whose voice is a person: what was recorded {(voice, text): samples}, as it is; all else
    is joined from words."""

    def __init__(self, said, words, synthesiser):
        super().__init__({"user": words}, VOICES, synthesiser, (0.0, 0.1))
        self.said = said

    def speak(self, text, voice, style):
        x = self.said.get((voice, text))
        return super().speak(text, voice, style) if x is None else x


def cut_words(recordings, folder, synthesiser):
    """The words of recordings as audio files in a folder: {word: [file, ...]}."""
    words = {}
    for i, (prompt, x) in enumerate(tqdm(recordings, "cut at words", unit="recording")):
        asked = prompt.text.split()
        for j, (word, part) in enumerate(zip(asked, cut(x, asked, synthesiser))):
            if len(part) > SHORTEST * SAMPLE_RATE and np.abs(part).max() > 1e-3:
                path = os.path.join(folder, f"{i}-{j}.wav")
                write_audio(path, part, flush=False)
                words.setdefault(word, []).append(path)
    return words


def make_lesson(recordings, out, synthesiser, seed, dialogues, sentences):
    """The recordings, each a few times, and as many other requests and sentences, joined from their words."""
    out, work = check_folder(out, SPOKEN)
    held_out = recordings[HELD_OUT - 1::HELD_OUT]
    train = [recording for i, recording in enumerate(recordings) if i % HELD_OUT != HELD_OUT - 1]
    said = {("user", prompt.text): x for prompt, x in train}
    said |= {("user, held out", prompt.text): x for prompt, x in held_out}
    with tempfile.TemporaryDirectory() as folder:
        words = cut_words(train, folder, synthesiser)
        known = sorted(words.keys() & set(LANGUAGES["en"].words))
        voices = {"train": [["user"]], "seen": [["user"]]}
        script = Script({"en": voices}, seed, {"user": known}, KINDS_READ)
        for prompt, _ in train:
            script.add("en", prompt.kind, "train", "user", [prompt.text], prompt.answer)
        script.lines *= AGAIN
        for prompt, _ in held_out:
            script.add("en", prompt.kind, "seen", "user, held out", [prompt.text], prompt.answer)
        script.fill("en", sentences, dialogues, {})
        script.speak(out, work, Recordings(said, words, synthesiser), synthesiser)


def encode(data, checkpoint, copies, device):
    codec = os.path.join(checkpoint, "codec.pt")
    prepare.encode(data, codec, checkpoint, None, copies, 0.75, False, 0, device)


def understood(checkpoint, requests, seed, device):
    """How well a model answers requests {who: [(audio (N,), answer), ...]}: {who: Proportions of those
    answered "exactly" and of the "words" that are right}."""
    duplex, out = DuplexModel.load(checkpoint, device), {}
    for who, some in requests.items():
        items = [(torch.cat([silence(LEAD), x, silence(LISTEN_ON)]), answer.split()) for x, answer in some]
        out[who] = Proportions()
        understands(duplex, items, seed, out[who], who, ("exactly", "words"))
    return out


@contextlib.contextmanager
def work_in(folder):
    """A folder for one process at a time (ValueError for a second one), that is removed at the end, whatever
    happens."""
    os.makedirs(folder, exist_ok=True)
    with lock(folder):
        try:
            for name in ("data", "model"):  # of a process that was killed
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def teach(checkpoint, folder, out, minutes=5.0, steps=None, old=OLD, seed=1, device="cpu"):
    """Fine-tune the model of a folder on the recordings of another; write it to the folder `out`. Returns
    {"your voice" and "others": (understood() before, after)}."""
    out, work = check_folder(out, WORK)
    config = load_checkpoint(os.path.join(checkpoint, "checkpoint.pt"), "flm", mmap=True)["config"]
    config, synthesiser = from_fields(FLMConfig, config, checkpoint), get_synthesiser(None)
    recordings, bad = read_recordings(folder, make_prompts())
    for path, problem in bad:
        print(f"{path} is left out: {problem}")
    with work_in(work):
        data, model = os.path.join(work, "data"), os.path.join(work, "model")
        print("What it knew, spoken and encoded again:", flush=True)
        make_toy(f"{data}/old", "en", **old, seed=seed, tts=None)
        encode(f"{data}/old", checkpoint, 2, device)
        print("Your recordings:", flush=True)
        make_lesson(recordings, f"{data}/new", synthesiser, seed, old["items"] // 2, old["sentences"] // 2)
        encode(f"{data}/new", checkpoint, 8, device)
        requests = {"your voice": [], "others": []}
        for prompt, x in recordings[HELD_OUT - 1::HELD_OUT]:
            requests["your voice"].append((torch.from_numpy(x), prompt.answer))
        for d in read_manifest(f"{data}/old/manifest.jsonl"):
            if d["split"] == "new" and d["kind"] in KINDS:
                requests["others"].append((read_audio(d["turns"][0]["path"]), d["turns"][1]["text"]))
        before = understood(checkpoint, requests, seed, device)
        task = ModelTask(config, f"{data}/old/encoded,{data}/new/encoded", device, checkpoint, seed)
        stages = [dataclasses.replace(s, steps=steps or s.steps) for s in stages_of(min(128, config.context))]
        train(task, stages, model, None if steps else minutes, seed=seed)
        after = understood(model, requests, seed, device)
        move_folder(model, out)
    for who in requests:
        for measure in ("exactly", "words"):
            print(f"{who}, held-out requests, {measure}: before {before[who].line(measure)}")
            print(f"{who}, held-out requests, {measure}: after  {after[who].line(measure)}")
    print(summary(before["your voice"], after["your voice"]))
    print(f"Wrote {out}; next: python chat.py --checkpoint {out} --web")
    return {who: (before[who], after[who]) for who in requests}


def summary(before, after):
    """One sentence, which the page shows too."""
    old, new, n = before.hits, after.hits, before.n
    return (f"Of {n['exactly']} held-out requests in your voice, {old['exactly']} were answered exactly "
            f"before and {new['exactly']} after; of {n['words']} words, {old['words']} were right before and "
            f"{new['words']} after.")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--checkpoint", default="out/talk", help="folder of the model to be taught")
    add("--recordings", default="out/voice", help="folder with 01.wav, 02.wav, ...")
    add("--mic", action="store_true", help="record the prompts that are missing in it first")
    add("--show", action="store_true", help="only write the prompts into it")
    add("--out", default="out/taught", help="folder to write")
    add("--minutes", type=float, default=5.0, help="of fine-tuning")
    add("--steps", type=int, help="instead of --minutes")
    add("--seed", type=int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    try:
        prompts = make_prompts()
        if args.show or args.mic:
            os.makedirs(args.recordings, exist_ok=True)
            write_prompts(args.recordings, prompts)
        if args.show:
            n = len(find_recordings(args.recordings))
            print(f"Wrote {args.recordings}/prompts.txt ({len(prompts)} prompts, {n} recorded so far); "
                  f"record them as {args.recordings}/01.wav, 02.wav, ...")
            return
        check_device(args.device)
        check_folder(args.out, WORK)
        if args.mic:
            from live.microphone import record_prompts  # needs an extra
            record_prompts(args.recordings, prompts)
        teach(args.checkpoint, args.recordings, args.out, args.minutes, args.steps, seed=args.seed,
              device=args.device)
    except Stopped:
        sys.exit(f"stopped; the recordings are in {args.recordings}, and the model is as it was")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
