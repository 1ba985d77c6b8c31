"""Recipes: ways to train a packed model."""
