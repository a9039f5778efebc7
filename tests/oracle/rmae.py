"""Returns losses, gradients and weights of R-MAE, put together from two decoders and one encoder of transformers'
ViTMAEForPreTraining, after AdamW steps.

usage: rmae.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<official name>, weight.anchor_<official name of the decoder>, input.<i> [B, C, Y, X], noise.<i> [B, N]
reply:   loss.<i>, grad.0.<name>, weight.<name> (after the last step), positions, decoder_positions [N, D];
         all in fp64, and as fp32.<name> in fp32
"""
import copy
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
steps, lr, weight_decay = (numbers.pop(k) for k in ("steps", "lr", "weight_decay"))
anchor_weight, stop_gradient = numbers.pop("anchor"), numbers.pop("stop_gradient")


def compute(dtype):
    inputs = cast(given, dtype)
    model = ViTMAEForPreTraining(ViTMAEConfig(**numbers, layer_norm_eps=1e-6, attn_implementation="eager")).to(dtype).train()
    load(model, inputs)
    second = copy.deepcopy(model)
    second.vit = model.vit
    load(second, inputs | {"weight." + n[len("weight.anchor_"):]: v for n, v in inputs.items() if n.startswith("weight.anchor_")})
    # The encoder is shared, so the second load has changed nothing of it.
    out = {
        "positions": model.vit.embeddings.position_embeddings[0, 1:].clone(),
        "decoder_positions": model.decoder.decoder_pos_embed[0, 1:].clone(),
    }
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    anchors = [(n, p) for n, p in second.named_parameters() if p.requires_grad and n.startswith("decoder.")]
    optimizer = adamw(trained + anchors, lr, weight_decay)

    def named(pairs, prefix):
        kind, rest = prefix.split(".", 1)
        renamed = official(pairs, "")
        return {f"{kind}.{rest}anchor_{name}": value for name, value in renamed.items()}

    ratio = numbers["mask_ratio"]
    for step in range(steps):
        optimizer.zero_grad()
        pixels, noise = inputs[f"input.{step}"], inputs[f"noise.{step}"]
        model.vit.config.mask_ratio = ratio
        encoded = model.vit(pixels, noise=noise)
        prediction = model.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
        hidden = encoded.mask
        model.vit.config.mask_ratio = 1 - ratio
        encoded = model.vit(pixels, noise=-noise)
        assert torch.equal(encoded.mask, 1 - hidden), "the masks are complementary"
        anchor = second.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
        other = anchor.detach() if stop_gradient else anchor
        siamese = (((prediction - other) ** 2).mean(-1) * hidden).sum() / hidden.sum()
        loss = siamese + anchor_weight * model.forward_loss(pixels, anchor, hidden)
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step == 0:
            out |= official(((n, p.grad) for n, p in trained), "grad.0.")
            out |= named([(n, p.grad) for n, p in anchors], "grad.0.")
        optimizer.step()
    return out | official(trained, "weight.") | named(anchors, "weight.")


save_file(in_both_dtypes(compute), reply)
