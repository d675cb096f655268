"""What does minitron do with damaged files: is each refused in one line that names it, and nothing left behind?

    python benchmarks/bad_input.py [--inputs 2500] [--seed 0] [--out FILE]

Every kind of file that minitron reads (the table is in tests/helpers/bad_targets.py) is damaged as hypothesis draws it,
one place at a time, and given to a command in a process of its own. tests/helpers/bad_input.py states the law too.
"""

import argparse
import random
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path

from lib.measure import header, publish, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))

import hypothesis
from bad_input import Outcome, Room, kind_of
from bad_targets import TARGETS, Target
from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis.errors import NoSuchExample
from mutations import Mutation

COLUMNS = ["input: command", "inputs", "exit 0, same result", "exit 0, another", "exit 1", "exit 2", "violations"]
SHOWN_CHARACTERS = 300
MOST_SHRINKS = 40  # inputs that are tried to find a smaller example of a violation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2500, help="at most so many, shared evenly by the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only targets whose name contains this; default all")
    parser.add_argument("--found", type=Path, help="a Markdown file: what the campaign found on the way")
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    args = parser.parse_args()
    targets = [t for t in TARGETS.values() if not args.target or any(part in t.name for part in args.target)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="minitron-bench-") as directory:
        room = Room(Path(directory))
        campaign = Campaign(room, args.inputs // len(targets), args.seed)
        found = {target.name: campaign.tried(target) for target in targets}
        broken = [line for target in targets for line in campaign.violations(target, found[target.name])]
        room.close()
    publish(report(found, broken, args, time.monotonic() - started), args.out)
    sys.exit(bool(broken))


class Campaign:
    def __init__(self, room: Room, count: int, seed_number: int):
        self.room, self.count, self.seed = room, count, seed_number
        self.known: dict[tuple[str, Mutation], Outcome] = {}

    def tried(self, target: Target) -> list[Outcome]:
        outcomes: list[Outcome] = []

        @seed(self._seed(target))
        @_options(self.count, Phase.generate)
        @given(self.room.inputs(target))
        def run(mutation: Mutation) -> None:
            outcomes.append(self._outcome(target, mutation))
            for violation in outcomes[-1].violations:
                print(f"{target.name}: {mutation.how}: {violation}", file=sys.stderr, flush=True)

        run()
        counts = Counter(outcome.ended.code for outcome in outcomes)
        bad = sum(bool(outcome.violations) for outcome in outcomes)
        seconds = sum(outcome.ended.seconds for outcome in outcomes)
        print(f"{target.name}: {dict(counts)}, {bad} violations, {seconds:.0f} s", file=sys.stderr, flush=True)
        return outcomes

    def violations(self, target: Target, outcomes: list[Outcome]) -> list[str]:
        """One line for each kind, with its smallest example."""
        kinds: dict[str, list[Outcome]] = defaultdict(list)
        for outcome in outcomes:
            for violation in outcome.violations:
                kinds[kind_of(violation)].append(outcome)
        return [self._line(target, kind, of_kind) for kind, of_kind in kinds.items()]

    def _line(self, target: Target, kind: str, outcomes: list[Outcome]) -> str:
        mutation = self._smallest(target, kind, outcomes)
        said = next(v for v in self._outcome(target, mutation).violations if kind_of(v) == kind)
        text = " ".join(said.replace(str(self.room.base), "...").split())[:SHOWN_CHARACTERS]
        return f"- {target.name} ({len(outcomes)}): {mutation.how}: {text}"

    def _smallest(self, target: Target, kind: str, outcomes: list[Outcome]) -> Mutation:
        tried = len(self.known)

        def breaks(mutation: Mutation) -> bool:
            if (target.name, mutation) not in self.known and len(self.known) - tried >= MOST_SHRINKS:
                return False
            return kind in map(kind_of, self._outcome(target, mutation).violations)

        smallest = min((outcome.mutation for outcome in outcomes), key=lambda mutation: len(mutation.how))
        try:
            options = _options(self.count, Phase.generate, Phase.shrink)
            return find(self.room.inputs(target), breaks, settings=options, random=random.Random(self._seed(target)))
        except NoSuchExample:
            return smallest

    def _outcome(self, target: Target, mutation: Mutation) -> Outcome:
        key = target.name, mutation
        if key not in self.known:
            self.known[key] = self.room.outcome(target, mutation)
        return self.known[key]

    def _seed(self, target: Target) -> int:
        return self.seed + zlib.crc32(target.name.encode())


def _options(count: int, *phases: Phase) -> settings:
    quiet = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=count, phases=phases, **quiet)  # type: ignore[arg-type]


def report(found: dict[str, list[Outcome]], broken: list[str], args: argparse.Namespace, seconds: float) -> str:
    rows = [[name, *cells(outcomes)] for name, outcomes in found.items()]
    every = [outcome for outcomes in found.values() for outcome in outcomes]
    refused = sum(outcome.ended.code == 1 for outcome in every)
    tracebacks = sum("traceback" in violation for outcome in every for violation in outcome.violations)
    half = sum(v.startswith(("leaves", "fails and", "changes")) for outcome in every for v in outcome.violations)
    return "\n".join(
        [
            header("Damaged input"),
            f"Drawn by hypothesis {hypothesis.__version__} with seed {args.seed}; a row is a file that is damaged "
            "and a command that reads it. A result is the weights, plan or page that the command makes, or what it "
            f"prints. It took {seconds / 60:.0f} minutes.",
            "",
            table(COLUMNS, [*rows, ["all", *cells(every)]]),
            "",
            f"{len(every):,} inputs: {refused:,} refused in one line, {tracebacks} tracebacks, {half} outputs half "
            f"written, left behind or in the wrong place, {len(broken)} kinds of violation"
            + (", each with its number and its smallest example:" if broken else "."),
            "",
            *broken,
            "",
            *(["## What it found", "", args.found.read_text(encoding="utf-8").strip(), ""] if args.found else []),
        ]
    )


def cells(outcomes: list[Outcome]) -> list[str]:
    codes = Counter(outcome.ended.code for outcome in outcomes)
    same = sum(outcome.same for outcome in outcomes)
    bad = sum(bool(outcome.violations) for outcome in outcomes)
    return [str(number) for number in (len(outcomes), same, codes[0] - same, codes[1], codes[2], bad)]


if __name__ == "__main__":
    main()
