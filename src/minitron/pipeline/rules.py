"""Recipe keys that have an effect only together with others are refused where they could not have one.

The recipe.yaml of a run is a recipe too. It holds resolved values and the shape that a search found; keys that it left
behind are no request, and are let through.
"""

from pathlib import Path

from minitron.core.effects import Rule, changed_keys, require_effects
from minitron.core.text import both, either
from minitron.data.config import DataConfig
from minitron.data.sources import BUILTIN, TEACHER, is_hub_id
from minitron.data.writing import source_files
from minitron.distillation.config import DistillConfig
from minitron.distillation.losses import LOSSES, losses_that_read
from minitron.model.architecture import PRUNABLE
from minitron.pruning.depth import LAYER_CRITERIA, layer_criteria_that_read
from minitron.pruning.importance import CRITERIA, criteria_that_take
from minitron.pruning.repair import REPAIRS
from minitron.pruning.steps import Choice
from minitron.recipe import Recipe
from minitron.shapes.space import SearchConfig

ROWS, PLAIN = (".jsonl", ".parquet"), (".txt", ".md")  # suffixes of text that is rows, and of text that is one piece


def reads_rows(config: DataConfig) -> bool:
    """Tell whether the text may be rows with fields, as a dataset, or a source that is not there, may be."""
    return _reads(config, ROWS)


def reads_plain_text(config: DataConfig) -> bool:
    return _reads(config, PLAIN)


def _reads(config: DataConfig, suffixes: tuple[str, ...]) -> bool:
    for source in {config.source, config.heldout} - {None, BUILTIN, TEACHER}:
        assert source is not None
        found = {file.suffix.casefold() for file in source_files(DataConfig(source=source))}
        if not found or found & set(suffixes):
            return not is_hub_id(source) or suffixes == ROWS
    return False


def is_local(model: str) -> bool:
    return Path(model).expanduser().exists()


def _searches(recipe: Recipe, *levels: str) -> bool:
    return (recipe.searches and recipe.search.level in levels) or _is_found(recipe)


def _is_found(recipe: Recipe) -> bool:
    """Tell whether a search may have found the shape: the recipe then says how, and does not search again."""
    shape = recipe.prune.shape or {}
    return recipe.prune.target is None and shape.keys() == set(PRUNABLE)


def _is_resolved(config: DistillConfig) -> bool:
    """Tell whether every default is filled in, as a run does, the baseline's learning rate included."""
    filled = ("tokens", "batch_blocks", "learning_rate", "min_learning_rate", "warmup_steps", "intermediate")
    return all(getattr(config, key) is not None for key in (*filled, "evaluate_steps", "checkpoint_steps"))


def _keys(section: str, *keys: str) -> tuple[str, ...]:
    return tuple(f"{section}.{key}" for key in keys)


_SEARCHED = tuple(SearchConfig.model_fields)

OF_DISTILL: tuple[Rule[DistillConfig], ...] = (
    Rule(
        _keys("distill", "teacher", "top_k"),
        lambda config: config.objective.needs_teacher,
        "with a loss that asks the teacher, and distill.loss=cross_entropy does not",
        "choose another distill.loss",
    ),
    Rule(
        _keys("distill", "intermediate"),
        lambda config: config.objective.needs_teacher or config.intermediate == "off",
        "with a loss that asks the teacher, and distill.loss=cross_entropy does not",
        "choose another distill.loss",
    ),
    Rule(
        _keys("distill", "temperature"),
        lambda config: "distributions" in config.objective.reads,
        f"with a distill.loss of {', '.join(losses_that_read('distributions'))}",
        "choose one of them",
    ),
    Rule(
        _keys("distill", "jensen_shannon_beta"),
        lambda config: any("beta" in LOSSES[name].options for name in config.objective.terms),
        f"with distill.loss={either(name for name, loss in LOSSES.items() if 'beta' in loss.options)}",
        "choose that",
    ),
    Rule(
        _keys("distill", "top_k_tail"),
        lambda config: config.objective.needs_teacher and (config.top_k is not None or config.teacher == "recorded"),
        "where only the likeliest tokens are compared",
        "set distill.top_k, or distill.teacher=recorded",
    ),
    Rule(
        _keys("distill", "correction_tokens", "correction_learning_rate", "correction_warmup_steps"),
        lambda config: config.correction is not None,
        "while the teacher is corrected",
        "set distill.correction to before or parallel",
    ),
)
# Of a distillation by itself, which has no baseline.
OF_DISTILL_ALONE: tuple[Rule[DistillConfig], ...] = (
    *OF_DISTILL,
    Rule(_keys("distill", "scratch_learning_rate"), lambda config: False, "in a run with scratch_baseline"),
)
OF_RECIPE: tuple[Rule[Recipe], ...] = (
    Rule(
        ("revision",),
        lambda recipe: not is_local(recipe.model),
        "with a hub id, and the model is local",
        "give a hub id",
    ),
    Rule(
        _keys("data", "text_field"),
        lambda recipe: reads_rows(recipe.data),
        "where the text is .jsonl, .parquet or a dataset",
        "give such text as data.source",
    ),
    Rule(
        _keys("data", "max_document_chars"),
        lambda recipe: reads_plain_text(recipe.data),
        "where the text is .txt or .md",
        "give such text as data.source",
    ),
    Rule(
        _keys("data", "heldout_fraction"),
        lambda recipe: recipe.data.heldout is None,
        "without data.heldout, which is held out whole",
        "leave out data.heldout",
    ),
    Rule(
        _keys("data", "sample_temperature", "sample_top_k", "sample_top_p", "sample_batch"),
        lambda recipe: recipe.data.source == TEACHER,
        "where the text is sampled from the teacher",
        "set data.source=teacher",
    ),
    Rule(
        _keys("prune", "sequence_aggregate", "batch_aggregate"),
        lambda recipe: "batch_aggregate" in CRITERIA[recipe.prune.criterion].options,
        f"with prune.criterion={either(criteria_that_take('batch_aggregate'))}",
        "choose that",
    ),
    Rule(
        _keys("prune", "seed"),
        lambda recipe: "seed" in CRITERIA[recipe.prune.criterion].options,
        f"with prune.criterion={either(criteria_that_take('seed'))}",
        "choose that",
    ),
    Rule(
        _keys("prune", "layer_samples"),
        lambda recipe: LAYER_CRITERIA[recipe.prune.layer_criterion].needs_a_pass,
        f"with a prune.layer_criterion of {either(layer_criteria_that_read('text', 'questions'))}",
        "choose one of them",
    ),
    Rule(
        _keys("prune", "hidden_multiple", "ffn_multiple"),
        lambda recipe: _searches(recipe, "predicted", "cut", "distilled"),
        "where the shape is searched for",
        "give prune.target instead of sizes",
    ),
    Rule(
        _keys("search", *_SEARCHED),
        lambda recipe: _searches(recipe, "predicted", "cut", "distilled"),
        "where the shape is searched for",
        "give prune.target instead of sizes",
    ),
    Rule(
        _keys("search", "window"),
        lambda recipe: (recipe.prune.target is not None and recipe.search.least is None) or _is_found(recipe),
        "with prune.target and without search.least",
        "give prune.target and no search.least",
    ),
    Rule(
        _keys("search", "cut_candidates", "judge_blocks"),
        lambda recipe: _searches(recipe, "cut", "distilled"),
        "where candidates are cut",
        "set search.level to cut or distilled",
    ),
    Rule(
        _keys("search", "distill_candidates", "first_rung"),
        lambda recipe: _searches(recipe, "distilled"),
        "where candidates are distilled",
        "set search.level=distilled",
    ),
    Rule(
        _keys("distill", "scratch_learning_rate"),
        lambda recipe: recipe.scratch_baseline or _is_resolved(recipe.distill),
        "with scratch_baseline",
        "set scratch_baseline=true",
    ),
    Rule(
        _keys("evaluate", "new_tokens"),
        lambda recipe: bool(recipe.evaluate.prompts),
        "where there are prompts to continue",
        "give evaluate.prompts",
    ),
    Rule(
        _keys("evaluate", "limit", "allow_code"),
        lambda recipe: recipe.evaluate.benchmarks,
        "with benchmarks",
        "give evaluate.tasks or evaluate.tasks_dir",
    ),
    Rule(
        _keys("gguf", "tensor_types", "samples", "blocks", "verify", "pre", "threads"),
        lambda recipe: recipe.gguf.wanted,
        "where GGUF files are written",
        "give gguf.types, gguf.bits_per_weight or gguf.sizes",
    ),
    Rule(
        _keys("gguf", "blocks"),
        lambda recipe: recipe.gguf.verify,
        "where the files are run in llama.cpp",
        "leave out gguf.verify=false",
    ),
)
OF_CHOICE: tuple[Rule[Choice], ...] = (
    Rule(
        _keys("prune", "criterion", "sequence_aggregate", "batch_aggregate", "seed"),
        lambda choice: bool(choice.by_criterion),
        "where units of what is cut are left for it to choose: the repairs "
        f"{both(step for step, repair in REPAIRS.items() if repair.chooses)} choose by themselves, and listed units "
        "are not chosen",
        "leave those repairs out",
    ),
    Rule(
        _keys("prune", "layer_criterion", "layer_task", "layer_samples"),
        lambda choice: choice.layers,
        "where it chooses layers, and here none are cut, or they are given by number",
        "cut layers by their count",
    ),
    Rule(
        _keys("prune", "iterations"),
        lambda choice: choice.steps > 1,
        "where there is a shape between the teacher's and the student's that scores can be taken of, and here all is "
        "cut at once",
    ),
)


def require_recipe_effects(recipe: Recipe) -> None:
    """Refuse keys that differ from their defaults and could not change anything.

    Raises: NoEffect.
    """
    given = changed_keys(recipe)
    require_effects(given, OF_RECIPE, recipe)
    require_effects(given, OF_DISTILL, recipe.distill)


def require_distill_effects(config: DistillConfig) -> None:
    """Refuse keys of a distillation by itself that could not change anything.

    Raises: NoEffect.
    """
    require_effects({f"distill.{key}" for key in changed_keys(config)}, OF_DISTILL_ALONE, config)


def require_choice_effects(recipe: Recipe, choice: Choice) -> None:
    """Refuse keys that could not change anything because the cut leaves nothing to choose.

    Raises: NoEffect.
    """
    require_effects(changed_keys(recipe), OF_CHOICE, choice)
