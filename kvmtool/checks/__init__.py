"""The checks of `kvmtool.check`, one module each, and what they share."""
