"""Risk from the source: which agents a tree has, what speaks against moving each, how careful a move is due.

- `reading.read(bytes, path)` -> `model.Module`: what one file says, from its syntax tree. Pure, and never fails.
- `project.Project(modules)`: names resolved over files. `agents.find` -> the agents of a tree, with their findings.
- `scoring.assess` -> `report.Report`: both risk matrices, level, strategy, graph, duplicates.
- `walking`, `pool` and `worker` are the shell: they find files, and read them in processes of their own.
"""
