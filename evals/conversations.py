"""Many conversations at once, and conversations kept as folders: NAME/{input.wav, output.wav, meta.json,
reply.jsonl}.

input.wav is what the user says, output.wav what the system says on the same clock, meta.json the labels of
the scenario, reply.jsonl the monologue as chat.py writes it. Folders of Full-Duplex-Bench v1 and v1.5 are
read too, of one task or of all; v1.5 has a control, clean_input.wav and clean_output.wav.
"""
import dataclasses
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from tqdm import tqdm

from evals.turns import SCORES, Item, Reply, speech, words_of
from files.atomic import read_json, write_text
from files.audio import read_audio, write_audio
from files.fields import SECONDS, check_fields, lines_of, list_of, one_line, parse_json, text
from live.transcript import Transcript
from mimi import FRAME
from toy.world import KIND_PROPORTIONS

SPAN = list_of(SECONDS, 2, least=2)
OPTIONAL = {"answer": text(), "pause": SPAN, "event": SPAN, "clauses": list_of(SECONDS), "control": text()}
BATCH = 25  # conversations, whatever the number of cores: rounding may depend on it
# ours, and Full-Duplex-Bench's
LABELS = ("meta.json", "pause.json", "turn_taking.json", "interrupt.json", "metadata.json",
          "transcription.json")  # the last one lies beside others, but alone where backchannels are wanted
TASKS = {folder: folder.replace("_", " ") for folder in (  # of v1.5
    "user_backchannel", "talking_to_other", "background_speech")} | {"user_interruption": "user interrupt"}


def converse_all(duplex, groups, seed, description):
    """Conversations with groups of recordings [[(N,), ...], ...]. Yields for each group, in order, [(text
    tokens (T,), audio said (N,)), ...]. Neighbours in a group should be of similar length. On a CPU each core
    computes a batch of its own."""
    where = [(group, i) for group in groups for i in range(0, len(group), BATCH)]
    frames = sum(-(-max(map(len, group[i:i + BATCH])) // FRAME) for group, i in where)
    n = sum(map(len, groups))
    with (tqdm(total=frames, desc=f"{description}, {n}", unit="frame", leave=False) as bar,
          ThreadPoolExecutor(batches_at_once(duplex), "conversations", use_one_thread, (duplex,)) as pool):
        def converse(at):
            group, i = at
            batch = group[i:i + BATCH]
            padded = torch.stack([F.pad(x, (0, max(map(len, batch)) - len(x))) for x in batch])
            texts, said = duplex.converse(padded, seed + i, each=lambda t, text: bar.update())
            return [(text[:-(-len(x) // FRAME)], y[:len(x)]) for x, text, y in zip(batch, texts, said)]
        done = pool.map(converse, where)
        for group in groups:
            yield [pair for _ in range(0, len(group), BATCH) for pair in next(done)]


def share_within(minutes, answers, scenarios, duplex):
    """The share of the items, in whole hundredths, that this machine can do in these minutes; one hundredth
    at least. answers, scenarios: the number of items of each split and of each scenario. A second's
    conversations tell how fast the machine is."""
    batches = batches_at_once(duplex)
    noise = list(0.01 * torch.randn(batches * BATCH, 12 * FRAME))
    for _ in range(2):  # the first time warms up
        begun = time.perf_counter()
        list(converse_all(duplex, [noise], 0, "speed"))
    possible = 60 * minutes * 12 * batches / (time.perf_counter() - begun)

    def frames(share):  # of full batches; one conversation alone takes two fifths of the time of 25
        n = share * scenarios / BATCH
        return 20 * share * answers + 2200 * (max(n, 0.4 + 0.6 * n) if scenarios else 0)
    fits = [p for p in range(1, 101) if frames(p / 100) <= possible]
    if not fits:
        print(f"1% of the items: this machine needs more than {minutes:.1f} minutes even for those")
    elif fits[-1] < 100:
        print(f"{fits[-1]}% of the items, to end within {minutes:.1f} minutes")
    return max(fits, default=1) / 100


def batches_at_once(duplex):
    return os.cpu_count() if duplex.device.type == "cpu" else 1


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
    write_text(path("meta.json"), json.dumps(labels, ensure_ascii=False) + "\n")
    save_monologue(path("reply.jsonl"), monologue)


def save_monologue(path, monologue):
    """[(second, text), ...]"""
    lines = [json.dumps({"time": t, "text": x}, ensure_ascii=False) + "\n" for t, x in monologue]
    write_text(path, "".join(lines))


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


def find_conversations(folder):
    """The names of the labelled folders below a folder. Raises ValueError or OSError."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    found = [path for path, _, files in os.walk(folder) if {*LABELS} & {*files}]
    if not found:
        raise ValueError(f"{folder}: holds no folder with input.wav, output.wav and meta.json "
                         f"(or Full-Duplex-Bench's {', '.join(LABELS[1:])})")
    return sorted(os.path.relpath(path, folder) for path in found)


def read_conversations(folder):
    """The conversations of a folder: [(Item, Reply), ...]. Raises ValueError or OSError with the file's
    name."""
    out = []
    for name in tqdm(find_conversations(folder), "reading", unit="conversation", leave=False):
        path = os.path.join(folder, name)
        labels = next(file for file in LABELS if os.path.isfile(os.path.join(path, file)))
        item, reply = read_conversation(path, labels)
        item.name, clean = name, os.path.join(path, "clean_output.wav")
        if item.control:  # named as in its own group
            item.control = os.path.join(os.path.dirname(name), item.control)
        if os.path.isfile(clean):
            item.control = f"{name}: the same without the event"
            control = dataclasses.replace(item, name=item.control, scenario="control", control=None)
            out.append((control, Reply(speech(read_audio(clean)))))
        out.append((item, reply))
    return out


def read_conversation(path, file):
    """(Item, Reply) of one folder, labelled by `file`."""
    heard, said = (read_audio(os.path.join(path, name)) for name in ("input.wav", "output.wav"))
    try:
        labels = read_json(os.path.join(path, file))
        labels = labels if file == "meta.json" else full_duplex_bench(path, file, labels, heard)
        check_fields(labels, {"scenario": text(100), "end": SECONDS}, OPTIONAL, "a conversation")
        item = Item(os.path.basename(path), audio=heard, **labels)
        check_item(item)
        monologue = None
        if os.path.isfile(os.path.join(path, "reply.jsonl")):
            file = "reply.jsonl"
            with open(os.path.join(path, file), "rb") as f:
                pieces = [parse_json(line) for line in lines_of(f)]
            for piece in pieces:
                check_fields(piece, {"time": SECONDS, "text": text()}, what="a line")
            monologue = [(piece["time"], piece["text"]) for piece in pieces]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
        reason = f"{type(e).__name__}: {one_line(e)}"
        raise ValueError(f"{os.path.join(path, file)}: not what --folder reads ({reason})") from None
    return item, Reply(speech(said), monologue)


def check_item(item):
    """ValueError unless the scenario is known and has the times that it needs."""
    if item.scenario not in (*SCORES, "control"):
        raise ValueError(f"no scenario {item.scenario!r}")
    needs = {"pause": item.pause, "long pause": item.pause, **dict.fromkeys(TASKS.values(), item.event)}
    for span in (needs.get(item.scenario, (0, 0)), (item.end, item.end), *((t, t) for t in item.clauses)):
        if span is None or not 0 <= span[0] <= span[1] < math.inf:
            raise ValueError(f"{item.scenario}: needs its times in seconds")


def full_duplex_bench(path, file, labels, heard):
    """The labels of Full-Duplex-Bench v1 or v1.5 as fields of an Item."""
    if file == "metadata.json":
        begin, end = (float(t) for t in labels["timestamps"])
        task = os.path.basename(os.path.dirname(os.path.abspath(path)))
        if task not in TASKS:
            raise ValueError(f"the folder around it is named {task}, not after a task ({', '.join(TASKS)})")
        return {"scenario": TASKS[task], "end": end, "event": (begin, end)}
    if file == "transcription.json":
        return {"scenario": "model backchannel", "end": speech(heard)[-1][1]}
    begin, end = (float(t) for t in (*labels[0]["timestamp"], math.nan)[:2])
    if file == "turn_taking.json":
        return {"scenario": "turn-taking", "end": begin}
    if file == "interrupt.json":
        return {"scenario": "user interrupt", "end": end, "event": (begin, end)}
    return {"scenario": "pause", "end": speech(heard)[-1][1], "pause": (begin, end)}
