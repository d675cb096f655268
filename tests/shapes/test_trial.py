"""What candidates are judged on and by: blocks that short runs do not read, and a machine that is named or measured."""

from pathlib import Path

import numpy as np
import pytest
import small
import torch

from minitron.data.corpus import batch_rows
from minitron.shapes.space import Machine, SearchConfig, machine_for
from minitron.shapes.trial import judging_blocks


@pytest.mark.parametrize("num_blocks", [5, 10_000])
def test_the_judging_blocks_are_those_that_the_first_pass_reads_last(
    llama_with_text: Path, tmp_path: Path, num_blocks: int
) -> None:
    corpus = small.corpus(tmp_path / "data", llama_with_text)
    judge = judging_blocks(corpus, seed=3, num_blocks=num_blocks).tokens
    whole = np.asarray(corpus.train.tokens)
    assert len(judge) == min(num_blocks, len(whole) // 2)
    steps = (len(whole) - len(judge)) // 4
    read = np.concatenate([batch_rows(len(whole), seed=3, step=step, batch=4) for step in range(steps)])
    unread = np.setdiff1d(np.arange(len(whole)), read)
    assert len(unread) - len(judge) < 4
    assert {row.tobytes() for row in judge} <= {row.tobytes() for row in whole[unread]}


@pytest.fixture
def llama_with_text(tmp_path: Path) -> Path:
    return small.teacher(tmp_path / "teacher")


def test_a_machine_is_the_one_named_and_else_this_one() -> None:
    assert machine_for(SearchConfig(bytes_per_second=2.0, flops_per_second=3.0), torch.float32) == Machine(2.0, 3.0)
    here = machine_for(SearchConfig(flops_per_second=3.0), torch.float32)
    assert here.flops_per_second == 3.0 and 1e8 < here.bytes_per_second < 1e14
