"""Rows of tokens, transformers' Trainer, a run that survives a kill, and what came of it."""
