"""Whether an output still is what was committed, and what a sample of it becomes when it is encoded again."""
