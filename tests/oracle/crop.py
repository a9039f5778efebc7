"""Crop boxes and resized pixels of torchvision.

crop.py boxes CASES.json    [{width, height, scale, ratio, uniform: [...]}] -> [[top, left, height, width]]
crop.py resize FILE.png JOBS.json OUT    jobs [{box: [left, top, width, height] or null, size: [w, h], how, fraction,
                                         tensor: true for torch, false for Pillow}];
                                         writes the pixels of all jobs, [h, w, c] uint8, one after another
"""

import json
import sys

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

INTERPOLATION = {"bicubic": functional.InterpolationMode.BICUBIC, "bilinear": functional.InterpolationMode.BILINEAR}


class FixedRandom:
    """Replaces the generator of torch by the given uniform numbers, in order."""

    def __init__(self, numbers):
        self.numbers = iter(numbers)

    def empty(self, *_):
        return self

    def uniform_(self, low, high):
        low, high = float(low), float(high)
        return torch.tensor(low + (high - low) * next(self.numbers))

    def randint(self, low, high, size):
        return torch.tensor([low + int(next(self.numbers) * (high - low))])


def boxes(path):
    torch.set_default_dtype(torch.float64)
    out = []
    for case in json.load(open(path)):
        given = FixedRandom(case["uniform"])
        torch.empty, torch.randint = given.empty, given.randint
        image = Image.new("L", (case["width"], case["height"]))
        out.append(transforms.RandomResizedCrop.get_params(image, case["scale"], case["ratio"]))
    json.dump(out, sys.stdout)


def resize(path, jobs, out):
    image = Image.open(path)
    with open(out, "wb") as file:
        for job in json.load(open(jobs)):
            width, height = job["size"]
            if job["box"]:
                left, top, w, h = job["box"]
                given = functional.pil_to_tensor(image) if job["tensor"] else image
                size, how = [height, width], INTERPOLATION[job["how"]]
                view = functional.resized_crop(given, top, left, h, w, size, how, antialias=True)
            else:
                view = functional.resize(image, int(width / job["fraction"]), INTERPOLATION[job["how"]])
                view = functional.center_crop(view, [height, width])
            file.write(view.permute(1, 2, 0).numpy().tobytes() if job.get("tensor") else view.tobytes())


if sys.argv[1] == "boxes":
    boxes(sys.argv[2])
else:
    resize(*sys.argv[2:5])
