"""The command line: `kvkeep COMMAND`; each command has a file of its own."""
