"""LARS, stated with torch.optim.SGD: the gradients of matrices are adapted first, momentum and rate are SGD's own.

usage: lars.py REQUEST.safetensors REPLY.safetensors NUMBERS_JSON
request: weight.<i>, grad.<step>.<i>
reply:   weight.<i> after all steps
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file


def adapt(parameters, weight_decay, trust):
    """You et al. 2017, equation 6: a layer's rate follows the ratio of its norms; vectors go without."""
    for p in parameters:
        if p.ndim > 1:
            p.grad.add_(p.detach(), alpha=weight_decay)
            own, step = torch.linalg.vector_norm(p.detach()), torch.linalg.vector_norm(p.grad)
            if own > 0 and step > 0:
                p.grad.mul_(trust * own / step)


def main():
    request, reply, text = sys.argv[1:4]
    asked, n = load_file(request), json.loads(text)
    weights = [torch.nn.Parameter(asked[f"weight.{i}"].clone()) for i in range(n["tensors"])]
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=n["momentum"])
    for step, lr in enumerate(n["lr"]):
        for i, w in enumerate(weights):
            w.grad = asked[f"grad.{step}.{i}"].clone()
        adapt(weights, n["weight_decay"], n["trust"])
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    save_file({f"weight.{i}": w.detach().contiguous() for i, w in enumerate(weights)}, reply)


if __name__ == "__main__":
    main()
