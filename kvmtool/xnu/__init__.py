"""The kernel object model: free functions from a `Target` to records, under XNU's own names."""

from __future__ import annotations
