"""The loss of an evaluation is the mean over its rows, however many workers read them."""

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from test_streams import Length, shards
from torch.utils.data import default_collate

from peft_softmoa.training import AudioStream, AudioTrainer, ExtractFeatures, make_eval_loader, summarize_rows
from peft_softmoa.training.tasks import SingleLabel

BATCH_SIZE = 4


class Mean(torch.nn.Module):
    """Its loss is the mean of the clips' numbers."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_values, labels=None):
        numbers = self.weight * (input_values - 100)
        return {"loss": numbers.mean(), "logits": numbers}


def stream_of(sizes, bad=(), knows_length=True):
    rows = shards(sizes, bad)
    return AudioStream(
        rows,
        ExtractFeatures(Length(), SingleLabel(["x"])),
        summarize_rows(rows, ["label"], SingleLabel()) if knows_length else None,
    )


def trainer_of(output, workers, eval_dataset):
    arguments = tf.TrainingArguments(
        str(output), per_device_eval_batch_size=BATCH_SIZE, use_cpu=True, report_to="none",
        dataloader_num_workers=workers,
    )  # fmt: skip
    return AudioTrainer(Mean(), arguments, eval_dataset=eval_dataset, data_collator=default_collate)


@pytest.mark.parametrize("knows_length", [True, False])
@pytest.mark.parametrize("bad", [(), (0, 1, 2, 3, 4, 5)], ids=["all usable", "some skipped"])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [(7, 6), (10, 3, 1), (14,)])
def test_the_loss_is_the_mean_over_the_rows(tmp_path, sizes, workers, bad, knows_length):
    stream = stream_of(sizes, bad, knows_length)
    used = sorted(set(range(sum(sizes))) - set(bad))
    trainer = trainer_of(tmp_path, workers, stream)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(used) / len(used))
    predicted = trainer.predict(stream)
    assert predicted.metrics["test_loss"] == pytest.approx(sum(used) / len(used))
    assert sorted(predicted.predictions[:, 0].tolist()) == used


def test_several_datasets_by_their_names(tmp_path):
    trainer = trainer_of(tmp_path, 2, {"few": stream_of((2, 1)), "many": stream_of((7, 6))})
    metrics = trainer.evaluate()
    assert (metrics["eval_few_loss"], metrics["eval_many_loss"]) == (pytest.approx(1), pytest.approx(6))


@pytest.mark.parametrize("workers", [0, 2])
def test_only_the_last_batch_is_small(workers):
    loader = make_eval_loader(
        stream_of((7, 6)), BATCH_SIZE, Accelerator(cpu=True), num_workers=workers,
        **({"prefetch_factor": 3, "persistent_workers": True} if workers else {}), pin_memory=False,
    )  # fmt: skip
    for _ in range(2):
        assert [len(batch["labels"]) for batch in loader] == [4, 4, 4, 1]
    assert len(loader) == 4
