"""Damaged and hostile inputs for everything that reads: each must be read or refused in one clear line.

    python tests/fuzz.py --inputs 2000 --seed 1
    python tests/fuzz.py --only manifest --first 17 --inputs 1      the 17th input for manifests again

Each reader runs in a process of its own and gets inputs that differ from good ones in a few bytes, numbers,
names or lengths. A traceback is any other exception than ValueError and OSError, a message of several lines,
or a crash; a hang is an input that takes longer than --seconds.
"""
import argparse
import asyncio
import contextlib
import copy
import faulthandler
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import zipfile

import numpy as np
import soundfile
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import prepare  # noqa: E402
import train  # noqa: E402
from chat import DuplexModel  # noqa: E402
from conftest import CODEC, FLM as CONFIG  # noqa: E402
from corpora.chats import import_chats  # noqa: E402
from corpora.dialogues import read_dialogues  # noqa: E402
from corpora.readers import collect  # noqa: E402
from evals.conversations import read_conversations  # noqa: E402
from evals.plot import losses_of, read_log  # noqa: E402
from evals.recogniser import SHIPPED, load_recogniser  # noqa: E402
from evals.testsets import read_questions, read_recordings  # noqa: E402
from evals.turns import score_all  # noqa: E402
from files.audio import SAMPLE_RATE, read_audio, seconds_of  # noqa: E402
from files.checkpoint import save_checkpoint  # noqa: E402
from files.encoded import places, read_encoded, sha256, write_index  # noqa: E402
from files.manifest import read_manifest  # noqa: E402
from files.tokenizer import dump_published, dump_tokenizer, get_tokenizer, load_tokenizer  # noqa: E402
from live.packed import pack, unpack  # noqa: E402
from mimi import FRAME, Mimi  # noqa: E402
from model import FLM  # noqa: E402
from published.release import export_release  # noqa: E402
from streams import Vocab  # noqa: E402
from toy.voices import get_synthesiser, speak  # noqa: E402

LONGEST = 600  # letters of a message


# ------------------------------------------------------------------------------------------------------------
# good inputs


def make_world(folder):
    """Small sounds, a manifest, its encoded folder, a model of it with codec and tokeniser, and the same
    packed and exported. Untrained: only what they are made of matters."""
    rng, join = np.random.default_rng(0), lambda *names: os.path.join(folder, *names)
    os.makedirs(join("sounds"))
    x = rng.normal(size=4000) * 0.1
    for name, rate, kind in (("a.wav", 16_000, None), ("b.flac", 44_100, None), ("c.ogg", 24_000, None),
                             ("d.aiff", 8000, None), ("e.au", 22_050, None), ("f.w64", 48_000, None),
                             ("g.mp3", 24_000, None), ("h.wav", 8000, "GSM610"), ("i.wav", 11_025, "FLOAT"),
                             ("j.caf", 16_000, None), ("k.wav", 8000, "IMA_ADPCM")):
        soundfile.write(join("sounds", name), x, rate, subtype=kind)
    soundfile.write(join("sounds", "talk.wav"), rng.normal(size=(9000, 2)) * 0.1, SAMPLE_RATE)
    said = lambda role, name, **more: {"role": role, "text": "it is late now", "audio": f"sounds/{name}",
                                       **more}
    lines = [{"turns": [said("user", "a.wav"), said("model", "b.flac", starts=[0.0, 0.01, 0.02, 0.03])]},
             {"turns": [said("user", "d.aiff"), said("model", "e.au")], "kind": "repeat", "split": "seen",
              "interjections": [{"text": "mhm", "audio": "sounds/f.w64", "at": 0.05}]},
             {"audio": "sounds/c.ogg", "text": "a recording", "start": 0.01, "end": 0.1, "lang": "en",
              "annotated": False},
             {"audio": "sounds/talk.wav", "split": "train", "sentences": [
                 {"role": "model", "start": 0.0, "end": 0.2, "text": "one two", "starts": [0.0, 0.1],
                  "cut": 0.15},
                 {"role": "user", "start": 0.2, "end": 0.3, "text": "stop"}]}]
    with open(join("manifest.jsonl"), "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines * 3)
    torch.manual_seed(0)
    os.makedirs(join("model"))
    save_checkpoint(join("model", "codec.pt"), "codec", CODEC, model=Mimi(CODEC).state_dict())
    with quiet():
        prepare.encode(folder, join("model", "codec.pt"), "bpe", 300, 2, 0.0, False, 1, "cpu")
        meta = json.load(open(join("encoded", "meta.json")))
        shutil.copy(join("encoded", "tokenizer.json"), join("model", "tokenizer.json"))
        words = load_tokenizer(join("model", "tokenizer.json")).n_vocab
        vocab = Vocab.own(words, CODEC.codebook_size, tuple(map(tuple, meta["silence"])))
        save_checkpoint(join("model", "checkpoint.pt"), "flm", CONFIG, model=FLM(CONFIG).state_dict(),
                        vocab=vars(vocab))
        pack(join("model"), join("packed.safetensors"), "a note")
        os.makedirs(join("release"))
        model, vocab, _ = FLM.load(join("model", "checkpoint.pt"))
        export_release(model, vocab, join("release"))
        for name, text in dump_published(get_tokenizer(join("model"), {}, 0)).items():
            with open(join("release", name), "w") as f:
                f.write(text)
        shutil.copy(join("model", "codec.pt"), join("release", "codec.pt"))
        train.train(task_of(folder), STAGES, join("trained"))
    saved = torch.load(join("trained", "checkpoint.pt"), weights_only=True)
    saved["progress"] |= {"stage": 0, "step": 2}  # as if it had been interrupted there
    torch.save(saved, join("trained", "checkpoint.pt"))
    chats = [{"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]},
             {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]},
             {"instruction": "Say", "input": "yes", "output": "Yes."}, {"data": ["One?", "Two."]}]
    with open(join("chats.jsonl"), "w") as f:
        f.writelines(json.dumps(chat) + "\n" for chat in chats)
    with open(join("talks.jsonl"), "w") as f:
        f.write(json.dumps({"path": "sounds/talk.wav", "duration": 0.4}) + "\n")
    with open(join("sounds", "talk.json"), "w") as f:
        words = [["hello", [0.0, 0.1], "SPEAKER_MAIN"], ["yes", [0.1, 0.2], "SPEAKER_A"]]
        json.dump({"alignments": words}, f)


    dialogues = [{"turns": [{"role": "user", "text": "who is it"}, {"role": "model", "text": "me"}]},
                 {"turns": [{"role": "user", "text": "a", "speaker": "A"}, {"role": "model", "text": "b"},
                            {"role": "user", "text": "c", "voice": "tts:x"}, {"role": "model", "text": "d"}],
                  "lang": "en"}]
    with open(join("dialogues.jsonl"), "w") as f:
        f.writelines(json.dumps(dialogue) + "\n" for dialogue in dialogues)
    with open(join("voices.txt"), "w") as f:
        f.write("tts:model\ntts:one\ntts:two\n")
    questions = [{"audio": "sounds/a.wav", "answers": ["yes"]}, {"text": "who is it", "answers": ["me", "I"]}]
    with open(join("questions.jsonl"), "w") as f:
        f.writelines(json.dumps(question) + "\n" for question in questions)
    make_conversations(folder)


LABELS = {"ours/a/meta.json": {"scenario": "pause", "end": 0.3, "pause": [0.1, 0.2], "clauses": [0.1],
                               "answer": "one two", "control": "b"},
          "ours/b/meta.json": {"scenario": "control", "end": 0.3},
          "theirs/a/pause.json": [{"timestamp": [0.1, 0.2], "text": "one"}],
          "theirs/b/turn_taking.json": [{"timestamp": [0.2, 0.3]}],
          "theirs/c/interrupt.json": [{"timestamp": [0.1, 0.2], "context": "a"}],
          "user_backchannel/a/metadata.json": {"timestamps": [0.1, 0.2]}}


def make_conversations(folder):
    """Ours, and in the formats of Full-Duplex-Bench."""
    for name, labels in LABELS.items():
        path = os.path.join(folder, "conversations", os.path.dirname(name))
        os.makedirs(path)
        for sound in ("input.wav", "output.wav"):
            shutil.copy(f"{folder}/sounds/a.wav", f"{path}/{sound}")
        with open(os.path.join(path, os.path.basename(name)), "w") as f:
            json.dump(labels, f)
        with open(os.path.join(path, "reply.jsonl"), "w") as f:
            f.write('{"time": 0.1, "text": "one"}\n{"time": 0.2, "text": " two"}\n')


STAGES = [train.Stage("once", 3, 2, 1e-3, 0, 48, {"response_tts": (1, 1)})]


def task_of(world):
    return train.ModelTask(CONFIG, f"{world}/encoded", "cpu")


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ------------------------------------------------------------------------------------------------------------
# what is done to them

INTEGERS = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
            1 << 40, (1 << 63) - 1, (1 << 64) - 1)
VALUES = (None, True, False, -1, 0, 1, 2, 7, 8, 255, 1 << 20, 1 << 31, 1 << 63, 10 ** 30, 10 ** 400, -0.5,
          1e-300, 1e300, float("nan"), float("inf"), float("-inf"), "", "x", "x" * 5000, "\ud800", "\0",
          "../../etc/passwd", "/dev/zero", "a\nb", "-1", "1e9", [], {}, [[]], [0], [-1, 1], [1 << 40] * 3,
          {"a": {}}, "train", "user", "(a+)+$", r"(?<=(a|aa)+)\1", r"(?:(?:a|aa)+|\s+(?!\S))+X")

NAMES = ("odd", "", "__class__", "codes", "audio", "cut", "at", "voice", "x" * 5000, "a\nb", "\x1b[2J")


def mutate_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64, 1000))
        if rng.random() < 0.5:
            at = min(at, rng.randrange(200))  # headers
        how = rng.randrange(8)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 127, 128, 254, 255))
        elif how == 2:
            del data[at:]
        elif how == 3:
            del data[at:at + n]
        elif how == 4:
            data[at:at] = rng.randbytes(n)
        elif how == 5:
            data[at:at + n] = bytes([rng.choice((0, 255))]) * n
        elif how == 6:
            kind = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
            value = rng.choice(INTEGERS) & (1 << 8 * struct.calcsize(kind)) - 1
            data[at:at + struct.calcsize(kind)] = struct.pack(kind, value)
        else:
            data[at:at] = data[at:at + n]
        if not data:
            break
    return bytes(data)


def spots(tree, where=()):
    """All places in nested dicts and lists, as paths."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*where, key)
        yield from spots(value, (*where, key))


def mutate_tree(tree, rng, values=VALUES):
    """One to three places of nested dicts and lists get another value, go, or are doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(spots(tree))
        if not found:
            return tree
        depth = rng.randint(1, max(map(len, found)))  # as often near the root as far from it
        *way, last = rng.choice([path for path in found if len(path) <= depth])
        parent = tree
        for key in way:
            parent = parent[key]
        how = rng.random()
        if how < 0.15:
            del parent[last]
        elif how < 0.25 and isinstance(parent, list):
            parent[last:last] = [copy.deepcopy(parent[last])] * rng.choice((1, 3, 1000))
        elif how < 0.3 and isinstance(parent, dict):
            parent[rng.choice(NAMES)] = rng.choice(values)
        elif how < 0.4 and isinstance(parent[last], (int, float)) and not isinstance(parent[last], bool):
            with contextlib.suppress(OverflowError):  # a whole number that is no float
                parent[last] = rng.choice((-1, 2, 1000, 10 ** 9, 0.5)) * parent[last] + rng.choice((-1, 0, 1))
        elif how < 0.43:
            parent[last] = deep(rng.choice((100, 5000, 100_000)), rng.random() < 0.5)
        else:
            parent[last] = copy.deepcopy(rng.choice(values))
    return tree


class Deep(str):
    """JSON that is written as it is."""


def deep(n, as_list):
    return Deep("[" * n + "]" * n if as_list else '{"a":' * n + "1" + "}" * n)


def dump(tree):
    """JSON of nested dicts and lists that may hold Deep ones."""
    marks = {}

    def mark(x):
        if isinstance(x, Deep):
            if len(marks) > 4:  # of a thousand copies
                return []
            marks[f"deep {len(marks)}"] = x
            return f"deep {len(marks) - 1}"
        if isinstance(x, dict):
            return {k: mark(v) for k, v in x.items()}
        return [mark(v) for v in x] if isinstance(x, (list, tuple)) else x
    text = json.dumps(mark(tree))
    for name, written in marks.items():
        text = text.replace(f'"{name}"', written)
    return text.encode()


def mutate_json(data, rng):
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    return dump(mutate_tree(json.loads(data), rng))


def mutate_lines(data, rng):
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = mutate_json(lines[i], rng)
    return b"\n".join(lines) + b"\n"


def odd_tensor(x, rng):
    return rng.choice((
        lambda: x[:0], lambda: x[:1], lambda: x.flatten(), lambda: x.double(), lambda: x.half(),
        lambda: x.long(), lambda: x.bool(), lambda: x * float("nan"), lambda: x * float("inf"),
        lambda: x[None], lambda: x.flatten()[:1].expand(1 << 20, 1 << 14), lambda: x.mT, lambda: x * 0,
        lambda: x.flatten()[:1].expand(x.shape), lambda: x.to(torch.complex64), lambda: x * 1e30,
        lambda: x.to_sparse(), lambda: x[..., ::2]))()


def mutate_checkpoint(data, rng):
    """Its bytes; its pickle, in a whole zip; or what it holds."""
    how = rng.random()
    if how < 0.25:
        return mutate_bytes(data, rng)
    if how < 0.5:
        out = io.BytesIO()
        kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", kind) as new:
            for part in old.namelist():
                content = old.read(part)
                wanted = part.endswith(".pkl") or rng.random() < 0.02
                new.writestr(part, mutate_pickle(content, rng) if wanted else content)
        return out.getvalue()
    saved = torch.load(io.BytesIO(data), weights_only=True)
    if rng.random() < 0.4:
        name = rng.choice(list(saved["model"]))
        with contextlib.suppress(RuntimeError, IndexError):
            saved["model"][name] = odd_tensor(saved["model"][name], rng)
        if rng.random() < 0.2:
            saved["model"].pop(rng.choice(list(saved["model"])))
        if rng.random() < 0.1:
            saved["model"][rng.choice(NAMES)] = torch.zeros(1)
    else:
        parts = {k: v for k, v in saved.items() if k != "model"}
        saved = {**mutate_tree({k: plain(v) for k, v in parts.items()}, rng), "model": saved["model"]}
        if rng.random() < 0.1:
            saved["model"] = rng.choice((None, [], {}, "x", {"a": 1}))
    out = io.BytesIO()
    torch.save(saved, out)
    return out.getvalue()


def plain(x):
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, (list, tuple)) else x


BOMBS = (b"\x80\x02c__builtin__\nbytearray\nq\x00\x8a\x05\x00\x00\x00\x00\x04\x85R.",
         b"\x80\x02ccollections\nCounter\n)R.", b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.",
         b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00trueq\x00\x85R.", b"\x80\x02" + b"]" * 3_000_000 + b".",
         b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".", b"")


def mutate_pickle(data, rng):
    return rng.choice(BOMBS) if rng.random() < 0.2 else mutate_bytes(data, rng)


def mutate_safetensors(data, rng):
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    n = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + n]), data[8 + n:]
    if rng.random() < 0.3 and "__metadata__" in header:
        facts = header["__metadata__"]
        name = rng.choice(list(facts))
        facts[name] = mutate_json(facts[name].encode(), rng).decode(errors="replace")
    elif rng.random() < 0.4:  # another kind of number of as many bytes, or another shape of as many numbers
        part = header[rng.choice([name for name in header if name != "__metadata__"])]
        size = np.prod(part["shape"], dtype=int).item()
        part["shape"] = rng.choice(([size], [1, size], part["shape"][::-1], [size, 1], [0, 1 << 40]))
        same = {"F32": ("I32", "U32"), "F16": ("BF16", "I16", "U16")}.get(part["dtype"], ("F32",))
        part["dtype"] = rng.choice((part["dtype"], *same))
    elif rng.random() < 0.5:
        header = mutate_tree(header, rng)
    else:
        body = bytes(rng.choice((0xFF, 0x7F, 0)) for _ in range(64)).join((body[:100], body[164:]))
    header = dump(header)
    return len(header).to_bytes(8, "little") + header + body


# ------------------------------------------------------------------------------------------------------------
# readers: (folder of good inputs, folder to work in, random numbers) -> reads one bad input


def change(path, mutate, rng):
    with open(path, "rb") as f:
        data = f.read()
    with open(path, "wb") as f:
        f.write(mutate(data, rng))
    return path


def sound(world, work, rng):
    name = rng.choice([name for name in os.listdir(f"{world}/sounds") if not name.endswith(".json")])
    ending = os.path.splitext(name)[1] if rng.random() < 0.9 else rng.choice((".raw", ".wav", ".mp3", ".xyz"))
    path = shutil.copy(f"{world}/sounds/{name}", f"{work}/sound{ending}")
    change(path, mutate_bytes, rng)
    seconds_of(path)
    read_audio(path, mono=rng.random() < 0.5)
    read_audio(path, start=0.01, end=0.05)


def manifest(world, work, rng):
    os.symlink(f"{world}/sounds", f"{work}/sounds")
    path = change(shutil.copy(f"{world}/manifest.jsonl", f"{work}/manifest.jsonl"), mutate_lines, rng)
    with quiet():
        list(read_manifest(path, skip_broken=True))
    list(read_manifest(path))
    if rng.random() < 0.05:
        with quiet():
            prepare.encode(work, f"{world}/model/codec.pt", "bpe", 300, 1, 0.0, False, 1, "cpu")
            read_everything(f"{work}/encoded")


def corpus(world, work, rng):
    """Text conversations, and conversations in moshi-finetune's format."""
    if rng.random() < 0.5:
        path = change(shutil.copy(f"{world}/chats.jsonl", f"{work}/chats.jsonl"), mutate_lines, rng)
        with quiet():
            return import_chats(path, f"{work}/out.jsonl", 80, "en")
    shutil.copytree(f"{world}/sounds", f"{work}/sounds")
    path = shutil.copy(f"{world}/talks.jsonl", f"{work}/talks.jsonl")
    if rng.random() < 0.5:
        change(path, mutate_lines, rng)
    else:
        change(f"{work}/sounds/talk.json", mutate_json, rng)
    with quiet():
        collect("conversations", path, f"{work}/out")
        list(read_manifest(f"{work}/out/manifest.jsonl"))


def talk(folder):
    duplex = DuplexModel.load(folder)
    duplex.converse(torch.zeros(1, 2 * FRAME))
    duplex.tokenizer.encode_ordinary("it is late  now aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!")
    duplex.tokenizer.decode(range(duplex.tokenizer.n_vocab))


def model_folder(world, work):
    return shutil.copytree(f"{world}/model", f"{work}/model")


def checkpoint(world, work, rng):
    folder = model_folder(world, work)
    change(f"{folder}/checkpoint.pt", mutate_checkpoint, rng)
    talk(folder)


def codec(world, work, rng):
    folder = model_folder(world, work)
    change(f"{folder}/codec.pt", mutate_checkpoint, rng)
    talk(folder)


def tokeniser(world, work, rng):
    if rng.random() < 0.5:
        folder = model_folder(world, work)
        change(f"{folder}/tokenizer.json", mutate_json, rng)
        return talk(folder)
    folder = shutil.copytree(f"{world}/release", f"{work}/release")
    change(f"{folder}/{rng.choice(('tokenizer.json', 'tokenizer_config.json'))}", mutate_json, rng)
    dump_tokenizer(get_tokenizer(folder, {}, 0))
    talk(folder)


def release(world, work, rng):
    folder = shutil.copytree(f"{world}/release", f"{work}/release")
    name, mutate = rng.choice((("config.json", mutate_json), ("config.json", mutate_json),
                               ("model.safetensors", mutate_safetensors), ("codec.pt", mutate_checkpoint)))
    change(f"{folder}/{name}", mutate, rng)
    if rng.random() < 0.1:
        with open(f"{folder}/model.safetensors.index.json", "wb") as f:
            f.write(mutate_json(b'{"weight_map": {"a": "model.safetensors", "b": "../x"}}', rng))
    talk(folder)


def mimi(world, work, rng):
    from test_mimi_reference import SMALL
    golden = os.path.join(ROOT, "tests", "golden", rng.choice(("mimi_kyutai", "mimi_transformers")))
    path = shutil.copy(f"{golden}/model.safetensors", f"{work}/mimi.safetensors")
    change(path, mutate_safetensors, rng)
    Mimi.from_pretrained(path, 8, SMALL).encode(torch.zeros(1, 1, 2 * FRAME))


def packed(world, work, rng):
    path = shutil.copy(f"{world}/packed.safetensors", f"{work}/packed.safetensors")
    unpack(change(path, mutate_safetensors, rng), f"{work}/out")
    talk(f"{work}/out")


def read_everything(folder):
    data = read_encoded(folder)
    for i in range(len(data)):
        for place in places(data.line(i)):
            data.codes(place)
    known = train.Conversations(folder)
    for layout in ("tts", "asr", "response_tts", "free_response_tts", "recorded"):
        stage = train.Stage("fuzz", 1, 2, 1e-3, 0, 48, {layout: (1, 1)})
        if known.holds(layout, "train", 48):
            known.batch(stage, 0.0, "train", random.Random(0))


def encoded(world, work, rng):
    folder = shutil.copytree(f"{world}/encoded", f"{work}/encoded")
    name = rng.choice(("meta.json", "00000.jsonl", "00000.jsonl", "00000.npy", "index.npy", "tokenizer.json"))
    mutate = {"json": mutate_json, "sonl": mutate_lines}.get(name[-4:], mutate_bytes)
    change(f"{folder}/{name}", mutate, rng)
    if name.endswith(".jsonl") and rng.random() < 0.8:  # an index that tells the same lies
        with contextlib.suppress(Exception):
            write_index(folder, 1)
    if name == "tokenizer.json":
        digest = sha256(f"{folder}/tokenizer.json")
        meta = json.load(open(f"{folder}/meta.json")) | {"tokenizer_sha256": digest}
        json.dump(meta, open(f"{folder}/meta.json", "w"))
    read_everything(folder)


def dialogues(world, work, rng):
    """Written dialogues, and voices for them; each turn is spoken in this process."""
    for name in ("dialogues.jsonl", "voices.txt"):
        shutil.copy(f"{world}/{name}", work)
    change(f"{work}/dialogues.jsonl", mutate_lines, rng)
    voices = f"{work}/voices.txt" if rng.random() < 0.7 else None
    if voices and rng.random() < 0.3:
        change(voices, mutate_bytes, rng)
    tts = f"cp {world}/sounds/a.wav {{out}}"
    _, jobs = read_dialogues(f"{work}/dialogues.jsonl", 2, voices, 1, tts)
    for _, texts, pauses, voice in jobs[:4]:
        speak(get_synthesiser(tts), texts, pauses, voice)


def testsets(world, work, rng):
    """What eval.py reads: questions, a manifest's recordings, conversations; and a training's log."""
    os.symlink(f"{world}/sounds", f"{work}/sounds")
    kind = rng.choice(("questions", "recordings", "conversations", "log"))
    if kind == "questions":
        path = shutil.copy(f"{world}/questions.jsonl", work)
        read_questions(change(path, mutate_lines, rng), f"cp {world}/sounds/a.wav {{out}}")
    elif kind == "recordings":
        change(shutil.copy(f"{world}/manifest.jsonl", work), mutate_lines, rng)
        read_recordings(work, ("user", "model", "either"))
    elif kind == "conversations":
        shutil.copytree(f"{world}/conversations", f"{work}/all")
        name = rng.choice((*LABELS, "ours/a/reply.jsonl", "ours/a/output.wav"))
        change(f"{work}/all/{name}", mutate_bytes if name[-1] in "lv" else mutate_json, rng)
        score_all(read_conversations(f"{work}/all"))
    else:
        path = change(shutil.copy(f"{world}/trained/log.jsonl", work), mutate_lines, rng)
        with quiet():
            list(map(losses_of, read_log(path).values()))


def resumed(world, work, rng):
    """A training that goes on, with its optimiser."""
    folder = shutil.copytree(f"{world}/trained", f"{work}/trained")
    change(f"{folder}/checkpoint.pt", mutate_checkpoint, rng)
    with quiet():
        train.train(task_of(world), STAGES, folder, resume=True)


def recogniser(world, work, rng):
    path = change(shutil.copy(SHIPPED, f"{work}/recogniser.safetensors"), mutate_safetensors, rng)
    load_recogniser(path, {"one"})


class WebServer:
    """live/web.py in a thread of this process; started by the first request."""
    started = None

    def __init__(self, world):
        from live import web  # needs an extra
        self.problems, self.ready = [], threading.Event()
        handler = logging.Handler()
        handler.emit = lambda record: self.problems.append(record.getMessage()[:200])
        handler.setLevel(logging.ERROR)
        for name in ("aiohttp", "asyncio"):
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).propagate = False
        log = lambda line: self.problems.append(line) if "\n" in line or len(line) > 300 else None
        limits = web.Limits(request=2.0, send=1.0, linger=1.0, idle=2.0)

        async def serve():
            server = web.Server(DuplexModel.load(f"{world}/model"), limits, "word", log)
            self.port = await server.start("127.0.0.1", 0)
            self.ready.set()
            await asyncio.sleep(1e9)
        threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
        self.ready.wait(60)

    def ask(self, data, patient):
        """What comes back in a moment."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as s:
            s.sendall(data)
            s.settimeout(5 if patient else 0.02)
            found = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                while block := s.recv(65536):
                    found += block
            return found


REQUESTS = (
    b"GET /?token=word HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"POST /lesson/recording?token=word&number=3 HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\n"
    b"Content-Length: 8\r\n\r\n12345678",
    b"POST /lesson?token=word HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4\r\nabcd\r\n0\r\n\r\n",
    b"GET /talk?token=word HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")


def web(world, work, rng):
    """Requests, and frames after a WebSocket's handshake; then the page must still be there."""
    server = WebServer.started = WebServer.started or WebServer(world)
    request = rng.choice(REQUESTS)
    if b"/talk" in request:
        payload = rng.choice((b"", rng.randbytes(4 + 2 * FRAME), rng.randbytes(100), b'{"type":"restart"}'))
        size = len(payload)
        header = bytes([0x82, 128 + size]) if size < 126 else bytes([0x82, 254]) + size.to_bytes(2, "big")
        frame = header + bytes(4) + payload
        frame = frame if rng.random() < 0.1 else mutate_bytes(frame, rng)
        request = request if rng.random() < 0.7 else mutate_bytes(request, rng)
        request += frame * rng.choice((1, 1, 3))
    else:
        request = mutate_bytes(request, rng)
    with contextlib.suppress(ConnectionError):
        server.ask(request, patient=False)
    if rng.random() < 0.1 and b"<title>nanoFLM" not in server.ask(REQUESTS[0], patient=True):
        raise AssertionError("the page is gone")
    if server.problems:
        raise AssertionError(server.problems.pop())


READERS = {f.__name__: f for f in (sound, manifest, corpus, dialogues, testsets, checkpoint, resumed,
                                   codec, tokeniser, release, mimi, packed, recogniser, encoded, web)}


# ------------------------------------------------------------------------------------------------------------
# the table


def one(reader, world, seed, i):
    """One input: "read", "refused", or what went wrong."""
    rng = random.Random(f"{seed} {reader} {i}")
    where = lambda e: "{0.filename}:{0.lineno}".format(traceback.extract_tb(e.__traceback__)[-1])
    with tempfile.TemporaryDirectory() as work:
        try:
            READERS[reader](world, work, rng)
            return "read"
        except (ValueError, OSError) as e:
            said = str(e)
            if "\n" in said or len(said) > LONGEST or not said:
                return f"a message of {len(said)} letters in several lines: {said[:200]!r}"
            return "refused"
        except BaseException as e:  # tiktoken's panic is no Exception
            if isinstance(e, KeyboardInterrupt):
                raise
            return f"{type(e).__name__}: {str(e)[:150]!r} at {os.path.relpath(where(e), ROOT)}"


def child(reader, world, seed, first, last, pipe):
    torch.set_num_threads(1)
    faulthandler.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print
    for i in range(first, last):
        pipe.send((i, one(reader, world, seed, i), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10))
    pipe.close()


def fuzz(reader, world, seed, first, inputs, seconds):
    """Inputs first, first + 1, ... in processes of their own: {"read", "refused", "tracebacks", "hangs": how
    many; "memory": MiB at most, "worst": seconds}, and the lines about what went wrong."""
    fork, last, i = multiprocessing.get_context("fork"), first + inputs, first
    found, wrong = dict.fromkeys(("read", "refused", "tracebacks", "hangs", "memory"), 0) | {"worst": 0.0}, []
    while i < last:
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=child, args=(reader, world, seed, i, last, theirs), daemon=True)
        process.start()
        theirs.close()
        begin = time.monotonic()
        while i < last:
            if not ours.poll(seconds):
                found["hangs"] += 1
                wrong.append(f"{reader} {i}: took over {seconds:g} s")
                break
            try:
                i, outcome, memory = ours.recv()
            except EOFError:
                found["tracebacks"] += 1
                process.join()
                wrong.append(f"{reader} {i}: the process ended with {process.exitcode}")
                break
            if outcome not in ("read", "refused"):
                wrong.append(f"{reader} {i}: {outcome}")
                outcome = "tracebacks"
            found[outcome] += 1
            found["memory"] = max(found["memory"], memory)
            found["worst"] = max(found["worst"], time.monotonic() - begin)
            begin, i = time.monotonic(), i + 1
        else:
            process.join()
            break
        process.kill()
        process.join()
        i += 1
    return found, wrong


def table(inputs, seed, only=None, first=0, seconds=20.0, show=print):
    """The counts of every reader: {reader: see fuzz}, shown as a table as they come."""
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        world = os.path.join(folder, "world")
        make_world(world)
        show(f"seed {seed}\n\n{'':12}  inputs    read refused tracebacks hangs  memory  slowest")
        for reader in only or READERS:
            results[reader], wrong = fuzz(reader, world, seed, first, inputs, seconds)
            found = results[reader]
            for line in wrong:
                show(f"  {line}")
            show(f"{reader:12} {inputs:7} {found['read']:7} {found['refused']:7} {found['tracebacks']:10} "
                 f"{found['hangs']:5} {found['memory']:4} MiB {found['worst']:6.1f} s")
    return results


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--inputs", type=int, default=2000, help="for each reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help=f"some of {', '.join(READERS)}, with commas")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seconds", type=float, default=20.0, help="that an input may take")
    args = parser.parse_args()
    found = table(args.inputs, args.seed, args.only and args.only.split(","), args.first, args.seconds)
    bad = sum(f["tracebacks"] + f["hangs"] for f in found.values())
    print(f"\n{bad} of {args.inputs * len(found)} inputs were neither read nor refused in one line")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
