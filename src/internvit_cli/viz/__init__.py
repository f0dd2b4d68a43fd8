"""Draw features over their photographs."""
