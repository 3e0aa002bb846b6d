"""What is predicted: closed forms and their optima. Formulas only: nothing is sampled or measured here."""

__all__ = ["equivalents", "flow", "frontier", "merges", "movement", "overadaptation", "overtraining", "s3ft"]
