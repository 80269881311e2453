"""
CodeTalker: speech-driven 3D facial animation with a discrete motion prior, in one file.

The same sentence can go with many facial motions. A network trained to regress vertices from audio
predicts their average, which looks over-smoothed. CodeTalker works in two stages:
    stage 1   learn a codebook of facial motion with a VQ autoencoder      MotionAutoencoder
    stage 2   predict the next frame's codes from speech and past codes    CodeTalker

References
1) the paper: https://arxiv.org/abs/2301.02379
2) the authors' code: https://github.com/Doubiiu/CodeTalker
Where this file differs from the paper, a comment or docstring has a name in brackets, such as
[sampling]; README.md explains each under "Differences from the paper". The published models
themselves are in support/published.py.

Shapes: B batch, T motion frames, V vertices, D model dimension, H codes per frame, C code
        dimension, N codebook size, S audio steps (4 per frame), K speaking styles
Names:  code the index of a codebook vector, z_e encoder output, z_q its nearest codebook vectors,
        z_hat what stage 2 predicts for z_q, audio a recording or (B, T, D) the encoder's output
"""
import math
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------- configuration -------------------------------------------------------------------------


@dataclass
class VQConfig:
    """Sizes of stage 1"""
    vertices: int               # V; three blendshape weights count as one vertex
    dim: int = 128              # D, equal to codes_per_frame * code_dim
    layers: int = 2             # transformer blocks in the encoder, and as many in the decoder
    heads: int = 4
    ffn_dim: int = 256
    codes_per_frame: int = 16   # H
    code_dim: int = 8           # C
    codebook_size: int = 256    # N
    beta: float = 0.25          # weight of the commitment loss
    velocity_weight: float = 4.0    # weight of the velocity loss


@dataclass
class ARConfig:
    """Sizes of stage 2"""
    styles: int                 # K, one per training subject
    phones: int = 1             # classes of the phone loss; 1, if the data has no phones
    period: int = 30            # positions repeat after this many frames (one second)
    context: int = 90           # frames that a frame can attend to, itself included [context]
    dim: int = 128              # D
    layers: int = 2
    heads: int = 4
    dropout: float = 0.2
    mel_bands: int = 64
    audio_layers: int = 4       # dilated convolutions in the audio encoder
    motion_weight: float = 2.0  # weight of the motion loss
    motion_loss_every: int = 4  # decode one sequence in four for the motion loss, to save time
    temperature: float = 1.0    # for sampling codes; 0 takes the most likely code


# ---------- building blocks shared by both stages -------------------------------------------------


class TimeConv(nn.Module):
    """1-D convolution over time that keeps the length. (B, T, D_in) -> (B, T, D_out)"""

    def __init__(self, dim_in, dim_out, kernel_size, dilation=1):
        super().__init__()
        self.conv = nn.Conv1d(dim_in, dim_out, kernel_size, dilation=dilation,
                              padding="same", padding_mode="replicate")

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)     # Conv1d wants channels first


class KVCache:
    """Keys and values of the last `size` frames, so that generate() computes each once."""

    def __init__(self, size):
        self.size = size
        self.k = None                       # (B, heads, frames, D/heads)
        self.v = None

    def append(self, k, v):
        if self.k is not None:
            k = torch.cat([self.k, k], dim=2)[:, :, -self.size:]
            v = torch.cat([self.v, v], dim=2)[:, :, -self.size:]
        self.k = k
        self.v = v
        return k, v


class Attention(nn.Module):
    """Multi-head attention, softmax(Q K^T / sqrt(D/heads) + mask) V  (Vaswani et al. 2017).

    Queries come from x, keys and values from source (by default x itself).
    """

    def __init__(self, dim, heads, qkv_bias=True):
        super().__init__()
        assert dim % heads == 0, f"dim {dim} is not a multiple of {heads} heads"
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key = nn.Linear(dim, dim, bias=qkv_bias)
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def split_heads(self, x):
        x = x.unflatten(-1, (self.heads, -1))               # (..., T, heads, D/heads)
        return x.transpose(-3, -2)                          # (..., heads, T, D/heads)

    def forward(self, x, source=None, mask=None, kv_cache=None):
        """x (..., T, D), source (..., J, D), mask (heads, T, J) -> (..., T, D)"""
        if source is None:
            source = x
        q = self.split_heads(self.query(x))                 # (..., heads, T, D/heads)
        k = self.split_heads(self.key(source))              # (..., heads, J, D/heads)
        v = self.split_heads(self.value(source))
        if kv_cache is not None:            # generation: x is one frame, the past is in the cache
            k, v = kv_cache.append(k, v)

        # PyTorch has the following as one function, F.scaled_dot_product_attention.
        # Divide by sqrt(D/heads); the released stage 1 divides by sqrt(D) [scale].
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])   # (..., heads, T, J)
        if mask is not None:
            scores = scores + mask          # -inf where attention is not allowed
        y = scores.softmax(dim=-1) @ v                      # (..., heads, T, D/heads)
        y = y.transpose(-3, -2).flatten(-2)                 # heads side by side again: (..., T, D)
        return self.out(y)


def feed_forward(dim, ffn_dim, activation):
    return nn.Sequential(nn.Linear(dim, ffn_dim), activation, nn.Linear(ffn_dim, dim))


# ---------- stage 1: a VQ autoencoder of facial motion (paper: Discrete Facial Motion Space) ------


class Block(nn.Module):
    """Pre-norm transformer block without a mask: every frame attends to the whole clip."""

    def __init__(self, dim, heads, ffn_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.feed_forward = feed_forward(dim, ffn_dim, nn.GELU(approximate="tanh"))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class TemporalBackbone(nn.Module):
    """Convolution over time, then a transformer. (B, T, D) -> (B, T, D)

    Encoder and decoder have one each, with weights of their own. There is no positional encoding:
    only the convolution makes the order of frames matter [position].
    """

    def __init__(self, config):
        super().__init__()
        self.conv = TimeConv(config.dim, config.dim, kernel_size=5)
        self.norm = nn.Identity()           # the paper: InstanceNorm over time [norm]
        self.linear = nn.Linear(config.dim, config.dim)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.ffn_dim) for _ in range(config.layers))

    def forward(self, x):
        x = F.leaky_relu(self.conv(x), 0.2)
        x = self.linear(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class MotionEncoder(nn.Module):
    """Motion (B, T, V*3) -> z_e (B, T, H, C)"""

    def __init__(self, config):
        super().__init__()
        self.codes_per_frame = config.codes_per_frame
        self.in_proj = nn.Linear(config.vertices * 3, config.dim)
        self.backbone = TemporalBackbone(config)

    def forward(self, motion):
        x = F.leaky_relu(self.in_proj(motion), 0.2)         # (B, T, D)
        x = self.backbone(x)
        return x.unflatten(-1, (self.codes_per_frame, -1))  # (B, T, D) -> (B, T, H, C); D = H*C


class MotionDecoder(nn.Module):
    """z_q (B, T, H, C) -> motion (B, T, V*3)"""

    def __init__(self, config):
        super().__init__()
        self.backbone = TemporalBackbone(config)
        self.out_proj = nn.Linear(config.dim, config.vertices * 3)

    def forward(self, z_q):
        x = self.backbone(z_q.flatten(-2))                  # (B, T, H, C) -> (B, T, D)
        return self.out_proj(x)


def straight_through(z_e, z_q):
    """Forward: the value of z_q. Backward: the gradient goes to z_e, as without quantisation."""
    return z_e + (z_q - z_e).detach()


def vq_loss(z_e, z_q, beta):
    """||sg(z_e) - z_q||^2 + beta ||z_e - sg(z_q)||^2, where sg stops the gradient.

    Both squares are means over all numbers, as F.mse_loss takes them.
    """
    codebook_loss = F.mse_loss(z_q, z_e.detach())           # moves the codebook
    commitment_loss = F.mse_loss(z_e, z_q.detach())         # moves the encoder
    return codebook_loss + beta * commitment_loss


class Quantiser(nn.Module):
    """The codebook: N vectors of dimension C. Every encoder output is replaced by the nearest one.

    Example: codebook [(0, 0), (1, 1)] and vector (0.9, 0.6). The squared distances are 1.17 and
    0.17, so the code is 1 and the quantised vector (1, 1).
    """

    def __init__(self, codebook_size, code_dim, beta):
        super().__init__()
        self.beta = beta
        bound = 1 / codebook_size
        self.codebook = nn.Parameter(torch.empty(codebook_size, code_dim).uniform_(-bound, bound))
        self.register_buffer("usage", torch.zeros(codebook_size))   # times each was taken

    def nearest(self, z):
        """z (..., C) -> codes (...): for each vector, the index of the nearest codebook vector."""
        # ||z - e||^2 = ||z||^2 - 2 z.e + ||e||^2; the first term is left out: it is the same for
        # all codes
        relative = self.codebook.square().sum(dim=1) - 2 * z @ self.codebook.t()    # (..., N)
        return relative.argmin(dim=-1)

    def forward(self, z_e):
        """z_e (B, T, H, C) -> z_q (B, T, H, C), codes (B, T, H), loss"""
        codes = self.nearest(z_e)
        z_q = self.codebook[codes]
        loss = vq_loss(z_e, z_q, self.beta)
        if self.training:
            # like torch.bincount, for which the CPU would have to wait for the GPU
            self.usage.index_add_(0, codes.flatten(), self.usage.new_ones(codes.numel()))
        return straight_through(z_e, z_q), codes, loss

    @torch.no_grad()
    def reset_codes(self, which, z_e):
        """Overwrite the codebook vectors where `which` (N,) is True with noisy encoder outputs."""
        candidates = z_e.flatten(0, -2)                     # (B, T, H, C) -> (B*T*H, C)
        chosen = torch.randint(len(candidates), (int(which.sum()),), device=z_e.device)
        vectors = candidates[chosen]
        noise = 0.01 * candidates.std() * torch.randn_like(vectors)
        self.codebook[which] = vectors + noise
        self.usage.zero_()

    def reset_dead_codes(self, z_e):
        """Overwrite the vectors whose codes were not used since the last reset [init]."""
        self.reset_codes(self.usage == 0, z_e)


class MotionAutoencoder(nn.Module):
    """Stage 1. Motion is (vertices - face at rest) / scale, flattened to (B, T, V*3)."""
    Config = VQConfig                       # load() rebuilds the model from it

    def __init__(self, config):
        super().__init__()
        assert config.dim == config.codes_per_frame * config.code_dim, "D must be H * C"
        self.config = config
        self.encoder = MotionEncoder(config)
        self.quantiser = Quantiser(config.codebook_size, config.code_dim, config.beta)
        self.decoder = MotionDecoder(config)

    def forward(self, motion):
        """motion (B, T, V*3) -> reconstruction (B, T, V*3), codes (B, T, H), dict of losses"""
        z_e = self.encoder(motion)                          # (B, T, H, C)
        z_q, codes, loss_vq = self.quantiser(z_e)
        reconstruction = self.decoder(z_q)                  # (B, T, V*3)
        loss_rec = self.reconstruction_loss(reconstruction, motion)
        return reconstruction, codes, {"reconstruction": loss_rec, "vq": loss_vq}

    def reconstruction_loss(self, reconstruction, motion):
        # The paper has L1 alone. Its minimum is the median, "no movement" for a muscle that moves
        # in one frame of ten. The squared error does not ignore such muscles. A squared error of
        # frame differences (VOCA, Cudeiro et al. 2019) keeps lips fast and a face at rest still
        # [loss].
        position = F.l1_loss(reconstruction, motion) + F.mse_loss(reconstruction, motion)
        velocity = F.mse_loss(reconstruction.diff(dim=1), motion.diff(dim=1))
        return position + self.config.velocity_weight * velocity

    @torch.no_grad()
    def init_from_data(self, motion):
        """Start from real motion (B, T, V*3), so that a minute of training is enough [init].

        A face has thousands of coordinates but few muscles. The first and the last layer start as
        random mixtures of the strongest directions of motion (singular vectors), the codebook as
        encoder outputs.
        """
        flat = motion.flatten(0, 1)                         # (B*T, V*3)
        k = min(self.config.dim // 2, *flat.shape)
        _, sigma, directions = torch.svd_lowrank(flat, q=k)     # (k,), (V*3, k)
        gain = sigma.norm() / math.sqrt(k * len(flat))      # root mean square along one direction
        random = torch.randn(self.config.dim, k, device=motion.device)
        mix_in, _ = torch.linalg.qr(random)                 # (D, k), orthonormal columns
        self.encoder.in_proj.weight.copy_(mix_in @ directions.t() / gain)
        self.encoder.in_proj.bias.zero_()
        # another random mixture, not the inverse: the layers in between are random, too
        mix_out = torch.randn_like(mix_in) / math.sqrt(self.config.dim)
        self.decoder.out_proj.weight.copy_(directions @ mix_out.t() * gain)
        self.decoder.out_proj.bias.zero_()
        every_code = torch.ones_like(self.quantiser.usage, dtype=torch.bool)
        self.quantiser.reset_codes(every_code, self.encoder(motion))

    def encode(self, motion):
        """(B, T, V*3) -> codes (B, T, H)"""
        return self.quantiser.nearest(self.encoder(motion))

    def decode(self, codes):
        """codes (B, T, H) -> motion (B, T, V*3)"""
        return self.decoder(self.quantiser.codebook[codes])


# ---------- audio: log-mel spectrogram and convolutional encoder (paper: wav2vec 2.0) [audio] -----

SAMPLE_RATE = 16_000        # Hz
N_FFT = 512                 # samples; the window is zero-padded to this length
WIN_LENGTH = 400            # samples: 25 ms
STEPS_PER_FRAME = 4         # audio steps per motion frame: 120 a second at 30 fps
F_MIN = 60.0                # Hz; below is hum
F_MAX = 7600.0              # Hz; many recordings have nothing above


def mel_filterbank(bands):
    """Triangular filters, evenly spaced on the mel scale m = 2595 log10(1 + f/700). (257, bands)"""
    mel_min = 2595 * math.log10(1 + F_MIN / 700)
    mel_max = 2595 * math.log10(1 + F_MAX / 700)
    edges = torch.linspace(mel_min, mel_max, bands + 2)     # mel: left, centre, right of each band
    edges = 700 * (10 ** (edges / 2595) - 1)                # Hz
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    freq = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)[:, None]
    rising = (freq - left) / (centre - left)
    falling = (right - freq) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0)


def log_mel(audio, fps, frames, bands):
    """Audio (samples,) in [-1, 1] at 16 kHz -> log-mel spectrogram (frames * 4, bands), float32.

    Values are log10 of power, less noise, relative to each band's mean over speech.
    Step s is centred on (s + 1/2) / (4 fps) seconds, so audio and motion stay aligned. At 30 fps
    steps are no whole number of samples apart, so windows are cut out by index, not by torch.stft.
    Raises ValueError if there is no audio.
    """
    if frames < 1 or len(audio) == 0:
        raise ValueError(f"audio for at least one frame expected, found {len(audio)} samples")
    step = torch.arange(frames * STEPS_PER_FRAME)
    centre = ((step + 0.5) * SAMPLE_RATE / (fps * STEPS_PER_FRAME)).round().long()

    # Windows of WIN_LENGTH samples around each centre; zeros beyond the recording's ends. As half a
    # window is padded on the left, the window around sample c starts at padded[c].
    half = WIN_LENGTH // 2
    missing = int(centre[-1]) + half - len(audio)
    padded = F.pad(audio.float(), (half, max(0, missing)))
    windows = padded[centre[:, None] + torch.arange(WIN_LENGTH)]        # (steps, WIN_LENGTH)

    windows = windows * torch.hann_window(WIN_LENGTH, periodic=False)
    spectrum = torch.fft.rfft(windows, N_FFT)                           # (steps, N_FFT/2 + 1)
    power = spectrum.abs().square() @ mel_filterbank(bands)             # (steps, bands)
    floor = max(1e-8 * float(power.max()), 1e-10)           # 80 dB below the loudest
    loudness = power.sum(dim=1)                             # (steps,)
    # mean of 5 steps and 3 bands
    smooth = F.avg_pool2d(power[None], (5, 3), 1, padding=(2, 1), count_include_pad=False)[0]
    smooth = smooth.clamp(min=floor)
    is_noise = find_noise(smooth.log10(), loudness, fps)

    # Subtract the noise below speech (Boll 1979): in each band 1.5 times the power that 19 steps of
    # 20 exceed. A band falls by 15 dB at most. In less than a second all steps may be speech.
    if frames >= fps:
        noise = 1.5 * smooth.kthvalue(1 + len(smooth) // 20, dim=0).values      # (bands,)
        power = power * (1 - noise / smooth).clamp(min=0.03)
    mel = power.clamp(min=floor).log10()

    # Subtract each band's mean over speech: the steps within 30 dB of the loudest that are no noise
    # (unless all are), and 200 ms around them. This removes loudness and the frequency response of
    # microphone and room.
    is_loud = (loudness >= 1e-3 * loudness.max()) & (~is_noise | is_noise.all())
    around = round(0.2 * fps * STEPS_PER_FRAME)
    speech = F.max_pool1d(is_loud[None].float(), 2 * around + 1, stride=1, padding=around)[0] > 0
    mel = mel - mel[speech].mean(dim=0)
    return torch.where(is_noise[:, None], mel.clamp(max=-2.5), mel)     # 25 dB below speech


def find_noise(mel, loudness, fps):
    """The steps of noise that is steady for 0.3 s: mel (steps, bands), loudness (steps,) -> bool.

    Steady: the mean of the lower half of the bands and that of the upper half both have a standard
    deviation below 0.1 (1 dB). So does one in 1000 stretches of speech, a held vowel (measured), so
    noise must also be 10 dB below the steps that are not steady. If those are all within 8 steps of
    the ends (clicks), everything is noise.
    """
    window = round(0.3 * fps * STEPS_PER_FRAME)
    if len(mel) < window:                                   # too short to say
        return torch.zeros(len(mel), dtype=torch.bool)
    halves = torch.stack([half.mean(dim=1) for half in mel.chunk(2, dim=1)])    # (2, steps)
    is_steady = (halves.unfold(1, window, 1).std(dim=2) < 0.1).all(dim=0)   # one per window
    padded = F.pad(is_steady[None].float(), (window - 1, window - 1))
    steady = F.max_pool1d(padded, window, stride=1)[0] > 0  # every step of a steady window
    if steady[8:-8].all():
        return torch.ones_like(steady)
    return steady & (loudness < 0.1 * loudness[~steady].quantile(0.95))


def perturb_vocal_tract(mel):
    """Training only: sequences (B, S, bands) as if from other speakers (Jaitly and Hinton 2013).

    A longer vocal tract lowers all formants by one factor, nearly a shift on the mel scale. So each
    sequence is stretched and shifted a little along the mel axis, by linear interpolation.
    """
    batch, steps, bands = mel.shape
    stretch = 1 + 0.08 * torch.randn(batch, 1, device=mel.device)
    shift = bands / 53 * torch.randn(batch, 1, device=mel.device)       # about 50 mel
    position = torch.arange(bands, device=mel.device) * stretch + shift
    position = position.clamp(0, bands - 1.001)             # (B, bands); lower + 1 must exist
    lower = position.long()
    weight = (position - lower)[:, None]                    # (B, 1, bands)
    lower = lower[:, None].expand(-1, steps, -1)            # (B, S, bands)
    return (1 - weight) * mel.gather(2, lower) + weight * mel.gather(2, lower + 1)


class AudioEncoder(nn.Module):
    """Log-mel spectrogram (B, 4 * T, bands) -> one feature vector per motion frame (B, T, D)

    Two convolutions over audio steps, a linear layer down to the frame rate, then residual dilated
    convolutions: the receptive field doubles with each, to half a second on either side.
    """

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.conv1 = TimeConv(config.mel_bands, dim, kernel_size=5)
        self.conv2 = TimeConv(dim, dim, kernel_size=5)
        self.to_frames = nn.Linear(STEPS_PER_FRAME * dim, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), TimeConv(dim, dim, kernel_size=3, dilation=2 ** i),
                          nn.GELU(), nn.Linear(dim, dim), nn.Dropout(config.dropout))
            for i in range(config.audio_layers))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, mel):
        x = F.gelu(self.conv1(mel))                         # (B, S, D)
        x = F.gelu(self.conv2(x))
        x = x.unflatten(1, (-1, STEPS_PER_FRAME)).flatten(2)    # (B, T, 4*D): 4 steps side by side
        x = self.to_frames(self.dropout(x))                 # (B, T, D)
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


# ---------- stage 2: an autoregressive transformer over codes (Speech-Driven Motion Synthesis) ----


def periodic_positions(period, dim):
    """Sinusoidal positions (period, dim) that repeat, so no sequence is too long (FaceFormer,
    Fan et al. 2022).

    P[t, 2i] = sin(t / 10000^(2i/dim)), P[t, 2i + 1] = cos(t / 10000^(2i/dim))
    """
    t = torch.arange(period)[:, None]
    angle = t / 10_000 ** (torch.arange(0, dim, 2) / dim)               # (period, dim/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)   # sin, cos, sin, cos, ...


def causal_mask(frames, period, heads, context, device=None):
    """FaceFormer's biased causal mask, (heads, frames, frames), added to the attention scores.

    -inf for the future and for frames `context` or more back. Otherwise, for frame i that attends
    to frame j, -slope * floor((i - j) / period): 0 within the last period, a little less for each
    period further back. Head h = 1, 2, ... has the slope 4^-h (ALiBi's, Press et al. 2022, for
    four heads).
    """
    t = torch.arange(frames, device=device)
    back = t[:, None] - t[None, :]                          # i - j: how far frame j lies back
    slopes = 4.0 ** -torch.arange(1, heads + 1, device=device)      # ALiBi's, for four heads
    mask = -slopes[:, None, None] * (back // period)
    hidden = (back < 0) | (back >= context)
    return mask.masked_fill(hidden, -math.inf)


class DecoderLayer(nn.Module):
    """Post-norm transformer decoder layer: self-attention, attention to the audio, feed-forward.

    Dropout is on the residual branches alone [dropout].
    """

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.self_attention = Attention(dim, config.heads)
        self.cross_attention = Attention(dim, config.heads)
        self.feed_forward = feed_forward(dim, 2 * dim, nn.ReLU())
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, audio, mask=None, kv_cache=None):
        """x (B, T, D), audio (B, T, D), mask (heads, T, frames attended to) -> (B, T, D)"""
        y = self.self_attention(x, mask=mask, kv_cache=kv_cache)
        x = self.norm1(x + self.dropout(y))
        y = self.attend_to_audio(x, audio)
        x = self.norm2(x + self.dropout(y))
        y = self.feed_forward(x)
        return self.norm3(x + self.dropout(y))

    def attend_to_audio(self, x, audio):
        # Frame t attends to the audio feature of frame t and to no other. The softmax over a single
        # score is 1, so of the cross-attention only value and output projection remain. (The
        # published BIWI model attends to two audio steps: there x, query and key are needed.)
        return self.cross_attention.out(self.cross_attention.value(audio))


class CodeTalker(nn.Module):
    """Stage 2: predicts each frame's codes from speech and from the codes of the frames before it.

    The paper feeds back decoded motion; here the codes themselves are fed back [history].
    """
    Config = ARConfig

    def __init__(self, config, autoencoder):
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder.requires_grad_(False).eval()         # stage 1 is frozen
        feature_dim = autoencoder.config.codes_per_frame * autoencoder.config.code_dim      # H*C
        self.audio_encoder = AudioEncoder(config)
        self.phone_head = nn.Linear(config.dim, config.phones)
        self.in_proj = nn.Linear(feature_dim, config.dim)
        self.style = nn.Parameter(torch.randn(config.styles, config.dim) / math.sqrt(config.dim))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.head = nn.Linear(config.dim, feature_dim, bias=False)
        nn.init.zeros_(self.head.weight)                    # z_hat starts at 0, as in their code
        codebook_variance = autoencoder.quantiser.codebook.detach().var()
        self.log_var = nn.Parameter((codebook_variance / 4).log())      # see logits(); 4: by trial
        self.dropout = nn.Dropout(config.dropout)
        positions = periodic_positions(config.period, config.dim)
        self.register_buffer("positions", positions, persistent=False)      # (period, D)

    def train(self, mode=True):
        super().train(mode)
        self.autoencoder.eval()                             # motion_loss() must not count usage
        return self

    # The published models override the next two: they have wav2vec 2.0.

    def preprocess_audio(self, audio, fps, frames):
        """A recording (samples,) -> the input of encode_audio(), (frames * 4, mel_bands)"""
        return log_mel(audio, fps, frames, self.config.mel_bands)

    def encode_audio(self, mel):
        """(B, S, mel_bands) -> audio features (B, T, D)"""
        return self.audio_encoder(mel)

    def code_vectors(self, codes):
        """codes (B, T, H) -> their codebook vectors side by side (B, T, H*C)"""
        return self.autoencoder.quantiser.codebook[codes].flatten(2)

    def embed(self, prev, style, start=0):
        """Input of frames start, start + 1, ...: previous frame + style + position. (B, T, D)

        prev (B, T, H*C): code vectors of each frame's predecessor; style (B, K): weights of styles.
        """
        x = self.in_proj(prev)                              # (B, T, D)
        if start == 0:
            x[:, 0] = 0                     # no previous frame: not even in_proj's bias [first]
        t = torch.arange(start, start + prev.shape[1], device=x.device)
        positions = self.positions[t % self.config.period]  # (T, D)
        style_vector = style @ self.style                   # (B, K) @ (K, D) -> (B, D)
        return self.dropout(x + style_vector[:, None] + positions)

    def predict(self, past, style, audio):
        """Teacher forcing: all frames in one pass; frame t sees the past up to frame t - 1.

        past (B, T, H*C) code vectors, style (B, K), audio (B, T, D) -> z_hat (B, T, H*C)
        """
        config = self.config
        prev = F.pad(past[:, :-1], (0, 0, 1, 0))            # one frame later, zeros in front
        x = self.embed(prev, style)
        mask = causal_mask(x.shape[1], config.period, config.heads, config.context, x.device)
        for layer in self.layers:
            x = layer(x, audio, mask)
        return self.head(x)

    def logits(self, z_hat):
        """z_hat (B, T, H*C) -> log-probability of every code, up to a constant (B, T, H, N)

        A Gaussian around z_hat with a learnt variance, log p(e) = -||z_hat - e||^2 / (2 var). The
        most likely code is the nearest one, which is the paper's code query [sampling].
        """
        codes_per_frame = self.autoencoder.config.codes_per_frame
        z_hat = z_hat.unflatten(-1, (codes_per_frame, -1))  # (B, T, H*C) -> (B, T, H, C)
        codebook = self.autoencoder.quantiser.codebook      # (N, C)
        # -||z_hat - e||^2 / 2 = z_hat.e - ||e||^2 / 2 + a term that is the same for all codes: a
        # linear layer whose weights are the codebook
        var = self.log_var.exp()
        return F.linear(z_hat / var, codebook, -codebook.square().sum(dim=1) / (2 * var))

    def sample(self, logits, temperature):
        """logits (B, T, H, N) -> codes (B, T, H); the most likely ones at temperature 0"""
        if temperature == 0:
            return logits.argmax(dim=-1)
        # inverse transform sampling; torch.multinomial does the same, ten times more slowly
        cumulative = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)      # (B, T, H, N)
        threshold = cumulative[..., -1:] * torch.rand_like(cumulative[..., :1])
        return torch.searchsorted(cumulative, threshold).squeeze(-1)

    def forward(self, mel, style, codes, motion, phones, sampling_prob=0.0):
        """A dict of losses, to be added.

        Inputs: mel (B, S, mel_bands), style (B, K). Targets: codes (B, T, H), motion (B, T, V*3),
        phones (B, T) in 0 ... config.phones - 1.
        """
        audio = self.encode_audio(mel)                      # (B, T, D)
        past_codes = self.scheduled_sampling(codes, style, audio, sampling_prob)
        z_hat = self.predict(self.code_vectors(past_codes), style, audio)   # (B, T, H*C)

        # sequences 0, 4, ... are among those that scheduled_sampling() changes
        every = self.config.motion_loss_every
        loss_motion = self.motion_loss(z_hat[::every], motion[::every])
        return {"code": self.code_loss(z_hat, codes),
                "motion": self.config.motion_weight * loss_motion,
                "phone": self.phone_loss(audio, phones)}

    @torch.no_grad()
    def scheduled_sampling(self, codes, style, audio, sampling_prob):
        """Codes (B, T, H) in which the model's own samples replace a share of the frames.

        With the ground truth alone as the past the model relies on it more than on the audio, and
        at inference its own errors add up (Bengio et al. 2015) [scheduled].
        Only every second sequence is changed: the others teach how a motion goes on that is not
        determined by the audio, such as a blink.
        """
        if sampling_prob == 0:
            return codes
        # The first of two passes (Mihaylova and Martins 2019): samples given the past. forward()
        # makes the second, in which some of them are the past. Here a quarter of the past is random
        # codes, so that the samples depend on the audio, too.
        half = codes[::2]                                   # (B/2, T, H)
        random_codes = torch.randint_like(half, self.autoencoder.config.codebook_size)
        is_random = torch.rand(half.shape[:2], device=codes.device) < 0.25
        past_codes = torch.where(is_random[..., None], random_codes, half)
        z_hat = self.predict(self.code_vectors(past_codes), style[::2], audio[::2])
        own_codes = self.sample(self.logits(z_hat), temperature=1.0)        # (B/2, T, H)
        use_own = torch.rand(half.shape[:2], device=codes.device) < sampling_prob
        mixed = codes.clone()
        mixed[::2] = torch.where(use_own[..., None], own_codes, half)
        return mixed

    def code_loss(self, z_hat, codes):
        """Cross-entropy of the true codes (B, T, H), given z_hat (B, T, H*C).

        The paper takes MSE(z_hat, z_q) instead [loss]. Its minimum is the mean of all plausible
        z_q, which may be far from any codebook vector.
        """
        logits = self.logits(z_hat).flatten(0, 2)           # (B, T, H, N) -> (B*T*H, N)
        return F.cross_entropy(logits, codes.flatten())

    def motion_loss(self, z_hat, motion):
        """MSE between motion (B, T, V*3) and the motion decoded from the codes nearest to z_hat.

        z_hat (B, T, H*C). The gradient goes straight through the quantiser to z_hat.
        """
        codes_per_frame = self.autoencoder.config.codes_per_frame
        z_hat = z_hat.unflatten(-1, (codes_per_frame, -1))  # (B, T, H*C) -> (B, T, H, C)
        z_q, _, _ = self.autoencoder.quantiser(z_hat)
        return F.mse_loss(self.autoencoder.decoder(z_q), motion)

    def phone_loss(self, audio, phones):
        """Cross-entropy of the phones (B, T), given audio features (B, T, D) [phones].

        An encoder that must tell phones apart learns speech in fewer steps than from motion alone,
        which hardly shows what the tongue does.
        """
        logits = self.phone_head(audio).flatten(0, 1)       # (B, T, phones) -> (B*T, phones)
        return F.cross_entropy(logits, phones.flatten())

    @torch.no_grad()
    def generate(self, audio, style, temperature=None, progress=iter):
        """Free-running generation: audio (B, T, D), style (B, K) -> codes (B, T, H)

        Every frame is predicted from the codes sampled before it. temperature None stands for
        config.temperature; progress wraps the range of frames, as tqdm does (iter: no output).
        """
        assert not self.training, "call model.eval() first"
        config = self.config
        if temperature is None:
            temperature = config.temperature
        context = config.context
        mask = causal_mask(context, config.period, config.heads, context, audio.device)
        mask = mask[:, -1:]                 # the last row: of the newest frame, (heads, 1, context)
        caches = [KVCache(context) for _ in self.layers]
        prev = torch.zeros(len(audio), 1, self.in_proj.in_features, device=audio.device)
        codes = []
        for t in progress(range(audio.shape[1])):
            x = self.embed(prev, style, start=t)            # (B, 1, D)
            seen = min(t + 1, context)                      # frames in a cache, this one included
            for layer, cache in zip(self.layers, caches):
                x = layer(x, audio[:, t:t + 1], mask[..., -seen:], cache)
            logits = self.logits(self.head(x))              # (B, 1, H, N)
            next_codes = self.sample(logits, temperature)   # (B, 1, H)
            prev = self.code_vectors(next_codes)
            codes.append(next_codes)
        return torch.cat(codes, dim=1)

    def decode(self, codes):
        """As MotionAutoencoder.decode(): codes (B, T, H) -> motion (B, T, V*3)"""
        return self.autoencoder.decode(codes)


# ---------- checkpoints ---------------------------------------------------------------------------


@contextmanager
def atomic_write(path):
    """Gives a temporary path to write to, then renames it: `path` is never half-written."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")         # same ending: writers go by it
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_pointer(path):
    """ValueError if a file is a Git LFS pointer, the short text that stands for a large file."""
    with open(path, "rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            raise ValueError("a Git LFS pointer: run `git lfs pull`")


def save(path, model, **training_state):
    """Write a checkpoint: configuration, weights, and whatever is needed to resume training."""
    autoencoder = getattr(model, "autoencoder", model)      # stage 1 is one itself
    checkpoint = {"model": type(model).__name__, "weights": model.state_dict(),
                  "vq_config": asdict(autoencoder.config), "config": asdict(model.config)}
    with atomic_write(path) as temporary:
        torch.save(checkpoint | training_state, temporary)


def load(path, stage, device="cpu", classes=(MotionAutoencoder, CodeTalker)):
    """A checkpoint of stage "vq" or "ar" -> the model in eval mode, and the checkpoint's dict.

    classes: those of stage 1 and stage 2. Raises ValueError, in one line, for any other file.
    """
    vq_class, ar_class = classes
    expected = ar_class.__name__ if stage == "ar" else vq_class.__name__
    try:
        refuse_pointer(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)    # runs no code in it
        if checkpoint["model"] != expected:
            raise ValueError(f"it holds a {checkpoint['model']}")
        model = vq_class(vq_class.Config(**checkpoint["vq_config"]))
        if stage == "ar":
            model = ar_class(ar_class.Config(**checkpoint["config"]), model)
        model.load_state_dict(checkpoint["weights"])
    except Exception as error:          # whatever a missing, damaged or older file leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"{path}: a checkpoint of {expected}, of this version, expected "
                         f"({reason}); `python train_{stage}.py` writes one") from None
    return model.to(device).eval(), checkpoint
