"""What flows: bytes -> samples -> batches -> steps -> scores."""
