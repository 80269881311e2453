"""
The synthetic data set: twelve subjects who do not exist speak 600 sentences, half an hour in all.

VOCASET and BIWI must be requested from their authors; this data set is computed on first use. A
formant synthesiser speaks random sentences, and a face made of formulas moves with them.
You do not need this file to understand the paper.

Map of this file
    voice     tables of phones and words; a source-filter synthesiser after Klatt (1980)
    face      a procedural mesh, its blendshapes, and the template of each subject
    clips     what a subject does with a sentence: the lips follow the phones, the rest is random
    folder    build_speakers writes all clips in the layout of FaceFormer and CodeTalker

Units: seconds, hertz, metres (millimetres while the mesh is built). Frame t covers the time from
t / FPS to (t + 1) / FPS and shows the face at its centre. Same seed, same bytes.
"""
import json
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy import clip, cos, exp, pi, sin, sqrt, where
from scipy import fft
from scipy.interpolate import PchipInterpolator
from scipy.io import wavfile
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import Delaunay, cKDTree

SAMPLE_RATE = 16_000                # Hz, as the model expects it
FPS = 30                            # motion frames per second

SUBJECTS = {"train": ["ada", "ben", "cleo", "dan", "eva", "finn", "gwen", "hugo"],
            "val": ["iris", "jack"],
            "test": ["kira", "liam"]}               # 8, 2 and 2, as in VOCASET
SENTENCES = {"train": range(1, 66),
             "val": range(66, 86),
             "test": range(86, 106)}
LIP_SHAPES = ("jaw", "close", "protrude", "round", "spread", "raise_upper", "tuck")
UPPER_FACE_SHAPES = ("blink_left", "blink_right", "brow_left", "brow_right",
                     "frown", "squint", "cheek")
BLENDSHAPES = LIP_SHAPES + UPPER_FACE_SHAPES

# -----------------------------------------------------------------------------
# voice: phones and words

# One line per phone (ARPAbet; -Y and -W are the second halves of diphthongs)
# F1 F2 F3    formants of men, Hz: vowels Peterson & Barney 1952, table II; the rest Klatt 1980,
#             tables II and III
# co          coarticulation, how far F2 and F3 move towards the vowels around: locus equations,
#             Sussman et al. 1991, rounded
# ms          inherent duration: Allen, Hunnicutt & Klatt 1987, table 9-1
# vc asp      amplitude of glottal pulses and of aspiration (by hand, after spectrograms)
# dB at wid   friction or burst: level relative to a vowel, centre and half-width in Hz (after
#             Stevens 1998, chapters 7 and 8)
# na muf      velum open; how much a constriction muffles what is above 400 Hz (by hand)
# jaw .. tuck targets of LIP_SHAPES; dJ dL: dominance of jaw and lips (by hand; the form is that
#             of Cohen & Massaro 1993)
PHONE_TABLE = """
     F1   F2   F3  co  ms  vc asp  dB   at  wid na muf jaw clo pro rnd spr  up tuck  dJ  dL
SIL 500 1500 2500 1.0 100   0   0 -99 2000 2000  0   0   0  .1   0   0   0   0    0 3.0 1.0
AA  730 1090 2440   0 240   1   0 -99 2000 2000  0   0 .80   0   0   0   0 .05    0 1.2 0.7
AE  660 1720 2410   0 230   1   0 -99 2000 2000  0   0 .70   0   0   0 .35 .15    0 1.2 0.8
AH  640 1190 2390   0 140   1   0 -99 2000 2000  0   0 .48   0   0   0   0   0    0 0.6 0.4
AO  570  840 2410   0 240   1   0 -99 2000 2000  0   0 .62   0 .40 .45   0   0    0 1.1 1.0
AW  640 1230 2550   0 260   1   0 -99 2000 2000  0   0 .75   0   0   0   0 .05    0 1.2 0.7
AY  660 1200 2550   0 250   1   0 -99 2000 2000  0   0 .75   0   0   0 .10 .05    0 1.2 0.7
EH  530 1840 2480   0 150   1   0 -99 2000 2000  0   0 .52   0   0   0 .30 .10    0 1.0 0.7
ER  490 1350 1690   0 180   1   0 -99 2000 2000  0   0 .35   0 .45 .40   0 .10    0 0.9 1.0
EY  480 1720 2520   0 190   1   0 -99 2000 2000  0   0 .45   0   0   0 .40 .10    0 1.0 0.8
IH  390 1990 2550   0 135   1   0 -99 2000 2000  0   0 .30   0   0   0 .30 .05    0 0.8 0.6
IY  270 2290 3010   0 155   1   0 -99 2000 2000  0   0 .20   0   0   0 .70 .10    0 1.0 1.0
OW  540 1100 2300   0 220   1   0 -99 2000 2000  0   0 .50   0 .40 .50   0   0    0 1.0 1.1
OY  550  960 2400   0 280   1   0 -99 2000 2000  0   0 .58   0 .50 .55   0   0    0 1.1 1.1
UH  440 1020 2240   0 160   1   0 -99 2000 2000  0   0 .35   0 .40 .40   0   0    0 0.9 0.9
UW  300  870 2240   0 210   1   0 -99 2000 2000  0   0 .20   0 .80 .85   0   0    0 1.0 1.3
-Y  370 1900 2500   0   0   1   0 -99 2000 2000  0   0 .25   0   0   0 .50 .05    0 0.8 0.8
-W  430  920 2320   0   0   1   0 -99 2000 2000  0   0 .25   0 .65 .75   0   0    0 0.8 1.1
W   290  610 2150  .1  80  .7   0 -99 2000 2000  0  .2 .15 .10 .85 .95   0   0    0 1.0 1.8
Y   260 2070 3020  .2  80  .7   0 -99 2000 2000  0  .1 .18   0   0   0 .50   0    0 0.9 0.7
R   310 1060 1380  .2  80  .7   0 -99 2000 2000  0  .1 .22   0 .55 .50   0 .15    0 0.8 1.1
L   310 1050 2880  .3  80  .7   0 -99 2000 2000  0 .15 .32   0   0   0 .10 .05    0 0.7 0.4
HH  500 1500 2500 .95  80  .1  .2 -99 2000 2000  0   0 .40   0   0   0   0   0    0 0.2 0.1
M   480 1270 2130  .6  70 .95   0 -99 2000 2000  1 .35 .15   1 .05   0   0   0    0 0.6 0.5
N   480 1340 2470  .4  60 .95   0 -99 2000 2000  1  .3 .22   0   0   0 .10 .05    0 0.8 0.3
NG  480 2000 2900  .5  95 .95   0 -99 2000 2000  1  .3 .30   0   0   0 .05   0    0 0.5 0.2
P   400 1100 2150  .8  90   0 .18 -18  900 1500  0   1 .15   1 .05   0   0   0    0 0.6 0.5
B   200 1100 2150  .8  85 .35 .05 -20  600 1200  0   1 .15   1 .05   0   0   0    0 0.6 0.5
T   400 1600 2600  .4  75   0  .2 -12 4500 1800  0   1 .18   0   0   0 .10 .05    0 1.0 0.3
D   200 1600 2600  .4  75 .35 .05 -16 3800 1800  0   1 .20   0   0   0 .10 .05    0 0.9 0.3
K   300 1990 2850  .7  80   0  .2 -13 2100  600  0   1 .30   0   0   0   0   0    0 0.5 0.2
G   200 1990 2850  .7  80 .35 .05 -17 1900  600  0   1 .30   0   0   0   0   0    0 0.5 0.2
CH  350 1800 2820  .2 100   0  .2 -11 3300  900  0   1 .16   0 .65 .40   0 .25    0 1.2 1.2
JH  260 1800 2820  .2  80 .35   0 -15 3200  900  0   1 .18   0 .60 .40   0 .25    0 1.2 1.1
F   340 1100 2080  .6 100   0 .02 -24 6500 3000  0  .6 .12   0   0   0 .05 .20    1 1.2 1.0
V   220 1100 2080  .6  60  .5   0 -30 6500 3000  0  .5 .12   0   0   0 .05 .20    1 1.2 1.0
TH  320 1290 2540  .5  90   0 .02 -26 6500 2800  0  .6 .25   0   0   0 .05 .05    0 1.0 0.4
DH  270 1290 2540  .5  50  .5   0 -34 6000 3500  0  .4 .25   0   0   0 .05 .05    0 0.8 0.3
S   320 1390 2530  .4 105   0 .02  -7 6000 1000  0  .6 .10   0   0   0 .25 .10    0 1.5 0.6
Z   240 1390 2530  .4  75  .4   0 -12 6000 1000  0  .5 .10   0   0   0 .25 .10    0 1.5 0.6
SH  300 1840 2750  .2 105   0 .02  -9 3500  900  0  .6 .14   0 .70 .45   0 .30    0 1.3 1.3
ZH  300 1840 2750  .2  70  .4   0 -14 3400  900  0  .5 .16   0 .65 .45   0 .30    0 1.3 1.2
"""
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
STOPS = "P B T D K G CH JH".split()
GLIDE = {"AW": "-W", "AY": "-Y", "EY": "-Y", "OW": "-W", "OY": "-Y"}    # how a diphthong ends


@dataclass
class Phone:
    """A line of PHONE_TABLE."""
    formants: np.ndarray        # (3,) Hz
    coarticulation: float
    ms: float
    source: np.ndarray          # (7,) voicing, aspiration, dB, centre, half-width, velum, muffling
    lips: np.ndarray            # (7,) targets of LIP_SHAPES in 0..1
    dominance: np.ndarray       # (2,) of jaw and lips


PHONES = {}                         # name -> Phone
for line in PHONE_TABLE.strip().splitlines()[1:]:
    name, *numbers = line.split()
    row = np.array(numbers, float)
    PHONES[name] = Phone(row[:3], row[3], row[4], row[5:12], row[12:19], row[19:])

# Words by part of speech, in the CMU dictionary's ARPAbet; 1 marks the stressed vowel.
LEXICON = """
det the DH AH, a AH, my M AY, your Y AO R, this DH IH S, our AW ER, his HH IH Z, their DH EH R
det some S AH M, that DH AE T, each IY CH, no N OW, both B OW TH, these DH IY Z, her HH ER, an AE N
prep in IH N, of AH V, on AA N, with W IH DH, for F AO R, from F R AH M, to T UW, at AE T, by B AY
prep under AH N D ER, above AH B AH V, behind B IH HH AY N D, between B IH T W IY N
prep through TH R UW
pron I AY, you Y UW, he HH IY, she SH IY, we W IY, they DH EY, people P IY1 P AH L
pron nobody N OW1 B AA D IY
aux was W AH Z, will W IH L, can K AE N, could K UH D, should SH UH D, may M EY, must M AH S T
aux would W UH D, might M AY T
conj and AE N D, but B AH T, so S OW, because B IH K AH Z, when W EH N, if IH F, while W AY L
conj before B IH F AO R
adv never N EH1 V ER, often AO1 F AH N, always AO1 L W EY Z, maybe M EY1 B IY, slowly S L OW1 L IY
adv usually Y UW1 ZH UW AH L IY, now N AW1, again AH G EH1 N, very V EH1 R IY
adv together T AH G EH1 DH ER, almost AO1 L M OW S T
adj big B IH1 G, small S M AO1 L, happy HH AE1 P IY, blue B L UW1, brown B R AW1 N, young Y AH1 NG
adj old OW1 L D, warm W AO1 R M, cheap CH IY1 P, good G UH1 D, bad B AE1 D, smooth S M UW1 DH
adj rough R AH1 F, simple S IH1 M P AH L, thick TH IH1 K, purple P ER1 P AH L, yellow Y EH1 L OW
adj funny F AH1 N IY, noisy N OY1 Z IY, heavy HH EH1 V IY, huge HH Y UW1 JH, public P AH1 B L IH K
adj quick K W IH1 K, other AH1 DH ER, wooden W UH1 D AH N, amazing AH M EY1 Z IH NG
adj perfect P ER1 F IH K T, brave B R EY1 V, loud L AW1 D, empty EH1 M P T IY, bumpy B AH1 M P IY
adj famous F EY1 M AH S
noun boy B OY1, girl G ER1 L, mother M AH1 DH ER, father F AA1 DH ER, baby B EY1 B IY
noun table T EY1 B AH L, house HH AW1 S, window W IH1 N D OW, paper P EY1 P ER, book B UH1 K
noun river R IH1 V ER, mountain M AW1 N T AH N, shop SH AA1 P, summer S AH1 M ER
noun bottle B AA1 T AH L, music M Y UW1 Z IH K, apple AE1 P AH L, money M AH1 N IY
noun moment M OW1 M AH N T, problem P R AA1 B L AH M, television T EH1 L AH V IH ZH AH N
noun garage G ER AA1 ZH, vision V IH1 ZH AH N, job JH AA1 B, bridge B R IH1 JH, church CH ER1 CH
noun beach B IY1 CH, thing TH IH1 NG, mouth M AW1 TH, voice V OY1 S, family F AE1 M AH L IY
noun map M AE1 P, lamp L AE1 M P, bus B AH1 S, farm F AA1 R M, food F UW1 D, shoe SH UW1
noun door D AO1 R, morning M AO1 R N IH NG, picture P IH1 K CH ER, horse HH AO1 R S, ship SH IH1 P
noun pocket P AA1 K AH T, dog D AO1 G, robot R OW1 B AA T, broom B R UW1 M, work W ER1 K
noun year Y IH1 R, world W ER1 L D, hope HH OW1 P, trouble T R AH1 B AH L, mob M AA1 B, pub P AH1 B
noun beam B IY1 M, palm P AA1 M, bomb B AA1 M, pipe P AY1 P, tube T UW1 B, member M EH1 M B ER
verb bought B AO1 T, found F AW1 N D, made M EY1 D, put P UH1 T, saw S AO1, took T UH1 K
verb gave G EY1 V, kept K EH1 P T, want W AA1 N T, keep K IY1 P, believe B IH L IY1 V
verb remember R IH M EH1 M B ER, enjoyed EH N JH OY1 D, watch W AA1 CH, leave L IY1 V, move M UW1 V
verb open OW1 P AH N, follow F AA1 L OW, bring B R IH1 NG, stop S T AA1 P, climb K L AY1 M
verb grab G R AE1 B, think TH IH1 NG K, pushed P UH1 SH T, changed CH EY1 N JH D, play P L EY1
verb build B IH1 L D, jumped JH AH1 M P T, measure M EH1 ZH ER, show SH OW1, pull P UH1 L
verb hear HH IH1 R, use Y UW1 Z, sing S IH1 NG, speak S P IY1 K, drop D R AA1 P, rub R AH1 B
verb visit V IH1 Z AH T
"""
WORDS = {}                          # part of speech -> list of words
PRONUNCIATION = {}                  # word -> list of phones
for line in LEXICON.strip().splitlines():
    kind, entries = line.split(" ", 1)
    for entry in entries.split(","):
        word, *phones = entry.split()
        WORDS.setdefault(kind, []).append(word)
        PRONUNCIATION[word] = phones

CLAUSES = ["det noun verb det noun", "pron aux verb det adj noun", "det adj noun verb adv",
           "adv pron verb det noun", "pron verb det noun prep det noun",
           "det noun prep det noun aux verb", "pron aux adv verb det noun"]


def make_sentence(rng):
    """Draw a list of 4 to 8 words; "," stands for a pause."""
    kinds = rng.choice(CLAUSES).split()
    if rng.random() < 0.45:                     # a second, shorter clause, mostly after a pause
        pause = [","] if rng.random() < 0.7 else []
        kinds = kinds[:5] + pause + ["conj", "pron", "verb"]
    return ["," if kind == "," else str(rng.choice(WORDS[kind])) for kind in kinds]


# -----------------------------------------------------------------------------
# voice: the parameters of a subject


@dataclass
class Voice:
    pitch: float                # mean fundamental frequency, Hz
    vocal_tract: float          # length of the vocal tract, relative to the men of PHONE_TABLE
    speaking_rate: float        # 1 = unhurried conversation
    accent_semitones: float     # rise of the pitch in an accent
    breathiness: float          # 0..1: breath noise and open quotient
    spectral_tilt: float        # corner frequency of the glottal low-pass, Hz
    jitter: float               # standard deviation of the period, relative
    shimmer: float              # standard deviation of the pulses' amplitude, relative
    bandwidth: float            # factor on the formants' bandwidths
    clarity: float              # 1 = clear speech, 0 = mumbled: vowel space, closures, bursts
    nasality: float             # 0..1: how far the open velum spreads into vowels
    dialect: int                # seed of the subject's vowel qualities


def lognormal(rng, deviation, size=None):
    """A random factor around 1."""
    return exp(rng.normal(0, deviation, size))


def make_voice(rng, height):
    """Draw a Voice; height 0 is the lowest, 1 the highest.

    Higher voices have shorter vocal tracts on average, as from men over women to children.
    """
    pitch = 80 * 3.5 ** height
    vocal_tract = 1.03 - 0.17 * np.log2(pitch / 100)
    vocal_tract += rng.normal(0, 0.06)
    return Voice(
        pitch=pitch,
        vocal_tract=clip(vocal_tract, 0.76, 1.12),
        speaking_rate=rng.uniform(0.8, 1.35),
        accent_semitones=rng.uniform(1, 4),
        breathiness=rng.random(),
        spectral_tilt=700 * 8 ** rng.random(),
        jitter=rng.uniform(0.003, 0.02),
        shimmer=rng.uniform(0.02, 0.1),
        bandwidth=rng.uniform(0.8, 1.6),
        clarity=rng.uniform(0.5, 1),
        nasality=rng.uniform(0.2, 1),
        dialect=rng.integers(2 ** 31),
    )


def vary_voice(voice, rng):
    """The Voice of one clip: varied so widely that a few subjects cover many voices."""
    deviations = {"pitch": 0.25, "vocal_tract": 0.08, "speaking_rate": 0.13,
                  "accent_semitones": 0.3, "spectral_tilt": 0.5, "bandwidth": 0.2}
    varied = {}
    for name, deviation in deviations.items():
        varied[name] = getattr(voice, name) * lognormal(rng, deviation)
    for name in ("breathiness", "clarity", "nasality"):
        shift = rng.normal(0, 0.25)
        varied[name] = clip(getattr(voice, name) + shift, 0, 1)
    return replace(voice, **varied)


# -----------------------------------------------------------------------------
# voice: durations, then tracks of formants and source


def assign_durations(words, voice, rng):
    """Segments [(start s, end s, phone)] without gaps, and accents [(time s, strength)].

    An accent lies on each stressed vowel; its strength is 0.5, in the one emphasised word 1.2.
    ValueError for a word that is not in LEXICON.
    """
    unknown = set(words) - set(PRONUNCIATION) - {","}
    if unknown:
        raise ValueError(f"words not in LEXICON: {sorted(unknown)}; add them with their phones")
    emphasised = rng.integers(len(words))
    phones = [draw_pause(0.2, 0.4, rng)]                # (phone, seconds, stress)
    for i, word in enumerate(words):
        if word == ",":
            phones.append(draw_pause(0.15, 0.45, rng))
            continue
        stress = 1.2 if i == emphasised else 0.5
        phrase_final = (words + [","])[i + 1] == ","
        phones += draw_word(word, stress, phrase_final, voice, rng)
    phones.append(draw_pause(0.2, 0.4, rng))

    segments = []
    accents = []
    end = 0.0
    for phone, seconds, stress in phones:
        end += seconds
        start = end - seconds
        segments.append((start, end, phone))
        if stress:
            accents.append(((start + end) / 2, stress))
    return segments, accents


def draw_pause(shortest, longest, rng):
    """(phone, seconds, stress). One pause in ten is long, so that the face is also seen at rest."""
    seconds = rng.uniform(shortest, longest)
    is_long = rng.random() < 0.1
    return "SIL", seconds + is_long * rng.uniform(1, 4), 0


def draw_word(word, stress, phrase_final, voice, rng):
    """A word's [(phone, seconds, stress)]. Stress and phrase ends lengthen (Klatt 1976)."""
    phones = PRONUNCIATION[word]
    vowels = [i for i, phone in enumerate(phones) if phone.rstrip("1") in VOWELS]
    timed = []
    for i, phone in enumerate(phones):
        phone_stress = stress if phone.endswith("1") else 0
        phone = phone.rstrip("1")
        factor = 0.62 + 0.4 * phone_stress if phone in VOWELS else 0.8
        if phrase_final and i >= vowels[-1]:
            factor *= rng.uniform(1.2, 1.6)
        seconds = PHONES[phone].ms / 1000 * factor * lognormal(rng, 0.18)
        seconds = float(seconds / voice.speaking_rate)
        timed.append((phone, max(seconds, 0.025), phone_stress))
    return timed


def release_time(start, end, phone):
    """When a closure ends: the last third of a stop is burst and breath."""
    return start + 0.67 * (end - start) if phone in STOPS else end


def formant_tracks(segments, times, voice, rng):
    """F1 F2 F3 at `times` -> (n, 3) Hz: straight lines between two points a phone, smoothed."""
    neutral = PHONES["SIL"].formants
    vowels = vowel_formants(segments, neutral, voice, rng)
    knots = []
    formants = []
    for i, (start, end, phone) in enumerate(segments):
        if i in vowels:
            first, last = vowels[i]
        else:                                           # a consonant: moved by the vowels around
            before = [vowels[j][1] for j in (i - 1, i - 2, i - 3) if j in vowels]
            after = [vowels[j][0] for j in (i + 1, i + 2, i + 3) if j in vowels]
            before = before[0] if before else neutral
            after = after[0] if after else neutral
            locus = PHONES[phone].formants * lognormal(rng, 0.04, 3)
            share = PHONES[phone].coarticulation * np.array([0.5, 1, 1])
            first = locus + share * (before - locus)
            last = locus + share * (after - locus)
        knots.append(0.75 * start + 0.25 * end)
        knots.append(0.25 * start + 0.75 * end)
        formants += [first, last]
    tracks = [np.interp(times, knots, formant) for formant in np.array(formants).T]
    smoothing = 1.5 + 2 * (1 - voice.clarity)           # mumbled speech misses its targets by more
    smooth = gaussian_filter1d(np.stack(tracks, 1), smoothing, axis=0)
    return smooth / voice.vocal_tract


def vowel_formants(segments, neutral, voice, rng):
    """{index of a vowel's segment: (formants at its start, at its end)}, each (3,) Hz."""
    dialect_rng = np.random.default_rng(voice.dialect)
    dialect = {}
    for phone in VOWELS + ["-Y", "-W"]:
        dialect[phone] = lognormal(dialect_rng, (0.07, 0.07, 0.03))
    vowel_space = 0.7 + 0.3 * voice.clarity             # mumbled vowels lie closer to neutral

    def draw(phone):
        target = neutral + vowel_space * (PHONES[phone].formants - neutral)
        return target * dialect[phone] * lognormal(rng, (0.06, 0.06, 0.03))

    vowels = {}
    for i, (_, _, phone) in enumerate(segments):
        if phone in VOWELS:
            vowels[i] = (draw(phone), draw(GLIDE.get(phone, phone)))
    return vowels


def control_tracks(segments, times, voice, rng):
    """Phone.source at `times` -> (7, n), the level of the noise as an amplitude instead of dB."""
    steps = []                                          # (from this time on, source (7,))
    for i, (start, end, phone) in enumerate(segments):
        source = PHONES[phone].source.copy()
        source[[0, 1, 6]] *= lognormal(rng, (0.2, 0.3, 0.35))
        source[2] = 10 ** (source[2] / 20)
        source[2] *= lognormal(rng, 0.35)
        if phone in STOPS:
            next_phone = segments[i + 1][2]
            steps += stop_steps(start, end, phone, next_phone, source, voice, rng)
        else:
            steps.append((start, source))
    starts, sources = zip(*steps)
    index = np.searchsorted(starts, times, side="right") - 1
    sources = np.array(sources)[index]                  # (n, 7)
    tracks = gaussian_filter1d(sources, 1.2, axis=0).T
    smoothing = 2 + 6 * voice.nasality                  # the velum is slow
    tracks[5] = gaussian_filter1d(sources[:, 5], smoothing)
    return tracks


def stop_steps(start, end, phone, next_phone, source, voice, rng):
    """Closure, burst and breath of a stop -> [(time, source (7,))].

    Mumbled stops leak, voiced ones may lose their voicing, and some have no audible burst.
    """
    if next_phone in STOPS or next_phone == "SIL" and rng.random() < 0.4:
        source[1:3] *= 0.1
    leaks = rng.random() > voice.clarity
    leak = leaks * rng.uniform(0, 0.5)
    burst_start = release_time(start, end, phone)
    breath_start = end - 0.005
    if phone not in ("CH", "JH"):
        burst_end = burst_start + rng.uniform(0.006, 0.02)
        breath_start = min(burst_end, breath_start)
    voicing = rng.uniform(0.2, 1.2) + leak
    closure = source * (voicing, 0, 0.1 * leak, 1, 1, 0, 1 - 0.4 * leak)
    burst = source * (0.3, 0.5, 0.4 + 0.6 * voice.clarity, 1, 1, 0, 0)
    burst[6] = 0.2
    breath = source * (1.5, 1, 0.03, 1, 1, 0, 0)
    return [(start, closure), (burst_start, burst), (breath_start, breath)]


# -----------------------------------------------------------------------------
# voice: from the tracks to a recording

HOP = SAMPLE_RATE // 200            # 5 ms, the step of all tracks
N_FFT = 512                         # 10 ms of source and 22 ms for the formants to ring
HERTZ = fft.rfftfreq(N_FFT, 1 / SAMPLE_RATE).astype(np.float32)     # (257,)


def glottis(times, accents, voicing, breath, voice, rng):
    """Glottal pulses and breath noise -> (n * HOP,); times, voicing, breath (n,).

    The pulses are KLGLOTT88's: 2 u - 3 u^2 while the vocal folds are open (Klatt & Klatt 1990).
    """
    n = len(times)
    declination = 0.5 - times / times[-1]
    semitones = rng.uniform(1, 4) * declination
    semitones += gaussian_filter1d(rng.normal(0, 3, n), 12)
    semitones += 12 / np.log(2) * voice.jitter * rng.standard_normal(n)
    loudness = 0.3 * declination
    loudness += gaussian_filter1d(rng.normal(0, 1.5, n), 20)
    for time, strength in accents:
        bump = strength * exp(-0.5 * ((times - time) / 0.08) ** 2)
        semitones += voice.accent_semitones * bump
        loudness += 0.35 * bump

    def to_samples(track):                              # (n,) -> (n * HOP,)
        return np.interp(np.arange(n * HOP) / HOP - 0.5, np.arange(n), track)

    pitch = to_samples(voice.pitch * 2 ** (semitones / 12))
    phase = np.cumsum(pitch / SAMPLE_RATE)              # in cycles
    cycle = phase.astype(int)
    open_quotient = 0.5 + 0.3 * voice.breathiness
    u = (phase - cycle) / open_quotient                 # 0..1 while the folds are open
    shimmer = lognormal(rng, voice.shimmer, cycle[-1] + 1)
    flow = 2 * u - 3 * u * u
    pulses = where(u < 1, flow, 0) * shimmer[cycle]
    noise = rng.standard_normal(n * HOP) * where(u < 1, 1, 0.5)
    pulses += 0.03 * 6 ** voice.breathiness * noise
    amplitude = to_samples(voicing * exp(loudness))
    return amplitude * pulses + 0.5 * to_samples(breath) * noise


def resonator(frequency, bandwidth):
    """1 / response of Klatt's digital resonator, 1 at 0 Hz; Hz, scalar or (n, 1) -> (n, 257)."""
    z = exp(-2j * pi * HERTZ / SAMPLE_RATE).astype(np.complex64)
    radius = exp(-pi * bandwidth / SAMPLE_RATE).astype(np.float32)
    b = -2 * radius * cos(2 * pi * frequency / SAMPLE_RATE)
    b = b.astype(np.float32)
    response = 1 + z * (b + radius ** 2 * z)
    return response / (1 + b + radius ** 2)


def stft_frames(audio):
    """Spectra (n, 257) of 10 ms Hann windows every HOP samples; the windows add up to one."""
    padded = np.pad(audio, HOP // 2).astype(np.float32)
    chunks = padded.reshape(-1, HOP)
    frames = np.concatenate([chunks[:-1], chunks[1:]], 1)
    position = np.arange(2 * HOP, dtype=np.float32) + 0.5
    hann = sin(pi * position / (2 * HOP)) ** 2
    return fft.rfft(frames * hann, N_FFT)


def overlap_add(spectra):
    """The inverse of stft_frames, resonances ringing on: (n, 257) -> (n * HOP,)."""
    n = len(spectra)
    frames = fft.irfft(spectra, N_FFT)
    frames = np.pad(frames, ((0, 0), (0, -N_FFT % HOP)))
    chunks = frames.reshape(n, -1, HOP)
    hops = chunks.shape[1]
    audio = np.zeros((n + hops, HOP))
    for k in range(hops):
        audio[k:k + n] += chunks[:, k]
    return audio.ravel()[HOP // 2:][:n * HOP]


def synthesise(segments, voice, rng, accents=()):
    """Speak `segments` -> (samples,) float at 16 kHz, peak 1; both lists from assign_durations.

    ValueError unless the last segment is a pause.
    """
    if not segments or segments[-1][2] != "SIL":
        raise ValueError("segments must end with SIL, a pause, as assign_durations returns them")
    n = int(segments[-1][1] * SAMPLE_RATE) // HOP
    times = (np.arange(n) + 0.5) * HOP / SAMPLE_RATE
    formants = formant_tracks(segments, times, voice, rng)
    tracks = control_tracks(segments, times, voice, rng).astype(np.float32)
    source = glottis(times, accents, tracks[0], tracks[1], voice, rng)
    spectra = stft_frames(source)                                               # (n, 257)
    _, breath, noise, centre, width, nasal, muffle = tracks[..., None]          # each (n, 1)

    # Formants in cascade, bandwidths after Klatt 1980; an open glottis damps F1. Above F3 there
    # is one resonance per c / 2L.
    bandwidths = (60 + 400 * clip(breath, 0, 0.5), 90, 150)
    for k, bandwidth in enumerate(bandwidths):
        bandwidth = np.float32(voice.bandwidth * bandwidth)
        spectra /= resonator(formants[:, k:k + 1], bandwidth)
    for frequency in np.arange(3500, 7600 * voice.vocal_tract, 1000):
        spectra /= resonator(frequency / voice.vocal_tract, 250 * voice.bandwidth)
    # A nasal pole at 270 Hz, and a zero that moves away from it as the velum opens (Klatt 1980).
    nasal_zero = 270 + nasal * rng.uniform(80, 330)
    spectra *= resonator(nasal_zero, 100) / resonator(270, 100)
    spectra /= sqrt(1 + (HERTZ / voice.spectral_tilt) ** 2)
    spectra *= exp(-muffle * np.log1p((HERTZ / 400) ** 2))
    rms = sqrt(np.mean(abs(spectra) ** 2, 1))
    spectra /= np.percentile(rms, 85)                   # loud vowels now have power 1

    # Friction: the resonance of the cavity in front of the constriction, with wide skirts.
    distance = (HERTZ * voice.vocal_tract ** 0.7 - centre) / width
    skirt = 1 / (1 + distance ** 2)
    power = np.mean(skirt ** 2, 1, keepdims=True)
    skirt *= 1.5 * noise / sqrt(power * HOP * 0.75)
    spectra += stft_frames(rng.standard_normal(n * HOP)) * skirt
    audio = overlap_add(spectra)
    return audio / abs(audio).max()


def simulate_recording(audio, rng):
    """The audio (samples,) as a random microphone records it in a random room, clipped to -1..1."""
    n = fft.next_fast_len(len(audio) + SAMPLE_RATE // 2, real=True)
    hertz = np.arange(n // 2 + 1) * SAMPLE_RATE / n + 1
    seconds = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    # The room: the echoes fall by 60 dB in 0.1 to 0.6 s.
    room = rng.standard_normal(len(seconds))
    room *= 10 ** (-3 * seconds / rng.uniform(0.1, 0.6))
    room *= 0.4 * rng.random() ** 2 / sqrt(np.sum(room ** 2))
    room[0] += 1
    # The microphone: a band with a tilt.
    low = rng.uniform(30, 200)
    high = rng.uniform(4500, 12_000)
    microphone = (hertz / 1000) ** rng.normal(0, 0.35)
    high_pass = 1 + (low / hertz) ** 4
    low_pass = 1 + (hertz / high) ** 12
    microphone /= sqrt(high_pass * low_pass)
    # Background noise, from white to brown.
    hiss = fft.rfft(rng.standard_normal(n))
    hiss *= hertz ** -rng.uniform(0, 1)
    noise = fft.irfft(hiss * microphone, n)[:len(audio)]
    noise /= noise.std()
    speech = fft.rfft(audio, n) * fft.rfft(room, n)
    speech = fft.irfft(speech * microphone, n)[:len(audio)]
    speech /= speech.std()
    noise_decibels = -rng.uniform(35, 60)
    mixed = speech + noise * 10 ** (noise_decibels / 20)
    level = -rng.uniform(16, 30)                        # dB below full scale
    return clip(mixed * 10 ** (level / 20), -1, 1)


# -----------------------------------------------------------------------------
# face: procedural mesh, no need to read (until make_template)

# In millimetres. Half a head is drawn on a flat chart: row v runs up the head, column c (0 in the
# middle of the face, HALF_GIRTH at the back) stands at the angle pi c / HALF_GIRTH.
HALF_GIRTH = 230.0
MOUTH_Y = -65.0
MOUTH_WIDTH = 24.0
EYE = np.array([31.0, 0.0, 61.5])
EYE_RADIUS = 16.5
HINGE = np.array([0, -12.0, 8.0])               # of the jaw, in front of the ears
JAW_ANGLE = np.radians(13.0)                    # at jaw = 1; the lips are then 22 mm apart


def read_table(text, columns):
    return np.array(text.split(), float).reshape(-1, columns)


# Row v; its height in front, at the side; its reach to the front, to the side, to the back.
OUTLINE = read_table("""
    -190 -156 -156 34 48 57    -150 -122 -118 31 42 52    -135 -114 -100 44 43 52
    -116 -111  -84 70 45 53    -104 -105  -74 84 49 56     -90  -90  -64 88 55 58
     -65  -65  -48 89 61 68     -30  -30  -25 86 68 86       0    0    0 84.5 72.5 95
      30   30   30 91 75 98      60   60   60 89 74 95      90   85   85 76 65 82
     116 102.5 102.5 52 46 56   137  110  110 24 22 26     150  112  112  0  0  0
    """, 6)
# The nose: row v, height of its ridge, half its width.
NOSE = read_table("""
    -49  0   9   -45  4   9   -42.5 11   9   -40 19   9.5  -37 24 10  -33 24.5 10
    -27 19 9.5   -18 13.5 8    -8    8 7.2     2  4.2 7     13 1.6 9   26  0   12
    """, 3)
# Bumps: column, row, widths, height. Cheekbone, cheek, eye socket, brow ridge, temple, jaw corner,
# mouth, fold beside the nose, groove above the lip, fold under the lower lip, chin.
BUMPS = read_table("""
    48 -22 17 14 5    36 -36 14 14 3    31   3 19 11 -4    34  21 20 7  3     88 25 20 22 -4
    92 -84 22 16 3     0 -66 26 17 3    32 -52  6 12 -1.5   0 -53  3 7 -1.5    0 -84 20 6 -3.5
     0 -98 20 11 5
    """, 5)
HAIRLINE = read_table("""
     0 81    16 80    32 76    46 69    58 59    67 47    76 37     85  28    93  18    99  14
   104 20   109 28   119 33   131 26   137  8   139 -14  145 -38   160 -56   185 -67   208 -72
   230 -73
    """, 2)
NOSE_POINTS = read_table("""
    0 -33  0 -37  0 -41.5  0 -44  5 -38  11 -41.5  15 -41.5  19.5 -37  17 -36  20.5 -33  12.5 -34
    17.5 -31  6.5 -42
    """, 2)                                                     # the last is the nostril
# Filler vertices: spacing, greatest column, lowest and highest row.
FILLER = read_table("4.8 22 -47 8    9.8 62 -112 34    15 95 -124 70    20 231 -180 130", 4)

# Features are rings of vertices, outermost first. Lips: half width, upper and lower height, Cupid's
# bow, forward. Rings 2 to 4 are the red (in 4 the lips meet), 5 and 6 the dark cavity behind.
LIP = read_table("""
    31.5 14 15.5 .6 .2    27 9.2 11.4 1.4 .9    25.6 7.4 9.4 1.4 2.6    24.8 3.6 4.8 .6 4.2
    24    0  0    0  0    21 11  13   0 -14       .01 0   0   0  -42
    """, 5)
# Lids: beyond the margin, off the eyeball, depth of the cheek (0: the eyeball's), share of a blink.
LID = read_table("""
    11 0 1 .1    7 1.5 .5 .34    4 1.6 .1 .7    1.6 1.5 0 .92    0 .9 0 1    -1 -1 0 1
    """, 4)
EAR = read_table("1 0 0  1.12 7 -6  1.1 11 -9  .8 6 -5  .4 1 -1  .02 0 0", 3)   # size, out, back
BROW = read_table("1.6 .04  .75 0", 2)                          # half thickness, beyond the ends

# Red green blue in 0..1 of some labels of vertices; all others have the skin's.
COLOUR_TABLE = """
    skin .87 .66 .55     hair .28 .19 .14       lip2 .76 .44 .41     lip3 .76 .44 .41
    lip4 .48 .22 .21     lip5 .2  .06 .06       lip6 .2  .06 .06     lid4 .22 .14 .12
    lid5 .22 .14 .12     lower_lid .7 .48 .4    brow1 .28 .19 .14    nostril .35 .17 .14
    ear4 .7  .48 .4      ear5 .7  .48 .4        tooth .94 .91 .84    pupil .03 .03 .04
    iris .36 .52 .58     limbus .17 .27 .33     white .93 .92 .9
    """
COLOURS = {}                        # label -> (3,)
for row in np.reshape(COLOUR_TABLE.split(), (-1, 4)):
    COLOURS[str(row[0])] = row[1:].astype(float)

# The skin that a blendshape moves: which side, |x|, y, widths, displacement in the centre (x
# outwards, y, z).
BLENDSHAPE_PATCHES = """
    protrude     all     0 -65 24 15    0  0    8
    round        all    25 -65 16 15  -11  0    3
    round        above   0 -62 10  8    0 -2    1
    round        below   0 -68 10  8    0 -1.2  1
    spread       all    27 -65 14 16    7  2   -2.5
    raise_upper  above   0 -60 22 14    0  6    1
    tuck         below   0 -67 19  9    0  1   -6
    squint       all    34 -15 18  8    0  2    1
    brow_left    left   34  30 24 13    0  8    0.5
    brow_right   right  34  30 24 13    0  8    0.5
    frown        all    14  27 14 12   -5 -6    1.5
    cheek        all    38 -26 18 14    1  5    3
    cheek        all    26 -65 13 12    4  5   -1.5
    """
# What makes a subject, at one standard deviation: jaw, chin (2), nose (4), eyes, brows,
# cheekbones, mouth. Columns as above.
TRAIT_PATCHES = read_table("""
    60 -80 40 35 4 0 0    0 -102 30 20 0 -5 0    0 -100 28 18 0 0 3    16 -37 9 9 2.5 0 0
     0 -36 16 12 0 -3 0   0  -34 12 14 0  0 3    0   -8  9 14 0 0 2    32 0 22 18 1.8 0 0
    30 26 30 10 0 2.5 0  50  -24 20 18 2.5 0 4  26  -65 14 14 2 0 0
    """, 7)

outline_at = PchipInterpolator(OUTLINE[:, 0], OUTLINE[:, 1:])
nose_at = PchipInterpolator(NOSE[:, 0], NOSE[:, 1:])


def smoothstep(t):
    t = clip(t, 0, 1)
    return t ** 2 * (3 - 2 * t)


def bell(x, y, x0, y0, width, height):
    return exp(-((x - x0) / width) ** 2 - ((y - y0) / height) ** 2)


def soft_patch(points, x0, y0, width, height, *direction):
    """Displacements (V, 3) around (x0, y0) and (-x0, y0); nothing behind the ears moves."""
    x, y, z = points.T
    weight = smoothstep((z + 20) / 50)
    weight *= bell(abs(x), y, x0, y0, width, height)
    displacement = weight[:, None] * direction
    displacement[:, 0] *= clip(x / 12, -1, 1)           # x: outwards on both sides
    return displacement


def chart_column(x, v):
    """Chart column of the points x mm beside the middle in the rows v."""
    side = outline_at(v)[..., 3]
    return np.arcsin(clip(x / side, 0, 1)) * HALF_GIRTH / pi


def skin_at(c, v):
    """Chart (n,), (n,) -> skin (n, 3): elliptic rows, features pushed outwards from the axis."""
    sine = sin(pi * c / HALF_GIRTH)
    cosine = cos(pi * c / HALF_GIRTH)
    y_front, y_side, front, side, back = outline_at(v).T
    x = side * sine
    y = y_front + (y_side - y_front) * sine ** 3
    z = where(cosine > 0, front, back) * cosine
    ridge, width = nose_at(clip(v, -49, 26)).T
    nose = ridge * exp(-abs(x / width) ** 2.2)
    nose -= 4 * bell(x, v, 6.5, -42, 3.2, 2.2)          # nostril
    wing = ((x - 13.5) / 5.2) ** 2 + ((v + 36) / 5.2) ** 4
    nose += 9 * exp(-wing)
    out = sum(height * bell(c, v, *place) for *place, height in BUMPS)
    out += nose * (cosine > 0)
    x += out * sine
    z += out * cosine
    above_hairline = v - np.interp(c, *HAIRLINE.T)
    hair = 1 + 0.04 * smoothstep(above_hairline / 12)
    return np.stack([x, y, z], 1) * hair[:, None]


def sew(sheet, closed=False):
    """Triangles (n, 3) of a sheet of vertices (rows, columns); closed: into a tube."""
    if closed:
        sheet = np.concatenate([sheet, sheet[:, :1]], 1)
    a = sheet[:-1, :-1]
    b = sheet[:-1, 1:]
    c = sheet[1:, :-1]
    d = sheet[1:, 1:]
    return np.stack([a, c, b, b, c, d], -1).reshape(-1, 3)


class HalfHead:
    """Vertices of the left half: their labels, places on the chart (n, 2), positions (n, 3)."""

    def __init__(self):
        self.labels = []
        self.chart = np.empty((0, 2))
        self.points = np.empty((0, 3))

    def add(self, label, c, v, points=None):
        """Add vertices at (c, v) on the chart; points (n, 3) if they are not on the skin."""
        c, v = np.broadcast_arrays(c, v)
        if points is None:
            points = skin_at(c, v)
        self.labels += [label] * len(c)
        self.chart = np.concatenate([self.chart, np.stack([c, v], 1)])
        self.points = np.concatenate([self.points, points])

    def rings(self, name, table):
        """Indices of a feature's vertices (rings, columns)."""
        first = self.labels.index(f"{name}0")
        columns = self.labels.count(f"{name}0")
        index = first + np.arange(len(table) * columns)
        return index.reshape(-1, columns)


def add_lips(half):
    t = np.linspace(0, pi, 13)                          # upper middle, corner, lower middle
    lift = abs(cos(t))
    for k, (width, upper, lower, bow, forward) in enumerate(LIP):
        x = width * sin(t)
        rise = upper * lift ** 1.3
        fall = lower * lift ** 1.2
        v = MOUTH_Y + where(t < pi / 2, rise, -fall)
        dip = exp(-(x / 3.5) ** 2)
        dip -= 0.5 * exp(-((x - 7) / 4) ** 2)
        v -= (t < 1) * bow * dip
        c = chart_column(x * (lift < 1), v)
        y = v + 0.0016 * x ** 2                         # the corners a little up
        z = skin_at(c, y)[:, 2]
        z += forward * lift ** 0.7 if k < 5 else forward
        if k >= 4:
            v = MOUTH_Y + (6 - k) * cos(t)
        half.add(f"lip{k}", c, v, np.stack([x, y, z], 1))


def add_lids(half):
    t = np.arange(16) * pi / 8                          # outer corner, top, inner corner, bottom
    for k, (beyond, off, cheek, _) in enumerate(LID):
        dx = (15 + beyond) * cos(t)                     # from the middle of the eye
        height = where(sin(t) > 0, 6.8 + beyond, 4.8 + 0.9 * beyond)
        x = EYE[0] + dx
        y = height * sin(t) + 0.06 * dx
        c = chart_column(x, y)
        depth_squared = (EYE_RADIUS + off) ** 2 - dx ** 2 - y ** 2
        ball = EYE[2] + sqrt(np.maximum(depth_squared, 40))
        z = cheek * skin_at(c, y)[:, 2] + (1 - cheek) * ball
        half.add(f"lid{k}", c, y, np.stack([x, y, z], 1))


def add_ears(half):
    t = np.arange(10) * pi / 5                          # rear, top, front, lobe
    c = (12 + 2 * sin(t)) * cos(t)
    v = 26 * sin(t)
    base = skin_at(118 + c, -5 + v)
    centre = base.mean(0)
    rear = (0.5 + 0.5 * cos(t))[:, None]
    for k, (size, out, back) in enumerate(EAR):
        flare = rear * (out, 0, back) + (0.2 * out, 0, 0)
        points = centre + (base - centre) * size + flare
        chart_c = 118 + c * (1 - 0.17 * k)
        chart_v = -5 + v * (1 - 0.17 * k)
        half.add(f"ear{k}", chart_c, chart_v, points)


def add_brows(half):
    s = np.linspace(0, 1, 8)
    s = np.append(s, s[::-1])                           # along the lower edge, back on the upper
    edge = np.repeat((-1, 1), 8)
    for k, (thick, beyond) in enumerate(BROW):
        x = 14 + 36 * (s + beyond * (2 * s - 1))
        y = 17.5 + 8 * sin(pi * (0.21 + 0.61 * s))
        y += edge * thick * (1.2 + 3.2 * s ** 0.4 * (1 - s))
        half.add(f"brow{k}", chart_column(x, y), y)


def add_hair_and_nose(half):
    along = np.gradient(HAIRLINE, axis=0)
    length = np.linalg.norm(along, axis=1, keepdims=True)
    across = along[:, ::-1] * (-1, 1) / length
    across[[0, -1], 0] = 0
    half.add("hairline", *HAIRLINE.T)
    half.add("hair_edge", *(HAIRLINE + 4 * across).T)   # the hair begins 4 mm further up
    x, y = NOSE_POINTS.T
    half.add("nose", chart_column(x, y), y)
    half.labels[-1] = "nostril"
    half.add("crown", np.linspace(0, HALF_GIRTH, 7), 139.0)
    half.add("neck", np.linspace(0, HALF_GIRTH, 10), -190.0)


def add_filler(half):
    """Hexagonal lattices, fine at the nose, coarse on the skull, clear of all other vertices."""
    for spacing, c_high, v_low, v_high in FILLER:
        v, c = np.mgrid[v_low:v_high:0.9 * spacing, 0:c_high:spacing]
        c[1::2] += 0.3 * spacing
        c[c < 0.6 * spacing] = 0
        c[c > HALF_GIRTH - 0.5 * spacing] = HALF_GIRTH
        on_eye = np.hypot((c - 32) / 25, v / 16) < 1
        on_mouth = np.hypot(c / 38, (v - MOUTH_Y) / 12) < 1
        distance, _ = cKDTree(half.chart).query(np.stack([c, v], -1))
        free = (distance > 0.72 * spacing) & ~on_eye & ~on_mouth
        half.add("fill", c[free], v[free])
    half.add("top", [0.0], 150.0)


def triangulate(half, lip, lid, ear, brow):
    """Triangles (n, 3): rings are sewn ring to ring, Delaunay joins what lies between features."""
    top = len(half.chart) - 1
    rings = (lip, lid, ear, brow)
    inner = np.concatenate([ring[1:].ravel() for ring in rings])
    outer = np.setdiff1d(np.arange(top), inner)
    triangles = outer[Delaunay(half.chart[outer]).simplices]
    for ring in rings:                                  # the features themselves stay open
        inside = np.isin(triangles, ring[0]).all(1)
        triangles = triangles[~inside]
    lower_edge, upper_edge = np.split(brow[1], 2)
    brow_strip = np.stack([lower_edge, upper_edge[::-1]])
    clockwise = [sew(lid, True), sew(ear, True), sew(brow, True), sew(brow_strip)]
    turned = [piece[:, ::-1] for piece in clockwise]
    crown = np.flatnonzero(np.array(half.labels) == "crown")
    roof = [(a, b, top) for a, b in zip(crown, crown[1:])]
    return np.concatenate([triangles, sew(lip), *turned, roof])


def tooth_row(top, bottom, front):
    """An arch of teeth (2, 17, 3) and its colours; odd columns are the gaps."""
    angle = np.linspace(-1.2, 1.2, 17)
    gap = np.arange(17) % 2
    z = front - 22 * (1 - cos(angle)) - 0.5 * gap
    arch = np.stack([23 * sin(angle), 0 * angle, z], 1)
    upper_edge = arch + (0, top, -1)
    lower_edge = arch + (0, bottom, 0)
    sheet = np.stack([upper_edge, lower_edge])
    colours = COLOURS["tooth"] * (1 - 0.18 * gap)[:, None]
    return sheet, np.tile(colours, (2, 1))


def eyeball(side):
    """Rings around the pupil (7, 12, 3) and their colours; side 1: the left eye, -1: the right."""
    polar = np.radians([0.5, 9, 10, 20.5, 22, 45, 75])[:, None]
    turn = -np.arange(12) * pi / 6
    x = sin(polar) * sin(turn)
    y = sin(polar) * cos(turn)
    z = cos(polar) + 0 * turn
    sheet = EYE * (side, 1, 1) + EYE_RADIUS * np.stack([x, y, z], -1)
    labels = "pupil pupil iris limbus white white white".split()
    return sheet, np.repeat([COLOURS[label] for label in labels], 12, axis=0)


def skin_colours(labels, y, hairy):
    colours = np.array([COLOURS.get(label, COLOURS["skin"]) for label in labels])
    colours[hairy] = COLOURS["hair"]
    lower_margin = np.isin(labels, ["lid4", "lid5"]) & (y < 0)
    colours[lower_margin] = COLOURS["lower_lid"]        # no lashes
    return colours


def jaw_share_of_skin(x, c, v):
    """Chin and lower lip turn with the jaw, corners of the mouth half, upper lip and neck not."""
    across = clip(abs(x) / MOUTH_WIDTH, 0, 1)           # 1 at the corners
    below = MOUTH_Y - v
    reach = 12 + 0.6 * clip(c - 30, 0, None)
    fade = exp(-abs(below) / reach)
    towards_corner = 1 - (1 - across ** 2) ** 0.6
    lower = 1 - 0.55 * fade * towards_corner
    upper = 0.45 * fade * across ** 4
    share = where(below > 0, lower, upper)
    share *= smoothstep((115 - c) / 65)
    share *= smoothstep((v + 155) / 45)
    return share


def add_patches(deltas, skin, below):
    """Add BLENDSHAPE_PATCHES to deltas (14, n, 3) m; below: mm under the line of the lips (n,)."""
    x = skin[:, 0]
    sides = {"all": np.full(len(x), True),
             "above": below < 0,
             "below": below > 0,
             "left": x > 0,
             "right": x < 0}
    for line in BLENDSHAPE_PATCHES.strip().splitlines():
        name, side, *numbers = line.split()
        patch = soft_patch(skin, *map(float, numbers))
        patch *= sides[side][:, None]
        deltas[BLENDSHAPES.index(name)] += patch / 1000


def lip_follow(x, y, c, below, columns):
    """Vertices around the mouth (n,), and how far each follows each closing pair (n, pairs)."""
    around = (np.hypot(x, y - MOUTH_Y) < 34) & (c < 90)
    near = np.flatnonzero(around & (abs(below) > 1e-9))
    x = x[near]
    height = abs(y[near] - MOUTH_Y)
    reach = exp(-((height - 5).clip(0) / 14) ** 2)
    reach *= clip((32 - abs(x)) / 8, 0, 1)
    reach *= where(below[near] < 0, -0.2, 0.8)          # mostly the lower lip
    hats = [np.interp(x, columns, hat) for hat in np.eye(len(columns))]
    follow = np.stack(hats, 1) * reach[:, None]
    return near, follow.astype(np.float32)


def mirror(half):
    """Both halves, with one middle line -> skin (n, 3), columns and rows on the chart (n,), labels
    (n,), and for each vertex of `half` the index of its mirror image."""
    c = half.chart[:, 0]
    paired = (c > 0) & (c < HALF_GIRTH)
    half.points[~paired, 0] = 0
    twin = np.arange(len(paired))
    twin[paired] = len(paired) + np.arange(paired.sum())
    labels = np.array(half.labels)
    labels = np.append(labels, labels[paired])
    skin = np.concatenate([half.points, half.points[paired] * (-1, 1, 1)])
    c, v = np.concatenate([half.chart, half.chart[paired]]).T
    return skin, c, v, labels, twin


def add_loose_parts(vertices, triangles, colours):
    """Append upper teeth, lower teeth, left and right eyeball; the last result is their indices."""
    loose_parts = [
        tooth_row(top=-56, bottom=-68, front=85.5),
        tooth_row(top=-66.8, bottom=-76, front=83),
        eyeball(side=1),
        eyeball(side=-1),
    ]
    indices = []
    for sheet, sheet_colours in loose_parts:
        rows, columns, _ = sheet.shape
        index = len(vertices) + np.arange(rows * columns).reshape(rows, columns)
        indices.append(index)
        vertices = np.concatenate([vertices, sheet.reshape(-1, 3)])
        colours = np.concatenate([colours, sheet_colours])
        triangles = np.concatenate([triangles, sew(index, closed=rows > 2)])
    return vertices, triangles, colours, indices


def build_face():
    """The mean face, always the same, as a namespace:

    template (V, 3) metres; triangles (F, 3) int, counter-clockwise from outside; colours (V, 3) in
    0..1; lips (the red), upper_face (lids, brows, forehead): lists of vertices; lip_gap [upper,
    lower]: the inner lips in the middle. The rest is the rig of apply_blendshapes.
    """
    half = HalfHead()
    for add in (add_lips, add_lids, add_ears, add_brows, add_hair_and_nose, add_filler):
        add(half)
    lip = half.rings("lip", LIP)
    lid = half.rings("lid", LID)
    ear = half.rings("ear", EAR)
    triangles = triangulate(half, lip, lid, ear, half.rings("brow", BROW))

    skin, c, v, labels, twin = mirror(half)
    x, y, z = skin.T
    below = MOUTH_Y - v
    hairy = np.isin(labels, ["hair_edge", "fill", "crown", "top"])
    hairy &= v > np.interp(c, *HAIRLINE.T) + 1
    triangles = np.concatenate([triangles, twin[triangles][:, ::-1]])
    colours = skin_colours(labels, y, hairy)
    vertices, triangles, colours, loose_parts = add_loose_parts(skin, triangles, colours)
    _, lower_teeth, left_eyeball, right_eyeball = loose_parts

    jaw_share = np.zeros(len(vertices), np.float32)
    jaw_share[:len(skin)] = jaw_share_of_skin(x, c, v)
    jaw_share[lower_teeth] = 1
    deltas = np.zeros((len(BLENDSHAPES), *vertices.shape), np.float32)
    add_patches(deltas[:, :len(skin)], skin, below)
    line = lip[4]                                       # where the lips meet: upper, corner, lower
    right_upper = twin[line[5:0:-1]]
    right_lower = twin[line[7:-1]]
    upper = np.append(right_upper, line[:6])            # pairs across the mouth, right to left
    lower = np.append(right_lower, line[:6:-1])
    corner = smoothstep(abs(x[upper]) / MOUTH_WIDTH * 2.2 - 0.6)
    near, follow = lip_follow(x, y, c, below, x[upper])
    bare = ~hairy & (labels != "hairline")
    upper_face = bare & (y > -10) & (z > 20) & (abs(x) < 62)
    return SimpleNamespace(
        template=vertices / 1000,
        triangles=triangles,
        colours=colours,
        lips=np.flatnonzero(np.isin(labels, ["lip2", "lip3", "lip4"])).tolist(),
        upper_face=np.flatnonzero(upper_face).tolist(),
        lip_gap=line[[0, -1]].tolist(),
        jaw_share=jaw_share,                # (V,) share of the jaw's rotation
        deltas=deltas,                      # (14, V, 3) m, displacement of each blendshape at 1
        upper=upper,                        # (11,) vertices of the upper lip, and ...
        lower=lower,                        # (11,) ... opposite on the lower
        corner=corner,                      # (11,) 1 at the corners of the mouth
        near=near,                          # (n,) vertices that move when a pair closes
        follow=follow,                      # (n, 11) by which share of the pair's gap
        lids=[lid, twin[lid]],              # (6, 16) rings of the left lids, of the right
        eyeballs=[left_eyeball, right_eyeball],     # (7, 12) each
    )


# -----------------------------------------------------------------------------
# face: templates and blendshapes


def make_template(face, rng):
    """A subject's template (V, 3) m: the mean face reshaped by random traits."""
    template = 1000 * face.template
    points = template.copy()
    for lid, ball, side in zip(face.lids, face.eyeballs, (1, -1)):
        eye = np.append(lid[1:], ball)                  # lids and eyeball are moved as one point
        points[eye] = EYE * (side, 1, 1) + (0, 0, EYE_RADIUS)
    traits = rng.normal(size=len(TRAIT_PATCHES) + 4).clip(-1.8, 1.8)
    width, height, length, fullness = traits[:4]
    template += points * (0.04 * width, 0.035 * height, 0.03 * length)
    for trait, patch in zip(traits[4:], TRAIT_PATCHES):
        template += trait * soft_patch(points, *patch)
    lift = 0.22 * fullness * (points[face.lips, 1] - MOUTH_Y)
    template[face.lips, 1] += lift
    template[face.lips, 2] += 0.6 * abs(lift) * np.sign(fullness)
    return template / 1000


def rotate(points, index, centre, angle):
    """Rotate points (T, V, 3) at index (n,) in place, about the x axis through centre (3,).

    angle (T, n) in radians; positive angles move the front up.
    """
    cosine = cos(angle)
    sine = sin(angle)
    y = points[:, index, 1] - centre[1]
    z = points[:, index, 2] - centre[2]
    points[:, index, 1] = centre[1] + y * cosine + z * sine
    points[:, index, 2] = centre[2] + z * cosine - y * sine


def apply_blendshapes(face, template, weights):
    """Deform a template (V, 3) m by weights (T, 14), columns as BLENDSHAPES -> (T, V, 3) float32 m.

    ValueError if template or weights have another shape.
    """
    weights = np.asarray(weights, np.float32)
    template = np.asarray(template, np.float32)
    if weights.ndim != 2 or weights.shape[1] != len(BLENDSHAPES):
        raise ValueError(f"apply_blendshapes expects weights (T, {len(BLENDSHAPES)}), "
                         f"found {weights.shape}; the columns are BLENDSHAPES")
    if template.shape != face.template.shape:
        raise ValueError(f"apply_blendshapes expects template {face.template.shape}, "
                         f"found {template.shape}; take the one of make_subject or build_face")
    weight = dict(zip(BLENDSHAPES, weights.T[..., None]))           # each (T, 1)
    vertices = template + np.tensordot(weights, face.deltas, 1)     # (T, V, 3)

    moved = np.flatnonzero(face.jaw_share)
    angle = np.float32(-JAW_ANGLE) * weight["jaw"] * face.jaw_share[moved]
    rotate(vertices, moved, HINGE / 1000, angle)

    # `close` draws each pair across the mouth together, `round` the outer pairs. Lips that have
    # passed each other are brought back until they touch.
    gap = vertices[:, face.upper] - vertices[:, face.lower]         # (T, pairs, 3)
    closed = 1 - (1 - weight["close"]) * (1 - weight["round"] * face.corner)
    crossed = gap[..., 1] < 0
    closed = where(crossed, 1, clip(closed, 0, 1))
    closed = closed.astype(np.float32)[..., None]                   # (T, pairs, 1)
    vertices[:, face.near] += face.follow @ (closed * gap)

    for lid, ball, blink in zip(face.lids, face.eyeballs, ("blink_left", "blink_right")):
        eye = template[ball[0]].mean(0) - (0, 0, EYE_RADIUS / 1000)
        close_lids(vertices, template, lid, eye, weight[blink], weight["squint"])
    return vertices


def close_lids(vertices, template, lid, eye, blink, squint):
    """Rotate both lids about the eye's centre, so that they slide over the eyeball and meet."""
    upper = lid[:, 1:8]                                 # (rings, 7)
    lower = lid[:, :8:-1]                               # the columns opposite
    _, y_top, z_top = (template[upper[4]] - eye).T
    _, y_bottom, z_bottom = (template[lower[4]] - eye).T
    top = np.arctan2(y_top, z_top)
    bottom = np.arctan2(y_bottom, z_bottom)
    meet = bottom + 0.2 * (top - bottom)
    blink = blink.clip(0, 1)
    squint = squint.clip(0, 1)
    for half, margin, squint_share in ((upper, top, 0.25), (lower, bottom, 1.0)):
        amount = 1 - (1 - blink) * (1 - squint_share * squint)      # (T, 1)
        angle = LID[:, 3:] * (meet - margin)                        # (rings, 7)
        angle = amount * angle.ravel()                              # (T, rings * 7)
        rotate(vertices, half.ravel(), eye, angle.astype(np.float32))


# -----------------------------------------------------------------------------
# clips: what a subject does with a sentence

CONTACT = ("close", "tuck")         # the lips touch, or the lower lip touches the teeth


def articulate(segments, times):
    """Weights of LIP_SHAPES at `times` (T,) -> (T, 7) in 0..1.

    Cohen & Massaro 1993: a phone has a target for each blendshape, and a dominance that decays
    exponentially before and after it; the weight is the dominance-weighted mean of the targets.
    A closure (P B M) or a lip under the teeth (F V) dominates its neighbours while it is held.
    """
    spans = []                                          # (start, end)
    phones = []
    for start, end, name in segments:
        end = release_time(start, end, name)
        phones.append(PHONES[name])
        if name in GLIDE:
            middle = 0.45 * start + 0.55 * end
            spans.append((start, middle))
            phones.append(PHONES[GLIDE[name]])
            start = middle
        spans.append((start, end))
    start, end = np.array(spans).T
    targets = np.array([phone.lips for phone in phones])            # (phones, 7)
    jaw_dominance, lip_dominance = np.array([phone.dominance for phone in phones]).T

    contact_columns = [LIP_SHAPES.index(name) for name in CONTACT]
    contact = targets[:, contact_columns].max(1) == 1
    silence = jaw_dominance >= 3
    hold = where(contact | silence, 0.5, 0.2) * (end - start)
    distance = abs(times[:, None] - (start + end) / 2) - hold
    distance = np.maximum(distance, 0)                              # s, (T, phones)
    weights = np.empty((len(times), 7))
    for k, name in enumerate(LIP_SHAPES):
        target = targets[:, k]
        if name == "jaw":
            dominance = jaw_dominance * exp(-25 * distance)
        elif name in CONTACT:                           # contacts are made fast
            dominance = where(target == 1, 40, 1) * exp(-100 * distance)
        else:
            dominance = lip_dominance * exp(-18 * distance)
        dominance += 1e-9
        weights[:, k] = dominance @ target / dominance.sum(1)
    weights[:, contact_columns] *= 1.03                 # 40 : 1 is full contact
    return clip(weights, 0, 1)


@dataclass
class Gestures:
    """How one subject moves."""
    lip_amplitude: float            # factor on all lip shapes
    asymmetry: float                # how much more the left brow moves than the right, relative
    brow_probability: float         # that an accent raises the brows
    blink_rate: float               # blinks per minute, besides those at pauses
    idle_amplitude: float           # of the slow motions: brows, frown, squint, cheek


def make_gestures(rng):
    """Draw Gestures. Speakers blink 10 to 25 times a minute, often at pauses (Bentivoglio et al.
    1997; Nakano & Kitazawa 2010)."""
    return Gestures(
        lip_amplitude=rng.uniform(0.9, 1.1),
        asymmetry=rng.uniform(-0.3, 0.3),
        brow_probability=rng.uniform(0.5, 0.9),
        blink_rate=rng.uniform(4, 12),
        idle_amplitude=rng.uniform(0.5, 1.5),
    )


def upper_face_motion(segments, accents, times, gestures, rng):
    """Weights of UPPER_FACE_SHAPES at `times` (T,) -> (T, 7).

    Speech hardly determines them: brows follow accents by chance, blinks cluster at pauses, the
    rest drifts slowly.
    """
    blink_times = []
    for start, end, phone in segments:
        if phone == "SIL" and rng.random() < 0.7:
            blink_times.append(start + min(0.3, (end - start) / 2))
    random_blinks = rng.poisson(gestures.blink_rate * times[-1] / 60)
    blink_times += list(rng.uniform(0, times[-1], random_blinks))
    blink = np.zeros(len(times))
    for time in blink_times:
        phase = times - time - rng.normal(0, 0.05)
        phase /= rng.uniform(0.9, 1.2)
        # Lids fall in 80 ms and rise in 160 ms (VanderWerf et al. 2003).
        closed = np.minimum(phase / 0.08 + 1.2, 1.2 - phase / 0.16)
        blink += clip(closed, 0, 1)

    brows = np.zeros(len(times))
    for time, strength in accents:
        if rng.random() < gestures.brow_probability * min(1, strength):
            height = rng.uniform(0.4, 1)
            seconds = rng.uniform(0.1, 0.2)
            brows += height * exp(-0.5 * ((times - time) / seconds) ** 2)
    noise = rng.standard_normal((4, len(times) + 120))
    drift = gaussian_filter1d(noise, 15, axis=1)[:, 60:-60] * 7     # variance near 1
    brows += 0.12 * gestures.idle_amplitude * drift[0]
    brow_left = brows * (1 + gestures.asymmetry)
    brow_right = brows * (1 - gestures.asymmetry)
    idle = 0.3 * gestures.idle_amplitude * (drift[1:] - [[0.8], [0.6], [0.6]])
    frown, squint, cheek = clip(idle, 0, 1)
    weights = np.stack([blink, blink, brow_left, brow_right, frown, squint, cheek], 1)
    return clip(weights, -0.5, 1)


@dataclass
class Subject:
    number: int                     # in the order of SUBJECTS
    voice: Voice
    gestures: Gestures
    face: SimpleNamespace           # of build_face
    template: np.ndarray            # (V, 3) m


@lru_cache
def make_subject(seed, subject):
    """The Subject of this name."""
    number = sum(SUBJECTS.values(), []).index(subject)
    rng = np.random.default_rng([seed, number])
    height = (0.3 + 0.618 * number) % 1     # the golden ratio spreads the voices from low to high
    voice = make_voice(rng, height)
    gestures = make_gestures(rng)
    face = build_face()
    return Subject(number, voice, gestures, face, make_template(face, rng))


def make_clip(seed, subject, sentence, take=0):
    """A subject speaks a sentence -> audio, vertices, segments, weights.

    audio (samples,) float at 16 kHz; vertices (T, V, 3) float32 m; segments [(start s, end s,
    phone)]; weights (T, 14) of BLENDSHAPES. The take changes the face alone: the lips by a few
    per cent, the upper face is drawn anew. So each take is a sample of the motion that may go
    with this audio.
    """
    person = make_subject(seed, subject)
    voice_rng = np.random.default_rng([seed, person.number, sentence])
    face_rng = np.random.default_rng([seed, person.number, sentence, take])
    voice = vary_voice(person.voice, voice_rng)
    words = make_sentence(voice_rng)
    segments, accents = assign_durations(words, voice, voice_rng)
    audio = synthesise(segments, voice, voice_rng, accents)
    audio = simulate_recording(audio, voice_rng)

    frames = int(len(audio) / SAMPLE_RATE * FPS)
    times = (np.arange(frames) + 0.5) / FPS
    gestures = person.gestures
    lips = articulate(segments, times) * gestures.lip_amplitude
    lips = clip(lips * lognormal(face_rng, 0.03, 7), 0, 1.1)
    upper_face = upper_face_motion(segments, accents, times, gestures, face_rng)
    weights = np.concatenate([lips, upper_face], 1)
    vertices = apply_blendshapes(person.face, person.template, weights)
    return audio, vertices, segments, weights


# -----------------------------------------------------------------------------
# folder


def clip_name(subject, sentence):
    return f"{subject}_sentence{sentence:02d}"


def write_clip(folder, seed, subject, sentence):
    """Make one clip and write its wav, its npy and its phones (start s, end s, ARPAbet)."""
    audio, vertices, segments, _ = make_clip(seed, subject, sentence)
    name = clip_name(subject, sentence)
    samples = np.round(audio * 32767).astype(np.int16)
    wavfile.write(folder / "wav" / f"{name}.wav", SAMPLE_RATE, samples)
    frames = vertices.reshape(len(vertices), -1)        # (T, V*3)
    np.save(folder / "vertices_npy" / f"{name}.npy", frames)
    lines = [f"{start:.4f}\t{end:.4f}\t{phone}\n" for start, end, phone in segments]
    phones = folder / "phones" / f"{name}.tsv"
    phones.write_text("".join(lines))


def write_data_set(folder, seed, progress):
    """Write all clips, as many at once as there are processors, then the templates and lists."""
    splits = {}
    jobs = []
    for split, subjects in SUBJECTS.items():
        splits[split] = []
        for subject in subjects:
            for sentence in SENTENCES[split]:
                splits[split].append(clip_name(subject, sentence))
                jobs.append((folder, seed, subject, sentence))
    with ProcessPoolExecutor() as pool:
        written = pool.map(write_clip, *zip(*jobs), chunksize=5)
        for _ in progress(written, "building the synthetic speakers", total=len(jobs)):
            pass

    templates = {}
    for subject in sum(SUBJECTS.values(), []):
        templates[subject] = make_subject(seed, subject).template.astype(np.float32)
    (folder / "templates.pkl").write_bytes(pickle.dumps(templates))
    face = build_face()
    description = {
        "name": "synthetic speakers",
        "seed": seed,
        "fps": FPS,
        "unit": "metre",
        "splits": splits,
        "triangles": face.triangles.tolist(),
        "colours": face.colours.round(3).tolist(),
        "lips": face.lips,
        "upper_face": face.upper_face,
        "lip_gap": face.lip_gap,
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def no_progress(items, text, total=None):
    return items


def build_speakers(folder, seed=0, progress=no_progress):
    """Write the data set into `folder`, which appears under its name only when it is complete.

    12 subjects, 600 clips. progress(items, text, total) wraps the finished clips, as tqdm does.
    """
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for name in ("wav", "vertices_npy", "phones"):
            (part / name).mkdir(parents=True)
        write_data_set(part, seed, progress)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
