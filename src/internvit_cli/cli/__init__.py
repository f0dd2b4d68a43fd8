"""The command line: a thin shell around the pipeline and the reader. Only here is anything printed, and only here does a run exit."""
