"""Files and folders that appear whole or not at all, and JSON with clear errors."""
import contextlib
import os
import re
import secrets
import shutil
import time

import numpy as np

from files.fields import one_line, parse_json


@contextlib.contextmanager
def replace_when_done(path, flush=True):
    """`with replace_when_done(path) as temporary:` write the temporary file. If all went well it is flushed
    to the disk and replaces `path`; if not, it is removed. Its random name is safe even between containers
    that share the folder. flush=False: for one of many small files in a folder that move_folder flushes (it
    saves 5 ms a file). What killed processes have left of the same file is removed."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    if flush:
        remove_leftovers(path)
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


def remove_leftovers(path):
    """Temporary files of `path` that nobody has written to for an hour."""
    folder, name = os.path.split(os.path.abspath(path))
    for other in os.listdir(folder):
        if other.startswith(name) and re.fullmatch(r"\.[0-9a-f]{16}\.tmp", other[len(name):]):
            with contextlib.suppress(OSError):  # another process may be faster
                if time.time() - os.path.getmtime(os.path.join(folder, other)) > 3600:
                    os.remove(os.path.join(folder, other))


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


def read_json(path, longest=1 << 24):
    """Of a file of at most `longest` bytes: what is read takes up to twenty times as many."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    if os.path.getsize(path) > longest:
        raise ValueError(f"{path}: is larger than {longest} bytes")
    try:
        with open(path, encoding="utf-8") as f:
            return parse_json(f.read())
    except ValueError as e:
        raise ValueError(f"{path}: is not JSON ({e})") from None


def read_array(path, mend):
    """What np.save wrote, without running code, and never more than the file holds. Raises ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return np.array(np.load(path, allow_pickle=False, mmap_mode="r"))
    except Exception as e:  # its header is a Python literal, and fails as such in many ways
        raise ValueError(f"{path}: damaged; {mend} ({type(e).__name__}: {one_line(e)})") from None
