"""Downloads Hydrogen's drum kits, some 350 strokes on kicks, snares, hats, toms and cymbals, and lists them for `occlude pack`.

usage: fetch_drums.py FOLDER

Debian's package `hydrogen-drumkits` (143 MB) contains them. The label is derived from the file's name; names with
none of the five, or several, are skipped. FOLDER/train.jsonl and test.jsonl list strokes of different kits.
"""
import pathlib
import re
import sys

from debian import copy_below, new_folder, unpacked, write_lists

DRUMS = {
    "kick": r"kick|bass ?drum|\bbd|_bd", "snare": r"snare|\bsn\b|\bsd|_sd|rim", "hat": r"hat|hh", "tom": r"tom",
    "cymbal": r"crash|ride|cymb|splash|china",
}
TEST_KITS = ("Audiophob", "ColomboAcousticDrumkit", "HardElectro1", "Millo_MultiLayered2", "VariBreaks")


def drum_of(path):
    """Returns the drum, or None unless the file's name names exactly one."""
    name = re.sub(r"^\d+__[^_]+__", "", path.stem).lower()
    drums = [drum for drum, pattern in DRUMS.items() if re.search(pattern, name)]
    return drums[0] if len(drums) == 1 else None


def main(folder):
    with new_folder(folder) as part, unpacked("hydrogen-drumkits") as (root,):
        kits = root / "usr/share/hydrogen/data/drumkits"
        lists = {"train": [], "test": []}
        for sound in sorted(path for path in kits.rglob("*") if path.suffix.lower() in (".wav", ".flac")):
            if not (drum := drum_of(sound)):
                continue
            path = copy_below(sound, kits, part)
            lists["test" if path.parts[0] in TEST_KITS else "train"].append({"path": path.as_posix(), "label": drum})
        write_lists(part, lists)
    print(f"{len(lists['train'])} training strokes and {len(lists['test'])} test strokes of other kits in {folder}")


main(pathlib.Path(sys.argv[1]))
