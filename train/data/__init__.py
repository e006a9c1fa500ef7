"""The data pipeline: from texts and JSON lines to packed training batches."""
