"""Fixtures that several test files share."""

from tests.bridge_checkpoints import families  # noqa: F401
