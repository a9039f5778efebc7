"""Runs a computation in fp64 and in fp32: the distance of the two shows how far rounding may move any fp32 program, on any
processor."""
import torch


def in_both_dtypes(compute):
    """Returns the tensors of `compute(dtype)` in fp64 under their names, and those in fp32 as fp32.<name>."""
    out = {}
    for dtype, prefix in ((torch.float64, ""), (torch.float32, "fp32.")):
        torch.set_default_dtype(dtype)
        out |= {prefix + name: value.detach().contiguous() for name, value in compute(dtype).items()}
    return out


def cast(tensors, dtype):
    """Returns the tensors by name, with floating-point ones in this dtype."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
