"""Where and how a run executes: processes, devices, programs, metrics."""
