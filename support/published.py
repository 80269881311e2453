"""
The two published models, for VOCASET and BIWI: how they differ from codetalker.py.

    python -m support.published convert --vocaset FOLDER --out vocaset      VOCASET as downloaded
    python -m support.published describe FOLDER     VOCASET or BIWI in FaceFormer's layout

What the paper chose, or its released code
    [norm]        InstanceNorm over time in both backbones
    [loss]        stage 1: L1 alone. Stage 2: MSE to the true codes' vectors, and MSE of the motion
    [init]        random weights; dead codes are not reset
    [rate]        constant after 20 steps of warm-up; VOCASET's stage 1 halves it every 20 epochs
    [muon]        AdamW in stage 1, Adam in stage 2
    [audio]       wav2vec 2.0: pretrained on 960 hours of speech; its convolutions stay frozen
    [phones]      no phone loss: wav2vec 2.0 recognises speech already
    [projection]  BIWI: linear layers to the codes and from them, so that H*C need not be D
    [alignment]   BIWI: a frame attends to two audio steps, as 50 Hz are two steps at 25 fps
    [history]     decoded motion is fed back, as in FaceFormer. The decoder is not causal, so all
                  past codes are decoded anew for every frame
    [context]     600 frames; the released code ends there, here the last 600 are used
    [sampling]    the nearest code is taken: the paper's code query
    [scheduled]   teacher forcing alone

What the released code does by accident is put into the weights by import_released()
    [scale]       stage 1 divides attention scores by sqrt(D), not sqrt(D/heads): into the query
    [position]    stage 1 adds one vector to every frame, as its table of positions is indexed by
                  the batch: into the bias of the linear layer before
    [first]       the first frame is fed the style alone in generation, as here, but the bias of
                  in_proj too in training: bias_on_first_frame puts it into the styles

What is left out
    [dropout]     released layers also drop attention weights, hidden units and, in wav2vec 2.0,
                  entire layers; here only the inputs of a transformer and its residual branches

Shapes as in codetalker.py, and k audio steps per frame
"""
import argparse
import json
import pickle
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.io import wavfile
from torch.nn.utils.parametrizations import weight_norm

from codetalker import (SAMPLE_RATE, ARConfig, Attention, CodeTalker, DecoderLayer, KVCache,
                        MotionAutoencoder, MotionDecoder, MotionEncoder, Quantiser,
                        TemporalBackbone, VQConfig, atomic_write, causal_mask, feed_forward,
                        refuse_pointer)
from data import Faces, open_data
from support.command import ArgumentParser, one_line_errors, progress
from support.files import (find_files, flatten, load_arrays, open_npy, read_audio, read_description,
                           read_mesh, read_templates, some, vertex_list)

# -----------------------------------------------------------------------------
# sizes and schedules

WAV2VEC2_BASE = {"conv_dim": 512, "dim": 768, "layers": 12, "heads": 12, "ffn_dim": 3072}


@dataclass
class PaperVQConfig(VQConfig):
    """Sizes of stage 1; the defaults are VOCASET's."""
    dim: int = 1024
    layers: int = 6
    heads: int = 8
    ffn_dim: int = 1536
    codes_per_frame: int = 16
    code_dim: int = 64
    code_projection: bool = False       # a linear layer from D to H*C, and one back  [projection]


@dataclass
class PaperARConfig(ARConfig):
    """Sizes of stage 2; the defaults are VOCASET's."""
    context: int = 600
    dim: int = 1024
    layers: int = 6
    dropout: float = 0.1
    motion_weight: float = 1.0
    temperature: float = 0.0            # the only one possible  [sampling]
    audio_steps_per_frame: int = 1      # k. 1: audio steps are resampled to the frame rate
    wav2vec2: dict = field(default_factory=WAV2VEC2_BASE.copy)


# fields of PaperVQConfig, fields of PaperARConfig; train_ar.py sets the period, a second
PRESETS = {
    "vocaset": ({}, {}),
    "biwi": ({"codes_per_frame": 8, "code_dim": 128, "code_projection": True},
             {"layers": 12, "audio_steps_per_frame": 2}),
}

# Defaults of the training scripts' flags: 200 epochs of stage 1 and 100 of stage 2, of 320
# sentences (VOCASET) or 192 (BIWI), one entire sentence a step. VOCASET's stage 1 halves the
# learning rate every 20 epochs.
SCHEDULE = {"batch_size": 1, "seq_len": 100_000, "lr": 1e-4, "halve_lr_every": 10 ** 9,
            "eval_every": 3200, "log_every": 100}
VQ_SCHEDULE = {"vocaset": SCHEDULE | {"steps": 64_000, "halve_lr_every": 6400},
               "biwi": SCHEDULE | {"steps": 38_400}}
AR_SCHEDULE = {"vocaset": SCHEDULE | {"steps": 32_000, "sampling_prob": 0.0},
               "biwi": SCHEDULE | {"steps": 19_200, "sampling_prob": 0.0}}

# -----------------------------------------------------------------------------
# stage 1


class InstanceNorm(nn.Module):
    """Each channel of each clip to mean 0 and variance 1 over time. (B, T, D)  [norm]"""

    def forward(self, x):
        if x.shape[1] == 1:
            return torch.zeros_like(x)      # its distance to the mean; F.instance_norm raises
        return F.instance_norm(x.transpose(1, 2)).transpose(1, 2)       # wants channels first


class PaperBackbone(TemporalBackbone):
    def __init__(self, config):
        super().__init__(config)
        self.norm = InstanceNorm()
        self.from_codes = nn.Identity()
        self.to_codes = nn.Identity()

    def forward(self, x):
        return self.to_codes(super().forward(self.from_codes(x)))


class PaperAutoencoder(MotionAutoencoder):
    Config = PaperVQConfig

    def __init__(self, config):
        nn.Module.__init__(self)            # that of MotionAutoencoder asserts that D is H*C
        feature_dim = config.codes_per_frame * config.code_dim          # H*C
        assert config.code_projection or config.dim == feature_dim
        self.config = config
        self.encoder = MotionEncoder(config)
        self.quantiser = Quantiser(config.codebook_size, config.code_dim, config.beta)
        self.decoder = MotionDecoder(config)
        self.encoder.backbone = PaperBackbone(config)
        self.decoder.backbone = PaperBackbone(config)
        if config.code_projection:          # [projection]
            self.encoder.backbone.to_codes = nn.Linear(config.dim, feature_dim)
            self.decoder.backbone.from_codes = nn.Linear(feature_dim, config.dim)
            self.decoder.out_proj = nn.Linear(config.dim, config.vertices * 3, bias=False)

    def reconstruction_loss(self, reconstruction, motion):
        return F.l1_loss(reconstruction, motion)            # [loss]


# -----------------------------------------------------------------------------
# wav2vec 2.0

CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)    # their product is 320 samples: a step every 20 ms
MIN_SAMPLES = 400                       # what one step covers: 25 ms


class Wav2Vec2Layer(nn.Module):
    """Post-norm transformer layer"""

    def __init__(self, dim, heads, ffn_dim):
        super().__init__()
        self.attention = Attention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.feed_forward = feed_forward(dim, ffn_dim, nn.GELU())
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class Wav2Vec2(nn.Module):
    """wav2vec 2.0 (Baevski et al. 2020), base size: convolutions over samples, then a transformer.

    It was pretrained by predicting masked steps, then trained to recognise speech. [audio]
    """

    def __init__(self, conv_dim, dim, layers, heads, ffn_dim):
        super().__init__()
        self.convs = nn.ModuleList()
        for i, (kernel, stride) in enumerate(zip(CONV_KERNELS, CONV_STRIDES)):
            dim_in = 1 if i == 0 else conv_dim
            self.convs.append(nn.Conv1d(dim_in, conv_dim, kernel, stride, bias=False))
        self.conv_norm = nn.GroupNorm(conv_dim, conv_dim)   # each channel over time
        self.convs.requires_grad_(False)                    # frozen, as in the paper
        self.conv_norm.requires_grad_(False)
        self.project_norm = nn.LayerNorm(conv_dim)
        self.project = nn.Linear(conv_dim, dim)
        self.mask_embedding = nn.Parameter(torch.rand(dim))
        # relative positions: a convolution 128 steps wide, its weight kept as length * direction
        self.positions = weight_norm(nn.Conv1d(dim, dim, 128, padding=64, groups=16), dim=2)
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(Wav2Vec2Layer(dim, heads, ffn_dim) for _ in range(layers))
        self.dropout = nn.Dropout(0.1)

    @torch.no_grad()
    def convolve(self, audio):
        """The frozen convolutions: audio (samples,) -> (1, conv_dim, S), a step every 20 ms"""
        missing = max(0, MIN_SAMPLES - len(audio))
        x = F.pad(audio, (0, missing))[None, None]          # (1, 1, samples)
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if i == 0:
                x = self.conv_norm(x)
            x = F.gelu(x)
        return x

    def forward(self, features):
        """What convolve() gave, perhaps resampled, (B, S, conv_dim) -> (B, S, dim)"""
        x = self.dropout(self.project(self.project_norm(features)))
        if self.training:
            x = self.spec_augment(x)
        position = self.positions(x.transpose(1, 2))[..., :-1]      # an even kernel adds a step
        x = x + F.gelu(position).transpose(1, 2)
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x)
        return x

    def spec_augment(self, x, length=10):
        """SpecAugment: overwrite spans of ten steps, 5 % of x (B, S, dim) but two spans or more."""
        batch, steps, _ = x.shape
        spans = max(2, round(0.05 * steps / length))
        start = torch.randint(max(1, steps - length), (batch, spans, 1), device=x.device)
        masked = (start + torch.arange(length, device=x.device)).flatten(1)     # (B, spans * 10)
        mask = torch.zeros(batch, steps, dtype=torch.bool, device=x.device)
        mask = mask.scatter(1, masked.clamp(max=steps - 1), True)
        return torch.where(mask[..., None], self.mask_embedding, x)


PIECE = 600                             # frames: the released code takes no more
OVERLAP = 60                            # frames


def pieces(frames):
    """Long recordings are encoded in pieces that overlap, to bound memory: [(start, stop)]."""
    starts = range(0, max(1, frames - OVERLAP), PIECE - OVERLAP)
    return [(start, min(start + PIECE, frames)) for start in starts]


def join_pieces(parts, steps_per_frame):
    """The results (B, S_i, D) for pieces() -> (B, S, D): each is faded into the next one."""
    overlap = OVERLAP * steps_per_frame
    fade = torch.linspace(0, 1, overlap + 2, device=parts[0].device)[1:-1, None]
    joined = parts[0]
    for part in parts[1:]:
        both = (1 - fade) * joined[:, -overlap:] + fade * part[:, :overlap]
        joined = torch.cat([joined[:, :-overlap], both, part[:, overlap:]], dim=1)
    return joined


# -----------------------------------------------------------------------------
# stage 2


class PaperDecoderLayer(DecoderLayer):
    def attend_to_audio(self, x, audio):
        """x (B, T, D), audio (B, T, k, D): each frame attends to its k audio steps. [alignment]"""
        y = self.cross_attention(x.unsqueeze(2), audio)     # (B, T, 1, D) to (B, T, k, D)
        return y.squeeze(2)


class PaperCodeTalker(CodeTalker):
    Config = PaperARConfig

    def __init__(self, config, autoencoder):
        super().__init__(config, autoencoder)
        self.audio_encoder = Wav2Vec2(**config.wav2vec2)
        self.audio_map = nn.Linear(config.wav2vec2["dim"], config.dim)
        del self.phone_head                 # wav2vec 2.0 has learnt from speech [phones]
        self.in_proj = nn.Linear(autoencoder.config.vertices * 3, config.dim)       # [history]
        nn.init.normal_(self.style)
        self.layers = nn.ModuleList(PaperDecoderLayer(config) for _ in range(config.layers))
        del self.log_var                    # no distribution is learned  [sampling]
        self.register_buffer("log_var", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def preprocess_audio(self, audio, fps, frames):
        """A recording (samples,) at 16 kHz -> what the frozen convolutions give, (frames * k, 512).

        That is a constant of the recording, so it is computed once. k = 1: resampled to the frame
        rate. k = 2: at 50 Hz, for 25 fps; surplus steps are dropped, missing ones repeat the last.
        """
        k = self.config.audio_steps_per_frame
        audio = (audio - audio.mean()) / (audio.var(correction=0) + 1e-7).sqrt()
        audio = audio.to(self.style.device)
        parts = []
        for start, stop in pieces(frames):
            first = len(audio) * start // frames
            last = len(audio) * stop // frames
            x = self.audio_encoder.convolve(audio[first:last])          # (1, 512, S)
            steps = (stop - start) * k
            if k == 1:
                x = F.interpolate(x, size=steps, mode="linear", align_corners=True)
            else:
                missing = max(0, steps - x.shape[-1])
                x = F.pad(x[..., :steps], (0, missing), mode="replicate")
            parts.append(x.transpose(1, 2))                             # (1, steps, 512)
        return join_pieces(parts, k)[0]

    def encode_audio(self, features):
        """(B, T * k, 512) as from preprocess_audio() -> audio features (B, T, k, D)"""
        k = self.config.audio_steps_per_frame
        parts = []
        for start, stop in pieces(features.shape[1] // k):
            parts.append(self.audio_encoder(features[:, start * k:stop * k]))
        x = self.audio_map(join_pieces(parts, k))           # (B, T*k, D)
        return x.unflatten(1, (-1, k))                      # (B, T*k, D) -> (B, T, k, D)

    def sample(self, logits, temperature):
        if temperature != 0:
            raise ValueError("--temperature: 0 expected, as the published models learn no "
                             f"distribution over codes, found {temperature:g}")
        return super().sample(logits, temperature)

    def forward(self, features, style, codes, motion, phones=None, sampling_prob=0.0):
        """Teacher forcing with the motion of past frames -> the losses "code", "motion", a dict"""
        if sampling_prob != 0:
            raise ValueError("--sampling-prob: 0 expected, as the published models are trained "
                             f"with teacher forcing alone, found {sampling_prob:g}")
        audio = self.encode_audio(features)                 # (B, T, k, D)
        z_hat = self.predict(motion, style, audio)          # (B, T, H*C)
        loss_motion = self.config.motion_weight * self.motion_loss(z_hat, motion)
        return {"code": self.code_loss(z_hat, codes), "motion": loss_motion}

    def code_loss(self, z_hat, codes):
        return F.mse_loss(z_hat, self.code_vectors(codes))

    @torch.no_grad()
    def generate(self, audio, style, temperature=None, progress=iter):
        """As CodeTalker.generate(), for audio (B, T, k, D), but motion is fed back: of the codes so
        far the last `context` are decoded, and the last of these frames is taken. [history]"""
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
            codes.append(self.sample(logits, temperature))
            past_codes = torch.cat(codes[-context:], dim=1)
            prev = self.decode(past_codes)[:, -1:]          # (B, 1, V*3)
        return torch.cat(codes, dim=1)


CLASSES = (PaperAutoencoder, PaperCodeTalker)       # for codetalker.load()

# -----------------------------------------------------------------------------
# weights of others: checkpoint key -> our key, regular expressions applied one after another

WAV2VEC2_KEYS = [
    (r"feature_extractor\.conv_layers\.0\.layer_norm", r"conv_norm"),
    (r"feature_extractor\.conv_layers\.(\d)\.conv", r"convs.\1"),
    (r"feature_projection\.layer_norm", r"project_norm"),
    (r"feature_projection\.projection", r"project"),
    (r"masked_spec_embed", r"mask_embedding"),
    (r"encoder\.pos_conv_embed\.conv", r"positions"),
    (r"weight_g$", r"parametrizations.weight.original0"),       # length; PyTorch's newer names
    (r"weight_v$", r"parametrizations.weight.original1"),       # direction
    (r"encoder\.layer_norm", r"norm"),
    (r"encoder\.layers", r"layers"),
    (r"\.layer_norm", r".norm1"),
    (r"\.final_layer_norm", r".norm2"),
    (r"\.q_proj", r".query"),
    (r"\.k_proj", r".key"),
    (r"\.v_proj", r".value"),
    (r"\.out_proj", r".out"),
    (r"intermediate_dense", r"0"),
    (r"output_dense", r"2"),
]


def block_key(match):
    """The released code counts attention and feed-forward as two: net.0 and net.1 are block 0."""
    block, part = divmod(int(match[1]), 2)
    return f"backbone.blocks.{block}.{part + 1}"


STAGE1_KEYS = [
    (r"quantize\.embedding\.weight", r"quantiser.codebook"),
    (r"vertice_mapping\.0", r"in_proj"),
    (r"vertice_map_reverse", r"out_proj"),
    (r"(squasher|expander)\.0\.0", r"backbone.conv.conv"),
    (r"\w+_linear_embedding\.net", r"backbone.linear"),
    (r"\w+_linear_embedding_post\.net", r"backbone.to_codes"),
    (r"\w+_linear_embedding_pre\.net", r"backbone.from_codes"),
    (r"\w+_pos_embedding\.pe", r"position"),
    (r"\w+_transformer\.net\.(\d+)\.fn", block_key),
    (r"(\d)\.norm", r"norm\1"),
    (r"1\.fn\.to_qkv", r"attention.qkv"),
    (r"1\.fn\.to_out", r"attention.out"),
    (r"2\.fn\.l1", r"feed_forward.0"),
    (r"2\.fn\.l2", r"feed_forward.2"),
]

STAGE2_KEYS = WAV2VEC2_KEYS + [
    (r"audio_feature_map", r"audio_map"),
    (r"vertice_map", r"in_proj"),
    (r"feat_map", r"head"),
    (r"learnable_style_emb\.weight", r"style"),
    (r"transformer_decoder\.layers", r"layers"),
    (r"self_attn\.", r"self_attention."),
    (r"multihead_attn\.", r"cross_attention."),
    (r"\.in_proj_", r".qkv."),
    (r"linear1", r"feed_forward.0"),
    (r"linear2", r"feed_forward.2"),
]


def rename(weights, table):
    """{key: tensor} under our keys. A tensor of query, key and value becomes three."""
    renamed = {}
    for key, tensor in weights.items():
        for pattern, replacement in table:
            key = re.sub(pattern, replacement, key)
        names = ["query", "key", "value"] if ".qkv." in key else [""]
        for name, part in zip(names, tensor.chunk(len(names))):
            renamed[key.replace("qkv", name)] = part
    return renamed


def count_layers(weights, prefix):
    numbers = [re.match(prefix + r"\.(\d+)\.", key) for key in weights]
    return len({number[1] for number in numbers if number})


@contextmanager
def expect(path, what):
    """Around code that reads a file: any error in it becomes a ValueError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise ValueError(f"{path}: {what} expected ({reason})") from None


def read_weights(path):
    """A file that torch.save wrote -> {key: tensor}. Runs no code; ValueError for another file."""
    with expect(path, "pytorch_model.bin or another file of torch.save, not .safetensors,"):
        refuse_pointer(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = checkpoint.get("state_dict", checkpoint)
        return {key.removeprefix("module."): tensor.float() for key, tensor in weights.items()}


def wav2vec2_sizes(weights, prefix="", heads=None):
    """Weights do not show the number of heads; in all published models each has 64 dimensions."""
    dim, conv_dim = weights[prefix + "project.weight"].shape
    return {"conv_dim": conv_dim, "dim": dim, "layers": count_layers(weights, prefix + "layers"),
            "heads": heads or max(1, dim // 64),
            "ffn_dim": len(weights[prefix + "layers.0.feed_forward.0.bias"])}


def import_wav2vec2(path):
    """pytorch_model.bin of wav2vec2-base or wav2vec2-base-960h -> its sizes, the module.

    The last layer of the latter, which recognises speech, is left out. ValueError for other files.
    """
    weights = read_weights(path)
    with expect(path, "the weights of wav2vec2-base"):
        weights = {key.removeprefix("wav2vec2."): tensor for key, tensor in weights.items()
                   if not key.startswith("lm_head.")}
        weights = rename(weights, WAV2VEC2_KEYS)
        sizes = wav2vec2_sizes(weights)
        module = Wav2Vec2(**sizes)
        module.load_state_dict(weights)
    return sizes, module


def ar_sizes(preset, wav2vec2, fps):
    """--preset, --wav2vec2 -> fields of PaperARConfig. ValueError if the data has another fps."""
    sizes = PRESETS[preset][1]
    if preset == "biwi" and fps != 25:
        raise ValueError(f"--preset biwi: 25 frames per second expected, as a frame attends to two "
                         f"audio steps of 20 ms, found {fps:g}; --preset vocaset takes any")
    if wav2vec2:
        sizes = sizes | {"wav2vec2": import_wav2vec2(wav2vec2)[0]}
    return sizes


def load_wav2vec2(model, path):
    if path is None:
        raise ValueError("--wav2vec2: the published models start from the weights of facebook/"
                         "wav2vec2-base-960h; give its pytorch_model.bin")
    _, module = import_wav2vec2(path)
    model.audio_encoder.load_state_dict(module.state_dict())


def import_released(stage1, stage2, heads=(8, 4, None), bias_on_first_frame=False):
    """The authors' checkpoints of both stages -> PaperCodeTalker in eval mode, for motion in the
    unit of the data (scale 1). ValueError for other files.

    heads: of stage 1, stage 2 and wav2vec 2.0; all other sizes are read off the weights.
    bias_on_first_frame: the first frame as in the released training, see [first] above.
    """
    weights = read_weights(stage1)
    with expect(stage1, "a released checkpoint of stage 1"):
        autoencoder = import_stage1(weights, heads[0])
    weights = read_weights(stage2)
    with expect(stage2, "a released checkpoint of stage 2"):
        model = import_stage2(weights, autoencoder, heads[1], heads[2])
    if bias_on_first_frame:
        model.style.data += model.in_proj.bias.data
        model.in_proj.bias.data.zero_()
    return model.eval()


def import_stage1(weights, heads):
    weights = rename(weights, STAGE1_KEYS)
    dim, channels = weights["encoder.in_proj.weight"].shape
    codebook_size, code_dim = weights["quantiser.codebook"].shape
    code_projection = "encoder.backbone.to_codes.weight" in weights
    feature_dim = len(weights["encoder.backbone.to_codes.weight"]) if code_projection else dim
    config = PaperVQConfig(
        channels // 3, dim, count_layers(weights, r"encoder\.backbone\.blocks"), heads,
        ffn_dim=len(weights["encoder.backbone.blocks.0.feed_forward.0.bias"]),
        codes_per_frame=feature_dim // code_dim, code_dim=code_dim, codebook_size=codebook_size,
        code_projection=code_projection)
    for part in ("encoder", "decoder"):
        bias = f"{part}.backbone.linear.bias"
        position = weights.pop(f"{part}.position").reshape(-1, dim)[0]
        weights[bias] = weights[bias] + position            # [position]
    for key in weights:
        if key.endswith("query.weight"):
            weights[key] = weights[key] * heads ** -0.5     # sqrt(D/heads) / sqrt(D)  [scale]
    autoencoder = PaperAutoencoder(config)
    autoencoder.load_state_dict(weights | {"quantiser.usage": torch.zeros(codebook_size)})
    return autoencoder


def import_stage2(weights, autoencoder, heads, wav2vec2_heads):
    weights = rename(weights, STAGE2_KEYS)
    positions = weights.pop("PPE.pe")[0]                    # (frames, D), its rows repeat
    repeats = (positions[1:] == positions[0]).all(dim=1).nonzero()
    styles, dim = weights["style"].shape
    config = PaperARConfig(
        styles, period=int(repeats[0]) + 1 if len(repeats) else len(positions), dim=dim,
        layers=count_layers(weights, "layers"), heads=heads,
        audio_steps_per_frame=2 if autoencoder.config.code_projection else 1,   # BIWI has both
        wav2vec2=wav2vec2_sizes(weights, "audio_encoder.", wav2vec2_heads))
    model = PaperCodeTalker(config, autoencoder)
    for key, tensor in autoencoder.state_dict().items():
        weights[f"autoencoder.{key}"] = tensor
    model.load_state_dict(weights)
    return model


def open_released(stage1, stage2, folder):
    """infer.py --released: the model, and a DataSet; or Faces, if the folder has no clips."""
    folder = Path(folder or "")
    if not any(folder.glob("templates*")):
        raise ValueError("--released needs --data: a folder with the faces, templates.pkl at least")
    model = import_released(stage1, stage2)
    if (folder / "vertices_npy").is_dir():
        data = open_data(folder)
    else:
        templates = read_templates(folder / "templates.pkl")
        vertices = next(iter(templates.values())).size // 3
        triangles = vertex_list(read_description(folder), "triangles", (-1, 3), vertices)
        data = Faces(fps=model.config.period, unit=None, subjects=[], templates=templates,
                     triangles=triangles, colours=None, lips=[], upper_face=[], lip_gap=None)
    for found, expected, unit in (
            (data.channels, 3 * model.autoencoder.config.vertices, "motion channels"),
            (data.fps, model.config.period, "frames per second")):
        if found != expected:
            raise ValueError(f"{folder}: {expected} {unit} expected by the released model, found "
                             f"{found:g}")
    data.scale = 1.0                            # the model's motion is in the unit of the data
    print(f"{folder}: scale: 1 instead, as the released models take motion in the data's unit")
    if len(data.subjects) != model.config.styles:
        data.subjects = [str(i) for i in range(model.config.styles)]
    return model, data


# -----------------------------------------------------------------------------
# data sets

# How a clip is named; for each split its sentences and subjects, as in the released loader. The
# order of the training subjects numbers the styles of released checkpoints.
BIWI_SUBJECTS = "F2 F3 F4 M3 M4 M5"
PUBLISHED = {
    "VOCASET": {"clip": "FaceTalk_{}_TA_sentence{:02d}", "fps": 30, "unit": "metre", "splits": {
        "train": (range(1, 41), "170728_03272 170904_00128 170725_00137 170915_00223 "
                                "170811_03274 170913_03279 170904_03276 170912_03278"),
        "val": (range(21, 41), "170811_03275 170908_03277"),
        "test": (range(21, 41), "170809_00138 170731_00024")}},
    "BIWI": {"clip": "{}_e{:02d}", "fps": 25, "unit": None, "splits": {
        "train": (range(1, 33), BIWI_SUBJECTS),
        "val": (range(33, 37), BIWI_SUBJECTS),
        "test": (range(37, 41), BIWI_SUBJECTS),
        "test_b": (range(37, 41), "F1 F5 F6 F7 F8 M1 M2 M6")}},
}


def published_splits(name):
    """{split: clip names} of "VOCASET" or "BIWI", in the published order."""
    splits = {}
    for split, (sentences, subjects) in PUBLISHED[name]["splits"].items():
        splits[split] = [PUBLISHED[name]["clip"].format(subject, sentence)
                         for subject in subjects.split() for sentence in sentences]
    return splits


def describe_clips(name, present):
    """dataset.json of a published data set of which the clips `present` are there, as a dict."""
    splits = published_splits(name)
    missing = [clip for clips in splits.values() for clip in clips if clip not in present]
    if missing:
        print(f"{name}: {len(missing)} clips of the published splits are missing: {some(missing)}")
    splits = {split: [clip for clip in clips if clip in present] for split, clips in splits.items()}
    return {"name": name, "fps": PUBLISHED[name]["fps"], "unit": PUBLISHED[name]["unit"],
            "splits": splits}


def read_sentences(path):
    """A pickle {subject: {sentence: content}} -> {SUBJECT_sentenceNN: content}, no empty ones."""
    sentences = {}
    with expect(path, "subject -> sentence -> content as in VOCASET"):
        for subject, contents in load_arrays(path).items():
            for sentence, content in contents.items():
                if content:
                    sentences[f"{subject}_{sentence}"] = content
    return sentences


def read_regions(masks, mesh, vertices):
    """FLAME_masks.pkl and head_template.obj, where given -> lips, upper_face, triangles: lists."""
    regions = {}
    if masks:
        with expect(masks, "FLAME's masks of vertices, lips, forehead and eye_region,"):
            flame = load_arrays(masks)
            upper_face = np.concatenate([flame["forehead"], flame["eye_region"]])
            regions["lips"] = np.unique(flame["lips"]).tolist()
            regions["upper_face"] = np.unique(upper_face).tolist()
    if mesh:
        regions["triangles"] = read_mesh(mesh)[1]
    for name, numbers in regions.items():
        if len(numbers) == 0 or np.min(numbers) < 0 or np.max(numbers) >= vertices:
            path = mesh if name == "triangles" else masks
            raise ValueError(f"{path}: {name} among {vertices} vertices expected; FLAME's site has "
                             "FLAME_masks.pkl and head_template.obj")
    return regions


def convert_vocaset(source, out, masks=None, mesh=None):
    """VOCASET's four files, 60 fps -> a folder for --data, 30 fps: every second frame is taken.

    The folder appears when it is complete. ValueError, in one line, for what is wrong.
    """
    source = Path(source)
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: it exists already; remove it, or give another --out")
    templates = read_templates(source / "templates.pkl")
    vertices = open_npy(source / "data_verts.npy")          # (rows, V, 3), 7.4 GB: stays on disk
    recordings = read_sentences(source / "raw_audio_fixed.pkl")     # clip -> audio, sample_rate
    frames = read_sentences(source / "subj_seq_to_idx.pkl")         # clip -> {frame: row}
    clips = sorted(recordings.keys() & frames.keys())
    if not clips:
        raise ValueError(f"{source}: sentences with motion and audio expected, found none; "
                         "download it again")
    last_row = max(max(frames[clip].values()) for clip in clips)
    size = vertices[0].size                                 # V*3
    if last_row >= len(vertices) or {template.size for template in templates.values()} != {size}:
        raise ValueError(f"{source}/data_verts.npy: more than {last_row} rows of the templates' "
                         f"size expected, found {vertices.shape}; download it again")
    description = describe_clips("VOCASET", clips) | read_regions(masks, mesh, size // 3)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tmp-") as temporary:
        folder = Path(temporary) / out.name
        (folder / "vertices_npy").mkdir(parents=True)
        (folder / "wav").mkdir()
        for clip in progress(clips, "converting"):
            rows = [frames[clip][frame] for frame in sorted(frames[clip])]
            np.save(folder / "vertices_npy" / f"{clip}.npy", flatten(vertices[rows[::2]]))
            recording = recordings[clip]
            wavfile.write(folder / "wav" / f"{clip}.wav", recording["sample_rate"],
                          recording["audio"])
        heads = {subject: template.reshape(-1, 3) for subject, template in templates.items()}
        (folder / "templates.pkl").write_bytes(pickle.dumps(heads))
        (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
        folder.rename(out)
    print(f"{out}: {len(clips)} clips at 30 fps")


def describe(folder):
    """Write dataset.json into a folder of VOCASET or BIWI in FaceFormer's layout: fps, splits, and
    what regions/*.txt and mesh.obj hold. FaceFormer's VOCASET has 60 fps: every second frame then.
    """
    folder = Path(folder)
    path = folder / "dataset.json"
    if path.exists():
        raise ValueError(f"{path}: it exists already; remove it first")
    motions = find_files(folder / "vertices_npy", ".npy")
    wavs = find_files(folder / "wav", ".wav")
    present = sorted(motions.keys() & wavs.keys())
    name = "VOCASET" if any(clip.startswith("FaceTalk_") for clip in present) else "BIWI"
    clip = next((clip for clip in published_splits(name)["train"] if clip in present), None)
    if clip is None:
        raise ValueError(f"{folder}: training clips of VOCASET or BIWI expected, wav and npy, such "
                         f"as F2_e01.npy, found {some(present) or 'none'}")
    description = describe_clips(name, present)
    file_fps = len(open_npy(motions[clip])) / (len(read_audio(wavs[clip])) / SAMPLE_RATE)
    description["frame_stride"] = max(1, round(file_fps / description["fps"]))
    description |= read_description(folder)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(description), encoding="utf-8")
    print(f"{path}: {name} at {description['fps']} fps, files at {file_fps:.0f}")


parser = ArgumentParser(prog="python -m support.published", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
commands = parser.add_subparsers(dest="command", required=True)
convert = commands.add_parser("convert", help="VOCASET as downloaded -> a folder for --data")
convert.add_argument("--vocaset", required=True, help="folder with data_verts.npy, templates.pkl, "
                                                      "raw_audio_fixed.pkl and subj_seq_to_idx.pkl")
convert.add_argument("--out", required=True, help="the new folder")
convert.add_argument("--masks", help="FLAME_masks.pkl: which vertices are lips and upper face")
convert.add_argument("--mesh", help="FLAME's head_template.obj: the triangles")
layout = commands.add_parser("describe", help="write dataset.json into a folder")
layout.add_argument("folder", help="VOCASET or BIWI in FaceFormer's layout")


def main(args):
    if args.command == "convert":
        convert_vocaset(args.vocaset, args.out, args.masks, args.mesh)
    else:
        describe(args.folder)


if __name__ == "__main__":
    with one_line_errors():
        main(parser.parse_args())
