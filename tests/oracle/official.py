"""transformers' masked autoencoders under the official repositories' names: ViTMAEForPreTraining unless a table says
otherwise."""
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
    """A parameter's official name, and which third of the packed projection it is (None if it is no third)."""
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    for third, part in enumerate(PARTS):
        if f"attention.attention.{part}" in name:
            return name.replace(f"attention.attention.{part}", "attn.qkv"), third
    return name, None


def load(model, asked, table=VIT_MAE):
    """Puts the tensors `weight.<official name>` into the model."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                name, third = rename(name, table)
                given = asked["weight." + name]
                value.copy_((given if third is None else given.chunk(3)[third]).reshape(value.shape))


def official(pairs, prefix, table=VIT_MAE):
    """Tensors under their official names, the three projections stacked."""
    out = {}
    for name, value in pairs:
        out.setdefault(prefix + rename(name, table)[0], []).append(value.detach().clone())
    return {name: torch.cat(values) for name, values in out.items()}
