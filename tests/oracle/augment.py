"""Augmentations of torchvision and Pillow.

augment.py FILE.png JOBS.json OUT    jobs [{do: name, ...}]; writes the pixels of all jobs, [h, w, c] uint8, one after
                                     another
"""

import json
import sys

import numpy
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

INTERPOLATION = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def blur(image, job):
    pixels = torch.from_numpy(numpy.array(image).reshape(image.height, image.width, -1)).permute(2, 0, 1)
    blurred = functional.gaussian_blur(pixels, [job["kernel"]] * 2, [job["by"]] * 2)
    return Image.fromarray(blurred.permute(1, 2, 0).squeeze(-1).numpy())


def jitter(image, job):
    names = ["brightness_factor", "contrast_factor", "saturation_factor", "hue_factor"]
    return v2.ColorJitter().transform(image, {"fn_idx": torch.tensor(job["order"]), **dict(zip(names, job["amounts"]))})


def affine(image, job):
    fill = tuple(job["fill"]) if image.mode == "RGB" else job["luma"]
    if job["do"] == "rotate":
        return image.rotate(job["by"], resample=INTERPOLATION[job["how"]], fillcolor=fill)
    return image.transform(image.size, Image.Transform.AFFINE, job["matrix"], INTERPOLATION[job["how"]], fillcolor=fill)


OPERATIONS = {
    "brightness": lambda image, job: functional.adjust_brightness(image, job["by"]),
    "contrast": lambda image, job: functional.adjust_contrast(image, job["by"]),
    "saturation": lambda image, job: functional.adjust_saturation(image, job["by"]),
    "hue": lambda image, job: functional.adjust_hue(image, job["by"]),
    "sharpness": lambda image, job: functional.adjust_sharpness(image, job["by"]),
    "grayscale": lambda image, job: functional.rgb_to_grayscale(image, num_output_channels=len(image.getbands())),
    "solarize": lambda image, job: functional.solarize(image, job["by"]),
    "posterize": lambda image, job: functional.posterize(image, int(job["by"])),
    "auto_contrast": lambda image, job: functional.autocontrast(image),
    "equalize": lambda image, job: functional.equalize(image),
    "invert": lambda image, job: functional.invert(image),
    "blur": blur,
    "jitter": jitter,
    "rotate": affine,
    "affine": affine,
}

if __name__ == "__main__":
    image = Image.open(sys.argv[1])
    with open(sys.argv[3], "wb") as file:
        for job in json.load(open(sys.argv[2])):
            file.write(OPERATIONS[job["do"]](image, job).tobytes())
