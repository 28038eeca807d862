"""Checkpoints and weights. No code in a file is ever run, and no file makes us allocate more than it holds:

    1. its header     a zip of stored parts, a pickle that names tensors only; or the header of safetensors
    2. its config     every number within BOUNDS
    3. its tensors    their names and shapes are those of a model without memory (PyTorch's "meta" device)
    4. the model      gets its memory now
"""
import dataclasses
import os
import pickletools
import re
import zipfile

import torch

from files.atomic import replace_when_done
from files.fields import FLAG, check_fields, list_of, number, one_line, short, text, whole

# What a checkpoint's pickle may name: tensors and plain containers. torch.load(weights_only=True) also knows
# functions that allocate what they are asked for.
NAMES = re.compile(r"collections OrderedDict|__builtin__ set"
                   r"|torch (\w+Storage|Size|device|b?float\w+|u?int\d+|bool)"
                   r"|torch\._utils _rebuild_(tensor_v2|parameter|wrapper_subclass)"
                   r"|torch\._tensor _rebuild_from_type_v2"
                   r"|torch\.serialization _get_layout|torchao\.\S+ \w+")
PICKLE = 1 << 21  # bytes of it, at most
CACHE = 1 << 27  # numbers that a conversation may keep, or as many as there are weights
CODES = 8  # in a frame, of every model
CHECKED = 1 << 31  # of larger files, checksums are compared only where all of the file is read

BOUNDS = {  # of the numbers in a config
    **dict.fromkeys(("layers", "depth_layers", "encoder_layers", "decoder_layers"), whole(0, 512)),
    **dict.fromkeys(("width", "depth_width", "dim", "codebook_dim"), whole(1, 1 << 15)),
    **dict.fromkeys(("heads", "kv_heads", "depth_heads", "blocks", "codebooks"), whole(1, 256)),
    "mlp": whole(1, 1 << 17), "context": whole(1, 1 << 16),
    "frontend": ("seanet or spectral", lambda x: x in ("seanet", "spectral")),
    "vocab_size": whole(1, 1 << 21), "codebook_size": whole(2, 1 << 15), "empty": whole(2, 1 << 15),
    "ratios": list_of(whole(1, 960), 16), "tied": FLAG,
    "rope_base": number(1, 1e9), "norm_eps": number(1e-12, 1),
    "input_scale": number(-1e4, 1e4), "output_scale": number(-1e4, 1e4),
    "text_size": whole(1, 1 << 21), **dict.fromkeys(("wait", "asr", "answer"), whole(-1, 1 << 21)),
    "silence": list_of(list_of(whole(0, 1 << 15), 256), 1000)}


def save_checkpoint(path, kind, config, **parts):
    with replace_when_done(path) as temporary:
        try:
            torch.save({"kind": kind, "config": dataclasses.asdict(config), **parts}, temporary)
        except RuntimeError as e:  # so torch tells of a full disk
            reason = str(e).splitlines()[0]
            raise OSError(f"{path}: could not be written; is the disk full? ({reason})") from None


def load_checkpoint(path, kind, mmap=False):
    """What save_checkpoint wrote, or (mmap) what reads it from the disk as it is needed, unchecked if it is
    large. Never runs code from the file. Raises ValueError or OSError with the file's name."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        check_archive(path, os.path.getsize(path) < CHECKED or not mmap)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # torch has no one class for a damaged file
        reason = str(e) if type(e) is ValueError else type(e).__name__
        raise ValueError(f"{path}: not a checkpoint, or cut off ({one_line(reason)})") from None
    if not isinstance(saved, dict) or saved.get("kind") != kind:
        found = short(saved.get("kind")) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path}: is not a {kind} checkpoint but {found}")
    needed = {"flm": ("config", "model", "vocab"), "codec": ("config", "model")}.get(kind, ())
    for name in needed:
        if not isinstance(saved.get(name), dict):
            raise ValueError(f"{path}: holds no {name}")
    return saved


def layouts_of(folder):
    """Names of the layouts that the model in a folder was trained on; none if its checkpoint does not say."""
    path = os.path.join(folder, "checkpoint.pt")
    if not os.path.exists(path):  # a published model
        return []
    saved = load_checkpoint(path, "flm", mmap=True)
    try:
        names = {name for stage in saved.get("stages", ()) for name in stage["layouts"] or ()}
        names = sorted(names.union(saved.get("layouts", ())))
        check_fields({"layouts": names}, {"layouts": list_of(text(100), 100)})
        return names
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path}: its stages are not what train.py writes") from None


def check_archive(path, checksums=True):
    """ValueError unless a file is what torch.save writes: a zip whose parts are as large as they say, with
    the right checksums, and a pickle of tensors among them."""
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or \
                sum(part.file_size for part in parts) > size:
            raise ValueError("its parts are larger than the file")
        if checksums and (bad := archive.testzip()):
            raise ValueError(f"its part {bad} is damaged")
        pickles = [part for part in parts if part.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > PICKLE:
            raise ValueError("its pickle is missing or too large")
        for op, name, _ in pickletools.genops(archive.read(pickles[0])):
            if "GLOBAL" in op.name and not NAMES.fullmatch(name or ""):
                raise ValueError(f"its pickle names {name}")
            if "GLOBAL" in op.name and name.startswith("torchao"):
                know_eight_bits()


def know_eight_bits():
    """torchao tells PyTorch of its tensors when it is imported. ValueError without it."""
    try:
        import torchao.optim  # noqa: F401
    except ImportError:
        raise ValueError("its optimiser's states have 8 bits: pip install '.[eightbit]'") from None


def from_fields(cls, fields, where):
    """A config from the names and values of its fields; one that is unknown, missing or out of its bounds is
    an error that names it."""
    names = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(fields, dict) or set(fields) != names:
        odd = sorted(map(str, set(fields) ^ names)) if isinstance(fields, dict) else fields
        raise ValueError(f"{where}: {cls.__name__} has unknown or missing keys: {short(odd)}")
    try:
        check_fields(fields, {name: BOUNDS[name] for name in names}, what=cls.__name__)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def check_weights(module, weights, where):
    """ValueError unless {name: tensor} are the parameters and buffers of a module, which may have no memory
    yet, and the file `where` is large enough to hold them."""
    expected = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    odd = [one_line(name, 100) for name in sorted(map(str, expected.keys() ^ weights.keys()))]
    for name, x in () if odd else weights.items():
        if not torch.is_tensor(x) or not x.is_floating_point() or x.layout != torch.strided \
                or tuple(x.shape) != expected[name]:
            found = f"{tuple(x.shape)} of {x.dtype}" if torch.is_tensor(x) else short(x)
            odd = [f"{name} is {found}, not {expected[name]}"]
            break
    if odd:
        raise ValueError(f"{where}: its tensors are not those of its config: {odd[0]}"
                         + (f" and {len(odd) - 1} more" if odd[1:] else ""))
    # twice: tied weights are there once
    if sum(x.numel() * x.element_size() for x in weights.values()) > 2 * os.path.getsize(where):
        raise ValueError(f"{where}: its tensors are larger than the file")
    if cache_of(module.config) > max(CACHE, sum(x.numel() for x in weights.values())):
        raise ValueError(f"{where}: a conversation would take more memory than all its weights")


def cache_of(c):
    """How many numbers the keys and values of a conversation are, for the config of a model or of a codec."""
    layers = c.layers if hasattr(c, "layers") else c.encoder_layers + c.decoder_layers
    width = c.width * c.kv_heads // c.heads if hasattr(c, "kv_heads") else c.dim
    return 2 * layers * width * c.context


def load_weights(module, weights, where):
    """Copy {name: tensor} into a module. ValueError if they are not its own, or not numbers."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as e:
        raise ValueError(f"{where}: its tensors are not those of its config: {one_line(e)}") from None
    check_finite(module.state_dict(), where)


def check_finite(weights, where):
    for name, x in weights.items():
        if not torch.isfinite(x).all():
            raise ValueError(f"{where}: {name} holds NaN or infinity")


def check_vocab(v, config, where, frames=1):
    """ValueError unless a checkpoint's vocabulary is one of a model of this config, with `frames` of silence
    at least."""
    fits = v.text_size <= config.vocab_size and v.codebook_size <= v.empty == config.empty
    codes = [code for frame in v.silence for code in frame]
    if not fits or max(v.wait, v.asr, v.answer) >= v.text_size or v.wait < 0:
        raise ValueError(f"{where}: its vocabulary is not that of its config")
    if max(codes, default=0) >= v.codebook_size or {len(frame) for frame in v.silence} - {CODES} \
            or len(v.silence) < frames:
        raise ValueError(f"{where}: its silence is no frames of {CODES} codes below {v.codebook_size}")


def check_together(where, vocab, codec, tokenizer):
    """ValueError unless a model's vocabulary, its codec's config and its tokeniser belong together."""
    if (codec.codebooks, codec.codebook_size) != (CODES, vocab.codebook_size):
        raise ValueError(f"{where}: the model speaks {CODES} codes of {vocab.codebook_size} a frame, its "
                         f"codec has {codec.codebooks} of {codec.codebook_size}: it is another model's")
    if tokenizer.n_vocab != vocab.text_size:
        raise ValueError(f"{where}: the tokeniser has {tokenizer.n_vocab} tokens, the model "
                         f"{vocab.text_size}: it is another model's")


def is_safetensors(path):
    """By its beginning: eight bytes of length and a brace."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as f:
        return f.read(9)[8:] == b"{"


HEADER = 1 << 23  # bytes of a safetensors file's header, at most


def open_safetensors(path):
    """The file with its tensors still on the disk, see Tensors. Raises ValueError or OSError with the file's
    name."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f"{path}: needs the extra 'weights' to be read: pip install '.[weights]'") from None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, "rb") as f:
            if int.from_bytes(f.read(8), "little") > HEADER:
                raise ValueError(f"its header is longer than {HEADER} bytes")
        return Tensors(safe_open(path, "pt"), path)
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path}: not a safetensors file, or cut off ({one_line(e)})") from None


class Tensors:
    """An open safetensors file. A tensor is not larger than the file: the format sees to that."""

    def __init__(self, file, path):
        self.file, self.path = file, path

    def keys(self):
        return self.file.keys()

    def metadata(self):
        return self.file.metadata() or {}

    def shape(self, name):
        return tuple(self.file.get_slice(name).get_shape())

    def get_tensor(self, name):
        """ValueError if it is not of finite floating-point numbers."""
        try:
            x = self.file.get_tensor(name)
        except Exception as e:  # a kind of number that torch does not have: an AttributeError, TypeError, ...
            raise ValueError(f"{self.path}: {name} cannot be read ({type(e).__name__})") from None
        if not x.is_floating_point():
            raise ValueError(f"{self.path}: {name} is of {x.dtype}, not of floating-point numbers")
        check_finite({name: x}, self.path)
        return x
