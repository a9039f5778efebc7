"""Lists by pyarrow; images and resizing by Pillow.

pack.py parquet ROWS.json OUT      rows as a list of objects -> a Parquet file
pack.py images FOLDER              images of many formats, larger than 40 pixels
pack.py compare FOLDER SIDE TAR... every image of the tars against the image in the folder, resized by Pillow:
                                   prints {key: [[width, height], [width, height], [mean, maximum difference]]}
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy
from PIL import Image, ImageOps


def parquet(rows, out):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(json.loads(Path(rows).read_text())), out, row_group_size=5)


def images(folder):
    folder = Path(folder)
    folder.mkdir(parents=True)
    y, x = numpy.mgrid[0:90, 0:131]
    waves = [127 + 90 * numpy.sin(x / a + y / b) + 20 * numpy.sin(x * y / 300) for a, b in ((9, 14), (15, 7), (22, 31))]
    rgb = Image.fromarray(numpy.stack(waves, -1).clip(0, 255).astype("uint8"))
    gray, alpha = rgb.convert("L"), rgb.copy()
    alpha.putalpha(255)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "color.jpg", quality=95)
    rgb.save(folder / "rotated.jpg", quality=95, exif=exif)
    gray.save(folder / "gray.png")
    alpha.save(folder / "alpha.png")
    rgb.save(folder / "web.webp", lossless=True)
    rgb.crop((0, 0, 90, 90)).save(folder / "square.png")
    rgb.crop((0, 0, 41, 90)).save(folder / "tall.png")
    rgb.crop((0, 0, 30, 20)).save(folder / "small.png")


def compare(folder, side, tars):
    sizes = {}
    for tar in tars:
        for member in (archive := tarfile.open(tar)).getmembers():
            key = member.name.rsplit(".", 1)[0]
            ours = Image.open(io.BytesIO(archive.extractfile(member).read()))
            reference = ImageOps.exif_transpose(Image.open(next(Path(folder).glob(key + ".*")))).convert("RGB")
            w, h = reference.size
            if min(w, h) > side:
                reference = reference.resize((side, side * h // w) if w <= h else (side * w // h, side), Image.BICUBIC)
            both = [numpy.asarray(image.convert("RGB"), dtype=float) for image in (ours, reference)]
            difference = abs(both[0] - both[1]) if ours.size == reference.size else None
            summary = [difference.mean(), difference.max()] if difference is not None else None
            sizes[key] = [ours.size, reference.size, summary]
    json.dump(sizes, sys.stdout)


if sys.argv[1] == "parquet":
    parquet(*sys.argv[2:])
elif sys.argv[1] == "images":
    images(sys.argv[2])
else:
    compare(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
