"""Asks transformers' ViTMAEForPreTraining for losses, gradients and weights after AdamW steps.

usage: vit_mae.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<official name>, input.<i> [B, C, Y, X], noise.<i> [B, N] for each step i
reply:   loss.<i>, grad.<official name> (of step 0), weight.<official name> (after the last step),
         positions [N, D], decoder_positions [N, D] as the model used them
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining

request, reply, text = sys.argv[1:4]
asked, numbers = load_file(request), json.loads(text)
steps, lr, weight_decay, size = (numbers.pop(k) for k in ("steps", "lr", "weight_decay", "size"))
torch.manual_seed(0)
model = ViTMAEForPreTraining(ViTMAEConfig(**numbers, layer_norm_eps=1e-6, attn_implementation="eager")).train()


PARTS = ("query", "key", "value")


def rename(name):
    """A parameter's official name, and which third of the packed projection it is (None if it is no third)."""
    for ours, theirs in (
        ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"), ("vit.embeddings.cls_token", "cls_token"),
        ("decoder.mask_token", "mask_token"), ("vit.encoder.layer.", "blocks."), ("vit.layernorm.", "norm."),
        ("decoder.decoder_layers.", "decoder_blocks."), ("decoder.decoder_", "decoder_"),
        ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
    ):
        name = name.replace(ours, theirs)
    for third, part in enumerate(PARTS):
        if f"attention.attention.{part}" in name:
            return name.replace(f"attention.attention.{part}", "attn.qkv"), third
    return name, None


def load(model):
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                name, third = rename(name)
                given = asked["weight." + name]
                value.copy_((given if third is None else given.chunk(3)[third]).reshape(value.shape))


def official(pairs, prefix):
    """Tensors under their official names, the three projections stacked."""
    out = {}
    for name, value in pairs:
        out.setdefault(prefix + rename(name)[0], []).append(value.detach().clone())
    return {name: torch.cat(values) for name, values in out.items()}


load(model)
height, width = size
rows, cols = height // numbers["patch_size"], width // numbers["patch_size"]
interpolate = height != width
with torch.no_grad():
    positions = model.vit.embeddings.position_embeddings
    decoder_positions = model.decoder.decoder_pos_embed
    if interpolate:
        blank = torch.zeros(1, 1 + rows * cols, 1)
        positions = model.vit.embeddings.interpolate_pos_encoding(blank.expand(-1, -1, positions.shape[-1]), height, width)
        decoder_positions = model.decoder.interpolate_pos_encoding(blank.expand(-1, -1, decoder_positions.shape[-1]))
out = {"positions": positions[0, -rows * cols:].clone(), "decoder_positions": decoder_positions[0, -rows * cols:].clone()}

trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
groups = [
    {"params": [p for _, p in trained if p.ndim > 1], "weight_decay": weight_decay},
    {"params": [p for _, p in trained if p.ndim <= 1], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
for step in range(steps):
    optimizer.zero_grad()
    result = model(asked[f"input.{step}"], noise=asked[f"noise.{step}"], interpolate_pos_encoding=interpolate)
    result.loss.backward()
    out[f"loss.{step}"] = result.loss.detach().reshape(1)
    if step == 0:
        out |= official(((n, p.grad) for n, p in trained), "grad.")
    optimizer.step()
out |= official(trained, "weight.")
save_file({name: value.contiguous() for name, value in out.items()}, reply)
