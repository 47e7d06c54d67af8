"""Distillation from Weak Teacher: grow language models from smaller ones, in JAX."""

__version__ = "0.1.0"
