#!/usr/bin/env python3
"""Makes labelled clips of motion: moving shapes, encoded as H.264 in MP4. Made up, not filmed; say so wherever they are used.

usage: make_shapes.py FOLDER [--videos 3000] [--seed 0]

A clip is 24 frames of 48 x 48 pixels at 12 frames a second. The class is the motion: left, right, up, down, grow or
shrink. A square, disc or triangle of any grey lies at any place on a darker ground;
it moves by 2 to 3 pixels a frame, and what leaves on one side comes in on the other; or its size changes by about a pixel
a frame between 8 and 24, and begins anew when it is there. No single frame tells the class, so that a model must look at
several. FOLDER/<class>/<number>.mp4 are the same for the same seed and PyAV.

PyAV brings its own encoder (libx264) and is fetched from PyPI into FOLDER.tools; it starts itself again with the Python of
.deps/venv, which has numpy.
"""

import argparse
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
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
    """Where a shape lies that is `size` across, its middle at (x, y) of a torus."""
    right = (COLUMNS - x + SIDE / 2) % SIDE - SIDE / 2
    down = (ROWS - y + SIDE / 2) % SIDE - SIDE / 2
    half = size / 2
    if kind == "square":
        return (abs(right) <= half) & (abs(down) <= half)
    if kind == "disc":
        return right**2 + down**2 <= half**2
    return (abs(down) <= half) & (abs(right) <= (down + half) / 2)


def clip(motion, draw):
    """The frames of one clip, uint8 [FRAMES, SIDE, SIDE]."""
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


def pyav(place):
    """PyAV, fetched once."""
    if not (place / "av").exists():
        pip = [PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
        subprocess.run([*pip, "--only-binary=:all:", "--target", place, PYAV], check=True)
    sys.path.insert(0, str(place))
    import av

    return av


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--videos", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.folder.exists():
        return print(f"{asked.folder} is there already")
    av = pyav(asked.folder.with_name(asked.folder.name + ".tools"))
    part = asked.folder.with_name(asked.folder.name + ".part")
    for motion in CLASSES:
        (part / motion).mkdir(parents=True, exist_ok=True)
    for number in range(asked.videos):
        motion = CLASSES[number % len(CLASSES)]
        frames = clip(motion, numpy.random.default_rng([asked.seed, number]))
        write(av, part / motion / f"{number:05}.mp4", frames)
    part.rename(asked.folder)
    print(f"{asked.videos} clips of {len(CLASSES)} motions in {asked.folder}")


if __name__ == "__main__":
    main()
