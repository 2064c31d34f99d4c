"""Train on small settings; save loss, gradients of the last step and held-out logits: for test_train_training.py."""

import sys
from typing import Any

import torch
from test_devices import small_settings

import train

train.GRADIENT_CLIP = 1e9
trainer, _ = train.train_model(small_settings(n_layers=1, dropout=0.0, batch_size=12))
assert trainer.test_set
found: dict[str, Any] = {"gradients": [parameter.grad for parameter in trainer.objective.parameters()]}
found |= {"loss": trainer.history[0]["train_loss"], "logits": torch.tensor(trainer.predict(trainer.test_set))}
if trainer.is_main:
    torch.save(found, sys.argv[1])
