"""A checkpoint as GGUF files, and what llama.cpp makes of them."""
