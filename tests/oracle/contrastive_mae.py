"""Returns losses, gradients and weights of C-MAE, put together from the encoder and the decoder's blocks of transformers'
ViTMAEForPreTraining and torch's cross entropy, after AdamW steps.

usage: contrastive_mae.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<official name>, weight.head.fc<1..3>.<weight|bias>, input.<i> [B, C, Y, X], noise.<i> [B, N], and
         second.<i> [B, N] if the second view has a mask of its own
reply:   loss.<i>, grad.0.<name>, weight.<name> (after the last step), positions, decoder_positions [N, D];
         all in fp64, and as fp32.<name> in fp32
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from official import load, official
from precision import cast, in_both_dtypes
from training import adamw

request, reply, text = sys.argv[1:4]
given, numbers = load_file(request), json.loads(text)
steps, lr, weight_decay = (numbers.pop(k) for k in ("steps", "lr", "weight_decay"))
hidden, embed_dim, temperature = (numbers.pop(k) for k in ("hidden", "embed_dim", "temperature"))


def compute(dtype):
    inputs = cast(given, dtype)
    model = ViTMAEForPreTraining(ViTMAEConfig(**numbers, layer_norm_eps=1e-6, attn_implementation="eager")).to(dtype).train()
    # The blocks' tokens themselves are the prediction.
    model.decoder.decoder_pred = nn.Identity()
    load(model, {n: v for n, v in inputs.items() if not n.startswith("weight.head.")})
    widths = [numbers["decoder_hidden_size"], hidden, hidden, embed_dim]
    head = nn.ModuleDict({f"fc{i + 1}": nn.Linear(widths[i], widths[i + 1]) for i in range(3)}).to(dtype)
    head.load_state_dict({n[len("weight.head."):]: v for n, v in inputs.items() if n.startswith("weight.head.")})
    out = {
        "positions": model.vit.embeddings.position_embeddings[0, 1:].clone(),
        "decoder_positions": model.decoder.decoder_pos_embed[0, 1:].clone(),
    }
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    heads = [(f"head.{n}", p) for n, p in head.named_parameters()]
    optimizer = adamw(trained + heads, lr, weight_decay)

    def embed(pixels, noise, ratio):
        model.vit.config.mask_ratio = ratio
        encoded = model.vit(pixels, noise=noise)
        x = model.decoder(encoded.last_hidden_state, encoded.ids_restore).logits.mean(1)
        x = head["fc3"](F.gelu(head["fc2"](F.gelu(head["fc1"](x)))))
        return F.normalize(x, dim=-1), encoded.mask

    ratio = numbers["mask_ratio"]
    for step in range(steps):
        optimizer.zero_grad()
        pixels, noise = inputs[f"input.{step}"], inputs[f"noise.{step}"]
        first, mask = embed(pixels, noise, ratio)
        if f"second.{step}" in inputs:
            second, _ = embed(pixels, inputs[f"second.{step}"], ratio)
        else:
            second, other = embed(pixels, -noise, 1 - ratio)
            assert torch.equal(other, 1 - mask), "the masks are complementary"
        logits = first @ second.T / temperature
        target = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step == 0:
            out |= official(((n, p.grad) for n, p in trained), "grad.0.") | {f"grad.0.{n}": p.grad.clone() for n, p in heads}
        optimizer.step()
    return out | official(trained, "weight.") | {f"weight.{n}": p.detach().clone() for n, p in heads}


save_file(in_both_dtypes(compute), reply)
