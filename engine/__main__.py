"""``python -m cpmbee`` is the ``cpmbee`` command."""

from __future__ import annotations

import sys

from cpmbee.cli import main

if __name__ == "__main__":
    sys.exit(main())
