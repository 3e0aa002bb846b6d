"""Real networks, small enough to be trained here, beside the linear theory."""
