"""A model behind HTTP: `batcher` makes batches of what many clients ask, `app` speaks with them."""
