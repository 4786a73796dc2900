"""`python -m flowtracer_plugin` is the command `flowtracer`."""

from flowtracer_plugin.cli.commands import main

main()
