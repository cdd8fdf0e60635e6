"""The command ``seal``; one file a subcommand.

`main` runs them, `command` says what one is, `options` and `option_types` are what several share, `config_file` reads
``--config``.
"""
