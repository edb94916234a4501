"""Programs that use the library: the command line and what its commands do."""
