"""Run `internvit extract`: decode, encode and store, resumable at every image."""
