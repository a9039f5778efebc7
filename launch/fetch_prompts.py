"""Fetches Asterisk's spoken prompts, some 2,800 recordings at 8 kHz in five languages, and lists them for `occlude pack`.

usage: fetch_prompts.py FOLDER

Debian's packages `asterisk-core-sounds-{en,es,fr,it,ru}-wav` (98 MB) hold them, one voice each but that English and
Spanish are spoken by the same woman.
FOLDER/speech.jsonl lists all that is said in English, Spanish and French, without labels; train.jsonl those prompts that
no voice takes longer than two seconds for, in the same languages, labelled with what is said, such as `digits/7`; and
test.jsonl the same prompts in Italian and Russian. So a label is never told from the voice: nobody who is heard in the
test was heard in training. language-train.jsonl and language-test.jsonl hold prompts of up to two seconds in English and
Spanish, labelled with the language: no prompt is in both, and the voice is one.
"""
import pathlib
import shutil
import sys
import wave
import zlib

from debian import listed, making, unpacked

LEARNED, JUDGED = ("en", "es", "fr"), ("it", "ru")
LONGEST = 2.0


def seconds(path):
    with wave.open(str(path)) as sound:
        return sound.getnframes() / sound.getframerate()


def main(folder):
    voices, said = LEARNED + JUDGED, {}
    with making(folder) as part, unpacked(*(f"asterisk-core-sounds-{voice}-wav" for voice in voices)) as places:
        for voice, place in zip(voices, places):
            (sounds,) = (place / "usr/share/asterisk/sounds").iterdir()
            shutil.copytree(sounds, part / voice, dirs_exist_ok=True)
            prompts = (path.relative_to(sounds).with_suffix("").as_posix() for path in sounds.rglob("*.wav"))
            spoken = (prompt for prompt in prompts if not prompt.startswith("silence/"))
            said[voice] = {prompt: seconds(sounds / f"{prompt}.wav") for prompt in spoken}
        short = lambda voices: [p for p in sorted(said["en"]) if all(said[v].get(p, LONGEST + 1) <= LONGEST for v in voices)]
        row = lambda voice, prompt: {"path": f"{voice}/{prompt}.wav"}
        prompts, both = short(voices), short(("en", "es"))
        languages = lambda judged: [
            row(voice, p) | {"label": voice} for voice in ("en", "es") for p in both if (zlib.crc32(p.encode()) % 3 == 0) == judged]
        listed(part, {
            "speech": [row(voice, prompt) for voice in LEARNED for prompt in sorted(said[voice])],
            "train": [row(voice, prompt) | {"label": prompt} for voice in LEARNED for prompt in prompts],
            "test": [row(voice, prompt) | {"label": prompt} for voice in JUDGED for prompt in prompts],
            "language-train": languages(False),
            "language-test": languages(True),
        })
    print(f"{len(said['en']) + len(said['es']) + len(said['fr'])} prompts to learn from, {len(prompts)} to be told apart, in {folder}")


main(pathlib.Path(sys.argv[1]))
