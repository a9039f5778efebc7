"""Recomputes loss and gradients of dumped steps with ViTMAEForPreTraining of transformers.

usage: replay_dump.py CONFIG.json RANKS DUMP.safetensors...
The config is that of the run; the dumps are those of all ranks for each step in turn. Everything but the shape of the
model comes from the dumps: weights from rank 0, and the rows of all ranks concatenated in order.
Prints a line of JSON for each step: the relative error of the loss, and for each gradient the distance of ours from the
reference in fp64, the distance of the reference in fp32, and the norm and the greatest value of the reference.
"""
import json
import sys

import torch
from safetensors.torch import load_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import get_2d_sincos_pos_embed

from official import load, official
from precision import cast, in_both_dtypes

config = json.load(open(sys.argv[1]))
ranks, paths = int(sys.argv[2]), sys.argv[3:]
(method,) = config["method"].values()
encoder, decoder, shape = method["encoder"], method["decoder"], config["input"]
mlp = {"mlp_ratio": 4}
model = ViTMAEForPreTraining(ViTMAEConfig(
    image_size=shape["height"], patch_size=shape["patch"], num_channels=shape["channels"],
    hidden_size=encoder["width"], num_hidden_layers=encoder["depth"], num_attention_heads=encoder["heads"],
    intermediate_size=encoder["width"] * (mlp | encoder)["mlp_ratio"],
    decoder_hidden_size=decoder["width"], decoder_num_hidden_layers=decoder["depth"],
    decoder_num_attention_heads=decoder["heads"], decoder_intermediate_size=decoder["width"] * (mlp | decoder)["mlp_ratio"],
    mask_ratio=method["mask"]["ratio"], norm_pix_loss=method["target"]["normalize"],
    layer_norm_eps=1e-6, attn_implementation="eager",
)).train()
# transformers leaves the positions of the decoder at zero until a checkpoint is loaded; the paper has a fixed table.
table = get_2d_sincos_pos_embed(decoder["width"], shape["height"] // shape["patch"], add_cls_token=True)
model.decoder.decoder_pos_embed.data.copy_(torch.from_numpy(table)[None])


def compute(dumps, dtype):
    dumps = [cast(dump, dtype) for dump in dumps]
    model.to(dtype).zero_grad()
    load(model, dumps[0])
    rows = torch.cat([dump["input"] for dump in dumps])[:, :, 0]
    # The noise whose ascending order is the dumped order of tokens.
    noise = torch.cat([dump["restore"] for dump in dumps]).to(dtype)
    loss = model(rows, noise=noise).loss
    loss.backward()
    trained = [(name, value.grad) for name, value in model.named_parameters() if value.requires_grad]
    return official(trained, "grad.") | {"loss": loss.detach()}


for first in range(0, len(paths), ranks):
    dumps = [load_file(path) for path in paths[first : first + ranks]]
    ours, reference = dumps[0], in_both_dtypes(lambda dtype: compute(dumps, dtype))
    names = sorted(name for name in reference if name.startswith("grad."))
    assert names == sorted(name for name in ours if name.startswith("grad.")), "other gradients than expected"
    gradients = {}
    for name in names:
        exact = reference[name]
        distance = lambda value: (value.double().reshape(exact.shape) - exact).norm().item()
        gradients[name] = {
            "distance": distance(ours[name]), "fp32": distance(reference[f"fp32.{name}"]),
            "norm": exact.norm().item(), "greatest": exact.abs().max().item(),
        }
    dumped, loss = ours["loss"].item(), reference["loss"].item()
    print(json.dumps({"loss_off": abs(dumped - loss) / loss, "gradients": gradients}))
