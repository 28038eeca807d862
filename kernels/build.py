"""A .cu file as a shared library for ctypes: with nvcc for the GPU of this process, or, to test it, with g++
for the CPU, where cpu.h takes CUDA's place. Compiled on first use (seconds) and kept in the user's cache
folder."""
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
CPU = ["-x", "c++", "-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing",
       "-U_FORTIFY_SOURCE"]


@functools.cache
def library(name, device):
    """The library of kernels/<name>.cu for "cuda" or "cpu"; None, with a warning, if it cannot be built."""
    try:
        lib = ctypes.CDLL(build(name, gpu_command() if device == "cuda" else ["g++", *CPU]))
        if error := lib.usable():
            raise OSError(f"CUDA's error {error}; is the driver older than nvcc?")
        return lib
    except (OSError, subprocess.CalledProcessError) as e:
        why = e.stderr.strip() if isinstance(e, subprocess.CalledProcessError) else e
        warnings.warn(f"kernels/{name}.cu is not used, PyTorch does its work: {why}")


def gpu_command(arch=None):
    """nvcc for the present GPU, or for an architecture such as "sm_90"."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or os.path.join(home, "bin", "nvcc")
    arch = arch or "sm_%d%d" % torch.cuda.get_device_capability()
    return [nvcc, "-arch", arch, "-std=c++17", "-O3", "-Xcompiler", "-fPIC"]


def build(name, command):
    """Path of the library that the command makes of kernels/<name>.cu, made unless it is in the cache.
    OSError if there is no such compiler or no place to write, CalledProcessError if it fails."""
    texts = [Path(HERE, file).read_bytes() for file in (f"{name}.cu", "cpu.h")]
    key = hashlib.sha256(b"\0".join([*texts, *map(str.encode, command)])).hexdigest()[:16]
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanoflm")
    path = os.path.join(folder, f"{name}-{key}.so")
    if not os.path.exists(path):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # so that it appears whole or not at all
            made = os.path.join(temporary, "made.so")
            source = os.path.join(HERE, f"{name}.cu")
            command = [*command, "-shared", "-o", made, source]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, path)
    return path
