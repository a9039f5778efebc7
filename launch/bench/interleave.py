"""Benchmarks two programs interleaved, step by step, so that changes of the machine's speed affect both alike.

Each program is a process that reads a number of steps per line from standard input, runs them, and prints the seconds per
step. At the end of input it prints a JSON object with its peak memory. `occlude bench --interleaved` is such a program.
"""
import json
import os
import pathlib
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {
    "tiny": {"side": 32, "patch": 8, "encoder": (64, 2, 4), "decoder": (48, 1, 4)},
    "s16": {"side": 224, "patch": 16, "encoder": (384, 12, 6), "decoder": (512, 8, 16)},
    "b16": {"side": 224, "patch": 16, "encoder": (768, 12, 12), "decoder": (512, 8, 16)},
    "l16": {"side": 224, "patch": 16, "encoder": (1024, 24, 16), "decoder": (512, 8, 16)},
    "h14": {"side": 224, "patch": 14, "encoder": (1280, 32, 16), "decoder": (512, 8, 16)},
}
# Image and text encoder: s16 is open_clip's ViT-S-16.
CAPTIONED = {
    "tiny": {"side": 32, "patch": 8, "encoder": (64, 2, 4), "text": (48, 1, 4), "embed_dim": 32, "vocab_size": 100, "context_length": 9},
    "s16": {"side": 224, "patch": 16, "encoder": (384, 12, 6), "text": (384, 12, 6), "embed_dim": 384, "vocab_size": 49408,
            "context_length": 77},
}
# Video: s16 is VideoMAE's ViT-S.
CLIPS = {
    "tiny": {"side": 32, "frames": 4, "patch": 8, "encoder": (64, 2, 4), "decoder": (48, 1, 4)},
    "s16": {"side": 224, "frames": 16, "patch": 16, "encoder": (384, 12, 6), "decoder": (192, 4, 3)},
}
# Audio: s16 has Audio-MAE's ten seconds and its decoder.
AUDIO = {
    "tiny": {"frames": 64, "mels": 32, "patch": 8, "encoder": (64, 2, 4), "decoder": (48, 2, 4)},
    "s16": {"frames": 1024, "mels": 128, "patch": 16, "encoder": (384, 12, 6), "decoder": (512, 16, 16)},
}


class NotRun(Exception):
    """Raised if a program cannot run its steps; the message says why."""


def program():
    """Returns the command of occlude: $OCCLUDE_PROGRAM, the bundle's, or the release build of this clone."""
    if named := os.environ.get("OCCLUDE_PROGRAM"):
        return [named]
    if (ROOT / "bin/occlude").exists():
        return [str(ROOT / "occlude")]
    release = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    return [str(release / "occlude")]


def mae_config(side, patch, encoder, decoder, batch, dtype="fp32", mask_tokens="decoder"):
    """Returns the config of an MAE; encoder and decoder are (width, depth, heads)."""
    method = {"mae": {"encoder": shape(encoder), "decoder": shape(decoder), "target": {"normalize": True},
                      "mask_tokens": mask_tokens}}
    return full_config("MAE", {"height": side, "width": side, "patch": patch}, encoder, method, batch, dtype)


def flip_config(side, patch, encoder, text, embed_dim, vocab_size, context_length, ratio, batch, dtype="fp32"):
    """Returns the config of FLIP with CLIP's encoders."""
    method = {"flip": {"encoder": shape(encoder), "embed_dim": embed_dim, "mask": {"ratio": ratio}, "towers": "clip",
                       "text": {"shape": shape(text), "vocab_size": vocab_size, "context_length": context_length}}}
    return full_config("FLIP", {"height": side, "width": side, "patch": patch}, encoder, method, batch, dtype) | {
        "view": {"caption": {"tokenizer": "none", "context_length": context_length}}}


def videomae_config(side, frames, patch, encoder, decoder, batch, ratio, dtype="fp32"):
    """Returns the config of VideoMAE."""
    method = {"videomae": {"encoder": shape(encoder), "decoder": shape(decoder), "mask": {"ratio": ratio}}}
    input = {"height": side, "width": side, "frames": frames, "patch": patch, "patch_frames": 2}
    return full_config("VideoMAE", input, encoder, method, batch, dtype) | {"view": {"clip": {"sampling": {"stride": 4}}}}


def audiomae_config(frames, mels, patch, encoder, decoder, batch, attention, dtype="fp32"):
    """Returns the config of Audio-MAE; `attention` is that of its decoder."""
    method = {"audiomae": {"encoder": shape(encoder), "decoder": shape(decoder), "attention": attention,
                            "mask": {"ratio": 0.8}}}
    input = {"channels": 1, "height": frames, "width": mels, "patch": patch}
    return full_config("Audio-MAE", input, encoder, method, batch, dtype) | {
        "view": {"audio": {"sample_rate": 16000, "mean": 0.0, "std": 1.0}}}


def method_rows(size):
    """Returns for each method without a teacher: input, config of the method, numbers of PyTorch's side, and by how much its
    batch is smaller than MAE's."""
    numbers = SIZES[size]
    side, patch, encoder, decoder = (numbers[key] for key in ("side", "patch", "encoder", "decoder"))
    input = {"height": side, "width": side, "patch": patch}
    one, two, few = (*decoder[:1], 1, *decoder[2:]), (*decoder[:1], 2, *decoder[2:]), {"hidden": 4 * decoder[0], "embed_dim": 256}
    pixels, colors = 8 if size == "tiny" else 32, 512
    mask, target = {"mask": {"ratio": 0.75}}, {"target": {"normalize": True}}
    row = lambda name, more, theirs, divisor=1, input=input: (
        input, {name: {"encoder": shape(encoder)} | more}, numbers | theirs, divisor)
    return {
        "SupMAE": row("supmae", {"decoder": shape(one), "classes": 1000} | mask | target, {"decoder": one, "classes": 1000}),
        "R-MAE": row("rmae", {"decoder": shape(decoder)} | mask | target, {}, 2),
        "C-MAE": row("contrastive_mae", {"decoder": shape(two), "head": few} | mask, {"decoder": two} | few, 2),
        "MaskFeat": row("maskfeat", {"mask": {"ratio": 0.4}}, {"ratio": 0.4}, 2),
        "MFM": row("mfm", {"radius": side / 14, "low_ratio": 0.5}, {"radius": side / 14}, 2),
        "iGPT": row("igpt", {"colors": colors}, {"side": pixels, "colors": colors}, 8,
                    {"height": pixels, "width": pixels, "patch": 1}),
    }


def shape(sizes):
    return dict(zip(("width", "depth", "heads"), sizes))


def full_config(name, input, encoder, method, batch, dtype):
    """Returns a config without data; `occlude bench` then uses random samples."""
    width, depth, heads = encoder
    return {
        "about": {"title": f"{name} {width}/{depth}/{heads}", "source": "launch/bench/interleave.py", "measured": "now"},
        "input": input,
        "method": method,
        "optim": {"lr": 1e-4},
        "data": {"train": "none"},
        "train": {"steps": 1, "global_batch": batch, "dtype": dtype},
    }


class Program:
    """A process that runs steps on request."""

    def __init__(self, command):
        self.stderr = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True)

    def step(self, steps=1):
        """Runs `steps` steps; returns the seconds per step."""
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
            return float(self.process.stdout.readline())
        except (ValueError, OSError):
            raise NotRun(self.failure()) from None

    def close(self):
        """Ends the process; returns its final JSON object."""
        try:
            self.process.stdin.close()
        except OSError:
            pass
        lines = self.process.stdout.read().strip().splitlines()
        if self.process.wait() or not lines:
            raise NotRun(self.failure())
        return json.loads(lines[-1])

    def failure(self):
        """Returns the reason in one line."""
        self.process.wait()
        self.stderr.seek(0)
        text = self.stderr.read()
        if "out of memory" in text.lower():
            return "out of memory"
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit {self.process.returncode}"


class Occlude(Program):
    """`occlude bench --interleaved` with a config."""

    def __init__(self, config):
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(config, file)
        self.path = pathlib.Path(file.name)
        super().__init__([*program(), "bench", "--config", file.name, "--interleaved"])

    def close(self):
        try:
            return super().close()
        finally:
            self.path.unlink(missing_ok=True)


def quartiles(values):
    values = sorted(values)
    return [values[round((len(values) - 1) * fraction)] for fraction in (0.25, 0.5, 0.75)]


def interleave(first, second, pairs, steps=1, warmup=3):
    """Returns pairs of seconds per step, measured alternately after some warm-up."""
    for _ in range(warmup):
        first.step(steps)
        second.step(steps)
    return [(first.step(steps), second.step(steps)) for _ in range(pairs)]
