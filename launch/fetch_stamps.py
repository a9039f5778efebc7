"""Fetches Tux Paint's stamps, some 800 captioned pictures in sixteen categories, and lists them for `occlude pack`.

usage: fetch_stamps.py FOLDER

Debian's package `tuxpaint-stamps-default` (161 MB) holds them; it is downloaded and unpacked, not installed, which needs
no root. FOLDER/list.jsonl names each picture with its category as label and its English text as caption.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

PACKAGE = "tuxpaint-stamps-default"


def run(*words, folder):
    done = subprocess.run(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()}\nThis needs Debian or Ubuntu, apt-get update, and the network.")


def main(folder):
    if folder.exists():
        return print(f"{folder} is there already")
    with tempfile.TemporaryDirectory() as scratch:
        run("apt-get", "download", PACKAGE, folder=scratch)
        archive = next(pathlib.Path(scratch).glob("*.deb"))
        run("dpkg-deb", "-x", archive.name, "unpacked", folder=scratch)
        stamps = pathlib.Path(scratch) / "unpacked/usr/share/tuxpaint/stamps"
        part = folder.with_name(folder.name + ".part")
        rows = []
        for picture in sorted(stamps.rglob("*.png")):
            words = picture.with_suffix(".txt")
            lines = words.read_text(encoding="utf-8").splitlines() if words.exists() else []
            if not lines or not lines[0].strip():
                continue
            path = picture.relative_to(stamps)
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            (part / path).write_bytes(picture.read_bytes())
            rows.append({"path": path.as_posix(), "label": path.parts[0], "caption": lines[0].strip()})
        (part / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        part.rename(folder)
    print(f"{len(rows)} captioned pictures in {folder}")


main(pathlib.Path(sys.argv[1]))
