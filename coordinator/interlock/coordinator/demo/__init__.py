"""The demo: a small fleet on this machine, moved under live load. Its agents and clients are in `sources/`."""
