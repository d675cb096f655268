"""Documents kept apart in a block are documents run alone: logits, positions, and what is predicted."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from minitron.model.samples import Batch, Separator

TOKEN, BLOCK = 5, 24
# Where the separator stands: two in a row, at either end of a block, and in a block of its own nowhere.
PLACES = [(0, 4), (0, 5), (0, 15), (1, 0), (1, 23), (2, 1)]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    drawn = tiny.tokens(4, BLOCK)
    drawn[drawn == TOKEN] = TOKEN + 1
    for row, column in PLACES:
        drawn[row, column] = TOKEN
    return drawn


def documents(tokens: Tensor, separator: Separator) -> list[tuple[int, slice]]:
    """Row and columns of each document, by walking over the tokens."""
    found = []
    for row, block in enumerate(tokens.tolist()):
        start = 0
        for column, token in enumerate(block):
            if token == separator.token:
                cut = column if separator.leads else column + 1
                if start < cut:
                    found.append((row, slice(start, cut)))
                start = cut
        if start < BLOCK:
            found.append((row, slice(start, BLOCK)))
    return found


@pytest.fixture(params=[True, False], ids=["leads", "ends"])
def separator(request: pytest.FixtureRequest) -> Separator:
    return Separator(TOKEN, leads=request.param)


@pytest.mark.parametrize("directory", tiny.FIRST.values(), indirect=True)
def test_logits_of_a_packed_document_are_those_of_the_document_alone(
    directory: Path, tokens: Tensor, separator: Separator
) -> None:
    model, batch = tiny.model(directory), Batch(tokens, separator)
    with torch.no_grad():
        packed = model(**batch.inputs, use_cache=False).logits
    for row, columns in documents(tokens, separator):
        alone = tiny.logits(model, tokens[row : row + 1, columns])[0]
        torch.testing.assert_close(packed[row, columns], alone, atol=1e-5, rtol=1e-5)


def test_positions_and_predictions_begin_anew_with_each_document(tokens: Tensor, separator: Separator) -> None:
    batch, found = Batch(tokens, separator), documents(tokens, separator)
    assert len(found) == 9
    assert batch.positions.flatten().tolist() == [
        place for _, columns in found for place in range(columns.stop - columns.start)
    ]
    targets = [tokens[row, columns][1:] for row, columns in found]
    sources = [tokens[row, columns][:-1] for row, columns in found]
    assert torch.equal(batch.targets, torch.cat(targets))
    assert torch.equal(batch.predicting(tokens[..., None].float())[:, 0], torch.cat(sources).float())
    assert batch.num_predicted == len(batch.targets) == int(batch.predicted.sum())


def test_without_a_separator_a_block_is_one_document(tokens: Tensor) -> None:
    batch = Batch(tokens)
    assert batch.inputs.keys() == {"input_ids"} and batch.inputs["input_ids"] is tokens
    assert torch.equal(batch.targets, tokens[:, 1:].flatten())
    assert torch.equal(batch.predicting(tokens[..., None].float())[:, 0], tokens[:, :-1].flatten().float())
    assert batch.num_predicted == len(tokens) * (BLOCK - 1) == int(batch.predicted.sum())
