"""Whole models: which layers are quantized, what replaces them, what is reported, getting ready to train."""
