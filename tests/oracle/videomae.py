"""Asks transformers' VideoMAEForPreTraining, its tensors under the official VideoMAE repository's names.

usage: videomae.py steps REQUEST.safetensors REPLY.safetensors CONFIG_JSON
       videomae.py positions TOKENS WIDTH REPLY.safetensors
       videomae.py make FOLDER REQUEST.safetensors REPLY.safetensors CONFIG_JSON
       videomae.py load official|transformers FOLDER REQUEST.safetensors REPLY.safetensors
steps:  request: weight.<official name>, input.<i> [B, C, T, Y, X] and drop.<i> int64 [B, M] for each step i
        reply:   loss.<i>, grad.0.<official name>, weight.<official name> (after the last step)
make:   a model of random weights, saved in FOLDER as transformers saves it (transformers/) and as the official training
        does (checkpoint-3.pth, with its arguments; plain.safetensors, without)
load:   what `occlude export` wrote
both:   request: input, drop; reply: loss, mean (of all tokens, nothing hidden)
"""
import argparse
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from official import LAYERS, load, official

TABLE = (
    ("videomae.embeddings.patch_embeddings.projection", "encoder.patch_embed.proj"),
    ("videomae.encoder.layer.", "encoder.blocks."), ("videomae.layernorm.", "encoder.norm."),
    ("decoder.decoder_layers.", "decoder.blocks."), ("attention.attention.q_bias", "attn.q_bias"),
    ("attention.attention.v_bias", "attn.v_bias"), *LAYERS,
)


def build(numbers):
    model = VideoMAEForPreTraining(VideoMAEConfig(
        **numbers, layer_norm_eps=1e-6, use_mean_pooling=False, attn_implementation="eager"))
    return as_official(model)


def as_official(model):
    """The config does not reach this normalisation; the official code has 1e-6 everywhere."""
    model.decoder.norm.eps = 1e-6
    return model.train()


def ask(model, clips, drop):
    hidden = torch.zeros(clips.shape[0], model.videomae.embeddings.num_patches, dtype=torch.bool).scatter_(1, drop, True)
    return model(clips.transpose(1, 2), bool_masked_pos=hidden)


def steps(request, reply, text):
    asked, numbers = load_file(request), json.loads(text)
    count, lr, weight_decay = (numbers.pop(k) for k in ("steps", "lr", "weight_decay"))
    torch.manual_seed(0)
    model = build(numbers)
    load(model, asked, TABLE)
    trained = list(model.named_parameters())
    decays = lambda name, value: value.ndim > 1 and name != "mask_token"
    optimizer = torch.optim.AdamW([
        {"params": [p for n, p in trained if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in trained if not decays(n, p)], "weight_decay": 0.0},
    ], lr=lr, betas=(0.9, 0.95))
    out = {}
    for step in range(count):
        optimizer.zero_grad()
        loss = ask(model, asked[f"input.{step}"], asked[f"drop.{step}"]).loss
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step == 0:
            out |= official(((n, p.grad) for n, p in trained), "grad.0.", TABLE)
        optimizer.step()
    save(out | official(trained, "weight.", TABLE), reply)


def save(tensors, path):
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


@torch.no_grad()
def answer(model, request, reply):
    asked = load_file(request)
    mean = model.videomae(asked["input"].transpose(1, 2)).last_hidden_state.mean(1)
    save({"loss": ask(model, asked["input"], asked["drop"]).loss.reshape(1), "mean": mean}, reply)


def make(folder, request, reply, text):
    torch.manual_seed(7)
    numbers = json.loads(text)
    model = build(numbers)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * torch.randn_like(value)
    model.save_pretrained(f"{folder}/transformers")
    state = official(model.named_parameters(), "", TABLE)
    arguments = argparse.Namespace(
        model="odd", input_size=numbers["image_size"], num_frames=numbers["num_frames"], mask_ratio=0.75, mask_type="tube",
        normlize_target=numbers["norm_pix_loss"], lr=None)
    torch.save({"model": state, "epoch": 3, "args": arguments}, f"{folder}/checkpoint-3.pth")
    save(state, f"{folder}/plain.safetensors")
    answer(model, request, reply)


def opened(kind, folder):
    if kind == "transformers":
        model, told = VideoMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
        return as_official(model)
    said = json.load(open(f"{folder}/config.json"))
    a = said["arguments"]
    model = build({
        "image_size": a["img_size"], "patch_size": a["patch_size"], "tubelet_size": a["tubelet_size"],
        "num_channels": a["encoder_in_chans"], "num_frames": said["num_frames"], "norm_pix_loss": said["normlize_target"],
        "hidden_size": a["encoder_embed_dim"], "num_hidden_layers": a["encoder_depth"],
        "num_attention_heads": a["encoder_num_heads"], "intermediate_size": a["mlp_ratio"] * a["encoder_embed_dim"],
        "decoder_hidden_size": a["decoder_embed_dim"], "decoder_num_hidden_layers": a["decoder_depth"],
        "decoder_num_attention_heads": a["decoder_num_heads"],
        "decoder_intermediate_size": a["mlp_ratio"] * a["decoder_embed_dim"],
    })
    state = load_file(f"{folder}/model.safetensors")
    assert sorted(state) == sorted(official(model.named_parameters(), "", TABLE)), sorted(state)
    load(model, {"weight." + name: value for name, value in state.items()}, TABLE)
    return model


what, *rest = sys.argv[1:]
if what == "steps":
    steps(*rest)
elif what == "positions":
    save_file({"positions": get_sinusoid_encoding_table(int(rest[0]), int(rest[1]))[0]}, rest[2])
elif what == "make":
    make(*rest)
else:
    kind, folder, request, reply = rest
    answer(opened(kind, folder), request, reply)
