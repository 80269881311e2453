"""The model against independent oracles: loops, PyTorch's layers, examples worked by hand."""
import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import codetalker
from codetalker import (ARConfig, Attention, AudioEncoder, Block, CodeTalker, DecoderLayer, KVCache,
                        MotionAutoencoder, Quantiser, TimeConv, VQConfig, atomic_write, causal_mask,
                        code_loss, load, log_mel, mel_filterbank, motion_loss, periodic_positions,
                        perturb_vocal_tract, save, straight_through, vq_loss)

STYLES = torch.eye(3)


def tiny_autoencoder(vertices=5):
    config = VQConfig(vertices, dim=16, heads=2, ffn_dim=24, codes_per_frame=4, code_dim=4,
                      codebook_size=32)
    model = MotionAutoencoder(config)
    nn.init.normal_(model.quantiser.codebook, std=0.3)
    return model.eval()


def tiny_codetalker():
    config = ARConfig(styles=3, period=4, context=10, dim=16, heads=2, mel_bands=6, audio_layers=2,
                      temperature=0.0)
    model = CodeTalker(config, tiny_autoencoder())
    nn.init.normal_(model.head.weight)      # zero at first: every frame would be predicted alike
    return model.eval()


def random_batch(batch=3, frames=9):
    """mel, codes and motion that fit tiny_codetalker()"""
    mel = torch.randn(batch, frames * 4, 6)
    codes = torch.randint(32, (batch, frames, 4))
    return mel, codes, torch.randn(batch, frames, 15)


def assert_close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def frames_that_differ(a, b):
    """The frames t in which two tensors (B, T, D) differ, as a list"""
    return (a - b).abs().amax(dim=(0, 2)).gt(1e-6).nonzero().flatten().tolist()


# -----------------------------------------------------------------------------
# building blocks


@pytest.mark.parametrize("kernel_size, dilation", [(5, 1), (3, 4)])
def test_time_conv_matches_loop_with_repeated_edge_frames(kernel_size, dilation):
    conv = TimeConv(3, 7, kernel_size, dilation)
    x = torch.randn(2, 9, 3)
    expected = torch.zeros(2, 9, 7) + conv.conv.bias
    for t in range(9):
        for k in range(kernel_size):
            source = t + (k - kernel_size // 2) * dilation
            source = min(max(source, 0), 8)
            expected[:, t] += x[:, source] @ conv.conv.weight[:, :, k].t()
    assert_close(conv(x), expected)


def multihead_weights(attention, prefix=""):
    """Weights of an Attention under the names of nn.MultiheadAttention."""
    inputs = [attention.query, attention.key, attention.value]
    weights = {"in_proj_weight": torch.cat([linear.weight for linear in inputs]),
               "out_proj.weight": attention.out.weight, "out_proj.bias": attention.out.bias}
    if attention.query.bias is None:
        weights["in_proj_bias"] = torch.zeros(len(weights["in_proj_weight"]))
    else:
        weights["in_proj_bias"] = torch.cat([linear.bias for linear in inputs])
    return {prefix + name: tensor for name, tensor in weights.items()}


def test_attention_matches_multihead_attention():
    attention = Attention(16, 4)
    oracle = nn.MultiheadAttention(16, 4, batch_first=True)
    oracle.load_state_dict(multihead_weights(attention))
    x = torch.randn(2, 5, 16)
    context = torch.randn(2, 7, 16)
    mask = torch.randn(4, 5, 7)
    mask[0, :, 4:] = -math.inf
    expected, _ = oracle(x, context, context, attn_mask=mask.repeat(2, 1, 1))
    assert_close(attention(x, context, mask), expected)


def test_attention_matches_scaled_dot_product_attention():
    attention = Attention(16, 4)
    x = torch.randn(2, 12, 16)
    inputs = []
    for linear in (attention.query, attention.key, attention.value):
        inputs.append(linear(x).view(2, 12, 4, 4).transpose(1, 2))      # (B, heads, T, D/heads)
    y = F.scaled_dot_product_attention(*inputs, is_causal=True)
    expected = attention.out(y.transpose(1, 2).reshape(2, 12, 16))
    hidden = torch.ones(12, 12).triu(1).bool()
    assert_close(attention(x, mask=torch.zeros(4, 12, 12).masked_fill(hidden, -math.inf)), expected)


def test_kv_cache_matches_full_attention():
    """12 frames one by one, with the keys and values of five frames kept, and all at once."""
    attention = Attention(16, 4)
    x = torch.randn(2, 12, 16)
    cache = KVCache(5)
    newest = causal_mask(5, period=2, heads=4, context=5)[:, -1:]
    frames, sizes = [], []
    for t in range(12):
        frames.append(attention(x[:, t:t + 1], mask=newest[..., -(t + 1):], kv_cache=cache))
        sizes.append(cache.k.shape[2])
    full = attention(x, mask=causal_mask(12, period=2, heads=4, context=5))
    assert_close(torch.cat(frames, dim=1), full)
    assert sizes == [1, 2, 3, 4] + [5] * 8 and cache.v.shape == cache.k.shape


def test_block_matches_pre_norm_transformer_layer():
    block = Block(16, heads=2, ffn_dim=24)
    oracle = nn.TransformerEncoderLayer(16, 2, 24, dropout=0, batch_first=True, norm_first=True,
                                        activation=nn.GELU(approximate="tanh"))
    weights = multihead_weights(block.attention, "self_attn.")
    pairs = {"linear1": block.feed_forward[0], "linear2": block.feed_forward[2],
             "norm1": block.norm1, "norm2": block.norm2}
    for name, layer in pairs.items():
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        weights |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    oracle.load_state_dict(weights)
    x = torch.randn(2, 9, 16)
    assert_close(block(x), oracle(x), 1e-4)


# -----------------------------------------------------------------------------
# stage 1


def test_nearest_code_worked_example():
    """Codebook (0, 0), (1, 1). From (0.9, 0.6) the squared distances are 1.17 and 0.17: code 1."""
    quantiser = Quantiser(2, 2, beta=0.25)
    quantiser.codebook.data = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert quantiser.nearest(torch.tensor([[0.9, 0.6], [0.4, 0.5]])).tolist() == [1, 0]


def test_nearest_code_matches_loop():
    quantiser = Quantiser(40, 3, beta=0.25)
    nn.init.normal_(quantiser.codebook)
    z_e = torch.randn(2, 5, 4, 3)
    expected = []
    for vector in z_e.view(-1, 3):
        distances = [(vector - code).square().sum().item() for code in quantiser.codebook]
        expected.append(distances.index(min(distances)))
    z_q, codes, loss = quantiser(z_e)
    assert codes.flatten().tolist() == expected and codes.shape == (2, 5, 4)
    assert_close(z_q, quantiser.codebook[expected].view(2, 5, 4, 3))
    assert_close(loss, vq_loss(z_e, z_q, 0.25))


def test_straight_through_copies_value_and_gradient():
    """d(sum(w * output)) / dz_e = w, as if z_e had not been quantised."""
    z_e = torch.randn(3, 4, requires_grad=True)
    z_q = torch.randn(3, 4, requires_grad=True)
    w = torch.randn(3, 4)
    output = straight_through(z_e, z_q)
    assert_close(output, z_q)
    (output * w).sum().backward()
    assert torch.equal(z_e.grad, w)
    assert z_q.grad is None


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_vq_loss_worked_example(beta):
    """z_e = (3, 0), z_q = (1, 0): ((3 - 1)^2 + 0) / 2 = 2, so the loss is 2 + 2 beta.

    The first term moves the code alone: d/dz_q = 2 (1 - 3) / 2 = -2. The second moves the encoder
    alone: d/dz_e = beta 2 (3 - 1) / 2 = 2 beta.
    """
    z_e = torch.tensor([3.0, 0.0], requires_grad=True)
    z_q = torch.tensor([1.0, 0.0], requires_grad=True)
    loss = vq_loss(z_e, z_q, beta)
    loss.backward()
    assert loss.item() == 2 + 2 * beta
    assert z_q.grad.tolist() == [-2, 0]
    assert z_e.grad.tolist() == [2 * beta, 0]


def test_gradients_of_the_quantiser():
    """The decoder's gradient passes to z_e and not to the codebook; the loss moves used codes."""
    quantiser = Quantiser(8, 4, beta=0.25)
    z_e = torch.randn(1, 3, 2, 4, requires_grad=True)
    w = torch.randn(1, 3, 2, 4)
    z_q, codes, loss = quantiser(z_e)
    to_z_e, to_codebook = torch.autograd.grad((z_q * w).sum(), [z_e, quantiser.codebook],
                                              retain_graph=True, allow_unused=True)
    assert torch.equal(to_z_e, w)
    assert to_codebook is None or not to_codebook.any()
    loss.backward()
    moved = quantiser.codebook.grad.abs().sum(dim=1).nonzero().flatten()
    assert torch.equal(moved, codes.unique())


def test_usage_counts_codes_in_training_only():
    """Five vectors at code 2 and one at code 0."""
    quantiser = Quantiser(3, 1, beta=0.25)
    quantiser.codebook.data = torch.tensor([[0.0], [1.0], [2.0]])
    z_e = torch.tensor([2.0, 2, 0, 2, 2, 2]).view(1, 3, 2, 1)
    quantiser.eval()(z_e)
    assert quantiser.usage.tolist() == [0, 0, 0]
    quantiser.train()(z_e)
    assert quantiser.usage.tolist() == [1, 0, 5]
    quantiser(z_e)
    assert quantiser.usage.tolist() == [2, 0, 10]


def test_reset_dead_codes_restarts_unused_codes_near_encoder_outputs():
    quantiser = Quantiser(6, 4, beta=0.25)
    nn.init.normal_(quantiser.codebook)
    quantiser.usage = torch.tensor([3.0, 0, 1, 1, 0, 2])
    before = quantiser.codebook.detach().clone()
    z_e = 5 + torch.randn(1, 8, 2, 4)
    quantiser.reset_dead_codes(z_e)
    assert torch.equal(quantiser.codebook[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    distance = torch.cdist(quantiser.codebook[[1, 4]], z_e.view(-1, 4)).amin(dim=1)
    assert distance.min() > 0 and distance.max() < 0.05     # noise: four times 0.01
    assert not quantiser.usage.any()                        # counting starts anew
    quantiser.reset_dead_codes(z_e)
    assert (quantiser.codebook - before).abs().amin() > 0   # so now no code has been used


def test_reset_codes_draws_from_all_encoder_outputs():
    quantiser = Quantiser(100, 2, beta=0.25)
    z_e = torch.arange(40.0).view(2, 5, 2, 2)
    quantiser.reset_codes(torch.ones(100, dtype=torch.bool), z_e)
    chosen = torch.cdist(quantiser.codebook, z_e.view(-1, 2)).argmin(dim=1)
    assert len(chosen.unique()) == 20                   # 0.6 % of the draws miss one of the twenty


def test_stage1_losses_and_codes():
    """Reconstruction loss: mean of |error| plus mean of error^2. encode and decode do the same."""
    model = tiny_autoencoder()
    motion = torch.randn(3, 9, 15)
    reconstruction, codes, losses = model(motion)
    errors = [found - expected for found, expected in
              zip(reconstruction.flatten().tolist(), motion.flatten().tolist())]
    expected = np.mean(np.abs(errors)) + np.mean(np.square(errors))
    assert losses["reconstruction"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["vq"].item() == pytest.approx(model.quantiser(model.encoder(motion))[2].item())
    assert torch.equal(model.encode(motion), codes) and len(codes.unique()) > 4
    assert_close(model.decode(codes), reconstruction)


def motion_of_three_muscles(scale=1.0):
    """(8, 9, 60): twenty vertices, but three directions of motion"""
    generator = torch.Generator().manual_seed(7)
    activity = torch.randn(8, 9, 3, generator=generator)
    directions = torch.randn(3, 60, generator=generator)
    return scale * activity @ directions


@torch.no_grad()
def test_init_from_data_spans_the_directions_of_motion():
    """Projected onto what the first layer reads, or the last can write, the motion stays the same.

    Eight directions (half of D = 16) of mean square 1, mixed into 16 features: mean square 1/2.
    """
    model = tiny_autoencoder(vertices=20)
    motion = motion_of_three_muscles()
    model.init_from_data(motion)
    for weight in (model.encoder.in_proj.weight, model.decoder.out_proj.weight.t()):    # (16, 60)
        assert torch.linalg.matrix_rank(weight, rtol=1e-4) == 8
        assert_close(motion @ torch.linalg.pinv(weight, rtol=1e-4) @ weight, motion, 1e-4)
    assert model.encoder.in_proj(motion).square().mean().item() == pytest.approx(0.5, rel=1e-4)
    z_e = model.encoder(motion).view(-1, 4)
    assert torch.cdist(model.quantiser.codebook, z_e).amin(dim=1).max() < 0.05 * z_e.std()


@torch.no_grad()
def test_init_from_data_does_not_depend_on_the_unit():
    z_e, written = [], []
    for scale in (1.0, 1024.0):           # a power of two is exact in floating point
        torch.manual_seed(1)
        model = tiny_autoencoder(vertices=20)
        motion = motion_of_three_muscles(scale)
        model.init_from_data(motion)
        z_e.append(model.encoder(motion))
        written.append(model.decoder.out_proj(torch.ones(16)) / scale)
    assert_close(z_e[0], z_e[1], 1e-4)
    assert_close(written[0], written[1], 1e-4)


def test_init_from_data_speeds_up_training():
    losses = []
    motion = motion_of_three_muscles()
    for init in (True, False):
        torch.manual_seed(1)
        model = tiny_autoencoder(vertices=20).train()
        if init:
            model.init_from_data(motion)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(40):
            _, _, parts = model(motion)
            optimiser.zero_grad()
            sum(parts.values()).backward()
            optimiser.step()
        losses.append(parts["reconstruction"].item())
    print(losses)
    assert losses[0] < 0.8 * losses[1]


# -----------------------------------------------------------------------------
# audio


def test_mel_filterbank_worked_example():
    """One band from 60 to 7600 Hz is one from 92.8 to 2787 mel; its peak, 1440 mel, is 1812 Hz.

    Bins are 31.25 Hz apart. Bin 32 is 1000 Hz: (1000 - 60) / (1812 - 60) = 0.537. Bin 128 is
    4000 Hz: (7600 - 4000) / (7600 - 1812) = 0.622.
    """
    filters = mel_filterbank(1)
    assert filters.shape == (257, 1)
    found = filters[[1, 32, 58, 128, 244], 0].tolist()
    assert found == pytest.approx([0, 0.537, 1, 0.622, 0], abs=1e-3)


def test_mel_filters_overlap_to_one():
    """Where one triangle falls the next one rises, and no bin is in three of them."""
    filters = mel_filterbank(20)
    peaks = filters.argmax(dim=0)
    assert (peaks.diff() > 0).all()
    assert_close(filters.sum(dim=1)[peaks[0] + 1:peaks[-1]], torch.ones(peaks[-1] - peaks[0] - 1))
    assert (filters > 0).sum(dim=1).max() == 2
    assert filters.min() == 0 and not filters[:2].any() and not filters[244:].any()


def test_log_mel_shows_a_tone_in_its_band():
    mel_min = 2595 * math.log10(1 + 60 / 700)
    mel_max = 2595 * math.log10(1 + 7600 / 700)
    time = torch.arange(16_000) / 16_000
    tones = [300, 1000, 2300, 5500]
    audio = torch.cat([torch.sin(2 * math.pi * tone * time) for tone in tones])
    mel = log_mel(audio, 30, 120, 24)
    for second, tone in enumerate(tones):
        position = (2595 * math.log10(1 + tone / 700) - mel_min) / (mel_max - mel_min)     # 0 to 1
        steps = mel[second * 120 + 20:(second + 1) * 120 - 20]
        assert steps.mean(dim=0).argmax() == round(25 * position) - 1


@pytest.mark.parametrize("fps", [25, 30, 60])
def test_log_mel_keeps_audio_and_motion_aligned(fps):
    """Step s covers s / (4 fps) to (s + 1) / (4 fps) seconds; a click is loudest in its step."""
    for click in (0.0531, 1.0011, 1.7389):
        audio = torch.zeros(2 * 16_000)
        audio[round(click * 16_000)] = 0.9
        mel = log_mel(audio, fps, 2 * fps, 16)
        assert mel.shape == (2 * fps * 4, 16) and mel.dtype == torch.float32
        assert mel.sum(dim=1).argmax() == math.floor(click * fps * 4)


def modulated_noise(seconds):
    """Loud and soft in turn, as speech is"""
    t = torch.arange(seconds * 16_000)
    return 0.1 * torch.randn(len(t)) * (1.2 + torch.sin(t / 900))


def test_log_mel_removes_loudness_and_a_constant_filter():
    audio = modulated_noise(1)
    mel = log_mel(audio, 30, 30, 24)
    assert mel.std() > 0.3
    assert_close(log_mel(0.1 * audio, 30, 30, 24), mel, 1e-4)
    darker = audio + 0.7 * F.pad(audio, (1, 0))[:-1]            # treble 15 dB below bass: 1.5
    assert (log_mel(darker, 30, 30, 24) - mel).abs().mean() < 0.03


def test_log_mel_speech_has_mean_zero():
    """A loud and a soft second, 40 dB below: the mean is taken over the loud one alone."""
    mel = log_mel(torch.cat([modulated_noise(1), 0.01 * modulated_noise(1)]), 30, 60, 24)
    assert_close(mel[:116].mean(dim=0), torch.zeros(24), 0.05)
    assert_close(mel[124:].mean(dim=0), torch.full((24,), -4.0), 0.15)


def test_log_mel_places_steady_noise_below_speech():
    """40 dB below is 4 in log10. A click at the cut end changes nothing, and half a second may be
    a vowel."""
    noise = 0.1 * torch.randn(10 * 16_000)
    assert log_mel(noise, 30, 300, 24).mean().item() == pytest.approx(-4, abs=1e-4)
    noise[0] = 1.0
    assert log_mel(noise, 30, 300, 24)[4:].mean().item() == pytest.approx(-4, abs=0.05)
    assert log_mel(noise[100:8_100], 30, 15, 24).mean().item() == pytest.approx(0, abs=1e-4)
    assert log_mel(modulated_noise(10), 30, 300, 24).mean().abs() < 0.5


def test_log_mel_of_silence_is_finite():
    assert log_mel(torch.zeros(16_000), 30, 30, 24).isfinite().all()


def test_log_mel_reads_zeros_beyond_the_recording():
    audio = modulated_noise(1)
    longer = F.pad(audio, (0, 16_000))
    assert_close(log_mel(audio, 30, 60, 24), log_mel(longer, 30, 60, 24))


@pytest.mark.parametrize("samples, frames", [(0, 30), (16_000, 0)])
def test_log_mel_without_audio_raises(samples, frames):
    with pytest.raises(ValueError, match="at least one frame expected"):
        log_mel(torch.zeros(samples), 30, frames, 24)


def test_perturb_vocal_tract_matches_interpolation(monkeypatch):
    """Three sequences: unchanged, shifted by one band, stretched by 1.1 and shifted by half a band.

    The last band of eight is read at 6.999 and not at 7, so up to a thousandth is the band before.
    """
    noise = [torch.tensor([[0.0], [0.0], [1.25]]), torch.tensor([[0.0], [53 / 8], [-53 / 16]])]
    monkeypatch.setattr(torch, "randn", lambda *shape, device: noise.pop(0))
    mel = torch.rand(3, 5, 8)
    found = perturb_vocal_tract(mel)
    assert_close(found[0], mel[0], 1.1e-3)
    assert_close(found[1, :, :7], mel[1, :, 1:], 1.1e-3)
    bands = np.arange(8)
    for step in range(5):
        expected = np.interp(1.1 * bands - 0.5, bands, mel[2, step].numpy())
        assert found[2, step].tolist() == pytest.approx(expected.tolist(), abs=1.1e-3)


@torch.no_grad()
def test_audio_encoder_receptive_field():
    """The convolutions over steps reach one frame to either side, the dilated ones 1, 2, 4 and 8
    more: 16 frames, half a second."""
    encoder = AudioEncoder(ARConfig(styles=1, dim=8, mel_bands=6)).double().eval()
    mel = torch.randn(1, 45 * 4, 6, dtype=torch.float64)
    changed = mel.clone()
    changed[:, 22 * 4:23 * 4] += 10
    before, after = encoder(mel), encoder(changed)
    assert before.shape == (1, 45, 8)
    differs = (before != after).any(dim=2).flatten().nonzero().flatten()
    assert differs.tolist() == list(range(22 - 16, 22 + 17))


# -----------------------------------------------------------------------------
# stage 2: the transformer


def test_periodic_positions_match_loop():
    table = periodic_positions(5, 6)
    assert table.shape == (5, 6)
    for t in range(5):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            expected = [math.sin(angle), math.cos(angle)]
            assert table[t, 2 * i:2 * i + 2].tolist() == pytest.approx(expected, abs=1e-6)


def test_causal_mask_matches_loop():
    """ALiBi's slopes for four heads are 2^-2, 2^-4, 2^-6, 2^-8; FaceFormer's period is four."""
    mask = causal_mask(11, period=4, heads=4, context=9)
    for head, slope in enumerate([1 / 4, 1 / 16, 1 / 64, 1 / 256]):
        for i in range(11):
            for j in range(11):
                expected = -slope * ((i - j) // 4) if 0 <= i - j < 9 else -math.inf
                assert mask[head, i, j].item() == expected


def test_decoder_layer_matches_transformer_decoder_layer():
    """PyTorch's post-norm layer, its cross-attention masked to the diagonal as in the paper."""
    layer = tiny_codetalker().layers[0]
    oracle = nn.TransformerDecoderLayer(16, 2, 32, dropout=0, batch_first=True)
    weights = multihead_weights(layer.self_attention, "self_attn.")
    weights |= multihead_weights(layer.cross_attention, "multihead_attn.")
    pairs = {"linear1": layer.feed_forward[0], "linear2": layer.feed_forward[2],
             "norm1": layer.norm1, "norm2": layer.norm2, "norm3": layer.norm3}
    for name, part in pairs.items():
        for parameter in part.parameters():
            nn.init.normal_(parameter)
        weights |= {f"{name}.{key}": tensor for key, tensor in part.state_dict().items()}
    oracle.load_state_dict(weights)
    x, audio = torch.randn(2, 2, 9, 16)
    mask = causal_mask(9, period=4, heads=2, context=6)
    diagonal = torch.zeros(9, 9).masked_fill(~torch.eye(9, dtype=torch.bool), -math.inf)
    expected = oracle(x, audio, tgt_mask=mask.repeat(2, 1, 1), memory_mask=diagonal)
    assert_close(layer(x, audio, mask), expected, 1e-4)


def test_cross_attention_over_one_key_is_its_value():
    layer = tiny_codetalker().layers[0]
    x, audio = torch.randn(2, 1, 1, 16)
    assert_close(layer.cross_attention(x, context=audio), layer.attend_to_audio(x, audio))


def test_first_frame_is_style_and_position_alone():
    """Position 0 is sin 0, cos 0, sin 0 ... = 0, 1, 0, 1 ..."""
    model = tiny_codetalker()
    prev = torch.randn(3, 7, 16)
    x = model.embed(prev, STYLES)
    assert_close(x[:, 0], model.style + torch.tensor([0.0, 1.0]).repeat(8))
    rest = x[:, 6] - model.style - periodic_positions(4, 16)[6 % 4]
    assert_close(rest, model.in_proj(prev[:, 6]))
    assert_close(model.embed(prev[:, 5:], STYLES, start=5), x[:, 5:])


def test_styles_mix_linearly():
    model = tiny_codetalker()
    prev = torch.randn(1, 7, 16)
    first, last = STYLES[:1], STYLES[2:]
    mixed = model.embed(prev, 0.3 * first + 0.7 * last)
    assert_close(mixed, 0.3 * model.embed(prev, first) + 0.7 * model.embed(prev, last))


@torch.no_grad()
def test_predict_does_not_see_the_future():
    """Other codes or audio from frame 5 on: predictions of frames 0 to 5, or 0 to 4, stay."""
    model = tiny_codetalker()
    past, audio = torch.randn(2, 3, 9, 16)
    before = model.predict(past, STYLES, audio)
    other_past = torch.cat([past[:, :5], past[:, 5:] + 1], dim=1)
    assert frames_that_differ(model.predict(other_past, STYLES, audio), before) == [6, 7, 8]
    other_audio = torch.cat([audio[:, :5], audio[:, 5:] + 1], dim=1)
    assert frames_that_differ(model.predict(past, STYLES, other_audio), before) == [5, 6, 7, 8]


@torch.no_grad()
def test_context_window_limits_attention():
    """Two layers of ten frames: the vector of frame 1 is the input of frame 2, which the first
    layer passes on to frame 2 + 9 and the second to frame 2 + 18."""
    model = tiny_codetalker()
    past, audio = torch.randn(2, 3, 30, 16)
    changed = past.clone()
    changed[:, 1] += 1
    before = model.predict(past, STYLES, audio)
    assert frames_that_differ(model.predict(changed, STYLES, audio), before) == list(range(2, 21))


@torch.no_grad()
def test_predict_matches_loop_over_prefixes():
    model = tiny_codetalker()
    past, audio = torch.randn(2, 3, 25, 16)
    full = model.predict(past, STYLES, audio)
    for t in range(25):
        prefix = model.predict(past[:, :t + 1], STYLES, audio[:, :t + 1])
        assert_close(prefix[:, t], full[:, t])


def test_untrained_model_predicts_zero():
    """So training starts from the same distribution over codes in every frame."""
    model = CodeTalker(tiny_codetalker().config, tiny_autoencoder())
    past, audio = torch.randn(2, 3, 9, 16)
    assert not model.predict(past, STYLES, audio).any()
    variance = model.autoencoder.quantiser.codebook.var()
    assert_close(model.log_var.exp(), variance / 4)


# -----------------------------------------------------------------------------
# stage 2: codes


def test_logits_match_gaussian_and_argmax_is_nearest_code():
    model = tiny_codetalker()
    variance = 0.2
    nn.init.constant_(model.log_var, math.log(variance))
    z_hat = 0.3 * torch.randn(2, 5, 16)
    codebook = model.autoencoder.quantiser.codebook.double()
    distance = torch.cdist(z_hat.double().view(2, 5, 4, 4), codebook)       # (2, 5, 4, 32)
    density = torch.exp(-distance.square() / (2 * variance))
    expected = density / density.sum(dim=-1, keepdim=True)
    logits = model.logits(z_hat)
    assert_close(logits.softmax(dim=-1).double(), expected)
    assert torch.equal(logits.argmax(dim=-1), distance.argmin(dim=-1))


def test_sample_frequencies_match_softmax():
    """20,000 samples of each distribution: a share of 1/2 has a standard deviation of 0.0035."""
    model = tiny_codetalker()
    logits = torch.randn(1, 1, 3, 5)
    codes = model.sample(logits.expand(2_000, 10, 3, 5), temperature=0.7)
    assert codes.shape == (2_000, 10, 3)
    for h in range(3):
        share = codes[..., h].flatten().bincount(minlength=5) / 20_000
        assert_close(share, (logits[0, 0, h] / 0.7).softmax(dim=0), 0.015)
    assert torch.equal(model.sample(logits, temperature=0), logits.argmax(dim=-1))


@torch.no_grad()
def test_generate_matches_predicting_the_prefix_anew():
    """Without a cache, for 40 frames: ten periods, four contexts."""
    model = tiny_codetalker()
    audio = model.encode_audio(random_batch(frames=40)[0])
    codes = torch.zeros(3, 0, 4, dtype=torch.long)
    for t in range(40):
        padded = F.pad(codes, (0, 0, 0, 1))             # predict() does not look at frame t
        past = model.autoencoder.quantiser.codebook[padded].flatten(2)
        z_hat = model.predict(past, STYLES, audio[:, :t + 1])[:, t].view(3, 1, 4, 4)
        distance = torch.cdist(z_hat, model.autoencoder.quantiser.codebook)
        codes = torch.cat([codes, distance.argmin(dim=-1)], dim=1)
    assert torch.equal(model.generate(audio, STYLES), codes)
    assert len(codes.unique()) > 10 and not torch.equal(codes[:, 10:20], codes[:, 20:30])
    z_hat = model.predict(model.code_vectors(codes), STYLES, audio)
    assert torch.equal(model.logits(z_hat).argmax(dim=-1), codes)           # teacher forcing


@torch.no_grad()
def test_generate_samples_at_the_model_temperature_by_the_seed():
    model = tiny_codetalker()
    audio = torch.randn(3, 9, 16)
    nn.init.constant_(model.log_var, 1.0)

    def codes(seed, temperature=None):
        torch.manual_seed(seed)
        return model.generate(audio, STYLES, temperature)

    assert torch.equal(codes(1), codes(2))              # temperature 0, as configured
    assert not torch.equal(codes(1, 1.0), codes(2, 1.0))
    model.config.temperature = 1.0
    assert torch.equal(codes(1), codes(1, 1.0))
    assert torch.equal(codes(1, 0), codes(2, 0))


@torch.no_grad()
def test_generate_wraps_its_frames_in_progress_and_needs_eval_mode():
    model = tiny_codetalker()
    audio = torch.randn(1, 7, 16)
    shown = []

    def progress(frames):
        for t in frames:
            shown.append(t)
            yield t

    model.generate(audio, STYLES[:1], progress=progress)
    assert shown == list(range(7))
    with pytest.raises(AssertionError, match="eval"):
        model.train().generate(audio, STYLES[:1])


# -----------------------------------------------------------------------------
# stage 2: losses


def test_code_loss_worked_example():
    """Logits (ln 3, 0) are probabilities 3/4 and 1/4. Of three frames with codes 0, 1, 1 the last
    is padding: the loss is -(ln 3/4 + ln 1/4) / 2."""
    logits = torch.tensor([math.log(3), 0.0]).expand(1, 3, 1, 2)
    codes = torch.tensor([0, 1, 1]).view(1, 3, 1)
    loss = code_loss(logits, codes, torch.tensor([[True, True, False]]))
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)


def test_motion_loss_worked_example():
    """Errors (1, 2) and (1, 0) in two frames, the third is padding: (1 + 4 + 1 + 0) / 4 = 1.5."""
    predicted = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]]])
    motion = torch.tensor([[[0.0, 3.0], [1.0, 2.0], [0.0, 0.0]]])
    loss = motion_loss(predicted, motion, torch.tensor([[True, True, False]]))
    assert loss.item() == 1.5


def test_stage2_losses_match_loop(monkeypatch):
    """The code loss is over all sequences, the motion loss over 0 and 4 (one in four) of six."""
    model = tiny_codetalker()
    mel, codes, motion = random_batch(batch=6)
    lengths = [9, 4, 1, 9, 4, 1]
    length_mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    z_hat = 0.3 * torch.randn(6, 9, 16)
    monkeypatch.setattr(model, "predict", lambda past, style, audio: z_hat)
    losses = model(mel, STYLES.repeat(2, 1), codes, motion, length_mask)

    log_probs = model.logits(z_hat).log_softmax(dim=-1)
    nearest = model.logits(z_hat).argmax(dim=-1)
    code_terms, motion_terms = [], []
    for b in range(6):
        for t in range(lengths[b]):
            for h in range(4):
                code_terms.append(-log_probs[b, t, h, codes[b, t, h]].item())
    for b in (0, 4):
        decoded = model.decode(nearest[b:b + 1])[0]
        for t in range(lengths[b]):
            motion_terms += (decoded[t] - motion[b, t]).square().tolist()
    assert losses["code"].item() == pytest.approx(np.mean(code_terms), rel=1e-5)
    assert losses["motion"].item() == pytest.approx(2.0 * np.mean(motion_terms), rel=1e-5)


def test_motion_loss_gradient_goes_straight_through(monkeypatch):
    """z_hat gets the gradient that the decoder has for its input, the quantised vectors."""
    model = tiny_codetalker()
    mel, codes, motion = random_batch()
    z_hat = 0.3 * torch.randn(3, 9, 16, requires_grad=True)
    monkeypatch.setattr(model, "predict", lambda past, style, audio: z_hat)
    loss = model(mel, STYLES, codes, motion)["motion"]
    found, = torch.autograd.grad(loss, z_hat)
    nearest = model.logits(z_hat[:1]).argmax(dim=-1)
    z_q = model.code_vectors(nearest).view(1, 9, 4, 4).requires_grad_()
    error = model.autoencoder.decoder(z_q) - motion[:1]
    expected, = torch.autograd.grad(2.0 * error.square().mean(), z_q)
    assert_close(found[:1], expected.flatten(2))
    assert found[0].abs().min() > 0 and not found[1:].any()     # one sequence in four


@torch.no_grad()
def test_batch_loss_is_mean_over_single_sequences():
    model = tiny_codetalker()
    model.config.motion_loss_every = 1
    mel, codes, motion = random_batch()
    batch = model(mel, STYLES, codes, motion)
    singles = [model(mel[b:b + 1], STYLES[b:b + 1], codes[b:b + 1], motion[b:b + 1])
               for b in range(3)]
    for name in ("code", "motion"):
        mean = np.mean([losses[name].item() for losses in singles])
        assert batch[name].item() == pytest.approx(mean, rel=1e-5)


@torch.no_grad()
def test_padding_changes_no_loss():
    """Neither motion nor codes on padding. The motion loss may see codes there, as the decoder
    attends to the whole clip, so the codes are compared in the code loss alone."""
    model = tiny_codetalker()
    mel, codes, motion = random_batch()
    length_mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    losses = model(mel, STYLES, codes, motion, length_mask)
    other = model(mel, STYLES, codes, torch.where(length_mask[..., None], motion, 99.0), length_mask)
    assert other == losses
    other_codes = torch.where(length_mask[..., None], codes, 31 - codes)
    assert model(mel, STYLES, other_codes, motion, length_mask)["code"] == losses["code"]
    assert model(mel, STYLES, other_codes, motion)["code"] != losses["code"]


@pytest.fixture
def predict_calls(monkeypatch):
    """A tiny model, and a list of the (past, z_hat) of each call of its predict()"""
    model = tiny_codetalker()
    predict = model.predict
    calls = []

    def spy(past, style, audio):
        z_hat = predict(past, style, audio)
        calls.append((past, z_hat))
        return z_hat

    monkeypatch.setattr(model, "predict", spy)
    return model, calls


def test_teacher_forcing_feeds_the_ground_truth(predict_calls):
    model, calls = predict_calls
    mel, codes, motion = random_batch()
    model(mel, STYLES, codes, motion, sampling_prob=0.0)
    (past, _), = calls
    assert torch.equal(past, model.autoencoder.quantiser.codebook[codes].flatten(2))


def test_scheduled_sampling_does_not_leak_the_ground_truth(predict_calls):
    """With probability 1 the past is the predictions of a first pass, whatever the true codes."""
    model, calls = predict_calls
    mel, codes, motion = random_batch()
    for ground_truth in (codes, 31 - codes):
        torch.manual_seed(1)
        model(mel, STYLES, ground_truth, motion, sampling_prob=1.0)
    first, second, other_first, other_second = calls
    nearest = model.logits(first[1]).argmax(dim=-1)
    assert torch.equal(second[0], model.autoencoder.quantiser.codebook[nearest].flatten(2))
    assert torch.equal(second[0], other_second[0])
    assert not torch.equal(first[0], model.code_vectors(codes))
    assert not first[1].requires_grad and second[1].requires_grad


def test_sampling_prob_is_the_share_of_replaced_frames(predict_calls):
    """Of 1200 frames 40 %, with a standard deviation of 1.4 %, and always all codes of a frame."""
    model, calls = predict_calls
    mel, codes, motion = random_batch(frames=400)
    model(mel, STYLES, codes, motion, sampling_prob=0.4)
    (_, first), (past, _) = calls
    own = model.code_vectors(model.logits(first).argmax(dim=-1))
    is_own = (past == own).all(dim=2)
    is_true = (past == model.code_vectors(codes)).all(dim=2)
    assert (is_own ^ is_true).all()
    assert is_own.float().mean().item() == pytest.approx(0.4, abs=0.05)


def test_training_moves_stage2_and_leaves_stage1():
    """Query and key of the cross-attention stay too: over one key they do not matter."""
    model = tiny_codetalker().train()
    assert model.layers[0].training and not model.autoencoder.decoder.training
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mel, codes, motion = random_batch()
    losses = model(mel, STYLES, codes, motion, sampling_prob=0.5)
    sum(losses.values()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    stays = {name for name, tensor in model.state_dict().items()
             if torch.equal(tensor, before[name])}
    expected = {name for name in before if name.startswith("autoencoder.")
                or "cross_attention.query" in name or "cross_attention.key" in name}
    assert stays - expected <= {name for name in before if name.endswith("attention.key.bias")}
    assert expected <= stays


@pytest.mark.cuda
@torch.no_grad()
def test_cuda_matches_cpu(tmp_path):
    """Losses, codes at temperature 0 and the reconstruction; no tensor is left on the CPU."""
    model = tiny_codetalker()
    mel, codes, motion = random_batch(frames=25)
    save(tmp_path / "ar.pt", model)
    on_gpu, _ = load(tmp_path / "ar.pt", "ar", device="cuda")
    inputs = [mel, STYLES, codes, motion]
    gpu_inputs = [tensor.to("cuda") for tensor in inputs]
    expected = model(*inputs)
    found = on_gpu(*gpu_inputs)
    for name in expected:
        assert_close(found[name].cpu(), expected[name], 1e-3)
    generated = on_gpu.generate(on_gpu.encode_audio(gpu_inputs[0]), gpu_inputs[1])
    assert torch.equal(generated.cpu(), model.generate(model.encode_audio(mel), STYLES))
    on_gpu(*gpu_inputs, sampling_prob=0.5)
    on_gpu.autoencoder.init_from_data(gpu_inputs[3])
    perturb_vocal_tract(gpu_inputs[0])


# -----------------------------------------------------------------------------
# checkpoints


@pytest.mark.parametrize("stage, make", [("vq", tiny_autoencoder), ("ar", tiny_codetalker)])
def test_load_restores_what_save_wrote(tmp_path, stage, make):
    model = make().train()
    save(tmp_path / "model.pt", model, step=7, log=[{"loss": 0.5}])
    loaded, checkpoint = load(tmp_path / "model.pt", stage)
    assert checkpoint["step"] == 7 and checkpoint["log"] == [{"loss": 0.5}]
    assert type(loaded) is type(model) and loaded.config == model.config
    assert not loaded.training
    weights = model.state_dict()
    assert weights.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert os.listdir(tmp_path) == ["model.pt"]


def load_error(path, stage="ar"):
    """The message of load(), which must be one line that begins with the path and ends in advice"""
    with pytest.raises(ValueError) as error:
        load(path, stage)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert message.endswith(f"`python train_{stage}.py` writes one")
    return message


def test_load_names_a_missing_file_and_another_stage(tmp_path):
    assert "no such checkpoint" in load_error(tmp_path / "missing.pt")
    save(tmp_path / "vq.pt", tiny_autoencoder())
    found = load_error(tmp_path / "vq.pt", "ar")
    assert "a checkpoint of CodeTalker expected, found MotionAutoencoder" in found
    save(tmp_path / "ar.pt", tiny_codetalker())
    found = load_error(tmp_path / "ar.pt", "vq")
    assert "a checkpoint of MotionAutoencoder expected, found CodeTalker" in found


def test_load_refuses_damaged_files(tmp_path):
    path = tmp_path / "model.pt"
    save(path, tiny_codetalker())
    good = path.read_bytes()
    for content in (b"", b"hello", good[:len(good) // 2]):
        path.write_bytes(content)
        assert "damaged" in load_error(path)


def test_load_refuses_checkpoints_of_other_versions(tmp_path):
    path = tmp_path / "model.pt"
    save(path, tiny_codetalker())
    checkpoint = torch.load(path)
    weights = checkpoint["weights"]
    spoilt = [{"stage": "ar", "weights": weights}, weights["style"],
              checkpoint | {"weights": {"style": weights["style"]}},
              checkpoint | {"config": checkpoint["config"] | {"dim": 32}},
              checkpoint | {"config": checkpoint["config"] | {"unknown": 1}}]
    for content in spoilt:
        torch.save(content, path)
        assert "of another version" in load_error(path)


class Payload:
    """Makes a folder when it is unpickled"""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_load_runs_no_code_of_the_file(tmp_path):
    torch.save({"model": "CodeTalker", "weights": Payload(tmp_path / "made")}, tmp_path / "model.pt")
    load_error(tmp_path / "model.pt")
    assert not (tmp_path / "made").exists()


class Variant(CodeTalker):
    pass


def test_load_builds_the_classes_it_is_given(tmp_path):
    model = Variant(tiny_codetalker().config, tiny_autoencoder())
    save(tmp_path / "model.pt", model)
    loaded, _ = load(tmp_path / "model.pt", "ar", classes=(MotionAutoencoder, Variant))
    assert type(loaded) is Variant
    assert "CodeTalker expected, found Variant" in load_error(tmp_path / "model.pt")


def test_atomic_write_keeps_the_old_file_on_an_error(tmp_path):
    path = tmp_path / "face.png"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(OSError):
        with atomic_write(path) as temporary:
            assert temporary.suffix == ".png" and temporary.parent == tmp_path
            temporary.write_text("half of the n")
            raise OSError("disk full")
    assert path.read_text() == "old"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["face.png"]


def test_interrupted_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    model = tiny_autoencoder()
    save(path, model, step=1)

    def interrupted(checkpoint, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(path, model, step=2)
    assert load(path, "vq")[1]["step"] == 1


# -----------------------------------------------------------------------------
# the file


def test_codetalker_imports_torch_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(Path(codetalker.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_codetalker_runs_where_numpy_is_missing():
    code = ("import sys; sys.modules.update(numpy=None, scipy=None, matplotlib=None); import torch;"
            "from codetalker import *; model = CodeTalker(ARConfig(1), MotionAutoencoder("
            "VQConfig(5))).eval(); mel = log_mel(torch.randn(4000), 30, 7, 64);"
            "codes = model.generate(model.encode_audio(mel[None]), torch.ones(1, 1));"
            "print(tuple(model.decode(codes).shape))")
    root = Path(codetalker.__file__).parent
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=root, text=True,
                            capture_output=True)
    assert result.stdout == "(1, 7, 15)\n", result.stderr
