"""Every error is one tree, and its message reads as a sentence."""

import inspect

import pytest

from minitron.core import errors
from minitron.core.errors import MinitronError, UnsupportedArchitecture, did_you_mean

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, Exception)]


def raised(error: type[Exception]) -> Exception:
    """An error made the way the code makes it."""
    return error("gpt9", known=["llama"]) if error is UnsupportedArchitecture else error("what, why, and the way out")


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_is_a_minitron_error_with_a_readable_message(error: type[Exception]) -> None:
    with pytest.raises(MinitronError) as caught:
        raise raised(error)
    expected = "model_type 'gpt9' is not supported; Available: llama"
    assert str(caught.value) == (expected if error is UnsupportedArchitecture else "what, why, and the way out")


@pytest.mark.parametrize("error", CLASSES)
def test_the_tree_in_the_docstring_is_the_tree_of_classes(error: type[Exception]) -> None:
    lines = {line.lstrip("│ ├└─").split()[0]: line for line in (errors.__doc__ or "").splitlines() if line.strip()}
    depth = len(error.__mro__) - len(MinitronError.__mro__)
    assert lines[error.__name__].find(error.__name__) == 4 * depth


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("lama", "; did you mean 'llama'? Available: llama, mistral"),
        ("mixtral", "; did you mean 'mistral'? Available: llama, mistral"),
        ("gpt", "; Available: llama, mistral"),
        ("", "; Available: llama, mistral"),
    ],
)
def test_the_nearest_known_name_is_offered_with_all_of_them(name: str, tail: str) -> None:
    assert did_you_mean(name, ["mistral", "llama"]) == tail
