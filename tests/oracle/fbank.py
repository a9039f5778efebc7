"""Decoding, spectrograms and resampling of audio by libsndfile and torchaudio.

fbank.py files FOLDER           writes audio in every format, and samples.safetensors as decoded by libsndfile
fbank.py features IN OUT        torchaudio's Kaldi filterbank, in fp32 and fp64, of the waveforms of a safetensors file
fbank.py resample IN OUT        torchaudio's resampling of its waveforms
fbank.py time IN                prints the CPU seconds of one spectrogram of the first waveform for each input line

The name of a waveform has the parameters: RATE/MELS/..., or FROM/TO/....
"""

import sys
import time

import numpy as np
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)


def fbank(wave, rate, mels):
    """Audio-MAE's `_wav2fbank`."""
    from torchaudio.compliance import kaldi

    wave = wave - wave.mean()
    return kaldi.fbank(
        wave[None],
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=mels,
        dither=0.0,
        frame_shift=10,
    )


def files(folder):
    import soundfile

    draw = np.random.default_rng(3)
    found = {}
    kinds = [
        ("u8.wav", "WAV", "PCM_U8"),
        ("s16.wav", "WAV", "PCM_16"),
        ("s24.wav", "WAV", "PCM_24"),
        ("s32.wav", "WAV", "PCM_32"),
        ("f32.wav", "WAV", "FLOAT"),
        ("f64.wav", "WAV", "DOUBLE"),
        ("ulaw.wav", "WAV", "ULAW"),
        ("ext.wav", "WAVEX", "PCM_16"),
        ("s16.flac", "FLAC", "PCM_16"),
        ("s24.flac", "FLAC", "PCM_24"),
        ("vorbis.ogg", "OGG", "VORBIS"),
        ("layer3.mp3", "MP3", "MPEG_LAYER_III"),
    ]
    for channels, rate in [(1, 16000), (2, 44100), (2, 8000), (1, 48000), (2, 48000)]:
        t = np.arange(int(0.6 * rate)) / rate
        tones = [0.4 * np.sin(2 * np.pi * (220 + 180 * c) * t) + 0.02 * draw.standard_normal(t.size) for c in range(channels)]
        wave = np.stack(tones, 1)
        for name, container, codec in [("coded.opus", "OGG", "OPUS")] if rate == 48000 else kinds:
            name = f"{channels}-{rate}-{name}"
            soundfile.write(f"{folder}/{name}", wave, rate, format=container, subtype=codec)
            decoded, _ = soundfile.read(f"{folder}/{name}", dtype="float32", always_2d=True)
            found[name] = torch.from_numpy(decoded.mean(1).copy())
    soundfile.write(f"{folder}/adpcm.wav", wave, rate, format="WAV", subtype="IMA_ADPCM")
    soundfile.write(f"{folder}/s16.aiff", wave, rate, format="AIFF", subtype="PCM_16")
    save_file(found, f"{folder}/samples.safetensors")


def numbers(name):
    return [int(part) for part in name.split("/")[:2]]


command, *arguments = sys.argv[1:]
if command == "files":
    files(*arguments)
elif command == "features":
    out = {}
    for name, wave in load_file(arguments[0]).items():
        rate, mels = numbers(name)
        out[f"{name}/fp32"] = fbank(wave, rate, mels).contiguous()
        out[f"{name}/fp64"] = fbank(wave.double(), rate, mels).contiguous()
    save_file(out, arguments[1])
elif command == "resample":
    from torchaudio.functional import resample

    out = {name: resample(wave, *numbers(name)).contiguous() for name, wave in load_file(arguments[0]).items()}
    save_file(out, arguments[1])
elif command == "time":
    name, wave = next(iter(load_file(arguments[0]).items()))
    rate, mels = numbers(name)
    mean, std = -4.2677393, 4.5689974
    for line in sys.stdin:
        start = time.process_time()
        rows = fbank(wave, rate, mels)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1024 - rows.shape[0]))
        rows = (rows - mean) / (std * 2)
        print(time.process_time() - start, flush=True)
