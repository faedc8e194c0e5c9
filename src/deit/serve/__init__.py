"""A model behind HTTP: `question` reads what clients ask, `batcher` makes batches of it, `app` answers."""
