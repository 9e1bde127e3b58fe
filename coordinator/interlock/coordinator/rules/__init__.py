"""The rule engine: Prometheus alerting rules, evaluated when a sample arrives.

What other code builds on:

- `rulefile.load_rules`, `parse_rules` -> `rule.Rule`s; `language.parse` -> an expression's tree.
- `engine.Engine(rules)`: `ingest(samples, ended, time, now)` or, by ids, `admit` and `apply`; `tick(now)` every 50 ms;
  `reload(rules, now)` keeps state; `eval(text, at)`; `running[i].tier` and `.why` say where a rule landed.
- `source.History` and `evaluate.Evaluation(history, at).elements(tree)`: an expression over any samples, at any moment.
- `promqltest.series_row`: the notation of series and values that promtool's unit tests share.
"""
