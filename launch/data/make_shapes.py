#!/usr/bin/env python3
"""Generates labeled synthetic clips of moving shapes, encoded as H.264 in MP4. Say that they are synthetic wherever you use them.

usage: make_shapes.py FOLDER [--videos 3000] [--seed 0]

A clip is 24 frames of 48 x 48 pixels at 12 frames a second. The class is the motion: left, right, up, down, grow or
shrink. A gray square, disc or triangle lies at a random position on a darker background. It
moves by 2 to 3 pixels a frame and wraps around, or its size changes by about a pixel a frame between 8 and 24 and wraps
around. No single frame determines the class, so a model must use several. The files FOLDER/<class>/<number>.mp4 are the
same for the same seed and PyAV version.

PyAV, which includes libx264, is installed from PyPI into FOLDER.tools. The script restarts itself with the Python of
.deps/venv, which has numpy.
"""

import argparse
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".deps/venv/bin/python"
if pathlib.Path(sys.prefix).resolve() != PYTHON.parent.parent.resolve():
    os.execv(PYTHON, [str(PYTHON), *sys.argv])

import numpy

PYAV = "av==18.1.0"
SIDE, FRAMES, RATE = 48, 24, 12
CLASSES = ["left", "right", "up", "down", "grow", "shrink"]
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SMALL, LARGE = 8, 24
ROWS, COLUMNS = numpy.mgrid[0:SIDE, 0:SIDE].astype(float)


def shape(kind, size, x, y):
    """Returns the mask of a shape of this size, centered at (x, y) of a torus."""
    right = (COLUMNS - x + SIDE / 2) % SIDE - SIDE / 2
    down = (ROWS - y + SIDE / 2) % SIDE - SIDE / 2
    half = size / 2
    if kind == "square":
        return (abs(right) <= half) & (abs(down) <= half)
    if kind == "disc":
        return right**2 + down**2 <= half**2
    return (abs(down) <= half) & (abs(right) <= (down + half) / 2)


def clip(motion, draw):
    """Returns the frames of one clip, uint8 [FRAMES, SIDE, SIDE]."""
    kind = draw.choice(["square", "disc", "triangle"])
    x, y, size = draw.uniform(0, SIDE), draw.uniform(0, SIDE), draw.uniform(SMALL, LARGE)
    light, dark = draw.uniform(150, 250), draw.uniform(20, 90)
    speed, growth = draw.uniform(2, 3), draw.uniform(0.8, 1.2)
    frames = []
    for _ in range(FRAMES):
        frames.append(numpy.where(shape(kind, size, x, y), light, dark).astype(numpy.uint8))
        right, down = STEPS.get(motion, (0, 0))
        x, y = x + speed * right, y + speed * down
        size += {"grow": growth, "shrink": -growth}.get(motion, 0)
        size = SMALL + (size - SMALL) % (LARGE - SMALL)
    return frames


def write(av, path, frames):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"g": "12", "crf": "12", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray").reformat(format="yuv420p")))
        out.mux(stream.encode())


def import_pyav(folder):
    """Installs PyAV if it is missing and imports it."""
    if not (folder / "av").exists():
        pip = [PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
        subprocess.run([*pip, "--only-binary=:all:", "--target", folder, PYAV], check=True)
    sys.path.insert(0, str(folder))
    import av

    return av


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--videos", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.folder.exists():
        return print(f"{options.folder} exists already")
    av = import_pyav(options.folder.with_name(options.folder.name + ".tools"))
    part = options.folder.with_name(options.folder.name + ".part")
    for motion in CLASSES:
        (part / motion).mkdir(parents=True, exist_ok=True)
    for number in range(options.videos):
        motion = CLASSES[number % len(CLASSES)]
        frames = clip(motion, numpy.random.default_rng([options.seed, number]))
        write(av, part / motion / f"{number:05}.mp4", frames)
    part.rename(options.folder)
    print(f"{options.videos} clips of {len(CLASSES)} motions in {options.folder}")


if __name__ == "__main__":
    main()
