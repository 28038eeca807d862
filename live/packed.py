"""A model, its codec and its tokeniser in one small file, to be kept in a repository: half precision, without
the optimiser.

    python -m live.packed out/tiny talk.safetensors --note "trained by ..."    pack a folder
    python -m live.packed talk.safetensors out/talk                            and make a folder of it
    python -m live.packed talk.safetensors                                     what is in it

The folder is what train.py writes: chat.py talks with it, train.py --init goes on from it.
"""
import argparse
import dataclasses
import json
import os
import sys

import torch

from files.atomic import check_folder, move_folder, replace_when_done, write_text
from files.checkpoint import (check_together, check_vocab, check_weights, from_fields, load_checkpoint,
                              layouts_of, open_safetensors, save_checkpoint)
from files.fields import check_fields, list_of, one_line, parse_json, text
from files.tokenizer import LARGEST, load_tokenizer
from mimi import Mimi, MimiConfig
from model import FLM, FLMConfig
from streams import Vocab

PARTS = ("flm", "codec")
FOLDER = r"(checkpoint|codec)\.pt|tokenizer\.json"
FACTS = ("flm", "codec", "vocab", "tokenizer", "note")


def half(name, x):
    """The codebooks stay in full precision: rounding them would change codes."""
    return x if name.endswith(("embedding_sum", "cluster_usage")) else x.half()


def pack(folder, path, note):
    """A folder of train.py -> one file."""
    from safetensors.torch import save_file
    saved = {"flm": load_checkpoint(os.path.join(folder, "checkpoint.pt"), "flm"),
             "codec": load_checkpoint(os.path.join(folder, "codec.pt"), "codec")}
    with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as f:
        tokenizer = f.read()
    facts = {**{part: saved[part]["config"] for part in PARTS}, "vocab": saved["flm"]["vocab"],
             "tokenizer": tokenizer, "note": note, "layouts": layouts_of(folder)}
    tensors = {f"{part}.{name}": half(name, x).contiguous()
               for part in PARTS for name, x in saved[part]["model"].items()}
    with replace_when_done(path) as temporary:
        save_file(tensors, temporary, {name: json.dumps(fact) for name, fact in facts.items()})
    return sum(x.numel() for x in tensors.values())


def read_facts(path):
    """(the open file, {name: fact} of FACTS). Raises ValueError or OSError."""
    file = open_safetensors(path)
    try:
        facts = {name: parse_json(file.metadata()[name]) for name in FACTS}
        facts["layouts"] = parse_json(file.metadata().get("layouts", "[]"))  # older files do not say
        check_fields(facts, {"tokenizer": text(LARGEST), "note": text(), "layouts": list_of(text(100), 100)})
    except (KeyError, ValueError) as e:
        raise ValueError(f"{path}: is not what `python -m live.packed` writes ({one_line(e)})") from None
    return file, facts


def unpack(path, folder):
    """One file -> a folder as train.py writes it."""
    folder, work = check_folder(folder, FOLDER)
    file, facts = read_facts(path)
    configs = {"flm": from_fields(FLMConfig, facts["flm"], path),
               "codec": from_fields(MimiConfig, facts["codec"], path)}
    vocab = from_fields(Vocab, facts["vocab"], path)
    check_vocab(vocab, configs["flm"], path)
    weights = {part: {} for part in PARTS}
    for name in file.keys():
        part, _, name_in_part = name.partition(".")
        if part not in weights:
            raise ValueError(f"{path}: has a tensor {name}, which belongs to neither the model nor its codec")
        weights[part][name_in_part] = file.get_tensor(name).float()
    with torch.device("meta"):
        for part, module in ("flm", FLM), ("codec", Mimi):
            check_weights(module(configs[part]), weights[part], path)
    os.makedirs(work, exist_ok=True)
    write_text(os.path.join(work, "tokenizer.json"), facts["tokenizer"])
    tokenizer = load_tokenizer(os.path.join(work, "tokenizer.json"))  # raises an error if it is not one
    check_together(path, vocab, configs["codec"], tokenizer)
    save_checkpoint(os.path.join(work, "codec.pt"), "codec", configs["codec"], model=weights["codec"])
    save_checkpoint(os.path.join(work, "checkpoint.pt"), "flm", configs["flm"], model=weights["flm"],
                    vocab=dataclasses.asdict(vocab), layouts=facts["layouts"])
    move_folder(work, folder)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", help="a folder that train.py wrote, or a packed file")
    parser.add_argument("target", nargs="?", help="the file to write, or the folder")
    parser.add_argument("--note", default="", help="how the weights were made; is kept in the file")
    args = parser.parse_args()
    try:
        if os.path.isdir(args.source):
            if not args.target:
                raise ValueError("name the file to write")
            n = pack(args.source, args.target, args.note)
            size = os.path.getsize(args.target) / 1e6
            print(f"Wrote {args.target} ({n / 1e6:.2f} M numbers, {size:.1f} MB)")
        elif args.target:
            unpack(args.source, args.target)
            print(f"Wrote {args.target}; next: python chat.py --checkpoint {args.target} --web")
        else:
            file, facts = read_facts(args.source)
            print(f"{len(file.keys())} tensors; {facts['note']}")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
