"""Builds and loads models of transformers and timm, to compare imported and exported weights by their outputs.

usage: interop.py make KIND FOLDER REQUEST REPLY JSON   builds a model with random weights and saves it in FOLDER
       interop.py load KIND FOLDER REQUEST REPLY        loads an export from FOLDER
KIND: transformers (with "version" 4, 5 or "memory" in JSON), timm, mae (the official names in a .pth)
JSON: size [Y, X], patch, channels, encoder and decoder [width, depth, heads], normalize, dtype
request: input [B, C, Y, X], noise [B, N]
reply: class [B, D] and mean [B, D] of the encoder without masking; loss [1] with the noise, if there is a decoder
"""
import argparse
import json
import sys

import numpy
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import get_2d_sincos_pos_embed, get_2d_sincos_pos_embed_from_grid

from official import load as load_official
from official import official


def table(width, rows, cols):
    """Returns the sine-cosine table of transformers after a row of zeros."""
    grid = numpy.stack(numpy.meshgrid(numpy.arange(cols, dtype=numpy.float64), numpy.arange(rows, dtype=numpy.float64)))
    positions = get_2d_sincos_pos_embed_from_grid(width, grid.reshape([2, 1, rows, cols]))
    return torch.from_numpy(numpy.concatenate([numpy.zeros([1, width]), positions])).float()[None]


def vit_mae(image_size, patch, channels, encoder, decoder, normalize, mlp=4):
    model = ViTMAEForPreTraining(ViTMAEConfig(
        image_size=image_size, patch_size=patch, num_channels=channels, hidden_size=encoder[0],
        num_hidden_layers=encoder[1], num_attention_heads=encoder[2], intermediate_size=mlp * encoder[0],
        decoder_hidden_size=decoder[0], decoder_num_hidden_layers=decoder[1], decoder_num_attention_heads=decoder[2],
        decoder_intermediate_size=mlp * decoder[0], norm_pix_loss=normalize, layer_norm_eps=1e-6, mask_ratio=0.6,
        attn_implementation="eager",
    ))
    positions = get_2d_sincos_pos_embed(decoder[0], image_size // patch, add_cls_token=True)
    model.decoder.decoder_pos_embed.data.copy_(torch.from_numpy(positions)[None])
    return model.eval()


def timm_vit(numbers):
    from timm.models.vision_transformer import VisionTransformer

    (width, depth, heads), patch, (height, across) = numbers["encoder"], numbers["patch"], numbers["size"]
    model = VisionTransformer(
        img_size=(height, across), patch_size=patch, in_chans=numbers["channels"], embed_dim=width, depth=depth,
        num_heads=heads, num_classes=0,
    ).eval()
    model.pos_embed.data.copy_(table(width, height // patch, across // patch))
    return model


def disturb(model):
    """Changes biases and scales, which start at 0 and 1 and would hide mistakes."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "pos" not in name.rsplit(".", 1)[-1]:
                value += 0.05 * torch.randn_like(value)


def in_memory_of_5(name):
    for ours, renamed in (
        ("vit.encoder.layer.", "vit.layers."), ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
    ):
        name = name.replace(ours, renamed)
    return name


def make(kind, folder, numbers):
    torch.manual_seed(7)
    dtype = getattr(torch, numbers.get("dtype", "float32"))
    if kind == "timm":
        model = timm_vit(numbers)
        disturb(model)
        model = model.to(dtype).float()
        save_file({k: v.to(dtype) for k, v in model.state_dict().items()}, f"{folder}/model.safetensors")
        return model
    model = vit_mae(numbers["size"][0], numbers["patch"], numbers["channels"], numbers["encoder"], numbers["decoder"],
                    numbers["normalize"])
    disturb(model)
    if kind == "mae":
        state = official(model.named_parameters(), "")
        state["pos_embed"] = state.pop("vit.embeddings.position_embeddings")
        state["decoder_pos_embed"] = state.pop("decoder_pos_embed")
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(1, numbers["channels"], *numbers["size"])).loss.backward()
        optimizer.step(lambda: None)
        arguments = argparse.Namespace(model="odd", norm_pix_loss=numbers["normalize"], mask_ratio=0.6, lr=None, seed=0)
        checkpoint = {"model": state, "optimizer": optimizer.state_dict(), "epoch": 3, "scaler": {}, "args": arguments}
        # The optimizer has changed the model: evaluate the saved weights.
        torch.save(checkpoint, f"{folder}/checkpoint-3.pth")
        save_file({k: v.contiguous() for k, v in state.items()}, f"{folder}/plain.safetensors")
        load_official(model, {"weight." + k: v for k, v in state.items()})
        return model
    model = model.to(dtype)
    model.save_pretrained(folder)
    if numbers.get("version", 4) != 4:
        path = f"{folder}/model.safetensors"
        rename = in_memory_of_5 if numbers["version"] == "memory" else (
            lambda name: name.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."))
        save_file({rename(k): v for k, v in load_file(path).items()}, path, {"format": "pt"})
    json.dump({"image_mean": [0.4] * numbers["channels"], "image_std": [0.3] * numbers["channels"]},
              open(f"{folder}/preprocessor_config.json", "w"))
    return model.float()


def load(kind, folder):
    if kind == "timm":
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if kind == "transformers":
        model, report = ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        assert model.config.layer_norm_eps == 1e-6
        return model.eval()
    a = json.load(open(f"{folder}/config.json"))["arguments"]
    model = vit_mae(a["img_size"][0], a["patch_size"], a["in_chans"], [a["embed_dim"], a["depth"], a["num_heads"]],
                    [a["decoder_embed_dim"], a["decoder_depth"], a["decoder_num_heads"]], a["norm_pix_loss"],
                    a["mlp_ratio"])
    state = load_file(f"{folder}/model.safetensors")
    load_official(model, {"weight." + k: v for k, v in state.items()})
    model.vit.embeddings.position_embeddings.data.copy_(state["pos_embed"])
    model.decoder.decoder_pos_embed.data.copy_(state["decoder_pos_embed"])
    return model


@torch.no_grad()
def evaluate(model, inputs):
    if not hasattr(model, "vit"):
        tokens = model.forward_features(inputs["input"])
        return {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
    out = {"loss": model(inputs["input"], noise=inputs["noise"]).loss.reshape(1)}
    model.vit.embeddings.config.mask_ratio = 0.0
    order = torch.arange(inputs["noise"].shape[1]).float().expand_as(inputs["noise"])
    tokens = model.vit(inputs["input"], noise=order).last_hidden_state
    return out | {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}


command, kind, folder, request, reply = sys.argv[1:6]
model = make(kind, folder, json.loads(sys.argv[6])) if command == "make" else load(kind, folder)
save_file({name: value.contiguous() for name, value in evaluate(model, load_file(request)).items()}, reply)
