"""Returns losses, gradients and weights of ViTMAEForPreTraining of transformers after AdamW steps.

usage: vit_mae.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<official name>, input.<i> [B, C, Y, X], noise.<i> [B, N] for each step i
reply:   loss.<i>, grad.0.<official name>, weight.<official name> (after the last step),
         positions [N, D], decoder_positions [N, D] as the model used them;
         all in fp64, and as fp32.<name> in fp32
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from official import load, official
from precision import cast, in_both_dtypes
from training import adamw

request, reply, text = sys.argv[1:4]
given, numbers = load_file(request), json.loads(text)
steps, lr, weight_decay, size = (numbers.pop(k) for k in ("steps", "lr", "weight_decay", "size"))


def compute(dtype):
    inputs = cast(given, dtype)
    torch.manual_seed(0)
    config = ViTMAEConfig(**numbers, layer_norm_eps=1e-6, attn_implementation="eager")
    model = ViTMAEForPreTraining(config).to(dtype).train()
    load(model, inputs)
    height, width = size
    rows, cols = height // numbers["patch_size"], width // numbers["patch_size"]
    interpolate = height != width
    with torch.no_grad():
        positions = model.vit.embeddings.position_embeddings
        decoder_positions = model.decoder.decoder_pos_embed
        if interpolate:
            blank = torch.zeros(1, 1 + rows * cols, 1)
            wide = lambda table: blank.expand(-1, -1, table.shape[-1])
            positions = model.vit.embeddings.interpolate_pos_encoding(wide(positions), height, width)
            decoder_positions = model.decoder.interpolate_pos_encoding(wide(decoder_positions))
    out = {"positions": positions[0, -rows * cols:].clone(), "decoder_positions": decoder_positions[0, -rows * cols:].clone()}

    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = adamw(trained, lr, weight_decay)
    for step in range(steps):
        optimizer.zero_grad()
        result = model(inputs[f"input.{step}"], noise=inputs[f"noise.{step}"], interpolate_pos_encoding=interpolate)
        result.loss.backward()
        out[f"loss.{step}"] = result.loss.detach().reshape(1)
        if step == 0:
            out |= official(((n, p.grad) for n, p in trained), "grad.0.")
        optimizer.step()
    return out | official(trained, "weight.")


save_file(in_both_dtypes(compute), reply)
