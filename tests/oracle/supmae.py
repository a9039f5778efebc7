"""Returns losses, gradients and weights of SupMAE, put together from ViTMAEForPreTraining of transformers and torch's
BatchNorm1d, after AdamW steps.

usage: supmae.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<official name>, weight.head.<name>, input.<i> [B, C, Y, X], noise.<i> [B, N], label.<i> [B] for each step i
reply:   loss.<i>, grad.0.<name>, weight.<name> (after the last step), positions, decoder_positions [N, D],
         running_mean, running_var (after the last step); all in fp64, and as fp32.<name> in fp32
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from official import load, official
from precision import cast, in_both_dtypes
from training import adamw

request, reply, text = sys.argv[1:4]
given, numbers = load_file(request), json.loads(text)
steps, lr, weight_decay = (numbers.pop(k) for k in ("steps", "lr", "weight_decay"))
classes, class_weight, temperature = (numbers.pop(k) for k in ("classes", "class_weight", "temperature"))


def compute(dtype):
    inputs = cast(given, dtype)
    model = ViTMAEForPreTraining(ViTMAEConfig(**numbers, layer_norm_eps=1e-6, attn_implementation="eager")).to(dtype).train()
    load(model, inputs)
    width = numbers["hidden_size"]
    head = nn.ModuleDict({
        "fc1": nn.Linear(width, 4 * width), "norm": nn.BatchNorm1d(4 * width), "fc2": nn.Linear(4 * width, classes),
    }).to(dtype).train()
    with torch.no_grad():
        for name, value in head.named_parameters():
            value.copy_(inputs[f"weight.head.{name}"])
    out = {
        "positions": model.vit.embeddings.position_embeddings[0, 1:].clone(),
        "decoder_positions": model.decoder.decoder_pos_embed[0, 1:].clone(),
    }
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    heads = [(f"head.{n}", p) for n, p in head.named_parameters()]
    optimizer = adamw(trained + heads, lr, weight_decay)
    for step in range(steps):
        optimizer.zero_grad()
        pixels = inputs[f"input.{step}"]
        encoded = model.vit(pixels, noise=inputs[f"noise.{step}"])
        decoded = model.decoder(encoded.last_hidden_state, encoded.ids_restore)
        pixel = model.forward_loss(pixels, decoded.logits, encoded.mask)
        pooled = encoded.last_hidden_state[:, 1:].mean(1)
        logits = head["fc2"](torch.relu(head["norm"](head["fc1"](pooled))))
        named = nn.functional.cross_entropy(logits / temperature, inputs[f"label.{step}"], ignore_index=-100)
        loss = pixel + class_weight * named
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step == 0:
            out |= official(((n, p.grad) for n, p in trained), "grad.0.") | {f"grad.0.{n}": p.grad.clone() for n, p in heads}
        optimizer.step()
    norm = head["norm"]
    out |= {"running_mean": norm.running_mean.clone(), "running_var": norm.running_var.clone()}
    return out | official(trained, "weight.") | {f"weight.{n}": p.detach().clone() for n, p in heads}


save_file(in_both_dtypes(compute), reply)
