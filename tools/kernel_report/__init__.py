"""Budgets and counters of cumla's kernels: kernels_cu/README.md and the heads of its files."""
