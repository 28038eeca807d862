"""Compiles a .cu file to a shared library for ctypes, on first use (seconds), and keeps it in the user's
cache folder. nvcc builds it for this process's GPU. For tests, g++ builds it for the CPU, with cpu.h in
CUDA's place. Conversations and the laboratory both use it."""
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
            raise OSError(f"CUDA error {error}; is the driver older than nvcc?")
        return lib
    except (OSError, subprocess.CalledProcessError) as e:
        why = e.stderr.strip() if isinstance(e, subprocess.CalledProcessError) else e
        warnings.warn(f"kernels/{name}.cu is not used, PyTorch does its work: {why}")


def nvcc():
    """Path of the CUDA compiler: from PATH, or else where CUDA installs it, which may not exist."""
    return shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")


def gpu_command(arch=None):
    """nvcc for the current GPU, or for an architecture such as "sm_90"."""
    arch = arch or "sm_%d%d" % torch.cuda.get_device_capability()
    return [nvcc(), "-arch", arch, "-std=c++17", "-O3", "-Xcompiler", "-fPIC"]


def build(name, command):
    """Path of the library that the command builds from kernels/<name>.cu. A cached one is not rebuilt.
    OSError if the compiler is missing or the folder is not writable, CalledProcessError if it fails."""
    source = Path(HERE, f"{name}.cu")
    texts = [file.read_bytes() for file in sorted(Path(HERE).iterdir()) if file.suffix in (".cu", ".h")]
    key = hashlib.sha256(b"\0".join([*texts, *map(str.encode, command)])).hexdigest()[:16]
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanoflm")
    path = os.path.join(folder, f"{name}-{key}.so")
    if not os.path.exists(path):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # renamed when complete
            made = os.path.join(temporary, "made.so")
            command = [*command, "-shared", "-o", made, source]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, path)
    return path


def launch(function, args, tensor, *more):
    """Calls a library's function(args, *more, stream) on the tensor's device and its current stream.
    RuntimeError if the launch fails."""
    with torch.cuda.device_of(tensor):
        stream = torch.cuda.current_stream().cuda_stream if tensor.is_cuda else None
        error = function(ctypes.byref(args), *more, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"{function.__name__}: CUDA error {error}")


def fields(*kinds):
    """_fields_ of a ctypes.Structure, of (type, "names in this order"), ..."""
    return [(name, kind) for kind, names in kinds for name in names.split()]
