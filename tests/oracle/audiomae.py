"""Audio-MAE built from blocks of timm, one sample at a time, each on the grid that it fills.

usage: audiomae.py steps REQUEST.safetensors REPLY.safetensors CONFIG_JSON
       audiomae.py positions ROWS COLS WIDTH REPLY.safetensors
steps:     request: weight.<our name>, and for each step i input.<i> [B, 1, Y, X], keep.<i> and drop.<i> int64 [B, ·],
           -1 where a sample has no such token
           reply:   loss.<i>, grad.0.<our name>, weight.<our name> (after the last step); all in fp64, and as
                    fp32.<name> in fp32
           config:  encoder and decoder [depth, heads], patch, window and shift (null: global attention),
           swapped, normalize, steps, lr, weight_decay
positions: the table of the official code for tokens in row-major order: `positions` [N, D]
"""
import functools
import json
import sys

import numpy
import torch
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock, window_partition
from timm.models.vision_transformer import Block
from torch.nn import functional as F

from precision import cast, in_both_dtypes
from training import adamw

NORM = functools.partial(torch.nn.LayerNorm, eps=1e-6)


def sincos(rows, cols, width):
    """MAE's `get_2d_sincos_pos_embed` for rectangular grids, with tokens in row-major order."""
    x, y = numpy.meshgrid(numpy.arange(cols, dtype=float), numpy.arange(rows, dtype=float))
    omega = 1.0 / 10000 ** (numpy.arange(width // 4) / (width / 4.0))
    half = lambda at: numpy.einsum("m,d->md", at.reshape(-1), omega)
    parts = [f(half(at)) for at in (x, y) for f in (numpy.sin, numpy.cos)]
    return torch.from_numpy(numpy.concatenate(parts, axis=1)).to(torch.get_default_dtype())


def positions(rows, cols, width, swapped):
    # `patch_hw` of the official code is (columns, rows), although its tokens are in row-major order.
    return sincos(cols, rows, width) if swapped else sincos(rows, cols, width)


def part(w, prefix):
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def transformer(x, w, prefix, depth, heads):
    for i in range(depth):
        weights = part(w, f"{prefix}.blocks.{i}.")
        block = Block(x.shape[-1], heads, qkv_bias=True, norm_layer=NORM).eval()
        x = torch.func.functional_call(block, weights, (x,))
    return norm(x, w, f"{prefix}.norm")


def norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def windows(x, w, valid, cols, numbers):
    """Blocks over `valid` rows of a strip of windows; x [1, valid * cols, D]. Zero rows are appended until windows fill the
    grid, and two tokens attend to each other if both are valid and in the same window."""
    heads, size, shift = numbers["decoder"][1], tuple(numbers["window"]), numbers["shift"]
    size = (min(size[0], numbers["rows"]), min(size[1], cols))
    rows = -(-valid // size[0]) * size[0]
    x = F.pad(x, (0, 0, 0, (rows - valid) * cols)).unflatten(1, (rows, cols))
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    for i in range(numbers["decoder"][0]):
        shifts = [s if i % 2 and full > side else 0 for s, full, side in zip(shift, (rows, cols), size)]
        block = SwinTransformerV2CrBlock(x.shape[-1], heads, (rows, cols), size, always_partition=True, norm_layer=NORM)
        block = block.eval()
        block.shift_size = tuple(shifts)
        window = torch.div(r - shifts[0], size[0], rounding_mode="floor") * 1000 + torch.div(
            c - shifts[1], size[1], rounding_mode="floor")
        window = torch.where(r < valid, window, -(10**6) - r * cols - c)  # padding attends only to itself
        rolled = torch.roll(window, (-shifts[0], -shifts[1]), (0, 1))[None, ..., None]
        window = window_partition(rolled, size).flatten(1)
        block.attn_mask = torch.where(window[:, :, None] == window[:, None, :], 0.0, -torch.inf)
        weights = part(w, f"decoder.blocks.{i}.")
        weights["attn.logit_scale"] = -weights.pop("attn.tau").clamp(min=0.01).log()
        assert weights.keys() == dict(block.named_parameters()).keys(), weights.keys()
        x = torch.func.functional_call(block, weights, (x,))
    return norm(x.flatten(1, 2)[:, : valid * cols], w, "decoder.norm")


def patch_errors(w, image, keep, drop, numbers):
    """Returns the squared errors at the dropped patches of one image [1, Y, X], each the mean over the values of a patch."""
    p, swapped = numbers["patch"], numbers["swapped"]
    cols = image.shape[2] // p
    kernel = w["encoder.embed.weight"].unflatten(1, (1, p, p))
    tokens = F.conv2d(image[None], kernel, w["encoder.embed.bias"], stride=p).flatten(2).mT  # [1, N, D]
    table = positions(numbers["rows"], cols, tokens.shape[-1], swapped)
    x = torch.cat([w["encoder.cls_token"], (tokens + table)[:, keep]], 1)
    x = linear(transformer(x, w, "encoder", *numbers["encoder"]), w, "decoder.embed")
    valid = (len(keep) + len(drop)) // cols
    sequence = torch.empty(1, valid * cols, x.shape[-1])
    sequence[:, keep], sequence[:, drop] = x[:, 1:], w["decoder.mask_token"].expand(-1, len(drop), -1)
    sequence = sequence + positions(numbers["rows"], cols, x.shape[-1], swapped)[: valid * cols]
    if numbers["window"]:
        sequence = windows(sequence, w, valid, cols, numbers)
    else:
        sequence = transformer(torch.cat([x[:, :1], sequence], 1), w, "decoder", *numbers["decoder"])[:, 1:]
    predictions = linear(sequence, w, "decoder.pred")[0]
    target = F.unfold(image[None], p, stride=p)[0].T
    if numbers["normalize"]:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((predictions[drop] - target[drop]) ** 2).mean(-1)


def steps(request, reply, text):
    inputs, numbers = load_file(request), json.loads(text)
    save_file(in_both_dtypes(lambda dtype: train(cast(inputs, dtype), numbers)), reply)


def train(inputs, numbers):
    w = {name: value.clone().requires_grad_() for name, value in part(inputs, "weight.").items()}
    optimizer = adamw(w.items(), numbers["lr"], numbers["weight_decay"])
    out = {}
    for step in range(numbers["steps"]):
        optimizer.zero_grad()
        images = inputs[f"input.{step}"]
        numbers["rows"] = images.shape[2] // numbers["patch"]
        masks = [[m[m >= 0] for m in both] for both in zip(inputs[f"keep.{step}"], inputs[f"drop.{step}"])]
        errors = [patch_errors(w, image, *mask, numbers) for image, mask in zip(images, masks)]
        loss = torch.cat(errors).mean()
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step == 0:
            out |= {f"grad.0.{name}": value.grad.clone() for name, value in w.items()}
        optimizer.step()
    return out | {f"weight.{name}": value.detach() for name, value in w.items()}


command, *arguments = sys.argv[1:]
if command == "positions":
    save_file({"positions": positions(*map(int, arguments[:3]), True).float()}, arguments[3])
else:
    steps(*arguments)
