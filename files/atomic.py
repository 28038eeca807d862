"""Files that appear whole or not at all, and JSON with clear errors."""
import json
import os
import shutil


class replace_when_done:
    """`with replace_when_done(path) as temporary:` write the temporary file; it takes its place only if all went well."""

    def __init__(self, path):
        self.path, self.temporary = path, f"{path}.{os.getpid()}.tmp"

    def __enter__(self):
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        return self.temporary

    def __exit__(self, error, *_):
        if error is None:
            os.replace(self.temporary, self.path)
        elif os.path.exists(self.temporary):
            os.remove(self.temporary)


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
