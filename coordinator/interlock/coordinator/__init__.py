"""What decides and what operators use: migrations, rules, the coordinator, the command line."""
