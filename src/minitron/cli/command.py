"""A command of the command line: its words, its options, the rules that they obey, and its work."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from minitron.cli.console import Console
from minitron.cli.rules import Rules


@dataclass(frozen=True)
class Command:
    """A command, which its module defines as COMMAND.

    `add_options` and `run` import the libraries that they use: `minitron --help` does not wait for torch.

    help: the line in `minitron --help`.
    example: a command line that `--help` shows.
    rules: options that have an effect only together with others.
    """

    help: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Console], None]
    rules: Rules = ()
