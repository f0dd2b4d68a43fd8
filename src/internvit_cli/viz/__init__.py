"""Features over their photographs."""
