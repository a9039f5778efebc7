"""Returns the contrastive loss of two towers of open_clip and all its gradients.

usage: flip.py REQUEST.safetensors REPLY.safetensors CONFIG_JSON
request: weight.<our name>, input [B, C, Y, X], text int64 [B, L], order int64 [B, N] (tokens in the order in which
         they are kept), positions [N, D] (if they are fixed), words int64 [B, K] (if captions are masked: the positions of
         visible tokens)
reply:   loss.0, grad.0.<our name>, image [B, E], caption [B, E] (unit vectors without masks); all in fp64, and as
         fp32.<name> in fp32

With "towers": "flip" options of open_clip give the model of FLIP (no normalization before the blocks, no causal mask,
pooling of the first token, tanh GELU, fixed positions); the bias of the patch embedding and the mean over all tokens with
the class token are added here.
"""
import json
import sys
from unittest import mock

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file

from precision import cast, in_both_dtypes

request, reply, text = sys.argv[1:4]
given, numbers = load_file(request), json.loads(text)
paper = numbers["towers"] == "flip"
norm, activation = {"eps": 1e-6}, {"approximate": "tanh"} if paper else None
vision = CLIPVisionCfg(
    layers=numbers["depth"], width=numbers["width"], head_width=numbers["width"] // numbers["heads"],
    patch_size=numbers["patch"], image_size=tuple(numbers["size"]), patch_dropout=numbers["ratio"],
    no_ln_pre=paper, norm_kwargs=norm, act_kwargs=activation,
)
text_config = CLIPTextCfg(
    context_length=numbers["context_length"], vocab_size=numbers["vocab_size"], width=numbers["text_width"],
    heads=numbers["text_heads"], layers=numbers["text_depth"], norm_kwargs=norm, act_kwargs=activation,
    no_causal_mask=paper, pool_type="first" if paper else "argmax",
)
LAYERS = {
    "norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}
SINGLE = {
    "image.cls_token": "visual.class_embedding", "image.positions": "visual.positional_embedding",
    "text.token": "token_embedding.weight", "text.positions": "positional_embedding",
    "image_projection.weight": "visual.proj", "text_projection.weight": "text_projection", "logit_scale": "logit_scale",
}
PREFIXES = {
    "image.embed.": "visual.conv1.", "image.norm_pre.": "visual.ln_pre.", "image.norm.": "visual.ln_post.",
    "text.norm.": "ln_final.",
}


def theirs(name):
    if name in SINGLE:
        return SINGLE[name]
    for ours, other in PREFIXES.items():
        if name.startswith(ours):
            return other + name.removeprefix(ours)
    tower, _, index, rest = name.split(".", 3)
    before = "visual." if tower == "image" else ""
    layer, leaf = rest.rsplit(".", 1)
    layer = f"attn.in_proj_{leaf}" if layer == "attn.qkv" else f"{LAYERS[layer]}.{leaf}"
    return f"{before}transformer.resblocks.{index}.{layer}"


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


def build(inputs, dtype):
    torch.manual_seed(0)
    model = CLIP(numbers["embed_dim"], vision, text_config).train()
    visual = model.visual
    visual.conv1 = torch.nn.Conv2d(3, numbers["width"], numbers["patch"], numbers["patch"], bias=True)
    if paper:
        visual._global_pool = lambda x: (x.mean(dim=1), x)
        table = torch.cat([torch.zeros(1, numbers["width"]), inputs["positions"]])
        visual.positional_embedding = torch.nn.Parameter(table, requires_grad=False)
    return model.to(dtype)


def visible_encoder(model, keep):
    """Returns model.encode_text of the visible tokens; open_clip cannot mask captions."""

    def encode_visible(text, normalize=False):
        x = model.token_embedding(text) + model.positional_embedding
        x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        mask = None if model.attn_mask is None else model.attn_mask[: keep.shape[1], : keep.shape[1]]
        x = model.ln_final(model.transformer(x, attn_mask=mask))
        pooled = torch.zeros(len(x), dtype=torch.long) if paper else text.gather(1, keep).argmax(1)
        x = x[torch.arange(len(x)), pooled] @ model.text_projection
        return torch.nn.functional.normalize(x, dim=-1) if normalize else x

    return encode_visible


def compute(dtype):
    inputs = cast(given, dtype)
    model = build(inputs, dtype)
    parameters = dict(model.named_parameters())
    weights = {name.removeprefix("weight."): value for name, value in inputs.items() if name.startswith("weight.")}
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert {theirs(name) for name in weights} == trained, {theirs(name) for name in weights} ^ trained
    with torch.no_grad():
        for name, value in weights.items():
            other = parameters[theirs(name)]
            other.copy_(to_theirs(name, value, other))

    # The greatest values of the noise select the visible patches, in this order.
    order = inputs["order"]
    noise = torch.empty(order.shape).scatter_(1, order, -torch.arange(order.shape[1]).to(dtype).expand(order.shape))
    encode = visible_encoder(model, inputs["words"]) if "words" in inputs else model.encode_text
    with mock.patch("torch.randn", lambda *size: noise), mock.patch.object(model, "encode_text", encode):
        image, caption, scale = model(inputs["input"], inputs["text"])
    loss = ClipLoss()(image, caption, scale)
    loss.backward()
    out = {"loss.0": loss.detach().reshape(1)}
    out |= {f"grad.0.{name}": to_ours(name, parameters[theirs(name)].grad, value) for name, value in weights.items()}
    model.eval()
    with torch.no_grad():
        image, caption, _ = model(inputs["input"], inputs["text"])
    return out | {"image": image, "caption": caption}


save_file(in_both_dtypes(compute), reply)
