"""Trains BatchNorm1d(affine=False) + Linear on given features, like the linear probe of the paper.

usage: probe_head.py REQUEST.safetensors REPLY.safetensors NUMBERS_JSON
request: weight, bias, x.<step>, labels.<step>, test
reply:   loss [steps], and after each step weight_gradient.<step>, bias_gradient.<step>, mean.<step>, variance.<step>;
         at the end weight, bias and scores of `test` in evaluation mode
"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file

from lars import adapt

request, reply, text = sys.argv[1:4]
inputs, n = load_file(request), json.loads(text)
classes, width = inputs["weight"].shape
norm, linear = torch.nn.BatchNorm1d(width, affine=False, eps=1e-6), torch.nn.Linear(width, classes)
with torch.no_grad():
    linear.weight.copy_(inputs["weight"])
    linear.bias.copy_(inputs["bias"])
head = torch.nn.Sequential(norm, linear)
optimizer = torch.optim.SGD(head.parameters(), lr=0.0, momentum=0.9)
out, losses = {}, []
for step, lr in enumerate(n["lr"]):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(head(inputs[f"x.{step}"]), inputs[f"labels.{step}"])
    loss.backward()
    losses.append(loss.item())
    out[f"weight_gradient.{step}"] = linear.weight.grad.clone()
    out[f"bias_gradient.{step}"] = linear.bias.grad.clone()
    out[f"mean.{step}"], out[f"variance.{step}"] = norm.running_mean.clone(), norm.running_var.clone()
    adapt(head.parameters(), 0.0, 0.001)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
head.eval()
with torch.no_grad():
    out["scores"] = head(inputs["test"])
out |= {"loss": torch.tensor(losses, dtype=torch.float64), "weight": linear.weight.detach(), "bias": linear.bias.detach()}
save_file({name: value.contiguous() for name, value in out.items()}, reply)
