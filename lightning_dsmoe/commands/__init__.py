"""What the commands do, each in a module of its name that is imported when the command is run."""
