"""Whether rows still are what was committed."""
