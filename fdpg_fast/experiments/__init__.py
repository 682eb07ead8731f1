"""`fdpg-fast experiment NAME`: sweeps of runs whose findings are judged from their numbers."""
