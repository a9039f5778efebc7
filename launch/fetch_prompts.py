"""Fetches Asterisk's spoken prompts, some 2,800 recordings at 8 kHz in five languages, and lists them for `occlude pack`.

usage: fetch_prompts.py FOLDER

Debian's packages `asterisk-core-sounds-{en,es,fr,it,ru}-wav` (98 MB) hold them, one voice each but that English and
Spanish are spoken by the same woman; they are downloaded and unpacked, not installed, which needs no root.
FOLDER/speech.jsonl lists all that is said in English, Spanish and French, without labels; train.jsonl those prompts that
no voice takes longer than two seconds for, in the same languages, labelled with what is said, such as `digits/7`; and
test.jsonl the same prompts in Italian and Russian. So a label is never told from the voice: nobody who is heard in the
test was heard in training.
"""
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import wave

LEARNED, JUDGED = ("en", "es", "fr"), ("it", "ru")
LONGEST = 2.0


def run(*words, folder):
    done = subprocess.run(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()}\nThis needs Debian or Ubuntu, apt-get update, and the network.")


def seconds(path):
    with wave.open(str(path)) as sound:
        return sound.getnframes() / sound.getframerate()


def main(folder):
    if folder.exists():
        return print(f"{folder} is there already")
    with tempfile.TemporaryDirectory() as scratch:
        run("apt-get", "download", *(f"asterisk-core-sounds-{voice}-wav" for voice in LEARNED + JUDGED), folder=scratch)
        part = folder.with_name(folder.name + ".part")
        said = {}
        for archive in sorted(pathlib.Path(scratch).glob("*.deb")):
            run("dpkg-deb", "-x", archive.name, archive.stem, folder=scratch)
            voice = archive.name.split("-")[3]
            (sounds,) = (archive.with_suffix("") / "usr/share/asterisk/sounds").iterdir()
            shutil.copytree(sounds, part / voice, dirs_exist_ok=True)
            prompts = (path.relative_to(sounds).with_suffix("").as_posix() for path in sounds.rglob("*.wav"))
            spoken = (prompt for prompt in prompts if not prompt.startswith("silence/"))
            said[voice] = {prompt: seconds(sounds / f"{prompt}.wav") for prompt in spoken}
        short = [p for p in sorted(said["en"]) if all(v.get(p, LONGEST + 1) <= LONGEST for v in said.values())]
        row = lambda voice, prompt: {"path": f"{voice}/{prompt}.wav"}
        lists = {
            "speech": [row(voice, prompt) for voice in LEARNED for prompt in sorted(said[voice])],
            "train": [row(voice, prompt) | {"label": prompt} for voice in LEARNED for prompt in short],
            "test": [row(voice, prompt) | {"label": prompt} for voice in JUDGED for prompt in short],
        }
        for name, rows in lists.items():
            (part / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        part.rename(folder)
    print(f"{len(lists['speech'])} prompts to learn from, {len(short)} of them to be told apart, in {folder}")


main(pathlib.Path(sys.argv[1]))
