"""Processes, signals, memory and what a run tells while it goes on: nothing here knows pictures or features."""
