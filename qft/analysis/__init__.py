"""Analysis: what fine-tuning costs, and what it did to a packed model."""
