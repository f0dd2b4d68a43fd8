"""Several encoders on one plan, each in a process of its own."""
