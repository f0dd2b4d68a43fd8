"""Feature files: what they hold, how rows get into them so that nothing is ever lost, and how they are read."""
