"""Window attention of the Swin Transformer of timm: its partition, its mask, its reversal, in fp64.

swin_windows.py IN.safetensors OUT.safetensors CASES.json    cases [{grid, size, shift, heads}]; of case i `qkv.i`
                                                             [B, rows * columns, 3 D] and `upstream.i` -> `out.i`, `gqkv.i`
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse


def window_attention(qkv, case):
    (rows, columns), heads = case["grid"], case["heads"]
    width = qkv.shape[-1] // 3
    block = SwinTransformerBlock(
        width, (rows, columns), heads, window_size=tuple(case["size"]), shift_size=tuple(case["shift"])
    )
    shift, size = tuple(block.shift_size), tuple(block.window_size)
    assert size == tuple(case["size"]) and shift == tuple(case["shift"]), "timm has changed the case"
    image = torch.roll(qkv.unflatten(1, (rows, columns)), (-shift[0], -shift[1]), (1, 2))
    parts = window_partition(image, size).flatten(1, 2)
    q, k, v = parts.unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * (width // heads) ** -0.5
    if block.attn_mask is not None:
        mask = block.attn_mask.double().repeat(len(qkv), 1, 1)
        scores = scores + mask[:, None]
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(1, size)
    return torch.roll(window_reverse(mixed, size, rows, columns), shift, (1, 2)).flatten(1, 2)


inputs, outputs = load_file(sys.argv[1]), {}
with open(sys.argv[3]) as file:
    cases = json.load(file)
for i, case in enumerate(cases):
    qkv = inputs[f"qkv.{i}"].double().requires_grad_()
    out = window_attention(qkv, case)
    (out * inputs[f"upstream.{i}"].double()).sum().backward()
    outputs |= {f"out.{i}": out.detach(), f"gqkv.{i}": qkv.grad}
save_file(outputs, sys.argv[2])
