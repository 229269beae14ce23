"""Experiments: grids of runs over variants, tasks, sizes and seeds, with their statistics and report."""
