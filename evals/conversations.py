"""Many conversations at once, and conversations kept as folders: NAME/{input.wav, output.wav, meta.json,
reply.jsonl}.

input.wav is what the user says, output.wav what the system says on the same clock, meta.json the labels of
the scenario, reply.jsonl the monologue as chat.py writes it. Folders of Full-Duplex-Bench v1 are read too.
"""
import dataclasses
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from tqdm import tqdm

from evals.turns import SCORES, Item, Reply, speech, words_of
from files.atomic import replace_when_done
from files.audio import read_audio, write_audio
from live.transcript import Transcript
from mimi import FRAME
from toy.world import KIND_PROPORTIONS

BATCH = 25  # conversations, whatever the number of cores: rounding may depend on it
LABELS = ("meta.json", "pause.json", "turn_taking.json", "interrupt.json")  # ours, and Full-Duplex-Bench's


def converse_all(duplex, audio, seed, description):
    """Conversations with recordings [(N,), ...]: [(text tokens (T,), audio said (N,)), ...]. Recordings of
    similar length should be neighbours. On a CPU each core computes a batch of its own."""
    batches = [audio[i:i + BATCH] for i in range(0, len(audio), BATCH)]
    padded = [torch.stack([F.pad(x, (0, max(map(len, batch)) - len(x))) for x in batch]) for batch in batches]
    frames, out = sum(-(-x.shape[1] // FRAME) for x in padded), []
    workers = os.cpu_count() if duplex.device.type == "cpu" else 1
    with (tqdm(total=frames, desc=f"{description}, {len(audio)}", unit="frame", leave=False) as bar,
          ThreadPoolExecutor(workers, initializer=use_one_thread, initargs=(duplex,)) as pool):
        converse = lambda x, i: duplex.converse(x, seed + i, each=lambda t, text: bar.update())
        for batch, (texts, said) in zip(batches, pool.map(converse, padded, range(0, len(audio), BATCH))):
            out += [(text[:-(-len(x) // FRAME)], y[:len(x)]) for x, text, y in zip(batch, texts, said)]
    return out


def use_one_thread(duplex):
    if duplex.device.type == "cpu":
        torch.set_num_threads(1)


def written(duplex, text):
    """The monologue of text tokens (T,): [(second, text), ...]"""
    transcript = Transcript(duplex)
    for t, token in enumerate(text.tolist()):
        transcript.add(t, token)
    return [(piece["time"], piece["text"]) for piece in transcript.pieces]


def save_conversation(folder, item, said, monologue):
    """An Item and what was said and written, [(second, text), ...], as a folder of the item's name."""
    os.makedirs(os.path.join(folder, item.name), exist_ok=True)
    path = lambda name: os.path.join(folder, item.name, name)
    write_audio(path("input.wav"), item.audio)
    write_audio(path("output.wav"), said)
    labels = {k: v for k, v in dataclasses.asdict(item).items() if k not in ("name", "audio")
              and v not in (None, ())}
    for name, lines in (("meta.json", [labels]),
                        ("reply.jsonl", [{"time": t, "text": x} for t, x in monologue])):
        with replace_when_done(path(name)) as temporary, open(temporary, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def save_samples(duplex, conversations, folder):
    """Of [(dialogue, heard, (text, said)), ...] the first of three kinds, as stereo files; prints what was
    said."""
    print("\nThree of the conversations (left the user, right the model):")
    # the first of each
    kinds = {d["kind"]: (d, heard, text, said) for d, heard, (text, said) in reversed(conversations)}
    for kind in [k for k in KIND_PROPORTIONS if k in kinds][:3]:
        d, heard, text, said = kinds[kind]
        path = os.path.join(folder, f"{kind}.wav")
        write_audio(path, torch.stack([heard, said]))
        answer = " ".join(words_of(written(duplex, text)))
        print(f"  user: {d['turns'][0]['text']}\n    model: {answer}\n    {path}")


def read_conversations(folder):
    """The conversations of a folder: [(Item, Reply), ...]. Raises ValueError or OSError with the file's
    name."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    out = []
    for name in tqdm(sorted(os.listdir(folder)), "reading", unit="conversation", leave=False):
        path = os.path.join(folder, name)
        labels = [file for file in LABELS if os.path.isfile(os.path.join(path, file))]
        if labels:
            out.append(read_conversation(path, labels[0]))
    if not out:
        raise ValueError(f"{folder}: holds no folder with input.wav, output.wav and meta.json "
                         f"(or Full-Duplex-Bench's {', '.join(LABELS[1:])})")
    return out


def read_conversation(path, file):
    """(Item, Reply) of one folder, labelled by `file`."""
    heard, said = (read_audio(os.path.join(path, name)) for name in ("input.wav", "output.wav"))
    try:
        with open(os.path.join(path, file), encoding="utf-8") as f:
            labels = json.load(f)
        labels = labels if file == "meta.json" else full_duplex_bench(file, labels, heard)
        item = Item(os.path.basename(path), audio=heard, **labels)
        check_item(item)
        monologue = None
        if os.path.isfile(os.path.join(path, "reply.jsonl")):
            with open(os.path.join(path, "reply.jsonl"), encoding="utf-8") as f:
                monologue = [(float(d["time"]), str(d["text"])) for d in map(json.loads, f)]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise ValueError(f"{os.path.join(path, file)}: not what --folder reads ({reason})") from None
    return item, Reply(speech(said), monologue)


def check_item(item):
    """ValueError unless the scenario is known and has the times that it needs."""
    if item.scenario not in (*SCORES, "control"):
        raise ValueError(f"no scenario {item.scenario!r}")
    needs = {"pause": item.pause, "long pause": item.pause, "user interrupt": item.event,
             "user backchannel": item.event}
    for span in (needs.get(item.scenario, (0, 0)), (item.end, item.end), *((t, t) for t in item.clauses)):
        if span is None or not 0 <= span[0] <= span[1] < math.inf:
            raise ValueError(f"{item.scenario}: needs its times in seconds")


def full_duplex_bench(file, labels, heard):
    """The labels of Full-Duplex-Bench v1 as fields of an Item."""
    begin, end = (float(t) for t in (*labels[0]["timestamp"], math.nan)[:2])
    if file == "turn_taking.json":
        return {"scenario": "turn-taking", "end": begin}
    if file == "interrupt.json":
        return {"scenario": "user interrupt", "end": end, "event": (begin, end)}
    return {"scenario": "pause", "end": speech(heard)[-1][1], "pause": (begin, end)}
