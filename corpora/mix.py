"""Dialogues -> conversations with interruptions, noise, gain and leakage (FLM-Audio, section 3.2).

    python prepare.py mix --data data/toy --out data/mixed
"""
import glob
import os
import random
import shutil

import torch
import torch.nn.functional as F
from tqdm import tqdm

from files.atomic import check_folder
from files.audio import SAMPLE_RATE, read_audio, write_audio
from files.augment import Version, decibels, make_noise
from files.manifest import SPOKEN, clip_key, read_manifest, write_manifest
from mimi import FRAME
from streams import REACTION, TEXT_LEAD


def change_gain(x, rng):
    """Louder or softer by -24 to +20 dB, but never below -40 dB."""
    return x * 10 ** (max(rng.uniform(-24, 20), -40 - decibels(x)) / 20)


def leak(listen, speak, rng):
    """The loudspeaker's audio (N,) comes back into the microphone's: weaker (gain 0 to 0.2) and later (0.1 to
    0.5 s)."""
    version = Version.echo(rng)
    echo = version.record(F.pad(speak, (version.late, 0)))[:len(listen)]
    return listen + F.pad(echo, (0, len(listen) - len(echo)))


def hesitate(x, rng):
    """A pause of 0.4 to 0.9 s where the middle of x is softest."""
    n = SAMPLE_RATE // 50
    a, b = int(0.3 * len(x)) // n, int(0.7 * len(x)) // n
    if b <= a:
        return x
    at = (a + x[a * n:b * n].view(-1, n).square().mean(1).argmin().item()) * n
    return torch.cat([x[:at], torch.zeros(round(rng.uniform(0.4, 0.9) * SAMPLE_RATE)), x[at:]])


def read_turn(turn):
    path, start, end = clip_key(turn)
    return read_audio(path, start=start, end=end)


def schedule(turns, rng):
    """When each turn of [(user, model), ...] is spoken. With probability 0.7 the user interrupts an answer
    with the next turn, and half a second later the model stops. Returns [{"user", "model": samples; "start",
    "answer", "cut": when the user starts, the answer starts, it is cut (or None); "text"; "said": what the
    model says while the user speaks, [(start, samples, text), ...]}, ...] and the end, all in samples."""
    plan, t = [], 0
    for i, (user, model) in enumerate(turns):
        x, y = read_turn(user), read_turn(model)
        interjections = user.get("interjections", ())
        if rng.random() < 0.2 and not interjections:  # these are at certain seconds
            x = hesitate(x, rng)
        if rng.random() < 0.6:
            x = change_gain(x, rng)
        interrupts = bool(plan) and plan[-1]["cut"] is not None
        start = t + (0 if interrupts else round(rng.uniform(0.2, 1.6) * SAMPLE_RATE))
        answer = -(-(start + len(x)) // FRAME) * FRAME + TEXT_LEAD * FRAME
        interrupted = i < len(turns) - 1 and rng.random() < 0.7
        t = answer + (rng.randint(FRAME, len(y)) if interrupted else len(y))
        cut = t + REACTION * FRAME if interrupted else None
        said = [(-(-(start + round(s["at"] * SAMPLE_RATE)) // FRAME) * FRAME, read_turn(s), s["text"])
                for s in interjections]
        plan.append({"user": x, "model": y, "text": model["text"],
                     "start": start, "answer": answer, "cut": cut, "said": said})
    return plan, t


def converse(turns, backchannels, noises, rng):
    """turns [(user, model), ...] of a manifest -> the speak and the listen channel (N,), and the model's
    sentences. The user's backchannels do not stop an answer."""
    plan, end = schedule(turns, rng)
    n = end + round(rng.uniform(0.5, 1.5) * SAMPLE_RATE)
    n += -n % FRAME
    speak, listen, sentences = torch.zeros(n), torch.zeros(n), []
    for p in plan:
        add_at(listen, p["user"], p["start"])
        for start, x, text in p["said"]:
            add_at(speak, x, start)
            sentences.append({"role": "model", "start": start / SAMPLE_RATE,
                              "end": (start + len(x)) / SAMPLE_RATE, "text": text})
        end = min(p["answer"] + len(p["model"]), n if p["cut"] is None else p["cut"])
        add_at(speak, p["model"][:end - p["answer"]], p["answer"])
        start, end = p["answer"] / SAMPLE_RATE, end / SAMPLE_RATE
        sentences.append({"role": "model", "start": start, "end": end, "text": p["text"]})
        if p["cut"] is not None:
            sentences[-1]["cut"] = p["cut"] / SAMPLE_RATE
        elif backchannels and rng.random() < 0.3:
            backchannel = read_turn(rng.choice(backchannels))
            add_at(listen, backchannel, p["answer"] + rng.randrange(len(p["model"])))
    if rng.random() < 0.3:
        listen = leak(listen, speak, rng)
    return speak, listen + make_noise(n, noises, rng), sentences


def add_at(audio, part, start):
    audio[start:start + len(part)] += part[:max(0, len(audio) - start)]


def read_dialogues(data):
    """Of data/manifest.jsonl: {split: [[(user turn, model turn), ...], ...]}, and the users' backchannels."""
    dialogues, backchannels = {"train": [], "seen": []}, []
    for d in read_manifest(os.path.join(data, "manifest.jsonl")):
        turns = d.get("turns", ())
        if any("codes" in t for t in turns):
            raise ValueError(f"{data}/manifest.jsonl: holds codes instead of audio, which cannot be mixed")
        if d.get("kind") == "backchannel":
            backchannels += turns
        elif len(turns) > 1 and d["split"] in dialogues:
            turns = [{**turns[0], "interjections": d.get("interjections", ())}, *turns[1:]]
            dialogues[d["split"]].append(list(zip(turns[::2], turns[1::2])))
    if not dialogues["train"]:
        raise ValueError(f"{data}/manifest.jsonl: holds no dialogue to train on")
    return dialogues, backchannels


def mix(data, out, conversations, noise, seed):
    """Dialogues of data/manifest.jsonl -> recorded conversations in the folder `out`, with its manifest."""
    out, work = check_folder(out, SPOKEN)
    noises = glob.glob(os.path.join(noise, "**"), recursive=True) if noise else []
    noises = sorted(filter(os.path.isfile, noises))
    if noise and not noises:
        raise ValueError(f"{noise}: holds no file of noise")
    dialogues, backchannels = read_dialogues(data)
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(os.path.join(work, "talks"))
    rng, lines, seconds = random.Random(seed), [], 0.0
    for i in tqdm(range(conversations), "mix", unit="talk"):
        split = "seen" if i % 50 == 0 and dialogues["seen"] else "train"
        turns = rng.choice(dialogues[split])
        if len(turns) == 1:  # several short ones after each other
            turns = turns + [t for _ in range(rng.randint(0, 3)) for t in rng.choice(dialogues[split])]
        speak, listen, sentences = converse(turns, backchannels, noises, rng)
        audio = f"talks/{i:06d}.flac"
        write_audio(os.path.join(work, audio), torch.stack([speak, listen]), flush=False)
        lines.append({"id": i, "split": split, "audio": audio, "sentences": sentences})
        seconds += len(speak) / SAMPLE_RATE
    write_manifest(lines, work, out)
    print(f"Wrote {conversations} conversations, {seconds / 3600:.2f} hours, to {out}/manifest.jsonl; "
          f"next: python prepare.py encode --data {out}")
