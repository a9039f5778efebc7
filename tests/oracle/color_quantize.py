"""Returns the palette indices of pixels by transformers' ImageGPTImageProcessor.

usage: color_quantize.py REQUEST.safetensors REPLY.safetensors
request: pixels [n, 3] and palette [V, 3], in -1..1
reply:   indices [n]
"""
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers.models.imagegpt.image_processing_imagegpt import color_quantize

request, reply = sys.argv[1:3]
given = load_file(request)
indices = color_quantize(given["pixels"].double().numpy(), given["palette"].double().numpy())
save_file({"indices": torch.from_numpy(indices)}, reply)
