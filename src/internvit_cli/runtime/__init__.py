"""Worker processes, signals, memory and progress; nothing here knows pictures or features."""
