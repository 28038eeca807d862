"""The device that --device names, checked before any work."""
import torch


def check_device(name):
    """"cpu", "cuda" or "cuda:1" -> torch.device. ValueError, in one line, for any other and for a GPU that
    is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: unknown; use cpu or cuda (of several GPUs cuda:0, cuda:1, ...)")
    if device.type == "mps":  # positions are turned to angles in float64, sampling too counts in it
        raise ValueError(f"--device {name}: not supported, it has no float64; use cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} finds no CUDA GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPU(s), counted from 0")
    return device
