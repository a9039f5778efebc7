"""Floating-point operations of one training step of masked autoencoders of transformers and of two towers of open_clip,
counted by PyTorch.

usage: flops.py REQUEST_JSON    [{"model": "vit_mae", "videomae" or "clip", ...numbers of its config,
                                  "hidden": tokens, or for clip "pairs": samples of the batch}, ..]
Prints a line for each: {"forward": .., "backward": ..} of one sample, or of all pairs. Images use the meta device, where
nothing is computed; VideoMAE selects tokens by a boolean mask, which needs real values.
"""
import json
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import VideoMAEConfig, VideoMAEForPreTraining, ViTMAEConfig, ViTMAEForPreTraining


def vit_mae(hidden, **numbers):
    with torch.device("meta"):
        model = ViTMAEForPreTraining(ViTMAEConfig(**numbers, attn_implementation="eager")).train()
        pixels = torch.empty(1, numbers["num_channels"], numbers["image_size"], numbers["image_size"])
    return lambda: model(pixels).loss


def videomae(hidden, **numbers):
    model = VideoMAEForPreTraining(VideoMAEConfig(
        **numbers, use_mean_pooling=False, attn_implementation="eager")).train()
    size = numbers["image_size"]
    clips = torch.randn(1, numbers["num_frames"], numbers["num_channels"], size, size)
    mask = torch.zeros(1, model.videomae.embeddings.num_patches, dtype=torch.bool)
    mask[:, :hidden] = True
    return lambda: model(clips, bool_masked_pos=mask).loss


def clip(pairs, embed, vision, text):
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    with torch.device("meta"):
        model = CLIP(embed, CLIPVisionCfg(**vision), CLIPTextCfg(**text)).train()
        pixels = torch.empty(pairs, 3, *vision["image_size"])
        ids = torch.zeros(pairs, text["context_length"], dtype=torch.int64)
    return lambda: ClipLoss()(*model(pixels, ids))


MODELS = {"vit_mae": vit_mae, "videomae": videomae, "clip": clip}

for request in json.loads(sys.argv[1]):
    forward = MODELS[request.pop("model")](**request)
    with FlopCounterMode(display=False) as counter:
        loss = forward()
        forward_flops = counter.get_total_flops()
        loss.backward()
    print(json.dumps({"forward": forward_flops, "backward": counter.get_total_flops() - forward_flops}))
