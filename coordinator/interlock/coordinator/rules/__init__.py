"""The rule engine: Prometheus alerting rules, evaluated when a sample arrives."""
