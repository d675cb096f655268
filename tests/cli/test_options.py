"""No option is accepted and ignored: each of every command changes what comes of it, and is refused where it could not.

The tables are held against a walk through the parser and through the recipe's sections, so that a new option or key
needs a row. What they do not show: that an option changes the right thing, which the tests of its command are for; and
that a key which is read has weight in what is made of it, which the rules and the tests of its room are for.
"""

import argparse
import hashlib
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import bench
import example_run
import pytest
import small
import yaml
from huggingface_hub import constants

from minitron import api
from minitron.calibration.statistics import CalibrateConfig
from minitron.cli.main import COMMANDS, build_parser, main
from minitron.cli.options import recipe_field
from minitron.cli.prune import OF_CUT
from minitron.cli.rules import given_options, require_options
from minitron.core import effects
from minitron.core.config import Section
from minitron.core.effects import changed_keys
from minitron.core.errors import NoEffect, RecipeError
from minitron.data.config import DataConfig
from minitron.pipeline import estimate
from minitron.pipeline import rules as recipe_rules
from minitron.pipeline.rules import OF_CHOICE, OF_DISTILL, OF_DISTILL_ALONE, OF_RECIPE, require_recipe_effects
from minitron.pruning.config import PruneConfig
from minitron.pruning.repair import RepairConfig
from minitron.recipe import SHIPPED, Recipe, build_recipe, dump_recipe, load_recipe
from minitron.report.card import write_card
from minitron.report.records import read_run


@dataclass(frozen=True)
class Changes:
    """A command ends otherwise with `more`, or with `other` instead of `more`, than without."""

    base: str
    more: str
    other: str = ""


@dataclass(frozen=True)
class Refused:
    """A command that is refused, naming the option."""

    command: str
    says: str


@dataclass(frozen=True)
class Unseen:
    """An option that changes time or memory alone: its other row is all that is held here."""


Row = Changes | Refused | Unseen

CALIBRATE = "calibrate {M} --data {T} --samples 4 --block-tokens 16 --out {OUT}"
SEARCH = (
    "search {M} --statistics {S} --bytes-per-second 1GB --flops-per-second 1e9 --dims ffn=8-40/8 layers=2-4 "
    "--target-params 50% --window 0.3"
)
CUT = (
    "search {M} --bytes-per-second 1GB --flops-per-second 1e9 --dims ffn=24 layers=2,3 --target-params 50% --window 0.9"
)
PRUNE = "prune {M} --repair none --shape hidden=24,ffn=24,layers=3 --out {OUT}"
PRUNE_BY_STATISTICS = f"{PRUNE} --statistics {{S}}"
PRUNE_BY_TEXT = f"{PRUNE} --data {{T}} --samples 4"
DISTILL = (
    "distill --teacher {M} --student {C} --data {T} --block-tokens 16 --tokens 64 --set distill.batch_blocks=4 "
    "--set distill.evaluate_blocks=1 --set distill.intermediate=off --out {OUT}"
)
EVALUATE = "evaluate {M} --data {T} --block-tokens 16 --blocks 4"
GENERATE = "generate {M} --prompt the --new-tokens 5"
ESTIMATE_HERE, RUN_HERE = "compress {M} --target-params 60% --tokens 1M --dry-run", "run {R} --dry-run"
ESTIMATE, RUN = f"{ESTIMATE_HERE} --gpus 8", f"{RUN_HERE} --gpus 8"  # which time nothing
QUANTIZE = "quantize {M} --types Q4_K_M --no-verify --threads 1 --out {OUT}"
SIZES = "quantize {M} --types Q4_K_M --no-verify --dry-run"
SPEED = "speed {M}"
TASKS = "evaluate {M} --tasks-dir {B} --no-cache"
GPUS = "--gpus has an effect only with --dry-run; leave it out, or add --dry-run"
OF_TASKS = "has an effect only with benchmarks; leave it out, or give --tasks, --suite or --tasks-dir"
NO_ROWS = "--text-field has an effect only where the text is .jsonl, .parquet or a dataset"
NO_TEXT = "has an effect only where the cut reads text"


def of_tasks(option: str, value: str = "") -> Refused:
    return Refused(f"{EVALUATE} {option} {value}", f"{option} {OF_TASKS}")


# Command -> option -> its rows. Those that all commands have are tested once.
OPTIONS: dict[str, dict[str, list[Row]]] = {
    "demo": {
        "--out": [Refused("demo --out {L}", "layers.json")],
        "--set": [Refused("demo --set seed=-1", "--set 'seed=-1': seed: ")],
    },
    "inspect": {
        "--revision": [
            Changes("inspect me/tiny", "--revision old"),
            Refused("inspect {M} --revision old", "--revision has an effect only with a hub id, and MODEL is here"),
        ]
    },
    "compress": {
        "--revision": [
            Changes("compress me/tiny --target-params 60% --dry-run --gpus 8", "--revision old"),
            Refused(f"{ESTIMATE} --revision old", "--revision has an effect only with a hub id"),
        ],
        "--target-params": [Changes("compress {M} --dry-run --gpus 8", "--target-params 60%", "--target-params 90%")],
        "--tokens": [Changes(ESTIMATE.replace("--tokens 1M ", ""), "--tokens 1M")],
        "--minutes": [Refused(f"{ESTIMATE} --minutes 5", "distill.minutes=5 both say how long the distillation is")],
        "--seed": [
            Refused(
                "compress {M} --target-params 60% --seed 1 --set seed=2", "--seed and --set seed=2 say the same thing"
            )
        ],
        "--data": [Refused(f"{ESTIMATE} --data teacher --set distill.correction=before", "data.source='teacher'")],
        "--text-field": [Refused(f"{ESTIMATE} --text-field a", NO_ROWS)],
        "--separate-documents": [
            Refused(
                f"{ESTIMATE} --separate-documents --set data.separate_documents=false", "--separate-documents and --set"
            )
        ],
        "--out": [Refused("compress {M} --target-params 60% --tokens 1K --data {T} --out {L}", "layers.json")],
        "--dry-run": [Refused("compress {M} --target-params 60% --gpus 8", GPUS)],
        "--gpus": [
            Changes(ESTIMATE_HERE, "--gpus 4", "--gpus 8"),
            Refused("compress {M} --target-params 60% --gpus 8", GPUS),
        ],
        "--gpu-teraflops": [
            Changes(ESTIMATE, "--gpu-teraflops 100"),
            Refused(
                f"{ESTIMATE_HERE} --gpu-teraflops 100",
                "--gpu-teraflops has an effect only with --dry-run and --gpus",
            ),
        ],
        "--gpu-memory": [
            Changes(ESTIMATE, "--gpu-memory 40GB"),
            Refused(
                f"{ESTIMATE_HERE} --gpu-memory 40GB",
                "--gpu-memory has an effect only with --dry-run and --gpus",
            ),
        ],
        "--utilisation": [
            Changes(ESTIMATE, "--utilisation 0.1"),
            Refused(
                f"{ESTIMATE_HERE} --utilisation 0.1",
                "--utilisation has an effect only with --dry-run and --gpus",
            ),
        ],
        "--set": [Changes(ESTIMATE, "--set data.block_tokens=16")],
    },
    "run": {
        "--out": [Refused("run {R} --out {L}", "layers.json")],
        "--dry-run": [Refused("run {R} --gpus 8", GPUS)],
        "--gpus": [Changes(RUN_HERE, "--gpus 4", "--gpus 8"), Refused("run {R} --gpus 8", GPUS)],
        "--gpu-teraflops": [
            Changes(RUN, "--gpu-teraflops 100"),
            Refused(
                f"{RUN_HERE} --gpu-teraflops 100",
                "--gpu-teraflops has an effect only with --dry-run and --gpus",
            ),
        ],
        "--gpu-memory": [
            Changes(RUN, "--gpu-memory 40GB"),
            Refused(
                f"{RUN_HERE} --gpu-memory 40GB",
                "--gpu-memory has an effect only with --dry-run and --gpus",
            ),
        ],
        "--utilisation": [
            Changes(RUN, "--utilisation 0.1"),
            Refused("run {R} --gpus 8 --dry-run --utilisation 0", "--utilisation"),
            Refused(
                f"{RUN_HERE} --utilisation 0.1",
                "--utilisation has an effect only with --dry-run and --gpus",
            ),
        ],
        "--set": [Changes(RUN, "--set distill.tokens=9999")],
    },
    "calibrate": {
        "--data": [Changes(CALIBRATE.replace("--data {T} ", ""), "--data {T}", "--data {P}")],
        "--text-field": [
            Changes(CALIBRATE, "--text-field body"),
            Refused(CALIBRATE.replace("{T}", "{P} --text-field body"), NO_ROWS),
        ],
        "--separate-documents": [Changes(CALIBRATE, "--separate-documents")],
        "--samples": [Changes(CALIBRATE.replace("--samples 4 ", ""), "--samples 4", "--samples 5")],
        "--block-tokens": [Changes(CALIBRATE.replace("--block-tokens 16 ", ""), "--block-tokens 16")],
        "--seed": [Changes(CALIBRATE, "--seed 1")],
        "--second-moment": [Changes(CALIBRATE, "--no-second-moment")],
        "--set": [
            Changes(CALIBRATE, "--set data.delimiter=none"),
            Changes(CALIBRATE, "--set data.heldout_fraction=0.3"),
            Changes(CALIBRATE, "--set calibrate.second_moment=false"),
            Refused(
                f"{CALIBRATE} --set data.sample_top_k=5", "data.sample_top_k has an effect only where the text is sam"
            ),
            Refused(f"{CALIBRATE} --set calibrate.samples=9", "--samples and --set calibrate.samples=9 say the same"),
            Refused(f"{CALIBRATE} --set prune.target=50%", "does not read 'prune'; Available: calibrate, data"),
            Refused(f"{CALIBRATE} --set seed=3", "`minitron calibrate` does not read 'seed'"),
        ],
        "--out": [Changes(CALIBRATE.replace("--out {OUT}", ""), "--out {OUT}")],
    },
    "search": {
        "--target-params": [
            Changes(SEARCH.replace("--target-params 50%", ""), "--target-params 50%", "--target-params 60%")
        ],
        "--window": [
            Changes(SEARCH.replace("--window 0.3", ""), "--window 0.3"),
            Refused(f"{SEARCH} --least 30%", "--window has an effect only with --target-params and without --least"),
            Refused(
                SEARCH.replace("--target-params 50%", "--max-memory 1GB"),
                "--window has an effect only with --target-params",
            ),
        ],
        "--least": [
            Changes(SEARCH.replace("--window 0.3", ""), "--least 20%"),
            Refused("search {M} --statistics {S} --max-memory 1GB --least 20%", "search.least needs prune.target"),
        ],
        "--max-memory": [Changes(SEARCH, "--max-memory 80KB")],
        "--bytes-per-parameter": [Changes(SEARCH, "--bytes-per-parameter 0.5")],
        "--max-kv-cache": [Changes(SEARCH, "--max-kv-cache 700KB")],
        "--max-decode-time": [Changes(SEARCH, "--max-decode-time 0.0007")],
        "--max-prefill-time": [Changes(SEARCH, "--max-prefill-time 0.05")],
        "--context": [Changes(SEARCH, "--context 8")],
        "--batch": [Changes(SEARCH, "--batch 3")],
        "--bytes-per-second": [
            Changes(SEARCH.replace("--bytes-per-second 1GB ", ""), "--bytes-per-second 1GB", "--bytes-per-second 2GB")
        ],
        "--flops-per-second": [
            Changes(SEARCH.replace("--flops-per-second 1e9 ", ""), "--flops-per-second 1e9", "--flops-per-second 2e9")
        ],
        "--dims": [
            Changes(SEARCH.replace("--dims ffn=8-40/8 layers=2-4 ", ""), "--dims ffn=8-40/8 layers=2-4"),
            Refused(f"{SEARCH} --dims ffn=8", "--dims is given 2 times, and only the last would be read"),
            Refused("search {M} --target-params 50% --dims ffn=8 ffn=16", "--dims names ffn twice, with 8 and with 16"),
        ],
        "--gguf-block": [Changes(SEARCH, "--gguf-block 32")],
        "--statistics": [Refused("search {M} --target-params 50% --statistics {M}", "holds no statistics")],
        "--data": [
            Changes(f"{CUT} --block-tokens 8", "--data {W}", "--data {P}"),
            Refused(f"{SEARCH} --data {{W}}", "--data has an effect only where text is read: without --statistics"),
        ],
        "--text-field": [
            Changes(f"{CUT} --block-tokens 8 --data {{W}}", "--text-field body"),
            Refused(f"{CUT} --data {{P}} --text-field body", NO_ROWS),
            Refused(f"{SEARCH} --text-field body", "--text-field has an effect only where text is read"),
        ],
        "--separate-documents": [
            Changes(f"{CUT} --block-tokens 8 --data {{W}}", "--separate-documents"),
            Refused(f"{SEARCH} --separate-documents", "--separate-documents has an effect only where text is read"),
        ],
        "--block-tokens": [
            Changes(f"{CUT} --data {{W}}", "--block-tokens 8", "--block-tokens 12"),
            Refused(f"{SEARCH} --block-tokens 8", "--block-tokens has an effect only where text is read"),
        ],
        "--cut": [Changes(f"{CUT} --block-tokens 8 --data {{W}}", "--cut 1")],
        "--set": [
            Changes(SEARCH, "--set search.batch=3"),
            Changes(f"{SEARCH} --set repair.steps=[]", "--set prune.criterion=magnitude"),
            Refused(f"{SEARCH} --set prune.criterion=magnitude", "prune.criterion has an effect only where units"),
            Changes(f"{CUT} --block-tokens 8 --data {{W}}", "--set calibrate.samples=2"),
            Changes(f"{CUT} --block-tokens 8 --data {{W}}", "--set search.level=cut"),
            Changes(f"{CUT} --block-tokens 8 --data {{W}} --cut 2", "--set repair.steps=[]"),
            Refused(f"{SEARCH} --set calibrate.samples=2", "calibrate.samples has an effect only where text is read"),
            Refused(f"{SEARCH} --set data.max_tokens=99", "data.max_tokens has an effect only where text is read"),
            Refused(
                f"{CUT} --data {{W}} --set prune.iterations=2",
                "prune.iterations has an effect only where candidates are cut; leave it out, or add --cut",
            ),
            Refused(
                f"{CUT} --data {{W}} --set calibrate.second_moment=true",
                "calibrate.second_moment has an effect only where statistics are kept",
            ),
            Refused(f"{SEARCH} --set search.window=0.2", "--window and --set search.window=0.2 say the same thing"),
            Refused(
                f"{SEARCH} --cut 1 --set search.level=predicted",
                "--cut and --set search.level=predicted say the same thing",
            ),
            Refused(f"{SEARCH} --set search.level=distilled", "search.level=distilled is of a run"),
            Refused(
                f"{SEARCH} --set distill.tokens=5", "`minitron search` does not read 'distill'; Available: calibra"
            ),
        ],
        "--top": [Refused(f"{SEARCH} --top 1 --json", "--top has an effect only without --json, which has all")],
    },
    "prune": {
        "--target-params": [
            Changes(
                "prune {M} --repair none --statistics {S} --out {OUT}", "--target-params 60%", "--target-params 90%"
            )
        ],
        "--shape": [
            Changes("prune {M} --repair none --statistics {S} --out {OUT}", "--shape ffn=24", "--shape ffn=32"),
            Refused("prune {M} --shape ffn=24,ffn=32 --out {OUT}", "argument --shape: 'ffn=24,ffn=32' names a size tw"),
        ],
        "--layers": [Changes("prune {M} --repair none --out {OUT}", "--layers drop=1", "--layers drop=2")],
        "--plan": [Changes("prune {M} --repair none --out {OUT}", "--plan {L}", "--plan {C}/plan.json")],
        "--criterion": [
            Changes(PRUNE_BY_STATISTICS, "--criterion random"),
            Refused(
                "prune {M} --layers drop=1 --criterion random --out {OUT}",
                "--criterion has an effect only where units of what is cut",
            ),
            Refused(
                "prune {M} --shape hidden=24,ffn=24 --statistics {S} --criterion random --out {OUT}",
                "the repairs basis, ffn_obs and heads_obs choose by themselves",
            ),
        ],
        "--layer-criterion": [
            Changes("prune {M} --shape layers=2 --data {T} --samples 2 --out {OUT}", "--layer-criterion contiguous"),
            Refused(
                "prune {M} --shape ffn=24 --data {T} --layer-criterion loss --out {OUT}",
                "--layer-criterion has an effect only where it chooses layers, and here none are cut",
            ),
        ],
        "--layer-task": [
            Changes(f"{PRUNE_BY_TEXT} --layer-criterion task", "--layer-task {Q}"),
            Refused(f"{PRUNE_BY_TEXT} --layer-task {{Q}}", "prune.layer_task"),
            Refused(
                "prune {M} --shape ffn=24 --data {T} --layer-criterion task --layer-task {Q} --out {OUT}",
                "--layer-criterion has an effect only where it chooses layers",
            ),
        ],
        "--iterations": [
            Changes(PRUNE_BY_TEXT, "--iterations 2"),
            Refused(
                "prune {M} --layers drop=1 --iterations 2 --out {OUT}", "--iterations has an effect only where there is"
            ),
        ],
        "--repair": [
            Changes("prune {M} --shape ffn=24 --data {T} --samples 40 --out {OUT}", "--repair none"),
            Refused(
                "prune {M} --shape ffn=24 --statistics {S} --repair heads_obs --out {OUT}",
                "--repair has an effect only with steps that repair what is cut",
            ),
        ],
        "--statistics": [
            Changes(PRUNE, "--statistics {S}", "--data {P}"),
            Refused(
                "prune {M} --layers drop=1 --repair none --statistics {S} --out {OUT}",
                "--statistics has an effect only where",
            ),
        ],
        "--data": [
            Changes(f"{PRUNE} --samples 4", "--data {T}", "--data {P}"),
            Refused(f"{PRUNE_BY_STATISTICS} --data {{T}}", f"--data {NO_TEXT}"),
        ],
        "--text-field": [
            Changes(PRUNE_BY_TEXT, "--text-field body"),
            Refused(PRUNE_BY_TEXT.replace("{T}", "{P} --text-field body"), NO_ROWS),
            Refused("prune {M} --layers drop=1 --repair none --data {T} --text-field body --out {OUT}", NO_TEXT),
        ],
        "--separate-documents": [
            Changes(PRUNE_BY_TEXT, "--separate-documents"),
            Refused(f"{PRUNE_BY_STATISTICS} --separate-documents", f"--separate-documents {NO_TEXT}"),
        ],
        "--samples": [
            Changes(f"{PRUNE} --data {{T}}", "--samples 4"),
            Refused(f"{PRUNE_BY_STATISTICS} --samples 4", f"--samples {NO_TEXT}"),
        ],
        "--set": [
            Changes(PRUNE_BY_STATISTICS, "--set prune.batch_aggregate=mean"),
            Changes(PRUNE_BY_TEXT, "--set data.block_tokens=16", "--set data.block_tokens=24"),
            Changes(f"{PRUNE} --data {{T}}", "--set calibrate.samples=4"),
            Changes("prune {M} --shape ffn=24 --data {T} --samples 40 --out {OUT}", "--set repair.steps=[]"),
            Changes("prune {M} --repair none --statistics {S} --out {OUT}", "--set prune.target=60%"),
            Refused(f"{PRUNE_BY_STATISTICS} --set data.block_tokens=16", f"data.block_tokens {NO_TEXT}"),
            Refused(f"{PRUNE_BY_STATISTICS} --set calibrate.samples=9", f"calibrate.samples {NO_TEXT}"),
            Refused(
                "prune {M} --layers drop=1 --set prune.sequence_aggregate=l2 --out {OUT}",
                "prune.sequence_aggregate has an effect only where units of what is cut",
            ),
            Refused(
                "prune {M} --shape ffn=24 --statistics {S} --set repair.steps=[heads_obs] --out {OUT}",
                "repair.steps has an effect only with steps that repair what is cut",
            ),
            Refused(
                f"{PRUNE_BY_TEXT} --set prune.layer_samples=3",
                "prune.layer_samples has an effect only with a prune.layer_criterion of loss",
            ),
            Refused(
                "prune {M} --set prune.layer_criterion=loss --set prune.layer_samples=3 --plan {L} --out {OUT}",
                "prune.layer_criterion has an effect only where it chooses layers",
            ),
            Refused(
                f"{PRUNE_BY_TEXT} --set calibrate.second_moment=true",
                "calibrate.second_moment has an effect only where statistics are kept",
            ),
            Refused(f"{PRUNE} --set repair.steps=[]", "--repair and --set repair.steps=[] say the same thing"),
            Refused(f"{PRUNE} --set prune.shape.ffn=8", "--shape and --set prune.shape.ffn=8 say the same thing"),
            Refused(f"{PRUNE} --set search.window=0.5", "`minitron prune` does not read 'search'"),
        ],
        "--out": [Changes(PRUNE_BY_STATISTICS.replace("--out {OUT} ", ""), "--out {OUT}")],
    },
    "distill": {
        "--teacher": [Changes(DISTILL.replace("--teacher {M} ", ""), "--teacher {M}", "--teacher {C}")],
        "--student": [Changes(DISTILL.replace("--student {C} ", ""), "--student {C}", "--student {M}")],
        "--data": [Changes(DISTILL.replace("--data {T} ", ""), "--data {T}", "--data {P}")],
        "--text-field": [
            Changes(DISTILL, "--text-field body"),
            Refused(DISTILL.replace("{T}", "{P} --text-field body"), NO_ROWS),
        ],
        "--separate-documents": [Changes(DISTILL, "--separate-documents")],
        "--tokens": [
            Changes(DISTILL.replace("--tokens 64 ", ""), "--tokens 64", "--tokens 128"),
            Refused(f"{DISTILL} --set distill.tokens=99", "--tokens and --set distill.tokens=99 say the same"),
        ],
        "--minutes": [Refused(f"{DISTILL} --minutes 5", "distill.minutes=5 both say how long the distillation is")],
        "--block-tokens": [Changes(DISTILL.replace("--block-tokens 16 ", ""), "--block-tokens 16", "--block-tokens 8")],
        "--learning-rate": [
            Changes(DISTILL, "--learning-rate 0.01"),
            Refused(f"{DISTILL} --learning-rate 1 --set distill.learning_rate=2", "--learning-rate and --set"),
        ],
        "--set": [
            Changes(DISTILL, "--set distill.weight_decay=0.5"),
            Changes(DISTILL, "--set data.heldout_fraction=0.3"),
            Changes(DISTILL.replace("--block-tokens 16", "--set data.block_tokens=16"), "--set data.delimiter=none"),
            Refused(
                f"{DISTILL} --set data.block_tokens=8", "--block-tokens and --set data.block_tokens=8 say the same"
            ),
            Refused(
                f"{DISTILL} --set data.sample_batch=8", "data.sample_batch has an effect only where the text is sa"
            ),
            Refused(
                f"{DISTILL} --set evaluate.blocks=8", "`minitron distill` does not read 'evaluate'; Available: data, di"
            ),
            Refused(
                f"{DISTILL} --set distil.loss=mse", "does not read 'distil'; did you mean 'distill'? Available: data"
            ),
            Refused(
                f"{DISTILL} --set distill.top_k_tail=false", "distill.top_k_tail has an effect only where only the"
            ),
        ],
        "--seed": [Changes(DISTILL, "--seed 1")],
        "--out": [Changes(DISTILL.replace("--out {OUT}", ""), "--out {OUT}")],
    },
    "evaluate": {
        "--teacher": [Changes(EVALUATE, "--teacher {C}")],
        "--data": [Changes(EVALUATE.replace("--data {T} ", ""), "--data {T}", "--data {P}")],
        "--text-field": [
            Changes(EVALUATE, "--text-field body"),
            Refused(EVALUATE.replace("{T}", "{P} --text-field body"), NO_ROWS),
            Refused(f"{TASKS} --text-field body", "--text-field has an effect only where text is measured"),
        ],
        "--separate-documents": [
            Changes(EVALUATE, "--separate-documents"),
            Refused(f"{TASKS} --separate-documents", "--separate-documents has an effect only where text is measured"),
        ],
        "--whole": [
            Changes(EVALUATE, "--whole"),
            Refused(f"{TASKS} --whole", "--whole has an effect only where text is measured, and benchmarks are alone"),
        ],
        "--blocks": [
            Changes(EVALUATE.replace("--blocks 4", ""), "--blocks 4"),
            Refused(f"{TASKS} --blocks 4", "--blocks has an effect only where text is measured"),
        ],
        "--block-tokens": [
            Changes(EVALUATE.replace("--block-tokens 16 ", ""), "--block-tokens 16"),
            Refused(f"{TASKS} --block-tokens 16", "--block-tokens has an effect only where text is measured"),
        ],
        "--set": [
            Changes(EVALUATE, "--set data.heldout_fraction=0.3"),
            Changes(EVALUATE.replace("--blocks 4", ""), "--set evaluate.blocks=4"),
            Changes("evaluate {M} --no-cache --tasks stories", "--set evaluate.tasks_dir={B}"),
            Refused(f"{EVALUATE} --set evaluate.new_tokens=5", "evaluate.new_tokens has an effect only in a run"),
            Refused(
                f"{EVALUATE} --whole --set data.heldout_fraction=0.3",
                "data.heldout_fraction has an effect only without --whole",
            ),
            Refused(
                f"{EVALUATE} --set data.heldout={{T}} --set data.max_tokens=99",
                "data.max_tokens has an effect only where a part of the text is held out",
            ),
            Refused(f"{TASKS} --set data.max_tokens=9", "data.max_tokens has an effect only where text is measured"),
            Refused(f"{TASKS} --set evaluate.batch=2", "evaluate.batch has an effect only where text is measured"),
            Refused(
                "evaluate {I} --data {T} --set evaluate.batch=2",
                "evaluate.batch has an effect only where a checkpoint is measured",
            ),
            Changes(f"{TASKS} --tasks stories", "--set evaluate.limit=2"),
            Refused(f"{TASKS} --tasks a --set evaluate.tasks=[b]", "--tasks and --set evaluate.tasks=[b] say the same"),
            Refused(f"{EVALUATE} --set evaluate.limit=2", "evaluate.limit has an effect only with benchmarks"),
            Refused(
                f"{EVALUATE} --set gguf.blocks=2", "`minitron evaluate` does not read 'gguf'; Available: data, eva"
            ),
        ],
        "--suite": [Changes(TASKS, "--suite minitron")],
        "--tasks": [Changes(TASKS, "--tasks nothing")],
        "--tasks-dir": [Changes("evaluate {M} --no-cache --tasks stories", "--tasks-dir {B}")],
        "--limit": [Changes(TASKS, "--limit 2"), of_tasks("--limit", "2")],
        "--shots": [Changes(TASKS, "--shots 1"), of_tasks("--shots", "1")],
        "--allow-code": [
            Changes("evaluate {M} --no-cache --tasks-dir {H} --streamed", "--allow-code"),
            of_tasks("--allow-code"),
        ],
        "--chat": [Changes(TASKS, "--chat"), of_tasks("--chat")],
        "--streamed": [
            Unseen(),
            of_tasks("--streamed"),
            Refused(f"{EVALUATE} --no-streamed", f"--streamed {OF_TASKS}"),
        ],
        "--batch": [Unseen(), of_tasks("--batch", "2")],
        "--cache": [Unseen(), Refused(f"{EVALUATE} --no-cache", f"--cache {OF_TASKS}")],
    },
    "generate": {
        "--prompt": [Changes("generate {M} --new-tokens 5", "--prompt the", "--prompt rain")],
        "--new-tokens": [Changes("generate {M} --prompt the", "--new-tokens 5", "--new-tokens 6")],
        "--temperature": [Changes(GENERATE, "--temperature 3")],
        "--seed": [
            Changes(f"{GENERATE} --temperature 3", "--seed 1"),
            Refused(
                f"{GENERATE} --seed 1",
                "--seed has an effect only where tokens are drawn; leave it out, or give a --temperature above 0",
            ),
        ],
    },
    "quantize": {
        "--types": [Changes("quantize {M} --no-verify --dry-run", "--types Q4_K_M", "--types Q8_0")],
        "--target-bpw": [Changes(SIZES, "--target-bpw 1")],
        "--target-size": [Changes(SIZES, "--target-size 1KB")],
        "--calibration": [
            Changes(QUANTIZE, "--calibration {T}", "--calibration {P}"),
            Refused(
                f"{QUANTIZE} --imatrix {{I}} --data {{T}}", "--data has an effect only where text is read for an im"
            ),
        ],
        "--text-field": [
            Changes(f"{QUANTIZE} --calibration {{T}}", "--text-field body"),
            Refused(f"{QUANTIZE} --calibration {{P}} --text-field body", NO_ROWS),
            Refused(f"{QUANTIZE} --text-field body", "--text-field has an effect only where text is read"),
        ],
        "--imatrix": [
            Changes(QUANTIZE, "--imatrix {I}"),
            Refused(
                QUANTIZE.replace("Q4_K_M", "F16,q8_0") + " --imatrix {I}",
                "--imatrix has an effect only with types that take an importance matrix",
            ),
        ],
        "--tensor-type": [
            Changes(SIZES, "--tensor-type output=Q8_0"),
            Refused(f"{SIZES} --tensor-type nowhere=Q8_0", "no matrix's name has the pattern 'nowhere'"),
            Refused(
                f"{SIZES} --tensor-type output=Q8_0 --tensor-type output=F16",
                "--tensor-type names output twice, with Q8_0 and with F16",
            ),
        ],
        "--pre": [Changes(QUANTIZE, "--pre smaug-bpe")],
        "--samples": [
            Changes(f"{QUANTIZE} --calibration {{T}}", "--samples 2"),
            Refused(f"{QUANTIZE} --samples 2", "--samples has an effect only where text is read"),
            Refused(
                f"{QUANTIZE.replace('--no-verify', '')} --imatrix {{I}} --samples 2",
                "--samples has an effect only where text is read for an importance matrix, and --imatrix is one",
            ),
        ],
        "--blocks": [  # what files measured on more blocks come to is in test_quantize.py
            Refused(f"{QUANTIZE} --blocks 2", "--blocks has an effect only where files are run in llama.cpp")
        ],
        "--block-tokens": [
            Changes(f"{QUANTIZE} --calibration {{T}}", "--block-tokens 16"),
            Refused(f"{QUANTIZE} --block-tokens 16", "--block-tokens has an effect only where text is read"),
        ],
        "--threads": [Unseen(), Refused("quantize {M} --types Q8_0 --threads 0", "argument --threads")],
        "--set": [
            Changes(f"{QUANTIZE} --calibration {{T}}", "--set data.heldout_fraction=0.3"),
            Changes(SIZES, "--set gguf.bits_per_weight=[4.5]"),
            Changes("quantize {M} --no-verify --dry-run", "--set gguf.types=[Q8_0]"),
            Refused(f"{QUANTIZE} --set data.max_tokens=16", "data.max_tokens has an effect only where text is read"),
            Refused(
                f"{QUANTIZE} --calibration {{T}} --set data.separate_documents=true",
                "data.separate_documents has an effect only where a model is calibrated",
            ),
            Refused(f"{QUANTIZE} --set gguf.types=[Q8_0]", "--types and --set gguf.types=[Q8_0] say the same thing"),
            Refused(
                f"{QUANTIZE} --set gguf.blocks=2", "gguf.blocks has an effect only where files are run in llama.cpp"
            ),
            Refused(f"{QUANTIZE} --set calibrate.samples=2", "`minitron quantize` does not read 'calibrate'"),
        ],
        "--verify": [Changes("quantize {M} --types F16 --blocks 2 --dry-run", "--no-verify")],
        "--dry-run": [Changes("quantize {M} --types Q8_0 --no-verify --threads 1", "--dry-run")],
        "--out": [Changes("quantize {M} --types Q8_0 --no-verify --threads 1", "--out {OUT}")],
    },
    "speed": {  # which is measured in test_speed.py: here what is refused shows that it is read
        "--teacher": [Refused("speed {M} --teacher {T}.gguf", "is a GGUF file, which transformers does not run")],
        "--engine": [Refused("speed {M} --engine llama.cpp", "llama.cpp runs GGUF files, and ")],
        "--batch": [Refused("speed {M} --batch 0", "argument --batch")],
        "--context": [Refused("speed {M} --context 100", "--context 100: with the 33 tokens that follow it is longer")],
        "--new-tokens": [
            Refused("speed {M} --new-tokens 64", "--new-tokens 64 is too many for a context of 64 tokens")
        ],
        "--rounds": [Refused("speed {M} --rounds 0", "argument --rounds")],
        "--dtype": [Refused("speed a.gguf --dtype float32", "--dtype float32: the types in a GGUF file are its own")],
        "--threads": [
            Unseen(),
            Refused(
                "speed {M} --engine vllm --threads 2", "--threads has an effect only with transformers and llama.cpp"
            ),
        ],
    },
    "report": {"--out": [Changes("report {X}", "--out {OUT}")]},
    "card": {},
    "push": {
        "--private": [Changes("push {X} me/small --dry-run", "--private")],
        "--dry-run": [Changes("push {X} me/small", "--dry-run")],
    },
}
COMMON = {"--help", "--json", "--quiet", "--verbose"}


def subparsers() -> Mapping[str, argparse.ArgumentParser]:
    (found,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return found.choices


def options_of(command: str) -> set[str]:
    """Of each option its first long name."""
    names = (
        [name for name in action.option_strings if name.startswith("--")] for action in subparsers()[command]._actions
    )
    return {found[0] for found in names if found}


def test_every_option_has_a_row() -> None:
    for command in subparsers():
        assert options_of(command) == OPTIONS[command].keys() | COMMON


def test_every_command_has_rows() -> None:
    assert OPTIONS.keys() == subparsers().keys()


@dataclass
class Desk:
    """What commands read, and what each that was run came to."""

    path: Path
    names: dict[str, Any]
    known: dict[str, Any] = field(default_factory=dict)
    number: int = 0

    def run(self, command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; `{OUT}` is another place each time."""
        self.number += 1
        names = self.names | {"OUT": self.path / f"out{self.number}"}
        words = [word.format_map(names) for word in shlex.split(command)]
        handler = signal.getsignal(signal.SIGTERM)
        try:
            code = main(words)
        except SystemExit as exit:
            code = int(exit.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capsys.readouterr()
        return code, out, err

    def files(self) -> set[Path]:
        """All but what is kept for the next command."""
        return {file for file in self.path.rglob("*") if self.path / "cache" not in (file, *file.parents)}

    def outcome(self, command: str, capsys: pytest.CaptureFixture[str]) -> Any:
        """What a command says and writes, without what clocks and places have to do with."""
        if command not in self.known:
            code, out, err = self.run(f"{command} --json --quiet", capsys)
            place = str(self.path / f"out{self.number}")
            written = digests(Path(place))
            shutil.rmtree(place, ignore_errors=True)
            said = without_times(json.loads(out.replace(place, "OUT"))) if out else err.replace(place, "OUT")
            self.known[command] = code, said, written
        return self.known[command]


def digests(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and file.name not in ("record.json", "quantization.json")
    }


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in ("seconds", "here")}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    path = tmp_path_factory.mktemp("options")
    teacher = small.teacher(path / "teacher")
    rows = [json.loads(line)["text"] for line in small.text(path / "words.jsonl", 240).read_text().splitlines()]
    short = [" ".join(text.split()[:4]) for text in rows]  # several documents in a block
    both = [json.dumps({"text": text, "body": text.upper()}) for text in short]
    (path / "text.jsonl").write_text("\n".join(both))
    (path / "few.jsonl").write_text("\n".join(both[:60]))
    (path / "plain").mkdir()
    for number, text in enumerate(rows[:20]):
        (path / "plain" / f"{number}.txt").write_text(text)
    benches = {name: bench.write(path / name, tasks) for name, tasks in BENCHES.items()}
    (path / "layers.json").write_text('{"layers": [0, 1, 3]}')
    finished = example_run.write(path / "run")
    for name in ("config.json", "model.safetensors"):
        (finished / "student" / name).write_text("{}")
    write_card(read_run(finished))
    names = {
        "M": teacher,
        "T": path / "text.jsonl",
        "W": path / "few.jsonl",
        "P": path / "plain",
        "S": path / "statistics",
        "C": path / "cut",
        "L": path / "layers.json",
        "Q": benches["bench"] / "stories" / "dev.jsonl",
        "B": benches["bench"],
        "H": benches["code"],
        "I": path / "importance" / "imatrix.gguf",
        "R": path / "recipe.yaml",
        "X": finished,
    }
    recipe = {
        "model": str(teacher),
        "data": {"source": str(path / "text.jsonl"), "block_tokens": 16},
        "prune": {"target": "60%"},
        "distill": {"tokens": 4096},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "matmul_flops_per_second", lambda *_: 1e10)  # a measurement, of half a second each
        patch.setattr(constants, "HF_HUB_CACHE", str(hub(path / "hub", teacher)))
        patch.setenv("MINITRON_CACHE", str(path / "cache"))
        patch.chdir(path)
        for command in PREPARED:
            assert main([word.format_map(names) for word in (*command.split(), "--quiet")]) == 0
        yield Desk(path, names)


BENCHES = {"bench": ("winogrande", "stories"), "code": ("humaneval",)}
PREPARED = (
    "calibrate {M} --data {T} --samples 8 --block-tokens 16 --out {S}",
    "prune {M} --shape hidden=24,ffn=24,layers=3 --repair none --statistics {S} --out {C}",
    "quantize {M} --types Q8_0 --no-verify --calibration {T} --samples 2 --block-tokens 16 --out importance",
)


def hub(path: Path, teacher: Path) -> Path:
    """A cache of the hub with a model of two revisions."""
    model = path / "models--me--tiny"
    for revision, layers in (("main", 4), ("old", 3)):
        commit = hashlib.sha1(revision.encode()).hexdigest()
        shutil.copytree(teacher, model / "snapshots" / commit)
        config = json.loads((teacher / "config.json").read_text()) | {"num_hidden_layers": layers}
        (model / "snapshots" / commit / "config.json").write_text(json.dumps(config))
        (model / "snapshots" / commit / "model.safetensors").unlink()
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / revision).write_text(commit)
    return path


CHANGES = [
    pytest.param(command, row, id=f"{command} {option} {number}")
    for command, options in OPTIONS.items()
    for option, rows in options.items()
    for number, row in enumerate(rows)
    if isinstance(row, Changes)
]


@pytest.mark.parametrize(("command", "row"), CHANGES)
def test_an_option_changes_what_comes_of_a_command(
    desk: Desk, capsys: pytest.CaptureFixture[str], command: str, row: Changes
) -> None:
    without = f"{row.base} {row.other}"
    assert desk.outcome(f"{row.base} {row.more}", capsys) != desk.outcome(without.strip(), capsys)


@pytest.mark.parametrize("command", OPTIONS)
def test_an_option_that_could_not_have_an_effect_is_refused_by_its_name(
    desk: Desk, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before = desk.files()
    for row in (row for rows in OPTIONS[command].values() for row in rows if isinstance(row, Refused)):
        code, out, err = desk.run(f"{row.command} --quiet", capsys)
        assert code in (1, 2) and out == "" and row.says in err, (row, err)
        assert err.startswith("usage: " if code == 2 else "error: ") and (code == 2 or err.count("\n") == 1), row
    assert desk.files() == before


SAME_TWICE = (CALIBRATE, f"{PRUNE_BY_TEXT}", DISTILL, EVALUATE, f"{GENERATE} --temperature 3", SEARCH, SIZES)


@pytest.mark.parametrize("command", SAME_TWICE, ids=lambda command: command.split()[0])
def test_a_command_comes_to_the_same_twice(desk: Desk, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """So that what differs is an option's doing."""
    first = desk.outcome(command, capsys)
    del desk.known[command]
    assert first[0] == 0 and desk.outcome(command, capsys) == first


@pytest.mark.parametrize(
    ("shape", "steps", "unread"),
    [
        ({"hidden": 24, "ffn": 24, "heads": 4, "kv_heads": 2}, None, True),
        ({"ffn": 24}, ["ffn_least_squares"], False),
        ({"heads": 4}, ["residual_heads"], False),
    ],
    ids=str,
)
def test_a_criterion_is_refused_exactly_where_the_student_is_the_same_without_it(
    desk: Desk, tmp_path: Path, shape: dict[str, int], steps: list[Any] | None, unread: bool
) -> None:
    students, by_criterion = [], []
    for criterion in ("activation", "random"):
        config, repair = PruneConfig(shape=shape, criterion=criterion), RepairConfig(steps=steps)
        needs = api.needs_of_prune(desk.names["M"], config, repair=repair, statistics_dir=desk.names["S"])
        by_criterion.append(bool(needs.choice.by_criterion))
        api.prune(
            desk.names["M"],
            config,
            DataConfig(source=str(desk.names["T"])),
            repair=repair,
            statistics_dir=desk.names["S"],
            calibration=CalibrateConfig(samples=8),
            out=tmp_path / criterion,
        )
        students.append(digests(tmp_path / criterion)["model.safetensors"])
    assert by_criterion == [not unread] * 2
    assert (students[0] == students[1]) == unread


def test_every_rule_has_a_row_that_it_refuses() -> None:
    rules = {name: [*command.rules] for name, command in COMMANDS.items()}
    rules["prune"] += [*OF_CUT, *OF_CHOICE]
    for command, rule in ((command, rule) for command, found in rules.items() for rule in found):
        named = names_of(command)
        if command == "evaluate":
            del named["--data"]  # with it there is text to measure, so that its rule never refuses it
        for option, name in named.items():
            if any(fnmatchcase(name, one) for one in rule.names):
                assert any(isinstance(row, Refused) for row in OPTIONS[command][option]), (command, option)
        alone = [one for one in rule.names if not any(fnmatchcase(name, one) for name in named.values())]
        said = [row.says.split()[0] for row in OPTIONS[command].get("--set", []) if isinstance(row, Refused)]
        assert not alone or any(fnmatchcase(key, one) for one in alone for key in said), (command, alone)


def names_of(command: str) -> dict[str, str]:
    """Of each option of a command, what rules call it: the recipe key that it says, or what argparse keeps it under."""
    parser = subparsers()[command]
    says = parser.get_default("says")
    return {
        next(name for name in action.option_strings if name.startswith("--")): (
            says[action.dest].key if action.dest in says else action.dest
        )
        for action in parser._actions
        if action.option_strings
    }


def test_what_all_commands_have_works(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    plain, as_json = (desk.run(f"inspect {{M}}{option}", capsys)[1] for option in ("", " --json"))
    assert json.loads(as_json)["family"] == "llama" and not plain.startswith("{")
    loud, quiet = (desk.run(f"{CALIBRATE}{option}", capsys)[2] for option in ("", " --quiet"))
    assert "data ..." in loud and quiet == ""
    before = logging.get_verbosity()
    for option, verbosity in (("-qv", logging.INFO), ("", logging.ERROR)):
        logging.set_verbosity(logging.INFO)
        desk.run(f"inspect {{M}} {option}", capsys)
        assert logging.get_verbosity() == verbosity
    logging.set_verbosity(before)
    for parser in subparsers().values():
        assert {action.dest for action in parser._actions} >= {"json", "quiet", "verbose"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "evaluate {M} --data {T} --data {P}",
            "--data is given 2 times, and only the last would be read; give it once",
        ),
        ("quantize {M} --types Q8_0 --types F16 --dry-run", "--types is given 2 times, .*, with its values behind it"),
        ("quantize {M} --types Q8_0 --verify --no-verify --dry-run", "--verify is given 2 times"),
        (
            "compress {M} --target-params 60% --dry-run --set model=other",
            "MODEL and --set model=other say the same thing, and only --set would be read: give one",
        ),
    ],
)
def test_what_is_said_twice_is_refused(
    desk: Desk, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    code, _, err = desk.run(command, capsys)
    assert code == 1 and re.search(message, err), err


def test_what_is_said_twice_in_the_same_way_is_not(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("inspect {M} --json --json -q -q", capsys)[0] == 0


def test_an_option_that_says_a_key_has_its_default() -> None:
    """But for what the command presets, and for options that say nothing until they are given."""
    for command in subparsers():
        parser = subparsers()[command]
        for dest, said in parser.get_default("says").items():
            field, found = recipe_field(said.key), parser.get_default(dest)
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            assert found in (parser.get_default("preset").get(said.key, default), None, [])


def test_a_default_that_is_stated_is_an_option_that_was_given() -> None:
    parser = build_parser()
    words = ["calibrate", "m", "--out", "o", "--text-field", "text", "--samp", "1024", "--no-second-moment"]
    args = parser.parse_args(words)
    given = given_options(args.parser, args, words[1:])
    assert given == {
        "model": ["m"], "out": [Path("o")], "text_field": ["text"], "samples": [1024], "second_moment": [False]
    }  # fmt: skip


README = Path(__file__).parents[2] / "README.md"
BASE: dict[str, Any] = {"model": "m", "prune": {"target": "50%"}}
SHAPED: dict[str, Any] = {"model": "m", "prune": {"shape": {"ffn": 8}}}
SEARCHED = "search.level=distilled"
SIZES = ("prune.target=null", "prune.shape={ffn: 8}")


@dataclass(frozen=True)
class Key:
    """A value that differs from the default, what else is set where it could not have an effect, and where it can."""

    value: str
    idle: tuple[str, ...] = ()
    used: tuple[str, ...] = ()


KEY_ROWS = {
    "revision": Key("old", idle=("model=.",)),
    "data.text_field": Key("body", used=("data.source=me/texts",)),
    "data.max_document_chars": Key("300", idle=("data.source=me/texts",), used=(f"data.source={README}",)),
    "data.heldout_fraction": Key("0.1", idle=("data.heldout=a.jsonl",)),
    **{
        f"data.sample_{key}": Key(value, used=("data.source=teacher",))
        for key, value in {"temperature": "0.5", "top_k": "5", "top_p": "0.5", "batch": "2"}.items()
    },
    "prune.sequence_aggregate": Key("l2", idle=("prune.criterion=magnitude",)),
    "prune.batch_aggregate": Key("mean", idle=("prune.criterion=random",)),
    "prune.seed": Key("1", used=("prune.criterion=random",)),
    "prune.layer_samples": Key("8", used=("prune.layer_criterion=loss",)),
    **{
        f"prune.{dim}_multiple": Key("8", idle=SIZES)
        for dim in ("hidden", "ffn")
    },
    **{
        f"search.{key}": Key(value, idle=SIZES, used=(SEARCHED,))
        for key, value in {
            "window": "0.1", "least": "30%", "max_memory_bytes": "1e9", "bytes_per_parameter": "0.5",
            "max_kv_cache_bytes": "1e9", "max_decode_seconds": "0.1", "max_prefill_seconds": "0.1",
            "context_tokens": "100", "batch": "2", "bytes_per_second": "1e9", "flops_per_second": "1e9",
            "dims": "{ffn: '8'}", "gguf_block": "32", "cut_candidates": "2", "distill_candidates": "2",
            "first_rung": "0.1", "judge_blocks": "2", "level": "cut",
        }.items()
    },
    **{
        f"distill.{key}": Key(value, idle=("distill.loss=cross_entropy",))
        for key, value in {"teacher": "recorded", "top_k": "5", "intermediate": "all"}.items()
    },
    "distill.temperature": Key("2.0", idle=("distill.loss={mse: 1.0, cross_entropy: 0.5}",)),
    "distill.jensen_shannon_beta": Key("0.1", used=("distill.loss=jensen_shannon",)),
    "distill.top_k_tail": Key("false", used=("distill.teacher=recorded",)),
    **{
        f"distill.correction_{key}": Key(value, used=("distill.correction=before",))
        for key, value in {"tokens": "500", "learning_rate": "0.1", "warmup_steps": "3"}.items()
    },
    "distill.scratch_learning_rate": Key("0.1", used=("scratch_baseline=true",)),
    "evaluate.new_tokens": Key("5", idle=("evaluate.prompts=[]",)),
    "evaluate.limit": Key("5", used=("evaluate.tasks=[piqa]",)),
    "evaluate.allow_code": Key("true", used=("evaluate.tasks_dir=rows",)),
    **{
        f"gguf.{key}": Key(value, used=("gguf.types=[F16]",))
        for key, value in {
            "tensor_types": "{output: F16}", "samples": "2", "blocks": "2", "verify": "false", "pre": "gpt-2",
            "threads": "1",
        }.items()
    },
}  # fmt: skip


def test_a_key_that_could_not_have_an_effect_is_refused_by_its_name() -> None:
    for name in KEY_ROWS:
        row = KEY_ROWS[name]
        said = f"{name}={row.value}"
        with pytest.raises(NoEffect, match=rf"^{name} has an effect only .*; leave it out, or "):
            require_recipe_effects(build_recipe(BASE, [*row.idle, said]))
        require_recipe_effects(build_recipe(BASE, [*row.used, said]))
        section, _, key = name.rpartition(".")
        default = build_recipe(BASE).model_dump(mode="json")
        stated = json.dumps((default[section] if section else default)[key])
        require_recipe_effects(build_recipe(BASE, [*row.idle, f"{name}={stated}"]))


def test_every_rule_of_keys_has_a_row() -> None:
    rules = (*OF_RECIPE, *OF_DISTILL, *OF_DISTILL_ALONE)
    assert {name for rule in rules for name in rule.names} == KEY_ROWS.keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["search.level=predicted", "search.first_rung=0.1"],
            "search.first_rung .* distilled; leave it out, or set se",
        ),
        (["search.level=predicted", "search.judge_blocks=2"], "search.judge_blocks .* where candidates are cut"),
        (["search.level=cut", "search.least=30%", "search.window=0.1"], "search.window .* without search.least"),
        (["gguf.types=[F16]", "gguf.verify=false", "gguf.blocks=2"], "gguf.blocks .* run in llama.cpp"),
    ],
)
def test_a_key_may_need_several_others(overrides: list[str], message: str) -> None:
    with pytest.raises(NoEffect, match=message):
        require_recipe_effects(build_recipe(BASE, overrides))


RECIPES = {path.stem: load_recipe(path) for path in SHIPPED.glob("*.yaml")}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_ship_have_no_key_without_effect_as_they_are_and_with_every_default_stated(
    name: str, tmp_path: Path
) -> None:
    require_recipe_effects(RECIPES[name])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(RECIPES[name]))
    require_recipe_effects(load_recipe(tmp_path / "recipe.yaml"))


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: m\nprune:\n  target: 50%\n  target: 60%\n")
    with pytest.raises(RecipeError, match="is not YAML: in the mapping at line 3, key 'target' is there twice"):
        load_recipe(tmp_path / "recipe.yaml")


EVERYTHING: dict[str, Any] = {
    "scratch_baseline": True,
    "calibrate": {"samples": 40},
    "prune": {"target": "60%"},
    "search": {
        "level": "distilled",
        "window": 0.6,
        "dims": {"ffn": "24", "hidden": "32", "heads": "8", "layers": "2,3"},
        "bytes_per_second": 1e9,
        "flops_per_second": 1e9,
        "judge_blocks": 2,
    },
    "distill": {"tokens": 256, "batch_blocks": 4, "evaluate_blocks": 1, "intermediate": "off"},
    "evaluate": {"blocks": 2, "prompts": ["the"], "new_tokens": 2, "speed": False, "limit": 2},
    "gguf": {"types": ["F16"], "verify": False, "samples": 2},
}
FURTHER = (
    "calibrate {M} --data teacher --samples 1 --block-tokens 16 --out sampled",
    "calibrate {M} --data {P} --samples 1 --block-tokens 16 --out plainly",
    "distill --teacher {M} --student {C} --data {T} --block-tokens 16 --tokens 64 --set distill.batch_blocks=4 "
    "--set distill.correction=parallel --set distill.evaluate_blocks=1 --set distill.intermediate=off --out taught",
    "prune {M} --shape layers=3 --data {T} --samples 1 --layer-criterion task --layer-task {Q} --out fewer",
    "prune {M} --shape hidden=16 --data {T} --samples 1 --criterion random --repair none --out drawn",
)


@dataclass
class Everything:
    """What a run and further commands read of sections, by the section's class, and where the run is."""

    keys: set[tuple[str, str]]
    out: Path


@pytest.fixture(scope="module")
def everything(desk: Desk) -> Everything:
    keys: set[tuple[str, str]] = set()
    rules = {effects.__file__, recipe_rules.__file__}

    def read(section: Section, name: str) -> Any:
        if not name.startswith("_") and sys._getframe(1).f_code.co_filename not in rules:
            keys.update({(type(section).__name__, name)} if name in type(section).model_fields else ())
        return object.__getattribute__(section, name)

    raw = {"model": str(desk.names["M"]), "data": {"source": str(desk.names["T"]), "block_tokens": 16}, **EVERYTHING}
    raw["evaluate"] = raw["evaluate"] | {"tasks_dir": str(desk.names["B"])}
    (desk.path / "everything.yaml").write_text(yaml.safe_dump(raw))
    out = desk.path / "everything"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk.path)
        patch.setattr(Section, "__getattribute__", read)
        for command in (f"run everything.yaml --out {out}", *FURTHER):
            assert main([word.format_map(desk.names) for word in (*shlex.split(command), "--quiet")]) == 0
    return Everything(keys, out)


def keys_of(section: type[Section]) -> Iterator[tuple[str, str]]:
    for name, info in section.model_fields.items():
        yield section.__name__, name
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from keys_of(info.annotation)


def test_every_recipe_key_is_read_outside_of_the_rules(everything: Everything) -> None:
    assert set(keys_of(Recipe)) - everything.keys == set()


def test_the_recipe_that_a_run_leaves_runs_again(desk: Desk, everything: Everything) -> None:
    """With what its search left behind, and with the baseline's learning rate where there is no baseline."""
    left = load_recipe(everything.out / "recipe.yaml")
    assert not left.searches and {"search.window", "search.dims"} <= changed_keys(left)
    require_recipe_effects(left)
    require_recipe_effects(load_recipe(everything.out / "recipe.yaml", ["scratch_baseline=false"]))
    assert main(["run", str(everything.out / "recipe.yaml"), "--dry-run", "--quiet"]) == 0


def documented() -> list[str]:
    """Commands in README and docs, each on one line, and the examples of `--help`."""
    root = Path(__file__).parents[2]
    text = "\n".join(file.read_text() for file in (root / "README.md", *sorted((root / "docs").rglob("*.md"))))
    found = re.findall(r"(?:^|[ /`])minitron ([a-z]+ [^`|\n#]*)", text.replace("\\\n", " "), re.MULTILINE)
    examples = [command.example.removeprefix("minitron ") for command in COMMANDS.values()]
    whole = [line for line in found if re.match(r"(distill --teacher|[a-z]+ [^- ]\S* .*--)", line)]
    return [re.sub(r"\bN\b", "64", line.strip()) for line in whole if line.split()[0] in OPTIONS] + examples


def test_no_option_of_a_documented_command_is_without_effect() -> None:
    for line in sorted({line for line in documented() if "..." not in line}):
        words, parser = shlex.split(line), build_parser()
        args = parser.parse_args(words)
        args.given = given_options(args.parser, args, words[1:])
        require_options(args)
