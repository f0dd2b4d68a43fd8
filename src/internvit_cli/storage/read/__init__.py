"""Features by key."""
