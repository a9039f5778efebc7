"""Audio-MAE put together from timm's blocks, in fp64, one sample after the other and each on the grid that it fills.

usage: audio_mae.py steps REQUEST.safetensors REPLY.safetensors CONFIG_JSON
       audio_mae.py positions ROWS COLS WIDTH REPLY.safetensors
steps:     request: weight.<our name>, and for each step i input.<i> [B, 1, Y, X], keep.<i> and drop.<i> int64 [B, ·],
           -1 where a sample has no such token
           reply:   loss.<i>, grad.0.<our name>, weight.<our name> (after the last step)
           config:  encoder and decoder [depth, heads], patch, window and shift (null: every token sees every other),
           swapped, normalize, steps, lr, weight_decay
positions: the official code's table for tokens that stand row by row: `positions` [N, D]
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

NORM = functools.partial(torch.nn.LayerNorm, eps=1e-6)


def sine_cosine(rows, cols, width):
    """As MAE's `get_2d_sincos_pos_embed` for grids that are no squares: token i has the i-th place, row by row."""
    x, y = numpy.meshgrid(numpy.arange(cols, dtype=float), numpy.arange(rows, dtype=float))
    omega = 1.0 / 10000 ** (numpy.arange(width // 4) / (width / 4.0))
    half = lambda at: numpy.einsum("m,d->md", at.reshape(-1), omega)
    parts = [f(half(at)) for at in (x, y) for f in (numpy.sin, numpy.cos)]
    return torch.from_numpy(numpy.concatenate(parts, axis=1))


def positions(rows, cols, width, swapped):
    # `patch_hw` of the official code is (columns, rows), and its tokens stand row by row all the same.
    return sine_cosine(cols, rows, width) if swapped else sine_cosine(rows, cols, width)


def part(w, prefix):
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def transformer(x, w, prefix, depth, heads):
    for i in range(depth):
        own = part(w, f"{prefix}.blocks.{i}.")
        block = Block(x.shape[-1], heads, qkv_bias=True, norm_layer=NORM).double().eval()
        x = torch.func.functional_call(block, own, (x,))
    return norm(x, w, f"{prefix}.norm")


def norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def windows(x, w, there, cols, numbers):
    """Blocks over the first `there` rows of an endless strip of windows; x [1, there * cols, D]. Rows of nothing are put
    below until windows fill the grid, and two tokens see each other where both are there and their window is the same."""
    heads, size, shift = numbers["decoder"][1], tuple(numbers["window"]), numbers["shift"]
    size = (min(size[0], numbers["rows"]), min(size[1], cols))
    rows = -(-there // size[0]) * size[0]
    x = F.pad(x, (0, 0, 0, (rows - there) * cols)).unflatten(1, (rows, cols))
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    for i in range(numbers["decoder"][0]):
        moved = [s if i % 2 and full > side else 0 for s, full, side in zip(shift, (rows, cols), size)]
        block = SwinTransformerV2CrBlock(x.shape[-1], heads, (rows, cols), size, always_partition=True, norm_layer=NORM)
        block = block.double().eval()
        block.shift_size = tuple(moved)
        number = torch.div(r - moved[0], size[0], rounding_mode="floor") * 1000 + torch.div(
            c - moved[1], size[1], rounding_mode="floor")
        number = torch.where(r < there, number, -(10**6) - r * cols - c)  # what is not there is alone
        rolled = torch.roll(number, (-moved[0], -moved[1]), (0, 1))[None, ..., None]
        number = window_partition(rolled, size).flatten(1)
        block.attn_mask = torch.where(number[:, :, None] == number[:, None, :], 0.0, -torch.inf).double()
        own = part(w, f"decoder.blocks.{i}.")
        own["attn.logit_scale"] = -own.pop("attn.tau").clamp(min=0.01).log()
        assert own.keys() == dict(block.named_parameters()).keys(), own.keys()
        x = torch.func.functional_call(block, own, (x,))
    return norm(x.flatten(1, 2)[:, : there * cols], w, "decoder.norm")


def guess(w, image, keep, drop, numbers):
    """Squared errors at the dropped patches of one image [1, Y, X], each the mean over the patch's values."""
    p, swapped = numbers["patch"], numbers["swapped"]
    cols = image.shape[2] // p
    kernel = w["encoder.embed.weight"].unflatten(1, (1, p, p))
    tokens = F.conv2d(image[None], kernel, w["encoder.embed.bias"], stride=p).flatten(2).mT  # [1, N, D]
    table = positions(numbers["rows"], cols, tokens.shape[-1], swapped)
    x = torch.cat([w["encoder.cls_token"], (tokens + table)[:, keep]], 1)
    x = linear(transformer(x, w, "encoder", *numbers["encoder"]), w, "decoder.embed")
    there = (len(keep) + len(drop)) // cols
    whole = torch.empty(1, there * cols, x.shape[-1], dtype=torch.float64)
    whole[:, keep], whole[:, drop] = x[:, 1:], w["decoder.mask_token"].expand(-1, len(drop), -1)
    whole = whole + positions(numbers["rows"], cols, x.shape[-1], swapped)[: there * cols]
    if numbers["window"]:
        whole = windows(whole, w, there, cols, numbers)
    else:
        whole = transformer(torch.cat([x[:, :1], whole], 1), w, "decoder", *numbers["decoder"])[:, 1:]
    guesses = linear(whole, w, "decoder.pred")[0]
    truth = F.unfold(image[None], p, stride=p)[0].T
    if numbers["normalize"]:
        truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((guesses[drop] - truth[drop]) ** 2).mean(-1)


def steps(request, reply, text):
    asked, numbers = load_file(request), json.loads(text)
    w = {name: value.double().requires_grad_() for name, value in part(asked, "weight.").items()}
    optimizer = torch.optim.AdamW([
        {"params": [v for v in w.values() if v.ndim > 1], "weight_decay": numbers["weight_decay"]},
        {"params": [v for v in w.values() if v.ndim <= 1], "weight_decay": 0.0},
    ], lr=numbers["lr"], betas=(0.9, 0.95))
    out = {}
    for step in range(numbers["steps"]):
        optimizer.zero_grad()
        images = asked[f"input.{step}"].double()
        numbers["rows"] = images.shape[2] // numbers["patch"]
        masks = [[m[m >= 0] for m in both] for both in zip(asked[f"keep.{step}"], asked[f"drop.{step}"])]
        errors = [guess(w, image, *mask, numbers) for image, mask in zip(images, masks)]
        loss = torch.cat(errors).mean()
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step == 0:
            out |= {f"grad.0.{name}": value.grad.clone() for name, value in w.items()}
        optimizer.step()
    out |= {f"weight.{name}": value.detach() for name, value in w.items()}
    save_file({name: value.contiguous() for name, value in out.items()}, reply)


what, *rest = sys.argv[1:]
if what == "positions":
    save_file({"positions": positions(*map(int, rest[:3]), True).float()}, rest[3])
else:
    steps(*rest)
