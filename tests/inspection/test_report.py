import json
from dataclasses import replace

import pytest
import torch
from conftest import FRAMES, MEL_BINS, tiny_ast_config
from families import FAMILIES
from peft import get_peft_model
from transformers import ASTForAudioClassification

from peft_softmoa import SoftMoAConfig
from peft_softmoa.inspection import Record, expert_report, find_layers, reading_map, record_routing
from peft_softmoa.inspection.blocks import Statistics
from peft_softmoa.inspection.report import ExpertReport, short_names
from peft_softmoa.method import PatchGrid
from peft_softmoa.targets.architectures import find_patch_grid

EXPERTS = 4
CLASSES = tuple(f"class {index}" for index in range(EXPERTS))
# At which patch each pattern lies, in frequency and time.
PLACES = [(1, 3), (7, 0), (4, 3), (4, 0)]
PATCH = 16


def pattern(index):
    """A patch that is orthogonal to the other patterns and to constants."""
    phase = torch.arange(PATCH) * 2 * torch.pi / PATCH
    return torch.outer(torch.cos((index + 1) * phase), torch.sin((index + 2) * phase))


def clips(*contents, stride=PATCH):
    """Spectrograms `(B, frames, bins)` that are silent but for some patterns, each in its place."""
    batch = torch.zeros(len(contents), FRAMES, MEL_BINS)
    for clip, content in zip(batch, contents):
        for index in content:
            low, start = (stride * place for place in PLACES[index])
            clip[start : start + PATCH, low : low + PATCH] = pattern(index).T
    return batch


def planted(slots=range(EXPERTS), stride=PATCH, **choices):
    """An AST whose first mixture has slots that read one pattern each: slot n that of number `slots[n]`."""
    config = tiny_ast_config(frequency_stride=stride, time_stride=stride, num_hidden_layers=1)
    torch.manual_seed(0)
    model = ASTForAudioClassification(config)
    embeddings = model.audio_spectrogram_transformer.embeddings
    with torch.no_grad():
        for parameter in embeddings.parameters():
            parameter.zero_()
        # Token component n tells how much of pattern n a patch has; the last component is the same for all tokens.
        for index in range(EXPERTS):
            # The network reads frequency by time.
            embeddings.patch_embeddings.projection.weight[index, 0] = pattern(index)
        embeddings.position_embeddings[..., -1] = 8.0
    model = get_peft_model(model, SoftMoAConfig(num_experts=len(slots), r=2, init_weights=False, **choices)).eval()
    router = next(iter(find_layers(model))).softmoa_mixture["default"].router
    with torch.no_grad():
        router.slots.zero_()
        for expert, index in enumerate(slots):
            if index is None:
                router.slots[-1, expert] = -10.0  # no token reads it
            else:
                router.slots[index, expert] = 10.0
    return model


def test_the_reading_map_peaks_where_each_expert_was_made_to_read():
    stride = 10  # patches overlap, as those of AST's checkpoints do
    model = planted(stride=stride)
    grid = find_patch_grid(model.get_base_model().config.to_dict())
    with record_routing(model) as records, torch.no_grad():
        model(clips(range(EXPERTS), stride=stride))
    reading = reading_map(records[0], grid)
    for expert, place in enumerate(PLACES):
        low, start = (stride * index for index in place)
        shares = reading.shares[expert, 0]
        peak = divmod(int(shares.argmax()), shares.shape[1])
        assert low <= peak[0] < low + PATCH and start <= peak[1] < start + PATCH
        assert shares[low : low + PATCH, start : start + PATCH].sum() > 0.9
    torch.testing.assert_close(
        reading.shares.sum((2, 3)) + reading.elsewhere, torch.ones(EXPERTS, 1, dtype=torch.float64)
    )


def test_the_class_matrix_finds_the_planted_class():
    model = planted()
    batches = [
        {"input_values": clips(*([label] for label in labels)), "labels": torch.tensor(labels)}
        for labels in ([0, 1, 2], [3, 3, 0], [2])
    ]
    report = expert_report(model, batches, label_names=CLASSES, show_progress=False)
    [block] = report.blocks
    assert report.num_clips == 7 and report.no_classes_reason is None
    assert block.class_loads.argmax(1).tolist() == list(range(EXPERTS))
    assert block.class_loads.argmax(0).tolist() == list(range(EXPERTS))
    torch.testing.assert_close(block.class_loads.sum(1), torch.ones(EXPERTS, dtype=torch.float64))


def test_a_preferred_class_is_named():
    dispatch = torch.full((4, 10, 2, 1), 0.1)
    combine = torch.tensor([0.9, 0.1]).expand(4, 10, 2).clone()
    combine[3] = torch.tensor([0.1, 0.9])
    record = Record("block", "default", dispatch, combine.unsqueeze(-1), combine, torch.ones(4, 10, dtype=torch.bool))
    for clips in (4, 5):  # too few of each class, and enough
        statistics = Statistics(4)
        for _ in range(clips):
            statistics.update(record, torch.arange(4))
        block = statistics.result("block", "default")
        findings = ExpertReport((block,), 4 * clips, CLASSES).findings
        assert block.class_clips.tolist() == [clips] * 4
        found = [finding for finding in findings if finding.kind == "class"]
        assert len(found) == (clips == 5)
    assert found[0].experts == (1,) and found[0].text == (
        "block: expert 1 prefers the class 'class 3', with 90% of the load in its 5 clips and 10% in those of other "
        "classes."
    )


def test_a_preference_for_one_of_two_classes():
    loads, clips = torch.tensor([[0.96, 0.04], [0.04, 0.96]]).double(), torch.tensor([9, 9])
    block = replace(REPORT.blocks[0], load=loads[0] / 2 + loads[1] / 2, output_share=torch.ones(2) / 2,
                    expert_similarity=torch.eye(2), class_loads=loads, class_clips=clips)  # fmt: skip
    found = [each.experts for each in ExpertReport((block,), 18, ("a", "b")).findings if each.kind == "class"]
    assert found == [(0,), (1,)]


def test_experts_that_add_nothing_are_silent():
    block = replace(REPORT.blocks[0], output_share=torch.tensor([0.5, 0.0, 0.25, 0.25]).double())
    [finding] = ExpertReport((block,), 4).findings
    assert (finding.kind, finding.experts) == ("silent", (1,))
    assert finding.text == "layers.0.attention: expert 1 adds next to nothing (0.0% of the output)."
    # Also of experts that are idle besides.
    block = replace(block, load=torch.tensor([0.5, 0.0, 0.25, 0.25]).double(), output_share=torch.zeros(4).double())
    [finding] = ExpertReport((block,), 4).findings
    assert finding.experts == (0, 1, 2, 3) and finding.text == "layers.0.attention: no expert adds anything."
    torch.manual_seed(0)
    fresh = get_peft_model(ASTForAudioClassification(tiny_ast_config()), SoftMoAConfig())
    report = expert_report(fresh, spread([0]), show_progress=False)
    assert [finding.text.partition(": ")[2] for finding in report.findings] == ["no expert adds anything."] * 2
    assert report.summary.endswith("Blocks with experts that add nothing: 2.")


def test_numbers_that_are_not_finite():
    model = planted()
    with torch.no_grad():
        next(iter(find_layers(model))).softmoa_mixture["default"].experts.up_weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="layers.0.attention' the adapter 'default' gives numbers that are not finite"):
        expert_report(model, spread([0]), show_progress=False)


def test_weights_of_tokens_are_no_choice_of_slots():
    """Where experts read tokens themselves, to weigh all alike is no fault; and of few tokens nothing is said."""
    torch.manual_seed(0)
    model = get_peft_model(
        ASTForAudioClassification(tiny_ast_config()), SoftMoAConfig(routing="dense", init_weights=False)
    )
    for layer in find_layers(model):
        layer.softmoa_mixture["default"].router.weight.data.zero_()
    report = expert_report(model, spread(range(EXPERTS)), show_progress=False)
    assert {finding.kind for finding in report.findings} == {"similar"}
    assert "have the same weights for all tokens (similarity 1.00). 1 of 7 would do." in report.findings[0].text
    few = replace(report.blocks[0], num_tokens=7.0)
    assert not few.similar and not few.uniform and report.blocks[0].similar


def test_twins_that_read_in_some_samples_only():
    dispatch = torch.zeros(2, 10, 2, 1)
    dispatch[0, :5] = 0.2
    record = Record("a", "b", dispatch, torch.full((2, 10, 2, 1), 0.5), torch.ones(2, 10, 2), torch.ones(2, 10) > 0)
    for _ in range(2):
        statistics = Statistics()
        statistics.update(record)
    block = statistics.result("a", "b")
    assert block.similar == [(0, 1)] and block.effective_tokens.flatten().tolist() == pytest.approx([5, 5])


def spread(*contents):
    return [{"input_values": clips(*contents)}]


REPORT = expert_report(planted(), spread(range(EXPERTS)), show_progress=False)


def test_a_balanced_mixture_gives_no_finding():
    [block] = REPORT.blocks
    assert not REPORT.findings and "No expert is idle or silent, and no two read the same tokens." in REPORT.summary
    assert block.scalars["effective_number"] == pytest.approx(EXPERTS, rel=1e-3)
    assert block.scalars["normalized_entropy"] == pytest.approx(1, rel=1e-3)


def test_an_idle_expert_and_twins_are_named():
    report = expert_report(planted([0, 1, None, 2, 3, 1, 2]), spread(range(EXPERTS)), show_progress=False)
    [block] = report.blocks
    assert block.idle == [2] and block.similar == [(1, 5), (3, 6)]
    assert [(finding.kind, finding.experts) for finding in report.findings] == [
        ("idle", (2,)), ("similar", (1, 5)), ("similar", (3, 6)),
    ]  # fmt: skip
    texts = [finding.text for finding in report.findings]
    assert texts[0].startswith("layers.0.attention: expert 2 is idle (0.0% of the load; equal were 14.3%)")
    assert texts[1].startswith("layers.0.attention: experts 1 and 5 read the same tokens (similarity 1.00).")
    assert texts[2].endswith("4 of 7 would do.")
    assert "with idle experts: 1, with experts that read the same tokens: 1" in report.summary


def test_slots_that_do_not_choose_are_no_twins():
    model = planted([0, 1, 2])
    with torch.no_grad():
        next(iter(find_layers(model))).softmoa_mixture["default"].router.slots[:, :2] = 0.0
    report = expert_report(model, spread(range(EXPERTS)), show_progress=False)
    [finding] = report.findings
    assert finding.kind == "uniform" and finding.experts == (0, 1)
    assert "experts 0 and 1 read all tokens nearly alike (as if 100% of them)" in finding.text


def test_neighbours_in_a_chain_are_no_group():
    angles = torch.tensor([0.0, 0.3, 0.6])
    vectors = torch.stack([angles.cos(), angles.sin()]).expand(1, 2, 3)
    dispatch = torch.cat([vectors, torch.zeros(1, 30, 3)], dim=1).unsqueeze(-1)
    record = Record("a", "b", dispatch, torch.full((1, 32, 3, 1), 1 / 3), torch.ones(1, 32, 3), torch.ones(1, 32) > 0)
    statistics = Statistics()
    statistics.update(record)
    block = statistics.result("a", "b")
    assert block.expert_similarity[0, 1] > 0.95 > block.expert_similarity[0, 2]
    assert block.similar == [(0, 1)]


ROUTINGS = [{}, {"num_slots": 2}, {"routing": "dense"}, {"routing": "top_k"}, {"routing": "expert_choice"}]


@pytest.mark.parametrize("choices", ROUTINGS, ids=lambda choices: "-".join(map(str, choices.values())) or "soft")
@pytest.mark.parametrize("placement", ["attention", "ffn"])
def test_padding_contributes_nothing(choices, placement):
    """A clip beside a longer one counts as it does alone; nor does it matter what the padding has."""
    make, config = FAMILIES["Wav2Vec2"].config()
    torch.manual_seed(0)
    adapter = SoftMoAConfig(num_experts=3, r=4, init_weights=False, placement=placement, **choices)
    model = get_peft_model(make(config), adapter).double()
    batch = FAMILIES["Wav2Vec2"].inputs([204, 400, 310])
    batch["input_values"] = batch["input_values"].double()
    alone = [
        {name: value[index : index + 1, : int(batch["attention_mask"][index].sum())] for name, value in batch.items()}
        for index in range(3)
    ]
    for index, each in enumerate(alone):
        each["labels"] = torch.tensor([index % 2])
    batch["labels"] = torch.tensor([0, 1, 0])
    noisy = {**batch, "input_values": torch.where(batch["attention_mask"] == 1, batch["input_values"], 3.0)}
    wanted, together, other = (
        expert_report(model, batches, label_names=["a", "b"], show_progress=False)
        for batches in (alone, [batch], [noisy])
    )
    assert wanted.blocks[0].num_tokens < reading_length(model, batch)
    for report in (together, other):
        for block, reference in zip(report.blocks, wanted.blocks, strict=True):
            assert block.scalars == pytest.approx(reference.scalars, rel=1e-6)
            for name in ("load", "output_share", "effective_tokens", "expert_similarity", "slot_similarity"):
                torch.testing.assert_close(getattr(block, name), getattr(reference, name), rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(block.class_loads, reference.class_loads, rtol=1e-6, atol=1e-9)


def reading_length(model, batch):
    with record_routing(model) as records, torch.no_grad():
        model(**{name: value for name, value in batch.items() if name != "labels"})
    return records[0].mask.shape[1]


def test_one_pass_over_batches_is_one_batch_of_all():
    torch.manual_seed(0)
    model = get_peft_model(ASTForAudioClassification(tiny_ast_config()), SoftMoAConfig(init_weights=False, num_slots=2))
    inputs, labels = torch.randn(6, FRAMES, MEL_BINS), torch.tensor([0, 1, 4, 1, 0, 0])
    parts = [{"input_values": inputs[:1], "labels": labels[:1]}, {"input_values": inputs[1:], "labels": labels[1:]}]
    model.train()
    reports = [
        expert_report(model, batches, show_progress=False)
        for batches in (parts, [{"input_values": inputs, "labels": labels}])
    ]
    assert (
        model.training
        and [report.label_names for report in reports] == [tuple(f"LABEL_{index}" for index in range(5))] * 2
    )
    for one, other in zip(*(report.blocks for report in reports), strict=True):
        assert one.scalars == pytest.approx(other.scalars, rel=1e-6)
        torch.testing.assert_close(one.class_loads, other.class_loads, rtol=1e-6, atol=1e-9)
        assert one.class_loads[[2, 3]].eq(0).all()
    assert json.loads(json.dumps(reports[0].to_dict(), allow_nan=False))["num_clips"] == 6


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (None, "the dataset has no labels"),
        (torch.zeros(2, 5), "the labels are not one class for each clip"),
    ],
)
def test_without_classes(tiny_ast, labels, why):
    tiny_ast.config.problem_type = "multi_label_classification"
    model = get_peft_model(tiny_ast, SoftMoAConfig())
    batch = {"input_values": torch.randn(2, FRAMES, MEL_BINS)}
    batch = batch if labels is None else {**batch, "labels": labels}
    report = expert_report(model, [batch], show_progress=False)
    assert report.no_classes_reason == why and report.label_names is None
    assert report.blocks[0].class_loads is None and "class_information" not in report.blocks[0].scalars


def test_labels_beyond_the_classes(tiny_ast):
    model = get_peft_model(tiny_ast, SoftMoAConfig())
    batch = {"input_values": torch.randn(2, FRAMES, MEL_BINS), "labels": torch.tensor([0, 7])}
    report = expert_report(model, [batch], label_names=list("abcdefgh"), show_progress=False)
    assert report.blocks[0].class_loads[7].sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="label 7 is none of the 5 classes"):
        expert_report(model, [batch], show_progress=False)


def test_windows_are_added_up_for_their_clip():
    record = Record("a", "b", torch.rand(4, 5, 2, 1), torch.rand(4, 5, 2, 1), torch.rand(4, 5, 2), torch.ones(4, 5) > 0)
    statistics = Statistics(2)
    statistics.update(record, torch.tensor([1, 0]))
    loads = record.combine.double().sum((1, 3)).unflatten(0, (2, 2)).sum(1)[[1, 0]]
    torch.testing.assert_close(statistics.result("a", "b").class_loads, loads / loads.sum(1, keepdim=True))


def test_a_single_expert(tiny_ast, spectrograms):
    model = get_peft_model(tiny_ast, SoftMoAConfig(routing="dense", num_experts=1))
    report = expert_report(model, [{"input_values": spectrograms}], show_progress=False)
    assert not report.findings and report.summary == "Each block has one expert, which reads all tokens."


def test_nothing_to_report(tiny_ast, spectrograms):
    with pytest.raises(ValueError, match="has no Soft-MoA adapter"):
        expert_report(tiny_ast, [{"input_values": spectrograms}])
    model = get_peft_model(tiny_ast, SoftMoAConfig())
    with pytest.raises(ValueError, match="the dataset has no batch"):
        expert_report(model, [], show_progress=False)
    with pytest.raises(ValueError, match="must be a dict of the model's inputs, got Tensor"):
        expert_report(model, [spectrograms], show_progress=False)


def test_overlapping_patches_lie_where_the_model_takes_them():
    """By what each patch reads of a spectrogram: a bin and frame at a time, through the model's own projection."""
    config = tiny_ast_config(frequency_stride=10, time_stride=7)
    grid = find_patch_grid(config.to_dict())
    embeddings = ASTForAudioClassification(config).audio_spectrogram_transformer.embeddings.patch_embeddings
    with torch.no_grad():
        embeddings.projection.weight.fill_(1.0)
        embeddings.projection.bias.zero_()
        spectrogram = torch.zeros(1, FRAMES, MEL_BINS)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            frame, mel = (int(torch.randint(size, (), generator=generator)) for size in (FRAMES, MEL_BINS))
            spectrogram.zero_()[0, frame, mel] = 1.0
            reads = embeddings(spectrogram)[0, :, 0] > 0
            tokens = torch.cat([torch.zeros(2), reads.double()])
            record = Record("a", "b", tokens[None, :, None, None], None, None, torch.ones(1, len(tokens)) > 0)
            shares = reading_map(record, grid).shares[0, 0]
            if reads.any():
                assert shares[mel, frame] == shares.max() == pytest.approx(int(reads.sum()) / PATCH**2)
            else:
                assert mel >= shares.shape[0] or frame >= shares.shape[1]


def test_a_map_of_a_sequence_and_of_windows():
    dispatch = torch.rand(1, 6, 2, 1)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    reading = reading_map(Record("a", "b", dispatch, None, None, mask))
    wanted = dispatch[0].movedim(0, -1).double() * mask[0]
    assert torch.equal(reading.shares[:, :, 0], wanted) and reading.elsewhere.eq(0).all()
    assert reading.uniform.tolist() == [[0.25] * 4 + [0.0] * 2]
    # Tokens that are not those of the grid follow each other in time.
    assert reading_map(Record("a", "b", dispatch, None, None, mask), PatchGrid(2, 3, 3)).shares.shape == (2, 1, 1, 6)
    with pytest.raises(ValueError, match="takes the clip in 3 parts"):
        reading_map(Record("a", "b", torch.rand(3, 6, 2, 1), None, None, torch.ones(3, 6) > 0))


def test_short_names():
    assert short_names(["m.layers.0.attention", "m.layers.1.attention"]) == {
        "m.layers.0.attention": "layers.0.attention", "m.layers.1.attention": "layers.1.attention",
    }  # fmt: skip
    assert short_names(["m.layers.3.attention"]) == {"m.layers.3.attention": "layers.3.attention"}
    assert short_names([]) == {}
    assert short_names(["a", "b.c"]) == {"a": "a", "b.c": "b.c"}
