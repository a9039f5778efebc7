"""Returns weights and moments of torch.optim.AdamW after updates with gradient gradients.

usage: adamw.py REQUEST.safetensors REPLY.safetensors NUMBERS_JSON
request: weight.<i>, grad.<step>.<i> (omitted where tensor i is unused in that step)
reply:   lr [steps], norm [steps] (before clipping), weight.<i>, first.<i>, second.<i>, steps.<i>, average.<i>
"""
import json
import math
import sys

import torch
from safetensors.torch import load_file, save_file

request, reply, text = sys.argv[1:4]
inputs, n = load_file(request), json.loads(text)
weights = [torch.nn.Parameter(inputs[f"weight.{i}"].clone()) for i in range(n["tensors"])]
average = [w.detach().clone() for w in weights]
groups = [
    {"params": [w for w in weights if w.ndim > 1], "weight_decay": n["weight_decay"]},
    {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(n["betas"]), eps=n["eps"])
mean = torch.optim.swa_utils.get_ema_avg_fn(n["ema_decay"])


def rate(epoch):
    """Linear up to `peak`, then half a cosine, over fractions of an epoch."""
    if epoch < n["warmup_epochs"]:
        return n["peak"] * epoch / n["warmup_epochs"]
    done = (epoch - n["warmup_epochs"]) / (n["epochs"] - n["warmup_epochs"])
    return n["least"] + (n["peak"] - n["least"]) * 0.5 * (1 + math.cos(math.pi * done))


rates, norms = [], []
for step in range(n["steps"]):
    rates.append(rate(step * n["batch"] / n["data_set"]))
    for group in optimizer.param_groups:
        group["lr"] = rates[-1]
    for i, w in enumerate(weights):
        gradient = inputs.get(f"grad.{step}.{i}")
        w.grad = None if gradient is None else gradient.clone()
    limit = n["clip"] if n["clip"] is not None else math.inf
    norms.append(float(torch.nn.utils.clip_grad_norm_(weights, limit)))
    optimizer.step()
    with torch.no_grad():
        average = [mean(a, w.detach(), step) for a, w in zip(average, weights)]

out = {"lr": torch.tensor(rates, dtype=torch.float64), "norm": torch.tensor(norms, dtype=torch.float64)}
for i, w in enumerate(weights):
    state = optimizer.state.get(w, {})
    out[f"weight.{i}"], out[f"average.{i}"] = w.detach(), average[i]
    for ours, theirs in (("first", "exp_avg"), ("second", "exp_avg_sq")):
        out[f"{ours}.{i}"] = state[theirs] if state else torch.zeros_like(w)
    out[f"steps.{i}"] = torch.as_tensor(state.get("step", 0.0)).reshape(1)
save_file({name: value.contiguous() for name, value in out.items()}, reply)
