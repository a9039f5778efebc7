"""Asks OmniMAE put together from the layers of transformers' VideoMAEForPreTraining and PyTorch's own, tensors under our
names. What sets it apart from VideoMAE is written out here: pictures are repeated to the frames of a cube, mask tokens and
positions come in at the encoder's width and in the original order, targets have 1e-6 inside of the root.

usage: omnimae.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<name>, input.<i> [B, C, T, Y, X] and drop.<i> int64 [B, M] for each step i; T is 1 for pictures
reply:   loss.<i>, grad.<i>.<name> (of steps 0 and 1), weight.<name> (after the last step)
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

BLOCK = (
    ("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
)


class OmniMae(torch.nn.Module):
    def __init__(self, numbers):
        super().__init__()
        config = VideoMAEConfig(**numbers, layer_norm_eps=1e-6, use_mean_pooling=False, attn_implementation="eager")
        whole = VideoMAEForPreTraining(config)
        whole.decoder.norm.eps = 1e-6
        video, width = whole.videomae, config.hidden_size
        self.projection = video.embeddings.patch_embeddings.projection
        self.encoder, self.norm = video.encoder.layer, video.layernorm
        self.embed = torch.nn.Linear(width, config.decoder_hidden_size)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.decoder, self.decoder_norm, self.head = whole.decoder.decoder_layers, whole.decoder.norm, whole.decoder.head
        self.tokens, self.frames, self.patch = video.embeddings.num_patches, config.tubelet_size, config.patch_size
        self.table = get_sinusoid_encoding_table(self.tokens, width)

    def forward(self, x, drop):
        if x.shape[2] == 1:
            x = x.repeat(1, 1, self.frames, 1, 1)
        rows = self.projection(x).flatten(2).transpose(1, 2)
        hidden = torch.zeros(rows.shape[:2], dtype=torch.bool).scatter_(1, drop, True)
        # The first rows of the table are those of the first slot.
        table = self.table[:, : rows.shape[1]].expand_as(rows)
        seen = (rows + table)[~hidden].view(len(x), -1, rows.shape[2])
        for layer in self.encoder:
            seen = first(layer(seen))
        seen = self.norm(seen)
        filled = torch.where(hidden[..., None], self.mask_token, torch.zeros_like(rows).masked_scatter(~hidden[..., None], seen))
        out = self.embed(filled + table)
        for layer in self.decoder:
            out = first(layer(out))
        guess = self.head(self.decoder_norm(out))
        return ((guess - self.target(x))[hidden] ** 2).mean()

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
    """Our name, the module's parameter, and which part of ours it is: (part, of how many)."""
    for name, value in model.named_parameters():
        part = None
        for ours, theirs in (("encoder", "encoder."), ("decoder", "decoder.")):
            if name.startswith(theirs):
                name = f"{ours}.blocks.{name.removeprefix(theirs)}"
        for ours, theirs in BLOCK:
            name = name.replace("." + theirs, "." + ours)
        for third, which in enumerate(("query", "key", "value")):
            name, was = name.replace(f"attention.attention.{which}.weight", "attn.qkv.weight"), name
            part = third if name != was else part
        for third, which in ((0, "q_bias"), (2, "v_bias")):
            name, was = name.replace(f"attention.attention.{which}", "attn.qkv.bias"), name
            part = third if name != was else part
        for ours, theirs in (
            ("encoder.embed.", "projection."), ("encoder.norm.", "norm."), ("decoder.embed.", "embed."),
            ("decoder.mask_token", "mask_token"), ("decoder.norm.", "decoder_norm."), ("decoder.pred.", "head."),
        ):
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        yield name, value, part


def ours_of(model, pick, prefix):
    """Whole tensors under our names; keys have no bias here, as softmax would not see one."""
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
    asked, numbers = load_file(request), json.loads(text)
    steps, lr, weight_decay = (numbers.pop(key) for key in ("steps", "lr", "weight_decay"))
    model = OmniMae(numbers).train()
    with torch.no_grad():
        for name, value, part in named(model):
            given = asked["weight." + name]
            if name == "encoder.embed.weight":
                d, c, f, p, _ = value.shape
                given = given.view(d, f, p, p, c).permute(0, 4, 1, 2, 3)
            value.copy_((given if part is None else given.chunk(3)[part]).reshape(value.shape))
    trained = [value for _, value, _ in named(model)]
    optimizer = torch.optim.AdamW([
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ], lr=lr, betas=(0.9, 0.95))
    out = {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(asked[f"input.{step}"], asked[f"drop.{step}"])
        loss.backward()
        out[f"loss.{step}"] = loss.detach().reshape(1)
        if step < 2:
            out |= ours_of(model, lambda value: value.grad, f"grad.{step}.")
        optimizer.step()
    save_file(out | ours_of(model, lambda value: value, "weight."), reply)


main(*sys.argv[1:])
