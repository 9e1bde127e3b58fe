"""The eyes of Interlock: GPU, host and process telemetry."""
