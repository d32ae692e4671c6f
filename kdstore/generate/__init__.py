"""Completions by the teacher itself, kept beside the store that they are scored into."""
