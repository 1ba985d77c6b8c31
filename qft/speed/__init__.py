"""How fast kernels are on this machine, and how fast they could be."""
