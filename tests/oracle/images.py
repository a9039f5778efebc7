"""Images of every kind that cameras and the web produce, by Pillow.

images.py write FOLDER
images.py photo FILE WIDTH HEIGHT OPTIONS   color noise with the spectrum of a photograph; OPTIONS of the encoder as JSON
images.py decode OUT MODE FILE...    the pixels of all files, upright, converted to MODE, one after another
"""

import json
import sys
from pathlib import Path

import numpy
from PIL import Image, ImageOps


def write(folder):
    y, x = numpy.mgrid[0:61, 0:87]
    waves = [127 + 120 * numpy.sin(x / 9 + k) * numpy.cos(y / 7 - k) for k in range(4)]
    rgba = numpy.stack(waves, -1).astype(numpy.uint8)
    rgb, gray = Image.fromarray(rgba[..., :3]), Image.fromarray(rgba[..., 0])

    for name, subsampling in [("444", "4:4:4"), ("422", "4:2:2"), ("420", "4:2:0")]:
        rgb.save(folder / f"rgb-{name}.jpg", quality=95, subsampling=subsampling)
        rgb.save(folder / f"progressive-{name}.jpg", quality=60, subsampling=subsampling, progressive=True)
    rgb.save(folder / "restarts.jpg", quality=90, restart_marker_blocks=3)
    rgb.save(folder / "untransformed.jpg", quality=95, keep_rgb=True)
    gray.save(folder / "gray.jpg", quality=95)
    gray.save(folder / "gray-progressive.jpg", quality=95, progressive=True)
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    # The same samples, declared as luma, chroma and black.
    cmyk = (folder / "cmyk.jpg").read_bytes()
    adobe = cmyk.index(b"Adobe") + 11
    (folder / "ycck.jpg").write_bytes(cmyk[:adobe] + b"\2" + cmyk[adobe + 1 :])
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        rgb.save(folder / f"rotated-{orientation}.jpg", quality=95, exif=exif)
        gray.save(folder / f"rotated-gray-{orientation}.jpg", quality=95, exif=exif)
    rgb.save(folder / "rotated-8.png", exif=exif)
    rgb.save(folder / "rotated-8.webp", lossless=True, exif=exif)
    rgb.save(folder / "rgb.png")
    gray.save(folder / "gray.png")
    Image.fromarray(rgba).save(folder / "alpha.png")
    rgb.quantize(16).save(folder / "palette.png")
    rgb.save(folder / "lossless.webp", lossless=True)
    Image.fromarray(rgba).save(folder / "alpha.webp", lossless=True)


def photo(file, width, height, options):
    """Amplitude 1/f, as in natural images (Field, 1987), with similar channels."""
    random = numpy.random.default_rng(5)
    f = numpy.hypot(numpy.fft.fftfreq(height)[:, None], numpy.fft.fftfreq(width)[None])
    f[0, 0] = numpy.inf

    def plane():
        noise = numpy.fft.ifft2(numpy.fft.fft2(random.standard_normal((height, width))) / f).real
        return noise / noise.std()

    shared = plane()
    planes = [numpy.clip(118 + 55 * (shared + 0.4 * plane()), 0, 255) for _ in range(3)]
    Image.fromarray(numpy.stack(planes, -1).astype(numpy.uint8)).save(file, **json.loads(options))


def decode(out, mode, files):
    with open(out, "wb") as file:
        for path in files:
            file.write(ImageOps.exif_transpose(Image.open(path)).convert(mode).tobytes())


if sys.argv[1] == "write":
    write(Path(sys.argv[2]))
elif sys.argv[1] == "photo":
    photo(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
else:
    decode(sys.argv[2], sys.argv[3], sys.argv[4:])
