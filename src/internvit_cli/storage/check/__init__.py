"""Check whether rows still are what was committed."""
