"""PyTorch implementations of masked autoencoders and FLIP, as programs for interleave.py.

usage: peer_models.py transformers|videomae|blocks|open_clip|METHOD eager|compile SIZES_JSON

transformers  ViTMAEForPreTraining
videomae      VideoMAEForPreTraining of transformers, with new tube masks at every step
blocks        timm's vision transformer blocks in the official repository's model (facebookresearch/mae); blocks of
              PyTorch's own modules if timm is not installed
open_clip     its two encoders with patch dropout, and its contrastive loss
METHOD        any of peer_methods.py

SIZES: side, patch, encoder and decoder (width, depth, heads), batch, dtype (fp32, or bf16 by autocast), device, threads;
for videomae also frames and ratio; for open_clip, instead of the decoder, text (width, depth, heads), embed_dim,
vocab_size, context_length and ratio.
The input is normalized pixels in the device's memory; AdamW is PyTorch's fused one, with the official parameter groups.
"""
import functools
import json
import resource
import sys
import time

import torch
from torch import nn

import peer_methods

RATIO = 0.75
NORM = functools.partial(nn.LayerNorm, eps=1e-6)


class Block(nn.Module):
    """timm's block, used if timm is not installed."""

    def __init__(self, width, heads, mlp_ratio, qkv_bias, norm_layer):
        super().__init__()
        self.norm1, self.norm2, self.heads = norm_layer(width), norm_layer(width), heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class Official(nn.Module):
    """The structure of the official models_mae.py."""

    def __init__(self, block, side, patch, encoder, decoder):
        super().__init__()
        (width, depth, heads), (inner, layers, parts) = encoder, decoder
        tokens, self.patch = (side // patch) ** 2, patch
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.cls, self.mask = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 1, inner))
        # Fixed tables of sines; their values do not affect the time.
        self.register_buffer("positions", torch.randn(1, 1 + tokens, width))
        self.register_buffer("decoder_positions", torch.randn(1, 1 + tokens, inner))
        make = lambda width, heads: block(width, heads, 4, qkv_bias=True, norm_layer=NORM)
        self.blocks, self.norm = nn.ModuleList(make(width, heads) for _ in range(depth)), NORM(width)
        self.decoder_embed = nn.Linear(width, inner)
        self.decoder_blocks, self.decoder_norm = nn.ModuleList(make(inner, parts) for _ in range(layers)), NORM(inner)
        self.pred = nn.Linear(inner, patch * patch * 3)

    def encode(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        batch, tokens, width = x.shape
        restore = (order := torch.rand(batch, tokens, device=x.device).argsort(1)).argsort(1)
        visible = int(tokens * (1 - RATIO))
        x = x.gather(1, order[:, :visible, None].expand(-1, -1, width))
        hidden = torch.ones(batch, tokens, device=x.device)
        hidden[:, :visible] = 0
        x = torch.cat([(self.cls + self.positions[:, :1]).expand(batch, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), hidden.gather(1, restore), restore

    def decode(self, x, restore):
        x = self.decoder_embed(x)
        batch, _, width = x.shape
        masks = self.mask.expand(batch, restore.shape[1] + 1 - x.shape[1], -1).to(x.dtype)
        rest = torch.cat([x[:, 1:], masks], 1).gather(1, restore[:, :, None].expand(-1, -1, width))
        x = torch.cat([x[:, :1], rest], 1) + self.decoder_positions
        for block in self.decoder_blocks:
            x = block(x)
        return self.pred(self.decoder_norm(x))[:, 1:]

    def forward(self, images):
        pred, hidden = self.predict(images)
        batch, channels, side, _ = images.shape
        n = side // self.patch
        target = images.reshape(batch, channels, n, self.patch, n, self.patch)
        target = target.permute(0, 2, 4, 3, 5, 1).reshape(batch, n * n, -1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        return (((pred - target) ** 2).mean(-1) * hidden).sum() / hidden.sum()

    def predict(self, images):
        x, hidden, restore = self.encode(images)
        return self.decode(x, restore), hidden


class ByTransformers(nn.Module):
    def __init__(self, side, patch, encoder, decoder):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        (width, depth, heads), (inner, layers, parts) = encoder, decoder
        self.model = ViTMAEForPreTraining(ViTMAEConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
            image_size=side, patch_size=patch, decoder_hidden_size=inner, decoder_num_hidden_layers=layers,
            decoder_num_attention_heads=parts, decoder_intermediate_size=4 * inner, mask_ratio=RATIO, norm_pix_loss=True))

    def forward(self, images):
        return self.model(images).loss


class ByVideoMae(nn.Module):
    def __init__(self, side, patch, encoder, decoder, frames, ratio):
        super().__init__()
        from transformers import VideoMAEConfig, VideoMAEForPreTraining

        (width, depth, heads), (inner, layers, parts) = encoder, decoder
        self.places, self.slots = (side // patch) ** 2, frames // 2
        self.hidden = int(ratio * self.places)
        self.model = VideoMAEForPreTraining(VideoMAEConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
            image_size=side, patch_size=patch, num_frames=frames, tubelet_size=2, decoder_hidden_size=inner,
            decoder_num_hidden_layers=layers, decoder_num_attention_heads=parts, decoder_intermediate_size=4 * inner,
            norm_pix_loss=True, use_mean_pooling=False))

    def forward(self, clips):
        rank = torch.rand(len(clips), self.places, device=clips.device).argsort(1).argsort(1)
        return self.model(clips, bool_masked_pos=(rank < self.hidden).repeat(1, self.slots)).loss


class ByOpenClip(nn.Module):
    def __init__(self, side, patch, encoder, text, embed_dim, vocab_size, context_length, ratio):
        super().__init__()
        from open_clip.loss import ClipLoss
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        (width, depth, heads), (inner, layers, parts) = encoder, text
        vision = CLIPVisionCfg(
            layers=depth, width=width, head_width=width // heads, patch_size=patch, image_size=side, patch_dropout=ratio)
        text_config = CLIPTextCfg(
            context_length=context_length, vocab_size=vocab_size, width=inner, heads=parts, layers=layers)
        self.model, self.loss = CLIP(embed_dim, vision, text_config), ClipLoss()

    def forward(self, images, ids):
        return self.loss(*self.model(images, ids))


def block_class():
    """Returns the block class and its origin."""
    try:
        from timm.models.vision_transformer import Block as Timms
    except ImportError:
        return Block, "blocks of PyTorch's modules (no timm here)"
    return Timms, "timm's blocks"


def build(name, numbers):
    if name in peer_methods.MODELS:
        import timm
        import transformers
        return peer_methods.MODELS[name](numbers), f"transformers {transformers.__version__}, timm {timm.__version__}"
    if name == "open_clip":
        import open_clip
        keys = ("side", "patch", "encoder", "text", "embed_dim", "vocab_size", "context_length", "ratio")
        return ByOpenClip(*[numbers[key] for key in keys]), f"open_clip {open_clip.__version__}"
    shape = [numbers[key] for key in ("side", "patch", "encoder", "decoder")]
    if name == "videomae":
        import transformers
        return ByVideoMae(*shape, numbers["frames"], numbers["ratio"]), f"transformers {transformers.__version__}"
    if name == "transformers":
        import transformers
        return ByTransformers(*shape), f"transformers {transformers.__version__}"
    block, whose = block_class()
    return Official(block, *shape), whose


def main():
    name, mode, numbers = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    device = torch.device(numbers["device"])
    torch.set_num_threads(numbers["threads"])
    torch.manual_seed(0)
    model, whose = build(name, numbers)
    model = model.train().to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    frames = [numbers["frames"]] if name == "videomae" else []
    batch = [torch.randn(numbers["batch"], *frames, 3, numbers["side"], numbers["side"], device=device)]
    if name == "open_clip":
        batch.append(torch.randint(numbers["vocab_size"], (numbers["batch"], numbers["context_length"]), device=device))
    if "classes" in numbers:
        batch.append(torch.randint(numbers["classes"], (numbers["batch"],), device=device))
    run = torch.compile(model) if mode == "compile" else model
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=numbers["dtype"] == "bf16"):
            loss = run(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for line in sys.stdin:
        steps = int(line)
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        print(f"{(time.perf_counter() - start) / steps:.6f}", flush=True)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_gpu = device.type == "cuda"
    print(json.dumps({"whose": whose, "parameters": sum(p.numel() for p in trained), "memory": {
        "peak": torch.cuda.max_memory_reserved() if on_gpu else resident,
        "peak_tensors": torch.cuda.max_memory_allocated() if on_gpu else 0}}), flush=True)


if __name__ == "__main__":
    main()
