"""Features in other formats, merged, and compared."""
