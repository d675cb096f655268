"""How near is what `--dry-run` says to what each stage of the run then takes?

python benchmarks/estimates.py --out FILE
python benchmarks/estimates.py --name SmolLM2 --run "MODEL --target-params 81% --data TEXT --tokens 40K" --out FILE

The dry run and the run are started one after the other, as a user would; the times of the stages are those of the
run's records. Nothing else may run on the machine meanwhile.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib.measure import header, publish, table

from minitron.recipe import DEMO_TEACHER

SHORT = 1.0  # seconds; the ratio of a stage that takes less says nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run",
        default=f"{DEMO_TEACHER} --target-params 60% --data builtin --tokens 100K --set data.block_tokens=256",
        help="what stands behind `minitron compress`, without --out",
    )
    parser.add_argument("--name", default="the demo teacher", help="what the result calls the model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    words = shlex.split(args.run)
    with tempfile.TemporaryDirectory() as path:
        out = Path(path) / "run"
        command = [sys.executable, "-m", "minitron", "compress", *words, "--out", str(out)]
        started = time.perf_counter()
        said = json.loads(subprocess.run([*command, "--dry-run", "--json"], stdout=subprocess.PIPE, check=True).stdout)
        dry = time.perf_counter() - started
        started = time.perf_counter()
        subprocess.run(command, check=True)
        whole = time.perf_counter() - started
        taken = {
            file.parent.name: json.loads(file.read_text())["seconds"] for file in sorted(out.glob("*/record.json"))
        }
    rows = []
    for stage in said["stages"]:
        seconds, real = stage["seconds"], taken.get(stage["name"])
        cells = ["" if value is None else f"{value:.1f}" for value in (seconds, real)]
        known = seconds is not None and real is not None and real >= SHORT
        rows.append([stage["name"], *cells, f"{seconds / real:.2f}" if known else ""])
    total = sum(stage["seconds"] or 0.0 for stage in said["stages"])
    rows.append(["in all", f"{total:.1f}", f"{whole:.1f}", f"{total / whole:.2f}"])
    intro = f"""`minitron compress {args.run}`, of {args.name}.
The dry run took {dry:.1f} s, of which the start of Python and torch is a part, as it is of `in all`.
"""
    columns = ["stage", "said, s", "taken, s", "said / taken"]
    publish("\n".join([header("Estimates and runs"), intro, table(columns, rows), ""]), args.out)


if __name__ == "__main__":
    main()
