"""What layers read, what rounding costs them, and which format for which layer follows from it."""
