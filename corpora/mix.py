"""Dialogues -> conversations as a microphone hears them (FLM-Audio, section 3.2): free user input, noise, gain, leakage.

    python prepare.py mix --data data/toy --out data/mixed
"""
import glob
import json
import math
import os
import random
import shutil

import torch
from tqdm import tqdm

from files.audio import SAMPLE_RATE, read_audio, write_audio
from files.manifest import must_be_new, read_manifest
from mimi import FRAME
from streams import REACTION, TEXT_LEAD


def decibels(x):
    """Of a sound's root mean square (footnote 9)."""
    return 20 * math.log10(x.square().mean().sqrt().item() + 1e-6)


def change_gain(x, rng):
    """Louder or softer by -24 to +20 dB, but never below -40 dB."""
    return x * 10 ** (max(rng.uniform(-24, 20), -40 - decibels(x)) / 20)


def make_noise(n, files, rng):
    """n samples of noise, segment after segment, each scaled to -70 to -40 dB or, with probability 0.3, silent. From files, or
    else generated: white to brown."""
    out = []
    while sum(map(len, out)) < n:
        length = int(rng.uniform(0.5, 3.0) * SAMPLE_RATE)
        if files:
            x = read_audio(rng.choice(files))
            begin = rng.randrange(max(1, len(x) - length))
            x = x[begin:begin + length]
        else:
            spectrum = torch.randn(length // 2 + 1, 2, generator=torch.Generator().manual_seed(rng.getrandbits(60)))
            fall = (torch.arange(length // 2 + 1) / length * SAMPLE_RATE + 50) ** -rng.uniform(0.0, 1.0)  # above 50 Hz
            x = torch.fft.irfft(torch.view_as_complex(spectrum) * fall, length)
        silent = rng.random() < 0.3
        out.append(x * 0 if silent else x * 10 ** ((rng.uniform(-70, -40) - decibels(x)) / 20))
    return torch.cat(out)[:n]


def leak(heard, said, rng):
    """What the loudspeaker says comes back into the microphone: weaker (0 to 0.2) and later (0.1 to 0.5 s)."""
    delay = round(rng.uniform(0.1, 0.5) * SAMPLE_RATE)
    echo = torch.nn.functional.pad(said, (delay, 0))[:len(heard)] * rng.uniform(0, 0.2)
    return heard + torch.nn.functional.pad(echo, (0, len(heard) - len(echo)))


def hesitate(x, rng):
    """A pause of 0.4 to 0.9 s where the middle of x is softest."""
    n = SAMPLE_RATE // 50
    a, b = int(0.3 * len(x)) // n, int(0.7 * len(x)) // n
    if b <= a:
        return x
    at = (a + x[a * n:b * n].view(-1, n).square().mean(1).argmin().item()) * n
    return torch.cat([x[:at], torch.zeros(round(rng.uniform(0.4, 0.9) * SAMPLE_RATE)), x[at:]])


def converse(turns, backchannels, noises, rng):
    """turns [(user, model), ...] of a manifest -> said and heard (N,), and the model's sentences. With probability 0.7 the user
    breaks into an answer with the next turn, and the model is silent half a second later. A backchannel does not stop it."""
    plan, t = [], 0  # in samples
    for i, (user, model) in enumerate(turns):
        x, y = (read_audio(p["path"], start=p.get("start", 0.0), end=p.get("end")) for p in (user, model))
        if rng.random() < 0.2:
            x = hesitate(x, rng)
        if rng.random() < 0.6:
            x = change_gain(x, rng)
        start = t + (round(rng.uniform(0.2, 1.6) * SAMPLE_RATE) if not plan or plan[-1]["cut"] is None else 0)
        sound = -(-(start + len(x)) // FRAME) * FRAME + TEXT_LEAD * FRAME
        breaks_in = i < len(turns) - 1 and rng.random() < 0.7
        t = sound + (rng.randint(FRAME, len(y)) if breaks_in else len(y))
        cut = t + REACTION * FRAME if breaks_in else None
        plan.append({"x": x, "y": y, "start": start, "sound": sound, "cut": cut, "text": model["text"]})
    n = t + round(rng.uniform(0.5, 1.5) * SAMPLE_RATE)
    n += -n % FRAME
    said, heard, sentences = torch.zeros(n), torch.zeros(n), []
    for p in plan:
        mix_in(heard, p["x"], p["start"])
        end = p["sound"] + len(p["y"]) if p["cut"] is None else min(p["cut"], p["sound"] + len(p["y"]))
        mix_in(said, p["y"][:end - p["sound"]], p["sound"])
        sentences.append({"role": "model", "start": p["sound"] / SAMPLE_RATE, "end": end / SAMPLE_RATE, "text": p["text"]})
        if p["cut"] is not None:
            sentences[-1]["cut"] = p["cut"] / SAMPLE_RATE
        elif backchannels and rng.random() < 0.3:
            b = rng.choice(backchannels)
            mix_in(heard, read_audio(b["path"]), p["sound"] + rng.randrange(len(p["y"])))
    if rng.random() < 0.3:
        heard = leak(heard, said, rng)
    return said, heard + make_noise(n, noises, rng), sentences


def mix_in(whole, part, at):
    whole[at:at + len(part)] += part[:max(0, len(whole) - at)]


def mix(data, out, conversations, noise, seed):
    """Dialogues of data/manifest.jsonl -> out/manifest.jsonl with recorded conversations."""
    must_be_new(out)
    noises = sorted(p for p in glob.glob(os.path.join(noise, "**"), recursive=True) if os.path.isfile(p)) if noise else []
    if noise and not noises:
        raise ValueError(f"{noise}: holds no file of noise")
    dialogues, backchannels = {"train": [], "seen": []}, []
    for d in read_manifest(os.path.join(data, "manifest.jsonl")):
        turns = d.get("turns", ())
        if d.get("kind") == "backchannel":
            backchannels += turns
        elif len(turns) > 1 and d["split"] in dialogues:
            dialogues[d["split"]].append(list(zip(turns[::2], turns[1::2])))
    if not dialogues["train"]:
        raise ValueError(f"{data}/manifest.jsonl: holds no dialogue to train on")
    work = out + ".partial"
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(os.path.join(work, "talks"))
    rng, seconds = random.Random(seed), 0.0
    with open(os.path.join(work, "manifest.jsonl"), "w", encoding="utf-8") as f:
        for i in tqdm(range(conversations), "mix", unit="talk"):
            split = "seen" if i % 50 == 0 and dialogues["seen"] else "train"
            turns = rng.choice(dialogues[split])
            if len(turns) == 1:  # a few short ones after each other
                turns = turns + [t for _ in range(rng.randint(0, 3)) for t in rng.choice(dialogues[split])]
            said, heard, sentences = converse(turns, backchannels, noises, rng)
            write_audio(os.path.join(work, f"talks/{i:06d}.flac"), torch.stack([said, heard]))
            f.write(json.dumps({"id": i, "split": split, "audio": f"talks/{i:06d}.flac", "sentences": sentences}) + "\n")
            seconds += len(said) / SAMPLE_RATE
    os.rename(work, out)
    print(f"Wrote {conversations} conversations, {seconds / 3600:.2f} hours, to {out}/manifest.jsonl; "
          f"next: python prepare.py encode --data {out}")
