"""Downloads Asterisk's spoken prompts, some 2,800 recordings at 8 kHz in five languages, and lists them for `occlude pack`.

usage: fetch_prompts.py FOLDER

Debian's packages `asterisk-core-sounds-{en,es,fr,it,ru}-wav` (98 MB) contain them, one voice each, except that
English and Spanish are spoken by the same woman.
FOLDER/speech.jsonl lists all English, Spanish and French prompts, without labels. train.jsonl lists the prompts of at most
two seconds in every language, spoken in those three and labeled with the prompt, such as `digits/7`; test.jsonl lists the
same prompts in Italian and Russian, so that no voice of the test occurs in training. language-train.jsonl and
language-test.jsonl list prompts of at most two seconds in English and Spanish, labeled with the language: one voice, and no
prompt is in both.
"""
import pathlib
import shutil
import sys
import wave
import zlib

from debian import new_folder, unpacked, write_lists

TRAIN_VOICES, TEST_VOICES = ("en", "es", "fr"), ("it", "ru")
MAX_SECONDS = 2.0


def seconds(path):
    with wave.open(str(path)) as sound:
        return sound.getnframes() / sound.getframerate()


def main(folder):
    voices = TRAIN_VOICES + TEST_VOICES
    durations = {}
    with new_folder(folder) as part, unpacked(*(f"asterisk-core-sounds-{voice}-wav" for voice in voices)) as folders:
        for voice, root in zip(voices, folders):
            (sounds,) = (root / "usr/share/asterisk/sounds").iterdir()
            shutil.copytree(sounds, part / voice, dirs_exist_ok=True)
            prompts = (path.relative_to(sounds).with_suffix("").as_posix() for path in sounds.rglob("*.wav"))
            spoken = (prompt for prompt in prompts if not prompt.startswith("silence/"))
            durations[voice] = {prompt: seconds(sounds / f"{prompt}.wav") for prompt in spoken}
        short = lambda voices: [p for p in sorted(durations["en"]) if all(durations[v].get(p, MAX_SECONDS + 1) <= MAX_SECONDS for v in voices)]
        row = lambda voice, prompt: {"path": f"{voice}/{prompt}.wav"}
        prompts, both = short(voices), short(("en", "es"))
        languages = lambda is_test: [
            row(voice, p) | {"label": voice} for voice in ("en", "es") for p in both if (zlib.crc32(p.encode()) % 3 == 0) == is_test]
        write_lists(part, {
            "speech": [row(voice, prompt) for voice in TRAIN_VOICES for prompt in sorted(durations[voice])],
            "train": [row(voice, prompt) | {"label": prompt} for voice in TRAIN_VOICES for prompt in prompts],
            "test": [row(voice, prompt) | {"label": prompt} for voice in TEST_VOICES for prompt in prompts],
            "language-train": languages(False),
            "language-test": languages(True),
        })
    print(f"{len(durations['en']) + len(durations['es']) + len(durations['fr'])} training prompts and {len(prompts)} classes in {folder}")


main(pathlib.Path(sys.argv[1]))
