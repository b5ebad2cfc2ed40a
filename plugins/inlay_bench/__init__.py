"""The harness: tasks, metrics and reports that compare editing methods."""
