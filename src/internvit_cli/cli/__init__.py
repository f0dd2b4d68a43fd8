"""The command line: a thin shell around the other packages, and the only one that prints or exits."""
