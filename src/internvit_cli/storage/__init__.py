"""Define feature files, write rows to them so that nothing is lost, and read them."""
