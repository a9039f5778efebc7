"""The weighted vote of the nearest neighbors, one test sample at a time, in fp64.

usage: neighbors.py REQUEST.safetensors REPLY.safetensors NUMBERS_JSON
request: train [N, D], labels [N], test [R, D]
reply:   classes [R]
"""
import json
import sys
from collections import defaultdict

import torch
from safetensors.torch import load_file, save_file

request, reply, text = sys.argv[1:4]
inputs, n = load_file(request), json.loads(text)
train, labels = inputs["train"].double(), inputs["labels"].tolist()
classes = []
for row in inputs["test"].double():
    similarity = torch.nn.functional.cosine_similarity(row[None], train)
    votes = defaultdict(float)
    for at in sorted(range(len(labels)), key=lambda i: -similarity[i])[: n["k"]]:
        votes[labels[at]] += torch.exp(similarity[at] / n["temperature"]).item()
    classes.append(max(votes, key=votes.get))
save_file({"classes": torch.tensor(classes)}, reply)
