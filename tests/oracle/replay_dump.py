"""Asks transformers' ViTMAEForPreTraining for the loss and gradients of steps that were dumped.

usage: replay_dump.py CONFIG.json RANKS DUMP.safetensors...
The config is the run's own, the dumps are those of all ranks for each step in turn. Everything but the shape of the
model comes from the dumps: weights from that of rank 0, rows of all ranks joined in their order.
Prints a line of JSON for each step: how far the loss is off (relative), and for each gradient the distance between the
two, the norm and the greatest value of theirs.
"""
import json
import sys

import torch
from safetensors.torch import load_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import get_2d_sincos_pos_embed

from official import load, official

config = json.load(open(sys.argv[1]))
ranks, paths = int(sys.argv[2]), sys.argv[3:]
(method,) = config["method"].values()
encoder, decoder, seen = method["encoder"], method["decoder"], config["input"]
mlp = {"mlp_ratio": 4}
model = ViTMAEForPreTraining(ViTMAEConfig(
    image_size=seen["height"], patch_size=seen["patch"], num_channels=seen["channels"],
    hidden_size=encoder["width"], num_hidden_layers=encoder["depth"], num_attention_heads=encoder["heads"],
    intermediate_size=encoder["width"] * (mlp | encoder)["mlp_ratio"],
    decoder_hidden_size=decoder["width"], decoder_num_hidden_layers=decoder["depth"],
    decoder_num_attention_heads=decoder["heads"], decoder_intermediate_size=decoder["width"] * (mlp | decoder)["mlp_ratio"],
    mask_ratio=method["mask"]["ratio"], norm_pix_loss=method["target"]["normalize"],
    layer_norm_eps=1e-6, attn_implementation="eager",
)).train()
# transformers leaves the decoder's positions at zero until a checkpoint is loaded; the paper's are the fixed table.
table = get_2d_sincos_pos_embed(decoder["width"], seen["height"] // seen["patch"], add_cls_token=True)
model.decoder.decoder_pos_embed.data.copy_(torch.from_numpy(table)[None])

for first in range(0, len(paths), ranks):
    dumps = [load_file(path) for path in paths[first : first + ranks]]
    load(model, dumps[0])
    model.zero_grad()
    rows = torch.cat([dump["input"] for dump in dumps])[:, :, 0]
    # The noise whose ascending order is the dumped order of tokens.
    noise = torch.cat([dump["restore"] for dump in dumps]).float()
    loss = model(rows, noise=noise).loss
    loss.backward()

    ours = dumps[0]
    theirs = official(((name, value.grad) for name, value in model.named_parameters() if value.requires_grad), "grad.")
    assert sorted(theirs) == sorted(name for name in ours if name.startswith("grad.")), "other gradients than expected"
    gradients = {}
    for name, value in theirs.items():
        off = (ours[name].reshape(value.shape) - value).norm().item()
        gradients[name] = {"distance": off, "norm": value.norm().item(), "greatest": value.abs().max().item()}
    told = ours["loss"].item()
    print(json.dumps({"loss_off": abs(told - loss.item()) / loss.item(), "gradients": gradients}))
