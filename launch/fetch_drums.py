"""Fetches Hydrogen's drum kits, some 350 strokes on kicks, snares, hats, toms and cymbals, and lists them for `occlude pack`.

usage: fetch_drums.py FOLDER

Debian's package `hydrogen-drumkits` (143 MB) holds them. What is struck is told from the file's name; strokes that name
none of the five, or several, are left out. FOLDER/train.jsonl and test.jsonl list strokes of different kits.
"""
import pathlib
import re
import sys

from debian import copied, listed, making, unpacked

DRUMS = {
    "kick": r"kick|bass ?drum|\bbd|_bd", "snare": r"snare|\bsn\b|\bsd|_sd|rim", "hat": r"hat|hh", "tom": r"tom",
    "cymbal": r"crash|ride|cymb|splash|china",
}
JUDGED = ("Audiophob", "ColomboAcousticDrumkit", "HardElectro1", "Millo_MultiLayered2", "VariBreaks")


def struck(path):
    """Which drum, of a file that names one alone."""
    name = re.sub(r"^\d+__[^_]+__", "", path.stem).lower()
    drums = [drum for drum, pattern in DRUMS.items() if re.search(pattern, name)]
    return drums[0] if len(drums) == 1 else None


def main(folder):
    with making(folder) as part, unpacked("hydrogen-drumkits") as (place,):
        kits = place / "usr/share/hydrogen/data/drumkits"
        lists = {"train": [], "test": []}
        for sound in sorted(path for path in kits.rglob("*") if path.suffix.lower() in (".wav", ".flac")):
            if not (drum := struck(sound)):
                continue
            path = copied(sound, kits, part)
            lists["test" if path.parts[0] in JUDGED else "train"].append({"path": path.as_posix(), "label": drum})
        listed(part, lists)
    print(f"{len(lists['train'])} strokes to learn from, {len(lists['test'])} of other kits, in {folder}")


main(pathlib.Path(sys.argv[1]))
