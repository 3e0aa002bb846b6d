"""What is measured: experiments from raw data, methods compared, claims verified, sweeps."""

__all__ = [
    "claims",
    "compare",
    "equivalents",
    "flow",
    "merges",
    "overadaptation",
    "overtraining",
    "parameters",
    "real_data",
    "s3ft",
    "sweep",
    "verify",
]
