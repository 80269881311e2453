"""
The synthetic data set: twelve subjects who do not exist speak 600 sentences, half an hour in all.

VOCASET and BIWI must be requested from their authors; this data set is computed on first use. A
formant synthesiser speaks random sentences, and the blendshapes of a face move with them.
You do not need this file to understand the paper.

Map of this file
    voice     tables of phones and words; a source-filter synthesiser after Klatt (1980)
    face      the mean face (face.npz), the template of each subject, and the blendshapes
    clips     what a subject does with a sentence: the lips follow the phones, the rest is random
    folder    build_speakers writes all clips in the layout of FaceFormer and CodeTalker

Units: seconds, hertz, metres (the constants of the face: millimetres). Frame t covers the time
from t / FPS to (t + 1) / FPS and shows the face at its centre. Same seed, same bytes.
"""
import json
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy import clip, cos, exp, pi, sin, sqrt, where
from scipy import fft
from scipy.io import wavfile
from scipy.ndimage import gaussian_filter1d

SAMPLE_RATE = 16_000                # Hz, as the model expects it
FPS = 30                            # motion frames per second

SUBJECTS = {"train": ["ada", "ben", "cleo", "dan", "eva", "finn", "gwen", "hugo"],
            "val": ["iris", "jack"],
            "test": ["kira", "liam"]}               # 8, 2 and 2, as in VOCASET
# Numbers of each subject's sentences. The same number stands for other words with every subject.
SENTENCES = {"train": range(1, 66),
             "val": range(66, 86),
             "test": range(86, 106)}
LIP_SHAPES = ("jaw", "close", "protrude", "round", "spread", "raise_upper", "tuck")
UPPER_FACE_SHAPES = ("blink_left", "blink_right", "brow_left", "brow_right",
                     "frown", "squint", "cheek")        # cheek: a smile, so it moves the lips, too
BLENDSHAPES = LIP_SHAPES + UPPER_FACE_SHAPES

# -----------------------------------------------------------------------------
# voice: phones, words, and the parameters of a subject

# One line per phone (ARPAbet; -Y and -W are the second halves of diphthongs)
# F1 F2 F3    formants of men, Hz: vowels Peterson & Barney 1952, table II; the rest Klatt 1980,
#             tables II and III. UH and UW are fronted, as they are today, R and L more open
# co          coarticulation, the share of the way that F2 and F3 move towards the vowels around
#             (F1: half of it): locus equations, Sussman et al. 1991, rounded
# ms          inherent duration: Allen, Hunnicutt & Klatt 1987, table 9-1; CH JH S Z SH longer,
#             after labelled recordings
# vc asp      amplitude of glottal pulses and of aspiration (by hand, after spectrograms);
#             AH ER IH UH are weak, as they are mostly unstressed
# dB at wid   friction or burst: level relative to a vowel, centre and half-width in Hz (after
#             Stevens 1998, chapters 7 and 8; levels of friction by hand, after labelled recordings)
# na muf      velum open; how much a constriction muffles what is above 400 Hz (by hand)
# jaw .. tuck targets of LIP_SHAPES; dJ dL: dominance of jaw and lips (by hand; the form is that
#             of Cohen & Massaro 1993)
PHONE_TABLE = """
     F1   F2   F3  co  ms  vc asp  dB   at  wid na muf jaw clo pro rnd spr  up tuck  dJ  dL
SIL 500 1500 2500 1.0 100   0   0 -99 2000 2000  0   0   0  .1   0   0   0   0    0 3.0 1.0
AA  730 1090 2440   0 240   1   0 -99 2000 2000  0   0 .80   0   0   0   0 .05    0 1.2 0.7
AE  660 1720 2410   0 230   1   0 -99 2000 2000  0   0 .70   0   0   0 .35 .15    0 1.2 0.8
AH  640 1190 2390   0 140  .6   0 -99 2000 2000  0   0 .48   0   0   0   0   0    0 0.6 0.4
AO  570  840 2410   0 240   1   0 -99 2000 2000  0   0 .62   0 .40 .45   0   0    0 1.1 1.0
AW  640 1230 2550   0 260   1   0 -99 2000 2000  0   0 .75   0   0   0   0 .05    0 1.2 0.7
AY  660 1200 2550   0 250   1   0 -99 2000 2000  0   0 .75   0   0   0 .10 .05    0 1.2 0.7
EH  530 1840 2480   0 150   1   0 -99 2000 2000  0   0 .52   0   0   0 .30 .10    0 1.0 0.7
ER  490 1350 1690   0 180  .6   0 -99 2000 2000  0   0 .35   0 .45 .40   0 .10    0 0.9 1.0
EY  480 1720 2520   0 190   1   0 -99 2000 2000  0   0 .45   0   0   0 .40 .10    0 1.0 0.8
IH  390 1990 2550   0 135  .6   0 -99 2000 2000  0   0 .30   0   0   0 .30 .05    0 0.8 0.6
IY  270 2290 3010   0 155   1   0 -99 2000 2000  0   0 .20   0   0   0 .70 .10    0 1.0 1.0
OW  540 1100 2300   0 220   1   0 -99 2000 2000  0   0 .50   0 .40 .50   0   0    0 1.0 1.1
OY  550  960 2400   0 280   1   0 -99 2000 2000  0   0 .58   0 .50 .55   0   0    0 1.1 1.1
UH  440 1250 2240   0 160  .6   0 -99 2000 2000  0   0 .35   0 .40 .40   0   0    0 0.9 0.9
UW  300 1300 2240   0 210   1   0 -99 2000 2000  0   0 .20   0 .80 .85   0   0    0 1.0 1.3
-Y  370 1900 2500   0   0   1   0 -99 2000 2000  0   0 .25   0   0   0 .50 .05    0 0.8 0.8
-W  430  920 2320   0   0   1   0 -99 2000 2000  0   0 .25   0 .65 .75   0   0    0 0.8 1.1
W   290  610 2150  .1  80  .7   0 -99 2000 2000  0  .1 .15 .10 .85 .95   0   0    0 1.0 1.8
Y   260 2070 3020  .2  80  .7   0 -99 2000 2000  0   0 .18   0   0   0 .50   0    0 0.9 0.7
R   420 1200 1600  .2  80 .85   0 -99 2000 2000  0   0 .22   0 .55 .50   0 .15    0 0.8 1.1
L   420 1100 2700  .3  80 .85   0 -99 2000 2000  0   0 .32   0   0   0 .10 .05    0 0.7 0.4
HH  500 1500 2500 .95  80 .05 .07 -99 2000 2000  0   0 .40   0   0   0   0   0    0 0.2 0.1
M   480 1270 2130  .6  70 .95   0 -99 2000 2000  1 .35 .15   1 .05   0   0   0    0 0.6 0.5
N   480 1340 2470  .4  60 .95   0 -99 2000 2000  1  .3 .22   0   0   0 .10 .05    0 0.8 0.3
NG  480 2000 2900  .5  95 .95   0 -99 2000 2000  1  .3 .30   0   0   0 .05   0    0 0.5 0.2
P   400 1100 2150  .8  90   0 .18 -18  900 1500  0   1 .15   1 .05   0   0   0    0 0.6 0.5
B   200 1100 2150  .8  85 .35 .05 -20  600 1200  0   1 .15   1 .05   0   0   0    0 0.6 0.5
T   400 1600 2600  .4  75   0  .2 -12 4500 1800  0   1 .18   0   0   0 .10 .05    0 1.0 0.3
D   200 1600 2600  .4  75 .35 .05 -16 3800 1800  0   1 .20   0   0   0 .10 .05    0 0.9 0.3
K   300 1990 2850  .7  80   0  .2 -13 2100  600  0   1 .30   0   0   0   0   0    0 0.5 0.2
G   200 1990 2850  .7  80 .35 .05 -17 1900  600  0   1 .30   0   0   0   0   0    0 0.5 0.2
CH  350 1800 2820  .2 140   0  .2 -11 3300  900  0   1 .16   0 .65 .40   0 .25    0 1.2 1.2
JH  260 1800 2820  .2 100 .35   0 -15 3200  900  0   1 .18   0 .60 .40   0 .25    0 1.2 1.1
F   340 1100 2080  .6 100   0 .02 -32 6500 3000  0  .6 .12   0   0   0 .05 .20    1 1.2 1.0
V   220 1100 2080  .6  60  .5   0 -42 6500 3000  0  .5 .12   0   0   0 .05 .20    1 1.2 1.0
TH  320 1290 2540  .5  90   0 .02 -34 6500 2800  0  .6 .25   0   0   0 .05 .05    0 1.0 0.4
DH  270 1290 2540  .5  50  .5   0 -42 6000 3500  0  .4 .25   0   0   0 .05 .05    0 0.8 0.3
S   320 1390 2530  .4 115   0 .02 -13 6000 1000  0  .6 .10   0   0   0 .25 .10    0 1.5 0.6
Z   240 1390 2530  .4  95  .4   0 -19 6000 1000  0  .5 .10   0   0   0 .25 .10    0 1.5 0.6
SH  300 1840 2750  .2 120   0 .02 -13 3500  900  0  .6 .14   0 .70 .45   0 .30    0 1.3 1.3
ZH  300 1840 2750  .2  70  .4   0 -19 3400  900  0  .5 .16   0 .65 .45   0 .30    0 1.3 1.2
"""
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
STOPS = "P B T D K G CH JH".split()
GLIDE = {"AW": "-W", "AY": "-Y", "EY": "-Y", "OW": "-W", "OY": "-Y"}    # how a diphthong ends

PHONES = {}                         # name -> a line of PHONE_TABLE
for line in PHONE_TABLE.strip().splitlines()[1:]:
    name, *numbers = line.split()
    row = np.array(numbers, float)
    PHONES[name] = SimpleNamespace(
        formants=row[:3],           # Hz
        coarticulation=row[3],
        ms=row[4],
        source=row[5:12],           # voicing, aspiration, dB, centre, half-width, velum, muffling
        lips=row[12:19],            # targets of LIP_SHAPES in 0..1
        dominance=row[19:],         # of jaw and lips
    )

# Words by part of speech, in the CMU dictionary's ARPAbet; 1 marks the stressed vowel.
LEXICON = """
det the DH AH, a AH, my M AY, your Y AO R, this DH IH S, our AW ER, his HH IH Z, their DH EH R
det some S AH M, that DH AE T, each IY CH, no N OW, both B OW TH, these DH IY Z, her HH ER, an AE N
prep in IH N, of AH V, on AA N, with W IH DH, for F AO R, from F R AH M, to T UW, at AE T, by B AY
prep under AH N D ER, above AH B AH V, behind B IH HH AY N D, between B IH T W IY N, through TH R UW
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
    """Draw a list of 5 to 8 words; "," stands for a pause."""
    kinds = rng.choice(CLAUSES).split()
    if rng.random() < 0.85:                     # five words, mostly a pause, a shorter clause
        pause = [","] if rng.random() < 0.7 else []
        kinds = kinds[:5] + pause + ["conj", "pron", "verb"]
    return ["," if kind == "," else str(rng.choice(WORDS[kind])) for kind in kinds]


def lognormal(rng, deviation, size=None):
    """Random factors with median 1; deviation: the standard deviation of their logarithm."""
    return exp(rng.normal(0, deviation, size))


def make_voice(rng, height):
    """Draw a voice; height 0 is the lowest, 1 the highest.

    Higher voices have shorter vocal tracts on average, as from men to women to children.
    """
    pitch = 80 * 3.5 ** height
    vocal_tract = 1.03 - 0.17 * np.log2(pitch / 100) + rng.normal(0, 0.06)
    return SimpleNamespace(
        pitch=pitch,                                # mean fundamental frequency, Hz
        vocal_tract=clip(vocal_tract, 0.76, 1.12),  # length, relative to the men of PHONE_TABLE
        speaking_rate=rng.uniform(0.8, 1.35),       # 1 = unhurried conversation
        accent_semitones=rng.uniform(1, 4),         # rise of the pitch in an accent
        breathiness=rng.random(),                   # 0..1: breath noise and open quotient
        spectral_tilt=700 * 8 ** rng.random(),      # corner of the glottal low-pass, Hz
        jitter=rng.uniform(0.003, 0.02),            # standard deviation of the period, relative
        shimmer=rng.uniform(0.02, 0.1),             # the same of the pulses' amplitude
        bandwidth=rng.uniform(0.8, 1.6),            # factor on the formants' bandwidths
        clarity=rng.uniform(0.5, 1),                # 1 = clear: vowel space, closures, bursts
        nasality=rng.uniform(0.2, 1),               # 0..1: how far nasals spread into vowels
        dialect=rng.integers(2 ** 31),              # seed of the subject's vowel qualities
    )


def vary_voice(voice, rng):
    """The voice of one clip: varied so widely that a few subjects cover many voices."""
    deviations = {"pitch": 0.25, "vocal_tract": 0.08, "speaking_rate": 0.13,
                  "accent_semitones": 0.3, "spectral_tilt": 0.5, "bandwidth": 0.2}
    varied = dict(vars(voice))
    for name, deviation in deviations.items():
        varied[name] *= lognormal(rng, deviation)
    for name in ("breathiness", "clarity", "nasality"):
        varied[name] = clip(varied[name] + rng.normal(0, 0.25), 0, 1)
    return SimpleNamespace(**varied)


# -----------------------------------------------------------------------------
# voice: durations, then tracks of formants and source


def assign_durations(words, voice, rng):
    """Segments [(start s, end s, phone)] without gaps, and accents [(time s, strength)].

    An accent lies on each stressed vowel, with strength 0.5, or 1.2 in the emphasised word. That is
    drawn from all words and pauses; in half of the clips it has no stressed vowel.
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
        else:
            stress = 1.2 if i == emphasised else 0.5
            phrase_final = (words + [","])[i + 1] == ","
            phones += draw_word(word, stress, phrase_final, voice, rng)
    phones.append(draw_pause(0.2, 0.4, rng))

    segments = []
    accents = []
    end = 0.0
    for phone, seconds, stress in phones:
        start = end
        end += seconds
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
    """A word's [(phone, seconds, stress)]. Stress and phrase ends lengthen (Klatt 1976). The two
    factors make vowels 45 % of the speech, of 90 ms each, as in labelled recordings."""
    phones = PRONUNCIATION[word]
    vowels = [i for i, phone in enumerate(phones) if phone.rstrip("1") in VOWELS]
    timed = []
    for i, phone in enumerate(phones):
        phone_stress = stress if phone.endswith("1") else 0
        phone = phone.rstrip("1")
        factor = 0.4 + 0.35 * phone_stress if phone in VOWELS else 0.9
        if phrase_final and i >= vowels[-1]:
            factor *= rng.uniform(1.2, 1.6)
        seconds = PHONES[phone].ms / 1000 * factor * lognormal(rng, 0.18)
        seconds = max(seconds / voice.speaking_rate, 0.025)
        timed.append((phone, float(seconds), phone_stress))
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
            before = [neutral] + [vowels[j][1] for j in range(i - 3, i) if j in vowels]
            after = [vowels[j][0] for j in range(i + 1, i + 4) if j in vowels] + [neutral]
            locus = PHONES[phone].formants * lognormal(rng, 0.04, 3)
            share = PHONES[phone].coarticulation * np.array([0.5, 1, 1])
            first = locus + share * (before[-1] - locus)
            last = locus + share * (after[0] - locus)
        knots.append(0.75 * start + 0.25 * end)
        knots.append(0.25 * start + 0.75 * end)
        formants += [first, last]
    tracks = [np.interp(times, knots, formant) for formant in np.array(formants).T]
    smoothing = 1.5 + 2 * (1 - voice.clarity)           # mumbled speech misses its targets by more
    smooth = gaussian_filter1d(np.stack(tracks, 1), smoothing, axis=0)
    return smooth / voice.vocal_tract


def vowel_formants(segments, neutral, voice, rng):
    """{index of a vowel's segment: (formants at its start, at its end)}, each (3,) Hz."""
    # Every clip deviates from its subject's dialect, as eight dialects could be learnt by heart.
    dialect_rng = np.random.default_rng(voice.dialect)
    dialect = {}
    for phone in VOWELS + ["-Y", "-W"]:
        dialect[phone] = lognormal(dialect_rng, (0.04, 0.04, 0.02))
        dialect[phone] *= lognormal(rng, (0.06, 0.06, 0.03))
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
    """The sources of the phones at `times` -> (7, n); noise as an amplitude instead of dB."""
    steps = []                                          # (from this time on, source (7,))
    for i, (start, end, phone) in enumerate(segments):
        source = PHONES[phone].source.copy()
        source[[0, 1, 6]] *= lognormal(rng, (0.4, 0.6, 0.5))
        source[2] = 10 ** (source[2] / 20) * lognormal(rng, 0.35)
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

    While the vocal folds are open, a pulse is the derivative of KLGLOTT88's flow u^2 - u^3
    (Klatt & Klatt 1990).
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
    pulse = 2 * u - 3 * u * u
    pulses = where(u < 1, pulse, 0) * shimmer[cycle]
    noise = rng.standard_normal(n * HOP) * where(u < 1, 1, 0.5)
    pulses += 0.03 * 6 ** voice.breathiness * noise
    amplitude = to_samples(voicing * exp(loudness))
    return amplitude * pulses + 0.5 * to_samples(breath) * noise


def antiresonator(frequency, bandwidth):
    """1 / response of Klatt's resonator, 1 at 0 Hz. In Hz: scalar -> (257,), (n, 1) -> (n, 257)."""
    z = exp(-2j * pi * HERTZ / SAMPLE_RATE).astype(np.complex64)
    radius = exp(-pi * bandwidth / SAMPLE_RATE).astype(np.float32)
    b = -2 * radius * cos(2 * pi * frequency / SAMPLE_RATE)
    b = b.astype(np.float32)
    inverse = 1 + z * (b + radius ** 2 * z)
    return inverse / (1 + b + radius ** 2)


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

    ValueError unless there is a phone, and a pause at the end.
    """
    phones = [phone for _, _, phone in segments]
    if set(phones) <= {"SIL"} or phones[-1] != "SIL":
        raise ValueError("segments must have a phone and end with SIL, a pause, as "
                         "assign_durations returns them")
    n = int(segments[-1][1] * SAMPLE_RATE) // HOP
    times = (np.arange(n) + 0.5) * HOP / SAMPLE_RATE
    formants = formant_tracks(segments, times, voice, rng)
    tracks = control_tracks(segments, times, voice, rng).astype(np.float32)
    source = glottis(times, accents, tracks[0], tracks[1], voice, rng)
    spectra = stft_frames(source)                                               # (n, 257)
    _, breath, noise, centre, width, nasal, muffle = tracks[..., None]          # each (n, 1)

    # Formants in cascade, bandwidths after Klatt 1980; an open glottis damps F1. Above F3 there
    # is one every c / 2L = 1000 Hz (sound: c = 350 m/s; vocal tract: L = 17.5 cm).
    bandwidths = (60 + 400 * clip(breath, 0, 0.5), 90, 150)
    for k, bandwidth in enumerate(bandwidths):
        bandwidth = np.float32(voice.bandwidth * bandwidth)
        spectra /= antiresonator(formants[:, k:k + 1], bandwidth)
    for frequency in np.arange(3500, 7600 * voice.vocal_tract, 1000):
        spectra /= antiresonator(frequency / voice.vocal_tract, 250 * voice.bandwidth)
    # A nasal pole at 270 Hz, and a zero that moves away from it as the velum opens (Klatt 1980).
    nasal_zero = 270 + nasal * rng.uniform(80, 330)
    spectra *= antiresonator(nasal_zero, 100) / antiresonator(270, 100)
    spectra /= sqrt(1 + (HERTZ / voice.spectral_tilt) ** 2)
    spectra *= exp(-muffle * np.log1p((HERTZ / 400) ** 2))
    rms = sqrt(np.mean(abs(spectra) ** 2, 1))
    loud = np.percentile(rms, 85) or rms.max()          # 0 if more than 85 % is pauses
    spectra /= loud                                     # loud vowels now have power 1

    # Friction: the resonance of the cavity in front of the constriction, with wide skirts.
    distance = (HERTZ * voice.vocal_tract ** 0.7 - centre) / width
    skirt = 1 / (1 + distance ** 2)
    power = np.mean(skirt ** 2, 1, keepdims=True)
    # 0.75 * HOP: the power of white noise in a window
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
    hiss = fft.rfft(rng.standard_normal(n)) * hertz ** -rng.uniform(0, 1)
    noise = fft.irfft(hiss * microphone, n)[:len(audio)]
    noise /= noise.std()
    speech = fft.rfft(audio, n) * fft.rfft(room, n)
    speech = fft.irfft(speech * microphone, n)[:len(audio)]
    speech /= speech.std()
    noise_decibels = -rng.uniform(35, 60)
    mixed = speech + noise * 10 ** (noise_decibels / 20)
    level = -rng.uniform(16, 30)                        # dB relative to full scale
    return clip(mixed * 10 ** (level / 20), -1, 1)


# -----------------------------------------------------------------------------
# face: templates and blendshapes

# In millimetres: x to the subject's left, y up from the eyes, z forward.
MOUTH_Y = -65.0
EYE = np.array([31.0, 0.0, 61.5])               # centre of the left eyeball
EYE_RADIUS = 16.5
HINGE = np.array([0, -12.0, 8.0])               # of the jaw, in front of the ears
JAW_ANGLE = np.radians(13.0)                    # at jaw = 1; the lips are then 22 mm apart
BLINK_SHARE = np.array([0.1, 0.34, 0.7, 0.92, 1, 1])    # of the six rings of a lid, outermost first
# How subjects differ: the arguments of soft_patch, at one standard deviation of each trait.
TRAIT_PATCHES = np.loadtxt("""
    # x0   y0 width height direction
    60    -80  40 35   4    0   0       # jaw width
     0   -102  30 20   0   -5   0       # chin length
     0   -100  28 18   0    0   3       # chin forward
    16    -37   9  9   2.5  0   0       # nose width
     0    -36  16 12   0   -3   0       # nose length
     0    -34  12 14   0    0   3       # tip of the nose
     0     -8   9 14   0    0   2       # bridge of the nose
    32      0  22 18   1.8  0   0       # distance of the eyes
    30     26  30 10   0    2.5 0       # height of the brows
    50    -24  20 18   2.5  0   4       # cheekbones
    26    -65  14 14   2    0   0       # mouth width
    """.splitlines())


def build_face():
    """The mean face, read from face.npz -> a namespace of arrays.

    template    (V, 3) m
    triangles   (F, 3) vertices, counter-clockwise from outside
    colours     (V, 3) red, green, blue in 0..1
    lips, upper_face    vertices: the red of the lips; lids, brows and forehead
    lip_gap     (2,) the inner lips in the middle, upper and lower
    The rest is for apply_blendshapes:
    deltas      (14, V, 3) m, displacement of each blendshape at 1
    jaw_share   (V,) share of the jaw's rotation
    upper, lower        (11,) pairs of vertices that meet when the mouth closes, right to left
    corner      (11,) 1 at the corners of the mouth, 0 in the middle
    near, follow        (n,) vertices around the mouth; (n, 11) their share in closing each pair
    lids, eyeballs      (2, 6, 16), (2, 7, 12) rings of vertices, the left eye first

    The file was computed once by procedural code, which is in the repository's history.
    """
    with np.load(Path(__file__).with_name("face.npz"), allow_pickle=False) as arrays:
        return SimpleNamespace(**arrays)


def soft_patch(points, x0, y0, width, height, *direction):
    """Displacements (V, 3) by `direction` (outwards, up, forward) around (x0, y0) and (-x0, y0)."""
    x, y, z = points.T
    t = clip((z + 20) / 50, 0, 1)
    weight = t ** 2 * (3 - 2 * t)                       # 0 behind the ears, 1 in front
    weight *= exp(-((abs(x) - x0) / width) ** 2 - ((y - y0) / height) ** 2)
    displacement = weight[:, None] * direction
    displacement[:, 0] *= clip(x / 12, -1, 1)           # outwards on both sides
    return displacement


def make_template(face, rng):
    """A subject's template (V, 3) m: the mean face reshaped by random traits."""
    template = 1000 * face.template
    points = template.copy()
    for lid, ball, side in zip(face.lids, face.eyeballs, (1, -1)):
        eye_vertices = np.append(lid[1:], ball)         # lids and eyeball are moved as one point
        points[eye_vertices] = EYE * (side, 1, 1) + (0, 0, EYE_RADIUS)
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
    """Rotate points (T, V, 3) at index (n,) in place, about an axis along x through centre (3,).
    angle (T, n) in radians; positive angles move the front up."""
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
    if template.shape != face.template.shape or weights.shape[1:] != (len(BLENDSHAPES),):
        raise ValueError(f"apply_blendshapes expects template {face.template.shape} and weights "
                         f"(T, {len(BLENDSHAPES)}), found {template.shape} and {weights.shape}; "
                         "templates are those of build_face and make_subject")
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
        angle = BLINK_SHARE[:, None] * (meet - margin)              # (rings, 7)
        angle = amount * angle.ravel()                              # (T, rings * 7)
        rotate(vertices, half.ravel(), eye, angle.astype(np.float32))


# -----------------------------------------------------------------------------
# clips: what a subject does with a sentence

CONTACT = ("close", "tuck")         # the lips touch, or the lower lip touches the teeth


def articulate(segments, times):
    """Weights of LIP_SHAPES at `times` (T,) -> (T, 7) in 0..1.

    Cohen & Massaro 1993: a phone has a target for each blendshape, and a dominance that is full in
    its middle 40 % (contacts and pauses: all of it) and decays exponentially on both sides; the
    weight is the dominance-weighted mean of the targets.
    A closure (P B M) or a lip under the teeth (F V) dominates its neighbours while it is held.
    """
    spans = []                                          # (start, end, a row of PHONES)
    for start, end, name in segments:
        end = release_time(start, end, name)
        middle = 0.45 * start + 0.55 * end if name in GLIDE else end
        spans.append((start, middle, PHONES[name]))
        if name in GLIDE:
            spans.append((middle, end, PHONES[GLIDE[name]]))
    starts, ends, phones = zip(*spans)
    start = np.array(starts)
    end = np.array(ends)
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


def make_gestures(rng):
    """How one subject moves. People blink often at pauses (Nakano & Kitazawa 2010). These clips are
    short and begin and end with a pause, so they have 36 blinks a minute, 32 of them at pauses."""
    return SimpleNamespace(
        lip_amplitude=rng.uniform(0.9, 1.1),        # factor on all lip shapes
        asymmetry=rng.uniform(-0.3, 0.3),           # how much more the left brow moves, relative
        brow_probability=rng.uniform(0.5, 0.9),     # that an accent raises the brows
        blink_rate=rng.uniform(4, 12),              # blinks per minute, besides those at pauses
        idle_amplitude=rng.uniform(0.5, 1.5),       # of slow motions: brows, frown, squint, cheek
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
        phase = (times - time - rng.normal(0, 0.05)) / rng.uniform(0.9, 1.2)
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
    voice: SimpleNamespace          # of make_voice
    gestures: SimpleNamespace       # of make_gestures
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


def draw_sentence(seed, person, sentence):
    """The words of a clip and its voice; with the generator for what is drawn after them."""
    rng = np.random.default_rng([seed, person.number, sentence])
    voice = vary_voice(person.voice, rng)
    return make_sentence(rng), voice, rng


def make_clip(seed, subject, sentence, take=0):
    """A subject speaks a sentence, both by name and number -> audio, vertices, segments, weights.

    audio (samples,) float at 16 kHz; vertices (T, V, 3) float32 m; segments [(start s, end s,
    phone)]; weights (T, 14) of BLENDSHAPES. Each take is a sample of the motion that may go with
    this audio: the weights of LIP_SHAPES differ by a few per cent, the others are drawn anew.
    """
    person = make_subject(seed, subject)
    words, voice, voice_rng = draw_sentence(seed, person, sentence)
    face_rng = np.random.default_rng([seed, person.number, sentence, take])
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


def write_clip(folder, name, seed, subject, sentence):
    """Make one clip and write its wav, its npy and its phones (start s, end s, ARPAbet)."""
    audio, vertices, segments, _ = make_clip(seed, subject, sentence)
    samples = np.round(audio * 32767).astype(np.int16)
    wavfile.write(folder / "wav" / f"{name}.wav", SAMPLE_RATE, samples)
    frames = vertices.reshape(len(vertices), -1)        # (T, V*3)
    np.save(folder / "vertices_npy" / f"{name}.npy", frames)
    lines = [f"{start:.4f}\t{end:.4f}\t{phone}\n" for start, end, phone in segments]
    phones = folder / "phones" / f"{name}.tsv"
    phones.write_text("".join(lines), encoding="utf-8")


def write_data_set(folder, seed, progress):
    """Write all clips, as many at once as there are processors, then the templates and lists."""
    splits = {}
    texts = {}
    jobs = []
    for split, subjects in SUBJECTS.items():
        splits[split] = []
        for subject in subjects:
            for sentence in SENTENCES[split]:
                name = f"{subject}_sentence{sentence:02d}"
                splits[split].append(name)
                jobs.append((folder, name, seed, subject, sentence))
                words, _, _ = draw_sentence(seed, make_subject(seed, subject), sentence)
                text = " ".join(words).replace(" ,", ",")
                texts[name] = text[0].upper() + text[1:] + "."
    with ProcessPoolExecutor() as pool:
        written = pool.map(write_clip, *zip(*jobs), chunksize=5)
        for _ in progress(written, "building the synthetic speakers", total=len(jobs)):
            pass

    templates = {}
    for subject in sum(SUBJECTS.values(), []):
        templates[subject] = make_subject(seed, subject).template.astype(np.float32)
    (folder / "templates.pkl").write_bytes(pickle.dumps(templates))
    face = build_face()
    upper_lid = face.lids[0, 4, 4]                      # the margin's middle, left eye
    lower_lid = face.lids[0, 4, 12]
    brow_motion = face.deltas[BLENDSHAPES.index("brow_left")]           # (V, 3)
    description = {
        "name": "synthetic speakers",
        "seed": seed,
        "fps": FPS,
        "unit": "metre",
        "splits": splits,
        "texts": texts,
        "triangles": face.triangles.tolist(),
        "colours": face.colours.round(3).tolist(),
        "lips": face.lips.tolist(),
        "upper_face": face.upper_face.tolist(),
        "lip_gap": face.lip_gap.tolist(),
        "eye_gap": [int(upper_lid), int(lower_lid)],
        "brow": [int(np.square(brow_motion).sum(axis=1).argmax())],
    }
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def build_speakers(folder, seed=0, progress=lambda clips, text, total: clips):
    """Write the data set into `folder`, which appears under its name only when it is complete.

    progress(clips, text, total) wraps the finished clips, as tqdm does.
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
