"""The engine core in a process of its own, and the caller's end of it."""
