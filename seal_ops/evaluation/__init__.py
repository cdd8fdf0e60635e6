"""One measurement of a model: greedy retrieval by length, statistics, log-probabilities, lm-evaluation-harness."""
