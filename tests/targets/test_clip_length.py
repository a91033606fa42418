"""Models that read one length of clips, at the length of an adapter's."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_ast_config
from families import FAMILIES, WHISPER, build
from peft import LoraConfig, PeftModel, get_peft_model
from peft.functional import delete_adapter
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ASTModel,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
    pipeline,
)

from peft_softmoa import (
    SoftMoAConfig,
    count_parameters,
    describe_targets,
    fit_feature_extractor,
    fitting_length,
)
from peft_softmoa.inference import load_adapter
from peft_softmoa.training import fingerprint_weights

RATE = 16_000
EMBEDDINGS = "audio_spectrogram_transformer.embeddings"
FRAMES, SECONDS = 300, 3  # of the tiny models


def tiny_ast(cls=ASTForAudioClassification, **options):
    torch.manual_seed(0)
    # Strides with overlap, as in the real AST.
    options = {"max_length": FRAMES, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8, **options}
    model = cls(tiny_ast_config(**options)).eval()
    model.base_model.embeddings.position_embeddings.data.normal_()  # they begin at zero
    return model


def tiny_whisper(cls=WhisperForAudioClassification):
    torch.manual_seed(0)
    return cls(WhisperConfig(**{**WHISPER, "max_source_positions": 50 * SECONDS})).eval()


def spectrogram(model, seconds, clips=2):
    """Inputs of a model, the beginnings of the same clips."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(clips, 1200, model.config.num_mel_bins, generator=generator)[:, : round(100 * seconds)]
    if model.config.model_type != "whisper":
        return {"input_values": frames}
    inputs = {"input_features": frames.mT.contiguous()}
    if not isinstance(model, WhisperForAudioClassification):
        inputs["decoder_input_ids"] = torch.tensor([[1, 4, 5]] * clips)
    return inputs


def logits(model, seconds):
    # PEFT's `get_base_model` needs an adapter.
    base = model.base_model.model if isinstance(model, PeftModel) else model
    with torch.no_grad():
        return next(iter(model(**spectrogram(base, seconds)).values()))


def adapted(model, seconds, name="default", **options):
    return get_peft_model(
        model, SoftMoAConfig(max_length_seconds=seconds, init_weights=False, **options), adapter_name=name
    )


MAKERS = {
    "AST": tiny_ast,
    "AST encoder": lambda: tiny_ast(ASTModel),
    "Whisper, classification": tiny_whisper,
    "Whisper": lambda: tiny_whisper(WhisperModel),
    "Whisper, speech to text": lambda: tiny_whisper(WhisperForConditionalGeneration),
}
each_model = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MAKERS.items()])


def state_of(model):
    """All that an adapter must leave as it was."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    kept = {name for name in vars(model) if "softmoa" in name}
    numbers = {
        name: {key: value for key, value in vars(module).items() if isinstance(value, int)}
        for name, module in model.named_modules()
    }
    return tensors, (model.config.to_dict(), hooks, kept, numbers)


def assert_as_before(model, before):
    tensors, rest = state_of(model)
    assert rest == before[1]
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())


@each_model
def test_the_model_reads_clips_of_the_length(make):
    base = make()
    model = adapted(make(), 2)
    tokens = {"whisper": 100, "audio-spectrogram-transformer": 2 + 3 * ((200 - 16) // 8 + 1)}[base.config.model_type]
    seen = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    short = logits(model, 2)
    assert seen == [tokens] and short.isfinite().all()
    # What is longer is cut, so that the base model's own feature extractor fits, too.
    assert torch.equal(logits(model, SECONDS), short)
    assert model.config.to_dict() != base.config.to_dict()
    if base.config.model_type == "whisper":
        assert model.config.max_source_positions == 100
        with pytest.raises(ValueError, match="expects the mel input features to be of length 200"):
            logits(model, 1)
    else:
        assert model.config.max_length == 200


def test_whispers_first_positions_are_kept():
    base = tiny_whisper()
    encoder = adapted(copy.deepcopy(base), 1).get_base_model().encoder
    assert torch.equal(encoder.embed_positions.weight, base.encoder.embed_positions.weight[:50])
    assert encoder.embed_positions.num_embeddings == encoder.max_source_positions == 50


def test_an_encoder_in_a_language_model():
    cls, config = FAMILIES["Qwen2-Audio"].config()
    config.audio_config.max_source_positions = 150
    torch.manual_seed(0)
    model = cls._from_config(config).eval()
    before = state_of(model)
    peft_model = adapted(model, 1).eval()
    batch = FAMILIES["Qwen2-Audio"].inputs([200, 150])
    for name in ("input_features", "feature_attention_mask"):
        batch[name] = torch.nn.functional.pad(batch[name], (0, 100 - batch[name].shape[-1]))
    with torch.no_grad():
        assert peft_model(**batch).logits.isfinite().all()
    assert config.audio_config.max_source_positions == 50
    assert_as_before(peft_model.unload(), before)


def columns(model):
    """AST's positions as a list over time; class tokens first."""
    positions = model.base_model.embeddings.position_embeddings.detach()[0]
    return positions[:2], positions[2:].unflatten(0, (3, -1))


def test_asts_positions_are_the_middle_in_time_or_interpolated():
    tokens, before = columns(tiny_ast())
    width = before.shape[1]
    assert width == (FRAMES - 16) // 8 + 1
    for seconds, frames in ((1, 100), (2.56, 256), (0.16, 16)):
        model = tiny_ast()
        adapted(model, seconds)
        same, after = columns(model)
        fewer = (frames - 16) // 8 + 1
        start = width // 2 - fewer // 2
        assert torch.equal(same, tokens) and torch.equal(after, before[:, start : start + fewer])
    model = tiny_ast()
    adapted(model, 6)
    same, after = columns(model)
    more = (600 - 16) // 8 + 1
    assert torch.equal(same, tokens) and after.shape[1] == more
    # Each new column lies between two old ones, which stand in the middles of equal parts of the clip.
    for index in range(more):
        place = min(max((index + 0.5) * width / more - 0.5, 0), width - 1)
        left = min(int(place), width - 2)
        expected = before[:, left] + (place - left) * (before[:, left + 1] - before[:, left])
        torch.testing.assert_close(after[:, index], expected, rtol=0, atol=1e-5)


@each_model
def test_unload_gives_the_base_model_back(make):
    model = make()
    before, expected = state_of(model), logits(model, SECONDS)
    peft_model = adapted(model, 1)
    logits(peft_model, 1)
    assert peft_model.unload() is model
    assert_as_before(model, before)
    assert torch.equal(logits(model, SECONDS), expected)
    adapted(model, 2)  # and any other length fits


def test_unload_after_the_model_was_moved():
    model = tiny_whisper()
    expected = copy.deepcopy(model).to(torch.bfloat16).state_dict()
    unloaded = adapted(model, 1).to(torch.bfloat16).unload()
    assert {name: tensor.dtype for name, tensor in unloaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unloaded.state_dict().items())


@pytest.mark.parametrize("make", [tiny_ast, tiny_whisper])
@pytest.mark.parametrize(
    "options", [{"target_modules": ["nothing"]}, {"modules_to_save": ["nothing"]}, {"label_names": ["a"]}]
)
def test_a_failed_adapter_leaves_the_model_as_it_was(make, options):
    model = make()
    before = state_of(model)
    options = {"modules_to_save": ["encoder", "embeddings"], **options} if "label_names" in options else options
    with pytest.raises(ValueError):
        adapted(model, 1, **options)
    assert_as_before(model, before)


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path):
    adapted(tiny_ast(num_hidden_layers=1), 1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "num_experts": 2}))
    model = tiny_ast(num_hidden_layers=1)
    before = state_of(model)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(model, tmp_path)
    assert_as_before(model, before)


def test_a_nested_config_is_restored_after_a_failure():
    model = build("Qwen2-Audio")
    before = state_of(model)
    most = model.config.audio_config.max_source_positions / 50
    with pytest.raises(ValueError, match=rf"at most {most:g}, its full length"):
        adapted(model, 60)
    assert_as_before(model, before)


@pytest.mark.parametrize("make", [tiny_ast, tiny_whisper])
def test_copies_are_of_their_own(make):
    model = adapted(make(), 1)
    expected = logits(model, 1)
    twin = copy.deepcopy(model)
    base = make()
    model.unload()
    assert torch.equal(logits(twin, 1), expected)
    unloaded = twin.unload()
    assert_as_before(unloaded, state_of(base))


@pytest.mark.parametrize("make", [tiny_ast, tiny_whisper])
def test_several_adapters(make):
    model = adapted(make(), 2)
    model.add_adapter("same", SoftMoAConfig(max_length_seconds=2.0, init_weights=False))
    before = state_of(model.get_base_model())
    for name, length in (("shorter", 1), ("full", None)):
        with pytest.raises(ValueError, match=r"must be the same for all adapters.*got .*max_length_seconds=2"):
            model.add_adapter(name, SoftMoAConfig(max_length_seconds=length))
    assert_as_before(model.get_base_model(), before)
    model.delete_adapter("default")
    assert logits(model, 2).isfinite().all()
    model.delete_adapter("same")
    assert model.base_model.model.config.to_dict() == make().config.to_dict()
    model.add_adapter("shorter", SoftMoAConfig(max_length_seconds=1))
    model.set_adapter("shorter")
    assert torch.equal(logits(model, 1), logits(model, 2))


def test_beside_an_adapter_at_full_length():
    for config in (SoftMoAConfig(), LoraConfig(target_modules=["q_proj"])):
        model = tiny_ast()
        model.add_adapter(config, "first")
        before = state_of(model)
        with pytest.raises(ValueError, match="must be the same for all adapters.*the base model's own length"):
            model.add_adapter(SoftMoAConfig(max_length_seconds=1), "second")
        assert_as_before(model, before)


def test_averaged_adapters_keep_the_length():
    model = adapted(tiny_ast(), 1)
    model.add_adapter("other", SoftMoAConfig(max_length_seconds=1, init_weights=False))
    model.base_model.average_adapters(["default", "other"])
    model.set_adapter("average")
    assert logits(model, 1).isfinite().all()


def test_transformers_own_adapters():
    model = tiny_ast()
    before = state_of(model)
    model.add_adapter(SoftMoAConfig(max_length_seconds=1))
    assert model.config.max_length == 100
    delete_adapter(model, "default", prefix="softmoa_")
    assert model.config.max_length == FRAMES
    assert torch.equal(
        model.base_model.embeddings.position_embeddings,
        before[0]["audio_spectrogram_transformer.embeddings.position_embeddings"],
    )
    model.add_adapter(SoftMoAConfig(max_length_seconds=2), "other")
    assert model.config.max_length == 200


@pytest.mark.parametrize("make", [tiny_ast, tiny_whisper])
def test_disabled_adapters_leave_the_length(make):
    model = adapted(make(), 1)
    cut = adapted(make(), 1, target_modules=["q_proj"])
    with model.disable_adapter(), cut.disable_adapter():
        assert torch.equal(logits(model, 1), logits(cut, 1))


def test_mixed_batches():
    model = adapted(tiny_ast(), 1)
    model.add_adapter("second", SoftMoAConfig(max_length_seconds=1, init_weights=False, num_experts=3))
    model.eval()
    inputs = spectrogram(model.get_base_model(), 2, clips=3)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["second", "__base__", "default"]).logits
        alone = model(**inputs).logits[2]
        model.set_adapter("second")
        torch.testing.assert_close(mixed[0], model(**inputs).logits[0])
    torch.testing.assert_close(mixed[2], alone)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [tiny_ast, tiny_whisper])
def test_training_with_gradient_checkpointing(make, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make()
        torch.manual_seed(0)
        peft_model = adapted(model, 1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = peft_model(**spectrogram(model, 1), labels=torch.tensor([0, 1])).loss
        loss.backward()
        trained = {name: parameter.grad for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
        assert trained and all("softmoa_" in name for name in trained)
        assert not any("position" in name for name in trained)
        gradients.append(trained)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_without_weights():
    with torch.device("meta"):
        model = ASTForAudioClassification(ASTConfig())
        whisper = WhisperForConditionalGeneration(WhisperConfig())
    for each, other in ((model, SoftMoAConfig()), (whisper, SoftMoAConfig())):
        config = SoftMoAConfig(max_length_seconds=5)
        before = each.config.to_dict()
        described = str(describe_targets(each, config)).splitlines()
        assert described[:-1] == str(describe_targets(each, other)).splitlines()[:-1]  # all but the share of the model
        assert SoftMoAConfig.for_budget(each, 905_000, max_length_seconds=5).max_length_seconds == 5
        assert each.config.to_dict() == before
    with pytest.raises(ValueError, match="at most 30, its full length"):
        describe_targets(whisper, SoftMoAConfig(max_length_seconds=40))


def test_trained_positions_count_as_many_as_there_are():
    config = SoftMoAConfig(max_length_seconds=1, modules_to_save=[EMBEDDINGS])
    model = tiny_ast()
    expected = count_parameters(model, config)
    trained = sum(each.numel() for each in get_peft_model(model, config).parameters() if each.requires_grad)
    assert trained == expected < count_parameters(tiny_ast(), SoftMoAConfig(modules_to_save=[EMBEDDINGS]))


@pytest.mark.parametrize("options", [{}, {"modules_to_save": [EMBEDDINGS]}])
def test_fingerprint_of_the_base_is_of_its_own_weights(options):
    model = tiny_ast()
    full = fingerprint_weights(adapted(copy.deepcopy(model), None, **options))
    assert fingerprint_weights(adapted(copy.deepcopy(model), 1, **options)) == full
    with torch.no_grad():
        model.base_model.embeddings.position_embeddings[0, 2] += 1  # which the cut leaves out
    assert fingerprint_weights(adapted(model, 1, **options)) != full


def test_adapted_grids_have_the_new_width():
    options = {"routing": "dense", "expert_type": "convolution", "patch_grid": True}
    assert logits(adapted(tiny_ast(), 1, **options), 1).isfinite().all()


@pytest.mark.parametrize(
    "make, seconds, message",
    [
        (tiny_ast, 0.1, "ASTForAudioClassification must be at least 0.16, got 0.1"),
        (tiny_whisper, 1.5, "must be at least 1, at most 3, its full length, a multiple of 1, got 1.5"),
        (tiny_whisper, 4, "must be at least 1, at most 3, its full length, a multiple of 1, got 4"),
        (lambda: build("WavLM"), 1, "known for models of type audio-spec.*, whisper, not for 'wavlm'"),
        (lambda: build("Voxtral"), 1, "not for 'voxtral'"),
    ],
)
def test_lengths_that_a_model_does_not_take(make, seconds, message):
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        adapted(model, seconds)
    assert_as_before(model, before)


def test_lengths_for_clips():
    assert fitting_length(tiny_ast(), 1.25) == 1.25
    assert fitting_length(tiny_ast(), 3) is None
    whisper = tiny_whisper()
    assert [fitting_length(whisper, seconds) for seconds in (0.2, 1, 1.2, 2.5, 3, 9)] == [1, 1, 2, None, None, None]
    assert fitting_length(build("WavLM"), 1) is None
    fitted = adapted(tiny_ast(), 1)  # whose base still reads more
    assert [fitting_length(fitted, seconds) for seconds in (0.5, 1, 2)] == [0.5, 1, 2]
    assert fitting_length(fitted, 3) is None
    assert fitting_length(adapted(tiny_whisper(), 1), 1.2) == 2


@pytest.mark.parametrize("seconds", [1, 2])
@pytest.mark.parametrize(
    "full",
    [ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=32), WhisperFeatureExtractor(feature_size=8, chunk_length=3)],
    ids=["AST", "Whisper"],
)
def test_feature_extractors(full, seconds, tmp_path):
    before = full.to_dict()
    fitted = fit_feature_extractor(full, seconds)
    assert full.to_dict() == before and type(fitted) is type(full)
    fitted.save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    time = -1 if isinstance(full, WhisperFeatureExtractor) else 1
    name = full.model_input_names[0]
    generator = np.random.default_rng(0)
    for length in (0.5, 1.0, 2.5):
        clip = generator.standard_normal(int(length * RATE)).astype("f4")
        made = [each(clip, sampling_rate=RATE, return_tensors="pt")[name] for each in (fitted, loaded)]
        assert made[0].shape[time] == 100 * seconds and torch.equal(*made)
        if length < seconds:  # then there is nothing but less padding
            whole = full(clip, sampling_rate=RATE, return_tensors="pt")[name]
            assert torch.equal(whole.narrow(time, 0, 100 * seconds), made[0])


@pytest.mark.parametrize(
    "extractor, seconds, message",
    [
        (Wav2Vec2FeatureExtractor(), 1, "Wav2Vec2FeatureExtractor has no fixed length"),
        (WhisperFeatureExtractor(), 1.5, "must be whole for WhisperFeatureExtractor, got 1.5"),
        (ASTFeatureExtractor(), 0, "`seconds` must be a number of seconds above 0, at most 60, got 0"),
        (ASTFeatureExtractor(), "5", "got '5'"),
    ],
)
def test_feature_extractors_that_do_not_fit(extractor, seconds, message):
    with pytest.raises(ValueError, match=message):
        fit_feature_extractor(extractor, seconds)


WAYS = {
    "PeftModel": "PeftModel.from_pretrained(AutoModelForAudioClassification.from_pretrained(base), adapter)",
    "PeftModel, low memory": "PeftModel.from_pretrained(AutoModelForAudioClassification.from_pretrained(base), adapter,"
    " low_cpu_mem_usage=True)",
    "AutoModel": "AutoModelForAudioClassification.from_pretrained(adapter)",
    "load_adapter": "load_adapter(AutoModelForAudioClassification.from_pretrained(base), adapter)",
    "pipeline": 'pipeline("audio-classification", model=adapter).model',
}
SCRIPT = """
import json, sys
import torch
import peft_softmoa
from peft import PeftModel
from transformers import AutoModelForAudioClassification, pipeline

def load_adapter(model, adapter):
    model.load_adapter(adapter)
    return model

base, adapter, data, ways = sys.argv[1:]
torch.set_grad_enabled(False)
inputs, expected = torch.load(data, weights_only=True)
for name, way in json.loads(ways).items():
    model = eval(way).eval()
    for values in inputs:
        logits = model(values).logits
        assert torch.equal(logits, expected), (name, (logits - expected).abs().max())
print("all equal")
"""


def save_base(folder, make):
    make().save_pretrained(folder)
    extractor = (
        ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=32)
        if make is tiny_ast
        else WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS)
    )
    extractor.save_pretrained(folder)
    return AutoModelForAudioClassification.from_pretrained(folder), extractor


@pytest.mark.parametrize("make", [tiny_ast, tiny_whisper])
def test_loads_equal_in_a_new_process(make, tmp_path):
    base, extractor = save_base(tmp_path / "base", make)
    model = adapted(base, 1, modules_to_save=["projector", "classifier"][make is tiny_ast :], label_names=["a", "b"])
    model.eval().save_pretrained(tmp_path / "adapter")
    fit_feature_extractor(extractor, 1).save_pretrained(tmp_path / "adapter")
    inputs = [next(iter(spectrogram(base, seconds).values())) for seconds in (1, SECONDS)]
    torch.save((inputs, logits(model, 1)), tmp_path / "data.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "base", tmp_path / "adapter", tmp_path / "data.pt", json.dumps(WAYS)],
        capture_output=True,
        text=True,
    )
    assert "all equal" in done.stdout, done.stderr


@pytest.mark.parametrize("make", [tiny_ast, tiny_whisper])
def test_pipeline_with_either_feature_extractor(make, tmp_path):
    base, extractor = save_base(tmp_path / "base", make)
    model = adapted(base, 1, modules_to_save=["projector", "classifier"][make is tiny_ast :], label_names=["a", "b"])
    model.eval().save_pretrained(tmp_path / "adapter")
    fitted = fit_feature_extractor(extractor, 1)
    fitted.save_pretrained(tmp_path / "adapter")
    clip = 0.1 * np.random.default_rng(0).standard_normal(int(0.8 * RATE)).astype("f4")
    with torch.no_grad():
        scores = model(**fitted(clip, sampling_rate=RATE, return_tensors="pt")).logits.softmax(1)[0]
    expected = {name: pytest.approx(float(score), abs=1e-6) for name, score in zip("ab", scores)}
    folder = str(tmp_path / "adapter")
    for options in ({}, {"feature_extractor": folder}):
        classifier = pipeline("audio-classification", model=folder, **options)
        assert {each["label"]: each["score"] for each in classifier(clip)} == expected
        # A longer clip is cut.
        assert len(classifier(np.tile(clip, 3))) == 2


def test_inspection_shows_clips_of_the_length(tmp_path):
    base, _ = save_base(tmp_path / "base", tiny_ast)
    adapted(base, 1).save_pretrained(tmp_path / "adapter")
    model, extractor = load_adapter(str(tmp_path / "adapter"))
    assert extractor.max_length == model.config.max_length == 100


def test_the_card_says_the_length(tmp_path):
    adapted(tiny_ast(), 1.5).save_pretrained(tmp_path / "short")
    adapted(tiny_ast(), None).save_pretrained(tmp_path / "full")
    sentence = "reads clips of 1.5 s, and cuts longer ones"
    assert sentence in (tmp_path / "short" / "README.md").read_text()
    assert "and cuts longer ones" not in (tmp_path / "full" / "README.md").read_text()


@pytest.fixture(scope="session")
def whisper_folder():
    folder = os.environ.get("SOFTMOA_WHISPER")
    if not folder:
        pytest.skip("needs a real Whisper: set SOFTMOA_WHISPER to a folder with whisper-tiny.en as it is published")
    return Path(folder)


def test_the_real_whisper(whisper_folder, tmp_path):
    base = AutoModelForAudioClassification.from_pretrained(whisper_folder, num_labels=2, dtype=torch.float32)
    extractor = AutoFeatureExtractor.from_pretrained(whisper_folder)
    before = state_of(base)
    model = adapted(base, 5, modules_to_save=["projector", "classifier"], label_names=["a", "b"]).eval()
    model.save_pretrained(tmp_path)
    fitted = fit_feature_extractor(extractor, 5)
    fitted.save_pretrained(tmp_path)
    clip = 0.1 * np.random.default_rng(0).standard_normal(4 * RATE).astype("f4")
    inputs = {}
    for name, each in {"fitted": fitted, "full": extractor}.items():
        inputs[name] = each(clip, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert inputs["fitted"].shape == (1, 80, 500)
    with torch.no_grad():
        expected = model(input_features=inputs["fitted"]).logits
        torch.testing.assert_close(model(input_features=inputs["full"]).logits, expected)
        loaded = AutoModelForAudioClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert torch.equal(loaded(inputs["fitted"]).logits, expected)
    assert_as_before(model.unload(), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_refused(name):
    model = build(name)
    if name.startswith(("AST", "Whisper", "Qwen2-Audio")):
        return
    assert fitting_length(model, 0.001) is None
    with pytest.raises(ValueError, match="`max_length_seconds` is known for models of type"):
        describe_targets(model, SoftMoAConfig(max_length_seconds=1))
