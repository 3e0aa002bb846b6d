"""What every package here may use and nobody else should: input checks, whole files, late imports, linear algebra."""

__all__: list[str] = []
