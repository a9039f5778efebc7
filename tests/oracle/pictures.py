"""Pictures of every kind that cameras and the web hand out, by Pillow.

pictures.py write FOLDER
pictures.py decode OUT MODE FILE...    the pixels of all files, upright, converted to MODE, one after another
"""

import sys
from pathlib import Path

import numpy
from PIL import Image, ImageOps


def write(folder):
    y, x = numpy.mgrid[0:61, 0:87]
    waves = [127 + 120 * numpy.sin(x / 9 + k) * numpy.cos(y / 7 - k) for k in range(4)]
    rgba = numpy.stack(waves, -1).astype(numpy.uint8)
    rgb, grey = Image.fromarray(rgba[..., :3]), Image.fromarray(rgba[..., 0])

    rgb.save(folder / "rgb.jpg", quality=95, subsampling=0)
    rgb.save(folder / "progressive.jpg", quality=95, subsampling=0, progressive=True)
    grey.save(folder / "grey.jpg", quality=95)
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "turned.jpg", quality=95, subsampling=0, exif=exif)
    rgb.save(folder / "rgb.png")
    grey.save(folder / "grey.png")
    Image.fromarray(rgba).save(folder / "alpha.png")
    rgb.quantize(16).save(folder / "palette.png")
    rgb.save(folder / "lossless.webp", lossless=True)
    Image.fromarray(rgba).save(folder / "alpha.webp", lossless=True)


def decode(out, mode, files):
    with open(out, "wb") as file:
        for path in files:
            file.write(ImageOps.exif_transpose(Image.open(path)).convert(mode).tobytes())


if sys.argv[1] == "write":
    write(Path(sys.argv[2]))
else:
    decode(sys.argv[2], sys.argv[3], sys.argv[4:])
