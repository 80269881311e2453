"""
Sound as people bring it: any kind of file, channels that cancel, noise in pauses; and the sample.
"""
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from codetalker import log_mel
from conftest import ROOT
from support import speakers
from support.files import read_audio

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg")
TIME = np.arange(16_000) / 16_000
TONE = (0.5 * np.sin(2 * np.pi * 440 * TIME) * np.sin(3 * TIME)).astype(np.float32)


def write_wav(path, samples=TONE):
    wavfile.write(path, 16_000, np.round(samples * 32_767).astype(np.int16))


def correlation(audio):
    """With TONE, which a coder may have delayed by up to 0.1 s."""
    spectrum = np.fft.rfft(audio, 40_000) * np.fft.rfft(TONE, 40_000).conj()
    best = np.abs(np.fft.irfft(spectrum)).max()
    return best / np.sqrt(np.square(audio).sum() * np.square(TONE).sum())


@needs_ffmpeg
@pytest.mark.parametrize("name, options", [
    ("a.mp3", ""),
    ("a.m4a", ""),
    ("a.flac", ""),
    ("a.ogg", "-c:a libvorbis"),
    ("mulaw.wav", "-c:a pcm_mulaw"),
    ("stereo 44.1.m4a", "-ac 2 -ar 44100"),
    ("really_m4a.wav", "-f ipod"),
    ("zero_sizes.wav", "-f wav pipe:1"),                # as a program writes that cannot seek
    ("zero_data_size.wav", "-f wav pipe:1"),
    ("film.mp4", "-f lavfi -i color=s=64x64:d=1 -shortest"),
    ("-begins with a dash.mp3", ""),
    ("a:b 100%d 'q' \"x\" ü.mp3", ""),
])
def test_read_audio_decodes(tmp_path, monkeypatch, name, options):
    write_wav(tmp_path / "source.wav")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    target = [] if "pipe:1" in options else [str(tmp_path / "in" / name)]
    options = shlex.split(options)
    made = subprocess.run(["ffmpeg", "-v", "error", "-i", "source.wav", *options, *target],
                          stdout=subprocess.PIPE, check=True).stdout
    if made:
        data = made.index(b"data")
        riff = made[:8] if name == "zero_data_size.wav" else made[:4] + bytes(4)
        made = riff + made[8:data + 4] + bytes(4) + made[data + 8:]
        (tmp_path / "in" / name).write_bytes(made)
    monkeypatch.chdir(tmp_path / "in")
    audio = read_audio(name)                            # a relative path
    assert audio.dtype == np.float32 and len(audio) == pytest.approx(16_000, abs=2_000)
    assert correlation(audio) > 0.99
    assert [path.name for path in (tmp_path / "in").iterdir()] == [name]        # nothing beside it


@pytest.mark.parametrize("name, content, ffmpeg, message", [
    ("none.wav", None, True, "no such file"),
    ("text.mp3", b"hello", True, "ffmpeg finds none"),
    ("empty.wav", b"", True, "ffmpeg finds none"),
    ("pointer.wav", b"version https://git-lfs.github.com/spec/v1", True, "run `git lfs pull`"),
    ("no_samples.wav", b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80>\0\0\0}\0\0\2\0\x10\0"
                       b"data\0\0\0\0", True, "found 0 samples"),
    ("speech.wav", b"RIFF1234", False, "needs ffmpeg"),
    ("-it's \"me\".mp3", b"ID3", False, "needs ffmpeg"),
])
def test_read_audio_refuses_in_a_line(tmp_path, monkeypatch, name, content, ffmpeg, message):
    """Without ffmpeg the line ends in a command that a shell takes, with another file as output."""
    if ffmpeg and content is not None and not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg")
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if not ffmpeg:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        read_audio(path)
    assert "\n" not in str(error.value) and "variable" not in str(error.value)
    if not ffmpeg:
        command = shlex.split(str(error.value).partition("elsewhere: ")[2])
        assert command == ["ffmpeg", "-i", str(path), str(tmp_path / f"{path.stem}_16k.wav")]


@pytest.mark.parametrize("right, expected", [
    (-1.0, 1.0),            # the mix is silent: one channel
    (-0.9, 1.0),            # 26 dB below the left one
    (-0.5, 0.25),           # 12 dB below: the mix
    (0.0, 0.5),
    (1.0, 1.0),
])
def test_read_audio_takes_one_channel_where_two_cancel(tmp_path, right, expected):
    write_wav(tmp_path / "a.wav", np.stack([TONE, right * TONE], axis=1))
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), expected * TONE, atol=1e-3)


def test_the_sample_is_made_by_this_project():
    """After a change of the voice: `cp speakers/wav/liam_sentence91.wav notebooks/hello.wav`"""
    rate, samples = wavfile.read(ROOT / "notebooks" / "hello.wav")
    audio, *_ = speakers.make_clip(0, "liam", 91)
    assert rate == 16_000 and samples.nbytes < 80_000
    np.testing.assert_allclose(samples / 32_767, audio, atol=1e-3)


# ---------- noise


def make_noise(samples, slope, seed=0):
    """Noise of variance 1 whose amplitude falls as 1 / f^slope: white 0, pink 0.5, brown 1"""
    hertz = np.fft.rfftfreq(samples, 1 / 16_000).clip(60)
    white = np.random.default_rng(seed).standard_normal(samples)
    noise = np.fft.irfft(np.fft.rfft(white) * hertz ** -slope, samples)
    return noise / noise.std()


def features(audio):
    return log_mel(torch.tensor(audio), 30, len(audio) * 30 // 16_000, 64)


@pytest.mark.parametrize("slope", [0, 0.5, 1])
@pytest.mark.parametrize("seconds", [0.5, 0.9, 3])
def test_noise_alone_is_silence(seconds, slope):
    """Silence is 25 dB below speech, or less. A cut recording may click at its ends."""
    noise = 0.001 * make_noise(int(16_000 * seconds), slope)
    assert features(noise).max() <= -2.5
    noise[60] = 0.5
    assert features(noise)[30:].max() <= -2.5


def speak(subject):
    """A sentence without its pauses at the ends, of variance 1"""
    audio, _, segments, _ = speakers.make_clip(0, subject, 87)
    audio = audio[int(16_000 * segments[0][1]):int(16_000 * segments[-1][0])]
    return audio / audio.std()


@pytest.fixture(scope="module")
def speech():
    """A sentence; and twice, with 1 s between"""
    audio = speak("liam")
    return audio, np.concatenate([audio, np.zeros(16_000), audio])


@pytest.mark.parametrize("slope", [0, 0.5, 1])
@pytest.mark.parametrize("throughout", [True, False])
@pytest.mark.parametrize("decibels", [15, 20, 30])
def test_noise_in_a_pause_is_silence(speech, decibels, throughout, slope):
    audio, paused = speech
    noise = make_noise(len(paused), slope) * 10 ** (-decibels / 20)
    pause = slice(len(audio), len(audio) + 16_000)
    if not throughout:
        noise[:pause.start] = noise[pause.stop:] = 0
    steps = slice(int(pause.start * 120 / 16_000) + 8, int(pause.stop * 120 / 16_000) - 8)
    assert features(0.05 * (paused + noise))[steps].max() <= -2.4


@pytest.mark.parametrize("slope", [0, 0.5])
def test_noise_20_dB_below_speech_changes_little(slope):
    """Subtracting it keeps loud steps within 4 dB of the clean ones; else they differ by 5."""
    differences = []
    for subject in ("ada", "ben", "gwen", "hugo", "iris", "kira", "liam"):
        audio = speak(subject)
        clean = features(0.05 * audio)
        noisy = features(0.05 * (audio + 0.1 * make_noise(len(audio), slope)))
        loud = clean.mean(dim=1) > 0
        differences.append(float((clean - noisy)[loud].abs().mean()))
    assert np.mean(differences) < 0.42, differences


@pytest.mark.parametrize("seconds", [0.3, 1])
def test_a_held_vowel_between_pauses_is_speech(seconds):
    samples = int(16_000 * seconds)
    vowel = sum(np.sin(2 * np.pi * 120 * k * np.arange(samples) / 16_000) / k for k in range(1, 40))
    audio = np.concatenate([np.zeros(8_000), 0.1 * vowel, np.zeros(8_000)])
    assert features(audio)[64:60 + int(120 * seconds) - 4].mean() > -0.5
