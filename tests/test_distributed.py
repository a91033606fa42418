import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, torch, transformers as tf
from families import MASKED_WAVE, FAMILIES
from peft import get_peft_model
from peft_softmoa import SoftMoAConfig

rank = int(os.environ["RANK"])
torch.manual_seed(0)
config = tf.Wav2Vec2Config(**{**MASKED_WAVE, "layerdrop": 0.5}, pad_token_id=0, ctc_zero_infinity=True)
model = get_peft_model(tf.Wav2Vec2ForCTC(config), SoftMoAConfig(placement="both", modules_to_save=["lm_head"]))
batch = FAMILIES["Wav2Vec2"].inputs([300, 400, 350, 400])
rows = [{**{key: value[index] for key, value in batch.items()}, "labels": torch.tensor([4, 5])} for index in range(4)]

class Seed(tf.TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        torch.manual_seed(rank)  # each process drops layers of its own

dropped = []
layers = model.get_base_model().wav2vec2.encoder.layers
for index, layer in enumerate(layers):
    layer.register_forward_hook(lambda module, args, output, index=index: dropped.append(index))
arguments = tf.TrainingArguments(
    sys.argv[2], max_steps=6, per_device_train_batch_size=1, learning_rate=1e-2, report_to="none", use_cpu=True,
    save_strategy="no", gradient_accumulation_steps=2,
)
trainer = tf.Trainer(model, arguments, train_dataset=rows, callbacks=[Seed()])
trainer.train()
weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])
torch.save({"weights": weights, "ran": dropped}, f"{sys.argv[2]}/{rank}.pt")
"""


def test_layers_that_are_dropped_in_some_processes_only(tmp_path):
    """Under DistributedDataParallel, a skipped layer's parameters have no gradient in one process, but in another."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(tmp_path / "script.py"), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["ran"] != second["ran"] and len(first["ran"]) < 24
    assert torch.equal(first["weights"], second["weights"])
