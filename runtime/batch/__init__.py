"""Many cities: what they are, who predicts them, and what is said of the whole run."""
