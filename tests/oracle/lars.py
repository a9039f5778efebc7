"""LARS on top of torch.optim.SGD: gradients of matrices are adapted first; momentum and learning rate are those of SGD.

usage: lars.py REQUEST.safetensors REPLY.safetensors NUMBERS_JSON
request: weight.<i>, grad.<step>.<i>
reply:   weight.<i> after all steps
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file


def adapt(parameters, weight_decay, trust):
    """You et al. 2017, equation 6: the rate of a layer follows the ratio of its norms; vectors are not adapted."""
    for p in parameters:
        if p.ndim > 1:
            p.grad.add_(p.detach(), alpha=weight_decay)
            norm, step = torch.linalg.vector_norm(p.detach()), torch.linalg.vector_norm(p.grad)
            if norm > 0 and step > 0:
                p.grad.mul_(trust * norm / step)


def main():
    request, reply, text = sys.argv[1:4]
    inputs, n = load_file(request), json.loads(text)
    weights = [torch.nn.Parameter(inputs[f"weight.{i}"].clone()) for i in range(n["tensors"])]
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=n["momentum"])
    for step, lr in enumerate(n["lr"]):
        for i, w in enumerate(weights):
            w.grad = inputs[f"grad.{step}.{i}"].clone()
        adapt(weights, n["weight_decay"], n["trust"])
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    save_file({f"weight.{i}": w.detach().contiguous() for i, w in enumerate(weights)}, reply)


if __name__ == "__main__":
    main()
