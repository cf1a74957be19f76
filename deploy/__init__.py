"""Where everything is put together: the command line, settings, and how DeePar and its broker are started."""
