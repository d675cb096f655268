"""A student's loss does not depend on the format that holds its weights, as long as their values are the same."""

from pathlib import Path

import pytest
import tiny
import torch
from trainings import resolved

from minitron.distillation.config import DistillConfig
from minitron.distillation.schedule import Schedule
from minitron.distillation.step import add_gradients, set_up
from minitron.model.checkpoint import open_checkpoint
from minitron.model.families import FAMILIES
from minitron.model.samples import Batch

BLOCK = 16


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_bfloat16_give_the_loss_of_the_same_values_in_float32(family: str, tmp_path: Path) -> None:
    model = open_checkpoint(tiny.checkpoint(tiny.FIRST[family], tmp_path, dtype=torch.bfloat16))
    batch, losses = Batch(tiny.tokens(2, BLOCK)), {}
    for weights in ("float32", "bfloat16_stochastic"):
        config = DistillConfig(tokens=64 * BLOCK, batch_blocks=2, compile=False, loss="cross_entropy", weights=weights)
        config = resolved(config, model.shape, model.shape, block_tokens=BLOCK, train_tokens=1, repaired=True)
        learners = set_up(model, None, Schedule.of_student(config, BLOCK, 0), torch.bfloat16, torch.device("cpu"))
        sums = add_gradients(learners, [(batch, 1.0)], batch.num_predicted, between_weight=0.0)
        assert sums is not None and all(parameter.grad is not None for parameter in learners.student.parameters())
        losses[weights] = sums[0].item()
    assert losses["bfloat16_stochastic"] == pytest.approx(losses["float32"], rel=1e-3)
