"""Several processes that train one state: strategies, process groups, and what they agree on."""
