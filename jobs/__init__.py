"""People: the command line, progress, exit codes, pages."""
