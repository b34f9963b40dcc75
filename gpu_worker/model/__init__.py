"""The transformer: weights and what they compute, without a cache."""
