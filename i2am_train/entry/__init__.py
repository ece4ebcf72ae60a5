"""From a command line to a function: options, help, signals, and errors as one paragraph."""
