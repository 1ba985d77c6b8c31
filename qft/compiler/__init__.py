"""From a format to kernels: numbers emitted into hand-written templates, compiled ahead of time or on demand."""
