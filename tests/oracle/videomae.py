"""VideoMAEForPreTraining of transformers, with tensors under the names of the official VideoMAE repository.

usage: videomae.py steps REQUEST.safetensors REPLY.safetensors CONFIG_JSON
       videomae.py positions TOKENS WIDTH REPLY.safetensors
       videomae.py make FOLDER REQUEST.safetensors REPLY.safetensors CONFIG_JSON
       videomae.py load official|transformers FOLDER REQUEST.safetensors REPLY.safetensors
steps:  request: weight.<official name>, input.<i> [B, C, T, Y, X] and drop.<i> int64 [B, M] for each step i
        reply:   loss.<i>, grad.0.<official name>, weight.<official name> (after the last step);
                 all in fp64, and as fp32.<name> in fp32
make:   a model with random weights, saved in FOLDER in the format of transformers (transformers/) and in that of the official
        training (checkpoint-3.pth, with its arguments; plain.safetensors, without)
load:   an output of `occlude export`
both:   request: input, drop; reply: loss, mean (of all tokens, without a mask)
"""
import argparse
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from official import LAYERS, load, official
from precision import cast, in_both_dtypes
from training import adamw

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
    """Sets the epsilon that the config does not cover; the official code has 1e-6 everywhere."""
    model.decoder.norm.eps = 1e-6
    return model.train()


def forward(model, clips, drop):
    hidden = torch.zeros(clips.shape[0], model.videomae.embeddings.num_patches, dtype=torch.bool).scatter_(1, drop, True)
    return model(clips.transpose(1, 2), bool_masked_pos=hidden)


def steps(request, reply, text):
    inputs, numbers = load_file(request), json.loads(text)
    training = [numbers.pop(k) for k in ("steps", "lr", "weight_decay")]
    save(in_both_dtypes(lambda dtype: train(cast(inputs, dtype), numbers, *training, dtype)), reply)


def train(inputs, numbers, count, lr, weight_decay, dtype):
    torch.manual_seed(0)
    model = build(numbers).to(dtype)
    load(model, inputs, TABLE)
    trained = list(model.named_parameters())
    optimizer = adamw(trained, lr, weight_decay, exempt=("mask_token",))
    out = {}
    for step in range(count):
        optimizer.zero_grad()
        loss = forward(model, inputs[f"input.{step}"], inputs[f"drop.{step}"]).loss
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step == 0:
            out |= official(((n, p.grad) for n, p in trained), "grad.0.", TABLE)
        optimizer.step()
    return out | official(trained, "weight.", TABLE)


def save(tensors, path):
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


@torch.no_grad()
def evaluate(model, request, reply):
    inputs = load_file(request)
    mean = model.videomae(inputs["input"].transpose(1, 2)).last_hidden_state.mean(1)
    save({"loss": forward(model, inputs["input"], inputs["drop"]).loss.reshape(1), "mean": mean}, reply)


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
    evaluate(model, request, reply)


def open_model(kind, folder):
    if kind == "transformers":
        model, report = VideoMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        return as_official(model)
    config = json.load(open(f"{folder}/config.json"))
    a = config["arguments"]
    model = build({
        "image_size": a["img_size"], "patch_size": a["patch_size"], "tubelet_size": a["tubelet_size"],
        "num_channels": a["encoder_in_chans"], "num_frames": config["num_frames"], "norm_pix_loss": config["normlize_target"],
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


command, *arguments = sys.argv[1:]
if command == "steps":
    steps(*arguments)
elif command == "positions":
    save_file({"positions": get_sinusoid_encoding_table(int(arguments[0]), int(arguments[1]))[0]}, arguments[2])
elif command == "make":
    make(*arguments)
else:
    kind, folder, request, reply = arguments
    evaluate(open_model(kind, folder), request, reply)
