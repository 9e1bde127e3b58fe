"""The ground floor of Interlock: messages, the two planes of the bus, configuration."""

__version__ = "0.1.0"
