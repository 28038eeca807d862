"""Files and folders that appear whole or not at all, and JSON with clear errors."""
import contextlib
import json
import os
import re
import secrets
import shutil


@contextlib.contextmanager
def replace_when_done(path, flush=True):
    """`with replace_when_done(path) as temporary:` write the temporary file. If all went well it is flushed
    to the disk and replaces `path`; if not, it is removed. Its random name is safe even between containers
    that share the folder. flush=False: for one of many small files in a folder that move_folder flushes (it
    saves 5 ms a file)."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        if flush:
            with open(temporary, "rb+") as f:  # Windows flushes only files that are open for writing
                os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def check_folder(out, ours="", replace=False):
    """Check that a folder can be written, before hours of work go into it. Returns `out` without a slash at
    its end, and the folder out.partial to work in, which then becomes `out`. What a killed run left in
    out.partial and, with replace, `out` itself will be deleted: they may only hold names of the pattern
    `ours`. Raises ValueError."""
    out = os.path.normpath(out)
    if os.path.lexists(out) and not replace:
        raise ValueError(f"{out}: is there already; remove it, or name another folder with --out")
    parent = os.path.dirname(os.path.abspath(out))
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise ValueError(f"{parent}: is not a folder that can be written to")
    for folder in filter(os.path.lexists, (out, out + ".partial")):
        if os.path.islink(folder) or not os.path.isdir(folder):
            raise ValueError(f"{folder}: is a link or a file, where a folder will be written; remove it")
        for name in sorted(os.listdir(folder)):
            if not re.fullmatch(rf"({ours})(\..+\.tmp)?", name):
                raise ValueError(f"{folder}: would be deleted, but {name} in it is not ours; move it away")
    return out, out + ".partial"


def move_folder(work, out):
    """What is done in the folder `work`, flushed to the disk, becomes `out`, in place of what was there."""
    if hasattr(os, "sync"):  # not on Windows
        os.sync()
    shutil.rmtree(out, ignore_errors=True)
    os.rename(work, out)


def write_text(path, text):
    with replace_when_done(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.write(text)


def copy(source, target):
    with replace_when_done(target) as temporary:
        shutil.copyfile(source, temporary)


def read_json(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise ValueError(f"{path}: is not JSON ({e})") from None
