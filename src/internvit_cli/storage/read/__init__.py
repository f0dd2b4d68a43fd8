"""Read features by key."""
