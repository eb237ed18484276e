"""Named workloads, their runs against an engine, and reports. Behind `mm bench`."""
