"""What qft tells other libraries about its layers when they are imported."""
