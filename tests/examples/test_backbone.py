import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import ASTFeatureExtractor, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification

from examples.backbone import pretrain, probe, scenes, sources
from examples.backbone.sources import KINDS, SAMPLING_RATE, Source
from peft_softmoa.demo.run import BASE_MODEL

WEIGHTS = BASE_MODEL


@pytest.fixture(scope="module")
def extractor():
    return ASTFeatureExtractor(max_length=pretrain.FRAMES)


@pytest.fixture(scope="module")
def drawn():
    return [scenes.draw_scene(np.random.default_rng(seed)) for seed in range(40)]


def pitch_of(sound):
    """The strongest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    return spectrum.argmax() * SAMPLING_RATE / len(sound)


# --- sounds and settings ------------------------------------------------------------------------------------------


def test_audio_is_finite_and_bounded(drawn):
    for audio, _ in drawn:
        assert audio.shape == (80_000,) and audio.dtype == np.float32
        assert np.isfinite(audio).all()
        assert 0.01 < np.abs(audio).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_drawn_and_rendered(kind):
    for seed in range(10):
        rng = np.random.default_rng((1, seed))
        source = sources.draw_source(kind, rng)
        sound, active = sources.render_source(source, rng)
        assert np.isfinite(sound).all()
        np.testing.assert_allclose(np.sqrt(np.mean(sound[active] ** 2)), 1, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_silent_outside_its_events(kind):
    rng = np.random.default_rng(0)
    source = Source(
        kind, 500.0, 1.0, -6.0, 20.0, 0.0, attack=0.01, decay=0.3, pattern="once", length=0.5, starts=(2.0,)
    )
    sound, active = sources.render_source(source, rng)
    assert np.abs(sound[:32_000]).max() == 0 and np.abs(sound[40_000:]).max() == 0
    assert np.flatnonzero(active)[[0, -1]].tolist() == [32_000, 39_999]


@pytest.mark.parametrize("pitch", [80.0, 440.0, 3000.0])
def test_pitch_is_in_its_bin(pitch):
    source = Source("tone", pitch, slope=-12.0, attack=0.01)
    sound, _ = sources.render_source(source, np.random.default_rng(0))
    edges = scenes.SOURCE_BINS["frequency"]
    assert np.digitize(pitch_of(sound), edges) == np.digitize(source.frequency, edges)
    assert pitch_of(sound) == pytest.approx(pitch, rel=0.01)


@pytest.mark.parametrize("glide", [-1.5, -0.5, 0.5, 1.5])
def test_a_chirp_glides_as_its_setting_says(glide):
    source = Source("chirp", 800.0, slope=-12.0, glide=glide, attack=0.01)
    sound, _ = sources.render_source(source, np.random.default_rng(0))
    measured = np.log2(pitch_of(sound[-8000:-4000]) / pitch_of(sound[4000:8000]))
    assert measured == pytest.approx(0.86 * glide, abs=0.1)  # between the middles of the pieces


@pytest.mark.parametrize("frequency", [300.0, 3000.0])
def test_noise_is_in_its_band(frequency):
    source = Source("noise", frequency, bandwidth=1.0, slope=0.0, attack=0.01)
    sound, _ = sources.render_source(source, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(sound)) ** 2
    octaves = np.log2(np.fft.rfftfreq(len(sound), 1 / SAMPLING_RATE)[1:] / frequency)
    assert power[1:][np.abs(octaves) < 0.5].sum() > 0.9 * power.sum()


@pytest.mark.parametrize("kind", ["clicks", "engine"])
def test_pulses_come_at_their_rate(kind):
    source = Source(kind, 2000.0, bandwidth=2.0, slope=0.0, rate=10.0, attack=0.01)
    sound, _ = sources.render_source(source, np.random.default_rng(3))
    power = np.convolve(sound**2, np.ones(160), "same")[::160]
    spectrum = np.abs(np.fft.rfft(power - power.mean()))[5:100]  # 1 to 20 Hz, in steps of 0.2
    assert (spectrum.argmax() + 5) / 5 == pytest.approx(10, rel=0.15)


def test_amplitude_modulation_has_its_rate():
    source = Source("noise", 2000.0, 4.0, 0.0, modulation="amplitude", modulation_rate=6.0, attack=0.01)
    sound, _ = sources.render_source(source, np.random.default_rng(0))
    power = np.convolve(sound**2, np.ones(800), "same")[::160]
    assert (np.abs(np.fft.rfft(power - power.mean()))[1:].argmax() + 1) / 5 == pytest.approx(6, abs=0.21)


def test_after_its_end_a_scene_is_digital_silence(drawn):
    cut = [(audio, scene) for audio, scene in drawn if scene.end < sources.SECONDS]
    assert len(cut) > 3
    for audio, scene in cut:
        last = round(scene.end * SAMPLING_RATE)
        assert np.abs(audio[last:]).max() == 0 and np.abs(audio[:last]).max() > 0
        assert not scene.active[:, int(np.ceil(scene.end / scenes.COLUMN)) :].any()


@pytest.mark.parametrize("frequency,band", [(100.0, 0), (1000.0, 2), (6500.0, 7)])
def test_the_loudest_kind_is_found_in_its_patches(frequency, band):
    """Bands are those of the feature extractor's mel bins."""
    time = np.arange(80_000, dtype=np.float32) / SAMPLING_RATE
    sound = np.where(time < 2.4, np.sin(2 * np.pi * frequency * time), 0).astype(np.float32)
    energies = scenes.band_energies(sound, 32)
    assert (energies.argmax(0)[:15] == band).all() and not energies[:, 15:].any()
    spectrogram = ASTFeatureExtractor(max_length=512)(sound, sampling_rate=SAMPLING_RATE, return_tensors="np")
    assert spectrogram["input_values"][0, :200].mean(0).argmax() // 16 == band


def test_labels_say_what_the_settings_are(drawn):
    for _, scene in drawn:
        answers = scenes.labels(scene)
        assert {KINDS[kind] for kind in np.flatnonzero(answers["kinds"])} == {source.kind for source in scene.sources}
        assert answers["active"].shape == (len(KINDS), 32)
        assert not answers["active"][answers["kinds"] == 0].any()
        loud = np.eye(len(KINDS) + 1, dtype=bool)[answers["loudest"]].any(0).T[: len(KINDS)]
        assert not (loud & (answers["active"] == 0)).any()
        for name, edges in scenes.SOURCE_BINS.items():
            assert (answers[name][answers["kinds"] == 0] == -100).all()
            for source in scene.sources:
                value = vars(source).get(name, len(source.starts))
                if isinstance(value, float) and not np.isnan(value):
                    bin_ = answers[name][KINDS.index(source.kind)]
                    assert np.concatenate([[-np.inf], edges])[bin_] <= value < np.concatenate([edges, [np.inf]])[bin_]
        assert answers["sources"] == len(scene.sources) - 1


def test_no_answer_is_right_nearly_always():
    """A question that has one answer teaches nothing."""
    answers = [scenes.labels(scenes.draw_scene(np.random.default_rng((5, seed)))[1]) for seed in range(150)]
    for name in scenes.SOURCE_BINS | scenes.SCENE_BINS:
        values = np.concatenate([np.ravel(each[name]) for each in answers])
        assert np.bincount(values[values != -100]).max() < 0.85 * (values != -100).sum(), name


# --- the stream ---------------------------------------------------------------------------------------------------


def test_clips_depend_on_seed_part_and_number_alone(extractor):
    stream = pretrain.SceneStream(extractor, 2, seed=3)
    batches = iter(stream)
    first, second = next(batches), next(batches)
    again = next(iter(pretrain.SceneStream(extractor, 2, seed=3, first=1)))
    for name, values in second.items():
        torch.testing.assert_close(values, again[name], rtol=0, atol=0)
        torch.testing.assert_close(values[1], stream.clip(3)[name], rtol=0, atol=0)
    others = [first, pretrain.SceneStream(extractor, 2, 4).batch(1), pretrain.SceneStream(extractor, 2, 3, 1).batch(1)]
    for other in others:
        assert not torch.equal(other["input_values"][0], second["input_values"][0])
    assert not torch.equal(second["input_values"][0], second["input_values"][1])


def test_workers_do_not_change_the_order(extractor):
    stream = pretrain.SceneStream(extractor, 1, seed=0)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    for number, batch in zip(range(3), loader):
        torch.testing.assert_close(batch["input_values"], stream.batch(number)["input_values"], rtol=1e-4, atol=1e-4)


def test_spectrograms_are_those_of_the_feature_extractor(extractor, drawn):
    for audio in [drawn[0][0], drawn[1][0], drawn[2][0][:16_000], 0.1 * np.ones(100_000, np.float32)]:
        expected = extractor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt")["input_values"][0]
        torch.testing.assert_close(pretrain.log_mels(audio, extractor), expected, rtol=0, atol=2e-3)


def test_echoed_batches_come_again_as_often_as_asked():
    seen = list(pretrain.echoed(range(50), 3, random.Random(0), memory=4))
    assert seen[::3] == list(range(50))
    assert len(seen) == 150
    assert all(0 <= seen[index // 3 * 3] - seen[index] < 4 for index in range(150))


# --- pretraining --------------------------------------------------------------------------------------------------


def test_all_patches_give_what_the_model_itself_gives():
    torch.manual_seed(0)
    model = pretrain.make_model(16, 2, 2, frames=64).eval()
    spectrograms = torch.randn(3, 64, 128)
    own, patches, order = pretrain.encode(model, spectrograms)
    expected = model(spectrograms).last_hidden_state
    torch.testing.assert_close(own, expected[:, :2])
    torch.testing.assert_close(patches, expected[:, 2:].view(3, 8, 4, 16))
    assert torch.equal(order, torch.arange(8)[:, None].expand(8, 4))
    torch.testing.assert_close(pretrain.mean_token(own, patches), expected.mean(1))


def test_some_patches_are_kept_of_each_time():
    torch.manual_seed(0)
    model = pretrain.make_model(16, 0, 2, frames=64).eval()  # without layers, each patch keeps to itself
    spectrograms = torch.randn(3, 64, 128)
    _, every, _ = pretrain.encode(model, spectrograms)
    own, patches, order = pretrain.encode(model, spectrograms, bands=3)
    assert own.shape == (3, 2, 16) and patches.shape == (3, 3, 4, 16)
    assert all(len(set(column.tolist())) == 3 for column in order.T)
    for row in range(3):
        for column in range(4):
            torch.testing.assert_close(patches[:, row, column], every[:, order[row, column], column])


def test_losses_are_those_of_the_known_answers():
    torch.manual_seed(0)
    batch = {name: torch.stack([torch.as_tensor(scenes.labels(scene)[name]) for scene in SCENES]) for name in LABELS}
    logits = pretrain.Heads(8)(torch.randn(len(SCENES), 8), torch.randn(len(SCENES), 8, 32, 8))
    for name, loss in pretrain.losses(logits, batch).items():
        assert torch.isfinite(loss)
        if name in scenes.SOURCE_BINS:
            each = [
                -logits[name][clip, :, kind].log_softmax(0)[answer]
                for clip, answers in enumerate(batch[name])
                for kind, answer in enumerate(answers)
                if answer != -100
            ]
            torch.testing.assert_close(loss, torch.stack(each).mean())


SCENES = [scenes.draw_scene(np.random.default_rng((7, seed)))[1] for seed in range(3)]
LABELS = list(scenes.labels(SCENES[0]))


def test_average_precision():
    scores, target = torch.tensor([0.1, 0.9, 0.5, 0.3]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert pretrain.average_precision(scores, target) == pytest.approx((1 / 1 + 2 / 4) / 2)


def test_pretraining_writes_a_checkpoint(tmp_path):
    sizes = {"width": 16, "layers": 1, "heads": 2, "batch_size": 2, "steps": 2, "warmup_steps": 1, "whole_steps": 1}
    rest = {"held_out_clips": 4, "workers": 0, "threads": torch.get_num_threads(), "output_dir": tmp_path / "out"}
    run = pretrain.main([part for key, value in {**sizes, **rest}.items() for part in (f"--{key}", str(value))])
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "out", num_labels=10)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert model(torch.zeros(1, extractor.max_length, 128)).logits.shape == (1, 10)
    assert run["clips"] == 2 and set(run["held_out"]) == set(LABELS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--steps 2" in card and "license: apache-2.0" in card and "| frequency |" in card
    torch.manual_seed(0)
    start = pretrain.make_model(16, 1, 2)
    assert not torch.equal(start.embeddings.cls_token, model.audio_spectrogram_transformer.embeddings.cls_token)


# --- the probe ----------------------------------------------------------------------------------------------------


def test_the_probe_finds_what_is_linear_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    folds = torch.arange(60) // 12
    noise = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    clear = noise + 5 * torch.nn.functional.one_hot(labels, 8)
    assert np.mean(probe.cross_validate(1000 * clear, labels, folds)) > 0.95
    assert np.mean(probe.cross_validate(noise, labels, folds)) < 0.6


def test_the_probe_minimises_its_objective():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (30,), generator=generator)
    train = torch.rand(2, 30, generator=generator) < 0.7
    both = probe.fit(embeddings, labels, train, torch.tensor([1e-3, 1e-1], dtype=torch.float64))
    for index, decay in enumerate([1e-3, 1e-1]):
        alone = probe.fit(embeddings, labels, train[index : index + 1], torch.tensor([decay], dtype=torch.float64))
        torch.testing.assert_close(both[index], alone[0])


# --- the committed weights ----------------------------------------------------------------------------------------


def test_committed_weights_are_small_finite_and_load():
    file = WEIGHTS / "model.safetensors"
    assert file.stat().st_size < 8 * 1024**2
    for name, tensor in load_file(file).items():
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all(), name
    model, info = AutoModelForAudioClassification.from_pretrained(WEIGHTS, num_labels=10, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier"}
    assert not info["unexpected_keys"]
    run = json.loads((WEIGHTS / "pretraining.json").read_text())
    assert run["parameters"] == model.audio_spectrogram_transformer.num_parameters()
    assert AutoFeatureExtractor.from_pretrained(WEIGHTS).max_length == run["frames"] == model.config.max_length


def probe_once(model, inputs, labels, folds):
    """Accuracy of the probe with one regularisation, which is faster than choosing it."""
    train = torch.stack([folds != fold for fold in folds.unique()])
    decay = torch.full((len(train),), 0.03, dtype=torch.float64)
    right = probe.fit(probe.embed(model, inputs), labels, train, decay) == labels
    return right[~train].double().mean().item()


def test_committed_weights_know_the_kinds_of_held_out_scenes(extractor):
    """A probe on a few scenes, in the stead of the heads that were not saved."""
    batch = pretrain.SceneStream(extractor, 240, seed=0, part=pretrain.HELD_OUT).batch(100)
    single = batch["sources"] == 0
    labels = (batch["kinds"][single] @ torch.eye(len(KINDS))).argmax(1)
    folds = torch.arange(len(labels)) % 4
    trained, untrained = (
        probe_once(model, batch["input_values"][single], labels, folds)
        for model in (AutoModel.from_pretrained(WEIGHTS), probe.untrained(WEIGHTS, 0))
    )
    assert trained > untrained + 0.1, (trained, untrained)


@pytest.mark.real_audio
def test_committed_weights_beat_an_untrained_network_on_recordings(esc10_folder, extractor):
    inputs, labels, folds = probe.load_clips(esc10_folder, extractor, folds=["1", "2"])
    trained, untrained = (
        probe_once(model, inputs, labels, folds)
        for model in (AutoModel.from_pretrained(WEIGHTS), probe.untrained(WEIGHTS, 0))
    )
    assert trained > untrained + 0.05, (trained, untrained)
