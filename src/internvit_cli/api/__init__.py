"""Encode pictures and train on features from Python."""
