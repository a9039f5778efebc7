"""Masked autoencoders of transformers under the names of the official repositories: ViTMAEForPreTraining by default."""
import torch

PARTS = ("query", "key", "value")
LAYERS = (
    ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
)
VIT_MAE = (
    ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"), ("vit.embeddings.cls_token", "cls_token"),
    ("decoder.mask_token", "mask_token"), ("vit.encoder.layer.", "blocks."), ("vit.layernorm.", "norm."),
    ("decoder.decoder_layers.", "decoder_blocks."), ("decoder.decoder_", "decoder_"), *LAYERS,
)


def rename(name, table=VIT_MAE):
    """Returns the official name of a parameter, and which third of the packed projection it is, or None."""
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    for third, part in enumerate(PARTS):
        if f"attention.attention.{part}" in name:
            return name.replace(f"attention.attention.{part}", "attn.qkv"), third
    return name, None


def load(model, tensors, table=VIT_MAE):
    """Loads the tensors `weight.<official name>` into the model."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                name, third = rename(name, table)
                tensor = tensors["weight." + name]
                value.copy_((tensor if third is None else tensor.chunk(3)[third]).reshape(value.shape))


def official(pairs, prefix, table=VIT_MAE):
    """Returns tensors under their official names, with the three projections stacked."""
    out = {}
    for name, value in pairs:
        out.setdefault(prefix + rename(name, table)[0], []).append(value.detach().clone())
    return {name: torch.cat(values) for name, values in out.items()}
