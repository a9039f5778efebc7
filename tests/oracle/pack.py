"""What pyarrow and Pillow say to lists, pictures and their sizes.

pack.py parquet ROWS.json OUT      rows as a list of objects -> a Parquet file
pack.py pictures FOLDER            pictures of many kinds, larger than 40 pixels
pack.py compare FOLDER SIDE TAR... every picture of the tars against Pillow's own resize of the one in the folder:
                                   prints {key: [[width, height], [width, height], [mean, greatest difference]]}
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


def pictures(folder):
    folder = Path(folder)
    folder.mkdir(parents=True)
    y, x = numpy.mgrid[0:90, 0:131]
    waves = [127 + 90 * numpy.sin(x / a + y / b) + 20 * numpy.sin(x * y / 300) for a, b in ((9, 14), (15, 7), (22, 31))]
    rgb = Image.fromarray(numpy.stack(waves, -1).clip(0, 255).astype("uint8"))
    grey, alpha = rgb.convert("L"), rgb.copy()
    alpha.putalpha(255)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "colour.jpg", quality=95)
    rgb.save(folder / "turned.jpg", quality=95, exif=exif)
    grey.save(folder / "grey.png")
    alpha.save(folder / "alpha.png")
    rgb.save(folder / "web.webp", lossless=True)
    rgb.crop((0, 0, 90, 90)).save(folder / "square.png")
    rgb.crop((0, 0, 41, 90)).save(folder / "tall.png")
    rgb.crop((0, 0, 30, 20)).save(folder / "small.png")


def compare(folder, side, tars):
    told = {}
    for tar in tars:
        for member in (found := tarfile.open(tar)).getmembers():
            key = member.name.rsplit(".", 1)[0]
            ours = Image.open(io.BytesIO(found.extractfile(member).read()))
            theirs = ImageOps.exif_transpose(Image.open(next(Path(folder).glob(key + ".*")))).convert("RGB")
            w, h = theirs.size
            if min(w, h) > side:
                theirs = theirs.resize((side, side * h // w) if w <= h else (side * w // h, side), Image.BICUBIC)
            both = [numpy.asarray(picture.convert("RGB"), dtype=float) for picture in (ours, theirs)]
            apart = abs(both[0] - both[1]) if ours.size == theirs.size else None
            far = [apart.mean(), apart.max()] if apart is not None else None
            told[key] = [ours.size, theirs.size, far]
    json.dump(told, sys.stdout)


if sys.argv[1] == "parquet":
    parquet(*sys.argv[2:])
elif sys.argv[1] == "pictures":
    pictures(sys.argv[2])
else:
    compare(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
