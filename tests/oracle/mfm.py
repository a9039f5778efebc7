"""Returns losses, gradients and weights of MFM, put together from timm's Beit and torch's FFT, after AdamW steps.

usage: mfm.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<timm's name>, weight.head.<name>, and for each step i: input.<i> [B, C, Y, X] as 0..1, low.<i> [B], 1
         for low-pass
reply:   loss.<i>, grad.0.<name>, weight.<name> (after the last step); all in fp64, and as fp32.<name> in fp32
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from torch import fft, nn

from precision import cast, in_both_dtypes
from training import adamw

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
    optimizer = adamw(trained, numbers["lr"], numbers["weight_decay"], exempt=("cls_token", "pos_embed"))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    disc = ((rows - height // 2) ** 2 + (columns - width // 2) ** 2 < numbers["radius"] ** 2).to(dtype)
    mean, std = (torch.tensor(numbers[name]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    out = {}
    for step in range(numbers["steps"]):
        optimizer.zero_grad()
        image = inputs[f"input.{step}"]
        is_low = inputs[f"low.{step}"].bool().reshape(-1, 1, 1, 1)
        passes = torch.where(is_low, disc, 1 - disc)
        seen = fft.ifft2(fft.ifftshift(fft.fftshift(fft.fft2(image), dim=(-2, -1)) * passes, dim=(-2, -1))).real.clamp(0, 1)
        tokens = model.forward_features((seen - mean) / std)
        values = model.head(tokens[:, 1:]).reshape(batch, height // patch, width // patch, patch, patch, channels)
        prediction = values.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)
        spectrum = lambda x: fft.fftshift(fft.fft2(x, norm="ortho"), dim=(-2, -1))
        difference = spectrum(prediction) - spectrum((image - mean) / std)
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
