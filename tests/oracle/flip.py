"""Asks open_clip for the contrastive loss of a pair of towers and all its gradients.

usage: flip.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<our name>, input [B, C, Y, X], text int64 [B, L], order int64 [B, N] (tokens in the order in which
         they are kept), positions [N, D] (where they are fixed), words int64 [B, K] (where some tokens of captions are
         hidden: the places of those that stay)
reply:   loss.0, grad.0.<our name>, image [B, E], caption [B, E] (unit vectors with nothing hidden)

With "towers": "plain" open_clip's own switches bring its model to FLIP's (no normalisation before the blocks, no causal
mask, the first token speaks, tanh units, fixed positions); a bias of the patch embedding and the mean over all tokens,
class token included, it does not have, and they are put in here.
"""
import json
import sys
from unittest import mock

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file

request, reply, text = sys.argv[1:4]
asked, numbers = load_file(request), json.loads(text)
paper = numbers["towers"] == "plain"
norm, unit = {"eps": 1e-6}, {"approximate": "tanh"} if paper else None
vision = CLIPVisionCfg(
    layers=numbers["depth"], width=numbers["width"], head_width=numbers["width"] // numbers["heads"],
    patch_size=numbers["patch"], image_size=tuple(numbers["size"]), patch_dropout=numbers["ratio"],
    no_ln_pre=paper, norm_kwargs=norm, act_kwargs=unit,
)
words = CLIPTextCfg(
    context_length=numbers["length"], vocab_size=numbers["vocabulary"], width=numbers["text_width"],
    heads=numbers["text_heads"], layers=numbers["text_depth"], norm_kwargs=norm, act_kwargs=unit,
    no_causal_mask=paper, pool_type="first" if paper else "argmax",
)
torch.manual_seed(0)
model = CLIP(numbers["embed"], vision, words).train()
visual = model.visual
visual.conv1 = torch.nn.Conv2d(3, numbers["width"], numbers["patch"], numbers["patch"], bias=True)
if paper:
    visual._global_pool = lambda x: (x.mean(dim=1), x)
    table = torch.cat([torch.zeros(1, numbers["width"]), asked["positions"]])
    visual.positional_embedding = torch.nn.Parameter(table, requires_grad=False)

LAYERS = {
    "norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}
LONE = {
    "image.cls_token": "visual.class_embedding", "image.positions": "visual.positional_embedding",
    "text.token": "token_embedding.weight", "text.positions": "positional_embedding",
    "image_projection.weight": "visual.proj", "text_projection.weight": "text_projection", "logit_scale": "logit_scale",
}
PREFIXES = {
    "image.embed.": "visual.conv1.", "image.norm_pre.": "visual.ln_pre.", "image.norm.": "visual.ln_post.",
    "text.norm.": "ln_final.",
}


def theirs(name):
    if name in LONE:
        return LONE[name]
    for ours, other in PREFIXES.items():
        if name.startswith(ours):
            return other + name.removeprefix(ours)
    tower, _, number, rest = name.split(".", 3)
    before = "visual." if tower == "image" else ""
    layer, leaf = rest.rsplit(".", 1)
    layer = f"attn.in_proj_{leaf}" if layer == "attn.qkv" else f"{LAYERS[layer]}.{leaf}"
    return f"{before}transformer.resblocks.{number}.{layer}"


def to_theirs(name, x, like):
    if name == "image.embed.weight":
        patch = numbers["patch"]
        return x.view(-1, patch, patch, 3).permute(0, 3, 1, 2)
    return x.T if name.endswith("_projection.weight") else x.view(like.shape)


def to_ours(name, x, like):
    if name == "image.embed.weight":
        x = x.permute(0, 2, 3, 1)
    elif name.endswith("_projection.weight"):
        x = x.T
    return x.reshape(like.shape).contiguous()


parameters = dict(model.named_parameters())
given = {name.removeprefix("weight."): value for name, value in asked.items() if name.startswith("weight.")}
trained = {name for name, p in parameters.items() if p.requires_grad}
assert {theirs(name) for name in given} == trained, {theirs(name) for name in given} ^ trained
with torch.no_grad():
    for name, value in given.items():
        other = parameters[theirs(name)]
        other.copy_(to_theirs(name, value, other))

# Their noise decides by its greatest values which patches stay, and in which order.
order = asked["order"]
noise = torch.empty(order.shape).scatter_(1, order, -torch.arange(order.shape[1]).float().expand(order.shape))
def encode_some(text, normalize=False):
    """model.encode_text of the tokens that stay; it has no way to leave some out by itself."""
    keep = asked["words"]
    x = model.token_embedding(text) + model.positional_embedding
    x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
    mask = None if model.attn_mask is None else model.attn_mask[: keep.shape[1], : keep.shape[1]]
    x = model.ln_final(model.transformer(x, attn_mask=mask))
    speaks = torch.zeros(len(x), dtype=torch.long) if paper else text.gather(1, keep).argmax(1)
    x = x[torch.arange(len(x)), speaks] @ model.text_projection
    return torch.nn.functional.normalize(x, dim=-1) if normalize else x


encode = encode_some if "words" in asked else model.encode_text
with mock.patch("torch.randn", lambda *size: noise), mock.patch.object(model, "encode_text", encode):
    image, caption, scale = model(asked["input"], asked["text"])
loss = ClipLoss()(image, caption, scale)
loss.backward()
out = {"loss.0": loss.detach().reshape(1)}
out |= {f"grad.0.{name}": to_ours(name, parameters[theirs(name)].grad, value) for name, value in given.items()}
model.eval()
with torch.no_grad():
    image, caption, _ = model(asked["input"], asked["text"])
out |= {"image": image, "caption": caption}
save_file({name: value.contiguous() for name, value in out.items()}, reply)
