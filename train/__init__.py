"""Training CPM-Bee: data, batches, the loop, and the demo model that the package carries."""
