"""Many processes, one training: each holds a shard of every parameter, gradient and optimiser state (FSDP2,
ZeRO-3).

    torchrun --nproc_per_node 8 train.py --config 7b --init Qwen2.5-VL-7B-Instruct --data data/mine/encoded

    parameter (rows, ...)     process 0: rows 0..r-1, process 1: rows r..2r-1, ...      float32, updated there
    a block is computed       gathered whole in bfloat16, used, dropped again
    its gradients             summed over the processes in float32, each keeping its rows

The rows of a batch do not depend on the number of processes. So two processes follow one process's losses,
to rounding in float32, and a checkpoint of two goes on with one or three. Without torchrun nothing here
happens.
"""
import os
import re
import shutil
import time

import torch
import torch.distributed as dist  # its parts are imported where they are used: they take a second to load

from files.atomic import replace_when_done
from files.checkpoint import check_archive, check_weights, from_fields, load_checkpoint
from files.encoded import sha256
from model import FLM, FLMConfig


def begin(device):
    """Join the processes that torchrun started, if it did. Returns the device that this one computes on."""
    if int(os.environ.get("WORLD_SIZE", 0)) < 1 or "RANK" not in os.environ:
        return device
    if device != "cpu":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    return device


def end():
    if is_distributed():
        # A thread of gloo may still hold the last collective's tensors. To let go of them it needs Python's
        # lock; if it asked while Python is exiting, the process would abort.
        time.sleep(0.2)
        dist.destroy_process_group()


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if is_distributed() else 0


def world_size():
    return dist.get_world_size() if is_distributed() else 1


# ------------------------------------------------------------------------------------------------------------
# a model in shards


def build(config, place=None, seed=0, given=()):
    """A new model. It is made without memory; place(model) gives it some (default: on the CPU), and only then
    is it filled, so it never exists twice. given: names of parameters that the caller fills."""
    with torch.device("meta"):
        model = FLM(config)
    model = place(model) if place else model.to_empty(device="cpu")
    model.init_weights(seed, given, assign_shard)
    return model


def build_from_checkpoint(folder, meta, place):
    """The model that train.py wrote to a folder. meta: of the encoded data, made with the same codec and
    tokeniser. Raises ValueError or OSError with the file's name."""
    for name, file in (("codec", "codec.pt"), ("tokenizer", "tokenizer.json")):
        path = os.path.join(folder, file)
        if sha256(path) != meta[name + "_sha256"]:
            raise ValueError(f"{path}: the data was encoded with another {name}; encode it with --codec "
                             f"{folder}/codec.pt --tokenizer {folder}")
    path = os.path.join(folder, "checkpoint.pt")
    saved = load_checkpoint(path, "flm", mmap=True)
    config = from_fields(FLMConfig, saved["config"], path)
    with torch.device("meta"):
        check_weights(FLM(config), saved["model"], path)
    model = build(config, place, given=saved["model"])
    for name, p in model.named_parameters():
        assign_shard(p, saved["model"][name])
    return model


def shard_and_allocate(model, device, bf16):
    """Give a model on the meta device memory on `device`: all of it, or this process's shards. It is not
    filled yet."""
    if is_distributed():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(torch.device(device).type, (world_size(),))
        # Inputs are not cast: the cos and sin of rotary embedding stay float32, as on a single process.
        dtype = torch.bfloat16 if bf16 else None
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in (*model.blocks, model.depth):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    if torch.device(device).type == "cuda":
        for block in model.blocks:
            block.compile()
        model.depth.losses = torch.compile(model.depth.losses, dynamic=True)  # of any number of frames
    return model.to_empty(device=device)


def reshard(model):
    """Drop what is still gathered from the last forward pass: the model's parameters are shards again."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def is_sharded(x):
    """Whether a tensor is a DTensor, of which this process holds some rows."""
    return hasattr(x, "placements")


def local(x):
    return x.to_local() if is_sharded(x) else x


def gather(x):
    """The whole of a tensor, of which this process may hold a shard."""
    return x.full_tensor() if is_sharded(x) else x


def shard_like(x, values):
    """Of the whole, `values`, the shard that x is."""
    if not is_sharded(x):
        return values
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(values.to(x.device, x.dtype), x.device_mesh, x.placements, src_data_rank=None)


@torch.no_grad()
def assign_shard(parameter, values):
    """Set a parameter, or the shard of it that is here, from all of its values."""
    parameter.copy_(shard_like(parameter, values))


def all_sum(values):
    """The sum of a tensor over all processes."""
    if is_distributed():
        dist.all_reduce(values, dist.ReduceOp.SUM)
    return values


def any_of(here):
    """Whether `here` is true in any process; all learn the same."""
    if not is_distributed():
        return here
    flag = torch.tensor(float(here), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def barrier():
    if is_distributed():
        dist.barrier()


# ------------------------------------------------------------------------------------------------------------
# sharded checkpoints: out/shards-00000012/0-of-2.pt, 1-of-2.pt. A file holds each tensor's rows of one
# process; one after another they are the whole. Not torch.distributed.checkpoint: it unpickles its metadata,
# and here nothing is unpickled.

FOLDER, FILE = re.compile(r"shards-(\d{8})"), re.compile(r"(\d+)-of-(\d+)\.pt")


def newest(out):
    """The newest whole sharded checkpoint in a folder, or None; one set aside (.old) if it is alone."""
    names = os.listdir(out) if os.path.isdir(out) else []
    found = sorted(f for f in names if FOLDER.fullmatch(f)) or \
        sorted(f for f in names if re.fullmatch(FOLDER.pattern + r"\.old", f))
    return os.path.join(out, found[-1]) if found else None


def save(out, number, tensors, facts):
    """Every process: write its part of `tensors` {name: parameter or state} and the facts, which are the same
    in all. The checkpoint before is there until the new one is whole on the disk, read back, and in its
    place."""
    folder = os.path.join(out, f"shards-{number:08}")
    partial = folder + ".partial"
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed save has left
        os.makedirs(partial, exist_ok=True)
    barrier()
    error = ""
    try:
        with replace_when_done(os.path.join(partial, f"{rank()}-of-{world_size()}.pt")) as temporary:
            parts = {name: local(x).detach().cpu() for name, x in tensors.items()}
            torch.save({"kind": "shard", "facts": facts, "tensors": parts}, temporary)
    except (OSError, RuntimeError) as e:  # a full disk is a RuntimeError in torch
        error = str(e).splitlines()[0]
    barrier()
    if rank() == 0 and not error:
        try:
            read(partial)
        except ValueError as e:
            error = str(e)
    if any_of(bool(error)):  # none goes on alone
        raise OSError(f"{folder}: could not be written; is the disk full? {error or '(in another process)'}")
    if rank() == 0:
        before = [f for f in os.listdir(out) if FOLDER.fullmatch(f)]
        if os.path.exists(folder):
            os.rename(folder, folder + ".old")
        os.rename(partial, folder)
        for name in os.listdir(out):
            older = name in before and name != os.path.basename(folder)
            if older or re.fullmatch(FOLDER.pattern + r"\.(old|partial)", name):
                shutil.rmtree(os.path.join(out, name), ignore_errors=True)
    barrier()


def read(folder):
    """(facts, the tensors of each file in order), memory-mapped. Raises ValueError if one is missing or cut
    off."""
    found = sorted(tuple(map(int, m.groups())) for m in map(FILE.fullmatch, os.listdir(folder)) if m)
    if not found or found != [(i, found[0][1]) for i in range(found[0][1])]:
        raise ValueError(f"{folder}: some of its files are missing")
    files = [load_checkpoint(os.path.join(folder, f"{i}-of-{n}.pt"), "shard", mmap=True) for i, n in found]
    return files[0]["facts"], [f["tensors"] for f in files]


def check(folder):
    """ValueError in every process if the checksums of a file are wrong; each reads some of them."""
    bad = ""
    for name in sorted(filter(FILE.fullmatch, os.listdir(folder)))[rank()::world_size()]:
        try:
            check_archive(os.path.join(folder, name))
        except Exception as e:  # zipfile has no one class for a damaged file
            bad = f"{name}: {e}"
    if any_of(bool(bad)):
        raise ValueError(f"{folder}: damaged ({bad or 'another process tells where'})")


@torch.no_grad()
def restore(files, tensors):
    """Every process: its rows of each tensor, from however many files."""
    for name, x in tensors.items():
        mine, parts = local(x), [f[name] for f in files]
        if mine.ndim == 0:
            mine.copy_(parts[0])
            continue
        rows = sum(len(p) for p in parts)
        first = min(rows, rank() * -(-rows // world_size())) if is_sharded(x) else 0
        if tuple(x.shape) != (rows, *parts[0].shape[1:]):
            saved = (rows, *parts[0].shape[1:])
            raise ValueError(f"{name}: is {saved} in the checkpoint, {tuple(x.shape)} here")
        begin = 0
        for p in parts:
            a, b = max(begin, first), min(begin + len(p), first + len(mine))
            if a < b:
                mine[a - first:b - first] = p[a - begin:b - begin]
            begin += len(p)


def whole(files, prefix):
    """The tensors whose names begin with prefix, put together: (the rest of the name, tensor), ..."""
    for name in files[0]:
        if name.startswith(prefix):
            yield name.removeprefix(prefix), torch.cat([f[name] for f in files])
