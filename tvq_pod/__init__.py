"""Trains Transformer-VQ language models: dense attention in linear time, over documents of any length."""

__version__ = "0.1.0"  # pyproject.toml reads it from here
