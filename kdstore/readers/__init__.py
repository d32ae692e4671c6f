"""Readers: stores, samples, batches. ``kdstore.open`` is the front door."""
