"""A run on disk: its folder, checkpoints, numbers, tables and report."""
