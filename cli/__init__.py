"""The command line of kdstore, one command per file."""
