"""The optimizer of the parity tests."""
import torch


def adamw(named, lr, weight_decay, exempt=()):
    """Returns AdamW over pairs of name and parameter; vectors and the names of `exempt` do not decay."""
    decays = lambda name, value: value.ndim > 1 and name not in exempt
    return torch.optim.AdamW([
        {"params": [value for name, value in named if decays(name, value)], "weight_decay": weight_decay},
        {"params": [value for name, value in named if not decays(name, value)], "weight_decay": 0.0},
    ], lr=lr, betas=(0.9, 0.95))
