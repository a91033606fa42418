"""Pictures: what they show, where, and with which units."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_softmoa.inspection.blocks import BlockReport
from peft_softmoa.inspection.maps import reading_map
from peft_softmoa.inspection.records import Record
from peft_softmoa.inspection.report import ExpertReport
from peft_softmoa.inspection.streams import StreamReading
from peft_softmoa.method import PatchGrid

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'peft-softmoa[plot]'")

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.image import imread

from peft_softmoa.inspection import plots
from peft_softmoa.inspection.plots import Clip, plot_classes, plot_history, plot_load, plot_reading, plot_stream, png

GRID = PatchGrid(2, 12, 101, 16, 10, 10)
SPECTROGRAM = np.linspace(-1, 1, 128 * 1024, dtype="f4").reshape(128, 1024)
FREQUENCIES = np.geomspace(50, 7800, 128)
SAMPLES = np.sin(np.arange(16_000, dtype="f4") / 10)
PATCHES = Clip("dog.wav", SAMPLES, 16_000, SPECTROGRAM, 10.24, FREQUENCIES)
WAVE = Clip("dog.wav", SAMPLES, 16_000, None, 1.0)


def block(load, number=0, adapter="default", class_loads=None):
    load = torch.tensor(load, dtype=torch.float64)
    tokens, twins = torch.ones(len(load), 1, dtype=torch.float64), torch.eye(len(load), dtype=torch.float64)
    classes = None if class_loads is None else torch.tensor(class_loads, dtype=torch.float64)
    return BlockReport(
        f"model.layer.{number}.mlp", adapter, 10.0, load, load, tokens, twins, twins, 0.5, class_loads=classes
    )


def record(dispatch):
    """A record of one clip from dispatch weights (T, N, P)."""
    dispatch = dispatch[None]
    return Record("layer.0.mlp", "default", dispatch, dispatch, dispatch.sum(3), torch.ones(dispatch.shape[:2]).bool())


def with_one_hot_patch(row, column, elsewhere=0.25, num_experts=1):
    """Slots that read one patch, and class tokens for the rest."""
    dispatch = torch.zeros(2 + 12 * 101, num_experts, 1, dtype=torch.float64)
    dispatch[0] = elsewhere
    dispatch[2 + row * 101 + column] = 1 - elsewhere
    return reading_map(record(dispatch), GRID)


def labels(ticks):
    return [tick.get_text() for tick in ticks]


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def assert_apart(figure, ticks):
    """No two neighbouring labels of an axis overlap, and all are within the figure."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [tick.get_window_extent(renderer) for tick in ticks if tick.get_text()]
    assert boxes
    for one, other in zip(boxes, boxes[1:]):
        assert not one.overlaps(other)
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height


def contrast(color, background):
    def luminance(channels):
        return sum(
            weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
            for weight, part in zip((0.2126, 0.7152, 0.0722), channels)
        )

    bright, dark = sorted((luminance(color), luminance(background)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_without_matplotlib_the_package_works_and_plots_say_what_to_install():
    script = """
import sys
import peft_softmoa, peft_softmoa.inspection
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = None
try:
    import peft_softmoa.inspection.plots
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "pip install 'peft-softmoa[plot]'" in result.stdout


def test_plots_leave_no_global_state():
    before = dict(matplotlib.rcParams)
    png(plot_load(ExpertReport((block([0.5, 0.5]),), 8)))
    png(plot_history(history(2)))
    assert dict(matplotlib.rcParams) == before
    folder = Path(plots.__file__).parent
    assert not [path for path in folder.glob("*.py") if "pyplot" in path.read_text()]


def test_load():
    loads = [[0.5, 0.3, 0.2], [0.05, 0.9, 0.05]]
    figure = plot_load(ExpertReport(tuple(block(load, number) for number, load in enumerate(loads)), 8))
    axes, bar = figure.axes
    assert np.allclose(axes.images[0].get_array(), 100 * np.array(loads))
    assert labels(axes.get_yticklabels()) == ["layer.0.mlp", "layer.1.mlp"]
    assert labels(axes.get_xticklabels()) == ["0", "1", "2"]
    assert axes.get_xlabel() == "expert" and axes.get_ylabel() == "block, first to last"
    assert bar.get_xlabel() == "load (% of the combine weights)"
    assert {"50.0", "30.0", "20.0", "5.0", "90.0"} <= set(texts(figure))
    assert "33.3%" in axes.get_title("left")
    assert bar.lines[-1].get_xdata()[0] == pytest.approx(100 / 3)


def test_numbers_can_be_read_on_every_colour():
    loads = np.random.default_rng(0).dirichlet(np.full(7, 0.7), 12)
    figure = plot_load(ExpertReport(tuple(block(load, number) for number, load in enumerate(loads)), 8))
    axes = figure.axes[0]
    image = axes.images[0]
    assert len(axes.texts) == 84
    for text in axes.texts:
        column, row = text.get_position()
        color = 1.0 if text.get_color() == "white" else 0.0
        assert contrast([color] * 3, image.cmap(image.norm(100 * loads[row, column]))) >= 4.5


def test_blocks_with_fewer_experts_have_blank_cells():
    report = ExpertReport((block([0.5, 0.5], adapter="a"), block([0.25] * 4, adapter="b")), 8)
    axes = plot_load(report).axes[0]
    assert axes.images[0].get_array().mask.tolist() == [[False, False, True, True], [False] * 4]
    assert len(axes.texts) == 6
    assert labels(axes.get_yticklabels()) == ["layer.0.mlp (a)", "layer.0.mlp (b)"]
    assert "50% among 2, 25% among 4" in axes.get_title("left")


def test_equal_loads_are_not_drawn_as_extremes():
    image = plot_load(ExpertReport((block([0.26, 0.25, 0.24, 0.25]),), 8)).axes[0].images[0]
    assert image.norm.vmin == 0 and image.norm.vmax == pytest.approx(50)


def test_loads_far_from_equal_are_on_a_scale_that_shows_the_others():
    load = [0.9] + [0.1 / 63] * 63
    norm = plot_load(ExpertReport((block(load),), 8)).axes[0].images[0].norm
    assert isinstance(norm, PowerNorm)
    assert norm(100 / 64) == pytest.approx(0.25)


@pytest.mark.parametrize("num_blocks, num_experts", [(1, 1), (12, 7), (48, 64), (2, 200)])
def test_labels_of_any_number_of_blocks_and_experts_are_apart(num_blocks, num_experts):
    blocks = (block([1 / num_experts] * num_experts, number) for number in range(num_blocks))
    figure = plot_load(ExpertReport(tuple(blocks), 8))
    axes = figure.axes[0]
    assert_apart(figure, axes.get_xticklabels())
    assert_apart(figure, axes.get_yticklabels())
    assert bool(axes.texts) == (num_experts < 64)
    assert max(figure.get_size_inches()) < 13


def test_classes():
    loads = [[0.75, 0.25], [0.0, 0.0], [0.4, 0.6]]
    report = ExpertReport((block([0.5, 0.5], class_loads=loads),), 8, ("dog", "cat", "rain"))
    axes, bar = plot_classes(report, report.blocks[0]).axes
    values = axes.images[0].get_array()
    assert np.allclose(values[[0, 2]], [[75, 25], [40, 60]])
    assert values.mask.tolist() == [[False, False], [True, True], [False, False]]
    assert labels(axes.get_yticklabels()) == ["dog", "cat (no clips)", "rain"]
    assert axes.get_title("left") == "layer.0.mlp"
    assert bar.get_xlabel() == "load within the class (% of its combine weights)"


@pytest.mark.parametrize("num_classes", [60, 527])
def test_many_classes_are_apart(num_classes):
    names = tuple(f"class_{index}" for index in range(num_classes))
    report = ExpertReport((block([0.5, 0.5], class_loads=[[0.5, 0.5]] * num_classes),), 8, names)
    figure = plot_classes(report, report.blocks[0])
    assert_apart(figure, figure.axes[0].get_yticklabels())
    assert max(figure.get_size_inches()) < 16
    assert (len(figure.axes[0].get_yticklabels()) == num_classes) == (num_classes == 60)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_drawn_as_they_are():
    names = (r"$\frac{", "cash $ and $", "犬", "x" * 200, "two\nlines\x00\ud800", "<b>", "_^%#\\")
    report = ExpertReport((block([0.5, 0.5], class_loads=[[0.5, 0.5]] * len(names)),), 8, names)
    figure = plot_classes(report, report.blocks[0])
    png(figure)
    shown = labels(figure.axes[0].get_yticklabels())
    assert shown[:3] == list(names[:3]) and shown[4:] == ["two lines", "<b>", "_^%#\\"]
    assert shown[3].endswith("x…") and len(shown[3]) < 40
    assert not any(tick.get_parse_math() for tick in figure.axes[0].get_yticklabels())
    for grid, clip, dispatch in ((GRID, PATCHES, torch.ones(1214, 1, 1)), (None, WAVE, torch.ones(9, 1, 1))):
        reading = reading_map(record(dispatch / len(dispatch)), grid)
        png(plot_reading(reading, clip._replace(name=names[0] + names[4]), names[0]))
    png(plot_history([{"step": 1, f"experts/{names[0]}/idle_experts": 1.0}], "idle_experts"))


def test_without_classes_there_is_no_picture_of_them():
    report = ExpertReport((block([0.5, 0.5]),), 8, None, "the dataset has no labels")
    with pytest.raises(ValueError, match="because the dataset has no labels"):
        plot_classes(report, report.blocks[0])


def test_a_patch_is_drawn_at_its_time_and_frequency():
    row, column = 3, 40
    figure = plot_reading(with_one_hot_patch(row, column), PATCHES, "layer.0.mlp")
    spectrogram, _, axes, bar = figure.axes
    assert np.array_equal(spectrogram.images[0].get_array(), SPECTROGRAM)
    image = axes.images[0]
    values = image.get_array()
    left, right, bottom, top = image.get_extent()
    assert image.origin == "lower"
    bins, frames = np.nonzero(values == values.max())
    seconds = left + (frames.mean() + 0.5) * (right - left) / values.shape[1]
    bin_ = bottom + (bins.mean() + 0.5) * (top - bottom) / values.shape[0]
    # The patch covers the frames 400 to 415 and the bins 30 to 45; its middle is covered by no other.
    assert seconds == pytest.approx((400 + 8) * 0.01)
    assert bin_ == pytest.approx(30 + 7.5)
    assert values.max() == pytest.approx(0.75 * 1214)
    bins, frames = np.nonzero(values)
    assert (bins.min(), bins.max(), frames.min(), frames.max()) == (30, 45, 400, 415)
    # Ticks of the frequency axis lie where the bins have these frequencies.
    for place, label in zip(axes.get_yticks(), labels(axes.get_yticklabels())):
        assert np.interp(place, range(128), FREQUENCIES) == pytest.approx(1000 * float(label))
    assert {"0.25", "1", "4"} <= set(labels(axes.get_yticklabels()))
    for each in (spectrogram, axes):
        assert each.get_xlabel() == "time (s)" and each.get_ylabel() == "frequency (kHz)"
        assert each.get_xlim() == (0, 10.24) and each.get_ylim() == (-0.5, 127.5)
    # Patches do not reach the last bins and frames.
    assert values.shape == (126, 1016) and right == pytest.approx(10.16) and top == 125.5
    assert axes.get_title("left") == "expert 0" and axes.get_title("right") == "25% elsewhere"
    assert bar.get_ylabel() == "reading (× a uniform reading, the line)"


def test_a_uniform_reading_is_one_everywhere():
    reading = reading_map(record(torch.full((1214, 1, 2), 1 / 1214, dtype=torch.float64)), GRID)
    figure = plot_reading(reading, PATCHES, "layer.0.mlp")
    panels = [axes for axes in figure.axes if axes.get_title("left").startswith("expert")]
    assert [axes.get_title("left") for axes in panels] == ["expert 0, slot 0", "expert 0, slot 1"]
    for axes in panels:
        assert np.allclose(axes.images[0].get_array(), 1)
        assert (axes.images[0].norm.vmin, axes.images[0].norm.vmax) == (0, 2)


def test_places_between_patches_are_blank():
    grid = PatchGrid(0, 2, 2, 2, 4, 4)
    reading = reading_map(record(torch.full((4, 1, 1), 0.25)), grid)
    clip = PATCHES._replace(spectrogram=SPECTROGRAM[:8, :8], frequencies=None)
    figure = plot_reading(reading, clip, "layer.0.mlp")
    values = figure.axes[2].images[0].get_array()
    assert values.mask[2:4].all() and values.mask[:, 2:4].all() and values.count() == 16
    assert figure.axes[2].get_ylabel() == "bin"


@pytest.mark.parametrize(("num_experts", "width"), [(1, 9.2), (9, 9.2), (64, 9.2), (1, 5), (7, 5)])
def test_panels_do_not_overlap(num_experts, width):
    figure = plot_reading(with_one_hot_patch(0, 0, num_experts=num_experts), PATCHES, "layer.0.mlp", width=width)
    panels = [axes for axes in figure.axes if axes.get_title("left").startswith("expert")]
    assert len(panels) == num_experts
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [axes.get_tightbbox(renderer).shrunk(0.98, 0.98) for axes in figure.axes]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    norms = {axes.images[0].norm for axes in panels}
    assert len(norms) == 1


def test_one_expert_is_drawn_as_among_all():
    dispatch = torch.rand(1214, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 9
    reading = reading_map(record(dispatch / dispatch.sum(0)), GRID)
    every = plot_reading(reading, PATCHES, "layer.0.mlp").axes[2:8]
    one = plot_reading(reading, PATCHES, "layer.0.mlp", expert=1).axes[2:4]
    for axes, same in zip(one, every[2:4], strict=True):
        assert axes.get_title("left") == same.get_title("left") and axes.get_title("right") == same.get_title("right")
        [image], [wanted] = axes.images, same.images
        assert np.array_equal(image.get_array(), wanted.get_array())
        # The greatest value of all experts, not of this one.
        assert image.norm.vmax == wanted.norm.vmax
    assert one[0].get_title("left") == "expert 1, slot 0"
    for expert in (-1, 3):
        with pytest.raises(ValueError, match=f"`expert` must be from 0 to 2, got {expert}"):
            plot_reading(reading, PATCHES, "layer.0.mlp", expert=expert)


def test_one_expert_in_time_is_drawn_as_among_all():
    dispatch = torch.full((50, 3, 2), 0.5 / 49, dtype=torch.float64)
    dispatch[30, 0] = dispatch[20, 2, 1] = 0.5
    reading = reading_map(record(dispatch))
    every, one = (plot_reading(reading, WAVE, "layer.0.mlp", expert=expert).axes[1] for expert in (None, 2))
    assert labels(one.get_yticklabels()) == ["expert 2, slot 0", "expert 2, slot 1"]
    assert np.array_equal(one.images[0].get_array(), every.images[0].get_array()[4:])
    assert one.images[0].norm.vmax == every.images[0].norm.vmax


def test_slots_that_read_nothing_say_so():
    dispatch = torch.zeros(1214, 2, 1, dtype=torch.float64)
    dispatch[5, 0] = 1
    figure = plot_reading(reading_map(record(dispatch), GRID), PATCHES, "layer.0.mlp")
    assert [axes.get_title("right") for axes in figure.axes[2:4]] == ["", "reads nothing"]


def test_tokens_in_time_are_drawn_below_the_waveform():
    dispatch = torch.full((50, 2, 2), 0.5 / 49, dtype=torch.float64)
    dispatch[30] = 0.5
    figure = plot_reading(reading_map(record(dispatch)), WAVE._replace(seconds=2.0), "layer.0.mlp")
    wave, axes, bar = figure.axes
    image = axes.images[0]
    assert np.allclose(image.get_array(), 50 * dispatch.flatten(1).T)
    assert image.get_extent() == [0, 2, 3.5, -0.5]
    column = int(image.get_array()[0].argmax())
    assert (column + 0.5) / 50 * 2.0 == pytest.approx(1.22)
    assert labels(axes.get_yticklabels()) == [f"expert {n}, slot {p}" for n in (0, 1) for p in (0, 1)]
    assert wave.get_ylabel() == "amplitude\n(full scale 1)" and axes.get_xlabel() == "time (s)"
    assert wave.get_xlim() == axes.get_xlim() == (0, 2)
    assert bar.get_ylabel() == "reading\n(× a uniform reading, the line)"
    drawn = wave.collections[0].get_paths()[0].vertices
    assert drawn[:, 1].max() == pytest.approx(1, abs=0.01) and drawn[:, 1].min() == pytest.approx(-1, abs=0.01)
    assert drawn[:, 0].max() == pytest.approx(1, abs=0.01)
    # The clip ends after one second of two.
    assert "padding" in texts(figure)
    assert axes.lines[0].get_xdata()[0] == pytest.approx(1)


def test_a_clip_that_fills_the_input_has_no_padding():
    assert "padding" not in texts(plot_reading(reading_map(record(torch.ones(9, 1, 1) / 9)), WAVE, "layer.0.mlp"))


def test_more_tokens_than_places_are_averaged_within_slots():
    dispatch = torch.zeros(1501, 2, 1, dtype=torch.float64)
    dispatch[700, 0] = dispatch[1500, 1] = 1
    axes = plot_reading(reading_map(record(dispatch)), WAVE, "layer.0.mlp").axes[1]
    values = axes.images[0].get_array()
    assert values.shape == (2, 751)
    assert values[0].argmax() == 350 and values[0].max() == pytest.approx(1501 / 2)
    assert values[1].argmax() == 750 and values[1].max() == pytest.approx(1501)
    assert (values > 0).sum() == 2
    assert axes.images[0].get_extent()[1] == pytest.approx(1502 / 1501)
    assert axes.images[0].get_interpolation() == "nearest"


def test_many_slots_in_time_are_apart():
    figure = plot_reading(reading_map(record(torch.ones(9, 64, 1) / 9)), WAVE, "layer.0.mlp")
    assert_apart(figure, figure.axes[1].get_yticklabels())
    assert len(figure.axes[1].get_yticklabels()) == 64


def test_patches_need_a_spectrogram():
    with pytest.raises(ValueError, match="needs the spectrogram"):
        plot_reading(with_one_hot_patch(0, 0), WAVE, "layer.0.mlp")


def history(num_blocks):
    entries = [{"step": 1, "loss": 2.0}]
    for step in (1, 101, 201):
        values = {f"experts/layer.{number}.mlp/effective_number": number + 1 / step for number in range(num_blocks)}
        entries.append({"step": step, **values, "experts/effective_number": 5 / step, "experts/idle_experts": 0.0})
    return entries


def test_history():
    figure = plot_history(history(3))
    axes = figure.axes[0]
    assert axes.get_xlabel() == "training step" and axes.get_ylabel() == "effective number of experts"
    *blocks, mean = axes.lines
    for number, line in enumerate(blocks):
        assert line.get_xdata().tolist() == [1, 101, 201]
        assert line.get_ydata() == pytest.approx([number + 1 / step for step in (1, 101, 201)])
    assert mean.get_ydata() == pytest.approx([5 / step for step in (1, 101, 201)])
    assert mean.get_linewidth() > 2 * blocks[0].get_linewidth()
    assert labels(figure.legends[0].get_texts()) == ["mean of all blocks", "layer.0.mlp", "layer.1.mlp", "layer.2.mlp"]
    # Not colour alone tells neighbours apart.
    assert len({line.get_linestyle() for line in blocks}) == 3
    assert len({tuple(line.get_color()) for line in blocks}) == 3


def test_history_of_many_blocks_fits():
    figure = plot_history(history(48))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    legend = figure.legends[0].get_window_extent(renderer)
    assert legend.y0 >= 0 and legend.x1 <= figure.bbox.width
    assert not legend.overlaps(figure.axes[0].get_window_extent(renderer))


def test_history_of_other_metrics_and_of_adapters():
    entries = [{"step": 1, "experts/layer.0.mlp/a/idle_experts": 1.0, "experts/layer.0.mlp/b/idle_experts": None}]
    axes = plot_history(entries, "idle_experts").axes[0]
    assert axes.get_ylabel() == "number of idle experts"
    assert [line.get_label() for line in axes.lines] == ["layer.0.mlp/a", "layer.0.mlp/b"]
    assert np.isnan(axes.lines[1].get_ydata()[0])


def test_a_log_without_the_metric_says_what_to_do():
    with pytest.raises(ValueError, match="add_callback.ExpertUtilizationCallback"):
        plot_history([{"step": 1, "loss": 2.0}])
    with pytest.raises(ValueError, match="no metric 'loss' of the experts, only effective_number, idle_experts"):
        plot_history(history(2), "loss")


def test_png():
    report = ExpertReport((block([0.5, 0.5]),), 8)
    figure = plot_load(report)
    content = png(figure)
    assert content == png(plot_load(report))
    assert b"Software" not in content and b"Creation" not in content
    height, width = imread(io.BytesIO(content)).shape[:2]
    assert (width, height) == pytest.approx(tuple(150 * figure.get_size_inches()), abs=1)


def stream(num_tokens, num_experts=3, num_slots=1, padding=0):
    torch.manual_seed(0)
    shape = (1, num_tokens + padding, num_experts, num_slots)
    mask = (torch.arange(num_tokens + padding) >= padding)[None]
    return StreamReading("layer.0.mlp", "default", 9 * torch.rand(shape), 1 + torch.rand(shape), mask)


def test_what_slots_read_over_a_stream():
    figure = plot_stream(stream(50, num_slots=2, padding=4), "layer 0", token_seconds=0.02)
    age, number = [axes for axes in figure.axes if axes.images]
    assert age.images[0].get_array().shape == number.images[0].get_array().shape == (6, 50)
    assert labels(age.get_yticklabels())[:2] == ["expert 0, slot 0", "expert 0, slot 1"]
    assert number.get_xlim() == (0, 1) and number.get_xlabel() == "time (s)"
    assert {"layer 0", "mean age (s)", "effective number\nof tokens"} <= set(texts(figure))
    expected = 0.02 * stream(50, num_slots=2, padding=4).age[0, 4:].flatten(1).T
    np.testing.assert_allclose(age.images[0].get_array(), expected, rtol=1e-6)
    assert_apart(figure, number.get_xticklabels() + age.get_yticklabels())


def test_long_streams_and_many_slots():
    reading = stream(2500, num_experts=64)
    figure = plot_stream(reading, "layer 0")
    age, number = [axes for axes in figure.axes if axes.images]
    shown = age.images[0].get_array()
    assert shown.shape == (64, 834) and number.get_xlabel() == "time (tokens)" and number.get_xlim() == (0, 2500)
    np.testing.assert_allclose(shown[:, -1], reading.age[0, -1:, :, 0].mean(0), rtol=1e-6)
    np.testing.assert_allclose(shown[5, 1], reading.age[0, 3:6, 5, 0].mean(), rtol=1e-6)
    reading = reading._replace(mask=torch.zeros(1, 2500, dtype=torch.bool))
    with pytest.raises(ValueError, match="The stream 0 of the block 'layer.0.mlp' has no real token"):
        plot_stream(reading, "layer 0")
