"""A program that uses every verb of the library; mypy checks it against the package as it is installed."""

from pathlib import Path

import minitron


def shrink(model: str, work: Path) -> Path:
    """Run the steps one by one, and return the student's directory."""
    described = minitron.inspect(model)
    assert isinstance(described, minitron.Inspected)
    shape: minitron.Shape = described.description.shape
    text = minitron.DataConfig(source="corpus.jsonl", block_tokens=128)
    statistics: minitron.Statistics = minitron.calibrate(
        model, text, minitron.CalibrateConfig(samples=64), out=work / "statistics"
    )
    half = minitron.PruneConfig(target="50%")
    ranking: minitron.Ranking = minitron.search(
        model, prune=half, search=minitron.SearchConfig(window=0.3), statistics_dir=work / "statistics"
    )
    found: minitron.Shape = ranking.candidates[0].candidate.shape
    needs = minitron.needs_of_prune(model, half)
    cut: minitron.Pruned = minitron.prune(model, half, text if needs.text else None, out=work / "pruned")
    plan: minitron.Plan = cut.plan
    config = minitron.DistillConfig(tokens=1_000_000, loss="forward_kl")
    trained = minitron.distill(model, cut.out, text, config, out=work / "student")
    assert trained is not None
    steps: int = trained.training.steps
    print(shape.hidden, found.hidden, plan.student.hidden, statistics.tokens, steps, cut.repairs, trained.corrected)
    return trained.out


def measure(student: Path, teacher: str, work: Path) -> str:
    """Measure the student, quantize it and write a text."""
    text = minitron.DataConfig(source="heldout.jsonl")
    tasks: minitron.BenchmarkResult = minitron.benchmark(
        student, ["piqa"], minitron.TaskOptions(limit=10), teacher=teacher
    )
    quality: minitron.Evaluation = minitron.evaluate(student, text, teacher=teacher)
    types = minitron.QuantizeConfig(types=["Q8_0"])
    planned: int = minitron.plan_quantized(student, types)[0].bytes
    files: minitron.QuantizedModel = minitron.quantize(student, types, text, out=work / "gguf")
    speed: minitron.SpeedResult = minitron.measure_speed(str(student), teacher)
    loss: float = quality.lm_loss
    print(tasks.tasks["piqa"].n, loss, planned, files.files[0].bytes, speed.rows[0].speeds)
    return minitron.generate(student, "Once", new_tokens=10)


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
    """Count a checkpoint's parameters."""
    checkpoint: minitron.Checkpoint = minitron.open_checkpoint(path)
    print(minitron.FAMILIES["llama"].tied(checkpoint.config))
    recipe = minitron.build_recipe({"model": str(minitron.DEMO_TEACHER), "prune": {"target": "50%"}})
    print(recipe.prune.target, minitron.Plan.load(path / "plan.json").layers)
    return checkpoint.parameters.total, checkpoint.architecture


if __name__ == "__main__":
    run(Path("recipe.yaml"), Lines())
