"""The command line: a thin shell around pipeline and reader, and the only place that prints or exits."""
