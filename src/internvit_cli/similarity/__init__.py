"""Which images are alike: search, duplicates, and the space in which vectors are compared."""
