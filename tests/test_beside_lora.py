"""What a daily user of PEFT tries, with LoRA and with Soft-MoA: the table in `docs/from-lora.md`."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_ast_config
from families import FAMILIES, build
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale as rescale_lora
from torch import nn
from transformers import (
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoModelForAudioClassification,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    pipeline,
)

from peft_softmoa import SoftMoAConfig, rescale_adapter_scale

PAGE = Path(__file__).parents[1] / "docs" / "from-lora.md"
BEGIN, END = "<!-- table: written by tests/test_beside_lora.py -->\n", "<!-- end of table -->\n"
METHODS = ("LoRA", "Soft-MoA")
SMALL = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16},
    **{"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8},
}
SPECTROGRAMS = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(0))

# What does not work, how the test shows it, and what there is instead; everything else works.
DIFFERENT = {
    ("head", "LoRA"): (RuntimeError, "error: size mismatch; build the base with the classes first"),
    ("headless", "LoRA"): (AssertionError, "silently drawn anew at each load, unless named in `modules_to_save`"),
    ("frames", "LoRA"): (ValueError, "error or wrong loss; build the base with the classes first"),
    ("multilabel", "LoRA"): (AssertionError, "silently softmax; set `problem_type` of the base"),
    ("vocabulary", "LoRA"): (NotImplementedError, "error from `get_input_embeddings`"),
    ("seq2seq_type", "LoRA"): (TypeError, "error in the decoder; leave `task_type` out"),
    ("batch_norm", "LoRA"): (AssertionError, "running statistics move, and are not saved"),
    ("mixed_heads", "LoRA"): (TypeError, "error, unless the head is a single linear layer"),
    ("weighted", "Soft-MoA"): (ValueError, "`average_adapters`, for adapters with a common start"),
    ("merge", "Soft-MoA"): (ValueError, "error: what it adds depends on the input"),
    ("typo", "LoRA"): (pytest.fail.Exception, "ignored if another name matches"),
}


def config(method, **fields):
    """An adapter that changes something, as if it were trained."""
    if method == "Soft-MoA":
        return SoftMoAConfig(init_weights=False, r=2, num_experts=2, **fields)
    fields.pop("label_names", None)
    targets = fields.pop("target_modules", ["q_proj", "v_proj"])
    return LoraConfig(init_lora_weights=False, r=2, target_modules=targets, **fields)


def ast(**overrides):
    torch.manual_seed(0)
    return ASTForAudioClassification(tiny_ast_config(**overrides)).eval()


def logits(model, inputs=SPECTROGRAMS, **kwargs):
    with torch.no_grad():
        return model(inputs, **kwargs).logits


def save_ast(folder):
    ast().save_pretrained(folder)
    ASTFeatureExtractor(max_length=64, num_mel_bins=128).save_pretrained(folder)
    return folder


def load(method, tmp_path):
    """Save it; load it by `PeftModel`, `AutoPeftModel…`, `AutoModel…` and `load_adapter`"""
    base = save_ast(tmp_path / "base")
    model = get_peft_model(
        ASTForAudioClassification.from_pretrained(base), config(method, modules_to_save=["classifier"])
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForAudioClassification.from_pretrained(base)
    plain.load_adapter(tmp_path / "adapter")
    for loaded in (
        PeftModel.from_pretrained(AutoModelForAudioClassification.from_pretrained(base), tmp_path / "adapter"),
        AutoModelForAudioClassification.from_pretrained(tmp_path / "adapter"),
        plain,
    ):
        assert torch.equal(logits(loaded.eval()), logits(model))
    assert AutoPeftModel.from_pretrained(tmp_path / "adapter")


def head(method, tmp_path):
    """An adapter with 3 classes for a base with 5, loaded onto that base"""
    base = save_ast(tmp_path / "base")
    if method == "LoRA":
        model = ASTForAudioClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
    else:
        model = ASTForAudioClassification.from_pretrained(base)
    model = get_peft_model(model, config(method, modules_to_save=["classifier"], label_names=["a", "b", "c"])).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(ASTForAudioClassification.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def headless(method, tmp_path):
    """A base without a head for classes, such as Whisper or a pretrained wav2vec 2.0"""
    Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SMALL)).wav2vec2.save_pretrained(tmp_path / "base")
    waves, both = torch.randn(2, 400), []
    base = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path / "base")
    get_peft_model(base, config(method, modules_to_save=["classifier"])).save_pretrained(tmp_path / "adapter")
    for seed in range(2):
        torch.manual_seed(seed)
        base = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path / "base")
        both.append(logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), waves))
    assert torch.equal(*both)


def frames(method, tmp_path):
    """Frame labels with other classes than the base's"""
    base = Wav2Vec2ForAudioFrameClassification(Wav2Vec2Config(**SMALL, num_labels=2)).eval()
    names = ["a", "b", "c"]
    model = get_peft_model(base, config(method, modules_to_save=["classifier"], label_names=names)).eval()
    waves = torch.randn(2, 400)
    targets = torch.randint(3, logits(model, waves).shape[:2])
    loss = model(waves, labels=nn.functional.one_hot(targets, 3)).loss
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits(model, waves).flatten(0, 1), targets.flatten()))


def multilabel(method, tmp_path):
    """An adapter with several labels a clip, in `pipeline()`"""
    base = save_ast(tmp_path / "base")
    model = ASTForAudioClassification.from_pretrained(base)
    model = get_peft_model(model, config(method, modules_to_save=["classifier"]))
    model(SPECTROGRAMS, labels=torch.rand(4, 5).round()).loss.backward()
    model.save_pretrained(tmp_path / "adapter")
    ASTFeatureExtractor.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    scores = pipeline("audio-classification", model=str(tmp_path / "adapter"))(np.zeros(8_000, np.float32), top_k=5)
    assert abs(sum(each["score"] for each in scores) - 1) > 1e-3


def seq2seq_type(method, tmp_path):
    """`task_type="SEQ_2_SEQ_LM"` with Whisper"""
    model = get_peft_model(build("Whisper, speech to text"), config(method, task_type="SEQ_2_SEQ_LM"))
    assert model(**FAMILIES["Whisper, speech to text"].inputs([40, 40])).logits.isfinite().all()


def generate(method, tmp_path):
    """`generate` with Whisper"""
    base = build("Whisper, speech to text").eval()
    features = FAMILIES["Whisper, speech to text"].inputs([40, 40])["input_features"]
    model = get_peft_model(base, config(method))
    assert model.generate(input_features=features, max_new_tokens=4).shape[0] == 2


def several(method, tmp_path):
    """Several adapters: add, switch, disable, delete, unload"""
    base = ast()
    before = logits(base)
    model = get_peft_model(base, config(method))
    model.add_adapter("second", config(method))
    first = logits(model)
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), before)


def mixed(method, tmp_path):
    """An adapter for each sample of a batch: `adapter_names`"""
    model = get_peft_model(ast(), config(method))
    model.add_adapter("second", config(method))
    one = logits(model)
    model.set_adapter("second")
    other = logits(model)
    both = logits(model.eval(), adapter_names=["default", "second", "default", "second"])
    torch.testing.assert_close(both, torch.stack([one[0], other[1], one[2], other[3]]), atol=1e-6, rtol=1e-5)


def mixed_heads(method, tmp_path):
    """The same, where each adapter brings its head"""
    model = get_peft_model(ast(), config(method, modules_to_save=["classifier"]))
    model.add_adapter("second", config(method, modules_to_save=["classifier"]))
    for name, parameter in model.named_parameters():
        if ".modules_to_save.second" in name:
            nn.init.normal_(parameter)
    one = logits(model)
    model.set_adapter("second")
    other = logits(model)
    both = logits(model.eval(), adapter_names=["default", "second", "default", "second"])
    torch.testing.assert_close(both, torch.stack([one[0], other[1], one[2], other[3]]), atol=1e-6, rtol=1e-5)


def strength(method, tmp_path):
    """Make it stronger or weaker for a while: `rescale_adapter_scale`"""
    model = get_peft_model(ast(), config(method))
    with model.disable_adapter():
        base = logits(model)
    with {"LoRA": rescale_lora, "Soft-MoA": rescale_adapter_scale}[method](model, 0.0):
        torch.testing.assert_close(logits(model), base)
    assert not torch.equal(logits(model), base)


def merge(method, tmp_path):
    """Merge it into the base: `merge_and_unload`"""
    model = get_peft_model(ast(), config(method))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-4)


def weighted(method, tmp_path):
    """Combine adapters: `add_weighted_adapter`"""
    model = get_peft_model(ast(), config(method))
    model.add_adapter("second", config(method))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")


def batch_norm(method, tmp_path):
    """Training leaves the base as it was, batch norms included"""
    base = build("Wav2Vec2-Conformer")
    before = copy.deepcopy(base.state_dict())
    targets = {"target_modules": ["linear_q"]} if method == "LoRA" else {}
    model = get_peft_model(base, config(method, **targets)).train()
    model(**FAMILIES["Wav2Vec2-Conformer"].inputs([204, 400])).last_hidden_state.sum().backward()
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def typo(method, tmp_path):
    """A name with a slip of the pen beside others is an error"""
    with pytest.raises(ValueError):
        get_peft_model(ast(), config(method, target_modules=["q_proj", "v_prj"]))


def vocabulary(method, tmp_path):
    """Save an adapter of wav2vec 2.0 for CTC with a vocabulary of its own"""
    Wav2Vec2ForCTC(Wav2Vec2Config(**SMALL)).save_pretrained(tmp_path / "base")
    base = Wav2Vec2ForCTC.from_pretrained(tmp_path / "base", vocab_size=40, ignore_mismatched_sizes=True)
    get_peft_model(base, config(method, modules_to_save=["lm_head"])).save_pretrained(tmp_path / "adapter")


def train(method, tmp_path, model=None, **options):
    model = get_peft_model(ast().float() if model is None else model, config(method, modules_to_save=["classifier"]))
    data = [{"input_values": spectrogram, "labels": index % 5} for index, spectrogram in enumerate(SPECTROGRAMS)]
    arguments = {
        **{"max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "save_steps": 2},
        **{"save_strategy": "steps", "logging_steps": 1, "dataloader_pin_memory": False, **options},
    }
    trainer = Trainer(
        model, TrainingArguments(str(tmp_path / "run"), **arguments), train_dataset=data, eval_dataset=data
    )
    result = trainer.train()
    assert np.isfinite(result.training_loss)
    return trainer


def trainer_plain(method, tmp_path):
    """`Trainer`: train, save, resume from a checkpoint"""
    trainer = train(method, tmp_path)
    trainer.args.max_steps = 6
    assert trainer.train(resume_from_checkpoint=True).global_step == 6


def trainer_best(method, tmp_path):
    """`Trainer`: `load_best_model_at_end`"""
    trainer = train(method, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    assert trainer.state.best_model_checkpoint


def trainer_checkpointing(method, tmp_path):
    """`Trainer`: `gradient_checkpointing`, reentrant or not"""
    for reentrant in (True, False):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        model = train(method, tmp_path / str(reentrant), **options).model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert trained and all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in trained)


def trainer_smoothing(method, tmp_path):
    """`Trainer`: `label_smoothing_factor`, accumulation, gradient clipping"""
    train(method, tmp_path, label_smoothing_factor=0.1, gradient_accumulation_steps=2, max_grad_norm=0.5)


def trainer_bf16(method, tmp_path):
    """`Trainer`: `bf16`"""
    train(method, tmp_path, bf16=True)


CASES = [
    *(load, head, headless, frames, multilabel, vocabulary, seq2seq_type, generate),
    *(trainer_plain, trainer_best, trainer_checkpointing, trainer_smoothing, trainer_bf16, batch_norm),
    *(several, mixed, mixed_heads, strength, weighted, merge, typo),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_daily_use(case, method, tmp_path):
    if (case.__name__, method) not in DIFFERENT:
        case(method, tmp_path)
        return
    kind, _ = DIFFERENT[case.__name__, method]
    with pytest.raises(kind):
        case(method, tmp_path)


def test_the_table_says_what_these_tests_say(pytestconfig):
    rows = [["", *METHODS], ["---"] * 3]
    rows += [
        [case.__doc__, *(DIFFERENT.get((case.__name__, method), (None, "yes"))[1] for method in METHODS)]
        for case in CASES
    ]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    before, rest = PAGE.read_text().split(BEGIN)
    given, after = rest.split(END)
    if pytestconfig.getoption("--models-table"):
        PAGE.write_text(before + BEGIN + table + END + after)
    else:
        assert given == table
