"""A program that uses every verb of the library; mypy checks it against the package as it is installed."""

from pathlib import Path

import minitron


def shrink(model: str, work: Path) -> Path:
    """Run the steps one by one, and return the student's directory."""
    text = minitron.DataConfig(source="corpus.jsonl", block_tokens=128)
    statistics: minitron.Statistics = minitron.calibrate(
        model, text, minitron.CalibrateConfig(samples=64), seed=0, out=work / "statistics"
    )
    ranking = minitron.search(
        model,
        prune=minitron.PruneConfig(target="50%"),
        search=minitron.SearchConfig(window=0.3),
        statistics_dir=work / "statistics",
        data_config=None,
    )
    plan, facts = minitron.prune(
        model,
        config=minitron.PruneConfig(target="50%"),
        repair=minitron.RepairConfig(),
        plan_file=None,
        statistics_dir=work / "statistics",
        data_config=lambda: text,
        out=work / "pruned",
    )
    shape: minitron.Shape = plan.student
    config = minitron.DistillConfig(tokens=1_000_000, loss="forward_kl")
    trained = minitron.distill(model, str(work / "pruned"), text, config, seed=0, out=work / "student")
    print(statistics.tokens + shape.hidden, ranking["candidates"], facts, trained["training"])
    return work / "student"


def measure(student: str, teacher: str, work: Path) -> str:
    """Measure the student, quantize it and write a text."""
    text = minitron.DataConfig(source="heldout.jsonl")
    tasks = minitron.benchmark(student, teacher, ["piqa"], None, minitron.TaskOptions(limit=10), cache=None)
    quality = minitron.evaluate(student, teacher, text, blocks=None)
    files = minitron.quantize(
        student, minitron.QuantizeConfig(types=["Q8_0"]), text, importance_file=None, out=work / "gguf"
    )
    speed = minitron.measure_speed(student, teacher, rounds=3)
    print(tasks["tasks"], quality["lm_loss"], files["files"], speed["rows"])
    return minitron.generate(student, "Once", new_tokens=10, temperature=0.0, seed=0)


class Lines:
    """A listener prints what a run reports."""

    def stage(self, name: str, state: str) -> None:
        print(name, state)

    def progress(self, done: int, total: int, note: str = "") -> None:
        print(done, total, note)

    def warn(self, text: str) -> None:
        print(text)


def run(path: Path, listener: minitron.Listener) -> float:
    """Run a recipe and return the student's loss."""
    recipe: minitron.Recipe = minitron.load_recipe(path, ["distill.tokens=1000"])
    try:
        records = minitron.run(recipe, Path("runs/half"), listener)
    except minitron.MinitronError as error:
        raise SystemExit(str(error)) from None
    return records.evaluations["student"].lm_loss


def sizes(path: Path) -> tuple[int, minitron.Architecture]:
    checkpoint: minitron.Checkpoint = minitron.open_checkpoint(path)
    print(minitron.inspect(path)["parameters"], minitron.FAMILIES["llama"].tied(checkpoint.config))
    recipe = minitron.build_recipe({"model": str(minitron.DEMO_TEACHER), "prune": {"target": "50%"}})
    print(recipe.prune.target, minitron.Plan.load(path / "plan.json").layers, Lines())
    return checkpoint.parameters.total, checkpoint.architecture


if __name__ == "__main__":
    run(Path("recipe.yaml"), Lines())
