"""Fixtures that several test files share."""

from tests.bridge_checkpoints import families  # noqa: F401
from tests.sweep_toys import like_a_worker  # noqa: F401
