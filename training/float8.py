"""Matrix products in eight bits (--float8): Hopper's and newer GPUs multiply them twice as fast as bfloat16.
The weights stay float32; both factors of a product are scaled and rounded when they meet, by torchao."""
import torch


def convert(flm, device, emulate=False):
    """Let the temporal transformer's linear layers multiply in float8, in place; names and weights stay. The
    text head and the depth transformer do not: their results are logits, or too small. emulate: the same
    rounding on any device, slowly. Raises ValueError where that cannot be done."""
    if not emulate and (torch.device(device).type != "cuda" or torch.cuda.get_device_capability() < (8, 9)):
        raise ValueError("--float8 needs a GPU that multiplies it (Ada, Hopper, Blackwell or newer)")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ValueError("--float8 needs the extra 'eightbit': pip install '.[eightbit]'") from None
    fits = lambda layer, name: layer.in_features % 16 == 0 == layer.out_features % 16
    convert_to_float8_training(flm.blocks, module_filter_fn=fits, config=Float8LinearConfig(emulate=emulate))
    return flm
