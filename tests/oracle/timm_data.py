"""RandAugment, random erasing and mixing of timm, with given random numbers.

timm_data.py layers FILE.png CASES.json OUT     cases [{layers: [[operation, chance, noise, sign]], fill, how}]: the
                                                pixels of each, [h, w, c] uint8, one after another
timm_data.py boxes CASES.json                   [{width, height, probability, uniform: [...]}] -> [[top, left, height,
                                                width] or null]
timm_data.py mix IN.safetensors CASES.json OUT.safetensors    `samples`, `labels`; [{lam, cut, middle, classes,
                                                smoothing}] -> `samples.i`, `targets.i`
"""

import json
import random
import sys

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import auto_augment, mixup, random_erasing


class FixedRandom:
    """Replaces `random` of Python by the given uniform numbers, in order."""

    def __init__(self, numbers):
        self.numbers = iter(numbers)

    def random(self):
        return next(self.numbers)

    def uniform(self, low, high):
        return low + (high - low) * next(self.numbers)

    def randint(self, low, high):
        return low + int(next(self.numbers) * (high - low + 1))


def layers(path, cases, out):
    how = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    with open(out, "wb") as file:
        for case in json.load(open(cases)):
            image = Image.open(path)
            fill = tuple(case["fill"]) if image.mode == "RGB" else case["luma"]
            given = {"img_mean": fill, "interpolation": how[case["how"]]}
            transform = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", given)
            for operation, chance, noise, sign in case["layers"]:
                random.random = FixedRandom([chance, sign]).random
                random.gauss = lambda mean, std: mean + std * noise
                image = transform.ops[operation](image)
            file.write(image.tobytes())


def boxes(path):
    out = []
    random_erasing._get_pixels = lambda per_pixel, rand_color, shape, **_: torch.full(shape, float(per_pixel))
    for case in json.load(open(path)):
        given = FixedRandom(case["uniform"])
        random.random, random.uniform, random.randint = given.random, given.uniform, given.randint
        erasing = random_erasing.RandomErasing(case["probability"], mode="pixel", device="cpu")
        inside = erasing(torch.zeros(1, case["height"], case["width"]))[0].nonzero()
        if len(inside):
            (top, left), (bottom, right) = inside.min(0).values.tolist(), inside.max(0).values.tolist()
            out.append([top, left, bottom - top + 1, right - left + 1])
        else:
            out.append(None)
    json.dump(out, sys.stdout)


def mix(path, cases, out):
    batch, mixed = load_file(path), {}
    for index, case in enumerate(json.load(open(cases))):
        mixer = mixup.Mixup(0.8, 1.0, label_smoothing=case["smoothing"], num_classes=case["classes"])
        numpy.random.rand = FixedRandom([0.0, 0.0 if case["cut"] else 0.9]).random
        numpy.random.beta = lambda *_: case["lam"]
        middle = iter(reversed(case["middle"]))
        numpy.random.randint = lambda *_, **__: next(middle)
        samples, targets = mixer(batch["samples"].clone(), batch["labels"])
        mixed[f"samples.{index}"], mixed[f"targets.{index}"] = samples, targets
    save_file(mixed, out)


if __name__ == "__main__":
    {"layers": layers, "boxes": boxes, "mix": mix}[sys.argv[1]](*sys.argv[2:])
