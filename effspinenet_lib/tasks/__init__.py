"""What a backbone is used for: one module a task."""
