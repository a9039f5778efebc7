"""Windows with cosine attention by timm's Swin Transformer V2 (CR), in fp64: its attention, and a decoder of its blocks.

swin_cosine.py attention IN OUT CASES.json   cases [{grid, size, shift, heads}]; of case i `qkv.i` [B, N, 3 D], `scale.i`
                                             [H], `bias.i` [H, T, T], `upstream.i` -> `out.i`, and `gqkv.i`, `gscale.i`,
                                             `gbias.i`
swin_cosine.py decoder IN OUT CASES.json     cases [{grid, size, shift, heads, depth}]; of case i `features.i`
                                             [B, 1 + K, E], `keep.i`, `drop.i`, `positions.i` [N, D], `upstream.i` and
                                             weights `w.i.NAME` -> `out.i`, `gfeatures.i` and `gw.i.NAME`

A head's `tau` divides cosines, as in the early form of this block; timm's scale is exp(logit_scale) = 1 / tau.
"""

import functools
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock, window_partition, window_reverse


class Says(torch.nn.Module):
    """A layer that gives what it was told, whatever it is asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, _):
        return self.answer


def block_of(width, case):
    size, shift = tuple(case["size"]), tuple(case["shift"])
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    block = SwinTransformerV2CrBlock(width, case["heads"], tuple(case["grid"]), size, norm_layer=norm)
    # timm moves windows by half their size along both axes or along none; its mask follows what is set here.
    block.shift_size = shift
    block._init_buffers()
    assert block.window_size == size
    return block.double().eval()


def attention(given, i, case):
    qkv, scale, bias = (given[f"{name}.{i}"].double().requires_grad_() for name in ("qkv", "scale", "bias"))
    (rows, columns), size, shift, heads = case["grid"], tuple(case["size"]), case["shift"], case["heads"]
    batch, _, width = qkv.shape
    block = block_of(width // 3, case)
    picture = torch.roll(qkv.unflatten(1, (rows, columns)), (-shift[0], -shift[1]), (1, 2))
    parts = window_partition(picture, size).flatten(1, 2)
    block.attn.qkv, block.attn.proj = Says(parts), torch.nn.Identity()
    block.attn.meta_mlp = Says(bias.flatten(1).T)
    del block.attn.logit_scale
    block.attn.logit_scale = scale.log()
    mixed = block.attn(parts[..., : width // 3], block.attn_mask)
    out = window_reverse(mixed.unflatten(1, size), size, (rows, columns))
    out = torch.roll(out, tuple(shift), (1, 2)).flatten(1, 2)
    (out * given[f"upstream.{i}"].double()).sum().backward()
    return {f"out.{i}": out.detach(), f"gqkv.{i}": qkv.grad, f"gscale.{i}": scale.grad, f"gbias.{i}": bias.grad}


def decoder(given, i, case):
    prefix = f"w.{i}."
    w = {name[len(prefix) :]: x.double().requires_grad_() for name, x in given.items() if name.startswith(prefix)}
    features = given[f"features.{i}"].double().requires_grad_()
    keep, drop = given[f"keep.{i}"], given[f"drop.{i}"]
    restore = torch.cat([keep, drop], 1).argsort(1)
    x = torch.nn.functional.linear(features, w["embed.weight"], w["embed.bias"])[:, 1:]
    x = torch.cat([x, w["mask_token"].expand(len(x), drop.shape[1], -1)], 1)
    x = x.gather(1, restore[..., None].expand_as(x)) + given[f"positions.{i}"].double()
    x = x.unflatten(1, tuple(case["grid"]))
    for n in range(case["depth"]):
        block = block_of(x.shape[-1], case | {"shift": case["shift"] if n % 2 else [0, 0]})
        own = {name.removeprefix(f"blocks.{n}."): x for name, x in w.items() if name.startswith(f"blocks.{n}.")}
        own["attn.logit_scale"] = -own.pop("attn.tau").log()
        assert own.keys() == dict(block.named_parameters()).keys(), own.keys()
        x = torch.func.functional_call(block, own, (x,))
    x = x.flatten(1, 2)
    x = torch.nn.functional.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"], 1e-6)
    x = torch.nn.functional.linear(x, w["pred.weight"], w["pred.bias"])
    out = x.gather(1, drop[..., None].expand(-1, -1, x.shape[-1]))
    (out * given[f"upstream.{i}"].double()).sum().backward()
    gradients = {f"gw.{i}.{name}": x.grad for name, x in w.items()}
    return gradients | {f"out.{i}": out.detach(), f"gfeatures.{i}": features.grad}


ask = {"attention": attention, "decoder": decoder}[sys.argv[1]]
given, answers = load_file(sys.argv[2]), {}
with open(sys.argv[4]) as file:
    cases = json.load(file)
for i, case in enumerate(cases):
    answers |= ask(given, i, case)
save_file({name: x.contiguous() for name, x in answers.items()}, sys.argv[3])
