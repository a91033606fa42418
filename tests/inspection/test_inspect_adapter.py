import csv
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import FRAMES, MEL_BINS, SAMPLING_RATE, tiny_ast_config, wait_until, write_tone
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from recordings import encode, signal
from transformers import ASTFeatureExtractor, ASTForAudioClassification

from peft_softmoa import SoftMoAConfig
from peft_softmoa.cli import main
from peft_softmoa.inspection import Record, expert_report, reading_map
from peft_softmoa.inspection.clip_view import find_peaks
from peft_softmoa.inspection.clips import ClipReading, shared_name
from peft_softmoa.inspection.inspect_adapter import inspect_adapter
from peft_softmoa.inspection.plots import Clip
from peft_softmoa.inspection.spectrograms import mel_frequencies
from peft_softmoa.targets.architectures import find_patch_grid
from peft_softmoa.training import DataOptions, ExtractFeatures, decode_audio


@pytest.fixture(scope="module")
def adapter(base_folder, tmp_path_factory):
    """An adapter on the tiny AST, with its feature extractor."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = SoftMoAConfig(num_experts=3, r=2, init_weights=False)
    get_peft_model(ASTForAudioClassification.from_pretrained(base_folder), config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS).save_pretrained(folder)
    return folder


@pytest.fixture
def clip(tmp_path):
    write_tone(tmp_path / "clip.wav", seconds=0.5)
    return tmp_path / "clip.wav"


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_clip_and_a_dataset(adapter, tones_folder, clip, tmp_path, capsys):
    folder = tmp_path / "out"
    options = ["--audio", str(clip), "--dataset", str(tones_folder), "--rows", "fold=1", "--output_dir", str(folder)]
    main(["inspect", str(adapter), *options])
    assert capsys.readouterr().out == f"The report is in {folder / 'report.html'}\n"
    found = report_of(folder)
    assert found["num_clips"] == 8 and found["label_names"] == ["high", "low"]
    [no_accuracy, note] = found["left_out"]
    assert no_accuracy == "There is no accuracy: the model has no class 'high'." and found["accuracy"] is None
    assert note.startswith("The clip is filled up with silence to the 0.64 s that the model takes, and has no mask: ")
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "classes-in-layers.0.attention.png", "classes-in-layers.1.attention.png", "load-of-the-experts.png",
        "reading-of-layers.0.attention.png", "reading-of-layers.1.attention.png",
    ]  # fmt: skip
    page = (folder / "report.html").read_text()
    assert str(tmp_path) not in page and found["facts"]["Adapter"] == adapter.name
    # A spectrogram, and a map of each of three experts in two blocks; a matrix of loads, and two of classes.
    assert page.count('class="map"') == 7 and page.count('class="matrix"') == 3
    assert page.count("<audio") == 1 and found["summary"] in page and "%</p>" not in page

    # The numbers are those of the loaded adapter.
    model = transformers.AutoModelForAudioClassification.from_pretrained(adapter)
    extract = ASTFeatureExtractor.from_pretrained(adapter)
    with open(tones_folder / "metadata.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["fold"] == "1"]
    clips = [decode_audio(tones_folder / row["file_name"], SAMPLING_RATE) for row in rows]
    inputs = extract(clips, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    labels = torch.tensor([["high", "low"].index(row["label"]) for row in rows])
    report = expert_report(model, [{**inputs, "labels": labels}], label_names=["high", "low"], show_progress=False)
    for block, wanted in zip(found["blocks"], report.to_dict()["blocks"], strict=True):
        for name in ("load", "output_share", "effective_number", "class_information", "num_tokens"):
            assert block[name] == pytest.approx(wanted[name], rel=1e-4)

    # And of the clip, by block.
    [first, second] = found["clip"]["blocks"]
    assert found["clip"]["duration"] == 0.5 and found["clip"]["seconds"] == FRAMES / 100
    weights = np.array(first["dispatch"])[0, :, :, 0]
    grid = weights[2:].reshape(MEL_BINS // 16, FRAMES // 16, 3)
    for expert, peak in enumerate(first["peaks"]):
        row, column = np.unravel_index(grid[:, :, expert].argmax(), grid.shape[:2])
        assert 0.16 * column <= peak["seconds"] <= 0.16 * (column + 1)
        assert peak["elsewhere"] == pytest.approx(weights[:2, expert].sum(), rel=1e-5)
    assert second["block"] == "audio_spectrogram_transformer.layers.1.attention"


def test_a_browser_shows_the_report(adapter, tones_folder, clip, tmp_path, visit):
    page = visit(
        inspect_adapter(str(adapter), tmp_path / "out", audio=str(clip), dataset=str(tones_folder)),
        viewport={"width": 390, "height": 844},
    )
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    assert page.locator(".map:visible").count() == 4 and page.locator(".matrix").count() == 3
    page.locator("select").select_option(label="layers.1.attention")
    page.get_by_label("2", exact=True).check()
    shown = page.locator(".block .map:visible")
    assert shown.count() == 1 and shown.locator("title").text_content() == "Expert 2 in layers.1.attention"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wait_until(page, "document.querySelector('audio').readyState >= 1")
    assert page.evaluate("document.querySelector('audio').duration") == pytest.approx(0.5, abs=0.01)


def test_accuracy_and_confusion_come_first_of_the_numbers(tones_folder, tmp_path, visit):
    names = {0: "low", 1: "high"}  # in another order than in the dataset
    config = tiny_ast_config(num_labels=2, id2label=names, label2id={name: index for index, name in names.items()})
    adapter = save(
        ASTForAudioClassification, config, tmp_path, ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS)
    )
    path = inspect_adapter(adapter, tmp_path / "out", dataset=str(tones_folder))
    found = report_of(tmp_path / "out")
    model = transformers.AutoModelForAudioClassification.from_pretrained(adapter)
    extract = ASTFeatureExtractor.from_pretrained(tmp_path / "base")
    with open(tones_folder / "metadata.csv") as file:
        rows = list(csv.DictReader(file))
    clips = [decode_audio(tones_folder / row["file_name"], SAMPLING_RATE) for row in rows]
    with torch.no_grad():
        taken = model(**extract(clips, sampling_rate=SAMPLING_RATE, return_tensors="pt")).logits.argmax(-1).tolist()
    pairs = [(row["label"], names[index]) for row, index in zip(rows, taken)]
    assert found["label_names"] == ["high", "low"] and found["output_names"] == ["low", "high"]
    assert found["confusion"] == [[pairs.count((true, says)) for says in ("low", "high")] for true in ("high", "low")]
    accuracy = sum(true == says for true, says in pairs) / len(pairs)
    assert found["accuracy"] == pytest.approx(accuracy) and found["no_confusion_reason"] is None
    page = visit(path)
    assert page.locator("h2").all_text_contents()[:3] == [
        "Problems and advice",
        "Accuracy and confusion",
        "Who is used",
    ]
    assert page.locator(".figure").text_content() == f"{accuracy:.1%}"
    # Columns in the order of the rows: what is right is on the diagonal.
    assert page.locator(".matrix").first.locator("desc").text_content() == "; ".join(
        f"{name}: {pairs.count((name, name))} of {sum(true == name for true, _ in pairs)} right"
        for name in ("high", "low")
    )


def test_a_clip_alone(adapter, clip, tmp_path):
    page = inspect_adapter(str(adapter), tmp_path / "out", audio=str(clip))
    found = report_of(tmp_path / "out")
    assert found["num_clips"] == 1 and found["label_names"] is None
    assert found["left_out"][:2] == [
        "These are numbers of one clip. A dataset shows what holds for the adapter in general.",
        "There is nothing about classes: the dataset has no labels.",
    ]
    assert "LABEL_" in found["facts"]["The model says"] and page == tmp_path / "out" / "report.html"


def test_a_dataset_without_labels(adapter, tones_folder, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(tones_folder, folder)
    lines = (folder / "metadata.csv").read_text().splitlines()
    (folder / "metadata.csv").write_text("\n".join(line.split(",")[0] for line in lines))
    inspect_adapter(str(adapter), tmp_path / "out", dataset=str(folder), max_clips=5, batch_size=2)
    found = report_of(tmp_path / "out")
    assert found["num_clips"] == 5 and found["blocks"][0]["class_loads"] is None
    [note] = found["left_out"]
    assert note.startswith("There is nothing about classes: the dataset has no labels")
    with pytest.raises(ValueError, match="has no column 'label'; its columns are: "):
        inspect_adapter(str(adapter), tmp_path / "out", dataset=str(folder), options=DataOptions())
    assert not list((tmp_path / "out").glob("classes-*.png"))


@pytest.mark.parametrize("relative", [False, True])
def test_a_report_names_no_folder_of_this_computer(adapter, clip, tmp_path, monkeypatch, relative):
    """Also not in what says why clips are skipped; it may be sent to others."""
    data = tmp_path / "home" / "data"
    (data / "parts").mkdir(parents=True)
    write_tone(data / "good.wav")
    (data / "parts" / "noise.wav").write_bytes(b"this is no audio")
    (tmp_path / "home" / "elsewhere.wav").write_bytes(b"this is no audio")
    os.mkfifo(data / "pipe.wav")
    soundfile.write(data / "blip.wav", np.zeros(20), SAMPLING_RATE)
    names = ["good.wav", "parts/noise.wav", "missing.wav", "pipe.wav", "blip.wav", "../elsewhere.wav"]
    names.append(str(tmp_path / "home" / "elsewhere.wav"))
    (data / "metadata.csv").write_text("\n".join(["file_name", *names]))
    monkeypatch.chdir(tmp_path)
    dataset = "home/data" if relative else str(data)
    page = inspect_adapter(str(adapter), tmp_path / "out", dataset=dataset, audio=str(clip)).read_text()
    [note] = [note for note in report_of(tmp_path / "out")["left_out"] if note.startswith("Clips that cannot be used")]
    assert [skipped.strip().split(": ")[0] for skipped in note.partition(": ")[2].split("; ")] == [
        "parts/noise.wav", "missing.wav", "pipe.wav", "blip.wav", "elsewhere.wav", "elsewhere.wav",
    ]  # fmt: skip
    assert "missing.wav: unreadable (No such file or directory)" in note and "pipe.wav: not a regular file" in note
    for text in (page, (tmp_path / "out" / "report.json").read_text()):
        assert str(tmp_path) not in text and "home" not in text


def test_names_that_are_shared():
    assert shared_name("https://user:password@host/clips/a.wav?key=secret") == "a.wav"
    assert shared_name("/data/parts/a.wav", "/data/") == "parts/a.wav"
    assert shared_name("/data2/a.wav", "/data") == shared_name("a.wav") == "a.wav"
    assert shared_name("C:\\Users\\somebody\\a.wav") == "a.wav"
    assert shared_name("a clip without a name", "/data") == "a clip without a name"


def test_names_with_html_are_text(adapter, tmp_path):
    evil = "<script>alert('x')</script>"
    data = tmp_path / "data"
    data.mkdir()
    with open(data / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "label"])
        for index, label in enumerate((evil, '"><img src=x onerror=alert(1)>', "$a_b$")):
            write_tone(data / f"{index}.wav", 300 * (index + 1))
            table.writerow([f"{index}.wav", label])
    clip = tmp_path / "<b onclick=alert(1)> & $.wav"
    write_tone(clip)
    page = inspect_adapter(str(adapter), tmp_path / "out", dataset=str(data), audio=str(clip)).read_text()
    assert (
        page.count("<script") == 1
        and "alert('x')" not in page
        and "<b onclick" not in page
        and "<img src=x" not in page
    )
    assert "&lt;b onclick=alert(1)&gt; &amp; $.wav" in page
    assert evil in report_of(tmp_path / "out")["label_names"]


def save(make, config, folder, extractor, **choices):
    """A tiny model with its adapter."""
    torch.manual_seed(0)
    make(config).save_pretrained(folder / "base")
    extractor.save_pretrained(folder / "base")
    model = make.from_pretrained(folder / "base")
    get_peft_model(model, SoftMoAConfig(num_experts=3, r=2, **choices)).save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def test_a_model_of_sequences(clip, tmp_path):
    """Wave to tokens, also without a feature extractor in the adapter's folder."""
    adapter = save(
        *FAMILIES["Wav2Vec2"].config(), tmp_path, transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    )
    inspect_adapter(adapter, tmp_path / "out", audio=str(clip))
    found = report_of(tmp_path / "out")["clip"]
    assert found["seconds"] == 0.5 and len(found["blocks"][0]["peaks"]) == 3
    assert all(0 < peak["seconds"] < 0.5 and peak["hertz"] is None for peak in found["blocks"][0]["peaks"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('class="map"') == 7 and "Log-mel spectrogram" in page and "What the model reads" not in page
    # What is not trained adds nothing.
    assert "Experts that add nothing" in page and "<code>num_experts</code>" in page


def test_all_of_an_mp3_without_its_length_is_read(tmp_path):
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    adapter = save(*FAMILIES["Wav2Vec2"].config(), tmp_path, extractor)
    content = encode("mp3", "libmp3lame", signal(), quality=2, options={"write_xing": "0"})
    (tmp_path / "clip.mp3").write_bytes(content)
    inspect_adapter(adapter, tmp_path / "out", audio=str(tmp_path / "clip.mp3"))
    assert report_of(tmp_path / "out")["clip"]["seconds"] == pytest.approx(2.0, abs=0.06)


@pytest.mark.parametrize("pitch", [100, 440, 3000])
def test_the_frequencies_are_those_of_the_feature_extractor(tmp_path, pitch):
    samples = write_tone(tmp_path / "tone.wav", pitch)
    bins = ASTFeatureExtractor()(samples, sampling_rate=SAMPLING_RATE)["input_values"][0][:40].mean(0)
    frequencies = mel_frequencies(128, SAMPLING_RATE)
    found = int(bins.argmax())
    assert frequencies[max(found - 1, 0)] <= pitch <= frequencies[found + 1]


def test_peaks_are_in_the_middle_of_patches_that_overlap():
    config = tiny_ast_config(frequency_stride=10, time_stride=10)
    grid = find_patch_grid(config.to_dict())
    clip = Clip("a", np.zeros(1), SAMPLING_RATE, np.zeros((128, FRAMES)), FRAMES / 100, mel_frequencies(128, 16_000))
    for row, column in ((0, 0), (4, 2), (11, 4)):
        weights = torch.full((1, 2 + 60, 1, 1), 0.5 / 62)
        weights[0, 2 + row * 5 + column] += 0.5
        reading = reading_map(Record("a", "b", weights, None, None, torch.ones(1, 62) > 0), grid)
        [peak] = find_peaks(reading, ClipReading(clip, 1.0, {}, grid, (), (), (), None))
        # Nearer to what no other patch covers: one at the border lies more beyond the middle.
        assert abs(peak["seconds"] - 0.01 * (10 * column + 8)) <= 0.04
        frequencies = clip.frequencies[[10 * row + 4, 10 * row + 12]]
        assert frequencies[0] - 1e-6 <= peak["hertz"] <= frequencies[1] + 1e-6 or row in (0, 11)
        assert clip.frequencies[10 * row] <= peak["hertz"] <= clip.frequencies[10 * row + 15]


def test_blocks_outside_of_the_audio_encoder_have_no_map(clip, tmp_path):
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=400)
    options = {"target_modules": ["fc2"], "routing": "dense", "init_weights": False}
    adapter = save(*FAMILIES["Whisper, speech to text"].config(), tmp_path, extractor, **options)
    inspect_adapter(adapter, tmp_path / "out", audio=str(clip))
    found = report_of(tmp_path / "out")
    assert [(".decoder." in each["block"], each["peaks"] is None) for each in found["clip"]["blocks"]] == [
        (False, False), (False, False), (True, True), (True, True),
    ]  # fmt: skip
    assert any("decoder.layers.0.fc2' has no map: it is not in the audio encoder" in note for note in found["left_out"])


def test_a_layer_as_a_block_has_a_map(clip, tmp_path):
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    adapter = save(*FAMILIES["Wav2Vec2"].config(), tmp_path, extractor, target_modules=["layers.1"], routing="dense")
    inspect_adapter(adapter, tmp_path / "out", audio=str(clip))
    [block] = report_of(tmp_path / "out")["clip"]["blocks"]
    assert block["block"].endswith("layers.1") and len(block["peaks"]) == 3


def test_clips_without_a_mask_are_not_padded(clip, tmp_path):
    """A model that gets no mask takes padding for clip."""
    write_tone(tmp_path / "longer.wav", seconds=0.8)
    (tmp_path / "metadata.csv").write_text("file_name\nclip.wav\nlonger.wav\nclip.wav\n")
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    adapter = save(*FAMILIES["Wav2Vec2"].config(), tmp_path, extractor)
    for size in (1, 3):
        inspect_adapter(adapter, tmp_path / str(size), dataset=str(tmp_path), batch_size=size)
    one, together = (report_of(tmp_path / str(size))["blocks"] for size in (1, 3))
    assert [each["load"] for each in one] == [pytest.approx(each["load"], rel=1e-6) for each in together]
    assert one[0]["num_tokens"] == together[0]["num_tokens"]


def test_a_base_model_in_half_precision(clip, tmp_path):
    make, config = FAMILIES["Wav2Vec2"].config()
    config.dtype = torch.bfloat16
    adapter = save(make, config, tmp_path, transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True))
    inspect_adapter(adapter, tmp_path / "out", audio=str(clip), dataset=None)
    assert report_of(tmp_path / "out")["num_clips"] == 1


def test_an_adapter_that_has_diverged(base_folder, clip, tmp_path):
    model = get_peft_model(ASTForAudioClassification.from_pretrained(base_folder), SoftMoAConfig())
    model.base_model.model.audio_spectrogram_transformer.layers[1].attention.softmoa_mixture[
        "default"
    ].router.slots.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "adapter")
    says = refused(tmp_path / "adapter", "--audio", clip, "--output_dir", tmp_path / "out")
    assert "layers.1.attention' the adapter 'default' gives numbers that are not finite: it has diverged" in says
    assert not (tmp_path / "out").exists()


def test_a_model_that_writes_text_and_fills_clips_up(clip, tmp_path):
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=400)
    adapter = save(*FAMILIES["Whisper, speech to text"].config(), tmp_path, extractor)
    inspect_adapter(adapter, tmp_path / "out", audio=str(clip))
    found = report_of(tmp_path / "out")["clip"]
    assert found["seconds"] == 1.0 and found["duration"] == 0.5 and found["prediction"] is None


@pytest.mark.parametrize(
    ("fields", "has_class"),
    [
        ({}, True),
        ({"problem_type": "single_label_classification"}, True),
        ({"problem_type": "multi_label_classification"}, False),
        ({"problem_type": "regression"}, False),
        ({"num_labels": 1}, False),
    ],
)
def test_a_class_is_shown_for_a_model_of_one_class_a_clip(clip, tmp_path, fields, has_class):
    config = tiny_ast_config(**fields)
    extractor = transformers.ASTFeatureExtractor(max_length=config.max_length)
    adapter = save(ASTForAudioClassification, config, tmp_path, extractor)
    inspect_adapter(adapter, tmp_path / "out", audio=str(clip))
    assert (report_of(tmp_path / "out")["clip"]["prediction"] is not None) == has_class


def test_a_model_of_windows_has_no_map(clip, tmp_path):
    extractor = transformers.ClapFeatureExtractor(feature_size=16, max_length_s=1, truncation="rand_trunc")
    adapter = save(transformers.ClapAudioModel, FAMILIES["CLAP"].config()[1].audio_config, tmp_path, extractor)
    inspect_adapter(adapter, tmp_path / "out", audio=str(clip))
    found = report_of(tmp_path / "out")
    assert any("takes clips in parts, such as windows" in note for note in found["left_out"])
    assert all(block["peaks"] is None for block in found["clip"]["blocks"])


def test_only_the_start_of_an_hour_is_read(adapter, tmp_path):
    """In memory that does not grow with the file: ten channels of an hour would be 4.6 GB."""
    path = tmp_path / "hour.flac"
    second = (np.random.default_rng(0).integers(-9, 9, (32_000, 2))).astype("int16")
    with soundfile.SoundFile(path, "w", 32_000, 2, "PCM_16") as file:
        for _ in range(3700):
            file.write(second)
    whole = 3700 * second.size * 4
    tracemalloc.start()
    samples = decode_audio(path, SAMPLING_RATE, max_seconds=2.5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(samples) == 2.5 * SAMPLING_RATE and peak < whole / 100
    extract = ExtractFeatures(
        ASTFeatureExtractor(max_length=FRAMES), None, DataOptions(label_column=None, max_length_seconds=2.5)
    )
    tracemalloc.start()
    assert len(extract({"audio": [str(path)]})["input_values"]) == 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < whole / 100
    options = DataOptions(max_length_seconds=2.5)
    inspect_adapter(str(adapter), tmp_path / "out", audio=str(path), options=options)
    found = report_of(tmp_path / "out")
    assert found["clip"]["duration"] == 3700
    assert "Of the clip's 3700 s only the first 2.5 s are read." in found["left_out"]
    assert "The model takes the first 0.64 s of a clip, and no more." in found["left_out"]


def refused(*words):
    with pytest.raises(SystemExit) as error:
        main(["inspect", *map(str, words)])
    return str(error.value)


def test_what_cannot_be_inspected(adapter, base_folder, clip, tmp_path):
    lora = get_peft_model(ASTForAudioClassification.from_pretrained(base_folder), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    out = ("--output_dir", tmp_path / "out")
    says = refused(tmp_path / "lora", "--audio", clip, *out)
    assert says == (
        f"peft-softmoa inspect: '{tmp_path / 'lora'}' is a LORA adapter, but only those of Soft-MoA have experts to "
        "look at."
    )
    assert "Can't find 'adapter_config.json'" in refused(base_folder, "--audio", clip, *out)
    assert "There is nothing to look at: give a clip with --audio" in refused(adapter, *out)
    (tmp_path / "text.wav").write_text("no audio at all")
    assert f"{tmp_path / 'text.wav'}: unreadable" in refused(adapter, "--audio", tmp_path / "text.wav", *out)
    assert "missing.wav: unreadable" in refused(adapter, "--audio", tmp_path / "missing.wav", *out)
    for samples in (1, 150):
        soundfile.write(tmp_path / "short.wav", np.full(samples, 0.1), SAMPLING_RATE)
        says = refused(adapter, "--audio", tmp_path / "short.wav", *out)
        assert "short.wav: the model does not take its 0.0" in says and "shorter than what one token reads" in says
    says = refused(adapter, "--audio", clip, "--max_length_seconds", "0", *out)
    assert says == "peft-softmoa inspect: --max_length_seconds must be positive, got 0.0."
    says = refused(adapter, "--audio", clip, "--batch_size", "0", *out)
    assert says == "peft-softmoa inspect: --batch_size and --max_clips must be positive, got 0 and None."
    assert not (tmp_path / "out").exists()


def test_a_wave_that_is_shorter_than_a_token(tmp_path):
    adapter = save(*FAMILIES["Wav2Vec2"].config(), tmp_path, transformers.Wav2Vec2FeatureExtractor())
    soundfile.write(tmp_path / "short.wav", np.full(3, 0.1), SAMPLING_RATE)
    says = refused(adapter, "--audio", tmp_path / "short.wav", "--output_dir", tmp_path / "out")
    assert "short.wav: the model does not take its 0.000 s, which is shorter than what one token reads" in says


def test_a_wave_in_a_dataset_that_is_shorter_than_a_token(tmp_path):
    adapter = save(*FAMILIES["Wav2Vec2"].config(), tmp_path, transformers.Wav2Vec2FeatureExtractor())
    soundfile.write(tmp_path / "short.wav", np.full(3, 0.1), SAMPLING_RATE)
    write_tone(tmp_path / "long.wav")
    (tmp_path / "metadata.csv").write_text("file_name\nshort.wav\nlong.wav\n")
    inspect_adapter(adapter, tmp_path / "out", dataset=str(tmp_path))
    found = report_of(tmp_path / "out")
    assert found["num_clips"] == 1
    assert found["left_out"][0].startswith("Clips that cannot be used: short.wav: the model does not take its 0.000 s")
