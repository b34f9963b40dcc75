"""Facts of the machine and of the process that runs on it."""
