"""Causal language models that read text alone."""
