"""Real networks, small enough to be trained here, beside the linear theory."""

__all__: list[str] = []
