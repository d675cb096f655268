"""Paths as users write them."""

import os

from minitron.core.errors import MinitronError


def expanded(text: str) -> str:
    """Replace `~` and `~user` at the beginning of a path by the home directory.

    A shell does not replace them in `--out=~/x`, in quotes and in files.

    Raises: MinitronError for text that can be no path, and for an unknown home directory.
    """
    if not text:
        raise MinitronError("a path is empty: give one, such as . for the current directory")
    if "\0" in text:
        raise MinitronError(f"the path {text!r} has a NUL character, which no path has: leave it out")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise MinitronError(
            f"{text}: the home directory that {text.split('/')[0]} stands for is not known: write it out, or ./{text} "
            "for a name that begins with ~"
        )
    return path
