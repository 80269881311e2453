"""The model against independent oracles: loops, torch's own layers, hand-worked examples."""
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import codetalker as ct
from codetalker import STEPS_PER_FRAME as STEPS

LENGTHS = torch.tensor([9, 4, 1])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def stage1(**changes):
    model = ct.MotionAutoencoder(ct.VQConfig(vertices=5, width=16, heads=2, hidden=24, slots=4, code_width=4,
                                             codes=32, **changes))
    nn.init.normal_(model.quantiser.codebook, std=0.3)
    return model.eval()


TARGETS = ["codes", "vertices", "indices"]


def stage2(target="codes", squared=False, **changes):
    """It answers with what is likeliest, as long as a test does not ask for chance."""
    config = ct.ARConfig(styles=3, period=4, width=16, heads=2, memory=10, mel_bands=6, audio_layers=2, target=target,
                         history="motion" if target == "vertices" else "codes", squared=squared, temperature=0.0)
    model = ct.CodeTalker(config, stage1(**changes))
    nn.init.normal_(model.query.weight)             # it starts from zero, which would say the same in every frame
    return model.eval()


def speech(batch=3, frames=9):
    """Random log-mel steps, one-hot styles, motion for stage2()."""
    return torch.randn(batch, frames * STEPS, 6), torch.eye(3)[:batch], torch.randn(batch, frames, 15)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ------------------------------------------------------------------------------------------------------- shared parts


def test_hold_last_repeats_the_last_real_frame():
    x = torch.tensor([[1., 2, 3, 4], [5, 6, 7, 8]])[..., None]
    assert ct.hold_last(x, torch.tensor([4, 2]))[..., 0].tolist() == [[1, 2, 3, 4], [5, 6, 6, 6]]


@pytest.mark.parametrize("kernel, dilation", [(5, 1), (3, 4)])
def test_time_conv_is_conv1d_and_ignores_padding(kernel, dilation):
    ours, x = ct.TimeConv(3, 7, kernel, dilation), torch.randn(3, 9, 3)
    oracle = nn.Conv1d(3, 7, kernel, dilation=dilation, padding="same", padding_mode="replicate")
    oracle.load_state_dict(ours.conv.state_dict())
    together = ours(x, LENGTHS)
    for row, length in enumerate(LENGTHS):
        close(together[row, :length], oracle(x[row:row + 1, :length].transpose(1, 2))[0].t())


def test_attention_is_torch_multihead_attention():
    ours, oracle = ct.Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    parts = (ours.query, ours.key, ours.value)
    oracle.load_state_dict({"in_proj_weight": torch.cat([part.weight for part in parts]),
                            "in_proj_bias": torch.cat([part.bias for part in parts]),
                            "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias})
    x, source, bias = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 4, 5, 7)
    bias[0, :, :, 4:] = -math.inf
    close(ours(x, source, bias), oracle(x, source, source, attn_mask=bias.flatten(0, 1))[0])


def test_attention_frame_by_frame_with_a_cache_is_attention_at_once_and_the_cache_stays_small():
    attention, x, cache = ct.Attention(16, 4), torch.randn(2, 12, 16), {}
    row, steps, kept = ct.causal_bias(5, 2, 4, 5)[:, -1:], [], []
    for t in range(12):
        steps.append(attention(x[:, t:t + 1], bias=row[..., -t - 1:], cache=cache))
        kept.append(cache["seen"].shape[-2])
    close(torch.cat(steps, 1), attention(x, bias=ct.causal_bias(12, 2, 4, 5)))
    assert kept == [1, 2, 3, 4] + [5] * 8


def test_instance_norm_is_torch_instance_norm_on_the_real_frames():
    x = 3 + 2 * torch.randn(3, 9, 4)
    close(ct.instance_norm(x), nn.InstanceNorm1d(4)(x.transpose(1, 2)).transpose(1, 2))
    masked = ct.instance_norm(x, LENGTHS)
    close(masked[1, :4], nn.InstanceNorm1d(4)(x[1:2, :4].transpose(1, 2))[0].t())
    close(masked[2, 0], torch.zeros(4))


# ------------------------------------------------------------------------------------------------------------ stage 1


def test_nearest_code_by_hand_and_by_loop():
    """Codebook (0, 0), (1, 1); feature (0.9, 0.6): squared distances 1.17 and 0.17, so code 1."""
    quantiser = ct.Quantiser(2, 2, 0.25)
    quantiser.codebook.data = torch.tensor([[0., 0], [1, 1]])
    assert quantiser.nearest(torch.tensor([[0.9, 0.6], [0.4, 0.5]])).tolist() == [1, 0]
    quantiser, z = ct.Quantiser(40, 3, 0.25), torch.randn(2, 5, 4, 3)
    nn.init.normal_(quantiser.codebook)
    loop = [min(range(40), key=lambda n: (feature - quantiser.codebook[n]).square().sum().item())
            for feature in z.reshape(-1, 3)]
    z_q, indices, _ = quantiser(z)
    assert indices.flatten().tolist() == loop
    close(z_q, quantiser.codebook[loop].view(z.shape))


def test_gradient_goes_straight_through_the_quantiser():
    """Whatever the decoder wants of z_q, the encoder is told of z_e: d(sum(w * z_q)) / d(z_e) = w."""
    quantiser, z, w = ct.Quantiser(8, 4, 0.25), torch.randn(1, 3, 2, 4, requires_grad=True), torch.randn(1, 3, 2, 4)
    (quantiser(z)[0] * w).sum().backward()
    close(z.grad, w)
    assert quantiser.codebook.grad is None or not quantiser.codebook.grad.any()


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_codebook_term_moves_codes_and_beta_only_the_encoder(beta):
    """One feature 3 and one code 1 (c = 1): loss = (3 - 1)^2 + beta (3 - 1)^2. The code is pulled by the first term
    alone, d/dcode = 2 (1 - 3) = -4; the feature by the second alone, d/dfeature = beta * 2 (3 - 1) = 4 beta."""
    quantiser, z = ct.Quantiser(1, 1, beta), torch.full((1, 1, 1, 1), 3.0, requires_grad=True)
    nn.init.ones_(quantiser.codebook)
    loss = quantiser(z)[2]
    loss.backward()
    assert (loss.item(), quantiser.codebook.grad.item(), z.grad.item()) == (4 + 4 * beta, -4, 4 * beta)


def test_revive_restarts_only_unused_codes_near_features():
    quantiser, z = ct.Quantiser(6, 4, 0.25), torch.randn(1, 8, 2, 4)
    nn.init.normal_(quantiser.codebook)
    quantiser.codebook.data[[1, 4]] += 100                              # nothing is near these
    quantiser.train()(torch.cat([quantiser.codebook[[0, 2, 3, 5]].view(1, 2, 2, 4)] * 2, 1).detach())
    before = quantiser.codebook.detach().clone()
    assert quantiser.revive(z) == 2
    kept = torch.tensor([0, 2, 3, 5])
    assert torch.equal(quantiser.codebook[kept], before[kept])
    assert torch.cdist(quantiser.codebook[[1, 4]], z.view(-1, 4)).min(1).values.max() < 0.2
    assert quantiser.revive(z) == 6                                     # the count has started again


@pytest.mark.parametrize("squared", [False, True])
def test_stage1_loss_is_l1_and_squared_over_real_frames(squared):
    model, motion = stage1(squared=squared), torch.randn(3, 9, 15)
    made, _, losses = model(motion, LENGTHS)
    errors = [(made[b, t, i] - motion[b, t, i]).item() for b in range(3) for t in range(LENGTHS[b]) for i in range(15)]
    expected = np.mean(np.abs(errors)) + squared * np.mean(np.square(errors))
    assert losses["motion"].item() == pytest.approx(expected, rel=1e-5)


def test_start_from_leaves_codes_that_the_encoder_says():
    model = stage1()
    motion = torch.randn(8, 9, 3) @ torch.randn(3, 15)                  # three muscles
    model.start_from(motion)
    said = model.encoder(motion).flatten(0, 2)
    assert torch.cdist(model.quantiser.codebook, said).min(1).values.max() < 0.2 * said.std()


@pytest.mark.parametrize("piece, lengths", [(600, [9, 4, 1]), (5, [9, 7, 4])])
@pytest.mark.parametrize("instance_norm", [False, True])
def test_a_batch_with_lengths_equals_single_sequences(instance_norm, piece, lengths, monkeypatch):
    monkeypatch.setattr(ct, "PIECE", piece)
    monkeypatch.setattr(ct, "OVERLAP", 2)
    model = stage2(instance_norm=instance_norm)
    mel, style, motion = speech()
    lengths = torch.tensor(lengths)
    codes = model.autoencoder.encode(motion, lengths)
    decoded = model.autoencoder.decode(codes, lengths)
    made, chosen = model.generate(mel, style, lengths)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = model.autoencoder.encode(motion[one, :length])
        assert torch.equal(alone[0], codes[row, :length])
        close(model.autoencoder.decode(alone)[0], decoded[row, :length])
        motion_alone, codes_alone = model.generate(mel[one, :length * STEPS], style[one])
        assert torch.equal(codes_alone[0], chosen[row, :length])
        close(motion_alone[0], made[row, :length])


def test_pieces_fade_into_each_other_by_hand(monkeypatch):
    """Ten frames in pieces of six over two: 0-5 and 4-9. Of frame 4 a third is the second's, of frame 5 two thirds."""
    monkeypatch.setattr(ct, "PIECE", 6)
    monkeypatch.setattr(ct, "OVERLAP", 2)
    asked = []

    def make(start, stop, _):
        asked.append((start, stop))
        return torch.full((1, stop - start, 1), float(start))

    close(ct.in_pieces(make, 10)[0, :, 0], torch.tensor([0, 0, 0, 0, 4 / 3, 8 / 3, 4, 4, 4, 4]))
    ct.in_pieces(make, 6)
    ct.in_pieces(make, 11)
    assert asked == [(0, 6), (4, 10), (0, 6), (0, 6), (4, 10), (8, 11)]


@torch.no_grad()
def test_seams_of_a_long_decode_cannot_be_seen():
    """A slow movement with a drift, which InstanceNorm shifts differently in each piece: the worst case there is.
    Near the seams its acceleration is no larger than elsewhere; pieces put end to end would jump."""
    model, time = stage1(instance_norm=True), torch.arange(1600)[:, None]
    model.quantiser.codebook.data = torch.linspace(-1, 1, 4000)[:, None] * torch.randn(4)      # fine steps on a line
    codes = (2000 + 1300 * torch.sin(time / 40 + torch.arange(4)) + time / 4).round().long()[None]
    acceleration = model.decode(codes)[0].diff(n=2, dim=0).abs().amax(1)
    near = torch.zeros(1598).bool()
    near[538:600] = near[1078:1140] = True
    assert acceleration[near].max() <= acceleration[~near].max()
    hard = torch.cat([model.decode(codes[:, start:start + 540]) for start in (0, 540, 1080)], 1)[0]
    assert hard.diff(n=2, dim=0).abs().amax(1)[[539, 1079]].min() > 3 * acceleration[~near].max()


# -------------------------------------------------------------------------------------------------------------- audio


def test_mel_filterbank_by_hand():
    """One band from 60 to 7600 Hz: 92.8 and 2787 mel, the peak at their mean, 1440 mel = 1812 Hz. Bins are
    31.25 Hz apart: bin 32 is 1000 Hz, (1000 - 60) / (1812 - 60) = 0.537; bin 128 is 4000 Hz, 3600 / 5788 = 0.622."""
    bank = ct.mel_filterbank(1)
    assert bank.shape == (257, 1)
    assert bank[[1, 32, 58, 128, 244], 0].tolist() == pytest.approx([0, 0.537, 1, 0.622, 0], abs=1e-3)


def test_a_tone_is_loudest_in_the_band_nearest_to_it():
    low, high = 2595 * np.log10(1 + np.array([60, 7600]) / 700)
    time = torch.arange(16_000) / 16_000
    tones = [300, 1000, 2300, 5500]
    mel = ct.log_mel(torch.cat([torch.sin(2 * torch.pi * tone * time) for tone in tones]), 30, 120, 24)
    for second, tone in enumerate(tones):
        nearest = round((2595 * np.log10(1 + tone / 700) - low) / (high - low) * 25) - 1
        assert mel[second * 30 * STEPS + 20:(second + 1) * 30 * STEPS - 20].mean(0).argmax() == nearest


@pytest.mark.parametrize("fps", [25, 30, 60])
def test_a_click_is_heard_in_its_own_step(fps):
    """Step s covers s / (4 fps) .. (s + 1) / (4 fps) seconds, and is the first of its frame if s is 0, 4, 8 ..."""
    for click in (0.0531, 1.0011, 1.7389):
        audio = torch.zeros(2 * 16_000)
        audio[round(click * 16_000)] = 0.9
        mel = ct.log_mel(audio, fps, 2 * fps, 16)
        assert mel.shape == (2 * fps * STEPS, 16)
        assert mel.sum(1).argmax() == math.floor(click * fps * STEPS)


def test_log_mel_ignores_gain_and_a_constant_filter():
    audio = 0.1 * torch.randn(16_000) * (1 + torch.sin(torch.arange(16_000) / 900)).add(0.2)
    mel = ct.log_mel(audio, 30, 30, 24)
    close(ct.log_mel(0.1 * audio, 30, 30, 24), mel, 1e-3)
    darker = audio + 0.7 * F.pad(audio, (1, 0))[:-1]                    # 15 dB between low and high bands
    assert (ct.log_mel(darker, 30, 30, 24) - mel).abs().mean() < 0.03   # log10; 1.5 is the filter's own effect
    assert mel.std() > 0.3


# ------------------------------------------------------------------------------------------------------------ stage 2


def test_periodic_positions_by_loop():
    table = ct.periodic_positions(5, 6)
    for t in range(5):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert table[t, [2 * i, 2 * i + 1]].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-6)


def test_causal_bias_by_loop():
    """FaceFormer, equation 5, with ALiBi's slopes 2^(-8 h / heads), h = 1 .. heads; for four heads 1/4, 1/16 ..."""
    bias = ct.causal_bias(11, 4, 4, 9)
    for head in range(4):
        slope = 2 ** (-8 * (head + 1) / 4)
        for i in range(11):
            for j in range(11):
                assert bias[head, i, j].item() == (-slope * ((i - j) // 4) if 0 <= i - j < 9 else -math.inf)


def test_cross_attention_is_the_paper_s_aligned_mask():
    """Frame t may look at audio steps k t .. k t + k - 1 (equation 6): torch's attention with that mask built."""
    layer = stage2().layers[0]
    x, audio = torch.randn(2, 6, 16), torch.randn(2, 6, 3, 16)
    mask = torch.kron(torch.eye(6), torch.ones(1, 3)).bool()
    cross = layer.cross_attention
    heads = [cross.split(part(y)) for part, y in ((cross.query, x), (cross.key, audio.flatten(1, 2)),
                                                  (cross.value, audio.flatten(1, 2)))]
    oracle = cross.out(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2))
    close(cross(x.unsqueeze(2), audio).squeeze(2), oracle)
    bias = ct.causal_bias(6, 4, 2, 6)
    changed = audio.clone()
    changed[:, 4] += 1
    moved = (layer(x, changed, bias) - layer(x, audio, bias)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] * 4 + [True, False]


def test_the_future_does_not_leak():
    """Frame t is fed the codes before it: other codes from frame 5 on leave the answers 0 .. 5, and change the rest."""
    model, (mel, style, _) = stage2(), speech()
    audio = model.audio_encoder(mel).unsqueeze(2)
    fed = torch.randn(3, 9, model.history.in_features)
    other = torch.cat([fed[:, :5], fed[:, 5:] + 1], 1)
    moved = (model.answer(fed, style, audio) - model.answer(other, style, audio)).abs().amax((0, 2)) > 1e-5
    assert moved.tolist() == [False] * 6 + [True] * 3


def test_generate_equals_asking_the_whole_prefix_again_and_asking_all_at_once():
    """With keys and values kept, without, and teacher-forced with what was said; four times as long as the memory."""
    model, (mel, style, _) = stage2(), speech(frames=40)
    made, codes = model.generate(mel, style)
    audio = model.audio_encoder(mel).unsqueeze(2)
    said = torch.zeros(3, 40, 4, dtype=torch.long)
    for t in range(40):
        fed = model.autoencoder.quantiser.codebook[said[:, :t + 1]].flatten(2)
        z_hat = model.answer(fed, style, audio[:, :t + 1])[:, t].unflatten(-1, (4, 4))
        said[:, t] = torch.cdist(z_hat.flatten(0, 1), model.autoencoder.quantiser.codebook).argmin(1).view(3, 4)
    assert torch.equal(codes, said) and len(codes.unique()) > 4
    close(made, model.autoencoder.decode(said))
    forced = model.answer(model.autoencoder.quantiser.codebook[codes].flatten(2), style, audio)
    assert torch.equal(model.choose(forced), codes)


def test_what_is_beyond_the_memory_is_forgotten():
    """Two layers reach back twice: frame 20 to frame 20 - 2 * 9 = 2, which is fed what frame 1 was; frame 21 not."""
    model, (mel, style, _) = stage2(), speech(frames=30)
    audio, fed = model.audio_encoder(mel).unsqueeze(2), torch.randn(3, 30, model.history.in_features)
    other = fed.clone()
    other[:, 1] += 1
    moved = (model.answer(fed, style, audio) - model.answer(other, style, audio)).abs().amax((0, 2)) > 1e-6
    assert moved[2:21].all() and not moved[21:].any() and not moved[:2].any()


def test_the_first_frame_is_fed_style_alone():
    """Position 0 is sin 0, cos 0, ... = 0, 1, 0, 1, ..."""
    model, past = stage2(), torch.randn(3, 7, 16)
    fed = model.embed(past, torch.eye(3))
    close(fed[:, 0], model.style + torch.tensor([0., 1]).repeat(8))
    close(fed[:, 5:], model.embed(past[:, 5:], torch.eye(3), first=5))
    close(fed[:, 6] - model.style - ct.periodic_positions(4, 16)[2], model.history(past[:, 6]))


def test_styles_mix_linearly():
    model, past = stage2(), torch.randn(1, 7, 16)
    a, b = torch.eye(3)[None, 0], torch.eye(3)[None, 2]
    close(model.embed(past, 0.3 * a + 0.7 * b), 0.3 * model.embed(past, a) + 0.7 * model.embed(past, b))


@pytest.mark.parametrize("squared", [False, True])
def test_stage2_losses_over_real_frames_by_hand(squared):
    """The squared error of the motion decoded from the nearest codes, of every fourth sequence; of all answers the
    squared error against the true codes or the cross-entropy of Gaussians around the answers."""
    model, (mel, style, motion) = stage2(squared=squared), speech(batch=6)
    lengths, style = LENGTHS.repeat(2), torch.eye(3).repeat(2, 1)
    if not squared:
        nn.init.constant_(model.spread, math.log(0.5))
    codes = model.autoencoder.encode(motion, lengths)
    answers, losses = model(mel, style, codes, motion, lengths)
    answers, book = answers.detach().unflatten(-1, (4, 4)), model.autoencoder.quantiser.codebook
    distance = torch.cdist(answers, book).double()                      # (6, 9, 4, 32)
    made = model.autoencoder.decode(distance.argmin(-1), lengths)
    density = (-distance.square() / (2 * 0.5)).exp()
    likely = (density / density.sum(-1, keepdim=True)).gather(-1, codes[..., None])
    feature = (answers - book[codes]).square().flatten(2) if squared else -likely.log().flatten(2)
    for name, weight, error, rows in (("motion", model.config.motion_weight, (made - motion).square(), (0, 4)),
                                      ("feature", 1, feature, range(6))):
        real = torch.cat([error[row, :lengths[row]].flatten() for row in rows])
        assert losses[name].item() == pytest.approx(weight * real.mean().item(), rel=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_a_history_of_its_own_holds_nothing_of_the_truth(target):
    """It is what the model says to a strange history: random codes, or the motion of sequence 1 for sequence 2."""
    model, (mel, style, motion) = stage2(target=target), speech()
    other = torch.cat([motion[:1], motion[1:2] + 1, motion[2:]])
    answers = []
    for truth in (motion, other):
        torch.manual_seed(1)
        codes = model.autoencoder.encode(truth)
        answers.append([model(mel, style, codes, truth, own=own)[0] for own in (0.0, 1.0)])
    moved = [(a - b).abs().amax((1, 2)) > 1e-6 for a, b in zip(*answers)]
    assert moved[0].tolist() == [False, True, False]                    # teacher forcing
    assert moved[1].tolist() == [False, False, target == "vertices"]    # its own answers


@pytest.mark.parametrize("target", ["vertices", "indices"])
def test_other_targets_generate_what_they_answer_to_their_own_history(target):
    model, (mel, style, _) = stage2(target=target), speech()
    made, codes = model.generate(mel, style)
    fed = made if target == "vertices" else model.autoencoder.quantiser.codebook[codes].flatten(2)
    answers = model.answer(fed, style, model.audio_encoder(mel).unsqueeze(2))
    if target == "vertices":
        close(answers, made)
    else:
        assert torch.equal(answers.view(3, 9, 4, 32).argmax(-1), codes) and len(codes.unique()) > 4
    close(model.feed_back(answers), fed)


@pytest.mark.parametrize("target", ["vertices", "indices"])
def test_losses_of_the_other_targets_by_hand(target):
    model, (mel, style, motion) = stage2(target=target), speech()
    codes = model.autoencoder.encode(motion, LENGTHS)
    answers, losses = model(mel, style, codes, motion, LENGTHS)
    by_hand, answers = [], answers.detach()
    for row, length in enumerate(LENGTHS):
        for frame in range(length):
            if target == "vertices":
                by_hand += (answers[row, frame] - motion[row, frame]).square().tolist()
            else:
                by_hand += [-math.log(scores.softmax(0)[code]) for scores, code in
                            zip(answers[row, frame].view(4, 32), codes[row, frame])]
    assert [loss.item() for loss in losses.values()] == pytest.approx([np.mean(by_hand)], rel=1e-4)


@pytest.mark.parametrize("target", ["codes", "indices"])
def test_a_temperature_draws_codes_as_often_as_their_scores_say(target):
    model = stage2(target=target)
    answers = torch.randn(1, 1, 4, 4 if target == "codes" else 32)
    scores, book = answers, model.autoencoder.quantiser.codebook
    if target == "codes":
        nn.init.constant_(model.spread, math.log(0.2))
        scores = torch.stack([-(answers - code).square().sum(-1) / (2 * 0.2) for code in book], -1)
    drawn = model.choose(answers.expand(2000, 5, -1, -1).flatten(2), temperature=0.7)
    for slot in range(4):
        often = drawn[..., slot].flatten().bincount(minlength=32) / 10_000
        close(often, (scores[0, 0, slot] / 0.7).softmax(0), 0.025)
    assert torch.equal(model.choose(answers.flatten(2)), scores.argmax(-1))


def test_generation_draws_at_the_model_s_temperature_and_the_seed_decides():
    model, (mel, style, _) = stage2(), speech()
    nn.init.constant_(model.spread, 1.0)

    def codes(seed, **temperature):
        torch.manual_seed(seed)
        return model.generate(mel, style, **temperature)[1]

    assert torch.equal(codes(1), codes(2))                              # 0, as stage2() says
    model.config.temperature = 1.0
    assert torch.equal(codes(1), codes(1)) and not torch.equal(codes(1), codes(2))
    assert torch.equal(codes(1, temperature=0.0), codes(2, temperature=0.0))


def test_training_moves_stage2_and_leaves_stage1():
    model, (mel, style, motion) = stage2().train(), speech()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    _, losses = model(mel, style, model.autoencoder.encode(motion), motion)
    sum(losses.values()).backward()
    optimiser.step()
    for name, value in model.state_dict().items():
        if name.startswith("autoencoder."):
            assert torch.equal(value, before[name]), name
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert {"style", "query.weight", "history.weight", "audio_encoder.enter.conv.weight"} <= set(moved)


# ------------------------------------------------------------------------------------------ the paper, to the letter


@pytest.mark.parametrize("preset, vertices, styles, stage1_count, stage2_count", [
    ("vocaset", 5023, 8, 131_653_341, 187_249_536), ("biwi", 23370, 6, 246_477_824, 319_211_392)])
def test_presets_have_the_published_numbers_of_parameters(preset, vertices, styles, stage1_count, stage2_count):
    sizes1, sizes2 = ct.PRESETS[preset]
    with torch.device("meta"):                      # shapes without memory
        autoencoder = ct.MotionAutoencoder(ct.VQConfig(vertices, **sizes1))
        model = ct.CodeTalker(ct.ARConfig(styles, **sizes2), autoencoder)
    count = sum(p.numel() for p in autoencoder.parameters())
    assert count == stage1_count
    assert sum(p.numel() for p in model.parameters()) - count == stage2_count
    assert sum(p.numel() for p in model.audio_encoder.parameters()) == 94_371_712
    assert not any(p.requires_grad for name, p in model.audio_encoder.named_parameters() if name.startswith("conv"))


@pytest.fixture(params=["vocaset", "biwi"])
def official(request, tmp_path):
    """What the released code said (recorded small, with random weights), and its two checkpoints as files."""
    recorded = torch.load(Path(__file__).with_name("official.pt"), weights_only=True)[request.param]
    for stage in (1, 2):
        torch.save({"state_dict": recorded[f"stage{stage}_state_dict"]}, tmp_path / f"{stage}.pth.tar")
    return recorded, (tmp_path / "1.pth.tar", tmp_path / "2.pth.tar")


@torch.no_grad()
def test_released_checkpoints_give_the_recorded_results(official):
    recorded, paths = official
    said1, said2, wave = recorded["stage1"], recorded["stage2"], recorded["audio"][0]
    motion, frames = recorded["vertices"] - recorded["template"][:, None], recorded["vertices"].shape[1]
    style, style2 = torch.eye(3)[[recorded["style"]]], torch.eye(3)[[recorded["style2"]]]
    mixed = recorded["style_weight"] * style + (1 - recorded["style_weight"]) * style2

    model = ct.import_released(*paths, heads=(4, 4, 4))
    reconstruction, indices, losses = model.autoencoder(motion)
    close(model.autoencoder.encoder(motion).flatten(2), said1["z_e"], 1e-4)
    assert torch.equal(indices.flatten(), said1["indices"])
    close(model.autoencoder.quantiser.codebook[indices].flatten(1, 2).transpose(1, 2), said1["z_q"], 1e-4)
    close(losses["vq"], said1["vq_loss"], 1e-4)
    share = indices.flatten().bincount() / indices.numel()
    close(torch.special.entr(share).sum().exp(), said1["perplexity"], 1e-4)
    close(reconstruction + recorded["template"], said1["reconstruction"], 1e-4)

    close(model.audio_encoder(wave, frames, model.config.audio_steps), said2["audio_features"][0], 1e-4)
    heard = torch.tensor([ct.frames_in(len(wave), recorded["config"]["period"], model.config)])
    for weights, name in ((style, "prediction"), (mixed, "prediction_mixed_style")):
        made, _ = model.generate([wave], weights, heard)
        close(made + recorded["template"], said2[name], 1e-4)

    _, losses = ct.import_released(*paths, heads=(4, 4, 4), trains=True)([wave], style, indices, motion)
    close(losses["motion"], said2["loss_motion"], 1e-4)
    close(losses["feature"], said2["loss_reg"], 1e-4)
    close(sum(losses.values()), said2["loss"], 1e-4)


def test_old_and_new_names_of_the_weight_norm_and_a_parallel_model_s_prefix(official, tmp_path):
    recorded, paths = official
    renamed = {"module." + name.replace("conv.weight_g", "conv.parametrizations.weight.original0")
               .replace("conv.weight_v", "conv.parametrizations.weight.original1"): tensor
               for name, tensor in recorded["stage2_state_dict"].items()}
    assert renamed.keys() != {f"module.{name}" for name in recorded["stage2_state_dict"]}
    torch.save({"state_dict": renamed}, tmp_path / "new.pth.tar")
    old, new = (ct.import_released(paths[0], path, heads=(4, 4, 4)).state_dict()
                for path in (paths[1], tmp_path / "new.pth.tar"))
    assert all(torch.equal(old[name], new[name]) for name in old | new)


@pytest.mark.parametrize("spoil, stage", [
    (lambda first, second: first.pop("decoder.vertice_map_reverse.weight"), 1),
    (lambda first, second: first.update(surplus=torch.zeros(2)), 1),
    (lambda first, second: first.pop("encoder.encoder_pos_embedding.pe"), 1),
    (lambda first, second: second.pop("feat_map.weight"), 2),
    (lambda first, second: second.update({"vertice_map.weight": torch.zeros(32, 3)}), 2),
    (lambda first, second: second.pop("audio_encoder.masked_spec_embed"), 2),
    (lambda first, second: (first.clear(), first.update(second)), 1)])
def test_other_files_than_released_ones_are_refused_in_one_line(official, spoil, stage):
    recorded, paths = official
    states = recorded["stage1_state_dict"], recorded["stage2_state_dict"]
    spoil(*states)
    for path, state in zip(paths, states):
        torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match=f"{stage}.pth.tar: a released checkpoint of stage {stage} expected") as error:
        ct.import_released(*paths, heads=(4, 4, 4))
    assert "\n" not in str(error.value)


def write_safetensors(path, tensors):
    """The format by its specification: length of the header, the header, the numbers."""
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        kind = {torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape),
                        "data_offsets": [len(numbers), len(numbers) + len(raw)]}
        numbers += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def test_wav2vec2_is_read_from_both_kinds_of_file(official, tmp_path):
    """With the prefix and the spelling layer of the version fine-tuned to spell, and without."""
    recorded, _ = official
    bare = {name.removeprefix("audio_encoder."): tensor for name, tensor in recorded["stage2_state_dict"].items()
            if name.startswith("audio_encoder.")}
    torch.save(bare, tmp_path / "pytorch_model.bin")
    write_safetensors(tmp_path / "model.safetensors", {f"wav2vec2.{name}": tensor for name, tensor in bare.items()}
                      | {"lm_head.weight": torch.zeros(32, 32), "lm_head.bias": torch.zeros(32)})
    (sizes, a), (_, b) = (ct.import_wav2vec2(tmp_path / name) for name in ("pytorch_model.bin", "model.safetensors"))
    assert sizes == {"convs": 16, "width": 32, "layers": 2, "heads": 1, "hidden": 64}
    assert torch.equal(a.layers[1].attention.key.weight, bare["encoder.layers.1.attention.k_proj.weight"])
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    for spoil in ({"surplus": torch.zeros(1)}, {"encoder.layers.0.layer_norm.bias": torch.zeros(5)}):
        write_safetensors(tmp_path / "model.safetensors", bare | spoil)
        with pytest.raises(ValueError, match="model.safetensors: the weights of wav2vec2-base expected"):
            ct.import_wav2vec2(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name, content", [
    ("a.safetensors", b""), ("a.safetensors", b"\xff" * 8 + b"{}"), ("a.safetensors", b"\x02" + b"\0" * 7 + b"[]"),
    ("a.bin", b"PK"), ("missing.bin", None)])
def test_a_file_without_weights_is_refused_in_one_line(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="a file of weights expected|no such file"):
        ct.read_weights(tmp_path / name)


def paper():
    """A toy of the published model: waveforms, motion as history, InstanceNorm."""
    wav2vec2 = {"convs": 8, "width": 16, "layers": 1, "heads": 2, "hidden": 24}
    config = ct.ARConfig(styles=3, period=4, width=16, heads=2, history="motion", wav2vec2=wav2vec2, audio_steps=2,
                         squared=True, temperature=0.0)
    model = ct.CodeTalker(config, stage1(instance_norm=True))
    nn.init.normal_(model.query.weight)
    return model.eval()


@torch.no_grad()
def test_motion_as_history_equals_decoding_and_asking_everything_again():
    """The released loop: all frames anew for each frame, the last decoded one is fed back."""
    model, wave, style = paper(), torch.randn(9000), torch.eye(3)[:1]
    made, codes = model.generate([wave], style, torch.tensor([13]))
    audio = model.audio_map(model.audio_encoder(wave, 13, 2))[None].unflatten(1, (13, 2))
    fed = torch.zeros(1, 0, 15)
    for t in range(13):
        z_hat = model.answer(torch.cat([fed, torch.zeros(1, 1, 15)], 1), style, audio[:, :t + 1])
        z_hat = z_hat.unflatten(-1, (4, 4)).flatten(0, 2)
        said = torch.cdist(z_hat, model.autoencoder.quantiser.codebook).argmin(1).view(1, t + 1, 4)
        fed = torch.cat([fed, model.autoencoder.decode(said)[:, -1:]], 1)
    assert torch.equal(codes, said) and len(said.unique()) > 4
    close(made, model.autoencoder.decode(said))


@torch.no_grad()
def test_motion_as_history_remembers_a_window():
    model, wave, style = paper(), torch.randn(9000), torch.eye(3)[:1]
    exact = model.generate([wave], style, torch.tensor([13]))[1]
    model.config.memory = 6
    windowed = model.generate([wave], style, torch.tensor([13]))[1]
    assert torch.equal(exact[:, :6], windowed[:, :6])
    assert not torch.equal(exact, windowed)


@torch.no_grad()
def test_waveforms_of_a_batch_are_heard_alone():
    model, waves, frames = paper(), [torch.randn(9000), torch.randn(5000)], torch.tensor([13, 7])
    audio = model.listen(waves, frames)
    assert audio.shape == (2, 13, 2, 16)
    close(audio[1:, :7], model.listen(waves[1:], frames[1:]))


def test_a_long_waveform_is_heard_in_pieces_and_learnt_from(monkeypatch):
    """13 frames in pieces of 8 over 4: 0-7, 4-11, 8-12; what only the first holds is as if it had been heard alone."""
    monkeypatch.setattr(ct, "PIECE", 8)
    monkeypatch.setattr(ct, "OVERLAP", 4)
    model, wave = paper(), torch.randn(13 * 640)
    heard = model.listen([wave], [13])
    close(heard[:, :4], model.listen([wave[:8 * 640]], [8])[:, :4])
    close(heard[:, 12:], model.listen([wave[8 * 640:]], [5])[:, 4:])
    heard.square().sum().backward()
    assert model.audio_encoder.project.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("samples", [1, 399, 400, 719, 720, 35200])
def test_frames_in_counts_what_the_convolutions_hear(samples):
    model = paper()
    x = torch.zeros(1, 1, max(samples, 400))
    for conv in model.audio_encoder.convs:
        x = conv(x)
    assert ct.frames_in(samples, 25, model.config) == max(1, x.shape[-1] // 2)
    assert ct.frames_in(samples, 30, model.config) == max(1, x.shape[-1] * 30 // 50)
    assert model.listen([torch.randn(samples)], torch.tensor([3])).isfinite().all()


def test_spec_augment_masks_spans_of_ten_in_training_only():
    ears = paper().audio_encoder
    for layer in (*ears.layers, ears.dropout):
        layer.p = 0
    with torch.no_grad():
        ears.masked.fill_(50)
        calm = ears(torch.randn(16000), 400, 1)
        seen = []
        ears.positions.register_forward_pre_hook(lambda _, given: seen.append((given[0][0, 0] > 25).tolist()))
        ears.train()
        for _ in range(20):
            ears(torch.randn(16000), 400, 1)
    assert calm.abs().max() < 25
    rows = ["".join("x" if masked else " " for masked in row) for row in seen]
    runs = [len(run) for row in rows for run in row.rstrip("x").split()]        # the end may cut a span
    assert min(runs) >= 10 and 0.02 < sum(map(sum, seen)) / 8000 < 0.1


def test_prepare_gives_wav2vec2_a_normalised_waveform():
    wave = 0.3 + 0.1 * torch.randn(5000)
    heard = ct.prepare(wave, 25, 7, paper().config)
    close(heard, (wave - wave.mean()) / wave.numpy().std(), 1e-4)


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("stage, make", [("vq", stage1), ("ar", stage2)])
def test_load_gives_back_what_save_was_given(tmp_path, stage, make):
    model = make(beta=0.5)
    ct.save(tmp_path / "model.pt", model.train(), step=7)
    loaded, state = ct.load(tmp_path / "model.pt", stage)
    assert state["step"] == 7 and loaded.config == model.config and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


class Payload:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("content, said", [
    (None, "no such checkpoint"), (b"", "not a whole checkpoint"), (b"hello", "not a whole checkpoint"),
    ("payload", "not a whole checkpoint"), ({"weights": 1}, "not a whole checkpoint"), ("vq", "train_ar.py expected")])
def test_load_refuses_in_one_line(tmp_path, content, said):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "payload":
        torch.save({"stage": "ar", "weights": Payload(tmp_path / "ran")}, path)
    elif isinstance(content, str):
        ct.save(path, stage1())
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=said) as error:
        ct.load(path, "ar")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
