"""The benchmark values that the papers report of their models, in per cent, by the harness's names of tasks.

Paper: P1 (arXiv:2407.14679) and P2 (arXiv:2408.11796), the tables of base models; shots and metrics are those of
    evaluation/tasks/suite.py. A value that a paper does not report is missing.
"""

_TASKS = (
    *("winogrande", "arc_challenge", "mmlu", "hellaswag", "gsm8k"),
    *("truthfulqa_mc2", "xlsum_english", "mbpp", "humaneval"),
)
_ROWS: dict[str, tuple[float | None, ...]] = {
    "Nemotron-4 15B": (83.6, 58.8, 66.6, 84.6, 48.5, 40.7, 32.0, 38.0, 35.4),
    "Minitron-8B": (79.0, 52.6, 63.8, 80.7, 51.3, 42.6, 31.2, 35.2, 31.6),
    "Minitron-4B": (74.0, 50.9, 58.6, 75.0, 24.1, 42.9, 29.5, 28.2, 23.3),
    "Llama-3.1-8B": (77.3, 57.9, 65.3, 81.8, 48.6, 45.0, 30.0, 42.3, 24.8),
    "Llama-3.1-Minitron-4B-Width": (73.5, 55.6, 60.5, 76.1, 41.2, 42.9, 28.7, 32.0, None),
    "Llama-3.1-Minitron-4B-Depth": (72.1, 52.6, 58.7, 73.2, 16.8, 38.2, 27.2, None, None),
    "Mistral-NeMo-12B": (82.2, 65.1, 69.0, 85.2, 56.4, 49.8, 33.4, 42.6, 23.8),
    "Mistral-NeMo-Minitron-8B": (80.4, 64.4, 69.5, 83.0, 58.5, 47.6, 32.0, 43.8, 36.2),
}
PUBLISHED: dict[str, dict[str, float]] = {
    model: {task: value for task, value in zip(_TASKS, row, strict=True) if value is not None}
    for model, row in _ROWS.items()
}
# Task -> its dataset on the hub, for a model card.
DATASETS = {
    "winogrande": "allenai/winogrande",
    "arc_challenge": "allenai/ai2_arc",
    "mmlu": "cais/mmlu",
    "hellaswag": "Rowan/hellaswag",
    "gsm8k": "openai/gsm8k",
    "truthfulqa_mc2": "truthfulqa/truthful_qa",
    "xlsum_english": "csebuetnlp/xlsum",
    "mbpp": "google-research-datasets/mbpp",
    "humaneval": "openai/openai_humaneval",
}
