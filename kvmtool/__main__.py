"""`python -m kvmtool`."""

from __future__ import annotations

from kvmtool.cli import main

if __name__ == "__main__":
    main()
