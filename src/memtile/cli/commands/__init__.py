"""The commands, one a file: options in, the work elsewhere, an exit code out."""
