"""kvmtool: libkvm for XNU. Read the kernel memory of Mac OS X, live or dead, on any host."""

from __future__ import annotations
