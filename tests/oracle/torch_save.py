"""Saves the tensors of a safetensors file with torch.save, in every layout that a reader must support.

usage: torch_save.py PLAIN.safetensors FOLDER
FOLDER receives model.pth (the dictionary of a training with optimizer and arguments), state_dict.pth (an OrderedDict with
attributes), views.pth (transposed and offset views of shared storages, parameters), bfloat16.pth, legacy.pth (the format
before 1.6), protocol4.pth, and double.pth, path.pth, numpy.pth, which hold values that do not belong in a state dict.
"""
import argparse
import collections
import pathlib
import sys

import numpy
import torch
from safetensors.torch import load_file

plain, folder = sys.argv[1:3]
state = load_file(plain)
arguments = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.6, betas=(0.9, 0.95), none=None)


def save(name, value, **options):
    torch.save(value, f"{folder}/{name}.pth", **options)


save("model", {"model": state, "optimizer": {"state": {0: {"step": 7, "exp": torch.ones(3)}}}, "args": arguments})
ordered = collections.OrderedDict(state)
ordered._metadata = collections.OrderedDict([("", {"version": 1})])
save("state_dict", ordered)

shared = torch.cat([torch.zeros(3), *(value.flatten() for value in state.values())])
views, at = {}, 3
for name, value in state.items():
    view = shared[at : at + value.numel()].view(value.shape)
    at += value.numel()
    if value.ndim == 2:  # The same values in column-major layout.
        view = value.t().contiguous().t()
    views[name] = torch.nn.Parameter(view) if value.ndim == 1 else view
save("views", {"state_dict": views})
save("bfloat16", {"model": {name: value.bfloat16() for name, value in state.items()}})
save("legacy", {"model": state}, _use_new_zipfile_serialization=False)
save("protocol4", {"model": state, "args": arguments}, pickle_protocol=4)
save("double", {"model": {name: value.double() for name, value in state.items()}})
arguments.job_dir = pathlib.PosixPath("/runs/%j")
save("path", {"model": state, "args": arguments})
save("numpy", {"model": state, "best": numpy.float64(0.5)})
