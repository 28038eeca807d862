"""Checkpoints and weights. No code in a file is ever run: torch.load(weights_only=True), safetensors."""
import dataclasses
import os

import torch

from files.atomic import replace_when_done


def save_checkpoint(path, kind, config, **parts):
    with replace_when_done(path) as temporary:
        try:
            torch.save({"kind": kind, "config": dataclasses.asdict(config), **parts}, temporary)
        except RuntimeError as e:  # so torch tells of a full disk
            reason = str(e).splitlines()[0]
            raise OSError(f"{path}: could not be written; is the disk full? ({reason})") from None


def load_checkpoint(path, kind, mmap=False):
    """What save_checkpoint wrote, or (mmap) what reads it from the disk as it is needed. Never runs code from
    the file. Raises ValueError or OSError with the file's name."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # torch has no one class for a damaged file
        raise ValueError(f"{path}: not a checkpoint, or cut off ({type(e).__name__})") from None
    if not isinstance(saved, dict) or saved.get("kind") != kind:
        found = saved.get("kind") if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path}: is not a {kind} checkpoint but {found}")
    return saved


def from_fields(cls, fields, where):
    """A config from the names and values of its fields; an unknown or missing one is an error that names
    it."""
    names = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(fields, dict) or set(fields) != names:
        odd = sorted(set(fields) ^ names) if isinstance(fields, dict) else fields
        raise ValueError(f"{where}: {cls.__name__} has unknown or missing keys: {odd}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def load_weights(module, weights, where):
    try:
        module.load_state_dict(weights)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"{where}: its tensors are not those of its config: {reason}") from None


def is_safetensors(path):
    """By its beginning: eight bytes of length and a brace."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as f:
        return f.read(9)[8:] == b"{"


def open_safetensors(path):
    """The file with its tensors still on the disk: keys(), get_tensor(name). Raises ValueError or OSError
    with the file's name."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f"{path}: needs the extra 'weights' to be read: pip install '.[weights]'") from None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: not a safetensors file, or cut off ({e})") from None
