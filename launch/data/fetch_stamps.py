"""Downloads Tux Paint's stamps, some 800 captioned images in sixteen categories, and lists them for `occlude pack`.

usage: fetch_stamps.py FOLDER

Debian's package `tuxpaint-stamps-default` (161 MB) contains them. FOLDER/list.jsonl lists each image with its category as
label and its English text as caption.
"""
import pathlib
import sys

from debian import copy_below, new_folder, unpacked, write_lists


def main(folder):
    with new_folder(folder) as part, unpacked("tuxpaint-stamps-default") as (root,):
        stamps = root / "usr/share/tuxpaint/stamps"
        rows = []
        for image in sorted(stamps.rglob("*.png")):
            words = image.with_suffix(".txt")
            lines = words.read_text(encoding="utf-8").splitlines() if words.exists() else []
            if not lines or not lines[0].strip():
                continue
            path = copy_below(image, stamps, part)
            rows.append({"path": path.as_posix(), "label": path.parts[0], "caption": lines[0].strip()})
        write_lists(part, {"list": rows})
    print(f"{len(rows)} captioned images in {folder}")


main(pathlib.Path(sys.argv[1]))
