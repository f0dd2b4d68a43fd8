"""Compute the results of the smaller commands: plan, info, ls, bench and doctor."""
