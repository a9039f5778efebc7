"""Downloads and unpacks Debian packages that contain data. It does not install them, so it needs no root."""
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile


def run(*words, folder):
    done = subprocess.run(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()}\nThis needs Debian or Ubuntu, apt-get update, and a network.")


@contextlib.contextmanager
def new_folder(folder):
    """Yields a temporary folder that gets its final name once it is complete. Exits if the folder exists."""
    if folder.exists():
        print(f"{folder} exists already")
        sys.exit()
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    yield part
    part.rename(folder)


def copy_below(path, root, part):
    """Copies a file below `root` to the same relative path below `part`; returns that path."""
    relative = path.relative_to(root)
    (part / relative).parent.mkdir(parents=True, exist_ok=True)
    (part / relative).write_bytes(path.read_bytes())
    return relative


@contextlib.contextmanager
def unpacked(*packages):
    """Yields temporary folders with the files that the packages would install, in the order of the packages."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        run("apt-get", "download", *packages, folder=scratch)
        for package in packages:
            (archive,) = scratch.glob(f"{package}_*.deb")
            run("dpkg-deb", "-x", archive.name, package, folder=scratch)
        yield [scratch / package for package in packages]


def write_lists(folder, lists):
    """Writes lists for `occlude pack`, one JSON object per line."""
    for name, rows in lists.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
