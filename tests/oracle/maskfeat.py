"""Returns losses, gradients and weights of MaskFeat, put together from timm's VisionTransformer and a histogram written
with torch's operations, after AdamW steps.

usage: maskfeat.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<timm's name>, weight.mask_token, weight.head.<name>, input.<i> [B, C, T, Y, X], drop.<i> [B, M]
reply:   loss.<i>, grad.0.<name>, weight.<name> (after the last step); all in fp64, and as fp32.<name> in fp32
"""
import json
import math
import sys
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from precision import cast, in_both_dtypes
from training import adamw

request, reply, text = sys.argv[1:4]
given, numbers = load_file(request), json.loads(text)
patch, patch_frames = numbers["patch"], numbers["patch_frames"]


def histograms(frames):
    """Histograms of the cells of frames [B, C, Y, X], [B, tokens, values] by token."""
    padded = nn.functional.pad(frames, (1, 1, 1, 1), mode="reflect")
    at = lambda row, column: padded[..., row : row + frames.shape[-2], column : column + frames.shape[-1]]
    gx = (at(0, 0) + 2 * at(1, 0) + at(2, 0)) - (at(0, 2) + 2 * at(1, 2) + at(2, 2))
    gy = (at(0, 0) + 2 * at(0, 1) + at(0, 2)) - (at(2, 0) + 2 * at(2, 1) + at(2, 2))
    angle = torch.atan2(gx, gy)
    bins = torch.floor(angle / math.pi * 9).long() % 9
    magnitude = torch.hypot(gx, gy)
    planes = nn.functional.one_hot(bins, 9).movedim(-1, 2) * magnitude.unsqueeze(2)  # [B, C, 9, Y, X]
    batch, channels, _, height, width = planes.shape
    cells = planes.reshape(batch, channels, 9, height // 8, 8, width // 8, 8).sum((4, 6))
    cells = nn.functional.normalize(cells, dim=2)
    side = patch // 8
    tokens = cells.reshape(batch, channels, 9, height // patch, side, width // patch, side)
    return tokens.permute(0, 3, 5, 1, 2, 4, 6).reshape(batch, -1, channels * 9 * side * side)


def compute(dtype):
    inputs = cast(given, dtype)
    _, channels, frames, height, width = inputs["input.0"].shape
    model = VisionTransformer(
        img_size=(height, width), patch_size=patch, in_chans=channels, num_classes=0, embed_dim=numbers["width"],
        depth=numbers["depth"], num_heads=numbers["heads"], norm_layer=partial(nn.LayerNorm, eps=1e-6), global_pool="",
    ).to(dtype).train()
    slots = frames // patch_frames
    tokens = slots * (height // patch) * (width // patch)
    if frames > 1:
        model.patch_embed.proj = nn.Conv3d(channels, numbers["width"], (patch_frames, patch, patch), (patch_frames, patch, patch)).to(dtype)
    model.pos_embed = nn.Parameter(torch.zeros(1, 1 + tokens, numbers["width"], dtype=dtype))
    model.mask_token = nn.Parameter(torch.zeros(1, 1, numbers["width"], dtype=dtype))
    model.head = nn.Linear(numbers["width"], channels * 9 * (patch // 8) ** 2).to(dtype)
    trained = list(model.named_parameters())
    with torch.no_grad():
        for name, value in trained:
            value.copy_(inputs[f"weight.{name}"].reshape(value.shape))
    optimizer = adamw(trained, numbers["lr"], numbers["weight_decay"])
    out = {}
    for step in range(numbers["steps"]):
        optimizer.zero_grad()
        pixels, drop = inputs[f"input.{step}"], inputs[f"drop.{step}"]
        hidden = torch.zeros(pixels.shape[0], tokens, dtype=torch.bool).scatter_(1, drop, True)
        embedded = model.patch_embed.proj(pixels if frames > 1 else pixels[:, :, 0]).flatten(2).transpose(1, 2)
        embedded = torch.where(hidden.unsqueeze(-1), model.mask_token.expand_as(embedded), embedded)
        x = torch.cat([model.cls_token.expand(pixels.shape[0], -1, -1), embedded], 1) + model.pos_embed
        for block in model.blocks:
            x = block(x)
        prediction = model.head(model.norm(x)[:, 1:][hidden])
        targets = [histograms(pixels[:, :, slot * patch_frames]) for slot in range(slots)]
        target = torch.cat(targets, 1)[hidden]
        loss = ((prediction - target) ** 2).mean()
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step == 0:
            out |= {f"grad.0.{n}": p.grad.clone() for n, p in trained}
        optimizer.step()
    return out | {f"weight.{n}": p.detach().clone() for n, p in trained}


save_file(in_both_dtypes(compute), reply)
