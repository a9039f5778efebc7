"""Programs that take training steps by turns, so that a change of the machine's speed meets them all.

Each is a process that reads a number of steps a line from its standard input, takes them, and prints the seconds of one;
when its input ends it prints a JSON object that tells its peak memory. `occlude bench --by-turns` is one.
"""
import json
import os
import pathlib
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {
    "tiny": {"side": 32, "patch": 8, "encoder": (64, 2, 4), "decoder": (48, 1, 4)},
    "s16": {"side": 224, "patch": 16, "encoder": (384, 12, 6), "decoder": (512, 8, 16)},
    "b16": {"side": 224, "patch": 16, "encoder": (768, 12, 12), "decoder": (512, 8, 16)},
    "l16": {"side": 224, "patch": 16, "encoder": (1024, 24, 16), "decoder": (512, 8, 16)},
    "h14": {"side": 224, "patch": 14, "encoder": (1280, 32, 16), "decoder": (512, 8, 16)},
}
# Two towers: s16 is open_clip's ViT-S-16.
PAIRS = {
    "tiny": {"side": 32, "patch": 8, "encoder": (64, 2, 4), "text": (48, 1, 4), "embed": 32, "vocabulary": 100, "length": 9},
    "s16": {"side": 224, "patch": 16, "encoder": (384, 12, 6), "text": (384, 12, 6), "embed": 384, "vocabulary": 49408,
            "length": 77},
}
# Clips: s16 is VideoMAE's ViT-S.
CLIPS = {
    "tiny": {"side": 32, "frames": 4, "patch": 8, "encoder": (64, 2, 4), "decoder": (48, 1, 4)},
    "s16": {"side": 224, "frames": 16, "patch": 16, "encoder": (384, 12, 6), "decoder": (192, 4, 3)},
}
# Spectrograms: s16 has Audio-MAE's ten seconds and decoder.
SOUNDS = {
    "tiny": {"frames": 64, "mels": 32, "patch": 8, "encoder": (64, 2, 4), "decoder": (48, 2, 4)},
    "s16": {"frames": 1024, "mels": 128, "patch": 16, "encoder": (384, 12, 6), "decoder": (512, 16, 16)},
}


class NotRun(Exception):
    """A program that cannot take its steps, and why."""


def program():
    """How to start our program: the one that OCCLUDE_PROGRAM names, a bundle's, or that of a built clone."""
    if named := os.environ.get("OCCLUDE_PROGRAM"):
        return [named]
    if (ROOT / "bin/occlude").exists():
        return [str(ROOT / "occlude")]
    release = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    return [str(release / "occlude")]


def config(side, patch, encoder, decoder, batch, dtype="fp32", mask_tokens="decoder"):
    """Our config of a MAE of these numbers (width, depth, heads)."""
    method = {"mae": {"encoder": shape(encoder), "decoder": shape(decoder), "target": {"normalize": True},
                      "mask_tokens": mask_tokens}}
    return whole("MAE", {"height": side, "width": side, "patch": patch}, encoder, method, batch, dtype)


def config_of_pairs(side, patch, encoder, text, embed, vocabulary, length, ratio, batch, dtype="fp32"):
    """Our config of FLIP with the towers of CLIP."""
    method = {"flip": {"encoder": shape(encoder), "embed": embed, "mask": {"ratio": ratio}, "towers": "clip",
                       "text": {"shape": shape(text), "vocabulary": vocabulary, "length": length}}}
    return whole("FLIP", {"height": side, "width": side, "patch": patch}, encoder, method, batch, dtype) | {
        "view": {"caption": {"tokenizer": "none", "length": length}}}


def config_of_clips(side, frames, patch, encoder, decoder, batch, ratio, dtype="fp32"):
    """Our config of VideoMAE."""
    method = {"videomae": {"encoder": shape(encoder), "decoder": shape(decoder), "mask": {"ratio": ratio}}}
    input = {"height": side, "width": side, "frames": frames, "patch": patch, "patch_frames": 2}
    return whole("VideoMAE", input, encoder, method, batch, dtype) | {"view": {"clip": {"sampling": {"stride": 4}}}}


def config_of_sounds(frames, mels, patch, encoder, decoder, batch, attention, dtype="fp32"):
    """Our config of Audio-MAE, which attends globally in its decoder or within windows."""
    method = {"audio_mae": {"encoder": shape(encoder), "decoder": shape(decoder), "attention": attention,
                            "mask": {"ratio": 0.8}}}
    input = {"channels": 1, "height": frames, "width": mels, "patch": patch}
    return whole("Audio-MAE", input, encoder, method, batch, dtype) | {
        "view": {"sound": {"rate": 16000, "mean": 0.0, "std": 1.0}}}


def shape(numbers):
    return dict(zip(("width", "depth", "heads"), numbers))


def whole(name, input, encoder, method, batch, dtype):
    """A config without data, of which `bench` takes noise."""
    width, depth, heads = encoder
    return {
        "about": {"title": f"{name} {width}/{depth}/{heads}", "source": "launch/turns.py", "measured": "now"},
        "input": input,
        "method": method,
        "optim": {"lr": 1e-4},
        "data": {"train": "none"},
        "train": {"steps": 1, "global_batch": batch, "dtype": dtype},
    }


class Turns:
    """A program that takes turns."""

    def __init__(self, words):
        self.told = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.told, text=True)

    def step(self, steps=1):
        """Seconds of one of so many steps."""
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
            return float(self.process.stdout.readline())
        except (ValueError, OSError):
            raise NotRun(self.why()) from None

    def close(self):
        """Ends it; what it tells at its end."""
        try:
            self.process.stdin.close()
        except OSError:
            pass
        told = self.process.stdout.read().strip().splitlines()
        if self.process.wait() or not told:
            raise NotRun(self.why())
        return json.loads(told[-1])

    def why(self):
        self.process.wait()
        self.told.seek(0)
        told = self.told.read()
        if "out of memory" in told.lower():
            return "out of memory"
        lines = [line for line in told.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit {self.process.returncode}"


class Ours(Turns):
    def __init__(self, numbers):
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(numbers, file)
        self.path = pathlib.Path(file.name)
        super().__init__([*program(), "bench", "--config", file.name, "--by-turns"])

    def close(self):
        try:
            return super().close()
        finally:
            self.path.unlink(missing_ok=True)


def quartiles(values):
    values = sorted(values)
    return [values[round((len(values) - 1) * share)] for share in (0.25, 0.5, 0.75)]


def by_turns(first, second, pairs, steps=1, warm=3):
    """Seconds of a step of both, pair by pair, after some turns of each to warm up."""
    for _ in range(warm):
        first.step(steps), second.step(steps)
    return [(first.step(steps), second.step(steps)) for _ in range(pairs)]
