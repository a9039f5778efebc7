"""Returns losses, gradients and weights of MFM, put together from timm's Beit and torch's FFT, after AdamW steps.

usage: mfm.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<timm's name>, weight.head.<name>, and for each step i: input.<i> [B, C, Y, X] as 0..1, target.<i>
         [B, C, Y, X] standardized, low.<i> [B], 1 for low-pass
reply:   loss.<i>, grad.0.<name>, weight.<name> (after the last step); all in fp64, and as fp32.<name> in fp32
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from torch import fft, nn

from precision import cast, in_both_dtypes

request, reply, text = sys.argv[1:4]
given, numbers = load_file(request), json.loads(text)
patch = numbers["patch"]


def compute(dtype):
    inputs = cast(given, dtype)
    batch, channels, height, width = inputs["input.0"].shape
    model = Beit(
        img_size=(height, width), patch_size=patch, in_chans=channels, num_classes=0, global_pool="", embed_dim=numbers["width"],
        depth=numbers["depth"], num_heads=numbers["heads"], use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=None,
    ).to(dtype).train()
    model.head = nn.Linear(numbers["width"], channels * patch * patch).to(dtype)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, value in trained:
            value.copy_(inputs[f"weight.{name}"].reshape(value.shape))
    decays = lambda name, p: p.ndim > 1 and name not in ("cls_token", "pos_embed")
    optimizer = torch.optim.AdamW([
        {"params": [p for n, p in trained if decays(n, p)], "weight_decay": numbers["weight_decay"]},
        {"params": [p for n, p in trained if not decays(n, p)], "weight_decay": 0.0},
    ], lr=numbers["lr"], betas=(0.9, 0.95))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    disc = ((rows - height // 2) ** 2 + (columns - width // 2) ** 2 < numbers["radius"] ** 2).to(dtype)
    # The data's mean and deviation, from two places where an image and its standardized form are known.
    first, target = inputs["input.0"].transpose(0, 1).flatten(1), inputs["target.0"].transpose(0, 1).flatten(1)
    low, high = first.argmin(1, keepdim=True), first.argmax(1, keepdim=True)
    at = lambda x, index: x.gather(1, index)
    std = ((at(first, high) - at(first, low)) / (at(target, high) - at(target, low))).reshape(1, -1, 1, 1)
    mean = at(first, low).reshape(1, -1, 1, 1) - at(target, low).reshape(1, -1, 1, 1) * std
    out = {}
    for step in range(numbers["steps"]):
        optimizer.zero_grad()
        image, target = inputs[f"input.{step}"], inputs[f"target.{step}"]
        is_low = inputs[f"low.{step}"].bool().reshape(-1, 1, 1, 1)
        passes = torch.where(is_low, disc, 1 - disc)
        seen = fft.ifft2(fft.ifftshift(fft.fftshift(fft.fft2(image), dim=(-2, -1)) * passes, dim=(-2, -1))).real.clamp(0, 1)
        tokens = model.forward_features((seen - mean) / std)
        values = model.head(tokens[:, 1:]).reshape(batch, height // patch, width // patch, patch, patch, channels)
        prediction = values.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)
        spectrum = lambda x: fft.fftshift(fft.fft2(x, norm="ortho"), dim=(-2, -1))
        difference = spectrum(prediction) - spectrum(target)
        distance = torch.sqrt(difference.real**2 + difference.imag**2 + 1e-12) * (1 - passes)
        if numbers["by_sample"]:
            loss = (distance.sum((1, 2, 3)) / (channels * (1 - passes).sum((1, 2, 3)))).mean()
        else:
            loss = distance.sum() / (channels * (1 - passes).sum())
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step == 0:
            out |= {f"grad.0.{n}": p.grad.clone() for n, p in trained}
        optimizer.step()
    return out | {f"weight.{n}": p.detach().clone() for n, p in trained}


save_file(in_both_dtypes(compute), reply)
