"""The report: a run's predictions, intervals and residuals on one self-contained page."""
