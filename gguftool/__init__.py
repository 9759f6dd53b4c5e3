"""Offline compression of Mixture-of-Experts models for llama.cpp: stats -> plan -> gguf, then the report."""

__version__ = "0.2.0"
