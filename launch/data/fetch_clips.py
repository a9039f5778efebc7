"""Downloads three short films and lists them for `occlude pack`: two of imageio (a cockatoo, and a very short one) and the
trailer of an animation (a sample of OpenCV).

usage: fetch_clips.py FOLDER

Debian's packages `python3-imageio` (3 MB) and `opencv-doc` (96 MB) contain them. FOLDER/train.jsonl lists the cockatoo and the
trailer, FOLDER/test.jsonl the third.
"""
import pathlib
import sys

from debian import new_folder, unpacked, write_lists

IMAGEIO, OPENCV = "usr/lib/python3/dist-packages/imageio/resources/images", "usr/share/doc/opencv-doc/examples/data"
FILMS = {"train": (f"{IMAGEIO}/cockatoo.mp4", f"{OPENCV}/Megamind.avi"), "test": (f"{IMAGEIO}/realshort.mp4",)}


def main(folder):
    with new_folder(folder) as part, unpacked("python3-imageio", "opencv-doc") as folders:
        for film in (film for films in FILMS.values() for film in films):
            (found,) = (root / film for root in folders if (root / film).exists())
            (part / found.name).write_bytes(found.read_bytes())
        write_lists(part, {name: [{"path": pathlib.Path(film).name} for film in films] for name, films in FILMS.items()})
    print(f"{sum(map(len, FILMS.values()))} films in {folder}")


main(pathlib.Path(sys.argv[1]))
