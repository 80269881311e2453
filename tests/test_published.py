"""
support/published.py computes what the released code computes.

Small models with random weights were run in the released code and recorded: official.pt (results),
official_step.pt (losses and gradients of one training step, dropout off). All sizes are read from
these files.
"""
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

import codetalker
from support import published
from support.files import load_arrays

HERE = Path(__file__).parent


def assert_close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


class Recording:
    """What was recorded of one data set's model, and how to import its weights."""

    def __init__(self, name, folder):
        self.data = torch.load(HERE / "official.pt", weights_only=True)[name]
        self.config = self.data["config"]
        self.fps = self.config["period"]
        self.heads = (self.config["num_attention_heads"], self.config["n_head"],
                      self.data["wav2vec2"]["num_attention_heads"])
        self.paths = []
        for stage in ("stage1", "stage2"):
            self.paths.append(folder / f"{stage}.pth.tar")
            torch.save({"state_dict": self.data[f"{stage}_state_dict"]}, self.paths[-1])
        self.audio = self.data["audio"][0]
        self.motion = self.data["vertices"] - self.data["template"][:, None]    # (1, T, V*3)
        styles = torch.eye(len(self.config["train_subjects"].split()))
        self.style = styles[[self.data["style"]]]
        weight = self.data["style_weight"]
        self.mixed_style = weight * self.style + (1 - weight) * styles[[self.data["style2"]]]

    def model(self, **options):
        return published.import_released(*self.paths, heads=self.heads, **options)

    def features(self, model, frames):
        """The released code was given the audio as it is; its scale makes no difference."""
        return model.preprocess_audio(self.audio, self.fps, frames)[None]

    def wav2vec2_weights(self):
        prefix = "audio_encoder."
        weights = self.data["stage2_state_dict"]
        return {key[len(prefix):]: weights[key] for key in weights if key.startswith(prefix)}

    def training_step(self):
        """Stage 2's losses, with the first frame as in the released training."""
        model = self.model(bias_on_first_frame=True)
        features = self.features(model, self.motion.shape[1])
        codes = model.autoencoder.encode(self.motion)
        return model, model(features, self.style, codes, self.motion)


@pytest.fixture(params=["vocaset", "biwi"])
def recording(request, tmp_path):
    return Recording(request.param, tmp_path)


@pytest.fixture
def vocaset_model(tmp_path):
    return Recording("vocaset", tmp_path).model()


@pytest.fixture
def biwi_model(tmp_path):
    return Recording("biwi", tmp_path).model()


# -----------------------------------------------------------------------------
# against the released code


@torch.no_grad()
def test_stage1_matches_released_code(recording):
    autoencoder = recording.model().autoencoder
    expected = recording.data["stage1"]
    reconstruction, codes, losses = autoencoder(recording.motion)
    assert torch.equal(codes.flatten(), expected["indices"])
    assert_close(autoencoder.encoder(recording.motion).flatten(2), expected["z_e"])
    z_q = autoencoder.quantiser.codebook[codes].flatten(1, 2).transpose(1, 2)   # (1, C, T*H)
    assert_close(z_q, expected["z_q"])
    assert_close(losses["vq"], expected["vq_loss"])
    assert_close(reconstruction + recording.data["template"], expected["reconstruction"])


@torch.no_grad()
def test_audio_features_match_released_code(recording):
    model = recording.model()
    features = recording.features(model, recording.motion.shape[1])
    assert_close(model.audio_encoder(features), recording.data["stage2"]["audio_features"])


@torch.no_grad()
def test_losses_match_released_code(recording):
    expected = recording.data["stage2"]
    _, losses = recording.training_step()
    assert_close(losses["motion"], expected["loss_motion"])
    assert_close(losses["code"], expected["loss_reg"])
    assert_close(sum(losses.values()), expected["loss"])


@torch.no_grad()
def test_generation_matches_released_code(recording):
    model = recording.model()
    expected = recording.data["stage2"]
    for style, name in ((recording.style, "prediction"),
                        (recording.mixed_style, "prediction_mixed_style")):
        frames = expected[name].shape[1]
        audio = model.encode_audio(recording.features(model, frames))
        motion = model.decode(model.generate(audio, style))
        assert_close(motion + recording.data["template"], expected[name])


def step_of(recording):
    steps = torch.load(HERE / "official_step.pt", weights_only=True)
    return steps[recording.config["dataset"].lower()]


def assert_gradients(found, expected):
    """Within four times what the released code in float32 differs from itself in float64."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= 2e-3 * max(gradient.norm(), 1e-3), f"{name}: {error} of {gradient.norm()}"


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()
            if parameter.grad is not None}


@pytest.mark.slow
def test_training_step_of_stage1_matches_released_code(recording):
    expected = step_of(recording)["stage1"]
    autoencoder = recording.model().autoencoder.requires_grad_(True)
    _, _, losses = autoencoder(recording.motion)
    assert_close(losses["reconstruction"], expected["rec_loss"])
    assert_close(losses["vq"], expected["vq_loss"])
    sum(losses.values()).backward()
    found = gradients(autoencoder)
    for name in found:
        if name.endswith("query.weight"):       # imported times heads ** -0.5: the chain rule
            found[name] *= recording.heads[0] ** -0.5
    assert_gradients(found, published.rename(expected["grads"], published.STAGE1_KEYS))


@pytest.mark.slow
def test_training_step_of_stage2_matches_released_code(recording):
    expected = step_of(recording)["stage2"]
    model, losses = recording.training_step()
    assert_close(losses["motion"], expected["loss_motion"])
    assert_close(losses["code"], expected["loss_reg"])
    sum(losses.values()).backward()
    found = gradients(model)
    found["in_proj.bias"] = found["style"].sum(dim=0)       # imported as a part of every style
    assert_gradients(found, published.rename(expected["grads"], published.STAGE2_KEYS))


@pytest.mark.parametrize("preset, vertices, styles, stage1, stage2", [
    ("vocaset", 5023, 8, 131_653_341, 187_249_536),
    ("biwi", 23370, 6, 246_477_824, 319_211_392)])
def test_presets_have_the_published_number_of_parameters(preset, vertices, styles, stage1, stage2):
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    vq_fields, ar_fields = published.PRESETS[preset]
    with torch.device("meta"):                              # shapes without memory
        config = published.PaperVQConfig(vertices, **vq_fields)
        autoencoder = published.PaperAutoencoder(config)
        config = published.PaperARConfig(styles, **ar_fields)
        model = published.PaperCodeTalker(config, autoencoder)
    assert count(autoencoder) == stage1
    assert count(model) - stage1 == stage2
    assert count(model.audio_encoder) == 94_371_712
    assert config.dropout == 0.1            # that of PyTorch's layers, which they take
    frozen = {name.split(".")[1] for name, parameter in model.named_parameters()
              if name.startswith("audio_encoder.") and not parameter.requires_grad}
    assert frozen == {"convs", "conv_norm"}


# -----------------------------------------------------------------------------
# the parts


def test_bias_on_first_frame_changes_only_the_first_frame(recording):
    plain = recording.model()
    shifted = recording.model(bias_on_first_frame=True)
    difference = shifted.embed(recording.motion, recording.style)
    difference = difference - plain.embed(recording.motion, recording.style)    # (1, T, D)
    assert_close(difference[0, 0], plain.in_proj.bias.detach(), 1e-6)
    assert plain.in_proj.bias.abs().max() > 0.01
    assert_close(difference[0, 1:], torch.zeros_like(difference[0, 1:]), 1e-6)


@torch.no_grad()
def test_a_single_frame_is_decoded_like_a_pair_of_equal_frames(recording):
    autoencoder = recording.model().autoencoder
    codes = autoencoder.encode(recording.motion)[:, :1]
    pair = autoencoder.decode(codes.repeat(1, 2, 1))
    assert_close(autoencoder.decode(codes), pair[:, :1])


@torch.no_grad()
@pytest.mark.parametrize("context", [600, 6])
def test_generation_matches_predicting_every_prefix_anew(biwi_model, context):
    """The released loop: everything is computed again for each frame. Feeding back frames that are
    decoded from the last `context` codes and masking older frames is the same with a cache."""
    model = biwi_model
    model.config.context = context
    model.in_proj.weight *= 5                               # so that the past makes a difference
    audio = torch.randn(1, 16, 2, model.config.dim, generator=torch.Generator().manual_seed(0))
    style = torch.eye(model.config.styles)[:1]
    codes = model.generate(audio, style)
    motion = torch.zeros(1, 0, model.in_proj.in_features)
    for t in range(16):
        unknown = torch.zeros(1, 1, model.in_proj.in_features)
        z_hat = model.predict(torch.cat([motion, unknown], dim=1), style, audio[:, :t + 1])
        expected = model.logits(z_hat).argmax(dim=-1)       # (1, t + 1, H)
        decoded = model.decode(expected[:, -context:])
        motion = torch.cat([motion, decoded[:, -1:]], dim=1)
    assert torch.equal(codes, expected)
    assert len(codes.unique()) > 3


def test_wav2vec2_features_are_normalised_and_aligned(vocaset_model, biwi_model):
    audio = torch.randn(16_000)                             # 49 steps of 20 ms
    quiet = vocaset_model.preprocess_audio(0.001 * audio, 30, 30)
    loud = vocaset_model.preprocess_audio(audio, 30, 30)
    assert (quiet - loud).norm() < 0.01 * loud.norm()       # not so without: 1e-5 in conv_norm
    steps = vocaset_model.preprocess_audio(audio, 50, 49)   # k = 1, resampled to 49 frames
    assert biwi_model.audio_encoder.convolve(audio).shape[-1] == 49
    assert_close(vocaset_model.preprocess_audio(audio, 25, 25)[1:-1], steps[2:-1:2])
    short = biwi_model.preprocess_audio(audio, 25, 20)      # k = 2: surplus steps are dropped
    long = biwi_model.preprocess_audio(audio, 25, 30)       # and missing ones repeat the last
    assert short.shape[0] == 40
    assert torch.equal(short, long[:40])
    assert torch.equal(long[48:], long[48:49].expand(12, -1))


def test_long_recordings_are_faded_together(monkeypatch):
    """Pieces of 8 frames that overlap by 3: 0-7, 5-12, 10-13. Joined, a ramp is a ramp again."""
    monkeypatch.setattr(published, "PIECE", 8)
    monkeypatch.setattr(published, "OVERLAP", 3)
    assert published.pieces(8) == [(0, 8)]
    assert published.pieces(14) == [(0, 8), (5, 13), (10, 14)]
    for k in (1, 2):
        ramp = torch.arange(14.0 * k)[None, :, None]
        parts = [ramp[:, start * k:stop * k] for start, stop in published.pieces(14)]
        assert_close(published.join_pieces(parts, k), ramp, 1e-5)
    parts = [torch.zeros(1, 8, 1), torch.ones(1, 8, 1)]
    fade = published.join_pieces(parts, 1)[0, 5:8, 0]
    assert_close(fade, torch.tensor([0.25, 0.5, 0.75]), 1e-6)


def test_a_long_recording_is_trained_on_in_pieces(monkeypatch, biwi_model):
    monkeypatch.setattr(published, "PIECE", 8)
    monkeypatch.setattr(published, "OVERLAP", 3)
    audio = torch.randn(14 * 640)
    features = biwi_model.preprocess_audio(audio, 25, 14)[None]
    assert features.shape[1] == 28
    joined = biwi_model.encode_audio(features)
    first = biwi_model.encode_audio(features[:, :16])
    assert joined.shape[:3] == (1, 14, 2)
    assert_close(joined[:, :5], first[:, :5], 1e-5)
    joined.square().sum().backward()
    assert biwi_model.audio_encoder.project.weight.grad.abs().sum() > 0
    assert biwi_model.audio_encoder.convs[0].weight.grad is None


def test_spec_augment_masks_two_spans_of_ten_steps(vocaset_model):
    encoder = vocaset_model.audio_encoder
    x = torch.zeros(50, 100, encoder.mask_embedding.numel())
    with torch.no_grad():
        encoder.mask_embedding.fill_(1)
        masked = encoder.spec_augment(x)[:, :, 0].sum(dim=1)
    assert masked.max() == 20                               # 10 ... 20, as the two may overlap
    assert 10 <= masked.min() < 20


def test_the_published_models_refuse_sampling(recording):
    model = recording.model()
    with pytest.raises(ValueError, match="--temperature: 0 expected"):
        model.generate(torch.zeros(1, 2, 1, model.config.dim), recording.style, temperature=0.5)
    with pytest.raises(ValueError, match="--sampling-prob: 0 expected"):
        model(None, None, None, None, sampling_prob=0.4)


# -----------------------------------------------------------------------------
# files


def test_save_and_load(recording, tmp_path):
    model = recording.model()
    codetalker.save(tmp_path / "ar.pt", model)
    loaded, _ = codetalker.load(tmp_path / "ar.pt", "ar", classes=published.CLASSES)
    assert loaded.config == model.config
    assert loaded.autoencoder.config == model.autoencoder.config
    weights = loaded.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="holds a PaperCodeTalker"):
        codetalker.load(tmp_path / "ar.pt", "ar")


def test_newer_names_of_released_weights_are_read(recording):
    """Weight norm has been renamed in PyTorch; nn.DataParallel puts "module." before every key."""
    old = recording.model().state_dict()
    weights = {}
    for key, tensor in recording.data["stage2_state_dict"].items():
        key = key.replace("weight_g", "parametrizations.weight.original0")
        key = key.replace("weight_v", "parametrizations.weight.original1")
        weights[f"module.{key}"] = tensor
    torch.save(weights, recording.paths[1])
    new = recording.model().state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_wav2vec2_is_imported_with_and_without_its_last_layer(recording, tmp_path):
    bare = recording.wav2vec2_weights()
    torch.save(bare, tmp_path / "bare.bin")
    recognition = {f"wav2vec2.{key}": tensor for key, tensor in bare.items()}
    torch.save(recognition | {"lm_head.weight": torch.zeros(3, 3)}, tmp_path / "recognition.bin")
    sizes, a = published.import_wav2vec2(tmp_path / "bare.bin")
    assert published.ar_sizes("vocaset", tmp_path / "bare.bin", 30)["wav2vec2"] == sizes
    _, b = published.import_wav2vec2(tmp_path / "recognition.bin")
    assert sizes["dim"] == recording.data["wav2vec2"]["hidden_size"]
    assert all(torch.equal(a.state_dict()[key], value) for key, value in b.state_dict().items())
    key = a.layers[1].attention.key.weight
    assert torch.equal(key, bare["encoder.layers.1.attention.k_proj.weight"])


def test_training_starts_from_wav2vec2(vocaset_model, biwi_model, recording, tmp_path):
    weights = {key: tensor + 1 for key, tensor in recording.wav2vec2_weights().items()}
    torch.save(weights, tmp_path / "wav2vec2.bin")
    vocaset_model.audio_encoder.layers[0].attention.heads = 1       # as sizes are read off weights
    published.load_wav2vec2(vocaset_model, tmp_path / "wav2vec2.bin")
    bias = vocaset_model.audio_encoder.project.bias
    assert torch.equal(bias, weights["feature_projection.projection.bias"])
    with pytest.raises(ValueError, match="--wav2vec2: .* give its pytorch_model.bin"):
        published.load_wav2vec2(biwi_model, None)
    with pytest.raises(ValueError, match="--preset biwi: 25 frames per second expected"):
        published.ar_sizes("biwi", None, 30)


def test_released_models_need_templates_alone(tmp_path):
    recording = Recording("vocaset", tmp_path)
    template = recording.data["template"].reshape(-1, 3).numpy()
    with pytest.raises(ValueError, match="--released needs --data"):
        published.open_released(*recording.paths, None)
    (tmp_path / "templates.pkl").write_bytes(pickle.dumps({"zoe": template[1:]}))
    with pytest.raises(ValueError, match="60 motion channels expected .* found 57"):
        published.open_released(*recording.paths, tmp_path)
    (tmp_path / "templates.pkl").write_bytes(pickle.dumps({"zoe": template}))
    (tmp_path / "mesh.obj").write_text("f 1 2 3\n", "utf-8")
    model, data = published.open_released(*recording.paths, tmp_path)
    assert not model.training
    assert (data.fps, data.scale, data.subjects) == (30, 1, ["0", "1", "2"])
    assert data.triangles.tolist() == [[0, 1, 2]]
    assert np.array_equal(data.vertices(np.zeros((1, 60)), "zoe")[0], template)


def test_other_files_are_refused_in_one_line(recording, tmp_path):
    stage1, stage2 = recording.paths
    (tmp_path / "text.bin").write_text("no weights", "utf-8")
    for paths, message in [
            ((stage2, stage2), "stage2.pth.tar: a released checkpoint of stage 1 expected"),
            ((stage1, stage1), "stage1.pth.tar: a released checkpoint of stage 2 expected"),
            ((tmp_path / "no.tar", stage2), "no.tar: .* expected .FileNotFoundError"),
            ((stage1, tmp_path / "text.bin"), "text.bin: .* file of torch.save")]:
        with pytest.raises(ValueError, match=message) as error:
            published.import_released(*paths, heads=recording.heads)
        assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + 7 * b"\0" + b"{}")
    with pytest.raises(ValueError, match="the weights of wav2vec2-base expected"):
        published.import_wav2vec2(stage1)
    with pytest.raises(ValueError, match="pytorch_model.bin .* not .safetensors"):
        published.import_wav2vec2(tmp_path / "model.safetensors")


# -----------------------------------------------------------------------------
# data sets

TRAIN = "FaceTalk_170728_03272_TA"
TEST = "FaceTalk_170809_00138_TA"


@pytest.fixture
def vocaset(tmp_path):
    """VOCASET as downloaded, but of 5 vertices and three sentences of ten frames at 60 fps."""
    clips = [(TRAIN, "sentence01"), (TRAIN, "sentence02"), (TEST, "sentence21")]
    folder = tmp_path / "raw"
    folder.mkdir()
    vertices = np.random.default_rng(0).normal(size=(30, 5, 3)).astype(np.float32)
    np.save(folder / "data_verts.npy", vertices)
    index = {TRAIN: {}, TEST: {}}
    sounds = {TRAIN: {"sentence03": {}}, TEST: {}}
    for i, (subject, sentence) in enumerate(clips):
        index[subject][sentence] = {frame: (3 * frame + i) for frame in reversed(range(10))}
        sounds[subject][sentence] = {"audio": np.full(3667, i, np.int16), "sample_rate": 22_000}
    del sounds[TRAIN]["sentence02"]
    masks = {"lips": np.array([3, 1]), "forehead": np.array([0]), "eye_region": np.array([2, 0])}
    for name, content in (("subj_seq_to_idx", index), ("raw_audio_fixed", sounds),
                          ("templates", {TRAIN: vertices[0], TEST: vertices[1]}), ("masks", masks)):
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(content, protocol=2))
    (folder / "head.obj").write_text("v 0 0 0\n" * 5 + "f 1 2 3\nf 1/1 3/1 4/1 5/1\n", "utf-8")
    return folder


def test_convert_vocaset_takes_every_second_frame(vocaset, tmp_path, capsys):
    out = tmp_path / "new" / "vocaset"
    published.main(published.parser.parse_args(
        ["convert", "--vocaset", str(vocaset), "--out", str(out), "--masks",
         str(vocaset / "masks.pkl"), "--mesh", str(vocaset / "head.obj")]))
    printed = capsys.readouterr().out
    assert "2 clips at 30 fps" in printed
    assert f"398 clips of the published splits are missing: {TRAIN}_sentence02, " in printed
    rows = np.load(vocaset / "data_verts.npy")
    np.testing.assert_array_equal(np.load(out / "vertices_npy" / f"{TEST}_sentence21.npy"),
                                  rows[[2, 8, 14, 20, 26]].reshape(5, 15))  # frames 0, 2, 4 ...
    rate, audio = wavfile.read(out / "wav" / f"{TEST}_sentence21.wav")
    assert (rate, len(audio), audio[0]) == (22_000, 3667, 2)
    np.testing.assert_array_equal(load_arrays(out / "templates.pkl")[TEST], rows[1])
    assert json.loads((out / "dataset.json").read_text("utf-8")) == {
        "name": "VOCASET", "fps": 30, "unit": "metre",
        "splits": {"train": [f"{TRAIN}_sentence01"], "val": [], "test": [f"{TEST}_sentence21"]},
        "lips": [1, 3], "upper_face": [0, 2], "triangles": [[0, 1, 2], [0, 2, 3], [0, 3, 4]]}


@pytest.mark.parametrize("name, content, message", [
    ("templates.pkl", {TRAIN: np.zeros((4, 3))}, "of the templates' size expected"),
    ("subj_seq_to_idx.pkl", {TEST: {"sentence21": {0: 30}}}, "more than 30 rows"),
    ("subj_seq_to_idx.pkl", {}, "none; download it again"),
    ("raw_audio_fixed.pkl", [1, 2], "subject -> sentence -> content"),
    ("masks.pkl", {"lips": np.array([5])}, "FLAME's masks"),
    ("masks.pkl", {"lips": [5], "forehead": [1], "eye_region": [1]}, "lips among 5 vertices")])
def test_convert_writes_nothing_if_a_file_is_wrong(vocaset, tmp_path, name, content, message):
    (vocaset / name).write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        published.convert_vocaset(vocaset, tmp_path / "out", vocaset / "masks.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_convert_that_fails_half_way_leaves_nothing(vocaset, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")
    monkeypatch.setattr(published.wavfile, "write", fail)
    with pytest.raises(OSError):
        published.convert_vocaset(vocaset, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("clips, file_fps, expected", [
    ([f"{TRAIN}_sentence01", f"{TEST}_sentence21"], 60, {"fps": 30, "frame_stride": 2}),
    ([f"{TRAIN}_sentence01", f"{TEST}_sentence21"], 30, {"fps": 30, "frame_stride": 1}),
    (["F2_e01", "M5_e34", "F1_e40"], 25, {"fps": 25, "frame_stride": 1, "lips": [4, 7]})])
def test_describe_knows_vocaset_and_biwi(tmp_path, clips, file_fps, expected):
    for name in ("vertices_npy", "wav", "regions"):
        (tmp_path / name).mkdir()
    for clip in clips:
        np.save(tmp_path / "vertices_npy" / f"{clip}.npy", np.zeros((2 * file_fps, 30)))
        wavfile.write(tmp_path / "wav" / f"{clip}.wav", 8000, np.zeros(16_000, np.int16))
    if "lips" in expected:
        (tmp_path / "regions" / "lve.txt").write_text("4, 7", "utf-8")
    published.describe(tmp_path)
    written = json.loads((tmp_path / "dataset.json").read_text("utf-8"))
    assert expected.items() <= written.items()
    assert written["splits"]["train"] == clips[:1]
    assert sum(written["splits"].values(), []) == clips
    with pytest.raises(ValueError, match="exists already"):
        published.describe(tmp_path)


def test_published_splits():
    """Eight and six training subjects, 40 and 32 sentences each."""
    sizes = {name: {split: len(clips) for split, clips in published.published_splits(name).items()}
             for name in published.PUBLISHED}
    assert sizes == {"VOCASET": {"train": 320, "val": 40, "test": 40},
                     "BIWI": {"train": 192, "val": 24, "test": 24, "test_b": 32}}
    train = published.published_splits("VOCASET")["train"]
    assert train[40] == "FaceTalk_170904_00128_TA_sentence01"
