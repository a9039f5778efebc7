"""Data that Debian packages hold: downloaded and unpacked, not installed, which needs no root."""
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile


def run(*words, folder):
    done = subprocess.run(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()}\nThis needs Debian or Ubuntu, apt-get update, and the network.")


@contextlib.contextmanager
def making(folder):
    """A folder to fill, which has its own name once it is whole. A folder that is there already is the end."""
    if folder.exists():
        print(f"{folder} is there already")
        sys.exit()
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    yield part
    part.rename(folder)


def copied(path, start, part):
    """Copies a file below `start` to its place below `part`; its path as lists have it."""
    place = path.relative_to(start)
    (part / place).parent.mkdir(parents=True, exist_ok=True)
    (part / place).write_bytes(path.read_bytes())
    return place


@contextlib.contextmanager
def unpacked(*packages):
    """The folders that hold what the packages would install, in their order, for as long as it lasts."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        run("apt-get", "download", *packages, folder=scratch)
        for package in packages:
            (archive,) = scratch.glob(f"{package}_*.deb")
            run("dpkg-deb", "-x", archive.name, package, folder=scratch)
        yield [scratch / package for package in packages]


def listed(folder, lists):
    """Writes lists for `occlude pack`, an object a line."""
    for name, rows in lists.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
