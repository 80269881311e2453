"""CodeTalker: speech-driven 3D facial animation with a discrete motion prior (arXiv 2301.02379), from scratch.

One sentence can be spoken with many faces. A network that regresses vertices from audio answers with the mean of
them all, which is dull. CodeTalker first learns a finite dictionary of real facial motion (stage 1), then lets
speech only *choose from it* (stage 2): every frame it makes is decoded from codes that real faces produced.

Map of this file, in the order of the paper
    shared parts   time masks, attention, feed-forward                     used by both stages
    stage 1        MotionEncoder, Quantiser, MotionDecoder, MotionAutoencoder   paper: discrete facial motion space
    audio          log_mel, AudioEncoder; Wav2Vec2                              paper: speech-driven motion synthesis
    stage 2        periodic positions, biased causal mask, frame-aligned cross-attention,
                   CodeTalker: the losses, and free-running generation          paper: speech-driven motion synthesis
    checkpoints    whole, save, load; import_wav2vec2, import_released          the weights of others

The alphabet of shapes
    B batch    T motion frames    V vertices    d model width    H codes per frame ("slots")
    c code width    N codes in the codebook    S audio steps    K speaking styles

Where this differs from the paper, and why; each note stands again at its line. The presets "vocaset" and "biwi" build
the published models: with them [history], [memory], [own], [chance], [start], [norm], [loss] and [audio] are as in
the paper.
    [history]   the transformer is fed the *codes* of the past frames, the paper feeds decoded vertices. Decoding a
                prefix does not give the frames that decoding the whole gives, so the paper's history makes training
                and generation two different functions; with codes they are one, and no decoder runs in the loop.
    [memory]    a frame looks back on 90 frames: three periods, more than a training sequence has. So a second costs
                the same after ten minutes. A longer memory did not help the lips, and stilled the upper face. The
                released code looks back on everything and ends at 600 frames; the presets go on with the last 600.
    [pieces]    what is longer than 600 frames is heard (by wav2vec 2.0), encoded and decoded in pieces that fade into
                each other. InstanceNorm, where there is one, normalises each piece alone.
    [own]       in training a part of the history is the model's own answers instead of the truth. Fed with the truth
                alone it learns to copy the last frame, hardly listens, and drifts as soon as it runs free. The more
                are its own, the better the lips listen, and the duller the upper face.
    [chance]    codes are drawn at random, the likelier the oftener; the paper takes the nearest to the answer. What
                sound does not decide, brows and blinks, is then as lively as in training, instead of the mean of all
                that could have been, and one recording gets as many takes as there are seeds.
    [start]     stage 1 starts from data: its first and last layer from the principal components of real motion, the
                codebook from encoder outputs; dead codes are revived. The paper starts all of it at random, the
                codes in uniform(-1/N, 1/N), and leaves the dead dead; it also trains for hours.
    [norm]      no InstanceNorm by default. It normalises each channel over the whole clip, so the codes of a frame
                depend on all later frames, which a causal transformer cannot know, and a face at rest is magnified.
    [loss]      stage 1 adds the squared error to the paper's L1. L1 alone settles on the median, and the median of a
                muscle that moves in one frame out of ten is no movement: on blendshapes it never leaves it. Stage 2
                asks how likely the real code is, given its distance to the answer (a cross-entropy), instead of for the
                squared distance: the square is least at the mean of all codes that fit, which may be no code at all.
                Its motion loss decodes one sequence in four, to save time.
    [scale]     attention divides by sqrt(d / heads), the released stage 1 by sqrt(d). The former is the usual one;
                the importer puts the rest into the query's weights.
    [position]  no positions in stage 1. The released code adds the same vector to every frame (it indexes the batch
                axis), which is a constant; its transformers know no order, only its convolutions do. The importer
                puts the constant into the bias of the linear layer before.
    [first]     the first frame is fed style alone. The released code does so in generation; in training it adds the
                bias of the history layer. The importer can put that into the styles instead.
    [batch]     batches of any size, with lengths; the released stage 2 stops at a batch of one.
    [audio]     a small convolutional encoder of log-mel bands, trained with the rest; the paper takes wav2vec 2.0.
    [dropout]   where a branch joins the residual stream and nowhere else; the released layers also drop attention
                weights, hidden units and, in wav2vec 2.0, whole layers.
"""
import json
import math
import os
import re
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pad_sequence

# ------------------------------------------------------------------------------------------------ configurations


@dataclass
class VQConfig:
    """Sizes of stage 1. The defaults train on a laptop; the paper's are in PRESETS."""
    vertices: int                   # V; a face without vertices (blendshapes) counts three channels as one
    width: int = 128                # d
    layers: int = 2                 # transformer blocks in the encoder, and as many in the decoder
    heads: int = 4
    hidden: int = 256               # width inside a feed-forward block
    slots: int = 16                 # H
    code_width: int = 8             # c; H * c = d, unless
    code_linear: bool = False       # a linear layer leads to the codes and one from them; the last has no bias (BIWI)
    codes: int = 256                # N
    beta: float = 0.25              # weight of the commitment loss
    instance_norm: bool = False     # [norm] the paper: True
    squared: bool = True            # [loss] the paper: False


@dataclass
class ARConfig:
    """Sizes of stage 2. The defaults train on a laptop; the paper's are in PRESETS."""
    styles: int                     # K, one per training subject
    period: int = 30                # frames after which positions repeat
    width: int = 128                # d
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    mel_bands: int = 64
    squared: bool = False           # [loss] of the feature: cross-entropy of its distances; the paper: True
    motion_weight: float = 2.0      # [loss] of the motion loss; the paper: 1
    motion_every: int = 4           # [loss] one sequence in so many is decoded for it; the paper: 1, each
    audio_layers: int = 4           # residual convolutions at frame rate; each doubles the reach of the last
    target: str = "codes"           # what is asked of the transformer: "codes", "vertices" or "indices"
    history: str = "codes"          # [history] what is fed back; the paper: "motion"
    memory: int = 90                # [memory] frames that a frame looks back on, itself included; the paper: 600
    wav2vec2: dict | None = None    # [audio] its sizes, as in WAV2VEC2_BASE; None: log-mel bands are heard
    audio_steps: int = 1            # k, audio steps that a frame attends to; BIWI 2
    temperature: float = 0.8        # [chance] of the draw among codes; the paper: 0, always the nearest


WAV2VEC2_BASE = {"convs": 512, "width": 768, "layers": 12, "heads": 12, "hidden": 3072}
_PAPER1 = dict(width=1024, layers=6, heads=8, hidden=1536, instance_norm=True, squared=False)
_PAPER2 = dict(width=1024, squared=True, motion_weight=1.0, motion_every=1, history="motion", memory=600,
               wav2vec2=WAV2VEC2_BASE, temperature=0.0)
PRESETS = {                         # fields of VQConfig, fields of ARConfig
    "lite": ({}, {}),
    "vocaset": (dict(slots=16, code_width=64, **_PAPER1), dict(layers=6, **_PAPER2)),
    "biwi": (dict(slots=8, code_width=128, code_linear=True, **_PAPER1), dict(layers=12, audio_steps=2, **_PAPER2)),
}


# -------------------------------------------------------------------------------------- shared parts: time and masks


def inside(lengths, frames):
    """(B, frames) bool: True where a frame belongs to its sequence, False in the padding behind it."""
    return torch.arange(frames, device=lengths.device)[None] < lengths[:, None]


def hold_last(x, lengths):
    """Fill the padding behind each sequence with its last real frame.

    A convolution with replicate padding then sees at the end of a short sequence in a batch exactly what it
    would see if the sequence were alone. x (B, T, channels), lengths (B,) or None; returns the shape of x.
    """
    if lengths is None:
        return x
    last = x[torch.arange(len(x), device=x.device), lengths - 1]        # (B, channels)
    return torch.where(inside(lengths, x.shape[1])[..., None], x, last[:, None])


def masked_mean(x, lengths):
    """Mean over all real frames and all channels of x (B, T, channels)."""
    if lengths is None:
        return x.mean()
    mask = inside(lengths, x.shape[1])[..., None]
    return (x * mask).sum() / (mask.sum() * x.shape[-1])


PIECE, OVERLAP = 600, 60            # frames; what the released code can do, 600 of them, is never cut


def in_pieces(make, frames, lengths=None):
    """[pieces] make(start, stop, lengths) -> (B, stop - start, channels), for all frames, in bounded memory.

    Up to PIECE frames are made at once; of more, pieces, each faded into the next over OVERLAP frames. In a batch, a
    sequence takes from no piece that it would not need alone. lengths (B,) or None; make is given those within it.
    """
    if frames <= PIECE:
        return make(0, frames, lengths)
    for start in range(0, frames - OVERLAP, PIECE - OVERLAP):
        stop = min(start + PIECE, frames)
        piece = make(start, stop, None if lengths is None else (lengths - start).clamp(1, stop - start))
        if start == 0:
            whole = piece.new_empty(len(piece), frames, piece.shape[2])
        else:
            rise = torch.linspace(0, 1, OVERLAP + 2, device=piece.device)[1:-1, None]       # (OVERLAP, 1)
            if lengths is not None:
                rise = rise * (lengths > start + OVERLAP)[:, None, None]                    # (B, OVERLAP, 1)
            before = whole[:, start:start + OVERLAP].clone()
            piece = torch.cat([before + rise * (piece[:, :OVERLAP] - before), piece[:, OVERLAP:]], 1)
        whole[:, start:stop] = piece
    return whole


def padding_bias(lengths, frames):
    """(B, 1, 1, frames): 0 for real keys, -inf for padding; None without lengths. Added to attention scores."""
    if lengths is None:
        return None
    return torch.zeros(len(lengths), 1, 1, frames, device=lengths.device).masked_fill(
        ~inside(lengths, frames)[:, None, None], -math.inf)


class TimeConv(nn.Module):
    """A convolution over time that keeps the length: replicate padding, (B, T, d) in and out."""

    def __init__(self, width_in, width_out, kernel, dilation=1):
        super().__init__()
        self.reach = dilation * (kernel - 1) // 2
        self.conv = nn.Conv1d(width_in, width_out, kernel, dilation=dilation)

    def forward(self, x, lengths=None):
        x = hold_last(x, lengths).transpose(1, 2)                       # (B, T, d) -> (B, d, T)
        x = F.pad(x, (self.reach, self.reach), mode="replicate")
        return self.conv(x).transpose(1, 2)                             # (B, d, T) -> (B, T, d)


# ----------------------------------------------------------------------------------------- shared parts: attention


class Attention(nn.Module):
    """Multi-head attention: softmax(Q K^T / sqrt(d / heads) + bias) V  (Vaswani et al. 2017, section 3.2).

    forward(x, source, bias, cache): x (B, T, d) asks, source (B, S, d) answers (None: x itself); bias broadcasts
    to (B, heads, T, S). cache: a dict that keeps keys and values between calls, so that generation pays for each
    frame once; new ones are appended, and as many of the last are kept as bias has columns.
    """

    def __init__(self, width, heads, qkv_bias=True):
        super().__init__()
        assert width % heads == 0, f"width {width} must be a multiple of the {heads} heads"
        self.heads = heads
        self.query = nn.Linear(width, width, bias=qkv_bias)
        self.key = nn.Linear(width, width, bias=qkv_bias)
        self.value = nn.Linear(width, width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)      # (B, T, d) -> (B, heads, T, d/heads)

    def forward(self, x, source=None, bias=None, cache=None):
        source = x if source is None else source
        if source.shape[-2] == 1 and cache is None:     # the softmax over one is 1, whatever is asked
            return self.out(self.value(source)).expand_as(x)
        query, key, value = self.split(self.query(x)), self.split(self.key(source)), self.split(self.value(source))
        if cache is not None:
            seen = torch.stack([key, value])                            # (2, B, heads, 1, d/heads)
            if cache:
                seen = torch.cat([cache["seen"], seen], -2)[..., -bias.shape[-1]:, :]
            key, value = cache["seen"] = seen
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])     # (B, heads, T, S)  [scale]
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        answer = scores.softmax(-1) @ value                             # (B, heads, T, d/heads)
        return self.out(answer.transpose(-3, -2).flatten(-2))           # (B, T, d)


class FeedForward(nn.Sequential):
    """Linear, activation, Linear, frame by frame."""

    def __init__(self, width, hidden, activation):
        super().__init__(nn.Linear(width, hidden), activation, nn.Linear(hidden, width))


class Block(nn.Module):
    """A pre-norm transformer block of stage 1: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, qkv_bias=False)
        self.feed_forward = FeedForward(width, hidden, nn.GELU(approximate="tanh"))

    def forward(self, x, bias, asking=slice(None)):
        """asking: the frames that are wanted; they still look at all."""
        normed = self.norm1(x)
        x = x[:, asking] + self.attention(normed[:, asking], normed, bias)
        return x + self.feed_forward(self.norm2(x))


# ===================================================================== stage 1: the discrete motion prior


class Temporal(nn.Module):
    """The body that encoder and decoder share: convolution over time, then transformer. (B, T, d) in and out."""

    def __init__(self, config):
        super().__init__()
        self.conv = TimeConv(config.width, config.width, kernel=5)
        self.instance_norm = config.instance_norm
        self.linear = nn.Linear(config.width, config.width)
        # [position] no positions are added: frames are ordered by the convolution alone.
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.hidden) for _ in range(config.layers))

    def forward(self, x, lengths=None, cache=None):
        """cache: a dict, for a sequence that grows frame by frame; only its last frame comes out, (B, 1, d). All that
        leads to it needs all frames all the same, but of the convolution's only the last three are new."""
        if cache:
            new = self.conv(x[:, -5:])[:, -3:]
            felt = torch.cat([cache["felt"][:, :-2], new], 1)[:, -x.shape[1]:]
        else:
            felt = self.conv(x, lengths)
        if cache is not None:
            cache["felt"] = felt
        x = F.leaky_relu(felt, 0.2)
        if self.instance_norm:                                          # [norm]
            x = instance_norm(x, lengths)
        x = self.linear(x)
        bias = padding_bias(lengths, x.shape[1])
        for block in self.blocks[:-1]:
            x = block(x, bias)
        return self.blocks[-1](x, bias, slice(None) if cache is None else slice(-1, None))


def instance_norm(x, lengths=None):
    """InstanceNorm over time, no affine: each channel of each sequence to mean 0, variance 1. x (B, T, d).

    Computed over the real frames only, so that padding changes nothing. A single frame gives zeros.
    """
    mask = torch.ones_like(x[..., :1]) if lengths is None else inside(lengths, x.shape[1])[..., None].to(x.dtype)
    count = mask.sum(1, keepdim=True)                                   # (B, 1, 1)
    centred = x - (x * mask).sum(1, keepdim=True) / count
    variance = (centred.square() * mask).sum(1, keepdim=True) / count
    return centred / (variance + 1e-5).sqrt()


class MotionEncoder(nn.Module):
    """Motion (B, T, V*3) -> code features z_e (B, T, H, c)."""

    def __init__(self, config):
        super().__init__()
        features = config.slots * config.code_width
        assert config.code_linear or features == config.width, \
            f"H * c must equal d: {config.slots} * {config.code_width} is not {config.width}"
        self.slots = config.slots
        self.enter = nn.Linear(config.vertices * 3, config.width)
        self.temporal = Temporal(config)
        self.to_codes = nn.Linear(config.width, features) if config.code_linear else nn.Identity()

    def forward(self, motion, lengths=None):
        x = F.leaky_relu(self.enter(motion), 0.2)                       # (B, T, d)
        x = self.to_codes(self.temporal(x, lengths))                    # (B, T, H*c)
        return x.unflatten(-1, (self.slots, -1))                        # (B, T, H*c) -> (B, T, H, c)


class MotionDecoder(nn.Module):
    """Quantised features z_q (B, T, H, c) -> motion (B, T, V*3)."""

    def __init__(self, config):
        super().__init__()
        features = config.slots * config.code_width
        self.from_codes = nn.Linear(features, config.width) if config.code_linear else nn.Identity()
        self.temporal = Temporal(config)
        self.leave = nn.Linear(config.width, config.vertices * 3, bias=not config.code_linear)

    def forward(self, z_q, lengths=None, cache=None):
        x = self.temporal(self.from_codes(z_q.flatten(-2)), lengths, cache)     # (B, T, H*c) -> (B, T or 1, d)
        return self.leave(x)                                            # (B, T or 1, V*3)


def straight_through(z_e, z_q):
    """The value of z_q, and the gradient of z_e: what arrives at the result goes to z_e unchanged, to z_q nothing."""
    return z_e + (z_q - z_e).detach()


def vq_loss(z_e, z_q, beta, lengths=None):
    """||sg(z_e) - z_q||^2 + beta ||z_e - sg(z_q)||^2, as means over all real frames, slots and channels.

    sg stops the gradient. The first term moves the codes to the features, the second, beta's, keeps the encoder near
    its codes. z_e, z_q (B, T, H, c), lengths (B,) or None -> scalar.
    """
    codebook_loss = masked_mean((z_e.detach() - z_q).square().flatten(2), lengths)
    commitment_loss = masked_mean((z_e - z_q.detach()).square().flatten(2), lengths)
    return codebook_loss + beta * commitment_loss


class Quantiser(nn.Module):
    """The codebook: N vectors of width c; each feature is replaced by its nearest.

    Hand example: the codebook {(0, 0), (1, 1)} and the feature (0.9, 0.6) have squared distances 1.17 and 0.17,
    so the feature becomes code 1, the vector (1, 1).
    """

    def __init__(self, codes, code_width, beta):
        super().__init__()
        self.beta = beta
        self.codebook = nn.Parameter(torch.empty(codes, code_width).uniform_(-1 / codes, 1 / codes))
        self.register_buffer("uses", torch.zeros(codes))                # since the last revival

    def nearest(self, z):
        """Features (..., c) -> indices int64 of the nearest codes, one a row: all leading shapes flattened."""
        z = z.float().flatten(0, -2)                                    # (..., c) -> (rows, c)
        with torch.autocast(z.device.type, enabled=False):              # bfloat16 distances would choose wrongly
            # ||z - e||^2 = ||z||^2 - 2 z.e + ||e||^2, of which the first is the same for all codes
            distance = self.codebook.square().sum(1) - 2 * z @ self.codebook.t()        # (rows, N)
        return distance.argmin(1)

    def forward(self, z_e, lengths=None):
        """z_e (B, T, H, c) -> z_q (B, T, H, c), indices (B, T, H), loss."""
        with torch.autocast(z_e.device.type, enabled=False):
            z_e = z_e.float()
            indices = self.nearest(z_e).view(z_e.shape[:-1])            # (B, T, H)
            z_q = F.embedding(indices, self.codebook)                   # (B, T, H, c)
            loss = vq_loss(z_e, z_q, self.beta, lengths)
            if self.training:
                chosen = indices.flatten()                              # bincount would make a GPU wait
                self.uses.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=self.uses.dtype))
        return straight_through(z_e, z_q), indices, loss

    @torch.no_grad()
    def revive(self, z_e, everything=False):
        """[start] Set the codes unused since the last call to random features of this batch; returns how many.

        everything=True sets all codes: the data-driven start. z_e (B, T, H, c).
        """
        dead = torch.ones_like(self.uses, dtype=torch.bool) if everything else self.uses == 0
        features = z_e.detach().float().flatten(0, -2)                  # (B*T*H, c)
        count = int(dead.sum())
        chosen = torch.randint(len(features), (count,), device=features.device)
        jitter = 0.01 * features.std() * torch.randn(count, features.shape[1], device=features.device)
        self.codebook[dead] = features[chosen] + jitter
        self.uses.zero_()
        return count


class MotionAutoencoder(nn.Module):
    """Stage 1 as a whole: motion -> codes -> motion. Motion is (vertices - template) / scale, (B, T, V*3)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = MotionEncoder(config)
        self.quantiser = Quantiser(config.codes, config.code_width, config.beta)
        self.decoder = MotionDecoder(config)

    def forward(self, motion, lengths=None):
        """Returns reconstruction (B, T, V*3), indices (B, T, H) and the losses {"motion", "vq"}.

        The loss of stage 1 is their sum: L1(M_hat, M) + the quantiser's two terms.
        """
        assert motion.shape[-1] == self.config.vertices * 3, \
            f"motion of {self.config.vertices} vertices expected, found {motion.shape[-1]} channels"
        z_q, indices, vq_loss = self.quantiser(self.encoder(motion, lengths), lengths)
        reconstruction = self.decoder(z_q, lengths)
        error = reconstruction - motion
        motion_loss = masked_mean(error.abs(), lengths)
        if self.config.squared:                                         # [loss]
            motion_loss = motion_loss + masked_mean(error.square(), lengths)
        return reconstruction, indices, {"motion": motion_loss, "vq": vq_loss}

    @torch.no_grad()
    def start_from(self, motion):
        """[start] Set the first and the last layer and the codebook from real motion (B, T, V*3).

        A face has thousands of coordinates and a dozen muscles: both layers start from random mixtures of motion's
        principal components instead of random coordinates.
        """
        flat, width = motion.flatten(0, 1), self.config.width           # (B*T, V*3)
        _, size, directions = torch.svd_lowrank(flat, q=min(width // 2, *flat.shape))   # (k,), (V*3, k)
        size = size / len(flat) ** 0.5                                  # standard deviation of each component
        mix, _ = torch.linalg.qr(torch.randn(width, len(size), device=motion.device))   # (d, k), orthonormal
        self.encoder.enter.weight.copy_(mix @ directions.t() * len(size) ** 0.5 / size.norm())
        unmix = torch.randn_like(mix).t() / width ** 0.5                # (k, d)
        self.decoder.leave.weight.copy_(directions @ unmix * size.norm() / len(size) ** 0.5)
        self.encoder.enter.bias.zero_()
        if self.decoder.leave.bias is not None:
            self.decoder.leave.bias.zero_()
        self.quantiser.revive(self.encoder(motion), everything=True)

    def encode(self, motion, lengths=None):
        """Motion (B, T, V*3) -> codes (B, T, H) int64."""
        z_e = in_pieces(lambda start, stop, within: self.encoder(motion[:, start:stop], within).flatten(2),
                        motion.shape[1], lengths)                       # (B, T, H*c)
        return self.quantiser.nearest(z_e.unflatten(2, (self.config.slots, -1))).view(*z_e.shape[:2], -1)

    def decode(self, indices, lengths=None):
        """Codes (B, T, H) -> motion (B, T, V*3)."""
        return in_pieces(lambda start, stop, within:
                         self.decoder(self.quantiser.codebook[indices[:, start:stop]], within),
                         indices.shape[1], lengths)


# ================================================================================= audio: the front end and the encoder

SAMPLE_RATE = 16_000                # Hz
WINDOW = 400                        # samples, 25 ms: long enough to resolve formants, short enough for a burst
FFT = 512                           # samples; the window is zero-padded to it
STEPS_PER_FRAME = 4                 # audio steps per motion frame: 120 Hz at 30 fps
MEL_LOW, MEL_HIGH = 60.0, 7600.0    # Hz; below is hum, above many recordings hold nothing


def mel_filterbank(bands):
    """(FFT/2 + 1, bands): triangles, evenly spaced on the mel scale m = 2595 log10(1 + f/700) (O'Shaughnessy 1987)."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (MEL_LOW, MEL_HIGH))
    edges = 700 * (10 ** (torch.linspace(low, high, bands + 2) / 2595) - 1)     # Hz; each band: left, peak, right
    frequency = torch.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1)[:, None]
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def speech_level(energy, mel, fps):
    """What log_mel subtracts, (bands,): each band's mean over the recording's speech holds the microphone and the room.

    Speech is what lies within 200 ms of a step less than 30 dB under the loudest, so that long pauses do not count.
    energy and its logarithm mel (steps, bands).
    """
    loudness = energy.sum(1)
    near = round(0.2 * fps * STEPS_PER_FRAME)                           # steps in 200 ms
    loud = (loudness >= 1e-3 * loudness.max()).float()
    speech = F.max_pool1d(loud[None, None], 2 * near + 1, stride=1, padding=near)[0, 0] > 0     # (steps,)
    # A second or more of one loudness is no speech but hum, hiss or nothing at all: what lies 40 dB under speech. The
    # deviation over time of the mean band is 0 to 0.09 for noise of any colour, above 0.3 for speech, 0.15 with as
    # much noise as speech (measured). At its ends a recording may be cut off, which is heard as a click.
    nobody_speaks = len(mel) >= fps * STEPS_PER_FRAME and mel[4:-4].mean(1).std() < 0.12
    return mel[speech].mean(0) + 4.0 * float(nobody_speaks)


def log_mel(audio, fps, frames, bands):
    """What the ear gets: the log energy in mel bands, STEPS_PER_FRAME steps to a motion frame.

    audio (samples,) float in [-1, 1] at 16 kHz -> (frames * STEPS_PER_FRAME, bands) float32. The steps are placed
    on the frames' own grid, whatever the frame rate, so that audio and motion stay aligned to the sample: step s
    looks at the WINDOW samples around the one nearest to (s + 1/2) / (fps * STEPS_PER_FRAME) seconds, half of them
    before it; around the recording is silence. A symmetric Hann window, |FFT|^2, mel_filterbank; log10, energies
    below 1e-8 of the largest, or below 1e-10, raised to that; less speech_level. Raises ValueError for no sound.
    """
    if frames < 1 or len(audio) == 0:
        raise ValueError(f"sound for at least one frame expected, found {len(audio)} samples, {frames} frames")
    steps = frames * STEPS_PER_FRAME
    centre = ((torch.arange(steps) + 0.5) * SAMPLE_RATE / (fps * STEPS_PER_FRAME)).round().long()
    needed = int(centre[-1]) + WINDOW
    audio = F.pad(audio.float(), (WINDOW // 2, max(0, needed - len(audio))))
    window, bank, energy = torch.hann_window(WINDOW, periodic=False), mel_filterbank(bands), []
    for some in centre.split(5000):                                     # spectra are large; bands are not
        spectrum = torch.fft.rfft(audio[some[:, None] + torch.arange(WINDOW)] * window, FFT)    # (steps, FFT/2 + 1)
        energy.append(spectrum.abs().square() @ bank)
    energy = torch.cat(energy)                                          # (steps, bands)
    mel = energy.clamp(min=max(1e-8 * float(energy.max()), 1e-10)).log10()  # digital silence is -80 dB, not -inf
    return mel - speech_level(energy, mel, fps)


def other_voice(mel):
    """Training only: each sequence as from another vocal tract, its mel axis stretched and shifted a little at random.

    mel (B, S, bands), the same out. A longer tract lowers all formants by one factor (Fant 1960), on the mel scale
    nearly a shift; so a few speakers stand for many (vocal-tract length perturbation, Jaitly and Hinton 2013).
    """
    batch, steps, bands = mel.shape
    stretch, shift = 1 + 0.08 * torch.randn(batch, 1), bands / 53 * torch.randn(batch, 1)
    position = (torch.arange(bands) * stretch + shift).clamp(0, bands - 1.001).to(mel.device)       # (B, bands)
    below = position.floor().long()[:, None].expand(-1, steps, -1)
    share = position.frac()[:, None]
    return mel.gather(2, below) * (1 - share) + mel.gather(2, below + 1) * share


class AudioEncoder(nn.Module):
    """[audio] Log-mel steps (B, T * STEPS_PER_FRAME, bands) -> one feature per frame (B, T, d).

    Two convolutions at the audio's rate hear bursts and formant movements; one strided convolution comes down to
    the frame rate; residual convolutions with doubling dilation then look half a second to either side.
    """

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.enter = TimeConv(config.mel_bands, width, kernel=5)
        self.listen = TimeConv(width, width, kernel=5)
        self.to_frames = nn.Linear(STEPS_PER_FRAME * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.audio_layers))
        self.convs = nn.ModuleList(TimeConv(width, width, kernel=3, dilation=2 ** i)
                                   for i in range(config.audio_layers))
        self.mixes = nn.ModuleList(nn.Linear(width, width) for _ in range(config.audio_layers))
        self.dropout = nn.Dropout(config.dropout)
        self.leave = nn.LayerNorm(width)

    def forward(self, mel, lengths=None):
        assert mel.shape[1] % STEPS_PER_FRAME == 0, \
            f"{STEPS_PER_FRAME} audio steps to a frame expected, found {mel.shape[1]} steps"
        steps = None if lengths is None else lengths * STEPS_PER_FRAME
        x = F.gelu(self.enter(mel, steps))                              # (B, S, d)
        x = F.gelu(self.listen(x, steps))
        x = x.unflatten(1, (-1, STEPS_PER_FRAME)).flatten(2)            # (B, S, d) -> (B, T, STEPS_PER_FRAME * d)
        x = self.to_frames(self.dropout(x))                             # (B, T, d)
        for norm, conv, mix in zip(self.norms, self.convs, self.mixes):
            x = x + self.dropout(mix(F.gelu(conv(norm(x), lengths))))
        return self.leave(x)


# ---------------------------------------------------------------------------------- audio, the paper's way: wav2vec 2.0

WAV2VEC2_WINDOW, WAV2VEC2_HOP = 400, 320    # samples: one step hears 25 ms, steps are 20 ms apart: 50 Hz
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)    # of its convolutions; they make up the two above


class Wav2Vec2Layer(nn.Module):
    """A post-norm transformer block: norm(x + attention(x)), then norm(x + feed_forward(x))."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, hidden, nn.GELU())
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class Wav2Vec2(nn.Module):
    """[audio] wav2vec 2.0 (Baevski et al. 2020), base size: convolutions on the waveform, then a transformer.

    It was taught on 960 hours of speech to fill in what was masked, then to spell. The convolutions stay as they are,
    the rest is trained on, as in the paper. One waveform at a time: the norm behind its first convolution runs over
    all of the recording, so a padded batch would hear its padding.
    """

    def __init__(self, convs, width, layers, heads, hidden):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(convs if i else 1, convs, kernel, stride, bias=False)
                                   for i, (kernel, stride) in enumerate(zip(KERNELS, STRIDES)))
        self.conv_norm = nn.GroupNorm(convs, convs)                     # each channel over time: InstanceNorm, affine
        for frozen in (self.convs, self.conv_norm):
            frozen.requires_grad_(False)
        self.project_norm, self.project = nn.LayerNorm(convs), nn.Linear(convs, width)
        self.masked = nn.Parameter(torch.rand(width))                   # stands where a step is masked
        # Positions are relative: a wide grouped convolution over time, its weights as gain * direction.
        self.positions = weight_norm(nn.Conv1d(width, width, 128, padding=64, groups=16), dim=2)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Wav2Vec2Layer(width, heads, hidden) for _ in range(layers))
        self.dropout = nn.Dropout(0.1)

    def forward(self, wave, frames, k):
        """wave (samples,), 16 kHz, mean 0, variance 1 -> (frames * k, width): k steps to each motion frame.

        k = 1: the steps are resampled to the frames, before the transformer. k = 2: they stay at 50 Hz, two to a frame
        at 25 frames per second; surplus steps go, missing ones repeat the last.
        """
        x = F.pad(wave, (0, max(0, WAV2VEC2_WINDOW - len(wave))))[None, None]       # (1, 1, samples)
        with torch.no_grad():
            for i, conv in enumerate(self.convs):
                x = conv(x)
                x = F.gelu(self.conv_norm(x) if i == 0 else x)          # (1, convs, S)
        if k == 1:
            x = F.interpolate(x, size=frames, mode="linear", align_corners=True)
        else:
            x = F.pad(x[..., :frames * k], (0, max(0, frames * k - x.shape[-1])), mode="replicate")
        x = self.dropout(self.project(self.project_norm(x.transpose(1, 2))))        # (1, convs, S) -> (1, S, width)
        if self.training:                                               # SpecAugment: ten steps, here and there
            starts = (torch.rand(1, 1, x.shape[1], device=x.device) < 0.05 / 10).float()
            is_masked = F.max_pool1d(F.pad(starts, (9, 0)), 10, stride=1)[0, 0] > 0
            x = torch.where(is_masked[None, :, None], self.masked.to(x.dtype), x)
        position = self.positions(x.transpose(1, 2))[..., :-1]          # an even kernel gives one step too many
        x = self.dropout(self.norm(x + F.gelu(position).transpose(1, 2)))
        for layer in self.layers:
            x = layer(x)
        return x[0]


def frames_in(samples, fps, config):
    """How many motion frames a recording of so many samples (16 kHz) makes: those whose sound is heard in full."""
    seconds = samples / SAMPLE_RATE
    if config.wav2vec2:
        seconds = ((samples - WAV2VEC2_WINDOW) // WAV2VEC2_HOP + 1) * WAV2VEC2_HOP / SAMPLE_RATE
    return max(1, int(seconds * fps + 1e-6))


def prepare(audio, fps, frames, config):
    """A recording (samples,), 16 kHz, as the model of this ARConfig hears it: log-mel steps (frames * STEPS_PER_FRAME,
    bands), or for wav2vec 2.0 the waveform at mean 0, variance 1, (samples,)."""
    if not config.wav2vec2:
        return log_mel(audio, fps, frames, config.mel_bands)
    return (audio - audio.mean()) / (audio.var(correction=0) + 1e-7).sqrt()


# ===================================================================== stage 2: speech-driven code query


@lru_cache
def periodic_positions(period, width, device="cpu"):
    """Sinusoids that repeat every `period` frames, so that no length is ever out of range (Fan et al. 2022).

    One period of them, (period, width) float32 on `device`; frame t takes row t mod period:
    P[t, 2i] = sin(t / 10000^(2i / width)), P[t, 2i + 1] = the cosine of the same.
    """
    angle = torch.arange(period)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)   # (period, width / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(device)    # sine and cosine interleaved


def causal_bias(frames, period, heads, memory):
    """What frame i may see of frame j, (heads, frames, frames): -slope_h * floor((i - j) / period), and -inf where j
    is after i or `memory` frames before it or more [memory].

    The last period is seen as it is, each one before it a little fainter; the slopes 4^-(h+1) for h = 0, 1, ...
    give every head its own memory (FaceFormer, Fan et al. 2022, after Press et al. 2022).
    """
    back = torch.arange(frames)[:, None] - torch.arange(frames)[None]   # i - j
    slope = 4.0 ** -torch.arange(1, heads + 1)
    bias = -slope[:, None, None] * torch.div(back, period, rounding_mode="floor")
    return bias.masked_fill((back < 0) | (back >= memory), -math.inf)


class DecoderLayer(nn.Module):
    """A post-norm transformer decoder layer: causal self-attention, frame-aligned cross-attention, feed-forward."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.self_attention = Attention(width, config.heads)
        self.cross_attention = Attention(width, config.heads)
        self.feed_forward = FeedForward(width, 2 * width, nn.ReLU())
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, audio, bias, cache=None):
        """x (B, T, d); audio (B, T, k, d): the k audio steps of each frame; bias (heads, T, past and present)."""
        x = self.norm1(x + self.dropout(self.self_attention(x, bias=bias, cache=cache)))
        # Frame t looks at its own k audio steps and at no others: each frame is a little attention of its own,
        # one query over k keys, and the paper's alignment mask need not be built.
        own = self.cross_attention(x.unsqueeze(2), audio).squeeze(2)    # (B, T, 1, d) over (B, T, k, d) -> (B, T, d)
        x = self.norm2(x + self.dropout(own))
        return self.norm3(x + self.dropout(self.feed_forward(x)))


class CodeTalker(nn.Module):
    """Stage 2: an autoregressive transformer that asks the frozen codebook of stage 1 for the next frame."""

    def __init__(self, config, autoencoder):
        super().__init__()
        self.config, self.autoencoder = config, autoencoder.requires_grad_(False).eval()
        stage1 = autoencoder.config
        features = stage1.slots * stage1.code_width                     # H * c
        if config.wav2vec2:
            self.audio_encoder = Wav2Vec2(**config.wav2vec2)
            self.audio_map = nn.Linear(config.wav2vec2["width"], config.width)
        else:
            self.audio_encoder = AudioEncoder(config)
        self.history = nn.Linear(features if config.history == "codes" else stage1.vertices * 3, config.width)
        style = torch.randn(config.styles, config.width)                # on "meta", a division takes PyTorch seconds
        self.style = nn.Parameter(style if style.is_meta else style / math.sqrt(config.width))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        answers = {"codes": features,                                   # the paper: a feature, then its nearest code
                   "vertices": stage1.vertices * 3,                     # no codebook: motion itself, as FaceFormer
                   "indices": stage1.slots * stage1.codes}              # a score for each code: classification
        self.query = nn.Linear(config.width, answers[config.target], bias=False)
        nn.init.zeros_(self.query.weight)                               # as in the paper: start from nothing to say
        self.spread = None                                              # [chance] the logarithm of s^2 in `scores`
        if config.target == "codes" and not config.squared:
            self.spread = nn.Parameter((autoencoder.quantiser.codebook.detach().var() / 4).log())
        self.dropout = nn.Dropout(config.dropout)

    def train(self, mode=True):
        super().train(mode)
        self.autoencoder.eval()                                         # stage 1 stays as it is
        return self

    def listen(self, sound, lengths):
        """Sound as `prepare` gives it -> features (B, T, k, d): k audio steps to each frame.

        Log-mel steps come as one batch (B, T * STEPS_PER_FRAME, bands); waveforms as a list, since wav2vec 2.0 hears
        each alone, and then lengths (B,) must say how many frames each lasts.
        """
        if not self.config.wav2vec2:
            return self.audio_encoder(sound, lengths).unsqueeze(2)      # (B, T, 1, d)
        k = self.config.audio_steps

        def hear(wave, frames):
            def part(start, stop, _):
                samples = wave[len(wave) * start // frames:len(wave) * stop // frames]
                return self.audio_encoder(samples, stop - start, k).view(1, stop - start, -1)   # (1, T, k * width)
            return in_pieces(part, frames)[0]

        features = pad_sequence([hear(wave, int(n)) for wave, n in zip(sound, lengths)], batch_first=True)
        return self.audio_map(features.unflatten(2, (k, -1)))           # (B, T, k * width) -> (B, T, k, d)

    def embed(self, past, style, first=0):
        """The transformer's input for frames first, first + 1, ...: history + style + periodic position.

        past: what is fed back of the frame before each, quantised features (B, T, H*c) or motion (B, T, V*3); style
        (B, K) weights of the training subjects' styles (one-hot, or a mix that sums to 1). Frame 0 has no past and is
        fed style alone.
        """
        x = self.history(past)                                          # [history]
        if first == 0:                                                  # [first]
            x = torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)
        positions = periodic_positions(self.config.period, self.config.width, x.device)     # (period, d)
        row = torch.arange(first, first + past.shape[1], device=x.device) % self.config.period
        return self.dropout(x + (style @ self.style)[:, None] + positions[row])

    def answer(self, fed, style, audio):
        """What the transformer says to a whole history at once: fed (B, T, H*c or V*3), of which frame t sees what is
        before it, style (B, K), audio (B, T, k, d) -> (B, T, H*c, V*3 or H*N), as config.target says."""
        x = self.embed(fed.roll(1, dims=1), style)                      # each frame's predecessor
        bias = causal_bias(x.shape[1], self.config.period, self.config.heads, self.config.memory).to(x.device)
        for layer in self.layers:
            x = layer(x, audio, bias)
        return self.query(x)

    def scores(self, answers):
        """Answers (B, T, H*c or H*N) -> how likely each code is, (B, T, H, N): the logarithm, up to a constant.

        An answer z_hat stands for a cloud of features around it: p(e) ~ exp(-||z_hat - e||^2 / (2 s^2)). The likeliest
        code is the nearest, which is the paper's query; s, which is learned, says how sure the answer is.
        """
        with torch.autocast(answers.device.type, enabled=False):
            answers = answers.float().unflatten(-1, (self.autoencoder.config.slots, -1))    # (B, T, H, c or N)
            if self.config.target == "indices":
                return answers
            # -||z - e||^2 / (2 s^2) = z.e / s^2 - ||e||^2 / (2 s^2), but for ||z||^2, which is the same for all codes
            variance = 1.0 if self.spread is None else self.spread.exp()
            codebook = self.autoencoder.quantiser.codebook
            return F.linear(answers / variance, codebook, -codebook.square().sum(1) / (2 * variance))

    def choose(self, answers, temperature=0.0):
        """Answers (B, T, H*c or H*N) -> codes (B, T, H): at temperature 0 the likeliest; above it they are drawn at
        random, the likelier the oftener, at 1 as often as in the training data [chance]."""
        scores = self.scores(answers)
        if temperature > 0:     # the largest of scores / temperature + Gumbel noise is a draw from their softmax
            scores = scores - temperature * torch.empty_like(scores).exponential_().log()
        return scores.argmax(-1)

    def feed_back(self, answers):
        """Answers to whole sequences -> what the next frames are told of them, (B, T, H*c or V*3)."""
        if self.config.target == "vertices":
            return answers
        codes = self.choose(answers)
        if self.config.history == "codes":
            return self.autoencoder.quantiser.codebook[codes].flatten(2)
        return self.autoencoder.decode(codes)

    def code_losses(self, answers, codes, motion, lengths=None):
        """The losses of the code query, a dict of means over all real frames. answers (B, T, H*c or H*N), and of the
        real motion (B, T, V*3) its codes (B, T, H).

        "feature": the cross-entropy of the real codes given `scores`; or, with config.squared and the target "codes",
        the paper's MSE(z_hat, z_q), the answers against the real codes' vectors  [loss].
        "motion", only with the target "codes": motion_weight * MSE(M_hat, M), where M_hat is decoded from the codes
        nearest to the answers, straight-through; of the sequences 0, motion_every, 2 motion_every ...  [loss].
        """
        if self.config.target == "codes" and self.config.squared:
            z_q = self.autoencoder.quantiser.codebook[codes]                                        # (B, T, H, c)
            feature = (answers.float() - z_q.flatten(2)).square()                                   # (B, T, H*c)
        else:
            scores = self.scores(answers).flatten(0, 2)                                             # (B*T*H, N)
            feature = F.cross_entropy(scores, codes.flatten(), reduction="none").view_as(codes)     # (B, T, H)
        losses = {"feature": masked_mean(feature, lengths)}
        if self.config.target == "codes":
            some = slice(None, None, self.config.motion_every)
            lengths = None if lengths is None else lengths[some]
            z_hat = answers[some].unflatten(-1, codes.shape[2:] + (-1,))                            # (B/4, T, H, c)
            nearest, _, _ = self.autoencoder.quantiser(z_hat)
            error = self.autoencoder.decoder(nearest, lengths) - motion[some]
            losses["motion"] = self.config.motion_weight * masked_mean(error.square(), lengths)
        return losses

    def forward(self, sound, style, codes, motion, lengths=None, own=0.0):
        """All frames are answered at once, given a history; returns the answers (B, T, ...) and the losses.

        sound as for `listen`, style (B, K), codes (B, T, H) of the real motion (B, T, V*3).
        own: share of the history's frames that are the model's own answers instead of the truth [own].
        The losses are those of `code_losses`, or of the target "vertices" {"motion"}, MSE(M_hat, M); the loss of
        stage 2 is their sum.
        """
        batch, frames, _ = codes.shape
        quantiser = self.autoencoder.quantiser
        audio = self.listen(sound, [frames] * batch if lengths is None and self.config.wav2vec2 else lengths)
        assert audio.shape[1] == frames, f"sound for {frames} frames expected, found enough for {audio.shape[1]}"
        fed = motion if self.config.history == "motion" else quantiser.codebook[codes].flatten(2)   # teacher forcing
        if own > 0:
            # The model's own history, all frames at once: what it says when told a history of random codes (or the
            # motion of the batch's previous sequence). Nothing of the truth leaks into it; the frame-by-frame history
            # would take T passes instead of one.
            with torch.no_grad():
                strange = fed.roll(1, dims=0)
                if self.config.history == "codes":
                    strange = quantiser.codebook[torch.randint_like(codes, len(quantiser.codebook))].flatten(2)
                said = self.feed_back(self.answer(strange, style, audio))
            is_own = torch.rand(codes.shape[:2], device=codes.device)[..., None] < own      # (B, T, 1)
            fed = torch.where(is_own, said, fed)
        answers = self.answer(fed, style, audio)
        if self.config.target == "vertices":
            return answers, {"motion": masked_mean((answers.float() - motion).square(), lengths)}
        return answers, self.code_losses(answers, codes, motion, lengths)

    def step(self, t, past, style, audio, bias, caches):
        """What the transformer says to frame t alone, when it has been asked for the frames before it, one by one.

        past (B, 1, H*c or V*3): what is fed back of frame t - 1; style (B, K); audio (B, 1, k, d) of frame t; bias
        (heads, 1, memory): the last row of causal_bias, whose last column is frame t itself, the one before it frame
        t - 1 and so on; caches: a dict for each layer, which it fills -> (B, 1, H*c, V*3 or H*N).
        """
        x = self.embed(past, style, first=t)                            # (B, 1, d)
        for layer, cache in zip(self.layers, caches):
            x = layer(x, audio, bias[..., -t - 1:], cache)              # frame 0 has one column, frame 1 two ...
        return self.query(x)

    @torch.no_grad()
    def generate(self, sound, style, lengths=None, temperature=None, tell=lambda done, frames: None):
        """Free running: each frame is asked from the codes chosen before it. Causal, so padding behind a
        sequence changes nothing before its end. Of the last `memory` frames keys and values are kept, so that a frame
        costs the same however long the sequence is.

        sound as for `listen`, style (B, K) -> motion (B, T, V*3), codes (B, T, H). temperature: as for `choose`
        (None: config.temperature). tell: hears how many frames are done.
        """
        assert not self.training, "generation is for evaluation: call model.eval() first"
        codebook, config = self.autoencoder.quantiser.codebook, self.autoencoder.config
        temperature = self.config.temperature if temperature is None else temperature
        audio = self.listen(sound, lengths)                             # (B, T, k, d)
        batch, frames, device = len(audio), audio.shape[1], audio.device
        memory = min(frames, self.config.memory)
        bias = causal_bias(memory, self.config.period, self.config.heads, memory)[:, -1:].to(device)    # the last row
        caches, felt = [{} for _ in self.layers], {}    # of the frames so far: keys and values; what the decoder felt
        past = torch.zeros(batch, 1, self.history.in_features, device=device)
        codes = torch.empty(batch, frames, config.slots, dtype=torch.long, device=device)
        motion = None
        if self.config.target == "vertices":
            motion = torch.empty(batch, frames, config.vertices * 3, device=device)
        for t in range(frames):
            answers = self.step(t, past, style, audio[:, t:t + 1], bias, caches)        # (B, 1, H*c, V*3 or H*N)
            if self.config.target == "vertices":
                motion[:, t:t + 1] = past = answers
            else:
                codes[:, t:t + 1] = self.choose(answers, temperature)
                if self.config.history == "codes":
                    past = codebook[codes[:, t:t + 1]].flatten(2)       # (B, 1, H*c)
                else:   # The prefix is decoded anew for each frame, since its last frame depends on all of it.
                    prefix = codebook[codes[:, max(0, t + 1 - memory):t + 1]]
                    past = self.autoencoder.decoder(prefix, cache=felt)
            tell(t + 1, frames)
        if motion is None:
            return self.autoencoder.decode(codes, lengths), codes
        return motion, self.autoencoder.encode(motion, lengths)         # the codes that stage 1 would see in it


# ================================================================================================== checkpoints


def why(error):
    """An exception in a few words, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}".removesuffix(": ")


@contextmanager
def whole(path):
    """Give a hidden sibling to write to: it becomes `path` when the block ends well, otherwise it goes. What a killed
    process has left there is written over."""
    path = Path(path)
    part = path.with_name(f".part-{path.name}")             # keeps the ending: writers read the format off it
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path}: it cannot be written, is the disk full? ({why(error)})") from None
    finally:
        part.unlink(missing_ok=True)


def save(path, model, **rest):
    """Write a checkpoint, whole or not at all: configuration, weights, and what else the caller needs to resume."""
    state = {"stage": "ar" if isinstance(model, CodeTalker) else "vq", "weights": model.state_dict(), **rest}
    state["vq_config"] = asdict(model.autoencoder.config if state["stage"] == "ar" else model.config)
    if state["stage"] == "ar":
        state["ar_config"] = asdict(model.config)
    with whole(path) as part:
        try:
            torch.save(state, part)
        except RuntimeError as error:                       # so PyTorch calls a full disk
            raise OSError(error) from None


# A file may come from a stranger. Nothing in it is executed (weights_only), and a short one that claims to be large
# takes no memory: what it holds is measured first, and a model is built without memory ("meta") and then given the
# tensors that are there.


def check_size(path, sizes):
    """Raise ValueError if parts of these sizes (bytes) are more than the file: repeated, compressed or missing."""
    claimed, there = sum(sizes), os.path.getsize(path)
    if claimed > there:
        raise ValueError(f"it claims {claimed} bytes, the file has {there}")


def read_torch(path, device="cpu"):
    """What torch.save wrote; whatever is raised for another file."""
    with open(path, "rb") as file:
        if file.read(2) == b"PK":                           # a zip; PyTorch does not compress its entries
            check_size(path, [entry.file_size for entry in zipfile.ZipFile(file).infolist()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # of an unusual pickle; it is read or it is not
        return torch.load(path, map_location=device, weights_only=True)


def check_config(config, weights):
    """Raise ValueError for a field of a wrong type, a size below 1, a negative share, more layers than weights."""
    types = {field.name: field.type for field in fields(config)}
    for name, value in [*asdict(config).items(), *(getattr(config, "wav2vec2", None) or {}).items()]:
        kind = types.get(name, int)                         # the sizes of wav2vec 2.0 are whole numbers as well
        least, most = int(kind is int), len(weights) if name.endswith("layers") else 2 ** 31
        is_number = kind in (int, float)
        if not isinstance(value, kind) or is_number and (value is True or not least <= value <= most):
            raise ValueError(f"{name} is {value}")


def build(make, weights):
    """The model that make() gives, with these weights, in eval mode; raises an exception if they do not fit."""
    with torch.device("meta"):
        model = make()
    model.load_state_dict({name: tensor.float().contiguous() for name, tensor in weights.items()}, assign=True)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("NaN or infinity among the weights")
    return model.eval()


def load(path, stage, device="cpu"):
    """Read a checkpoint of stage "vq" or "ar"; returns the model in eval mode and the checkpoint's dict.

    Raises ValueError, in one line, when the file is missing, is no checkpoint, or is one of the other stage.
    """
    command = f"python train_{stage}.py"
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such checkpoint; run `{command}` first, or name another")
    try:
        state = read_torch(path, device)
        found, weights, _ = state["stage"], state["weights"], state.setdefault("flags", {}).get("preset")
        check_size(path, [tensor.nbytes for tensor in weights.values()])
        config = VQConfig(**state["vq_config"])
        check_config(config, weights)
        if found == "ar":
            stage2 = ARConfig(**state["ar_config"])
            check_config(stage2, weights)
            model = build(lambda: CodeTalker(stage2, MotionAutoencoder(config)), weights)
        else:
            model = build(lambda: MotionAutoencoder(config), weights)
    except Exception as error:
        raise ValueError(f"{path}: not a whole checkpoint of this project ({why(error)}); "
                         f"`{command}` writes one") from None
    if found != stage:
        raise ValueError(f"{path}: a checkpoint of train_{stage}.py expected, found one of train_{found}.py")
    return model, state


# ------------------------------------------------------------------------------------------- the weights of others


def read_weights(path):
    """The tensors {name: tensor} of a stranger's file, .safetensors or PyTorch's; nothing in it is executed.

    Raises ValueError, in one line, when it is missing or neither.
    """
    try:
        if Path(path).suffix == ".safetensors":     # 8 bytes: length of the header; the header, JSON; the numbers
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                check_size(path, [length])
                header = json.loads(file.read(length))
                numbers = memoryview(file.read())
            header.pop("__metadata__", None)
            parts = {name: numbers[slice(*entry["data_offsets"])] for name, entry in header.items()}
            check_size(path, map(len, parts.values()))
            kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
            return {name: torch.frombuffer(bytearray(part), dtype=kinds[header[name]["dtype"]])
                    .view(header[name]["shape"]).float() for name, part in parts.items()}
        state = read_torch(path)
        state = state.get("state_dict", state)
        check_size(path, [tensor.nbytes for tensor in state.values()])
        return {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of weights; name the one you downloaded") from None
    except Exception as error:
        raise ValueError(f"{path}: a file of weights expected, PyTorch's or .safetensors ({why(error)})") from None


# Their names -> ours: regular expressions, replaced one after another.
WAV2VEC2_NAMES = (
    (r"feature_extractor\.conv_layers\.0\.layer_norm", "conv_norm"),
    (r"feature_extractor\.conv_layers\.(\d)\.conv", r"convs.\1"),
    (r"feature_projection\.layer_norm", "project_norm"),
    (r"feature_projection\.projection", "project"),
    (r"masked_spec_embed", "masked"),
    (r"encoder\.layer_norm", "norm"),
    (r"encoder\.pos_conv_embed\.conv", "positions"),
    (r"weight_g$", "parametrizations.weight.original0"),                # gain and direction, as PyTorch now names them
    (r"weight_v$", "parametrizations.weight.original1"),
    (r"encoder\.layers", "layers"),
    (r"\.final_layer_norm", ".norm2"), (r"\.layer_norm", ".norm1"),
    (r"\.q_proj", ".query"), (r"\.k_proj", ".key"), (r"\.v_proj", ".value"), (r"\.out_proj", ".out"),
    (r"intermediate_dense", "0"), (r"output_dense", "2"),
)
STAGE1_NAMES = (
    (r"quantize\.embedding\.weight", "quantiser.codebook"),
    (r"vertice_mapping\.0", "enter"), (r"vertice_map_reverse", "leave"),
    (r"(squasher|expander)\.0\.0", "temporal.conv.conv"),
    (r"\w+_linear_embedding\.net", "temporal.linear"),
    (r"\w+_linear_embedding_post\.net", "to_codes"), (r"\w+_linear_embedding_pre\.net", "from_codes"),
    # attention and feed-forward count as two: net 0 and 1 are block 0, net 2 and 3 block 1
    (r"\w+_transformer\.net\.(\d+)\.fn", lambda m: f"temporal.blocks.{int(m[1]) // 2}.{int(m[1]) % 2 + 1}"),
    (r"(\d)\.norm", r"norm\1"),
    (r"1\.fn\.to_qkv", "attention.qkv"), (r"1\.fn\.to_out", "attention.out"),
    (r"2\.fn\.l1", "feed_forward.0"), (r"2\.fn\.l2", "feed_forward.2"),
)
STAGE2_NAMES = (
    (r"audio_feature_map", "audio_map"), (r"vertice_map", "history"), (r"feat_map", "query"),
    (r"learnable_style_emb\.weight", "style"),
    (r"transformer_decoder\.layers", "layers"),
    (r"self_attn", "self_attention"), (r"multihead_attn", "cross_attention"),
    (r"in_proj_", "qkv."), (r"out_proj", "out"),
    (r"linear1", "feed_forward.0"), (r"linear2", "feed_forward.2"),
)


def rename(weights, table):
    """{name: tensor} under other names; a tensor that holds query, key and value becomes three."""
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in table:
            name = re.sub(theirs, ours, name)
        parts = zip(("query", "key", "value"), tensor.chunk(3)) if "qkv" in name else [("", tensor)]
        renamed |= {name.replace("qkv", part): rows for part, rows in parts}
    return renamed


def count(weights, pattern):
    """How many layers: as many as different numbers stand for the group in a name's pattern."""
    return len({found[1] for found in (re.match(pattern, name) for name in weights) if found})


def sizes_of_wav2vec2(weights, heads=None):
    """As in WAV2VEC2_BASE, read off weights under our names. They tell nothing of the heads: 64 wide in all that are
    published."""
    width, convs = weights["project.weight"].shape
    return {"convs": convs, "width": width, "layers": count(weights, r"layers\.(\d+)"),
            "heads": heads or max(1, width // 64), "hidden": len(weights["layers.0.feed_forward.0.bias"])}


def import_wav2vec2(path):
    """wav2vec2-base as its authors publish it, pytorch_model.bin or model.safetensors: its sizes and the model.

    Raises ValueError, in one line, for another file. Of a version fine-tuned to spell, the last layer is left out.
    """
    theirs = {name.removeprefix("wav2vec2."): tensor for name, tensor in read_weights(path).items()}
    try:
        weights = rename({name: theirs[name] for name in theirs if not name.startswith("lm_head.")}, WAV2VEC2_NAMES)
        sizes = sizes_of_wav2vec2(weights)
        return sizes, build(lambda: Wav2Vec2(**sizes), weights)
    except Exception as error:
        raise ValueError(f"{path}: the weights of wav2vec2-base expected "
                         f"({why(error)})") from None


def import_released(stage1, stage2, heads=(8, 4, None), trains=False):
    """The authors' checkpoints of both stages, VOCASET's or BIWI's -> CodeTalker in eval mode, for motion in the data's
    own unit. What they do oddly goes into the weights.

    Sizes are read off the weights; heads, of which they tell nothing, are those of stage 1, stage 2 and wav2vec 2.0.
    trains: [first] the first token as in the released training (style + bias) instead of its generation (style).
    Raises ValueError, in one line, for other files.
    """
    path, stage = stage1, 1
    try:
        weights = rename(read_weights(stage1), STAGE1_NAMES)
        width, channels = weights["encoder.enter.weight"].shape
        codes, code_width = weights["quantiser.codebook"].shape
        has_linear = "encoder.to_codes.weight" in weights               # BIWI's
        features = len(weights["encoder.to_codes.weight"]) if has_linear else width     # H*c
        stage1_config = VQConfig(
            channels // 3, width, count(weights, r"encoder\.temporal\.blocks\.(\d+)"), heads[0],
            len(weights["encoder.temporal.blocks.0.feed_forward.0.bias"]), features // code_width, code_width,
            has_linear, codes, instance_norm=True, squared=False)
        for side in ("encoder", "decoder"):
            constant = weights.pop(f"{side}.{side}_pos_embedding.pe").reshape(-1, width)[0]
            weights[f"{side}.temporal.linear.bias"] += constant         # [position]
        for name in weights:
            if name.endswith("query.weight"):
                weights[name] = weights[name] * heads[0] ** -0.5        # [scale] sqrt(d / heads) / sqrt(d)
        weights["quantiser.uses"] = torch.zeros(codes)
        autoencoder = build(lambda: MotionAutoencoder(stage1_config), weights)

        path, stage = stage2, 2
        theirs = read_weights(stage2)
        table = theirs.pop("PPE.pe")[0]                                 # (frames, d); its rows repeat after a period
        period = next((row for row in range(1, len(table)) if torch.equal(table[row], table[0])), len(table))
        audio = rename({name.removeprefix("audio_encoder."): theirs.pop(name) for name in list(theirs)
                        if name.startswith("audio_encoder.")}, WAV2VEC2_NAMES)
        weights = rename(theirs, STAGE2_NAMES)
        styles, width = weights["style"].shape
        if trains:                                                      # [first] the bias moves into every style
            weights["style"] = weights["style"] + weights["history.bias"]
            weights["history.bias"] = torch.zeros(width)
        config = ARConfig(styles, **_PAPER2 | dict(period=period, width=width, heads=heads[1],
                          layers=count(weights, r"layers\.(\d+)"), audio_steps=2 if has_linear else 1,
                          wav2vec2=sizes_of_wav2vec2(audio, heads[2])))
        return build(lambda: CodeTalker(config, MotionAutoencoder(stage1_config)), weights
                     | {f"audio_encoder.{name}": tensor for name, tensor in audio.items()}
                     | {f"autoencoder.{name}": tensor for name, tensor in autoencoder.state_dict().items()})
    except Exception as error:
        raise ValueError(f"{path}: a released checkpoint of stage {stage} expected "
                         f"({why(error)})") from None
