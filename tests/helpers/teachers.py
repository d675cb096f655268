"""Shapes of teachers that exist, as (family, shape, tied head), and one small enough to count by hand."""

from minitron.model.architecture import Shape

TEACHER = Shape(layers=4, hidden=32, ffn=40, heads=8, kv_heads=4, head_dim=4, vocab=320)
REAL = {
    "llama-3.1-8b": ("llama", Shape(32, 4096, 14336, 32, 8, 128, 128256), False),
    "mistral-nemo-12b": ("mistral", Shape(40, 5120, 14336, 32, 8, 128, 131072), False),
    "llama-3.2-1b": ("llama", Shape(16, 2048, 8192, 32, 8, 64, 128256), True),
    "smollm-135m": ("llama", Shape(30, 576, 1536, 9, 3, 64, 49152), True),
    "nemotron-4-15b": ("nemotron", Shape(32, 6144, 24576, 48, 8, 128, 256000), False),
    "qwen2.5-0.5b": ("qwen2", Shape(24, 896, 4864, 14, 2, 64, 151936), True),
    "qwen2.5-7b": ("qwen2", Shape(28, 3584, 18944, 28, 4, 128, 152064), False),
    "gemma-2-2b": ("gemma2", Shape(26, 2304, 9216, 8, 4, 256, 256000), True),
    "phi-3-mini": ("phi3", Shape(32, 3072, 8192, 32, 32, 96, 32064), False),
    "olmo-2-7b": ("olmo2", Shape(32, 4096, 11008, 32, 32, 128, 100352), False),
    "tiny": ("mistral", TEACHER, False),
}
