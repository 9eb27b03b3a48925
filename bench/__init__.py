"""Side-by-side benchmarks: correctness first, all ratios of one table in one run, one command a subject (`python -m bench.mta`)."""
