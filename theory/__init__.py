"""What is predicted: closed forms and their optima. Formulas only: nothing is sampled or measured here."""

__all__ = [
    "distillation",
    "dropout",
    "equivalents",
    "flow",
    "frontier",
    "merges",
    "movement",
    "overadaptation",
    "overtraining",
    "pipelines",
    "robust",
    "s3ft",
]
