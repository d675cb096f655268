"""The demo that ships: its teacher and its recipe."""

from pathlib import Path

import pytest

from minitron.core.errors import RecipeError
from minitron.data.config import DataConfig
from minitron.data.sources import builtin_documents
from minitron.data.writing import is_heldout
from minitron.model.checkpoint import open_checkpoint
from minitron.model.tokenizer import load_tokenizer
from minitron.recipe import DEMO_TEACHER, demo_recipe
from minitron.shapes.space import feasible_for


def test_the_demo_teacher_is_small_and_in_bfloat16() -> None:
    teacher = open_checkpoint(DEMO_TEACHER)
    assert 4e6 <= teacher.parameters.total <= 8e6
    assert str(teacher.dtype) == "torch.bfloat16"
    assert sum(path.stat().st_size for path in DEMO_TEACHER.iterdir()) <= 16e6
    assert "held-out loss" in (DEMO_TEACHER / "README.md").read_text().lower()


def test_the_demo_student_keeps_at_most_55_percent() -> None:
    teacher, recipe = open_checkpoint(DEMO_TEACHER), demo_recipe()
    for one in feasible_for(teacher, recipe.prune, recipe.search, None):
        assert 0.4 <= one.costs.non_embedding / teacher.parameters.non_embedding <= 0.55


def test_the_demo_tokenizer_gives_back_every_character() -> None:
    tokenizer = load_tokenizer(DEMO_TEACHER)
    text = "def f(x):\n\treturn x ** 2  # é → 你好\r\n\n    'end'"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_builtin_corpus_has_no_tests_and_the_same_heldout_files_whatever_else_is_there() -> None:
    documents = list(builtin_documents())
    assert not any({"test", "tests", "site-packages"} & set(Path(document.key).parts) for document in documents)
    held = {document.key for document in documents if is_heldout(document, DataConfig().heldout_fraction)}
    assert 0 < len(held) < len(documents) / 5


def test_a_demo_override_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unknown key distill.token.*did you mean 'tokens'"):
        demo_recipe(["distill.token=5"])
