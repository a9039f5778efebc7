"""OmniMAE built from layers of VideoMAEForPreTraining in transformers and of PyTorch, with tensors under our names. Its
differences from VideoMAE are implemented here: images are repeated to the frames of a cube, mask tokens and positions are
added at the width of the encoder and in the original order, and the epsilon of targets, 1e-6, is inside the root.

usage: omnimae.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<name>, input.<i> [B, C, T, Y, X] and drop.<i> int64 [B, M] for each step i; T is 1 for images
reply:   loss.<i>, grad.<i>.<name> (of steps 0 and 1), weight.<name> (after the last step); all
         in fp64, and as fp32.<name> in fp32
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from precision import cast, in_both_dtypes
from training import adamw

BLOCK = (
    ("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
)


class OmniMae(torch.nn.Module):
    def __init__(self, numbers):
        super().__init__()
        config = VideoMAEConfig(**numbers, layer_norm_eps=1e-6, use_mean_pooling=False, attn_implementation="eager")
        pretraining = VideoMAEForPreTraining(config)
        pretraining.decoder.norm.eps = 1e-6
        video, width = pretraining.videomae, config.hidden_size
        self.projection = video.embeddings.patch_embeddings.projection
        self.encoder, self.norm = video.encoder.layer, video.layernorm
        self.embed = torch.nn.Linear(width, config.decoder_hidden_size)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        decoder = pretraining.decoder
        self.decoder, self.decoder_norm, self.head = decoder.decoder_layers, decoder.norm, decoder.head
        self.tokens, self.frames, self.patch = video.embeddings.num_patches, config.tubelet_size, config.patch_size
        self.table = get_sinusoid_encoding_table(self.tokens, width)

    def forward(self, x, drop):
        if x.shape[2] == 1:
            x = x.repeat(1, 1, self.frames, 1, 1)
        rows = self.projection(x).flatten(2).transpose(1, 2)
        hidden = torch.zeros(rows.shape[:2], dtype=torch.bool).scatter_(1, drop, True)
        # The first rows of the table belong to the first slot.
        table = self.table[:, : rows.shape[1]].expand_as(rows)
        visible = (rows + table)[~hidden].view(len(x), -1, rows.shape[2])
        for layer in self.encoder:
            visible = first(layer(visible))
        visible = self.norm(visible)
        hidden_rows = hidden[..., None]
        filled = torch.where(hidden_rows, self.mask_token, torch.zeros_like(rows).masked_scatter(~hidden_rows, visible))
        out = self.embed(filled + table)
        for layer in self.decoder:
            out = first(layer(out))
        prediction = self.head(self.decoder_norm(out))
        return ((prediction - self.target(x))[hidden] ** 2).mean()

    def target(self, x):
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if x.shape[1] == 3 else ((0.0,), (1.0,))
        x = x * torch.tensor(std).view(-1, 1, 1, 1) + torch.tensor(mean).view(-1, 1, 1, 1)
        b, c, t, h, w = x.shape
        f, p = self.frames, self.patch
        cubes = x.view(b, c, t // f, f, h // p, p, w // p, p).permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6).flatten(1, 3)
        cubes = (cubes - cubes.mean(-2, keepdim=True)) / (cubes.var(-2, unbiased=True, keepdim=True) + 1e-6).sqrt()
        return cubes.flatten(2)


def first(out):
    return out[0] if isinstance(out, tuple) else out


def named(model):
    """Yields our name, the parameter of the module, and which third of our tensor it is, or None."""
    for name, value in model.named_parameters():
        part = None
        for ours, theirs in (("encoder", "encoder."), ("decoder", "decoder.")):
            if name.startswith(theirs):
                name = f"{ours}.blocks.{name.removeprefix(theirs)}"
        for ours, theirs in BLOCK:
            name = name.replace("." + theirs, "." + ours)
        for third, which in enumerate(("query", "key", "value")):
            name, before = name.replace(f"attention.attention.{which}.weight", "attn.qkv.weight"), name
            part = third if name != before else part
        for third, which in ((0, "q_bias"), (2, "v_bias")):
            name, before = name.replace(f"attention.attention.{which}", "attn.qkv.bias"), name
            part = third if name != before else part
        for ours, theirs in (
            ("encoder.embed.", "projection."), ("encoder.norm.", "norm."), ("decoder.embed.", "embed."),
            ("decoder.mask_token", "mask_token"), ("decoder.norm.", "decoder_norm."), ("decoder.pred.", "head."),
        ):
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        yield name, value, part


def ours_of(model, pick, prefix):
    """Returns full tensors under our names; keys have no bias here, because softmax cancels it."""
    out = {}
    for name, value, part in named(model):
        value = pick(value).detach().clone()
        if name == "encoder.embed.weight":
            value = value.permute(0, 2, 3, 4, 1).flatten(1)
        out.setdefault(prefix + name, {})[part or 0] = value
    return {
        name: torch.cat([parts.get(at, torch.zeros_like(parts[0])) for at in range(max(parts) + 1)]).contiguous()
        for name, parts in out.items()
    }


def main(request, reply, text):
    inputs, numbers = load_file(request), json.loads(text)
    training = [numbers.pop(key) for key in ("steps", "lr", "weight_decay")]
    save_file(in_both_dtypes(lambda dtype: train(cast(inputs, dtype), numbers, *training, dtype)), reply)


def train(inputs, numbers, steps, lr, weight_decay, dtype):
    model = OmniMae(numbers).to(dtype).train()
    model.table = model.table.to(dtype)
    with torch.no_grad():
        for name, value, part in named(model):
            weight = inputs["weight." + name]
            if name == "encoder.embed.weight":
                d, c, f, p, _ = value.shape
                weight = weight.view(d, f, p, p, c).permute(0, 4, 1, 2, 3)
            value.copy_((weight if part is None else weight.chunk(3)[part]).reshape(value.shape))
    optimizer = adamw([(name, value) for name, value, _ in named(model)], lr, weight_decay)
    out = {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(inputs[f"input.{step}"], inputs[f"drop.{step}"])
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step < 2:
            out |= ours_of(model, lambda value: value.grad, f"grad.{step}.")
        optimizer.step()
    return out | ours_of(model, lambda value: value, "weight.")


main(*sys.argv[1:])
