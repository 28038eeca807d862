"""An audio file to be written, checked before the work that fills it."""
import os

import soundfile


def check_output(path):
    """ValueError or OSError if write_audio(path, ...) could not succeed. Makes the folder if there is
    none."""
    if not soundfile.check_format(os.path.splitext(path)[1][1:].upper()):
        raise ValueError(f"{path}: cannot write this kind of file; use an ending such as .wav or .flac")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a folder; name a file")
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder}: no permission to write there")
