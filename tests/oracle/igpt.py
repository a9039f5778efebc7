"""Returns losses, gradients and weights of iGPT, transformers' ImageGPT without its biases, after AdamW steps.

usage: igpt.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<ImageGPT's name>, start [1, D] if the model is causal, and for each step i: color.<i> int64 [B, N], and
         hidden.<i> [B, N], 1 where a pixel is hidden, if it is not causal
reply:   loss.<i>, grad.0.<name>, weight.<name> (after the last step); all in fp64, and as fp32.<name> in fp32
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from precision import cast, in_both_dtypes
from training import adamw

request, reply, text = sys.argv[1:4]
given, numbers = load_file(request), json.loads(text)
colors, causal, tokens = numbers["colors"], numbers["causal"], numbers["tokens"]


def compute(dtype):
    inputs = cast(given, dtype)
    # Where it is causal, the start token stands before the pixels and is the last embedding.
    config = ImageGPTConfig(
        vocab_size=colors + 1, n_positions=tokens + 1, n_embd=numbers["width"], n_layer=numbers["depth"], n_head=numbers["heads"],
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )
    model = ImageGPTForCausalImageModeling(config).to(dtype).train()
    token, positions = model.transformer.wte.weight, model.transformer.wpe.weight
    trained = [(n, p) for n, p in model.named_parameters() if not n.endswith("bias")]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("bias"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_() if name.endswith("bias") else None
        for name, parameter in trained:
            if name == "transformer.wte.weight":
                token.zero_()[:colors] = inputs["weight.transformer.wte.weight"]
                token[colors] = inputs["weight.start"][0] if causal else 0
            elif name == "transformer.wpe.weight":
                positions.zero_()[:tokens] = inputs["weight.transformer.wpe.weight"]
            else:
                parameter.copy_(inputs[f"weight.{name}"])
    if not causal:
        for block in model.transformer.h:
            block.attn.bias = torch.ones_like(block.attn.bias)
    optimizer = adamw(trained, numbers["lr"], numbers["weight_decay"])

    def named(tensor_of):
        out = {n: tensor_of(p) for n, p in trained}
        if causal:
            out["start"] = out["transformer.wte.weight"][colors:].clone()
        out["transformer.wte.weight"] = out["transformer.wte.weight"][:colors].clone()
        out["transformer.wpe.weight"] = out["transformer.wpe.weight"][:tokens].clone()
        return out

    out = {}
    for step in range(numbers["steps"]):
        optimizer.zero_grad()
        color = inputs[f"color.{step}"]
        if causal:
            sequence = torch.cat([torch.full_like(color[:, :1], colors), color], 1)
            loss = model(sequence, labels=sequence).loss
        else:
            hidden = inputs[f"hidden.{step}"]
            seen = F.embedding(color, token) * (1 - hidden)[..., None]
            logits = model.lm_head(model.transformer(inputs_embeds=seen).last_hidden_state)
            each = F.cross_entropy(logits.transpose(1, 2), color, reduction="none") * hidden
            loss = (each.sum(1) / hidden.sum(1)).mean()
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step == 0:
            out |= {f"grad.0.{n}": g for n, g in named(lambda p: p.grad.clone()).items()}
        optimizer.step()
    return out | {f"weight.{n}": v for n, v in named(lambda p: p.detach().clone()).items()}


save_file(in_both_dtypes(compute), reply)
