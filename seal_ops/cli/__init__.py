"""The command ``seal``; one file a subcommand."""
