"""C types as data: where a member of a kernel structure lies, and from which source we know it."""
