"""Adapters: what is trained on top of the packed weights."""
