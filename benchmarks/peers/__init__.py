"""Other engines, to compare with: models of equal size for them, and how each is measured."""
