"""How each model family is taken apart for export."""
