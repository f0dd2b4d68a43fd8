"""Check whether an output still holds what was committed, and encode a sample of it again."""
