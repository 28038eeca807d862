"""The flags of train.py: its own, and those from the fields of a config and of a stage, as --layers 6."""
import argparse
import dataclasses
import textwrap

import torch

from training import plan
from training.recompute import CHOICES

NOT_FLAGS = {"name", "layouts", "empty"}  # tables in the code, and what the data decides


def fields(cls):
    return {f.name: f.type for f in dataclasses.fields(cls) if f.name not in NOT_FLAGS}


def known(*classes):
    return ", ".join("--" + name.replace("_", "-") for cls in classes for name in fields(cls))


def describe(value):
    """The fields of a dataclass that are not at their defaults, on one line."""
    shown = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)
             if getattr(value, f.name) != f.default]
    return ", ".join(f"{name}={x}" for name, x in shown)


def build_parser(description, configs, *classes):
    """The flags of train.py. configs: the names of --config; classes: of a model's config and of a stage."""
    every = f"Every field of a config and of a stage is a flag too: {known(*classes)}. " \
            "(The codec's config has other fields; an unknown flag lists them.) --steps is for all stages " \
            "together, --lr is the highest rate; the others keep their proportion. --epochs is for each " \
            "stage, over what the data holds for it."
    parser = argparse.ArgumentParser(description=description, epilog=textwrap.fill(every, 100),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="tiny", choices=configs)
    add("--data", help="default: data/toy for the codec; for a model data/toy/encoded (several: with commas)")
    add("--out", help="default: out/CONFIG")
    add("--init", help="folder to start from: of a run of ours, such as out/tiny, whose codec and tokeniser "
                       "the data must be encoded with; or the published weights of Qwen2.5 or FLM-Audio")
    add("--lora", type=int, default=0, metavar="RANK",
        help="with --init: freeze the temporal transformer and train low-rank adapters, on a single process")
    add("--minutes", type=float, help="train about this long on this machine instead of the table's steps")
    add("--eight-bit", action="store_true", help="weights in bfloat16, optimiser in 8 bits: a third of "
                                                 "the memory, on a single process")
    add("--float8", action="store_true", help="products of the temporal transformer in eight bits, on GPUs "
                                              "that multiply them")
    add("--recompute", choices=CHOICES, help="what of each layer is computed again for the gradients instead "
                                             "of kept (default: all, for rows longer than 1024 frames)")
    add("--skip-broken", action="store_true", help="leave out the codec's recordings that are broken")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--save-every", type=float, default=60, help="seconds between checkpoints; more if saving takes over "
                                                     "5%% of the time")
    add("--precision", choices=("float32", "bfloat16"), help="of matrix products (default: bfloat16 where "
                                                             "the device has instructions for it)")
    add("--seed", type=int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--plan", action="store_true", help="train nothing: tell what it would take, on --gpus of --card")
    add("--gpus", type=int, default=1)
    add("--card", default="H100", choices=plan.BF16)
    add("--utilisation", type=float, help="share of the card's peak that --plan counts on (default: reckoned "
                                          "from data sheets)")
    return parser


def parse(text, kind, name):
    """text as a value of a field: an int, a float, a bool, a str, or a tuple of numbers with commas."""
    kind = kind if isinstance(kind, str) else kind.__name__
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "tuple":
            return tuple(float(x) if "." in x or "e" in x else int(x) for x in text.split(","))
        return {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        raise ValueError(f"--{name.replace('_', '-')} {text}: is not of type {kind}") from None


def check_alone(args, torchrun):
    """ValueError if what trains in a single process is to train in several, or what excludes each other."""
    if args.skip_broken and args.config != "codec":
        raise ValueError("--skip-broken is for the codec; for a model `prepare.py encode` has it")
    alone = {"the codec": args.config == "codec", "--eight-bit": args.eight_bit, "--lora": args.lora}
    alone = [name for name, given in alone.items() if given]
    if alone and torchrun:
        raise ValueError(f"{alone[0]} trains in one process, without torchrun")
    alone += ["--float8"] if args.float8 and alone else []
    alone += ["--recompute"] if args.recompute and args.config == "codec" else []
    if alone[1:]:
        raise ValueError(f"{' and '.join(alone)} do not go together")


def apply(config, stages, arguments):
    """(config, stages) with the fields that the arguments name. steps is for all stages together and lr the
    highest rate of them; the others keep their proportion. SystemExit for an unknown flag, ValueError for
    a value of another type."""
    ours, theirs = fields(type(config)), fields(type(stages[0]))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in {**ours, **theirs}:
        parser.add_argument("--" + name.replace("_", "-"))
    given, rest = parser.parse_known_args(arguments)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}; beside those of --help there are "
                     + known(type(config), type(stages[0])))
    given = {name: value for name, value in vars(given).items() if value is not None}
    values = {name: parse(value, {**theirs, **ours}[name], name) for name, value in given.items()}
    config = dataclasses.replace(config, **{name: value for name, value in values.items() if name in ours})
    for_stages = {name: value for name, value in values.items() if name in {*theirs} - {"steps", "lr"}}
    if "steps" in values:
        if "epochs" in values:
            raise ValueError("--steps and --epochs: give one of them")
        for_stages["epochs"] = 0.0
        share = values["steps"] / sum(s.steps for s in stages)
        stages = [dataclasses.replace(s, steps=max(1, round(s.steps * share))) for s in stages]
    if "lr" in values:
        factor = values["lr"] / max(s.lr for s in stages)
        stages = [dataclasses.replace(s, lr=s.lr * factor, lr_end=s.lr_end * factor) for s in stages]
    return config, tuple(dataclasses.replace(s, **for_stages) for s in stages)
