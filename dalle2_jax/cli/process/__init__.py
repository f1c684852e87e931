"""How a command runs as a process: its exit code, its signals, its children, what libraries print."""
