"""`minitron prune` cuts a model to a shape, a plan or a target, and repairs the cut."""

import argparse
from typing import Any

from minitron.cli import options, parse
from minitron.cli.command import Command
from minitron.cli.console import Console
from minitron.cli.rules import NOT_KEPT, ROWS, require_rules
from minitron.core.effects import Rule

# Of what the cut needs, which is known once the model is open.
OF_CUT: tuple[Rule[Any], ...] = (
    Rule(
        ("data.*", "calibrate.*"),
        lambda needs: needs.text,
        "where the cut reads text to score or to repair, and this one does not",
    ),
    Rule(
        ("statistics",),
        lambda needs: needs.statistics,
        "where units are scored or a repair is fitted, and this cut needs neither",
    ),
    Rule(
        ("repair.steps",),
        lambda needs: bool(needs.choice.repairs),
        "with steps that repair what is cut, and here they do not",
        "name others",
    ),
)


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_target(parser)
    options.add_key(
        parser,
        "prune.shape",
        "--shape",
        type=parse.shape,
        metavar="SIZES",
        help="such as hidden=3072,ffn=9216; dims not named stay",
    )
    options.add_key(
        parser,
        "prune.drop_layers",
        "--layers",
        type=parse.layers,
        says=lambda keys: keys,
        metavar="LAYERS",
        help="drop=15-30 or keep=0-14,31, numbered from 0",
    )
    parser.add_argument(
        "--plan",
        type=parse.path,
        metavar="FILE",
        help='a plan.json, or one that lists units of some dims, such as {"layers": [0, 1, 3]}',
    )
    options.add_key(parser, "prune.criterion", "--criterion", metavar="NAME")
    options.add_key(parser, "prune.layer_criterion", "--layer-criterion", metavar="NAME")
    options.add_key(parser, "prune.layer_task", "--layer-task", type=parse.named, metavar="TASK")
    options.add_key(parser, "prune.iterations", "--iterations", type=parse.count, metavar="N")
    options.add_key(
        parser,
        "repair.steps",
        "--repair",
        type=parse.repair_steps,
        metavar="STEPS",
        help="auto (default), none, or a list such as basis,ffn_obs,heads_obs; see docs/reference/recipe.md",
    )
    parser.add_argument(
        "--statistics", type=parse.path, metavar="DIR", help="directory that `minitron calibrate` wrote"
    )
    options.add_data(parser, blocks=False)
    options.add_key(
        parser,
        "calibrate.samples",
        "--samples",
        type=parse.count,
        metavar="N",
        help="blocks of text for statistics and repair; default %(default)s",
    )
    options.add_set(parser, "data", "prune", "calibrate", "repair")
    parser.add_argument("--out", type=parse.path, required=True, metavar="DIR", help="directory of the student")


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron import api
    from minitron.model.describe import K_BLOCK, sizes_beyond_blocks

    asked = args.asked
    _require_one_aim(args)
    needs = api.needs_of_prune(
        args.model, asked.prune, repair=asked.repair, plan_file=args.plan, statistics_dir=args.statistics
    )
    require_cut_options(args, needs)
    made = api.prune(
        args.model,
        asked.prune,
        options.data_config(args, console) if needs.text else None,
        out=args.out,
        repair=asked.repair,
        calibration=asked.calibrate,
        plan_file=args.plan,
        statistics_dir=args.statistics,
        listener=console,
    )
    facts = {"out": str(args.out), "plan": str(made.plan)} | made.description.to_dict() | {"repairs": made.repairs}
    lines = [str(made.plan), f"{made.description.parameters.non_embedding:,} non-embedding parameters: {args.out}"]
    lines += (
        f"rows of {size:,} ({dim}) make no whole blocks of {K_BLOCK}: in GGUF files of K types they get larger types"
        for dim, size in sizes_beyond_blocks(made.plan.teacher, made.plan.student).items()
    )
    console.result(facts, "\n".join(lines))


def _require_one_aim(args: argparse.Namespace) -> None:
    """Exit with the usage where no option says what to cut, or two do."""
    prune = args.asked.prune
    listed = {
        "shape": prune.shape,
        "layers": prune.drop_layers or prune.keep_layers,
        "plan": args.plan,
    }
    units = [name for name, value in listed.items() if value]
    if not units and not prune.target:
        args.parser.error("one of the arguments --target-params --shape --layers --plan is required")
    if units and prune.target:
        args.parser.error(f"argument --{units[0]}: not allowed with argument --target-params")


def require_cut_options(args: argparse.Namespace, needs: Any) -> None:
    """Refuse options that the cut has no use for.

    Args:
        needs: a `CutNeeds`, which is known once the model is open.

    Raises: NoEffect.
    """
    from minitron.pipeline.rules import OF_CHOICE

    require_rules(args, OF_CHOICE, needs.choice)
    nothing_asked = () if args.asked.repair.steps else ("repair.steps",)
    require_rules(args, OF_CUT, needs, besides=nothing_asked)


COMMAND = Command(
    help="cut a model to a shape, a plan or a parameter target, and repair the cut",
    example="minitron prune ./my-model --shape hidden=3072,ffn=9216 --data corpus.jsonl --out pruned",
    add_options=_add_options,
    run=_run,
    rules=(NOT_KEPT, ROWS),
)
