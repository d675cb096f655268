"""What did a run keep? Its result table and what it cost, as a result file.

python benchmarks/run_result.py runs/demo --command "make demo" --title "The demo" --out FILE
"""

import argparse
from pathlib import Path

from lib.measure import header, publish, table

from minitron.core.text import count, duration, size
from minitron.report.records import RunRecords, read_run, result_table
from minitron.report.tables import RESULT_COLUMNS, result_cells


def sections(records: RunRecords) -> str:
    columns = ["model", *(f"{column.heading}, {column.unit}" for column in RESULT_COLUMNS)]
    rows = [[row["model"], *result_cells(row)] for row in result_table(records)]
    kl = {row["model"]: row["kl_to_teacher"] for row in result_table(records)}
    costs = [[name, duration(stage.seconds), size(stage.peak_memory_bytes)] for name, stage in records.stages.items()]
    total = sum(stage.seconds for stage in records.stages.values())
    trained = records.stages["student"].result["training"]
    tokens = count(records.evaluations["teacher"].tokens)
    threads = records.stages["student"].hardware.threads
    return f"""
{records.results.plan.plan}; {count(trained["tokens"])} distillation tokens in {trained["steps"]} steps,
learning rate {records.whole_recipe["distill"]["learning_rate"]}, seed {records.recipe.seed}. Means over {tokens} tokens
of held-out text.

{table(columns, rows)}

KL after distillation is {kl["student"] / kl["pruned"]:.1%} of the KL right after the cut.

One run, {duration(total)} in its stages with {threads} threads:

{table(["stage", "time", "peak resident memory"], costs)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--command", required=True, help="the command that made the run")
    parser.add_argument("--title", required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    publish(f"{header(args.title)}- The run: `{args.command}`\n{sections(read_run(args.run))}", args.out)


if __name__ == "__main__":
    main()
