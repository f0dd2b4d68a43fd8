"""Define feature files, write rows to them crash-safely, and read them."""
