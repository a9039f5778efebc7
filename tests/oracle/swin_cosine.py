"""Cosine attention in windows by Swin Transformer V2 (CR) of timm: its attention, and a decoder of its blocks.
Outputs are in fp64, and as fp32.<name> in fp32.

swin_cosine.py attention IN OUT CASES.json   cases [{grid, size, shift, heads}]; of case i `qkv.i` [B, N, 3 D], `scale.i`
                                             [H], `bias.i` [H, T, T], `upstream.i` -> `out.i`, and `gqkv.i`, `gscale.i`,
                                             `gbias.i`
swin_cosine.py decoder IN OUT CASES.json     cases [{grid, size, shift, heads, depth}]; of case i `features.i`
                                             [B, 1 + K, E], `keep.i`, `drop.i`, `positions.i` [N, D], `upstream.i` and
                                             weights `w.i.NAME` -> `out.i`, `gfeatures.i` and `gw.i.NAME`

The `tau` of a head divides cosines, as in the early form of this block; timm's scale is exp(logit_scale) = 1 / tau.
"""

import functools
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock, window_partition, window_reverse

from precision import cast, in_both_dtypes


class Constant(torch.nn.Module):
    """A layer with a fixed output."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, _):
        return self.output


def block_of(width, case):
    size, shift = tuple(case["size"]), tuple(case["shift"])
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    block = SwinTransformerV2CrBlock(width, case["heads"], tuple(case["grid"]), size, norm_layer=norm)
    # timm shifts windows by half their size along both axes or not at all; its mask follows the shift set here.
    block.shift_size = shift
    block._init_buffers()
    assert block.window_size == size
    return block.eval()


def attention(inputs, i, case):
    qkv, scale, bias = (inputs[f"{name}.{i}"].clone().requires_grad_() for name in ("qkv", "scale", "bias"))
    (rows, columns), size, shift, heads = case["grid"], tuple(case["size"]), case["shift"], case["heads"]
    batch, _, width = qkv.shape
    block = block_of(width // 3, case)
    image = torch.roll(qkv.unflatten(1, (rows, columns)), (-shift[0], -shift[1]), (1, 2))
    parts = window_partition(image, size).flatten(1, 2)
    block.attn.qkv, block.attn.proj = Constant(parts), torch.nn.Identity()
    block.attn.meta_mlp = Constant(bias.flatten(1).T)
    del block.attn.logit_scale
    block.attn.logit_scale = scale.log()
    mixed = block.attn(parts[..., : width // 3], block.attn_mask)
    out = window_reverse(mixed.unflatten(1, size), size, (rows, columns))
    out = torch.roll(out, tuple(shift), (1, 2)).flatten(1, 2)
    (out * inputs[f"upstream.{i}"]).sum().backward()
    return {f"out.{i}": out.detach(), f"gqkv.{i}": qkv.grad, f"gscale.{i}": scale.grad, f"gbias.{i}": bias.grad}


def decoder(inputs, i, case):
    prefix = f"w.{i}."
    w = {name[len(prefix) :]: x.clone().requires_grad_() for name, x in inputs.items() if name.startswith(prefix)}
    features = inputs[f"features.{i}"].clone().requires_grad_()
    keep, drop = inputs[f"keep.{i}"], inputs[f"drop.{i}"]
    restore = torch.cat([keep, drop], 1).argsort(1)
    x = torch.nn.functional.linear(features, w["embed.weight"], w["embed.bias"])[:, 1:]
    x = torch.cat([x, w["mask_token"].expand(len(x), drop.shape[1], -1)], 1)
    x = x.gather(1, restore[..., None].expand_as(x)) + inputs[f"positions.{i}"]
    x = x.unflatten(1, tuple(case["grid"]))
    for n in range(case["depth"]):
        block = block_of(x.shape[-1], case | {"shift": case["shift"] if n % 2 else [0, 0]})
        weights = {name.removeprefix(f"blocks.{n}."): x for name, x in w.items() if name.startswith(f"blocks.{n}.")}
        weights["attn.logit_scale"] = -weights.pop("attn.tau").log()
        assert weights.keys() == dict(block.named_parameters()).keys(), weights.keys()
        x = torch.func.functional_call(block, weights, (x,))
    x = x.flatten(1, 2)
    x = torch.nn.functional.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"], 1e-6)
    x = torch.nn.functional.linear(x, w["pred.weight"], w["pred.bias"])
    out = x.gather(1, drop[..., None].expand(-1, -1, x.shape[-1]))
    (out * inputs[f"upstream.{i}"]).sum().backward()
    gradients = {f"gw.{i}.{name}": x.grad for name, x in w.items()}
    return gradients | {f"out.{i}": out.detach(), f"gfeatures.{i}": features.grad}


run = {"attention": attention, "decoder": decoder}[sys.argv[1]]
given = load_file(sys.argv[2])
with open(sys.argv[4]) as file:
    cases = json.load(file)


def compute(dtype):
    inputs, outputs = cast(given, dtype), {}
    for i, case in enumerate(cases):
        outputs |= run(inputs, i, case)
    return outputs


save_file(in_both_dtypes(compute), sys.argv[3])
