"""What `import minitron` offers."""

import minitron


def test_the_public_names_are_these_and_all_of_them_are_there() -> None:
    assert minitron.__all__ == [
        "Architecture",
        "Checkpoint",
        "Evaluation",
        "FAMILIES",
        "MinitronError",
        "Plan",
        "Recipe",
        "Scores",
        "Shape",
        "Statistics",
        "load_recipe",
        "open_checkpoint",
    ]
    assert isinstance(minitron.FAMILIES, dict)
    for name in set(minitron.__all__) - {"FAMILIES"}:
        assert getattr(minitron, name).__module__.startswith("minitron.")
