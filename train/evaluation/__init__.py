"""Evaluation: protocols, baselines, paired tests and tables, over methods that never see a held-out label."""
