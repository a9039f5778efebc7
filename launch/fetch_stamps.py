"""Fetches Tux Paint's stamps, some 800 captioned pictures in sixteen categories, and lists them for `occlude pack`.

usage: fetch_stamps.py FOLDER

Debian's package `tuxpaint-stamps-default` (161 MB) holds them. FOLDER/list.jsonl names each picture with its category as
label and its English text as caption.
"""
import pathlib
import sys

from debian import copied, listed, making, unpacked


def main(folder):
    with making(folder) as part, unpacked("tuxpaint-stamps-default") as (place,):
        stamps = place / "usr/share/tuxpaint/stamps"
        rows = []
        for picture in sorted(stamps.rglob("*.png")):
            words = picture.with_suffix(".txt")
            lines = words.read_text(encoding="utf-8").splitlines() if words.exists() else []
            if not lines or not lines[0].strip():
                continue
            path = copied(picture, stamps, part)
            rows.append({"path": path.as_posix(), "label": path.parts[0], "caption": lines[0].strip()})
        listed(part, {"list": rows})
    print(f"{len(rows)} captioned pictures in {folder}")


main(pathlib.Path(sys.argv[1]))
