"""Many processes, one training: each holds a slice of every parameter, gradient and optimiser state (FSDP2, ZeRO-3).

    torchrun --nproc_per_node 8 train.py --config 7b --init Qwen2.5-VL-7B-Instruct --data data/mine/encoded

    parameter (rows, ...)     process 0: rows 0..r-1, process 1: rows r..2r-1, ...      float32, updated there
    a block is computed       gathered whole in bfloat16, used, dropped again
    its gradients             summed over the processes in float32, each keeping its rows

A batch is cut into slices that do not depend on the number of processes, so two processes follow one process's losses, and a
checkpoint of two goes on with one or three. Without torchrun nothing here happens.
"""
import os
import shutil

import torch
import torch.distributed as dist  # its parts are imported where they are used: they take a second, also of who has one process

from files.atomic import replace_when_done
from files.checkpoint import load_checkpoint


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
        dist.destroy_process_group()


def is_distributed():
    return dist.is_initialized()


def rank():
    return dist.get_rank() if is_distributed() else 0


def world():
    return dist.get_world_size() if is_distributed() else 1


def place(model, device, bf16):
    """Give a model that was made on the meta device memory on `device`: all of it, or this process's slices of it. It is not
    filled yet: see fill."""
    if is_distributed():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(torch.device(device).type, (world(),))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        for block in (*model.blocks, model.depth):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    if torch.device(device).type == "cuda":
        for block in model.blocks:
            block.compile()
    return model.to_empty(device=device)


def reshard(model):
    """Drop what is still gathered whole from the last forward pass: the model's parameters are slices again."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def is_slice(x):
    """Whether a tensor is a DTensor, of which this process holds some rows."""
    return hasattr(x, "placements")


def gather(x):
    """The whole of a tensor, of which this process may hold a slice."""
    return x.full_tensor() if is_slice(x) else x


def shard_like(x, values):
    """Of the whole, `values`, the slice that x is."""
    if not is_slice(x):
        return values
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(values.to(x.device, x.dtype), x.device_mesh, x.placements, src_data_rank=None)


@torch.no_grad()
def fill(parameter, values):
    """Set a parameter, or the slice of it that is here, from all of its values."""
    parameter.copy_(shard_like(parameter, values))


def mean(values):
    """The mean over all processes of a float32 tensor."""
    if is_distributed():
        dist.all_reduce(values, dist.ReduceOp.SUM)
    return values / world()


def any_of(here):
    """Whether `here` is true in any process; all learn the same."""
    if not is_distributed():
        return here
    flag = torch.tensor(float(here), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints in slices: out/shards-00000012/0-of-2.pt, 1-of-2.pt. A file holds each tensor's rows of one process; put one
# after another they are the whole. The newest folder without ".partial" in its name counts.


def local(x):
    return x.to_local() if is_slice(x) else x


def newest(out):
    found = sorted(f for f in os.listdir(out) if f.startswith("shards-") and not f.endswith(".partial")) if os.path.isdir(out) else []
    return os.path.join(out, found[-1]) if found else None


def save(out, number, tensors, facts):
    """Every process: write its part of `tensors` {name: parameter or state} and the facts, which are the same in all."""
    folder = os.path.join(out, f"shards-{number:08}")
    error = ""
    try:
        os.makedirs(folder + ".partial", exist_ok=True)
        with replace_when_done(os.path.join(folder + ".partial", f"{rank()}-of-{world()}.pt")) as temporary:
            torch.save({"kind": "shard", "facts": facts, "tensors": {name: local(x).cpu() for name, x in tensors.items()}}, temporary)
    except (OSError, RuntimeError) as e:  # so torch tells of a full disk
        error = str(e).splitlines()[0]
    if any_of(bool(error)):  # nobody goes on alone
        raise OSError(f"{folder}: could not be written; is the disk full? {error or '(in another process)'}")
    if rank() == 0:
        before = newest(out)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(folder + ".partial", folder)
        if before and before != folder:
            shutil.rmtree(before)
    dist.barrier()


def read(folder):
    """(facts, the tensors of each file in order), memory-mapped."""
    names = sorted(os.listdir(folder), key=lambda name: int(name.split("-")[0]))
    files = [load_checkpoint(os.path.join(folder, name), "shard", mmap=True) for name in names]
    if not files or len(files) != int(names[0].split("-of-")[1].split(".")[0]):
        raise ValueError(f"{folder}: some of its files are missing")
    return files[0]["facts"], [f["tensors"] for f in files]


@torch.no_grad()
def restore(files, tensors):
    """Every process: its rows of each tensor, from however many files."""
    for name, x in tensors.items():
        mine, parts = local(x), [f[name] for f in files]
        if mine.ndim == 0:
            mine.copy_(parts[0])
            continue
        rows = sum(len(p) for p in parts)
        at = min(rows, rank() * -(-rows // world())) if is_slice(x) else 0
        if tuple(x.shape) != (rows, *parts[0].shape[1:]):
            raise ValueError(f"{name}: is {(rows, *parts[0].shape[1:])} in the checkpoint, {tuple(x.shape)} here")
        begin = 0
        for p in parts:
            a, b = max(begin, at), min(begin + len(p), at + len(mine))
            if a < b:
                mine[a - at:b - at] = p[a - begin:b - begin]
            begin += len(p)


def whole(files, prefix):
    """The tensors whose names begin so, put together: (the rest of the name, tensor), ..."""
    for name in files[0]:
        if name.startswith(prefix):
            yield name.removeprefix(prefix), torch.cat([f[name] for f in files])
