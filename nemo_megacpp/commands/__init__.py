"""One file per subcommand of ``nemo-megacpp``: its parser, its run, what it prints.

Each has ``add_parser``, which loads neither torch nor Megatron; a command imports them when it
runs.
"""
