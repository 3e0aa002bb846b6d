"""What people look at: the paper figures, the report, the pictures of a user's own data."""
