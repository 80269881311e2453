"""What the model learns from, and how far one is from it.

    python data.py convert --vocaset FOLDER --out vocaset       VOCASET as downloaded -> a folder for --data
    python data.py check vocaset                                what is wrong with it, in plain words

Map of this file
    built-in speakers   voice: a source-filter synthesiser; face: a mesh and its motions; performances; the folder
    reader              DataSet: any folder in the layout of FaceFormer and CodeTalker, `--data FOLDER` of the scripts
    convert, check      the two commands above
    metrics             lip error, dynamics, energy, correlation; score and evaluate

Units: seconds, hertz, metres. Motion is vertices - template; frame t covers [t / fps, (t + 1) / fps) and shows the face
at its centre. Everything random comes from a seed: same seed, same bytes.
"""
import argparse
import json
import math
import pickle
import re
import shutil
import signal as signals
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import fft, signal
from scipy.interpolate import PchipInterpolator
from scipy.io import wavfile
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import Delaunay, cKDTree
from torch.nn.utils.rnn import pad_sequence

from codetalker import SAMPLE_RATE, check_size, prepare, whole, why

FPS = 30                            # frames per second of the built-in speakers
MOTIONS = ("jaw", "close", "protrude", "round", "spread", "raise_upper", "tuck",                        # the lips
           "blink_left", "blink_right", "brow_left", "brow_right", "frown", "squint", "cheek")          # the rest
BUILT_IN = "speakers"               # the folder of the built-in data set, made on first use


def progress(what, done, total, start):
    """Twenty lines at most, each over the last on a terminal: what, how far, and the time left since `start`."""
    if done * 20 // total > (done - 1) * 20 // total:
        left = (time.time() - start) / done * (total - done)
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        print(f"{what}: {done}/{total}, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)


@contextmanager
def whole_folder(folder):
    """Give FOLDER.part to fill: it becomes `folder` when the block ends well, otherwise it goes."""
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for name in ("wav", "vertices_npy"):
            (part / name).mkdir(parents=True)
        yield part
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ==================================================================================================== voice

HOP = SAMPLE_RATE // 200            # 5 ms, the rate of all control tracks
N_FFT = 512                         # 10 ms of source and 22 ms for the formants to ring
HERTZ = np.arange(N_FFT // 2 + 1, dtype=np.float32) * SAMPLE_RATE / N_FFT

# One line a phone (ARPAbet; -Y and -W end the diphthongs).                           Sources:
# F1 F2 F3    Hz, men: vowels Peterson & Barney 1952, table II; the rest Klatt 1980, tables II and III
# lean        how far F2 and F3 yield to vowels around: locus equations, Sussman et al. 1991, rounded
# ms          inherent duration: Allen, Hunnicutt & Klatt 1987, table 9-1
# voice asp   amplitude of glottal pulses and of aspiration (ours, after spectrograms)
# dB at width friction or burst: level against a vowel, centre, half-width in Hz (after Stevens 1998, ch. 7-8)
# nasal shut  velum open; how much a constriction muffles what is above 400 Hz (ours, after spectrograms)
# jaw .. tuck lip targets; J, L: dominance of jaw and of lips (ours; the form is Cohen & Massaro's 1993)
TABLE = """
     F1   F2   F3 lean  ms voice asp  dB   at width nasal shut jaw close protr round spread raise tuck   J   L
SIL 500 1500 2500  1.0 100     0   0 -99 2000  2000     0    0   0    .1     0     0      0     0    0 3.0 1.0
AA  730 1090 2440    0 240     1   0 -99 2000  2000     0    0 .80     0     0     0      0   .05    0 1.2 0.7
AE  660 1720 2410    0 230     1   0 -99 2000  2000     0    0 .70     0     0     0    .35   .15    0 1.2 0.8
AH  640 1190 2390    0 140     1   0 -99 2000  2000     0    0 .48     0     0     0      0     0    0 0.6 0.4
AO  570  840 2410    0 240     1   0 -99 2000  2000     0    0 .62     0   .40   .45      0     0    0 1.1 1.0
AW  640 1230 2550    0 260     1   0 -99 2000  2000     0    0 .75     0     0     0      0   .05    0 1.2 0.7
AY  660 1200 2550    0 250     1   0 -99 2000  2000     0    0 .75     0     0     0    .10   .05    0 1.2 0.7
EH  530 1840 2480    0 150     1   0 -99 2000  2000     0    0 .52     0     0     0    .30   .10    0 1.0 0.7
ER  490 1350 1690    0 180     1   0 -99 2000  2000     0    0 .35     0   .45   .40      0   .10    0 0.9 1.0
EY  480 1720 2520    0 190     1   0 -99 2000  2000     0    0 .45     0     0     0    .40   .10    0 1.0 0.8
IH  390 1990 2550    0 135     1   0 -99 2000  2000     0    0 .30     0     0     0    .30   .05    0 0.8 0.6
IY  270 2290 3010    0 155     1   0 -99 2000  2000     0    0 .20     0     0     0    .70   .10    0 1.0 1.0
OW  540 1100 2300    0 220     1   0 -99 2000  2000     0    0 .50     0   .40   .50      0     0    0 1.0 1.1
OY  550  960 2400    0 280     1   0 -99 2000  2000     0    0 .58     0   .50   .55      0     0    0 1.1 1.1
UH  440 1020 2240    0 160     1   0 -99 2000  2000     0    0 .35     0   .40   .40      0     0    0 0.9 0.9
UW  300  870 2240    0 210     1   0 -99 2000  2000     0    0 .20     0   .80   .85      0     0    0 1.0 1.3
-Y  370 1900 2500    0   0     1   0 -99 2000  2000     0    0 .25     0     0     0    .50   .05    0 0.8 0.8
-W  430  920 2320    0   0     1   0 -99 2000  2000     0    0 .25     0   .65   .75      0     0    0 0.8 1.1
W   290  610 2150   .1  80    .7   0 -99 2000  2000     0   .2 .15   .10   .85   .95      0     0    0 1.0 1.8
Y   260 2070 3020   .2  80    .7   0 -99 2000  2000     0   .1 .18     0     0     0    .50     0    0 0.9 0.7
R   310 1060 1380   .2  80    .7   0 -99 2000  2000     0   .1 .22     0   .55   .50      0   .15    0 0.8 1.1
L   310 1050 2880   .3  80    .7   0 -99 2000  2000     0  .15 .32     0     0     0    .10   .05    0 0.7 0.4
HH  500 1500 2500  .95  80    .1  .2 -99 2000  2000     0    0 .40     0     0     0      0     0    0 0.2 0.1
M   480 1270 2130   .6  70   .95   0 -99 2000  2000     1  .35 .15     1   .05     0      0     0    0 0.6 0.5
N   480 1340 2470   .4  60   .95   0 -99 2000  2000     1   .3 .22     0     0     0    .10   .05    0 0.8 0.3
NG  480 2000 2900   .5  95   .95   0 -99 2000  2000     1   .3 .30     0     0     0    .05     0    0 0.5 0.2
P   400 1100 2150   .8  90     0 .18 -18  900  1500     0    1 .15     1   .05     0      0     0    0 0.6 0.5
B   200 1100 2150   .8  85   .35 .05 -20  600  1200     0    1 .15     1   .05     0      0     0    0 0.6 0.5
T   400 1600 2600   .4  75     0  .2 -12 4500  1800     0    1 .18     0     0     0    .10   .05    0 1.0 0.3
D   200 1600 2600   .4  75   .35 .05 -16 3800  1800     0    1 .20     0     0     0    .10   .05    0 0.9 0.3
K   300 1990 2850   .7  80     0  .2 -13 2100   600     0    1 .30     0     0     0      0     0    0 0.5 0.2
G   200 1990 2850   .7  80   .35 .05 -17 1900   600     0    1 .30     0     0     0      0     0    0 0.5 0.2
CH  350 1800 2820   .2 100     0  .2 -11 3300   900     0    1 .16     0   .65   .40      0   .25    0 1.2 1.2
JH  260 1800 2820   .2  80   .35   0 -15 3200   900     0    1 .18     0   .60   .40      0   .25    0 1.2 1.1
F   340 1100 2080   .6 100     0 .02 -24 6500  3000     0   .6 .12     0     0     0    .05   .20    1 1.2 1.0
V   220 1100 2080   .6  60    .5   0 -30 6500  3000     0   .5 .12     0     0     0    .05   .20    1 1.2 1.0
TH  320 1290 2540   .5  90     0 .02 -26 6500  2800     0   .6 .25     0     0     0    .05   .05    0 1.0 0.4
DH  270 1290 2540   .5  50    .5   0 -34 6000  3500     0   .4 .25     0     0     0    .05   .05    0 0.8 0.3
S   320 1390 2530   .4 105     0 .02  -7 6000  1000     0   .6 .10     0     0     0    .25   .10    0 1.5 0.6
Z   240 1390 2530   .4  75    .4   0 -12 6000  1000     0   .5 .10     0     0     0    .25   .10    0 1.5 0.6
SH  300 1840 2750   .2 105     0 .02  -9 3500   900     0   .6 .14     0   .70   .45      0   .30    0 1.3 1.3
ZH  300 1840 2750   .2  70    .4   0 -14 3400   900     0   .5 .16     0   .65   .45      0   .30    0 1.3 1.2
"""
COLUMN = {name: i for i, name in enumerate(TABLE.split("\n")[1].split())}
PHONES = {line.split()[0]: np.array(line.split()[1:], float) for line in TABLE.split("\n")[2:-1]}
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
STOPS = "P B T D K G CH JH".split()
GLIDE = {"AW": "-W", "AY": "-Y", "EY": "-Y", "OW": "-W", "OY": "-Y"}

# Words by part of speech, in the CMU dictionary's ARPAbet; 1 marks the stressed vowel of a content word.
LEXICON = """
det the DH AH, a AH, my M AY, your Y AO R, this DH IH S, our AW ER, his HH IH Z, their DH EH R, some S AH M
det that DH AE T, each IY CH, no N OW, both B OW TH, these DH IY Z, her HH ER, an AE N
prep in IH N, of AH V, on AA N, with W IH DH, for F AO R, from F R AH M, to T UW, at AE T, by B AY
prep under AH N D ER, above AH B AH V, behind B IH HH AY N D, between B IH T W IY N, through TH R UW
pron I AY, you Y UW, he HH IY, she SH IY, we W IY, they DH EY, people P IY1 P AH L, nobody N OW1 B AA D IY
aux was W AH Z, will W IH L, can K AE N, could K UH D, should SH UH D, may M EY, must M AH S T, would W UH D
aux might M AY T
conj and AE N D, but B AH T, so S OW, because B IH K AH Z, when W EH N, if IH F, while W AY L
conj before B IH F AO R
adv never N EH1 V ER, often AO1 F AH N, always AO1 L W EY Z, maybe M EY1 B IY, slowly S L OW1 L IY
adv usually Y UW1 ZH UW AH L IY, now N AW1, again AH G EH1 N, very V EH1 R IY, together T AH G EH1 DH ER
adv almost AO1 L M OW S T
adj big B IH1 G, small S M AO1 L, happy HH AE1 P IY, blue B L UW1, brown B R AW1 N, young Y AH1 NG
adj old OW1 L D, warm W AO1 R M, cheap CH IY1 P, good G UH1 D, bad B AE1 D, smooth S M UW1 DH, rough R AH1 F
adj simple S IH1 M P AH L, thick TH IH1 K, purple P ER1 P AH L, yellow Y EH1 L OW, funny F AH1 N IY
adj noisy N OY1 Z IY, heavy HH EH1 V IY, huge HH Y UW1 JH, public P AH1 B L IH K, quick K W IH1 K
adj other AH1 DH ER, wooden W UH1 D AH N, amazing AH M EY1 Z IH NG, perfect P ER1 F IH K T, brave B R EY1 V
adj loud L AW1 D, empty EH1 M P T IY, bumpy B AH1 M P IY, famous F EY1 M AH S
noun boy B OY1, girl G ER1 L, mother M AH1 DH ER, father F AA1 DH ER, baby B EY1 B IY, table T EY1 B AH L
noun house HH AW1 S, window W IH1 N D OW, paper P EY1 P ER, book B UH1 K, river R IH1 V ER
noun mountain M AW1 N T AH N, shop SH AA1 P, summer S AH1 M ER, bottle B AA1 T AH L, music M Y UW1 Z IH K
noun apple AE1 P AH L, money M AH1 N IY, moment M OW1 M AH N T, problem P R AA1 B L AH M
noun television T EH1 L AH V IH ZH AH N, garage G ER AA1 ZH, vision V IH1 ZH AH N, job JH AA1 B
noun bridge B R IH1 JH, church CH ER1 CH, beach B IY1 CH, thing TH IH1 NG, mouth M AW1 TH, voice V OY1 S
noun family F AE1 M AH L IY, map M AE1 P, lamp L AE1 M P, bus B AH1 S, farm F AA1 R M, food F UW1 D
noun shoe SH UW1, door D AO1 R, morning M AO1 R N IH NG, picture P IH1 K CH ER, horse HH AO1 R S
noun ship SH IH1 P, pocket P AA1 K AH T, dog D AO1 G, robot R OW1 B AA T, broom B R UW1 M, work W ER1 K
noun year Y IH1 R, world W ER1 L D, hope HH OW1 P, trouble T R AH1 B AH L, mob M AA1 B, pub P AH1 B
noun beam B IY1 M, palm P AA1 M, bomb B AA1 M, pipe P AY1 P, tube T UW1 B, member M EH1 M B ER
verb bought B AO1 T, found F AW1 N D, made M EY1 D, put P UH1 T, saw S AO1, took T UH1 K, gave G EY1 V
verb kept K EH1 P T, want W AA1 N T, keep K IY1 P, believe B IH L IY1 V, remember R IH M EH1 M B ER
verb enjoyed EH N JH OY1 D, watch W AA1 CH, leave L IY1 V, move M UW1 V, open OW1 P AH N, follow F AA1 L OW
verb bring B R IH1 NG, stop S T AA1 P, climb K L AY1 M, grab G R AE1 B, think TH IH1 NG K, pushed P UH1 SH T
verb changed CH EY1 N JH D, play P L EY1, build B IH1 L D, jumped JH AH1 M P T, measure M EH1 ZH ER
verb show SH OW1, pull P UH1 L, hear HH IH1 R, use Y UW1 Z, sing S IH1 NG, speak S P IY1 K, drop D R AA1 P
verb rub R AH1 B, visit V IH1 Z AH T
"""
WORDS = {}                          # part of speech -> list of (word, phones)
for line in LEXICON.strip().split("\n"):
    part, entries = line.split(" ", 1)
    WORDS.setdefault(part, []).extend((entry.split()[0], entry.split()[1:]) for entry in entries.split(","))
PRONUNCIATION = {word: phones for entries in WORDS.values() for word, phones in entries}
CLAUSES = ["det noun verb det noun", "pron aux verb det adj noun", "det adj noun verb adv",
           "adv pron verb det noun", "pron verb det noun prep det noun", "det noun prep det noun aux verb",
           "pron aux adv verb det noun"]


def make_sentence(rng):
    """A list of 4 to 8 words; "," stands for a pause."""
    parts = rng.choice(CLAUSES).split()
    if rng.random() < 0.45:                 # a second, shorter half, mostly after a pause
        parts = parts[:5] + [","] * int(rng.random() < 0.7) + ["conj", "pron", "verb"]
    return ["," if part == "," else WORDS[part][rng.integers(len(WORDS[part]))][0] for part in parts]


@dataclass
class Speaker:
    pitch: float            # mean fundamental frequency, Hz
    tract: float            # length of the vocal tract over that of TABLE's men
    rate: float             # 1 = unhurried conversation
    melody: float           # size of a pitch accent, semitones
    breathiness: float      # 0..1: breath noise and open quotient
    tilt: float             # corner of the glottis's low-pass, Hz
    jitter: float           # standard deviation of the period, fraction
    shimmer: float          # standard deviation of a pulse's amplitude, fraction
    bandwidth: float        # factor on the formants' bandwidths
    precision: float        # 1 = clear speech, 0 = mumbled: vowel space, closures, bursts
    nasality: float         # 0..1: how far the velum's opening spreads into vowels
    dialect: int            # seed of this speaker's own vowel qualities


def vary(rng, deviation, size=None):
    """A random factor around 1: log-normal."""
    return np.exp(rng.normal(0, deviation, size))


def make_speaker(rng, height):
    """Draw a Speaker; height 0 is the lowest voice, 1 the highest.

    Short tracts go with high voices, loosely, as from men over women to children.
    """
    pitch = 80 * 3.5 ** height
    tract = np.clip(1.03 - 0.17 * np.log2(pitch / 100) + rng.normal(0, 0.06), 0.76, 1.12)
    return Speaker(pitch, tract, rate=rng.uniform(0.8, 1.35), melody=rng.uniform(1, 4),
                   breathiness=rng.random(), tilt=700 * 8 ** rng.random(), jitter=rng.uniform(0.003, 0.02),
                   shimmer=rng.uniform(0.02, 0.1), bandwidth=rng.uniform(0.8, 1.6),
                   precision=rng.uniform(0.5, 1), nasality=rng.uniform(0.2, 1), dialect=rng.integers(2 ** 31))


def another_day(speaker, rng):
    """The same Speaker with nearly another voice: a network that hears few speakers must meet many voices."""
    factors = dict(pitch=0.25, tract=0.08, rate=0.13, melody=0.3, tilt=0.5, bandwidth=0.2)
    factors = {name: getattr(speaker, name) * vary(rng, deviation) for name, deviation in factors.items()}
    moods = {name: np.clip(getattr(speaker, name) + rng.normal(0, 0.25), 0, 1)
             for name in ("breathiness", "precision", "nasality")}
    return replace(speaker, **factors, **moods)


def schedule(words, speaker, rng):
    """Times for the words: segments [(start s, end s, phone)] without gaps, and accents [(time s, strength)].

    An accent sits on each stressed vowel: strength 0.5, in the one emphasised word 1.2. Stress and the end of
    a phrase lengthen (Klatt 1976). ValueError for a word that LEXICON does not have.
    """
    unknown = set(words) - set(PRONUNCIATION) - {","}
    if unknown:
        raise ValueError(f"words not in LEXICON: {sorted(unknown)}; add them there with their phones")
    emphasised = rng.integers(len(words))

    def silence(low, high):                     # one in ten is a long one: what a face does while nobody speaks
        return "SIL", rng.uniform(low, high) + (rng.random() < 0.1) * rng.uniform(1, 4), 0

    plan = [silence(0.2, 0.4)]                  # (phone, seconds, stress)
    for index, word in enumerate(words):
        if word == ",":
            plan.append(silence(0.15, 0.45))
            continue
        phones = PRONUNCIATION[word]
        last_vowel = max(i for i, phone in enumerate(phones) if phone.rstrip("1") in VOWELS)
        for i, phone in enumerate(phones):
            stress = (1.2 if index == emphasised else 0.5) * phone.endswith("1")
            phone = phone.rstrip("1")
            share = 0.62 + 0.4 * stress if phone in VOWELS else 0.8
            if i >= last_vowel and (words + [","])[index + 1] == ",":
                share *= rng.uniform(1.2, 1.6)
            seconds = PHONES[phone][COLUMN["ms"]] / 1000 * share * vary(rng, 0.18) / speaker.rate
            plan.append((phone, max(seconds, 0.025), stress))
    plan.append(silence(0.2, 0.4))
    ends = np.cumsum([seconds for _, seconds, _ in plan])
    segments = [(float(end - seconds), float(end), phone) for end, (phone, seconds, _) in zip(ends, plan)]
    accents = [((start + end) / 2, stress) for (start, end, _), (*_, stress) in zip(segments, plan) if stress]
    return segments, accents


def release(start, end, phone):
    """When a phone's closure ends: the last third of a stop is burst and breath, others hold to their end."""
    return start + 0.67 * (end - start) if phone in STOPS else end


def formant_tracks(segments, times, speaker, rng):
    """F1 F2 F3 at `times` -> (n, 3) Hz: straight lines between two points a phone, smoothed (undershoot)."""
    own = np.random.default_rng(speaker.dialect)
    dialect = {phone: np.exp(own.normal(0, (0.07, 0.07, 0.03))) for phone in VOWELS + ["-Y", "-W"]}
    neutral = PHONES["SIL"][:3]
    space = 0.7 + 0.3 * speaker.precision  # mumbled vowels lie closer to the neutral tract's

    def vowel(phone):
        target = neutral + space * (PHONES[phone][:3] - neutral)
        return target * dialect[phone] * vary(rng, (0.06, 0.06, 0.03))

    vowels = {i: (vowel(phone), vowel(GLIDE.get(phone, phone)))
              for i, (*_, phone) in enumerate(segments) if phone in VOWELS}
    knots, values = [], []
    for i, (start, end, phone) in enumerate(segments):
        targets = vowels.get(i)
        if targets is None:  # a consonant leans on the vowels before and after
            before = next((vowels[j][1] for j in range(i - 1, i - 4, -1) if j in vowels), neutral)
            after = next((vowels[j][0] for j in range(i + 1, i + 4) if j in vowels), neutral)
            locus = PHONES[phone][:3] * vary(rng, 0.04, 3)
            yields = PHONES[phone][COLUMN["lean"]] * np.array([0.5, 1, 1])
            targets = locus + yields * (before - locus), locus + yields * (after - locus)
        knots += [0.75 * start + 0.25 * end, 0.25 * start + 0.75 * end]
        values += targets
    formants = np.stack([np.interp(times, knots, column) for column in np.array(values).T], 1)
    return gaussian_filter1d(formants, 1.5 + 2 * (1 - speaker.precision), axis=0) / speaker.tract


def control_tracks(segments, times, speaker, rng):
    """TABLE's voice, breath, noise (dB as amplitude), at, width, nasal, shut at `times` -> (7, n)."""
    starts, steps = [], []
    for i, (start, end, phone) in enumerate(segments):
        voice, breath, decibels, at, width, nasal, shut = PHONES[phone][COLUMN["voice"]:COLUMN["shut"] + 1]
        voice, breath, shut = np.array([voice, breath, shut]) * vary(rng, (0.2, 0.3, 0.35))
        noise = 10 ** (decibels / 20) * vary(rng, 0.35)
        if phone not in STOPS:
            starts.append(start)
            steps.append((voice, breath, noise, at, width, nasal, shut))
            continue
        # A stop: closure, burst, breath. Mumbled ones leak, voiced ones may fall silent, some stay shut.
        following = segments[i + 1][2]
        if following in STOPS or following == "SIL" and rng.random() < 0.4:
            noise, breath = 0.1 * noise, 0.1 * breath
        leak = (rng.random() > speaker.precision) * rng.uniform(0, 0.5)
        opening = release(start, end, phone)
        burst = end - 0.005 if phone in ("CH", "JH") else min(opening + rng.uniform(0.006, 0.02), end - 0.005)
        starts += [start, opening, burst]
        steps += [(voice * (rng.uniform(0.2, 1.2) + leak), 0, 0.1 * leak * noise, at, width, 0,
                   shut * (1 - 0.4 * leak)),
                  (0.3 * voice, 0.5 * breath, noise * (0.4 + 0.6 * speaker.precision), at, width, 0, 0.2),
                  (1.5 * voice, breath, 0.03 * noise, at, width, 0, 0)]
    steps = np.array(steps)[np.searchsorted(starts, times, side="right") - 1]
    tracks = gaussian_filter1d(steps, 1.2, axis=0).T
    tracks[5] = gaussian_filter1d(steps[:, 5], 2 + 6 * speaker.nasality)  # the velum is slow
    return tracks


def glottis(times, accents, voice, breath, speaker, rng):
    """Pulses and breath (n * HOP,). Pulses: KLGLOTT88, 2 u - 3 u^2 while open (Klatt & Klatt 1990)."""
    n = len(times)
    fall = 0.5 - times / times[-1]  # declination
    semitones = rng.uniform(1, 4) * fall + gaussian_filter1d(rng.normal(0, 3, n), 12)
    semitones += 12 / np.log(2) * speaker.jitter * rng.standard_normal(n)
    loudness = 0.3 * fall + gaussian_filter1d(rng.normal(0, 1.5, n), 20)
    for moment, strength in accents:
        bump = strength * np.exp(-0.5 * ((times - moment) / 0.08) ** 2)
        semitones, loudness = semitones + speaker.melody * bump, loudness + 0.35 * bump
    curves = speaker.pitch * 2 ** (semitones / 12), voice * np.exp(loudness), breath
    pitch, voice, breath = (np.interp(np.arange(n * HOP) / HOP - 0.5, np.arange(n), y) for y in curves)
    phase = np.cumsum(pitch / SAMPLE_RATE)
    cycle = phase.astype(int)
    u = (phase - cycle) / (0.5 + 0.3 * speaker.breathiness)  # 0..1 while the folds are open
    pulses = np.where(u < 1, 2 * u - 3 * u * u, 0) * vary(rng, speaker.shimmer, cycle[-1] + 1)[cycle]
    air = rng.standard_normal(n * HOP) * np.where(u < 1, 1, 0.5)
    return voice * (pulses + 0.03 * 6 ** speaker.breathiness * air) + 0.5 * breath * air


def resonator(frequency, bandwidth):
    """1 / response of Klatt's digital resonator, 1 at 0 Hz; Hz, scalars or (n, 1) -> (257,) or (n, 257)."""
    z = np.exp(-2j * np.pi * HERTZ / SAMPLE_RATE).astype(np.complex64)
    radius = np.exp(-np.pi * bandwidth / SAMPLE_RATE).astype(np.float32)
    b = (-2 * radius * np.cos(2 * np.pi * frequency / SAMPLE_RATE)).astype(np.float32)
    return (1 + z * (b + radius ** 2 * z)) / (1 + b + radius ** 2)


def windows(signal):
    """Spectra (n, 257) of 10 ms Hann windows every HOP; the windows sum to one."""
    chunks = np.pad(signal, HOP // 2).astype(np.float32).reshape(-1, HOP)
    hann = np.sin(np.pi * (np.arange(2 * HOP, dtype=np.float32) + 0.5) / (2 * HOP)) ** 2
    return fft.rfft(np.concatenate([chunks[:-1], chunks[1:]], 1) * hann, N_FFT)


def synthesise(segments, speaker, rng, accents=()):
    """Speak `segments` -> (samples,) float at 16 kHz, peak 1; `accents` as schedule() gives them."""
    if not segments or segments[-1][2] != "SIL":
        raise ValueError("segments must end with SIL: a closing pause, as schedule() gives it")
    n = int(segments[-1][1] * SAMPLE_RATE) // HOP
    times = (np.arange(n) + 0.5) * HOP / SAMPLE_RATE
    formants = formant_tracks(segments, times, speaker, rng)
    tracks = control_tracks(segments, times, speaker, rng).astype(np.float32)[..., None]
    voice, breath, noise, at, width, nasal, shut = tracks
    spectra = windows(glottis(times, accents, voice[:, 0], breath[:, 0], speaker, rng))
    # The cascade, bandwidths as in Klatt 1980; an open glottis damps F1. Above, one resonance per c / 2L.
    for frequency, bandwidth in zip(formants.T[..., None], (60 + 400 * np.clip(breath, 0, 0.5), 90, 150)):
        spectra /= resonator(frequency, np.float32(speaker.bandwidth * bandwidth))
    for frequency in np.arange(3500, 7600 * speaker.tract, 1000) / speaker.tract:
        spectra /= resonator(frequency, 250 * speaker.bandwidth)
    # A nasal pole at 270 Hz, and a zero that leaves it as the velum opens (Klatt 1980: to 450 Hz).
    spectra *= resonator(270 + nasal * rng.uniform(80, 330), 100) / resonator(270, 100)
    spectra /= np.sqrt(1 + (HERTZ / speaker.tilt) ** 2)
    spectra *= np.exp(-shut * np.log1p((HERTZ / 400) ** 2))
    spectra /= np.percentile(np.sqrt(np.mean(np.abs(spectra) ** 2, 1)), 85)  # loud vowels have power 1
    # Friction: the resonance of the cavity in front of the constriction, with wide skirts, of power `noise`.
    shape = 1 / (1 + ((HERTZ * speaker.tract ** 0.7 - at) / width) ** 2)
    shape *= 1.5 * noise / np.sqrt(np.mean(shape ** 2, 1, keepdims=True) * HOP * 0.75)
    spectra += windows(rng.standard_normal(n * HOP)) * shape
    pieces = np.pad(fft.irfft(spectra, N_FFT), ((0, 0), (0, -N_FFT % HOP))).reshape(n, -1, HOP)
    audio = np.zeros((n + pieces.shape[1], HOP))
    for k in range(pieces.shape[1]):  # overlap-add
        audio[k:k + n] += pieces[:, k]
    audio = audio.ravel()[HOP // 2:][:n * HOP]
    return audio / np.abs(audio).max()


def record(audio, rng):
    """What some microphone in some room makes of it: level, tilt, echo, band limits, noise."""
    n = fft.next_fast_len(len(audio) + SAMPLE_RATE // 2, real=True)
    hertz = np.arange(n // 2 + 1) * SAMPLE_RATE / n + 1
    seconds = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    # The room's tail of echoes falls by 60 dB in 0.1 to 0.6 s.
    room = rng.standard_normal(len(seconds)) * 10 ** (-3 * seconds / rng.uniform(0.1, 0.6))
    room *= 0.4 * rng.random() ** 2 / np.sqrt(np.sum(room ** 2))
    room[0] += 1
    low, high = rng.uniform(30, 200), rng.uniform(4500, 12_000)
    channel = (hertz / 1000) ** rng.normal(0, 0.35)
    channel /= np.sqrt((1 + (low / hertz) ** 4) * (1 + (hertz / high) ** 12))
    hiss = fft.rfft(rng.standard_normal(n)) * hertz ** -rng.uniform(0, 1)  # from white to brown
    spectra = np.stack([fft.rfft(audio, n) * fft.rfft(room, n), hiss]) * channel
    speech, noise = fft.irfft(spectra, n)[:, :len(audio)]
    heard = speech / speech.std() + noise / noise.std() * 10 ** (-rng.uniform(35, 60) / 20)
    return np.clip(heard * 10 ** (-rng.uniform(16, 30) / 20), -1, 1)


def articulate(segments, times):
    """The first seven MOTIONS at `times` (T,) s -> (T, 7) in 0..1.

    Cohen & Massaro 1993: each phone pulls each motion to its target with a dominance that decays
    exponentially before (anticipation) and after it (carry-over); the motion is the dominance-weighted mean.
    A closure (P B M) or a lip under the teeth (F V) dominates every neighbour as long as it is held.
    """
    parts = []
    for start, end, phone in segments:
        end = release(start, end, phone)
        middle = 0.45 * start + 0.55 * end if phone in GLIDE else end
        parts.append((start, middle, *PHONES[phone]))
        if phone in GLIDE:
            parts.append((middle, end, *PHONES[GLIDE[phone]]))
    parts = np.array(parts)
    start, end, jaw, lips = parts[:, 0], parts[:, 1], parts[:, -2], parts[:, -1]
    targets = parts[:, 2 + COLUMN["jaw"]:-2]
    contact = targets[:, [1, 6]].max(1) == 1
    held = np.where(contact | (jaw >= 3), 0.5, 0.2) * (end - start)  # contacts and silence: all along
    away = np.maximum(np.abs(times[:, None] - (start + end) / 2) - held, 0)  # s, (T, phones)
    motions = np.empty((len(times), 7))
    for k, target in enumerate(targets.T):
        strength = jaw if k == 0 else np.where(target == 1, 40, 1) if k in (1, 6) else lips
        decay = 25 if k == 0 else 100 if k in (1, 6) else 18  # 1/s; contacts are made fast
        dominance = strength * np.exp(-decay * away) + 1e-9
        motions[:, k] = dominance @ target / dominance.sum(1)
    motions[:, [1, 6]] *= 1.03  # 40 : 1 is contact
    return np.clip(motions, 0, 1)



# ==================================================================================================== face

# Laid out in millimetres; build_face() hands out metres. Half a head is drawn on a flat chart: row v runs up
# the head, column c (0 in the middle of the face, HALF_GIRTH behind) stands at the angle pi c / HALF_GIRTH.
HALF_GIRTH, MOUTH_Y, MOUTH_WIDTH = 230.0, -65.0, 24.0
EYE, EYE_RADIUS = np.array([31.0, 0.0, 61.5]), 16.5
HINGE, JAW_TURN = np.array([0, -12.0, 8.0]), np.radians(13.0)   # before the ears; lip gap 22 mm at jaw = 1
# Per row v: height in front, height at the side; reach to the front, to the side, to the back.
OUTLINE = np.array([
    (-190, -156, -156, 34, 48, 57), (-150, -122, -118, 31, 42, 52), (-135, -114, -100, 44, 43, 52),
    (-116, -111, -84, 70, 45, 53), (-104, -105, -74, 84, 49, 56), (-90, -90, -64, 88, 55, 58),
    (-65, -65, -48, 89, 61, 68), (-30, -30, -25, 86, 68, 86), (0, 0, 0, 84.5, 72.5, 95),
    (30, 30, 30, 91, 75, 98), (60, 60, 60, 89, 74, 95), (90, 85, 85, 76, 65, 82),
    (116, 102.5, 102.5, 52, 46, 56), (137, 110, 110, 24, 22, 26), (150, 112, 112, 0, 0, 0)])
# The nose per row: height of its ridge, half its width.
NOSE = np.array([(-49, 0, 9), (-45, 4, 9), (-42.5, 11, 9), (-40, 19, 9.5), (-37, 24, 10), (-33, 24.5, 10),
                 (-27, 19, 9.5), (-18, 13.5, 8), (-8, 8, 7.2), (2, 4.2, 7), (13, 1.6, 9), (26, 0, 12)])
# Bumps: chart column and row, widths, height. Cheekbone, cheek, eye socket, brow ridge, temple, jaw corner,
# mouth, fold beside the nose, groove above the lip, fold under the lower lip, chin.
BUMPS = ((48, -22, 17, 14, 5), (36, -36, 14, 14, 3), (31, 3, 19, 11, -4), (34, 21, 20, 7, 3),
         (88, 25, 20, 22, -4), (92, -84, 22, 16, 3), (0, -66, 26, 17, 3), (32, -52, 6, 12, -1.5),
         (0, -53, 3, 7, -1.5), (0, -84, 20, 6, -3.5), (0, -98, 20, 11, 5))
HAIRLINE = np.array([(0, 81), (16, 80), (32, 76), (46, 69), (58, 59), (67, 47), (76, 37), (85, 28), (93, 18),
                     (99, 14), (104, 20), (109, 28), (119, 33), (131, 26), (137, 8), (139, -14), (145, -38),
                     (160, -56), (185, -67), (208, -72), (230, -73)], float)
# Features are rings of vertices, outermost first. Lip: half width, upper, lower height, Cupid's bow, forward.
# Rings 2 to 4 are the red (4 is where the lips meet), 5 and 6 the dark cavity behind.
LIP = ((31.5, 14.0, 15.5, 0.6, 0.2), (27.0, 9.2, 11.4, 1.4, 0.9), (25.6, 7.4, 9.4, 1.4, 2.6),
       (24.8, 3.6, 4.8, 0.6, 4.2), (MOUTH_WIDTH, 0, 0, 0, 0), (21, 11, 13, 0, -14), (0.01, 0, 0, 0, -42))
# Lid: beyond the margin, off the eyeball, depth from the cheek (else from the eyeball), share of a blink.
LID = ((11, 0, 1, .1), (7, 1.5, .5, .34), (4, 1.6, .1, .7), (1.6, 1.5, 0, .92), (0, .9, 0, 1), (-1, -1, 0, 1))
EAR = ((1, 0, 0), (1.12, 7, -6), (1.1, 11, -9), (0.8, 6, -5), (0.4, 1, -1), (0.02, 0, 0))   # size, out, back
BROW = ((1.6, 0.04), (0.75, 0))                                     # half thickness, beyond the ends

SKIN, LIPS, SEAM, LASH = (.87, .66, .55), (.76, .44, .41), (.48, .22, .21), (.22, .14, .12)
HAIR, SHADE, CAVITY, TEETH = (.28, .19, .14), (.7, .48, .4), (.2, .06, .06), (.94, .91, .84)
WHITE, LIMBUS, IRIS, PUPIL = (.93, .92, .9), (.17, .27, .33), (.36, .52, .58), (.03, .03, .04)
PAINT = {"lip2": LIPS, "lip3": LIPS, "lip4": SEAM, "lip5": CAVITY, "lip6": CAVITY, "lid4": LASH, "lid5": LASH,
         "brow1": HAIR, "nostril": (.35, .17, .14), "ear4": SHADE, "ear5": SHADE}

# The skin that a motion moves: |x|, y; widths; which side; displacement in the centre (x outwards, y, z).
MOTION_PATCHES = (
    ("protrude", 0, -65, 24, 15, "all", (0, 0, 8)), ("round", 25, -65, 16, 15, "all", (-11, 0, 3)),
    ("round", 0, -62, 10, 8, "above", (0, -2, 1)), ("round", 0, -68, 10, 8, "below", (0, -1.2, 1)),
    ("spread", 27, -65, 14, 16, "all", (7, 2, -2.5)), ("raise_upper", 0, -60, 22, 14, "above", (0, 6, 1)),
    ("tuck", 0, -67, 19, 9, "below", (0, 1, -6)), ("squint", 34, -15, 18, 8, "all", (0, 2, 1)),
    ("brow_left", 34, 30, 24, 13, "left", (0, 8, 0.5)), ("brow_right", 34, 30, 24, 13, "right", (0, 8, 0.5)),
    ("frown", 14, 27, 14, 12, "all", (-5, -6, 1.5)), ("cheek", 38, -26, 18, 14, "all", (1, 5, 3)),
    ("cheek", 26, -65, 13, 12, "all", (4, 5, -1.5)))
# What makes a person, at one standard deviation: jaw, chin (2), nose (4), eyes, brows, cheekbones, mouth.
TRAIT_PATCHES = (
    (60, -80, 40, 35, (4, 0, 0)), (0, -102, 30, 20, (0, -5, 0)), (0, -100, 28, 18, (0, 0, 3)),
    (16, -37, 9, 9, (2.5, 0, 0)), (0, -36, 16, 12, (0, -3, 0)), (0, -34, 12, 14, (0, 0, 3)),
    (0, -8, 9, 14, (0, 0, 2)), (32, 0, 22, 18, (1.8, 0, 0)), (30, 26, 30, 10, (0, 2.5, 0)),
    (50, -24, 20, 18, (2.5, 0, 4)), (26, -65, 14, 14, (2, 0, 0)))

_outline, _nose = PchipInterpolator(OUTLINE[:, 0], OUTLINE[:, 1:]), PchipInterpolator(NOSE[:, 0], NOSE[:, 1:])


def _smooth(t):
    return np.clip(t, 0, 1) ** 2 * (3 - 2 * np.clip(t, 0, 1))


def _bell(x, y, x0, y0, width, height):
    return np.exp(-((x - x0) / width) ** 2 - ((y - y0) / height) ** 2)


def _patch(x, y, z, x0, y0, width, height, direction):
    """Displacement (V, 3) of a soft patch on both sides of the face; nothing behind the ears moves."""
    weight = _smooth((z + 20) / 50) * _bell(np.abs(x), y, x0, y0, width, height)
    return weight[:, None] * direction * np.stack([np.clip(x / 12, -1, 1), 1 + 0 * x, 1 + 0 * x], -1)


def _column(x, v):
    """Chart column of a point x mm beside the middle in row v."""
    return np.arcsin(np.clip(x / _outline(v)[..., 3], 0, 1)) * HALF_GIRTH / np.pi


def _head(c, v):
    """Chart (n,), (n,) -> skin (n, 3): elliptic rows, features pushed outwards from the head's axis."""
    sine, cosine = np.sin(np.pi * c / HALF_GIRTH), np.cos(np.pi * c / HALF_GIRTH)
    y_front, y_side, front, side, back = _outline(v).T
    x, y = side * sine, y_front + (y_side - y_front) * sine ** 3
    z = np.where(cosine > 0, front, back) * cosine
    ridge, width = _nose(np.clip(v, *NOSE[[0, -1], 0])).T
    nose = ridge * np.exp(-np.abs(x / width) ** 2.2) - 4 * _bell(x, v, 6.5, -42, 3.2, 2.2)     # less nostril
    nose += 9 * np.exp(-((x - 13.5) / 5.2) ** 2 - ((v + 36) / 5.2) ** 4)                     # and wing
    out = nose * (cosine > 0) + sum(height * _bell(c, v, *place) for *place, height in BUMPS)
    hair = 1 + 0.04 * _smooth((v - np.interp(c, *HAIRLINE.T)) / 12)
    return np.stack([x + out * sine, y, z + out * cosine], -1) * hair[:, None]


def _grid(rows, columns, closed):
    """Triangles of a sheet of vertices (rows, columns), one way round throughout."""
    i, j = np.mgrid[:rows - 1, :columns - (not closed)]
    a, b = i * columns + j, i * columns + (j + 1) % columns
    return np.stack([a, a + columns, b, b, a + columns, b + columns], -1).reshape(-1, 3)


def _half_head():
    """The left half: chart (n, 2), positions (n, 3), part names (n,), triangles (f, 3), rings by name."""
    chart, points, part = [], [], []

    def add(name, c, v, position=None):
        chart.append(np.stack(np.broadcast_arrays(c, np.asarray(v, float)), -1))
        points.append(_head(*chart[-1].T) if position is None else position)
        part.extend([name] * len(points[-1]))

    t = np.linspace(0, np.pi, 13)                                # upper middle, corner, lower middle
    for k, (width, upper, lower, bow, forward) in enumerate(LIP):
        x, lift = width * np.sin(t), np.abs(np.cos(t))
        v = MOUTH_Y + np.where(t < np.pi / 2, upper * lift ** 1.3, -lower * lift ** 1.2)
        v -= (t < 1) * bow * (np.exp(-(x / 3.5) ** 2) - 0.5 * np.exp(-((x - 7) / 4) ** 2))
        c, y = _column(x * (lift < 1), v), v + 0.0016 * x ** 2   # corners a little up
        z = _head(c, y)[:, 2] + forward * (lift ** 0.7 if k < 5 else 1)
        add(f"lip{k}", c, v if k < 4 else MOUTH_Y + (6 - k) * np.cos(t), np.stack([x, y, z], -1))
    t = np.arange(16) * np.pi / 8                                # outer corner, top, inner corner, bottom
    for k, (beyond, off, cheek, _) in enumerate(LID):
        x = (15 + beyond) * np.cos(t)
        y = np.where(np.sin(t) > 0, 6.8 + beyond, 4.8 + 0.9 * beyond) * np.sin(t) + 0.06 * x
        c, ball = _column(EYE[0] + x, y), np.sqrt(np.maximum((EYE_RADIUS + off) ** 2 - x ** 2 - y ** 2, 40))
        z = cheek * _head(c, y)[:, 2] + (1 - cheek) * (EYE[2] + ball)
        add(f"lid{k}", c, y, np.stack([EYE[0] + x, y, z], -1))
    t = np.arange(10) * np.pi / 5                                # rear, top, front, lobe
    c, v = (12 + 2 * np.sin(t)) * np.cos(t), 26 * np.sin(t)
    base = _head(118 + c, -5 + v)
    for k, (size, out, back) in enumerate(EAR):
        flare = (0.5 + 0.5 * np.cos(t))[:, None] * (out, 0, back) + (0.2 * out, 0, 0)
        place = base.mean(0) + (base - base.mean(0)) * size + flare
        add(f"ear{k}", 118 + c * (1 - 0.17 * k), -5 + v * (1 - 0.17 * k), place)
    for k, (thick, beyond) in enumerate(BROW):
        s = np.linspace(0, 1, 8)                  # along the lower edge, back along the upper
        s, edge = np.append(s, s[::-1]), thick * np.repeat((-1, 1), 8)
        y = 17.5 + 8 * np.sin(np.pi * (0.21 + 0.61 * s)) + edge * (1.2 + 3.2 * s ** 0.4 * (1 - s))
        add(f"brow{k}", _column(14 + 36 * (s + beyond * (2 * s - 1)), y), y)
    along = np.gradient(HAIRLINE, axis=0)
    within = HAIRLINE + 4 * along[:, ::-1] * (-1, 1) / np.linalg.norm(along, axis=1, keepdims=True)
    within[[0, -1], 0] = HAIRLINE[[0, -1], 0]
    add("hairline", *HAIRLINE.T)                                 # a crisp edge: skin here, hair 4 mm further
    add("hair", *within.T)
    x, y = np.array([(0, -33), (0, -37), (0, -41.5), (0, -44), (5, -38), (11, -41.5), (15, -41.5),
                     (19.5, -37), (17, -36), (20.5, -33), (12.5, -34), (17.5, -31), (6.5, -42)], float).T
    add("nose", _column(x, y), y)
    part[-1] = "nostril"
    add("crown", np.linspace(0, HALF_GIRTH, 7), 139)
    add("neck", np.linspace(0, HALF_GIRTH, 10), -190)
    # Filler: hexagonal lattices, fine at the nose, coarse on the skull, kept clear of what is there already.
    for spacing, c_high, v_low, v_high in ((4.8, 22, -47, 8), (9.8, 62, -112, 34), (15, 95, -124, 70),
                                           (20, 231, -180, 130)):
        v, c = np.mgrid[v_low:v_high:0.9 * spacing, 0:c_high:spacing]
        c[1::2] += 0.3 * spacing
        c = np.where(c > HALF_GIRTH - 0.5 * spacing, HALF_GIRTH, np.where(c < 0.6 * spacing, 0, c))
        taken = (np.hypot((c - 32) / 25, v / 16) < 1) | (np.hypot(c / 38, (v - MOUTH_Y) / 12) < 1)
        free = cKDTree(np.concatenate(chart)).query(np.stack([c, v], -1))[0] > 0.72 * spacing
        add("fill", c[free & ~taken], v[free & ~taken])
    add("top", [0.0], 150)
    chart, points, part = np.concatenate(chart), np.concatenate(points), np.array(part)

    # Rings are sewn to rings column by column; Delaunay joins what lies between the outermost rings.
    rings = {name: np.stack([np.flatnonzero(part == f"{name}{k}") for k in range(len(table))])
             for name, table in (("lip", LIP), ("lid", LID), ("ear", EAR), ("brow", BROW))}
    inner = np.concatenate([ring[1:].ravel() for ring in rings.values()])
    sheet = np.setdiff1d(np.arange(len(chart) - 1), inner)
    joined = sheet[Delaunay(chart[sheet]).simplices]
    for ring in rings.values():
        joined = joined[~np.isin(joined, ring[0]).all(1)]
    sewn = [ring.ravel()[_grid(*ring.shape, name != "lip")] for name, ring in rings.items()]
    brow, crown = rings["brow"][1], np.flatnonzero(part == "crown")
    sewn += [np.append(brow[:8], brow[:7:-1])[_grid(2, 8, False)],
             np.stack([crown[:-1], crown[1:], np.full(6, len(chart) - 1)], -1)]
    triangles = np.concatenate([joined, *sewn])
    (ax, ay), (bx, by) = (chart[triangles[:, k]].T - chart[triangles[:, 0]].T for k in (1, 2))
    triangles[ax * by < ay * bx] = triangles[ax * by < ay * bx][:, ::-1]     # counter-clockwise
    return chart, points, part, triangles, rings


def build_face():
    """The built-in mean face, always the same. Returns a namespace:

    template (V, 3) metres; triangles (F, 3) int, outward counter-clockwise; colours (V, 3) in 0..1; lists
    of indices lips (the red), upper_face (lids, brows, forehead), lip_gap [upper, lower] (inner, middle);
    and the rig that pose() and face_of_subject() read.
    """
    chart, half, part, triangles, rings = _half_head()
    # Mirror; vertices in the middle plane are shared.
    paired = (chart[:, 0] > 0) & (chart[:, 0] < HALF_GIRTH)
    half[~paired, 0] = 0
    twin = np.arange(len(half))
    twin[paired] = len(half) + np.arange(paired.sum())
    skin = np.concatenate([half, half[paired] * (-1, 1, 1)])
    part, (c, v), n = np.append(part, part[paired]), np.concatenate([chart, chart[paired]]).T, len(skin)
    x, y, z = skin.T
    hairy = np.isin(part, ["hair", "fill", "crown", "top"]) & (v > np.interp(c, *HAIRLINE.T) + 1)
    colours = np.array([PAINT.get(name, SKIN) for name in part])
    colours[hairy], colours[np.isin(part, ["lid4", "lid5"]) & (y < 0)] = HAIR, SHADE       # no lashes below
    pieces, faces, paint = [skin], [triangles, twin[triangles][:, ::-1]], [colours]

    def attach(points, colour, closed):
        """Add a loose sheet of vertices (rows, columns, 3), return their indices."""
        start = sum(map(len, pieces))
        pieces.append(points.reshape(-1, 3))
        paint.append(np.broadcast_to(colour, points.shape).reshape(-1, 3))
        faces.append(start + _grid(*points.shape[:2], closed))
        return start + np.arange(len(pieces[-1]))

    # Teeth: two arches, upper fixed, lower on the jaw; odd columns are gaps. Eyeballs: rings round the pupil.
    angle, gap, teeth = np.linspace(-1.2, 1.2, 17), np.arange(17) % 2, []
    for top, bottom, front in ((-56.0, -68.0, 85.5), (-66.8, -76.0, 83.0)):
        arch = np.stack([23 * np.sin(angle), 0 * angle, front - 22 * (1 - np.cos(angle)) - 0.5 * gap], -1)
        sheet = np.stack([arch + (0, top, -1), arch + (0, bottom, 0)])
        teeth.append(attach(sheet, np.multiply(TEETH, (1 - 0.18 * gap)[:, None]), False))
    polar, turn = np.radians([0.5, 9, 10, 20.5, 22, 45, 75])[:, None], -np.arange(12) * np.pi / 6
    cap = np.stack([np.sin(polar) * np.sin(turn), np.sin(polar) * np.cos(turn), np.cos(polar) + 0 * turn], -1)
    tint = np.array([PUPIL, PUPIL, IRIS, LIMBUS, WHITE, WHITE, WHITE])[:, None]
    eyeballs = [attach(EYE * (side, 1, 1) + EYE_RADIUS * cap, tint, True) for side in (1, -1)]
    vertices = np.concatenate(pieces)

    # Share of the jaw's turn: chin and lower lip all, corners of the mouth half, upper lip and neck none.
    across, drop = np.clip(np.abs(x) / MOUTH_WIDTH, 0, 1), MOUTH_Y - v
    fade = np.exp(-np.abs(drop) / (12 + 0.6 * np.clip(c - 30, 0, None)))
    share = np.where(drop > 0, 1 - 0.55 * fade * (1 - (1 - across ** 2) ** 0.6), 0.45 * fade * across ** 4)
    jaw = np.zeros(len(vertices), np.float32)
    jaw[:n], jaw[teeth[1]] = share * _smooth((115 - c) / 65) * _smooth((v + 155) / 45), 1
    # What adds up linearly.
    only = {"all": c >= 0, "above": drop < 0, "below": drop > 0, "left": x > 0, "right": x < 0}
    fields = np.zeros((len(MOTIONS), *vertices.shape), np.float32)
    for motion, *place, which, direction in MOTION_PATCHES:
        fields[MOTIONS.index(motion), :n] += _patch(x, y, z, *place, direction) * only[which][:, None] / 1000
    # Pairs across the mouth, and how far the skin follows when one is drawn together: mostly the lower lip.
    line = rings["lip"][4]
    upper, lower = np.append(twin[line[5:0:-1]], line[:6]), np.append(twin[line[7:-1]], line[:6:-1])
    near = np.flatnonzero((np.hypot(x, y - MOUTH_Y) < 34) & (c < 90) & (np.abs(drop) > 1e-9))
    reach = np.clip((32 - np.abs(x)) / 8, 0, 1) * np.exp(-((np.abs(y - MOUTH_Y) - 5).clip(0) / 14) ** 2)
    hats = np.stack([np.interp(x[near], x[upper], row) for row in np.eye(len(upper), dtype=np.float32)], -1)
    follow = hats * (reach * np.where(drop < 0, -0.2, 0.8))[near, None]
    bare = (y > -10) & (z > 20) & (np.abs(x) < 62) & ~hairy & (part != "hairline")
    return SimpleNamespace(
        template=vertices / 1000, triangles=np.concatenate(faces), colours=np.concatenate(paint),
        lips=np.flatnonzero(np.isin(part, ["lip2", "lip3", "lip4"])).tolist(), lip_gap=line[[0, -1]].tolist(),
        upper_face=np.flatnonzero(bare).tolist(), jaw=jaw, fields=fields, upper=upper, lower=lower, near=near,
        follow=follow.astype(np.float32), pinch=_smooth(np.abs(x[upper]) / MOUTH_WIDTH * 2.2 - 0.6),
        lids=[rings["lid"], twin[rings["lid"]]], eyeballs=eyeballs)


def face_of_subject(face, rng):
    """A subject's own template (V, 3) m: the mean face reshaped by random traits; rng a numpy Generator."""
    template = 1000 * face.template
    x, y, z = template.T.copy()
    for rings, ball, side in zip(face.lids, face.eyeballs, (1, -1)):   # an eye moves as one, as its apex does
        eye = np.append(rings[1:], ball)
        x[eye], y[eye], z[eye] = EYE * (side, 1, 1) + (0, 0, EYE_RADIUS)
    width, height, length, lips, *traits = rng.normal(size=len(TRAIT_PATCHES) + 4).clip(-1.8, 1.8)
    template += np.stack([0.04 * width * x, 0.035 * height * y, 0.03 * length * z], -1)
    for trait, (*place, direction) in zip(traits, TRAIT_PATCHES):
        template += trait * _patch(x, y, z, *place, direction)
    fuller = 0.22 * lips * (y[face.lips] - MOUTH_Y)
    template[face.lips] += np.stack([0 * fuller, fuller, 0.6 * np.abs(fuller) * np.sign(lips)], -1)
    return template / 1000


def _turn(out, index, centre, angle):
    """Turn out (T, V, 3) at index (n,) about the x axis through centre by angle (T, n), front going up."""
    y, z = out[:, index, 1] - centre[1], out[:, index, 2] - centre[2]
    cosine, sine = np.cos(angle), np.sin(angle)
    out[:, index, 1], out[:, index, 2] = centre[1] + y * cosine + z * sine, centre[2] + z * cosine - y * sine


def pose(face, template, motions):
    """Move a subject's template (V, 3) m by motions (T, 14), columns as MOTIONS -> (T, V, 3) float32, metres.

    ValueError if motions or template have another shape.
    """
    motions, template = np.asarray(motions, np.float32), np.asarray(template, np.float32)
    if motions.ndim != 2 or motions.shape[1] != len(MOTIONS):
        raise ValueError(f"pose expects motions (T, {len(MOTIONS)}), found {motions.shape}; see MOTIONS")
    if template.shape != face.template.shape:
        raise ValueError(f"pose expects template {face.template.shape}, found {template.shape}; build it")
    value = dict(zip(MOTIONS, motions.T[..., None]))                                # each (T, 1)
    out = template + np.tensordot(motions, face.fields, 1)

    # The jaw turns about its hinges, each vertex by its share.
    moved = np.flatnonzero(face.jaw)
    _turn(out, moved, HINGE / 1000, np.float32(-JAW_TURN) * value["jaw"] * face.jaw[moved])
    # `close` draws each pair across the mouth together (rounding shuts the outer pairs). They never pass
    # each other: a pair that overlaps is brought back to touch.
    gap = out[:, face.upper] - out[:, face.lower]
    shut = 1 - (1 - value["close"]) * (1 - value["round"] * face.pinch)
    shut = np.where(gap[..., 1] < 0, 1, shut.clip(0, 1))[..., None].astype(np.float32)
    out[:, face.near] += face.follow @ (shut * gap)
    # Lids turn about the eye's centre, so they slide over the eyeball until the margins meet.
    for rings, ball, blink in zip(face.lids, face.eyeballs, (value["blink_left"], value["blink_right"])):
        centre = template[ball[:12]].mean(0) - (0, 0, EYE_RADIUS / 1000)
        upper, lower = rings[:, 1:8], rings[:, :8:-1]                               # columns face each other
        top, bottom = (np.arctan2(*(template[lid[4]] - centre).T[1:]) for lid in (upper, lower))
        meet = bottom + 0.2 * (top - bottom)
        for lid, edge, squint in ((upper, top, 0.25), (lower, bottom, 1.0)):
            amount = 1 - (1 - blink.clip(0, 1)) * (1 - squint * value["squint"].clip(0, 1))     # (T, 1)
            share = np.array(LID)[:, 3:] * (meet - edge)                            # (rings, columns)
            _turn(out, lid.ravel(), centre, (amount * share.ravel()).astype(np.float32))
    return out



# ================================================================== performances: what a subject does with a sentence


@dataclass
class Style:
    """How one subject moves; drawn once per subject by make_style."""
    lips: float                     # amplitude of all lip motions
    lopsided: float                 # share by which the left brow outdoes the right
    brows: float                    # chance that an accent raises the brows
    blinks: float                   # blinks per minute besides those at pauses
    still: float                    # amplitude of the slow motions: frown, squint, cheek


def make_style(rng):
    # Blinks: 10 to 25 a minute in speech, many of them at pauses (Bentivoglio et al. 1997; Nakano and Kitazawa 2010).
    return Style(rng.uniform(0.9, 1.1), rng.uniform(-0.3, 0.3), rng.uniform(0.5, 0.9), rng.uniform(4, 12),
                 rng.uniform(0.5, 1.5))


def upper_face(segments, accents, times, style, rng):
    """The last seven MOTIONS, (T, 7): speech hardly determines them, so every take draws them anew.

    Brows follow emphasis by chance, blinks cluster at pauses, the rest drifts.
    """
    motions = np.zeros((len(times), 7))
    blink_left, blink_right, brow_left, brow_right, frown, squint, cheek = motions.T     # views, filled below
    pauses = [start + min(0.3, (end - start) / 2) for start, end, phone in segments
              if phone == "SIL" and rng.random() < 0.7]
    strays = rng.uniform(0, times[-1], rng.poisson(style.blinks * times[-1] / 60))
    for moment in np.concatenate([pauses, strays]):
        phase = (times - moment - rng.normal(0, 0.05)) / rng.uniform(0.9, 1.2)
        # Lids fall in 80 ms and rise in 160 ms (VanderWerf et al. 2003).
        lid = np.clip(np.minimum(phase / 0.08 + 1.2, 1.2 - phase / 0.16), 0, 1)
        blink_left += lid
        blink_right += lid
    for moment, strength in accents:
        if rng.random() < style.brows * min(1, strength):
            raised = rng.uniform(0.4, 1) * np.exp(-0.5 * ((times - moment) / rng.uniform(0.1, 0.2)) ** 2)
            brow_left += raised
            brow_right += raised
    drift = gaussian_filter1d(rng.standard_normal((4, len(times) + 120)), 15, axis=1)[:, 60:-60] * 7   # variance near 1
    brow_left += 0.12 * style.still * drift[0]
    brow_right += 0.12 * style.still * drift[0]
    brow_left *= 1 + style.lopsided
    brow_right *= 1 - style.lopsided
    frown += np.clip(0.3 * style.still * (drift[1] - 0.8), 0, 1)
    squint += np.clip(0.3 * style.still * (drift[2] - 0.6), 0, 1)
    cheek += np.clip(0.3 * style.still * (drift[3] - 0.6), 0, 1)
    return np.clip(motions, -0.5, 1)


SUBJECTS = {"train": ["ada", "ben", "cleo", "dan", "eva", "finn", "gwen", "hugo"],
            "val": ["iris", "jack"], "test": ["kira", "liam"]}          # 8, 2, 2 as in VOCASET
SENTENCES = {"train": range(1, 66), "val": range(66, 86), "test": range(86, 106)}


@lru_cache
def person(seed, subject):
    """Who a built-in subject is: its number, Speaker, Style, the Face and its own template (V, 3)."""
    order = sum(SUBJECTS.values(), []).index(subject)
    rng, face = np.random.default_rng([seed, order]), build_face()
    height = (0.3 + 0.618 * order) % 1      # the golden ratio spreads any number of voices evenly from low to high
    return order, make_speaker(rng, height), make_style(rng), face, face_of_subject(face, rng)


def make_clip(seed, subject, sentence, take=0):
    """A built-in subject speaks a sentence -> audio (samples,), vertices (T, V, 3) float32, segments, motions (T, 14).

    The take changes nothing but the face: the audio stays, byte for byte, the lips differ by a few per cent, the upper
    face is drawn anew. So twenty takes are twenty samples of what a face may do with this sound.
    """
    order, speaker, style, face, template = person(seed, subject)
    voice = np.random.default_rng([seed, order, sentence])
    gesture = np.random.default_rng([seed, order, sentence, take])
    today = another_day(speaker, voice)
    segments, accents = schedule(make_sentence(voice), today, voice)
    audio = record(synthesise(segments, today, voice, accents), voice)
    times = (np.arange(int(len(audio) / SAMPLE_RATE * FPS)) + 0.5) / FPS
    lips = articulate(segments, times) * style.lips * np.exp(gesture.normal(0, 0.03, 7))
    motions = np.concatenate([np.clip(lips, 0, 1.1), upper_face(segments, accents, times, style, gesture)], 1)
    return audio, pose(face, template, motions), segments, motions


def write_clip(folder, seed, subject, sentence):
    """Make one clip and write its wav, its npy and its phones (start s, end s, ARPAbet)."""
    audio, vertices, segments, _ = make_clip(seed, subject, sentence)
    name = f"{subject}_sentence{sentence:02d}"
    wavfile.write(folder / "wav" / f"{name}.wav", SAMPLE_RATE, np.round(audio * 32767).astype(np.int16))
    np.save(folder / "vertices_npy" / f"{name}.npy", vertices.reshape(len(vertices), -1))
    lines = [f"{start:.4f}\t{end:.4f}\t{phone}\n" for start, end, phone in segments]
    (folder / "phones" / f"{name}.tsv").write_text("".join(lines))


def build_speakers(folder, seed=0):
    """Write the built-in data set into `folder`: 12 subjects, 600 sentences, about half an hour of speech.

    The folder appears under its name only when it is whole. Same seed, same bytes.
    """
    face = build_face()
    splits = {split: [f"{subject}_sentence{sentence:02d}" for subject in SUBJECTS[split]
                      for sentence in SENTENCES[split]] for split in SUBJECTS}
    description = {"name": "built-in speakers", "seed": seed, "fps": FPS, "unit": "metre", "splits": splits,
                   "triangles": face.triangles.tolist(), "colours": face.colours.round(3).tolist(),
                   "lips": face.lips, "upper_face": face.upper_face, "lip_gap": face.lip_gap}
    with whole_folder(folder) as part:
        (part / "phones").mkdir()
        jobs = [(part, seed, subject, sentence) for split, subjects in SUBJECTS.items() for subject in subjects
                for sentence in SENTENCES[split]]
        with ProcessPoolExecutor() as pool:
            start = time.time()
            for done, _ in enumerate(pool.map(write_clip, *zip(*jobs), chunksize=5), 1):
                progress("building the speakers", done, len(jobs), start)
        templates = {subject: person(seed, subject)[4].astype(np.float32) for subject in sum(SUBJECTS.values(), [])}
        (part / "templates.pkl").write_bytes(pickle.dumps(templates))
        (part / "dataset.json").write_text(json.dumps(description))


# ============================================================ the reader: any folder in the layout, one class for all


# The published data sets, as FaceFormer's and CodeTalker's loaders split them: how a clip is named; of each split the
# first sentence, the last, and the subjects. Their order in training numbers the styles of released checkpoints.
BIWI_SEEN, BIWI_UNSEEN = "F2 F3 F4 M3 M4 M5", "F1 F5 F6 F7 F8 M1 M2 M6"
KNOWN = {"VOCASET": {"clip": "FaceTalk_{}_TA_sentence{:02d}", "fps": 30, "unit": "metre", "splits": {
             "train": (1, 40, "170728_03272 170904_00128 170725_00137 170915_00223 "
                              "170811_03274 170913_03279 170904_03276 170912_03278"),
             "val": (21, 40, "170811_03275 170908_03277"), "test": (21, 40, "170809_00138 170731_00024")}},
         "BIWI": {"clip": "{}_e{:02d}", "fps": 25, "unit": None, "splits": {
             "train": (1, 32, BIWI_SEEN), "val": (33, 36, BIWI_SEEN), "test": (37, 40, BIWI_SEEN),
             "test_b": (37, 40, BIWI_UNSEEN)}}}


def known_splits(known):
    """A published data set's {split: clip names}, in the published order; none for other data."""
    return {split: [KNOWN[known]["clip"].format(subject, sentence) for subject in subjects.split()
                    for sentence in range(first, last + 1)]
            for split, (first, last, subjects) in KNOWN[known]["splits"].items()} if known else {}


def known_set(names):
    """The title of the published data set that all these clips belong to, or None."""
    for title, known in KNOWN.items():
        if {known["clip"].format(subject, sentence) for *_, subjects in known["splits"].values()
                for subject in subjects.split() for sentence in range(1, 41)}.issuperset(names):
            return title


@dataclass
class Clip:
    name: str                       # SUBJECT_sentenceNN
    subject: str
    frames: int                     # T

    @property
    def sentence(self):
        return self.name.rpartition("_")[2]


class ArraysOnly(pickle._Unpickler):
    """A pickle from a stranger is a program. This one may call numpy's array makers and nothing else.

    They are taken from here by name: numpy 2 renamed the modules that hold them, and Python 2's pickles name the old.
    It is the unpickler written in Python: the one in C takes gigabytes if a pickle numbers its parts high enough.
    """
    one = np.ones(1)
    makers = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": one.__reduce__()[0],
              "_frombuffer": one.__reduce_ex__(5)[0], "scalar": one[0].__reduce__()[0]}

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self.makers:
            return self.makers[name]
        if (module, name) == ("_codecs", "encode"):         # how protocol 2 writes the bytes of an array
            return lambda text, encoding: text.encode("latin1")
        raise ValueError(f"refused: it asks for {module}.{name}; only dictionaries of numpy arrays are read")


def read_pickle(path):
    """A pickle of plain containers and numpy arrays (Python 2's too); raises ValueError for anything else."""
    try:
        with open(path, "rb") as file:
            value = ArraysOnly(file, encoding="latin1").load()
        arrays, stack, seen = {}, [value], 0
        while stack:
            part, seen = stack.pop(), seen + 1
            check_size(path, [seen])                        # a list of itself, or of lists of lists that are the same
            if isinstance(part, (dict, list, tuple)):
                stack += [*part.keys(), *part.values()] if isinstance(part, dict) else part
            elif isinstance(part, (np.ndarray, np.generic)) and part.dtype.kind in "biuf":
                arrays[id(part)] = part
            elif not isinstance(part, (int, float, str, bytes, type(None))):
                raise ValueError("refused: it holds something else")    # an array of objects could hide anything
        check_size(path, [array.nbytes for array in arrays.values()])
        return value
    except Exception as error:
        raise ValueError(f"{path}: a pickle of numpy arrays expected ({why(error)})") from None


def read_templates(path):
    """templates.pkl, {subject: (V, 3)} -> {subject: (V*3,) float32}; raises ValueError for anything else."""
    templates, read = read_pickle(path), {}
    if not isinstance(templates, dict) or not templates:
        raise ValueError(f"{path}: {{subject: (V, 3)}} expected, found "
                         f"{'nothing in it' if isinstance(templates, dict) else f'a {type(templates).__name__}'}")
    for subject, template in templates.items():
        if not isinstance(template, np.ndarray) or template.size == 0:
            raise ValueError(f"{path}: {subject}: an array of numbers (V, 3) expected, found "
                             f"{getattr(template, 'shape', type(template).__name__)}")
        read[str(subject)] = flat(template[None])[0]
    return read


def read_rows(path):
    """An npy as it lies on the disk, (T, channels) or (T, V, 3), not read yet; ValueError for anything else."""
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:
        raise ValueError(f"{path}: not a readable npy file of numbers ({why(error)})") from None
    if rows.ndim not in (2, 3) or rows.size == 0 or rows.dtype.kind not in "fiu":
        raise ValueError(f"{path}: numbers (frames, channels) expected, found {rows.dtype} of shape {rows.shape}")
    return rows


def read_description(folder, known):
    """What is said of a data set: KNOWN, overruled by regions/*.txt, overruled by dataset.json, as one dict.

    Raises ValueError for what cannot be meant.
    """
    said = {"unit": KNOWN[known]["unit"], "splits": known_splits(known)} if known else {}
    try:
        for name, path in (("lips", folder / "regions" / "lve.txt"), ("upper_face", folder / "regions" / "fdd.txt")):
            if path.exists():
                said[name] = [int(index) for index in path.read_text().replace(",", " ").split()]
        path = folder / "dataset.json"
        told = json.loads(path.read_text()) if path.exists() else {}
        splits = told.get("splits") or {} if isinstance(told, dict) else None
        if not isinstance(splits, dict) or any(type(names) is not list or {*map(type, names)} - {str}
                                               for names in splits.values()):
            raise ValueError('an object {"fps": ..., "splits": {"train": [...], ...}, ...} expected')
        if "fps" in told and not 0 < float(told["fps"]) < 1000:
            raise ValueError(f"fps between 0 and 1000 expected, found {told['fps']}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    return said | told


def read_regions(said, vertices, folder):
    """lips, upper_face, lip_gap, triangles and colours, an array or None each; ValueError for what fits no mesh."""
    found = {}
    for name, shape in {"lips": (-1,), "upper_face": (-1,), "lip_gap": (2,), "triangles": (-1, 3),
                        "colours": (vertices, 3)}.items():
        kinds, most = ("if", 1) if name == "colours" else ("i", vertices - 1)
        try:
            found[name] = array = np.asarray(said[name]) if said.get(name) else None
            fits = array is None or array.dtype.kind in kinds and array.shape == array.reshape(shape).shape
        except ValueError:                                  # rows of different length, or another number of numbers
            fits = False
        if not fits or array is not None and not 0 <= array.min() <= array.max() <= most:
            raise ValueError(f"{folder}: {name} in dataset.json or regions/: a list of shape {shape} expected, its "
                             f"numbers {'colours' if most == 1 else 'vertices'} 0 to {most}")
    return found


def stride_of(fps, known):
    """2 where files of a published data set hold twice its frames per second, otherwise 1."""
    return 2 if known and abs(fps / KNOWN[known]["fps"] - 2) < 0.1 else 1


def flat(rows):
    """(T, channels) or (T, V, 3) -> (T, V*3) float32: channels to a multiple of three, with zeros."""
    with np.errstate(over="ignore"):                        # `finite` refuses what becomes of it
        rows = np.asarray(rows, np.float32).reshape(len(rows), -1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % 3)))


def finite(numbers, what):
    """The array as it is; ValueError if some of it is not a finite number."""
    if not np.isfinite(numbers).all():
        raise ValueError(f"{what}: finite numbers expected, found NaN or infinity; export it again")
    return numbers


def read_wav(path):
    """Any PCM or float wav, any rate and number of channels -> mono float32 in [-1, 1] at SAMPLE_RATE.

    Raises ValueError, in one line, for what is not such a file or holds no sound.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)     # unknown chunks are no reason to stop
            rate, audio = wavfile.read(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; --wav takes the path of a wav file") from None
    except Exception as error:
        raise ValueError(f"{path}: a PCM or float wav expected ({error}); "
                         f"convert it with `ffmpeg -i {Path(path).name} speech.wav`") from None
    if audio.size == 0 or not 1000 <= rate <= 384_000:
        raise ValueError(f"{path}: sound at 1,000 to 384,000 Hz expected, found {audio.size} samples at {rate} Hz")
    if audio.dtype == np.uint8:                                         # 8-bit wavs are unsigned
        audio = (audio.astype(np.float32) - 128) / 128
    elif np.issubdtype(audio.dtype, np.integer):
        audio = audio / float(-np.iinfo(audio.dtype).min)
    audio = audio.reshape(len(audio), -1).mean(1)                       # channels -> one
    common = math.gcd(rate, SAMPLE_RATE)
    with np.errstate(over="ignore"):
        return finite(signal.resample_poly(audio, SAMPLE_RATE // common, rate // common).astype(np.float32), path)


class DataSet:
    """A folder in the layout of FaceFormer and CodeTalker, read as it is.

        wav/SUBJECT_sentenceNN.wav    vertices_npy/SUBJECT_sentenceNN.npy (T, V*3)    templates.pkl {subject: (V, 3)}
        dataset.json, all of it optional: fps, splits {train, val, test ...: clip names}, triangles, colours, lips,
        upper_face, lip_gap [upper, lower inner lip], unit ("metre")
        regions/lve.txt, regions/fdd.txt (optional, as BIWI has them): lips and upper_face, if dataset.json has none
        mesh.obj (optional): the triangles, if dataset.json has none

    What dataset.json does not say is known (KNOWN) or inferred, and `notes` holds a line about it to print. Channels
    that are no multiple of 3 (blendshape weights) are padded with zeros. faces_only: templates.pkl is enough, for faces
    to be moved by a model that was trained elsewhere. Raises ValueError, in one line, for what is wrong.
    """

    def __init__(self, folder, faces_only=False):
        self.folder, self.notes, self.sounds, self.stride = Path(folder), [], {}, 1
        if not faces_only and not (self.folder / "vertices_npy").is_dir():
            raise ValueError(f"{folder}: a folder with wav/, vertices_npy/ and templates.pkl expected, "
                             f"found {'no vertices_npy/' if self.folder.is_dir() else 'no such folder'}")
        self.templates = read_templates(self.folder / "templates.pkl")
        for subject, template in self.templates.items():
            finite(template, f"{self.folder}/templates.pkl: {subject}")
        clips = [] if faces_only else self.find_clips()
        self.known = known_set([clip.name for clip in clips])
        said = read_description(self.folder, self.known)
        self.channels = next(iter(self.templates.values())).size                        # V * 3
        for clip in clips:
            width, template = self.frames_of(clip.name, 0, 1).shape[1], self.templates[clip.subject].size
            if not width == template == self.channels:
                raise ValueError(f"{self.folder}: {self.channels} channels expected everywhere, as in the first "
                                 f"template, found {width} in {clip.name}.npy and {template} in its subject's template")
        self.fps = None if faces_only else float(said.get("fps") or self.infer_fps(clips))
        self.splits = {"train": []} if faces_only else self.read_splits(said.get("splits"), clips)
        published = [name.rpartition("_")[0] for name in known_splits(self.known).get("train", [])]
        seen = {clip.subject for clip in self.splits["train"]}                          # the K styles, in order
        self.subjects = [name for name in dict.fromkeys(published + sorted(seen)) if name in seen]
        everything = list(range(self.channels // 3))
        if "triangles" not in said and (self.folder / "mesh.obj").exists():
            said["triangles"] = read_triangles(self.folder / "mesh.obj", len(everything))
        told = read_regions(said, len(everything), self.folder)
        self.triangles, self.colours, self.lip_gap = told["triangles"], told["colours"], told["lip_gap"]
        self.lips, self.upper_face = (everything if told[name] is None else told[name].tolist()
                                      for name in ("lips", "upper_face"))
        self.millimetres = 1000.0 if said.get("unit") == "metre" else None
        for name in ("lips", "upper_face"):
            if name not in said:
                self.notes.append(f"{name}: not named in dataset.json or regions/, so all {len(everything)} vertices")
        self.scale, self.most_moving = 1.0, 0
        if not faces_only:
            self.measure_training_motion()

    def find_clips(self):
        """All clips that have motion, sound and a template, sorted by name."""
        clips = []
        for path in sorted((self.folder / "vertices_npy").glob("*.npy")):
            subject = path.stem.rpartition("_")[0]
            if not (self.folder / "wav" / f"{path.stem}.wav").exists():
                self.notes.append(f"{path.stem}: motion without wav, left out")
            elif subject not in self.templates:
                raise ValueError(f"{self.folder}/templates.pkl: no template of {subject!r}, whose clip {path.stem} "
                                 "is in vertices_npy/")
            else:
                clips.append(Clip(path.stem, subject, self.rows(path.stem).shape[0]))
        if not clips:
            raise ValueError(f"{self.folder}: no clip with both wav/NAME.wav and vertices_npy/NAME.npy")
        return clips

    def infer_fps(self, clips):
        """Frames over seconds, rounded. A published set has its own; where the files hold twice that, as FaceFormer's
        conversion of VOCASET does, every second frame is taken."""
        fps = np.median([clip.frames / len(read_wav(self.wav(clip))) * SAMPLE_RATE for clip in clips])
        fps = round(fps) if abs(fps - round(fps)) < 0.02 * fps else fps
        if not self.known:
            self.notes.append(f"fps: {fps:g}, from frames and seconds")
            return fps
        self.stride = stride_of(fps, self.known)
        for clip in clips:
            clip.frames = len(self.rows(clip.name))
        self.notes.append(f"fps: {KNOWN[self.known]['fps']}, as {self.known} is published; frames and seconds say "
                          f"{fps:g}{', so every second frame is taken' * (self.stride - 1)}")
        return KNOWN[self.known]["fps"]

    def read_splits(self, said, clips):
        by_name = {clip.name: clip for clip in clips}
        if said:
            splits = {split: [by_name[name] for name in names if name in by_name] for split, names in said.items()}
        else:                                               # every tenth sentence is held out, all subjects are seen
            sentences = sorted({clip.sentence for clip in clips})
            kind = {sentence: {8: "val", 9: "test"}.get(i % 10, "train") for i, sentence in enumerate(sentences)}
            splits = {split: [clip for clip in clips if kind[clip.sentence] == split]
                      for split in ("train", "val", "test")}
            self.notes.append("splits: of ten sentences eight to train, one to val, one to test: "
                              + ", ".join(f"{len(part)} {split}" for split, part in splits.items()))
        for split in ("train", "val", "test"):
            if not splits.get(split):
                raise ValueError(f"{self.folder}: no clip in the split {split!r} "
                                 "(dataset.json names splits, or ten sentences are needed)")
        return {split: part for split, part in splits.items() if part}

    def measure_training_motion(self):
        """`scale`: the one number that motion is divided by, its root mean square in training. `most_moving`: the
        channel that stands in for the lip gap where the data have none."""
        energy, count = np.zeros(self.channels), 0
        for split, clips in self.splits.items():
            for clip in clips:                              # of the others it is only asked whether there are NaN
                motion = self.frames_of(clip.name)[::5] - self.templates[clip.subject]
                if split == "train":
                    energy, count = energy + np.square(motion, dtype=np.float64).sum(0), count + len(motion)
        self.scale = float(np.sqrt(energy.mean() / count))
        if not 1e-9 < self.scale < 1e9:
            raise ValueError(f"{self.folder}: motion expected, found a scale of {self.scale:.3g}")
        self.most_moving = int(energy.argmax())
        self.notes.append(f"scale: motion is divided by {self.scale:.4g}, its root mean square in training")
        if self.lip_gap is None:
            self.notes.append(f"lip_gap: not named, so the channel that moves most, {self.most_moving}")

    def wav(self, clip):
        return self.folder / "wav" / f"{clip.name}.wav"

    def rows(self, name):
        """A clip's array as it lies on the disk, (T, channels) or (T, V, 3), not read yet."""
        return read_rows(self.folder / "vertices_npy" / f"{name}.npy")[::self.stride]

    def frames_of(self, name, start=None, stop=None):
        """Frames start..stop of a clip, (T, V*3) float32, finite; read from disk as far as needed."""
        return finite(flat(self.rows(name)[start:stop]), self.folder / "vertices_npy" / f"{name}.npy")

    def motion(self, clip, start=None, stop=None):
        """What the model sees: (vertices - template) / scale, (T, V*3) float32 tensor."""
        return torch.from_numpy((self.frames_of(clip.name, start, stop) - self.templates[clip.subject]) / self.scale)

    def vertices(self, motion, subject):
        """Back from the model's motion (T, V*3) to vertices (T, V, 3) float32 of a subject, in the data's unit."""
        return (np.asarray(motion, np.float32) * self.scale + self.templates[subject]).reshape(len(motion), -1, 3)

    def sound(self, clip, config, start=0, stop=None):
        """Frames start..stop of a clip as a model of this ARConfig hears them (`prepare`); computed once and kept."""
        if clip.name not in self.sounds:
            audio = torch.from_numpy(read_wav(self.wav(clip)))
            self.sounds[clip.name] = prepare(audio, self.fps, clip.frames, config)
        heard, stop = self.sounds[clip.name], clip.frames if stop is None else stop
        return heard[len(heard) * start // clip.frames:len(heard) * stop // clip.frames]

    def identity(self):
        """What a checkpoint must remember of its data."""
        return {"data": {"channels": self.channels, "fps": self.fps, "scale": self.scale, "subjects": self.subjects}}

    def check(self, state):
        """Raise ValueError if a checkpoint was not trained on data like these; take over its scale."""
        try:
            trained, here = state["data"], self.identity()["data"]
            channels, subjects = int(trained["channels"]), [str(name) for name in trained["subjects"]]
            fps, scale = float(trained["fps"]), float(trained["scale"])
            if not 0 < fps < 1000 or not 0 < scale < 1e9:
                raise ValueError
            if "vq_config" in state and channels != 3 * state["vq_config"]["vertices"]:
                raise ValueError
            if "ar_config" in state and len(subjects) != state["ar_config"]["styles"]:
                raise ValueError
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise ValueError("the checkpoint does not tell what data it was trained on; train it again") from None
        for name, had, what in (("channels", channels, "motion channels"), ("fps", fps, "frames per second")):
            if here[name] and had != here[name]:
                raise ValueError(f"the checkpoint was trained for {had:g} {what}, {self.folder} has {here[name]:g}; "
                                 "name the folder it was trained on with --data")
        self.fps, self.scale, self.subjects = fps, scale, subjects

    def style(self, subject):
        """A training subject's style, (K,) one-hot."""
        return F.one_hot(torch.tensor(self.subjects.index(subject)), len(self.subjects)).float()

    def opening(self, vertices):
        """The curve by which lips are followed, (T,): the lip gap, or the channel that moves most."""
        if self.lip_gap is None:
            return vertices.reshape(len(vertices), -1)[:, self.most_moving]
        return np.linalg.norm(vertices[:, self.lip_gap[0]] - vertices[:, self.lip_gap[1]], axis=1)


def batch_of(sequences):
    """Sequences (T_i, ...) -> one batch (B, T, ...), zeros behind the short ones, and their lengths (B,)."""
    return pad_sequence(sequences, batch_first=True), torch.tensor([len(sequence) for sequence in sequences])


def batch_of_sounds(sounds, config, device):
    """What CodeTalker.listen takes: log-mel steps become one batch, waveforms stay a list."""
    return [wave.to(device) for wave in sounds] if config.wav2vec2 else batch_of(sounds)[0].to(device)


def random_crops(clips, window, count):
    """`count` random stretches of at most `window` frames, as (clip, start, stop); longer clips come more often."""
    weights = torch.tensor([float(clip.frames) for clip in clips])
    chosen = torch.multinomial(weights, count, replacement=True)
    crops = []
    for clip in (clips[i] for i in chosen):
        start = int(torch.randint(max(1, clip.frames - window + 1), (1,)))
        crops.append((clip, start, min(start + window, clip.frames)))
    return crops


# ================================================================ python data.py convert: VOCASET as it is downloaded


def read_sentences(path, read):
    """A pickle subject -> sentence -> entry, as {SUBJECT_sentenceNN: read(entry)}, without those read as None.

    Raises ValueError where the pickle is not of that shape, which `read` tells by raising anything.
    """
    table, sentences = read_pickle(path), {}
    try:
        for subject in table:
            for sentence, entry in table[subject].items():
                name = f"{subject}_{sentence}"
                if not re.fullmatch(r"[\w-]+", name):       # it becomes a file's name
                    raise ValueError(f"{name!r} is no name")
                if (content := read(entry)) is not None:
                    sentences[name] = content
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: subject -> sentence -> content as in VOCASET expected, found otherwise "
                         f"({type(error).__name__}: {error}); download it again") from None
    return sentences


def rows_in_order(sentence):
    """{frame: row of data_verts.npy} -> the rows (T,), first frame first."""
    return np.array([sentence[frame] for frame in sorted(sentence, key=int)], int) if sentence else None


def recording(sentence):
    """{"audio", "sample_rate"} -> the rate and the samples (N,), their type kept, of several channels the first."""
    audio = np.asarray(sentence["audio"]) if sentence else np.zeros(0)
    if audio.dtype.kind not in "iuf":
        raise TypeError(f"samples are {audio.dtype}")
    return (int(sentence["sample_rate"]), audio.reshape(len(audio), -1)[:, 0]) if audio.size else None


def read_masks(path, vertices):
    """FLAME_masks.pkl -> regions for LVE and FDD as lists of vertices (what others take, VOCASET having no regions)."""
    masks = read_pickle(path)
    try:
        regions = {"lve": np.unique(masks["lips"]),
                   "fdd": np.unique(np.concatenate([masks["forehead"], masks["eye_region"]]))}
        for region in regions.values():                     # sorted, as np.unique leaves it
            if region.dtype.kind not in "iu" or region[0] < 0 or region[-1] >= vertices:
                raise ValueError
    except (IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: FLAME's masks expected: lips, forehead, eye_region, vertices 0 to {vertices - 1}; "
                         "FLAME's site has them as FLAME_masks.pkl") from None
    return {name: region.tolist() for name, region in regions.items()}


def read_triangles(path, vertices):
    """The triangles of an .obj mesh, [[corner, corner, corner], ...] from 0; raises ValueError for any other mesh."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
        faces = [[int(corner.split("/")[0]) - 1 for corner in line[1:]] for line in lines if line[:1] == ["f"]]
    except ValueError as error:                             # a corner is 7, 7/7 or 7/7/7: vertex/texture/normal
        raise ValueError(f"{path}: an .obj mesh expected ({error})") from None
    found = sum(line[:1] == ["v"] for line in lines)
    if found != vertices or not faces or min(map(min, faces)) < 0 or max(map(max, faces)) >= vertices:
        raise ValueError(f"{path}: an .obj mesh of the data's {vertices} vertices expected, found {found} vertices, "
                         f"{len(faces)} faces; VOCASET's is FLAME's head_template.obj")
    return [[face[0], *face[i:i + 2]] for face in faces for i in range(1, len(face) - 1)]       # quads become two


def convert_vocaset(source, out, masks=None, mesh=None):
    """The four files of VOCASET's training data, 60 fps, become a folder in the layout, 30 fps: every second frame.

    Splits need not be written: KNOWN has them. Everything is read and checked before anything is written, and the
    folder appears under its name only when it is whole. Raises ValueError, in one line, for what is wrong.
    """
    source, out, start = Path(source), Path(out), time.time()
    if out.exists():
        raise ValueError(f"{out}: it exists already; remove it, or name another --out")
    templates, vertices = read_templates(source / "templates.pkl"), read_rows(source / "data_verts.npy")    # 7.4 GB
    faces = read_sentences(source / "subj_seq_to_idx.pkl", rows_in_order)
    sounds = read_sentences(source / "raw_audio_fixed.pkl", recording)
    names = sorted(faces.keys() & sounds.keys())
    if not names:
        raise ValueError(f"{source}: sentences with both motion and audio expected, found none; download it again")
    used, count = np.concatenate([faces[name] for name in names]), vertices.shape[1]
    if vertices.ndim != 3 or vertices.shape[2] != 3 or used.min() < 0 or used.max() >= len(vertices):
        raise ValueError(f"{source}/data_verts.npy: (more than {used.max()} frames, V, 3) expected, found "
                         f"{vertices.shape}; download it again")
    for subject in sorted({name.rpartition("_")[0] for name in names}):
        if subject not in templates or templates[subject].size != 3 * count:
            raise ValueError(f"{source}/templates.pkl: {subject}'s template ({count}, 3) expected; download it again")
    regions = read_masks(masks, count) if masks else {}
    if mesh:
        read_triangles(mesh, count)

    with whole_folder(out) as part:
        for done, name in enumerate(names, 1):
            np.save(part / "vertices_npy" / f"{name}.npy", flat(vertices[faces[name][::2]]))
            wavfile.write(part / "wav" / f"{name}.wav", *sounds[name])
            progress("converting", done, len(names), start)
        heads = {subject: template.reshape(-1, 3) for subject, template in templates.items()}
        (part / "templates.pkl").write_bytes(pickle.dumps(heads))
        (part / "dataset.json").write_text(json.dumps({"name": "VOCASET", "fps": 30, "unit": "metre"}))
        (part / "regions").mkdir()
        for name, region in regions.items():
            (part / "regions" / f"{name}.txt").write_text(", ".join(map(str, region)))
        if mesh:
            shutil.copy(mesh, part / "mesh.obj")
    print(f"{out}: {len(names)} clips at 30 fps; left out, as motion or audio is missing: "
          f"{len(faces.keys() ^ sounds.keys())}")


# ======================================================================== python data.py check: what is wrong with it


def misplaced(rows, subject, templates):
    """What is wrong with where a clip's frames (T, V*3) lie, in words; None if it is about its subject's template."""
    def size(vertices):                                     # root mean square over vertices
        return np.sqrt(np.square(vertices.reshape(-1, 3), dtype=np.float64).sum(1).mean())

    def extent(face):                                       # of the vertices about their middle
        return size(face.reshape(-1, 3) - face.reshape(-1, 3).mean(0))

    mean, rest = rows.mean(0), templates[subject]
    away = {name: size(mean - template) for name, template in templates.items() if template.size == mean.size}
    if size(rows.std(0)) > 0.2 * max(extent(mean), extent(rest)):       # a mesh is larger than it moves; these are
        return None                                                     # blendshape weights
    if extent(mean) < 0.2 * extent(rest):
        return ("displacements instead of vertices: a mean over frames near the template expected, found one near 0; "
                "add the subject's template to every frame")
    if away[subject] > min(0.05 * extent(rest), *away.values()):        # 4 mm of a head, or another's is nearer
        return ("far from the template: the subject's own face at rest, on the scale of its vertices, expected; put "
                "that into templates.pkl")


def examine(folder):
    """What is wrong with a data set, in plain words: findings, a line each (found, expected, what to do), like ones
    summed up; and a line or two on what the data are. Raises ValueError if there is no such folder."""
    folder, found, about = Path(folder), {}, []
    if not folder.is_dir():
        raise ValueError(f"{folder}: a folder with wav/, vertices_npy/ and templates.pkl expected, found no folder")

    def finding(text, *names):
        found.setdefault(text, {}).update(dict.fromkeys(names))

    def attempt(read, *arguments, text=None):
        """What `read` returns, or None and a finding: `text` about the file, or else what the reader says."""
        try:
            return read(*arguments)
        except (ValueError, OSError) as error:
            finding(text, arguments[0].stem) if text else finding(str(error))

    # 1. what there is
    motions, wavs = ({path.stem for path in folder.glob(pattern)} for pattern in ("vertices_npy/*.npy", "wav/*.wav"))
    known = known_set(motions) if motions else None
    said = attempt(read_description, folder, known) or {}
    templates = attempt(read_templates, folder / "templates.pkl") or {}
    for name in sorted(motions ^ wavs):
        there, missing = ("motion", "wav/NAME.wav") if name in motions else ("sound", "vertices_npy/NAME.npy")
        finding(f"{there} alone: {missing} expected as well; add it or remove the other", name)

    # 2. templates
    width = Counter(template.size for template in templates.values()).most_common(1)[0][0] if templates else 0
    for subject, template in templates.items():
        span = np.ptp(template.reshape(-1, 3), axis=0).max()
        if template.size != width or not np.isfinite(template).all():
            finding(f"a template with NaN or of another width: {width} numbers expected; export it again", subject)
        elif said.get("unit") == "metre" and not 0.1 < span < 0.5:
            finding("a template on a wrong scale: a head of about 0.2 expected, as the unit is metre; rescale "
                    "templates and vertices (millimetres: times 0.001; 0 to 1: undo the normalisation)",
                    f"{subject} spans {span:.3g}")

    # 3. clips
    lengths, start = {}, time.time()                        # name: frames, seconds
    for done, name in enumerate(sorted(motions), 1):
        progress("checking", done, len(motions), start)
        subject = name.rpartition("_")[0]
        rows = attempt(read_rows, folder / "vertices_npy" / f"{name}.npy",
                       text="an npy that cannot be read: numbers (frames, V*3) expected; export it again")
        audio = attempt(read_wav, folder / "wav" / f"{name}.wav", text="a wav that cannot be read: PCM or float with "
                        "sound in it expected; export it again") if name in wavs else None
        if rows is None:
            continue
        rows = flat(rows)
        if audio is not None:
            lengths[name] = len(rows), len(audio) / SAMPLE_RATE
        if not np.isfinite(rows).all():
            finding("NaN or infinity in the motion: numbers expected; export it again", name)
        elif subject not in templates:
            if templates:                                   # otherwise the file has been told of
                finding("no template: the subject's face at rest expected in templates.pkl; add it", subject)
        elif rows.shape[1] != templates[subject].size:
            finding("another width than the subject's template has: one mesh for all expected; export it again",
                    f"{name} {rows.shape[1]}, not {templates[subject].size}")
        elif wrong := misplaced(rows, subject, templates):
            finding(wrong, name)

    # 4. time: all clips against the stated rate, then each against the others
    if lengths:
        fps = np.median([count / seconds for count, seconds in lengths.values()])
        stated = float(said.get("fps") or (KNOWN[known]["fps"] * stride_of(fps, known) if known else fps))
        if abs(fps / stated - 1) > 0.05:
            finding(f"{fps:.3g} frames for each second of sound: {stated:g} fps expected; correct fps in "
                    "dataset.json or resample the motion")
        for name, (count, seconds) in lengths.items():
            if abs(count / fps - seconds) > 0.3:
                finding("motion and sound of different length: 0.3 s apart at most expected; cut them alike",
                        f"{name} {count / fps:.1f} s and {seconds:.1f} s")

    # 5. what the reader makes of it
    data = None if found else attempt(DataSet, folder)
    if data:
        clips = sum(data.splits.values(), [])
        about.append(f"{folder}: {len(clips)} clips of {len({clip.subject for clip in clips})} subjects, "
                     f"{sum(clip.frames for clip in clips) / data.fps / 60:.1f} minutes, {data.fps:g} fps, "
                     f"{data.channels // 3} vertices; "
                     + ", ".join(f"{len(part)} {split}" for split, part in data.splits.items()))
    published = sum(known_splits(known).values(), [])
    missing = [name for name in published if name not in motions]
    if missing:                                             # nothing wrong: a few were never published
        about.append(f"{known}: {len(missing)} of {len(published)} sentences are missing ({some(missing)})")
    return [text + (f": {len(names)} ({some(names)})" if names else "") for text, names in found.items()], about


def some(names):
    """The first of many names, for a line to be read."""
    return ", ".join(list(names)[:3]) + ", ..." * (len(names) > 3)


# ====================================================================== metrics: how far from the truth


def lip_vertex_errors(made, true, lips):
    """Per frame the largest squared distance over the lip vertices; LVE is the mean over all frames of all clips
    (Richard et al. 2021, as CodeTalker's evaluation has it: no root). made, true (T, V, 3) -> (T,), unit squared."""
    return np.square(made[:, lips] - true[:, lips]).sum(-1).max(1)


def dynamics(motion, upper_face):
    """Mean over the upper face's vertices of the standard deviation over time of the squared displacement.

    FDD, the upper-face dynamics deviation, is this of the real motion minus this of the generated (CodeTalker's
    measure). motion (T, V, 3) is displacement from the template; the deviation is over all T (no n - 1) -> float."""
    return float(np.square(motion[:, upper_face]).sum(-1).std(0).mean())


def energy(motion):
    """How much a face moves: the variance over time of its vertices' positions, mean over them. motion (T, V, 3)."""
    return float(motion.var(0).sum(-1).mean())


def correlation(a, b):
    """Pearson's, of two curves (T,); 0 where one of them does not move."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt(np.square(a).sum() * np.square(b).sum()), 1e-12))


def distribution_distance(made, true):
    """How far generated motion is, as a distribution, from real motion: 0 if every pose and every speed is as frequent.

    For each coordinate the Wasserstein distance between its values in all generated and in all real frames (of as many
    samples on both sides: the mean difference of the sorted values), over its real spread; mean over coordinates, and
    over positions and speeds. It asks how often, never when: a brow may rise at another word, but must rise; a mean of
    many faces is far off, and so is a jitter. made, true: lists of (T, V, 3), pairwise of the same length -> float.
    """
    distances = []
    for part in (lambda motion: motion, lambda motion: np.diff(motion, axis=0)):
        a, b = (np.sort(np.concatenate([part(motion) for motion in side]), axis=0) for side in (made, true))
        distances.append(np.abs(a - b).mean() / b.std(0).mean())
    return float(np.mean(distances))


def perplexity(counts):
    """exp(entropy) of code counts (N,): the number of codes in equal use that would be as varied."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def score(data, clips, made, codes, code_count):
    """All figures of a set of motions against the truth.

    made: one motion (T, V*3) in the model's scale per clip; codes: (T, H) per clip. Returns a dict of floats:
        r2                  share of the real motion's variance explained (1 is perfect)
        gap_correlation     of the lip gap over time, mean over clips
        lve, lve_swapped    against the clip itself, and against what was made for another clip's audio: if audio is
                            heeded the latter is much larger; squared unit of the data (mm2 where it is metres)
        lve_root            square root of lve (mm)
        fdd, fdd_abs        mean over clips, signed (a clip too lively makes up for a dull one) and absolute
        energy, upper_energy  generated over real; below 1 the face is dull
        upper_distance      distribution_distance of the upper faces
        codes_used, perplexity
    """
    to_unit = (data.millimetres or 1.0) ** 2
    rows, errors, swapped, uppers, residual, total = [], [], [], [], 0.0, 0.0
    faces = [data.vertices(motion, clip.subject) for clip, motion in zip(clips, made)]
    for i, clip in enumerate(clips):
        template = data.templates[clip.subject].reshape(1, -1, 3)
        true = data.frames_of(clip.name).reshape(clip.frames, -1, 3)
        residual += np.square(faces[i] - true).sum(dtype=np.float64)
        total += np.square(true - true.mean(0)).sum(dtype=np.float64)
        errors.append(lip_vertex_errors(faces[i], true, data.lips))
        made_by, true_by = faces[i] - template, true - template         # displaced by
        uppers.append([made_by[:, data.upper_face], true_by[:, data.upper_face]])
        rows.append({"gap_correlation": correlation(data.opening(faces[i]), data.opening(true)),
                     "energy": (energy(faces[i]), energy(true)),
                     "upper_energy": (energy(faces[i][:, data.upper_face]), energy(true[:, data.upper_face])),
                     "fdd": to_unit * (dynamics(true_by, data.upper_face) - dynamics(made_by, data.upper_face))})
        others = [j for j, other in enumerate(clips) if other.subject == clip.subject and j != i]
        if others:                                          # the next clip of the same subject, over the shorter length
            other = faces[min((j for j in others if j > i), default=others[0])]
            frames = min(len(other), clip.frames)
            swapped.append(lip_vertex_errors(other[:frames], true[:frames], data.lips))
    figures = {"r2": float(1 - residual / total)}
    for name, frames in (("lve", errors), ("lve_swapped", swapped or [[np.nan]])):
        figures[name] = float(to_unit * np.concatenate(frames).mean(dtype=np.float64))
    figures["lve_root"] = figures["lve"] ** 0.5
    figures["upper_distance"] = distribution_distance(*zip(*uppers))
    for name in ("gap_correlation", "fdd"):
        figures[name] = float(np.mean([row[name] for row in rows]))
    figures["fdd_abs"] = float(np.mean([abs(row["fdd"]) for row in rows]))
    for name in ("energy", "upper_energy"):
        figures[name] = float(np.divide(*np.sum([row[name] for row in rows], 0)))
    counts = np.bincount(np.concatenate([np.asarray(code).ravel() for code in codes]), minlength=code_count)
    return figures | {"codes_used": int((counts > 0).sum()), "perplexity": perplexity(counts)}


@torch.no_grad()
def evaluate_reconstruction(model, data, split):
    """Stage 1 on whole clips of a split: score() of what comes back through the codes."""
    device, clips, made, codes = next(model.parameters()).device, data.splits[split], [], []
    model.eval()
    for clip in clips:
        reconstruction, indices, _ = model(data.motion(clip)[None].to(device))
        made.append(reconstruction[0].cpu())
        codes.append(indices[0].cpu())
    return score(data, clips, made, codes, model.config.codes)


def evaluate_generation(model, data, split, every_style=False, take=0):
    """Stage 2, free-running, on whole clips of a split: score() of what the model makes of their audio alone.

    A seen subject moves in its own style. A stranger has none: it is given one of the training styles, or with
    every_style each of them in turn, and the figures are averaged (the paper's protocol). take: seed of the codes
    that are drawn; the same in every evaluation, and training goes on with the chance it had.
    """
    clips, results, start = data.splits[split], [], time.time()
    strangers = sorted({clip.subject for clip in clips} - set(data.subjects))
    turns = len(data.subjects) if every_style and strangers else 1
    for turn in range(turns):
        borrowed = {name: data.subjects[(i + turn) % len(data.subjects)] for i, name in enumerate(strangers)}
        with torch.random.fork_rng():
            torch.manual_seed(take + turn)
            styles = [borrowed.get(clip.subject, clip.subject) for clip in clips]
            made, codes = generate_clips(model, data, clips, styles)
        results.append(score(data, clips, made, codes, model.autoencoder.config.codes))
        if every_style:
            progress("styles tried", turn + 1, turns, start)
    figures = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
    return figures | {"lve_root": figures["lve"] ** 0.5}    # the root of the mean, not the mean of roots


def generate_clips(model, data, clips, styles):
    """Motion (T, V*3) and codes (T, H), on the CPU, for the audio of each clip in the style of a training subject."""
    device, made, codes = next(model.parameters()).device, [None] * len(clips), [None] * len(clips)
    model.eval()
    order = sorted(range(len(clips)), key=lambda i: clips[i].frames)        # neighbours in length share a batch
    at_once = max(1, min(40, 40_000_000 // (data.channels * clips[order[-1]].frames)))     # bounds the memory
    for chosen in (order[i:i + at_once] for i in range(0, len(order), at_once)):
        sound = batch_of_sounds([data.sound(clips[i], model.config) for i in chosen], model.config, device)
        lengths = torch.tensor([clips[i].frames for i in chosen])
        style = torch.stack([data.style(styles[i]) for i in chosen])
        motion, indices = model.generate(sound, style.to(device), lengths.to(device))
        for row, i in enumerate(chosen):
            made[i], codes[i] = motion[row, :lengths[row]].float().cpu(), indices[row, :lengths[row]].cpu()
    return made, codes


# ============================================================================== what the three commands have in common


def open_data(folder, faces_only=False):
    """The data set in `folder`, or the built-in speakers (made now if they are not there); prints what was inferred."""
    if folder is None:
        if not Path(BUILT_IN).exists():
            build_speakers(BUILT_IN)
        folder = BUILT_IN
    data = DataSet(folder, faces_only)
    for note in data.notes:
        print(f"{folder}: {note}")
    return data


class CommandLine(argparse.ArgumentParser):
    """Flags. A mistake among them is answered as any other, by `cannot`, without the usage in front."""

    def error(self, message):
        raise ValueError(f"{message}; --help tells of all flags")


@contextmanager
def cannot():
    """A mistake of the user's is answered by one line and exit status 2 (Ctrl-C: 130), not by a traceback."""
    before = signals.getsignal(signals.SIGINT)
    try:
        yield
        return
    except KeyboardInterrupt as stop:
        text, status = str(stop) or "stopped", 130
    except (ValueError, OSError, RecursionError) as error:
        text, status = f"error: {error}", 2
    except (MemoryError, RuntimeError) as error:            # PyTorch has a RuntimeError for it
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate", str(error)):
            raise
        text, status = f"error: not enough memory; give less at once, as by --batch or --window ({why(error)})", 2
    finally:
        if signals.getsignal(signals.SIGINT) is not before:             # what hear_interrupts has changed
            signals.signal(signals.SIGINT, before)
    # Whatever stands in a file's name or content: it stays one line and moves no cursor.
    print("".join(letter if letter.isprintable() else " " for letter in text), file=sys.stderr)
    sys.exit(status)


def between(low, high, kind=float):
    """An argparse type: a number from low to high, both included."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"a {'whole ' * (kind is int)}number from {low:g} to {high:g} expected, "
                                             f"found {text}")
        return value
    return read


positive = between(1, 10 ** 9, int)


def writable(folder, make=False):
    """Raise ValueError unless files can be written into a folder: before minutes are spent on what goes there."""
    try:
        if make:
            Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder}: a folder to write into expected ({error.strerror}); name another") from None


def hear_interrupts():
    """From now on the first Ctrl-C does no more than fill the list returned: a step is not left half done, so what is
    saved after it can be resumed exactly. The second stops at once."""
    heard = []

    def hear(*_):
        heard.append(True)
        signals.signal(signals.SIGINT, signals.default_int_handler)

    signals.signal(signals.SIGINT, hear)
    return heard


MAY_DIFFER = "data", "vq", "wav2vec2", "out", "steps", "eval_every", "log_every", "resume"     # when a run is resumed


def training_state(optimiser, step, rows, best, args, data):
    """What a checkpoint holds beside the model: all that it takes to go on exactly."""
    flags = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
    state = {"optimiser": optimiser.state_dict(), "step": step, "rows": rows, "best": best, "flags": flags,
             "random": torch.get_rng_state(), **data.identity()}
    return state | ({"random_cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def resume(state, optimiser, args):
    """Take a run up where its last.pt left it: step, rows, best. ValueError if flags would make it another run."""
    try:
        step, rows, best = int(state["step"]), list(state["rows"]), float(state["best"])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"].cpu())
        if torch.cuda.is_available() and "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"].cpu())
    except Exception as error:
        raise ValueError(f"{args.out}/last.pt: not what a run leaves to be resumed ({why(error)})") from None
    for name, had in state["flags"].items():
        if had != getattr(args, name, had):
            raise ValueError(f"--{name.replace('_', '-')}: the run to be resumed has {had}, found "
                             f"{getattr(args, name)}; give the same, or train from the start without --resume")
    return step, rows, best


def warn_of_collapse(figures, codes, step, hears=True):
    """A line for each way in which a run fails without an error, with the likely cause; none before step 200.

    figures: score() of an evaluation; codes: N; hears: whether the motion was made from audio (stage 2). Healthy runs
    keep far from these limits: at step 150 or later a perplexity above N / 4, energy 0.7, lip error 4 times as large.
    Codes that are drawn tremble where nothing is learnt: energy 0.1.
    """
    heard = figures["lve_swapped"] / max(figures["lve"], 1e-12)
    signs = (
        (figures["perplexity"] < codes / 10,
         f"codes die: perplexity {figures['perplexity']:.1f} of {codes}; likely --rate is too high, or dead codes "
         "are not revived (--revive-every)"),
        (figures["energy"] < 0.2,
         f"motion freezes: {figures['energy']:.3f} of the real energy; likely --rate is too high (above 1e-5 for "
         "wav2vec 2.0), or vertices are on a wrong scale (python data.py check FOLDER)"),
        (hears and heard < 1.2,
         f"audio is ignored: another clip's makes the lip error {heard:.2f} times as large; likely --own is too "
         "small, or wavs and motion do not belong together"),
        (not hears and figures["r2"] < 0.1,
         f"motion does not come back: R2 {figures['r2']:.2f}; likely --rate is too high"))
    for is_there, text in signs:
        if is_there and step >= 200:
            print(f"   warning: {text}", flush=True)


def clock(start, done, total):
    """Milliseconds a step and the time left, for a log line."""
    seconds = (time.time() - start) / max(done, 1)
    left = int(seconds * (total - done))
    return f"{1000 * seconds:4.0f} ms  {left // 60}:{left % 60:02d} left"


def write_json(path, value):
    """NaN and infinity, which JSON has not, become null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=1))


def write_figures(out, rows, test, args, losses):
    """figures.json (every logged row, the test split's figures, the flags) and loss.png beside the checkpoints."""
    write_json(out / "figures.json", {"flags": vars(args), "test": test, "rows": rows})
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in losses:
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=f"{name} loss, training")
    seen = [row for row in rows if "validation" in row]
    right = axes.twinx()
    right.plot([row["step"] for row in seen], [row["validation"]["gap_correlation"] for row in seen], "k.--",
               label="lip-gap correlation, validation")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    right.set(ylabel="correlation", ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    with whole(out / "loss.png") as part:
        figure.savefig(part, dpi=120)


def main():
    parser = CommandLine(description="Convert VOCASET, or check any data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="VOCASET's training data, as downloaded, to a folder for --data")
    convert.add_argument("--vocaset", required=True, metavar="FOLDER",
                         help="holds data_verts.npy, raw_audio_fixed.pkl, subj_seq_to_idx.pkl and templates.pkl")
    convert.add_argument("--out", required=True, help="folder to write; it must not exist")
    convert.add_argument("--masks", help="FLAME_masks.pkl: which vertices are lips and upper face, for the metrics "
                                         "(default: all are)")
    convert.add_argument("--mesh", help="FLAME's head_template.obj: the triangles, for pictures (default: none)")
    check = commands.add_parser("check", help="say what is wrong with a data set; exit status 1 if something is")
    check.add_argument("folder", help="a folder that --data would take")
    args = parser.parse_args()
    if args.command == "convert":
        return convert_vocaset(args.vocaset, args.out, args.masks, args.mesh)
    findings, about = examine(args.folder)
    for line in about + findings:
        print(line)
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    with cannot():
        main()
