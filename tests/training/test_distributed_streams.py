"""Two processes that train on one stream: which samples each of them sees."""

import collections
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_tone

TESTS = Path(__file__).parents[1]
# Each clip has a class of its own, by which it is known.
SCRIPT = """
import json, os, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
import torch, transformers
from conftest import FRAMES, MEL_BINS, tiny_ast_config
from peft import get_peft_model
from peft_softmoa import SoftMoAConfig
from peft_softmoa.training import AudioStream, AudioTrainer, ExtractFeatures, load_rows, summarize_rows
from peft_softmoa.training.tasks import SingleLabel

dataset, output, rank = sys.argv[2], sys.argv[3], int(os.environ["RANK"])

class Recorder(AudioTrainer):
    def training_step(self, model, inputs, *args):
        self.seen[-1].append(inputs["labels"].tolist())
        return super().training_step(model, inputs, *args)

class Epochs(transformers.TrainerCallback):
    def on_epoch_begin(self, *args, **kwargs):
        trainer.seen.append([])

rows = load_rows(dataset, "train", columns=["audio", "label"])
summary = summarize_rows(rows, ["label"], SingleLabel())
feature_extractor = transformers.ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS)
results = {}
for workers in (0, 2):
    extract = ExtractFeatures(feature_extractor, SingleLabel(list(summary.labels)))
    stream = AudioStream(rows, extract, summary, shuffle_buffer=4)
    torch.manual_seed(0)
    model = transformers.ASTForAudioClassification(tiny_ast_config(num_labels=len(summary.labels)))
    model = get_peft_model(model, SoftMoAConfig())
    arguments = transformers.TrainingArguments(
        output, num_train_epochs=2, per_device_train_batch_size=4, per_device_eval_batch_size=4, report_to="none",
        use_cpu=True, save_strategy="no", dataloader_num_workers=workers, learning_rate=0.0,
    )
    trainer = Recorder(
        model, arguments, train_dataset=stream, processing_class=feature_extractor, callbacks=[Epochs()],
        compute_metrics=lambda prediction: {"labels": sorted(prediction.label_ids.tolist())},
    )
    trainer.seen = []
    trainer.train()
    evaluated = trainer.evaluate(AudioStream(load_rows(f"{dataset}-evaluation", "train"), extract))
    results[workers] = {
        "seen": trainer.seen, "evaluated": evaluated["eval_labels"],
        "examples": trainer.num_examples(trainer.get_train_dataloader()), "step": trainer.state.global_step,
    }
with open(f"{output}/{rank}.json", "w") as file:
    json.dump(results, file)
trainer.accelerator.end_training()
"""


@pytest.fixture
def shards(tmp_path):
    """26 clips in four Parquet files of 7, 7, 6 and 6, and 16 for evaluation.

    Two workers would read 9 and 7 of these: the batches 4, 4, 1 and 4, 3, of which two together are odd before the end.
    """
    write(tmp_path / "shards", (7, 7, 6, 6))
    write(tmp_path / "shards-evaluation", (9, 7))
    return tmp_path / "shards"


def write(folder, sizes):
    folder.mkdir()
    numbers = iter(range(sum(sizes)))
    for shard, size in enumerate(sizes):
        rows = []
        for number in (next(numbers) for _ in range(size)):
            write_tone(folder.parent / "tone.wav", 200 + 50 * number, seconds=0.1)
            audio = {"bytes": (folder.parent / "tone.wav").read_bytes(), "path": f"{number}.wav"}
            rows.append({"audio": audio, "label": f"clip {number:02}"})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{shard:05}-of-{len(sizes):05}.parquet")


def test_two_processes_see_each_sample_once_in_an_epoch(shards, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(tmp_path / "script.py"), str(TESTS), str(shards), str(tmp_path)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for workers in ("0", "2"):
        first, second = (rank[workers] for rank in ranks)
        for epoch in range(2):
            batches = [result["seen"][epoch] for result in (first, second)]
            assert len(batches[0]) == len(batches[1])
            counts = collections.Counter(label for process in batches for batch in process for label in batch)
            # 13 rows each: both processes have three full batches and one of a single clip, or with two workers each
            # 7 and 6 rows, in batches of 4 and less.
            assert counts == dict.fromkeys(range(26), 1)
            assert not set(map(str, batches[0])) & set(map(str, batches[1]))
        assert first["seen"][0] != first["seen"][1]
        assert first["examples"] == 26 and first["step"] == len(first["seen"][0]) * 2
        # Evaluation sees each once, too.
        assert first["evaluated"] == second["evaluated"] == list(range(16))
