"""The weighted vote of the nearest neighbours, one test sample at a time, in fp64.

usage: neighbours.py REQUEST.safetensors REPLY.safetensors NUMBERS_JSON
request: train [N, D], labels [N], test [R, D]
reply:   classes [R]
"""
import json
import sys
from collections import defaultdict

import torch
from safetensors.torch import load_file, save_file

request, reply, text = sys.argv[1:4]
asked, n = load_file(request), json.loads(text)
train, labels = asked["train"].double(), asked["labels"].tolist()
answers = []
for row in asked["test"].double():
    likeness = torch.nn.functional.cosine_similarity(row[None], train)
    votes = defaultdict(float)
    for at in sorted(range(len(labels)), key=lambda i: -likeness[i])[: n["k"]]:
        votes[labels[at]] += torch.exp(likeness[at] / n["temperature"]).item()
    answers.append(max(votes, key=votes.get))
save_file({"classes": torch.tensor(answers)}, reply)
