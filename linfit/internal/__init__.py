"""What every package here may use and nobody outside should: input checks, files written whole, late imports, linear algebra."""

__all__: list[str] = []
