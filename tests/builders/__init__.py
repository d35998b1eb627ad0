"""What the tests read: files made byte by byte from the published formats, never by kvmtool."""
