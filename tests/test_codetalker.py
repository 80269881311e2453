"""The model against independent oracles: loops, PyTorch's layers, examples worked by hand."""
import ast
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import codetalker
from codetalker import (ARConfig, Attention, AudioEncoder, Block, CodeTalker, KVCache,
                        MotionAutoencoder, Quantiser, TimeConv, VQConfig, causal_mask, log_mel)

STYLES = torch.eye(3)


def tiny_autoencoder():
    config = VQConfig(vertices=5, dim=16, heads=2, ffn_dim=24, codes_per_frame=4, code_dim=4,
                      codebook_size=32)
    model = MotionAutoencoder(config)
    nn.init.normal_(model.quantiser.codebook, std=0.3)
    return model.eval()


def tiny_codetalker():
    config = ARConfig(styles=3, phones=5, period=4, context=10, dim=16, heads=2, mel_bands=6,
                      audio_layers=2, temperature=0.0)
    model = CodeTalker(config, tiny_autoencoder())
    nn.init.normal_(model.head.weight)      # zero at first: every frame would be predicted alike
    return model.eval()


def random_batch(batch=3, frames=9):
    """mel, codes, motion and phones that fit tiny_codetalker()"""
    codes = torch.randint(32, (batch, frames, 4))
    phones = torch.randint(5, (batch, frames))
    return torch.randn(batch, frames * 4, 6), codes, torch.randn(batch, frames, 15), phones


def assert_close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def frames_that_differ(a, b):
    """The frames t in which two tensors (B, T, D) differ by more than rounding, as a list"""
    return (a - b).abs().amax(dim=(0, 2)).gt(1e-6).nonzero().flatten().tolist()


# ---------- building blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size, dilation", [(5, 1), (3, 4)])
def test_time_conv_matches_loop_with_repeated_edge_frames(kernel_size, dilation):
    conv = TimeConv(3, 7, kernel_size, dilation)
    x = torch.randn(2, 9, 3)
    expected = conv.conv.bias.repeat(2, 9, 1)
    for t in range(9):
        for k in range(kernel_size):
            source = t + (k - kernel_size // 2) * dilation
            expected[:, t] += x[:, min(max(source, 0), 8)] @ conv.conv.weight[:, :, k].t()
    assert_close(conv(x), expected)


@torch.no_grad()
def copy_weights(attention, oracle, *pairs):
    """Weights of an Attention into nn.MultiheadAttention, and (layer, its oracle) pairs as well."""
    inputs = [attention.query, attention.key, attention.value]
    oracle.in_proj_weight.copy_(torch.cat([layer.weight for layer in inputs]))
    if attention.query.bias is not None:
        oracle.in_proj_bias.copy_(torch.cat([layer.bias for layer in inputs]))
    oracle.out_proj.load_state_dict(attention.out.state_dict())
    for layer, layer_oracle in pairs:
        nn.init.normal_(layer.weight)           # norms are all alike at first
        layer_oracle.load_state_dict(layer.state_dict())


def test_attention_matches_multihead_attention():
    attention = Attention(16, 4)
    oracle = nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.normal_(attention.key.bias)
    copy_weights(attention, oracle)
    x = torch.randn(2, 5, 16)
    context = torch.randn(2, 7, 16)
    mask = torch.randn(4, 5, 7)
    mask[0, :, 4:] = -math.inf
    expected, _ = oracle(x, context, context, attn_mask=mask.repeat(2, 1, 1))
    assert_close(attention(x, context, mask), expected)


def test_kv_cache_matches_full_attention():
    """Twelve frames one by one, with the last five in the cache; PyTorch's attention at once."""
    attention = Attention(16, 4)
    x = torch.randn(2, 12, 16)
    mask = causal_mask(12, period=2, heads=4, context=5)
    newest = causal_mask(5, period=2, heads=4, context=5)[:, -1:]
    cache = KVCache(5)
    frames, sizes = [], []
    for t in range(12):
        frames.append(attention(x[:, t:t + 1], mask=newest[..., -(t + 1):], kv_cache=cache))
        sizes.append(cache.k.shape[2])
    assert sizes == [1, 2, 3, 4] + [5] * 8

    layers = (attention.query, attention.key, attention.value)
    q, k, v = [layer(x).view(2, 12, 4, 4).transpose(1, 2) for layer in layers]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)     # (B, heads, T, D/heads)
    expected = attention.out(y.transpose(1, 2).flatten(2))
    assert_close(attention(x, mask=mask), expected)
    assert_close(torch.cat(frames, dim=1), expected)


def test_block_matches_pre_norm_transformer_layer():
    block = Block(16, heads=2, ffn_dim=24)
    oracle = nn.TransformerEncoderLayer(16, 2, 24, dropout=0, batch_first=True, norm_first=True,
                                        activation=nn.GELU(approximate="tanh"))
    linear1, _, linear2 = block.feed_forward
    copy_weights(block.attention, oracle.self_attn,
                 (linear1, oracle.linear1), (linear2, oracle.linear2),
                 (block.norm1, oracle.norm1), (block.norm2, oracle.norm2))
    x = torch.randn(2, 9, 16)
    assert_close(block(x), oracle(x), 1e-4)


# ---------- stage 1 -------------------------------------------------------------------------------


def test_nearest_code_matches_worked_example_and_loop():
    """Codebook (0, 0), (1, 1). From (0.9, 0.6) the squared distances are 1.17 and 0.17: code 1."""
    quantiser = Quantiser(2, 2, beta=0.25)
    quantiser.codebook.data = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert quantiser.nearest(torch.tensor([[0.9, 0.6], [0.4, 0.5]])).tolist() == [1, 0]
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
    assert_close(loss, codetalker.vq_loss(z_e, z_q, 0.25))


def test_gradient_goes_straight_through_the_quantiser():
    """d(sum(w * z_q)) / dz_e = w, as if nothing had been quantised; the codebook gets nothing."""
    quantiser = Quantiser(8, 4, beta=0.25)
    z_e = torch.randn(1, 3, 2, 4, requires_grad=True)
    w = torch.randn(1, 3, 2, 4)
    z_q, _, _ = quantiser(z_e)
    (z_q * w).sum().backward()
    assert torch.equal(z_e.grad, w)
    assert quantiser.codebook.grad is None or not quantiser.codebook.grad.any()


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_vq_loss_worked_example(beta):
    """z_e = (3, 0), z_q = (1, 0): ((3 - 1)^2 + 0) / 2 = 2, so the loss is 2 + 2 beta.

    The first term moves the code alone: d/dz_q = 2 (1 - 3) / 2 = -2. The second moves the encoder
    alone: d/dz_e = beta 2 (3 - 1) / 2 = 2 beta.
    """
    z_e = torch.tensor([3.0, 0.0], requires_grad=True)
    z_q = torch.tensor([1.0, 0.0], requires_grad=True)
    loss = codetalker.vq_loss(z_e, z_q, beta)
    loss.backward()
    assert loss.item() == 2 + 2 * beta
    assert z_q.grad.tolist() == [-2, 0] and z_e.grad.tolist() == [2 * beta, 0]


def test_reset_dead_codes_restarts_unused_codes_near_encoder_outputs():
    """Usage is counted in training; here only the even codes are used, twice each."""
    quantiser = Quantiser(60, 4, beta=0.25)
    used = quantiser.codebook[::2].detach().clone().view(1, 15, 2, 4)
    quantiser.eval()(used)
    quantiser.train()(used)
    quantiser(used)
    assert quantiser.usage.tolist() == [2, 0] * 30

    z_e = 5 + torch.randn(1, 2, 2, 4)
    quantiser.reset_dead_codes(z_e)
    assert torch.equal(quantiser.codebook[::2].view(1, 15, 2, 4), used)
    distance, chosen = torch.cdist(quantiser.codebook[1::2], z_e.view(-1, 4)).min(dim=1)
    assert 0 < distance.min() and distance.max() < 0.05         # four coordinates, 0.01 each
    assert len(chosen.unique()) == 4                            # from anywhere in the batch
    assert not quantiser.usage.any()                            # counting starts again


def test_stage1_losses_match_numpy():
    """Reconstruction loss: mean of |error|, plus mean of error^2, plus 4 times the mean squared error
    of frame-to-frame differences. encode and decode do the same."""
    model = tiny_autoencoder()
    motion = torch.randn(3, 9, 15)
    reconstruction, codes, losses = model(motion)
    error = (reconstruction - motion).detach().numpy()
    velocity = np.square(error[:, 1:] - error[:, :-1]).mean()
    expected = np.abs(error).mean() + np.square(error).mean() + 4 * velocity
    assert losses["reconstruction"].item() == pytest.approx(expected, rel=1e-5)
    assert_close(losses["vq"], model.quantiser(model.encoder(motion))[2])
    assert torch.equal(model.encode(motion), codes) and len(codes.unique()) > 4
    assert_close(model.decode(codes), reconstruction)


def motion_of_three_muscles():
    """A hundred vertices, but three directions of motion: (8, 9, 300)"""
    return torch.randn(8, 9, 3) @ torch.randn(3, 300)


def medium_autoencoder():
    return MotionAutoencoder(VQConfig(100, layers=1, dim=32, codes_per_frame=8, code_dim=4))


@torch.no_grad()
def test_init_from_data_spans_the_directions_of_motion():
    """Projected onto what the first layer reads, or the last can write, the motion stays the same.

    16 directions (half of D = 32) of mean square 1 are mixed into 32 features: mean square 1/2.
    """
    model = medium_autoencoder()
    motion = motion_of_three_muscles()
    model.init_from_data(motion)
    for weight in (model.encoder.in_proj.weight, model.decoder.out_proj.weight.t()):    # (32, 300)
        assert torch.linalg.matrix_rank(weight, rtol=1e-4) == 16
        assert_close(motion @ torch.linalg.pinv(weight, rtol=1e-4) @ weight, motion, 1e-4)
    assert_close(model.encoder.in_proj(motion).square().mean(), torch.tensor(0.5), 1e-4)
    features = torch.randn(1000, 32)
    written = model.decoder.out_proj(features).square().mean() / motion.square().mean()
    assert 0.6 < written < 1.6
    z_e = model.encoder(motion).view(-1, 4)
    assert torch.cdist(model.quantiser.codebook, z_e).amin(dim=1).max() < 0.05 * z_e.std()


def test_init_from_data_speeds_up_training():
    motion = motion_of_three_muscles()
    losses = []
    for init in (True, False):
        model = medium_autoencoder().train()
        if init:
            model.init_from_data(motion)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(20):
            _, _, parts = model(motion)
            optimiser.zero_grad()
            sum(parts.values()).backward()
            optimiser.step()
        losses.append(parts["reconstruction"].item())
    assert losses[0] < 0.7 * losses[1]


# ---------- audio ---------------------------------------------------------------------------------


def test_mel_filterbank_worked_example():
    """One band from 60 to 7600 Hz is one from 92.8 to 2787 mel; its peak, 1440 mel, is 1812 Hz.

    Bins are 31.25 Hz apart. Bin 32 is 1000 Hz: (1000 - 60) / (1812 - 60) = 0.537. Bin 128 is
    4000 Hz: (7600 - 4000) / (7600 - 1812) = 0.622. With many bands, where one triangle falls the
    next one rises.
    """
    filters = codetalker.mel_filterbank(1)
    assert filters.shape == (257, 1)
    found = filters[[1, 32, 58, 128, 244], 0].tolist()
    assert found == pytest.approx([0, 0.537, 1, 0.622, 0], abs=1e-3)
    filters = codetalker.mel_filterbank(20)
    first, last = filters.argmax(dim=0)[[0, -1]]
    assert_close(filters[first + 1:last].sum(dim=1), torch.ones(last - first - 1))


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
        assert mel.shape == (2 * fps * 4, 16)
        assert mel.sum(dim=1).argmax() == math.floor(click * fps * 4)


def modulated_noise(seconds):
    """Loud and soft in turn, as speech is"""
    t = torch.arange(seconds * 16_000)
    return 0.1 * torch.randn(len(t)) * (2 + torch.sin(t / 900))


def test_log_mel_removes_loudness_and_a_constant_filter():
    """The mean over speech is subtracted. A pause 40 dB below speech does not count, but for the
    200 ms next to speech: a pause of two seconds changes no more than one of one."""
    audio = modulated_noise(1)
    mel = log_mel(audio, 30, 30, 24)
    assert mel.std() > 0.3
    assert_close(log_mel(0.01 * audio, 30, 30, 24), mel, 1e-4)
    darker = audio + 0.7 * F.pad(audio, (1, 0))[:-1]            # treble 15 dB below bass: 1.5
    assert (log_mel(darker, 30, 30, 24) - mel).abs().mean() < 0.01
    short = log_mel(torch.cat([audio, 0.01 * audio]), 30, 60, 24)
    long = log_mel(torch.cat([audio, 0.01 * audio, 0.01 * audio]), 30, 90, 24)
    assert_close(long[:116], short[:116], 0.03)         # of the pause, noise is subtracted


def test_log_mel_of_silence_is_finite():
    assert log_mel(torch.zeros(16_000), 30, 30, 24).isfinite().all()


@pytest.mark.parametrize("samples, frames", [(0, 30), (16_000, 0)])
def test_log_mel_without_audio_raises(samples, frames):
    with pytest.raises(ValueError, match="at least one frame expected"):
        log_mel(torch.zeros(samples), 30, frames, 24)


def test_perturb_vocal_tract_matches_interpolation(monkeypatch):
    """Three sequences: unchanged, shifted by one band, stretched by 1.1 and shifted by -1/2 band.

    The last band of eight is read at 6.999 and not at 7, so up to a thousandth is the band before.
    """
    noise = [torch.tensor([[0.0], [0.0], [1.25]]), torch.tensor([[0.0], [53 / 8], [-53 / 16]])]
    monkeypatch.setattr(torch, "randn", lambda *shape, device: noise.pop(0))
    mel = torch.rand(3, 5, 8)
    found = codetalker.perturb_vocal_tract(mel)
    assert_close(found[0], mel[0], 1.1e-3)
    assert_close(found[1, :, :7], mel[1, :, 1:], 1.1e-3)
    for step in range(5):
        expected = np.interp(1.1 * np.arange(8) - 0.5, np.arange(8), mel[2, step].numpy())
        assert found[2, step].tolist() == pytest.approx(expected.tolist(), abs=1.1e-3)


@torch.no_grad()
def test_audio_encoder_receptive_field():
    """Convolutions reach 4 steps to either side, so step 88, the first of frame 22, is in frames 21
    to 23 (step 92); the dilated ones reach 1 + 2 + 4 + 8 frames more."""
    encoder = AudioEncoder(ARConfig(styles=1, dim=8, mel_bands=6)).double().eval()
    mel = torch.randn(1, 45 * 4, 6, dtype=torch.float64)
    changed = mel.clone()
    changed[:, 88] += 10
    assert frames_that_differ(encoder(mel), encoder(changed)) == list(range(21 - 15, 23 + 16))


# ---------- stage 2 -------------------------------------------------------------------------------


def test_periodic_positions_match_loop():
    table = codetalker.periodic_positions(5, 6)
    for t in range(5):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            expected = [math.sin(angle), math.cos(angle)]
            assert table[t, 2 * i:2 * i + 2].tolist() == pytest.approx(expected, abs=1e-6)


def test_causal_mask_matches_loop():
    """ALiBi's slopes for four heads are 1/4, 1/16, 1/64, 1/256; the period is 4, the context 9."""
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
    linear1, _, linear2 = layer.feed_forward
    copy_weights(layer.self_attention, oracle.self_attn,
                 (linear1, oracle.linear1), (linear2, oracle.linear2), (layer.norm1, oracle.norm1),
                 (layer.norm2, oracle.norm2), (layer.norm3, oracle.norm3))
    copy_weights(layer.cross_attention, oracle.multihead_attn)
    x, audio = torch.randn(2, 2, 9, 16)
    mask = causal_mask(9, period=4, heads=2, context=6)
    diagonal = torch.zeros(9, 9).masked_fill(~torch.eye(9, dtype=torch.bool), -math.inf)
    expected = oracle(x, audio, tgt_mask=mask.repeat(2, 1, 1), memory_mask=diagonal)
    assert_close(layer(x, audio, mask), expected, 1e-4)


def test_embed_adds_style_and_position():
    """Frame 0 has no previous frame, and position 0 is sin 0, cos 0, sin 0 ... = 0, 1, 0 ..."""
    model = tiny_codetalker()
    prev = torch.randn(3, 7, 16)
    x = model.embed(prev, STYLES)
    assert_close(x[:, 0], model.style + torch.tensor([0.0, 1.0]).repeat(8))
    frame6 = model.in_proj(prev[:, 6]) + model.style + codetalker.periodic_positions(4, 16)[6 % 4]
    assert_close(x[:, 6], frame6)
    assert_close(model.embed(prev[:, 5:], STYLES, start=5), x[:, 5:])
    halves = torch.tensor([[0.5, 0.0, 0.5]])
    assert_close(model.embed(prev[:1], halves)[:, 0], (x[:1, 0] + x[2:, 0]) / 2)


@torch.no_grad()
def test_predict_sees_the_past_within_the_context_and_no_future():
    """The codes of frame 1 are the input of frame 2. Two layers of ten frames pass it on to frame
    2 + 9 and then to 2 + 18. Audio enters after the first self-attention: frames 5 to 5 + 9."""
    model = tiny_codetalker()
    past, audio = torch.randn(2, 3, 30, 16)
    changed_past, changed_audio = past.clone(), audio.clone()
    changed_past[:, 1] += 1
    changed_audio[:, 5] += 1
    before = model.predict(past, STYLES, audio)
    after = model.predict(changed_past, STYLES, audio)
    assert frames_that_differ(before, after) == list(range(2, 21))
    after = model.predict(past, STYLES, changed_audio)
    assert frames_that_differ(before, after) == list(range(5, 15))


def test_logits_match_gaussian_and_argmax_is_nearest_code():
    model = tiny_codetalker()
    nn.init.constant_(model.log_var, math.log(0.2))
    z_hat = 0.3 * torch.randn(2, 5, 16)
    codebook = model.autoencoder.quantiser.codebook
    distance = torch.cdist(z_hat.view(2, 5, 4, 4), codebook)        # (2, 5, 4, 32)
    density = torch.exp(-distance.square() / (2 * 0.2))
    logits = model.logits(z_hat)
    assert_close(logits.softmax(dim=-1), density / density.sum(dim=-1, keepdim=True))
    assert torch.equal(logits.argmax(dim=-1), distance.argmin(dim=-1))


def test_sample_frequencies_match_softmax():
    """20,000 samples of each distribution: a share of 1/2 has a standard deviation of 0.0035."""
    model = tiny_codetalker()
    logits = torch.randn(1, 1, 3, 5)
    codes = model.sample(logits.expand(2_000, 10, 3, 5), temperature=0.7)
    for h in range(3):
        share = codes[..., h].flatten().bincount(minlength=5) / 20_000
        assert_close(share, (logits[0, 0, h] / 0.7).softmax(dim=0), 0.015)
    assert torch.equal(model.sample(logits, temperature=0), logits.argmax(dim=-1))


@torch.no_grad()
def test_generate_matches_predicting_the_prefix_anew(monkeypatch):
    """Without a cache, for 40 frames: ten periods, four contexts. Then all frames in one pass."""
    model = tiny_codetalker()
    frames = []         # the logits of each

    def nearest_code(logits, temperature):
        frames.append(logits)
        return logits.argmax(dim=-1)

    monkeypatch.setattr(model, "sample", nearest_code)
    audio = model.encode_audio(torch.randn(3, 40 * 4, 6))
    codebook = model.autoencoder.quantiser.codebook
    codes = torch.zeros(3, 0, 4, dtype=torch.long)
    for t in range(40):
        past = codebook[F.pad(codes, (0, 0, 0, 1))].flatten(2)      # predict() ignores frame t
        z_hat = model.predict(past, STYLES, audio[:, :t + 1])[:, -1]
        nearest = torch.cdist(z_hat.view(3, 1, 4, 4), codebook).argmin(dim=-1)
        codes = torch.cat([codes, nearest], dim=1)
    assert torch.equal(model.generate(audio, STYLES), codes) and len(codes.unique()) > 10
    z_hat = model.predict(model.code_vectors(codes), STYLES, audio)
    assert_close(torch.cat(frames, dim=1), model.logits(z_hat), 1e-3)


@torch.no_grad()
def test_generate_samples_at_the_model_temperature():
    model = tiny_codetalker()
    nn.init.constant_(model.log_var, 1.0)
    audio = torch.randn(3, 9, 16)
    codes = []
    for default, temperature in ((0.0, None), (1.0, 0.0), (0.0, 1.0), (1.0, None)):
        torch.manual_seed(1)
        model.config.temperature = default
        codes.append(model.generate(audio, STYLES, temperature))
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[2], codes[3])
    assert not torch.equal(codes[0], codes[2])
    assert not torch.equal(model.generate(audio, STYLES), codes[2])     # another random state


def test_code_loss_worked_example(monkeypatch):
    """Logits (ln 3, 0) are probabilities 3/4 and 1/4. Codes 0 and 1: -(ln 3/4 + ln 1/4) / 2."""
    model = tiny_codetalker()
    logits = torch.tensor([math.log(3), 0.0]).expand(1, 2, 1, 2)
    monkeypatch.setattr(model, "logits", lambda z_hat: logits)
    loss = model.code_loss(torch.zeros(1, 2, 16), torch.tensor([[[0], [1]]]))
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)


def test_phone_loss_is_cross_entropy_of_every_frame():
    """Mean of -log p of the true phones; its gradient reaches the audio features."""
    model = tiny_codetalker()
    audio = torch.randn(1, 2, 16, requires_grad=True)
    phones = torch.tensor([[0, 1]])
    log_probs = model.phone_head(audio).log_softmax(dim=-1)
    loss = model.phone_loss(audio, phones)
    assert_close(loss, -(log_probs[0, 0, 0] + log_probs[0, 1, 1]) / 2)
    loss.backward()
    assert audio.grad.abs().amin(dim=2).min() > 0


def test_motion_loss_takes_every_fourth_sequence_and_its_gradient_goes_straight_through(monkeypatch):
    """Of six sequences the motion loss takes 0 and 4. z_hat gets the gradient that the decoder has
    for its input z_q."""
    model = tiny_codetalker()
    mel, codes, motion, phones = random_batch(batch=6)
    z_hat = (0.3 * torch.randn(6, 9, 16)).requires_grad_()
    monkeypatch.setattr(model, "predict", lambda past, style, audio: z_hat)
    losses = model(mel, STYLES.repeat(2, 1), codes, motion, phones)

    log_probs = model.logits(z_hat).log_softmax(dim=-1)
    log_prob = log_probs.gather(3, codes[..., None])        # of the true codes
    assert_close(losses["code"], -log_prob.mean())

    z_q = model.code_vectors(log_probs.argmax(dim=-1)).detach().requires_grad_()
    error = model.autoencoder.decoder(z_q.view(6, 9, 4, 4)) - motion
    expected = 2.0 * error[[0, 4]].square().mean()          # motion_weight is 2
    assert_close(losses["motion"], expected)
    found, = torch.autograd.grad(losses["motion"], z_hat)
    assert_close(found, torch.autograd.grad(expected, z_q)[0])


@torch.no_grad()
def test_batch_loss_is_mean_over_single_sequences():
    model = tiny_codetalker()
    model.config.motion_loss_every = 1
    mel, codes, motion, phones = random_batch()
    singles = []
    for b in range(3):
        one = slice(b, b + 1)
        singles.append(model(mel[one], STYLES[one], codes[one], motion[one], phones[one]))
    for name, loss in model(mel, STYLES, codes, motion, phones).items():
        mean = np.mean([losses[name].item() for losses in singles])
        assert loss.item() == pytest.approx(mean, rel=1e-5)


def test_scheduled_sampling_replaces_frames_of_every_second_sequence(monkeypatch):
    """Sequences 0 and 2 of three: no frame at 0, all at 1; at 0.4, 40 % of 800, with a standard
    deviation of 1.7 %. The past of the first pass is random in a quarter of the frames."""
    model = tiny_codetalker()
    codes = random_batch(frames=400)[1]
    audio = torch.randn(3, 400, 16)
    predict = model.predict
    pasts = []

    def record(past, style, audio):
        pasts.append(past)
        return predict(past, style, audio)

    def mix(prob):
        torch.manual_seed(1)                                # the same samples every time
        return model.scheduled_sampling(codes, STYLES, audio, prob)

    monkeypatch.setattr(model, "predict", record)
    own = mix(1.0)
    assert torch.equal(mix(0.0), codes) and torch.equal(own[1], codes[1])
    mixed = mix(0.4)
    is_own = (mixed == own).all(dim=2)
    is_true = (mixed == codes).all(dim=2)
    assert is_true[1].all() and (is_own ^ is_true)[::2].all()
    assert is_own[::2].float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert len(pasts) == 2                                  # none at 0
    is_random = (pasts[0] != model.code_vectors(codes)[::2]).any(dim=2)
    assert is_random.float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_training_moves_stage2_and_leaves_stage1():
    """Query and key of the cross-attention stay too: with a single key they have no effect. The
    head starts at zero, so that training starts from one distribution for all frames."""
    model = CodeTalker(tiny_codetalker().config, tiny_autoencoder()).train()
    assert not model.predict(*torch.randn(1, 3, 9, 16), STYLES, torch.randn(3, 9, 16)).any()
    assert model.layers[0].training and not model.autoencoder.decoder.training
    nn.init.normal_(model.head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mel, codes, motion, phones = random_batch()
    sum(model(mel, STYLES, codes, motion, phones, sampling_prob=0.5).values()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        no_effect = "cross_attention.query" in name or "cross_attention.key" in name
        if not name.endswith("attention.key.bias"):         # softmax cancels it but for rounding
            assert moved != (no_effect or name.startswith("autoencoder.")), name


# ---------- checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage, make", [("vq", tiny_autoencoder), ("ar", tiny_codetalker)])
def test_load_restores_what_save_wrote(tmp_path, stage, make):
    model = make().train()
    codetalker.save(tmp_path / "model.pt", model, step=7)
    loaded, checkpoint = codetalker.load(tmp_path / "model.pt", stage)
    assert checkpoint["step"] == 7 and loaded.config == model.config
    assert type(loaded) is type(model) and not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert os.listdir(tmp_path) == ["model.pt"]


def load_error(path, stage="ar"):
    """The message of load(): one line with the path, and the script that writes what it expects"""
    with pytest.raises(ValueError) as error:
        codetalker.load(path, stage)
    message = str(error.value)
    assert str(path) in message and f"train_{stage}.py" in message and "\n" not in message
    return message


class Variant(CodeTalker):
    pass


def test_load_names_the_class_it_expected_and_found(tmp_path):
    path = tmp_path / "model.pt"
    codetalker.save(path, Variant(tiny_codetalker().config, tiny_autoencoder()))
    for stage, expected in (("vq", "MotionAutoencoder"), ("ar", "CodeTalker")):
        message = load_error(path, stage)
        assert expected in message and "Variant" in message
    model, _ = codetalker.load(path, "ar", classes=(MotionAutoencoder, Variant))
    assert type(model) is Variant


def test_load_refuses_other_files_in_one_line_and_runs_no_code(tmp_path):
    path = tmp_path / "model.pt"
    load_error(path)                                        # there is no such file
    codetalker.save(path, tiny_codetalker())
    content = path.read_bytes()
    pickle_that_calls_mkdir = f"cos\nmkdir\n(V{tmp_path}/made\ntR.".encode()
    for damaged in (b"", b"hello", content[:len(content) // 2], pickle_that_calls_mkdir):
        path.write_bytes(damaged)
        load_error(path)
    torch.save({"stage": "ar"}, path)                       # of an older version
    load_error(path)
    assert os.listdir(tmp_path) == ["model.pt"]


def test_interrupted_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    codetalker.save(path, tiny_autoencoder(), step=1)

    def interrupted(checkpoint, file):
        assert Path(file).suffix == ".pt"       # other writers choose the format by it
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        codetalker.save(path, tiny_autoencoder(), step=2)
    assert codetalker.load(path, "vq")[1]["step"] == 1
    assert os.listdir(tmp_path) == ["model.pt"]


def test_codetalker_imports_torch_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(Path(codetalker.__file__).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}
