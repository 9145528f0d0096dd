"""What the commands of cli.py do. Each module is imported by its own command, so that --help stays quick."""
