"""Benchmarks against others, which time nothing before both sides are known to compute the same."""
